"""Conversation files in every format are recognised and read completely, or refused in one line."""

import bz2
import gzip
import json
import lzma
import zipfile
from pathlib import Path

import pytest

from conftest import PROJECT, bundled_dialogues, dialogues_of
from dialogues.dialogue import ALPACA, ALPACA_WITH_INPUT, INSTRUCTION, Dialogue, Turn
from dialogues.layouts.formats import FORMATS
from dialogues.reading import open_source
from support.errors import UserError

SAMPLES = PROJECT / "tests" / "samples"
RAIN, FRIDAY = "Is it still raining?", "Since Friday."


def talk(*said: tuple[str, str], instruction: str = INSTRUCTION, skipped: tuple[str, ...] = ()) -> Dialogue:
    return Dialogue(tuple(Turn(*turn) for turn in said), instruction, skipped)


PLEASE = talk(("User", "Tea?"), ("Assistant", "Please."))
EXPECTED = {
    "names.json": (
        "names",
        [talk(("Alex", RAIN), ("Bob", FRIDAY), ("Alex", "Then stay in.")), talk(("Ann", "Tea?"), ("Cem", "Please."))],
    ),
    "turns.jsonl": (
        "turns",
        [talk(("Alex", RAIN), ("Bob", FRIDAY)), talk(("Ann", "Tea?"), ("Ann", "Or coffee?"), ("Cem", "Tea."))],
    ),
    "messages.json": (
        "messages",
        [
            talk(
                ("User", RAIN),
                ("Assistant", "Aye,\nsince Friday."),
                instruction="Answer like a pirate.",
                skipped=("tool calls", "tool calls", "messages without text", "multimodal messages"),
            )
        ],
    ),
    "sharegpt.json": ("sharegpt", [talk(("User", RAIN), ("Assistant", FRIDAY))]),
    "alpaca.json": (
        "alpaca",
        [
            talk(
                ("Instruction", "Correct the spelling."),
                ("Input", "freind"),
                ("Response", "friend"),
                instruction=ALPACA_WITH_INPUT,
            ),
            talk(("Instruction", "Name a colour."), ("Response", "Blue."), instruction=ALPACA),
            talk(("Instruction", "Name a fruit."), ("Response", "Fig."), instruction=ALPACA),
        ],
    ),
    "pairs.jsonl": ("pairs", [talk(("User", RAIN), ("Assistant", FRIDAY)), PLEASE]),
    "text.txt": (
        "text",
        [
            talk(("Alex", RAIN + "\nHere it stopped."), ("Bob", "Since Friday: all day.")),
            talk(("Q", "Tea?"), ("A", "Please.")),
        ],
    ),
    "ruled.txt": (
        "text",
        [talk(("Alex", RAIN), ("Bob", FRIDAY)), talk(("Ann", "Tea?"), ("Cem", "Please."), skipped=("empty turns",))],
    ),
    "whatsapp-ios.txt": (
        "chat-export",
        [
            talk(
                ("Alex", RAIN + "\nHere it stopped."),
                ("Bob", FRIDAY + "\nAll day."),
                skipped=("media and notices",) * 2,
            ),
            talk(("Bob", "Tea?"), ("Alex", "Please.")),
        ],
    ),
    "whatsapp-android.txt": (
        "chat-export",
        [
            talk(
                ("Alex", RAIN),
                ("Bob", FRIDAY),
                ("Alex", "Happy new year!"),
                skipped=("system lines", "system lines", "media and notices"),
            ),
            talk(("Bob", "Tea?"), ("Alex", "Please.")),
        ],
    ),
    "signal.txt": ("chat-export", [talk(("Alex", RAIN), ("Me", FRIDAY), ("Alex", "Then stay in."))]),
    "telegram.json": (
        "chat-export",
        [
            talk(("Alex", RAIN), ("Bob", "See rain.example."), skipped=("system lines", "media and notices")),
            talk(("Bob", "Tea?"), ("Alex", "Please.")),
        ],
    ),
    "table.csv": (
        "csv",
        [
            talk(("Alex", 'Is it "still" raining; there?'), ("Bob", "Since\nFriday.")),
            talk(("Ann", "Tea?"), ("Cem", "Please.")),
        ],
    ),
    "table.tsv": ("tsv", [talk(("User", RAIN), ("Assistant", FRIDAY)), PLEASE]),
}


def read(path: Path, format: str = "auto", **options) -> list[Dialogue]:
    return list(dialogues_of(open_source(path, format, **options)))


def refusal(path: Path, format: str = "auto") -> str:
    with pytest.raises(UserError) as caught:
        read(path, format)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert len(message) < 600
    return message


def test_every_sample_has_an_expected_result():
    assert {path.name for path in SAMPLES.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_sample_is_read(name):
    format, dialogues = EXPECTED[name]
    source = open_source(SAMPLES / name)
    assert (source.format, list(dialogues_of(source))) == (format, dialogues)
    assert read(SAMPLES / name, format) == dialogues


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("pack", ["gz", "xz", "bz2", "zip", "bom", "crlf"])
def test_a_packed_sample_is_read(name, pack, tmp_path):
    content = (SAMPLES / name).read_bytes()
    path = tmp_path / f"file.{pack}"
    if pack == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("chat.txt", content)
            archive.writestr("photo.jpg", b"\xff\xd8")
            archive.writestr("__MACOSX/._chat.txt", b"\0")
    else:
        packed = {
            "gz": gzip.compress,
            "xz": lzma.compress,
            "bz2": bz2.compress,
            "bom": lambda content: b"\xef\xbb\xbf" + content,
            "crlf": lambda content: content.replace(b"\n", b"\r\n"),
        }
        path.write_bytes(packed[pack](content))
    _, dialogues = EXPECTED[name]
    found = read(path)
    if pack == "crlf" and name == "table.csv":  # a line end inside quotes is part of the cell
        found = [
            dialogue._replace(
                turns=tuple(Turn(*(part.replace("\r\n", "\n") for part in turn)) for turn in dialogue.turns)
            )
            for dialogue in found
        ]
    assert found == dialogues


def test_the_bundled_conversations_are_read():
    dialogues = bundled_dialogues()
    assert len(dialogues) == 10
    for dialogue in dialogues:
        assert [turn.speaker for turn in dialogue.turns] == ["Alex", "Bob", "Alex"]


@pytest.mark.parametrize("turns", ["turns", "dialog", "dialogue", "conversation", "utterances"])
@pytest.mark.parametrize("speaker", ["speaker", "sender", "author", "role"])
@pytest.mark.parametrize("text", ["text", "message", "content", "utterance"])
def test_turns_may_have_other_keys(turns, speaker, text, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps({turns: [{speaker: "Ann", text: "Tea?"}, {speaker: "Cem", text: " Please. "}]}))
    assert read(path) == [talk(("Ann", "Tea?"), ("Cem", "Please."))]


@pytest.mark.parametrize(
    ("stamps", "pause_hours", "dialogues"),
    [
        (["31.12.23, 23:50 - ", "01.01.24, 00:10 - "], 8, 1),  # Germany
        (["12/31/23, 11:50 PM - ", "1/1/24, 12:10 AM - "], 8, 1),  # United States
        (["[31/12/2023, 11:50:00 pm] ", "[01/01/2024, 12:10:00 am] "], 8, 1),  # Australia
        (["31/12/23 23:50 - ", "1/1/24 0:10 - "], 8, 1),  # Italy
        (["31/12/23, 11:50 p. m. - ", "1/1/24, 12:10 a. m. - "], 8, 1),  # Spain
        (["2023-12-31 23.50 - ", "2024-01-01 00.10 - "], 8, 1),  # Sweden
        (["31. 12. 2023 23:50 - ", "1. 1. 2024 0:10 - "], 8, 1),  # Czechia
        (["31.12.2023 klo 23.50 - ", "1.1.2024 klo 0.10 - "], 8, 1),  # Finland
        (["31.12.23 г., 23:50 - ", "1.01.24 г., 0:10 - "], 8, 1),  # Bulgaria
        (["31/12/2023 à 23:50 - ", "01/01/2024 à 00:10 - "], 8, 1),  # France
        (["23:50, 31/12/2023 - ", "00:10, 1/1/2024 - "], 8, 1),  # Vietnam
        (["31\u200f/12\u200f/2023، 11:50 م - ", "1\u200f/1\u200f/2024، 12:10 ص - "], 8, 1),  # Egypt
        (["[2023. 12. 31. 오후 11:50:00] ", "[2024. 1. 1. 오전 12:10:00] "], 8, 1),  # Korea
        (["2023/12/31 23:50 - ", "2024/01/01 00:10 - "], 8, 1),  # Japan
        (["2023/12/31 下午11:50 - ", "2024/1/1 上午12:10 - "], 8, 1),  # Taiwan
        (["01.02.23, 10:00 - ", "03.02.23, 10:00 - "], 8, 2),  # two days apart, not two months
        (["01.02.23, 10:00 - ", "01.02.23, 13:00 - "], 8, 1),
        (["01.02.23, 10:00 - ", "01.02.23, 13:00 - "], 3, 2),
    ],
)
def test_dates_and_clocks_of_many_countries_are_read(stamps, pause_hours, dialogues, tmp_path):
    path = tmp_path / "chat.txt"
    lines = [f"{stamp}{name}: hello {number}" for number, stamp in enumerate(stamps) for name in ("Ann", "Cem")]
    path.write_text("\n".join(lines), encoding="utf-8")
    found = read(path, pause_hours=pause_hours)
    assert open_source(path).format == "chat-export"
    assert len(found) == dialogues
    assert sum(len(dialogue.turns) for dialogue in found) == 4


NOTICES = [
    "<Media omitted>",
    "‎image omitted",
    "‹Pominięto multimedia>",
    "<Medya dahil edilmedi>",
    "DOC-1.pdf (file allegato)",
    "Diese Nachricht wurde gelöscht.",
    "null",
]


def test_notices_in_an_export_are_skipped(tmp_path):
    path = tmp_path / "chat.txt"
    said = [*NOTICES, "IMG-1.jpg (file attached)\nLook!", "I <3 you <and> this"]
    path.write_text(
        "\n".join(f"31.12.23, 23:50 - {'AB'[n % 2]}nn: {text}" for n, text in enumerate(said)), encoding="utf-8"
    )
    (dialogue,) = read(path)
    assert dialogue.skipped == ("media and notices",) * len(NOTICES)
    assert [turn.text for turn in dialogue.turns] == ["Look!", "I <3 you <and> this"]
    subject = '31.12.23, 23:50 - {} changed the subject to {}Trip: Rome"\n'
    lines = (
        "".join(subject.format("Ann", quote) for quote in '"“„«') + "31.12.23, 23:50 - A: a\n31.12.23, 23:50 - B: b\n"
    )
    path.write_text(lines, encoding="utf-8")
    assert read(path) == [talk(("A", "a"), ("B", "b"), skipped=("system lines",) * 4)]


@pytest.mark.parametrize(
    ("record", "dialogue", "not_used"),
    [
        (
            {"instruction": "a", "context": "b", "response": "c", "category": "x"},
            talk(("Instruction", "a"), ("Input", "b"), ("Response", "c"), instruction=ALPACA_WITH_INPUT),
            ("category",),
        ),
        (
            {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "Hm."},
            talk(("Instruction", "a"), ("Response", "b"), ("Instruction", "c"), ("Response", "d"), instruction="Hm."),
            (),
        ),
        (
            {
                "system": "Hm.",
                "conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b", "w": 0}],
            },
            talk(("Assistant", "a"), ("User", "b"), instruction="Hm."),
            ("w",),
        ),
        ({"instruction": "a", "output": " "}, talk(skipped=("turns of records without an answer",) * 2), ()),
        ({"turns": []}, talk(), ()),
        (
            {"instruction": "a", "input": " ", "context": "b", "output": "", "response": "c"},
            talk(("Instruction", "a"), ("Input", "b"), ("Response", "c"), instruction=ALPACA_WITH_INPUT),
            ("input", "output"),
        ),
        (
            {"prompt": "a", "completion": "b", "response": "c"},
            talk(("User", "a"), ("Assistant", "b")),
            ("response",),
        ),
        (
            {"prompt": "a", "completion": "", "question": "c", "answer": "d"},
            talk(("User", "c"), ("Assistant", "d")),
            ("prompt", "completion"),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a", "text": None},
                    {"from": "gpt", "value": "b", "text": ""},
                ]
            },
            talk(("User", "a"), ("Assistant", "b")),
            (),
        ),
        (
            {"messages": [{"role": "user", "content": "a", "author": "u17"}, {"role": "assistant", "content": "b"}]},
            talk(("User", "a"), ("Assistant", "b")),
            (),
        ),
        (
            {"turns": [{"speaker": "Human", "text": "a"}, {"speaker": "Bot", "text": "b"}]},
            talk(("Human", "a"), ("Bot", "b")),
            (),
        ),
    ],
)
def test_every_key_of_a_published_record_is_read_or_named(record, dialogue, not_used, tmp_path):
    """This holds even if the first record is empty."""
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record] * 2 if dialogue.turns else [record, {**record, "output": "x"}]))
    source = open_source(path, "auto" if dialogue.turns or "output" in record else "turns")
    assert next(dialogues_of(source)) == dialogue
    assert source.not_used == not_used


def test_spreadsheet_exports_are_read(tmp_path):
    path = tmp_path / "table"
    expected = [talk(("A", "a"), ("B", "b")), talk(("A", "c"), ("B", "d"))]
    for name in ("Conversation ID", "dialogueId", "session_id"):
        path.write_text(f"sep=;\n{name};Speaker;Text\n1;A;a\n1;B;b\n2;A;c\n2;B;d\n")
        assert read(path) == expected
    path.write_text("id,speaker,text\n1,A,a\n2,B,b\n")  # this id numbers the rows
    assert read(path) == expected[:1]
    path.write_text('speaker\ttext\nA\t"Hi\nB\tyou" there\nA\t"He said ""ho"""\n')
    assert read(path) == [talk(("A", '"Hi'), ("B", 'you" there'), ("A", 'He said "ho"'))]
    rows = [{"dialogue_id": number // 2, "speaker": "AB"[number % 2], "text": "abcd"[number]} for number in range(4)]
    path.write_text(json.dumps(rows))
    assert read(path) == expected


def test_blank_lines_after_every_turn_do_not_separate_dialogues(tmp_path):
    path = tmp_path / "chat.txt"
    path.write_text("Ann: Tea?\n\nCem: Please.\n\nAnn: Here.\n")
    assert read(path) == [talk(("Ann", "Tea?"), ("Cem", "Please."), ("Ann", "Here."))]


ODD_TEXTS = {
    "a link below the last message": (
        "Ann: Tea?\nCem: Please.\nAnn: Look:\nhttps://example.org/tea\n",
        [talk(("Ann", "Tea?"), ("Cem", "Please."), ("Ann", "Look:\nhttps://example.org/tea"))],
    ),
    "code without a closing fence": (
        "User: Code?\nAssistant: Here:\n```\nx = 1\nUser: Thanks.\nAssistant: Sure.\n",
        [talk(("User", "Code?"), ("Assistant", "Here:\n```\nx = 1"), ("User", "Thanks."), ("Assistant", "Sure."))],
    ),
    "an emoji as a name": (
        "Ann: Tea?\n🐻: Please.\nCem: And me?\n🐻: You too.\nAnn: Here.\nCem: Oh.\n",
        [
            talk(
                *(("Ann", "Tea?"), ("🐻", "Please."), ("Cem", "And me?"), ("🐻", "You too.")),
                *(("Ann", "Here."), ("Cem", "Oh.")),
            )
        ],
    ),
    "numbered questions": (
        "Q1: Tea?\nA1: Please.\nQ2: Milk?\nA2: No.\n",
        [talk(("Q", "Tea?"), ("A", "Please."), ("Q", "Milk?"), ("A", "No."))],
    ),
    "a list with colons in an answer": (
        "Ann: Bread?\nCem: Take:\nFlour: 500 g\nWater: 300 g\nAnn: Thanks.\n\n"
        "Ann: Cake?\nCem: Take:\nFlour: 300 g\nWater: none\nAnn: Fine.\n",
        [
            talk(("Ann", "Bread?"), ("Cem", "Take:\nFlour: 500 g\nWater: 300 g"), ("Ann", "Thanks.")),
            talk(("Ann", "Cake?"), ("Cem", "Take:\nFlour: 300 g\nWater: none"), ("Ann", "Fine.")),
        ],
    ),
    "a person who speaks once in a transcript": (
        "Ann Berg  0:00\nTea?\n\nCem  0:05\nPlease.\n\nDora  0:07\nAnd me.\n\n"
        "Ann Berg  0:09\nHere.\n\nCem  0:12\nOh.\n",
        [
            talk(
                *(("Ann Berg", "Tea?"), ("Cem", "Please."), ("Dora", "And me."), ("Ann Berg", "Here.")),
                ("Cem", "Oh."),
            )
        ],
    ),
    "captions with numbers that look like dates": (
        "WEBVTT\n\na-1/12-0\n00:00:01.000 --> 00:00:02.000\n<v Ann>Tea <b>now</b>?</v>\n\n"
        "a-1/13-0\n00:00:03.000 --> 00:00:04.000\n<v Cem>Please,\ndo.</v>\n\n"
        "a-1/14-0\n00:00:05.000 --> 00:00:06.000\n<v Ann>Here.</v>\n",
        [talk(("Ann", "Tea now?"), ("Cem", "Please,\ndo."), ("Ann", "Here."))],
    ),
    "two people in a caption": (
        "1\n00:00:01,000 --> 00:00:02,000\nAnn: Tea?\nCem: Please.\n\n"
        "2\n00:00:03,000 --> 00:00:04,000\nAnn: Here.\n\n3\n00:00:05,000 --> 00:00:06,000\nCem: Oh.\n",
        [talk(("Ann", "Tea?"), ("Cem", "Please."), ("Ann", "Here."), ("Cem", "Oh."))],
    ),
    "a system prompt": (
        "System: Be kind.\nUser: Tea?\nAssistant: Please.\n\nSystem: Be brief.\nUser: Milk?\nAssistant: No.\n",
        [
            talk(("User", "Tea?"), ("Assistant", "Please."), instruction="Be kind."),
            talk(("User", "Milk?"), ("Assistant", "No."), instruction="Be brief."),
        ],
    ),
}


@pytest.mark.parametrize("kind", ODD_TEXTS)
def test_texts_that_look_like_something_else_are_read(kind, tmp_path):
    path = tmp_path / "data"
    path.write_text(ODD_TEXTS[kind][0], encoding="utf-8")
    assert read(path) == ODD_TEXTS[kind][1]


def test_tables_and_chats_can_declare_turns_as_context(tmp_path):
    path = tmp_path / "data"
    path.write_text("dialogue,speaker,text,weight\n1,Ann,Tea?,1\n1,Cem,No.,0\n1,Ann,Why?,1\n")
    assert [dialogue.context for dialogue in read(path)] == [(1,)]
    said = [("Ann", "Tea?", 1), ("Cem", "No.", 0), ("Cem", "Yes.", 1), ("Cem", "Please.", 1), ("Ann", "Here.", 0)]
    rows = [
        {"sender": name, "text": text, "weight": weight, "time": f"2024-01-01T10:0{minute}"}
        for minute, (name, text, weight) in enumerate(said)
    ]
    path.write_text(json.dumps(rows))
    turns = talk(("Ann", "Tea?"), ("Cem", "No."), ("Cem", "Yes.\nPlease."), ("Ann", "Here."))
    assert read(path) == [turns._replace(context=(1, 3))]


def test_messages_are_sorted_even_if_some_times_or_ids_are_missing(tmp_path):
    path = tmp_path / "data"
    rows = [{"sender": "AC"[place % 2], "text": f"m{place}", "time": f"2024-01-01T10:0{place}"} for place in range(4)]
    del rows[1]["time"]
    path.write_text(json.dumps([{"time": None, **row} for row in reversed(rows)]))
    in_order = talk(("A", "m0"), ("C", "m1"), ("A", "m2"), ("C", "m3"))
    assert read(path) == [in_order]
    counted = [{"turn": place % 2, "speaker": "AC"[place % 2], "text": f"m{place}"} for place in range(4)]
    path.write_text(json.dumps(counted))  # a dialogue begins where the numbers restart
    assert read(path) == [talk(("A", "m0"), ("C", "m1")), talk(("A", "m2"), ("C", "m3"))]
    quoted = [
        {"id": place, "reply_to": {2: 0, 3: 1}.get(place), "sender": "AC"[place % 2], "text": f"m{place}"}
        for place in range(5)
    ]
    path.write_text(json.dumps(quoted))  # few messages answer others: this is a chat, not threads
    assert read(path) == [talk(*in_order.turns, ("A", "m4"))]


def test_a_key_that_occurs_twice_is_a_person(tmp_path):
    path = tmp_path / "data"
    path.write_text('[{"Title": "Out", "Server": "Soup?", "Guest": "Yes.", "Server": "Here.", "Guest": "Thanks."}]')
    source = open_source(path)
    assert source.not_used == ("Title",)
    assert read(path) == [talk(("Server", "Soup?"), ("Guest", "Yes."), ("Server", "Here."), ("Guest", "Thanks."))]
    path.write_text('{"turns": [{"speaker": "A", "text": "a", "message": "b"}, {"speaker": "C", "text": "c"}]}')
    assert open_source(path).not_used == ("message",)


CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
BROKEN = {
    "[]": "its list is empty",
    "{}": "record 1: an object without keys is not a conversation",
    "": "the file is empty",
    '[{"A": "b", "B": ]': "line 1, column 18: not JSON (Expecting value)",
    '[\n {"A": "b",\n]': "line 3, column 1: not JSON",
    "just prose.": "no conversation found (the text starts with 'just prose.')",
    "[" * 1_000_000: "its JSON is nested too deeply to hold conversations",
    '{"A": "b", "B": "c"}\n' + "[" * 1_000_000: "line 2: this JSON can't be read",
    "1" * 10_000: "no conversation found",
    "[" + "1" * 10_000 + "]": "Exceeds the limit",
    '["a"]': "record 1: text is not a conversation",
    "[[1, 2], [3]]": "record 1: these are token ids",
    '{"input_ids": [1, 2]}': "record 1: these are token ids",
    '[{"text": "prose", "label": "x"}]': "record 1: no known format has the keys 'text', 'label'",
    '[{"A": "b", "B": "c"}, "text"]': 'record 2: an object {"speaker": "text", ...} is needed; this is text',
    '[{"A": "b", "B": "c"}, {"A": "alone"}]': "record 2: a dialogue needs two turns or more; this has 1",
    '[{"A": "b", "B": 5}]': "record 1: turn 2: the text of 'B' must be a string, not a number",
    '[{"A": "b", "B": null}]': "record 1: turn 2: the text of 'B' must be a string, not null",
    '[{"A": "b", "B": true}]': "record 1: turn 2: the text of 'B' must be a string, not true or false",
    '[{"A": "b", "B": {"C": "d"}}]': "no known format has the keys 'A', 'B'; say what they hold",
    '[{"A": "b", "B": "  "}]': "record 1: turn 2: 'B' says nothing; remove the turn or add its text",
    '[{"": "b", "B": "c"}]': "record 1: turn 1: '' is not a speaker's name",
    '[{"A\\nB": "b", "B": "c"}]': "is not a speaker's name; use one line of 1 to 200 printable",
    json.dumps([{"n" * 10_000: "b", "B": "c"}]): "…' is not a speaker's name",
    '[{"A": "\\ud83d", "B": "c"}]': "record 1: turn 1: it contains an unpaired surrogate",
    '[{"role": "user", "content": "a"}]': "only the user speaks here; the answers are missing",
    json.dumps({**CHAT, "prompt": "a", "completion": "b"}): (
        "this could be messages or pairs (the keys 'messages', 'prompt', 'completion'); say which with --format"
    ),
    '[{"prompt": "a", "completion": "b"}, {"instruction": "a", "output": "b"}]': (
        "record 2: this is alpaca, but the first record was pairs"
    ),
    '{"A": "b", "B": "c"}\n\n{"A": "b", "B": 5}': "line 3: turn 2: the text of 'B' must be a string",
    '{"A": "b", "B": "c"}\n{"A": "b", "B"}': "line 2: column 15: not JSON",
    '{"turns": [{"speaker": "A", "text": "b"}, "c"]}': "record 1: turn 2 must be an object with speaker and text",
    '{"turns": [{"speaker": "A", "text": "b"}, {"text": "c"}]}': "record 1: turn 2 has no speaker",
    "Ann: Tea?\nCem: Yes.\n\nprose\n": "line 4: no speaker for this line",
    "[1/2/23, 10:00] Ann: hi\n[13/13/23, 10:00] Cem: ho": "line 2: no order of day, month and year fits this date",
    "speaker,text\nAnn,Tea?,again\n": "line 2 has 3 columns, but the header has 2",
    'speaker,text\nAnn,"Tea?\n': "line 2: unexpected end of data",
    "speaker,text\n": "the table has a header but no rows",
    "ticket,who,said\n1,Ann,Tea for me?\n2,Cem,Please do.\n": (
        "no known format has the keys 'ticket', 'who', 'said'; say what they hold, as in --columns"
        " speaker=who text=said"
    ),
    '[{"messages": [{"role": "user", "content": {"parts": ["a"], "parts": ["b"]}}]}]': "the key 'parts' occurs 2 times",
    '[{"messages": [{"author": {"role": "user", "role": "bot"}, "content": "a"}]}]': "the key 'role' occurs 2 times",
    '[{"Bird": "a", "Hat": "b", "Egg": "c"}, {"Bird": "d", "Hat": "e", "Egg": "f"}]': "all records have the same keys",
    '{"\\n": null}': "say what they hold, as in --columns speaker= text=",
    "Ann,Tea?\nCem,Please\nAnn,Here\n": "the table's first line has no column names; add a line",
    "INFO: on\nWARN: slow\nINFO: off\nWARN: slow\n": "no conversation found",
    "host: a\nport: 1\nowner: x\n\nhost: b\nport: 2\nowner: y\n": "no conversation found",
    "Apple: red\nBanana: long\nCherry: small\nDate: sweet\nElder: dark\n": "no conversation found",
}


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: content[:40])
def test_a_broken_file_is_refused(content, tmp_path):
    path = tmp_path / "data"
    path.write_text(content, encoding="utf-8")
    assert BROKEN[content] in refusal(path)


def test_bytes_that_are_not_text_are_refused(tmp_path):
    path = tmp_path / "data"
    for content, message in [
        (b"\0\1\2", "a binary file"),
        ("[]".encode("utf-16"), "its list is empty"),
        ("[]".encode("utf-16")[:-1], "it starts like UTF-16 but is not; save the file as UTF-8"),
        ('[{"A": "b",\n"B": "caf\xe9"}]'.encode("latin-1"), "line 2 is not UTF-8 text; save the file as UTF-8"),
        ('{"A": "b", "B": "c"}\n{"A": "b", "B": "caf\xe9"}'.encode("latin-1"), "line 2: not UTF-8 text"),
        ("Ann: caf\xe9\nCem: ja".encode("latin-1"), "line 1 is not UTF-8 text"),
        (gzip.compress(b"[" * 1000)[:-10], "is damaged or cut short"),
        (lzma.compress(b"[" * 1000)[:-10], "is damaged or cut short"),
        (b"PK\x03\x04 and no archive", "is damaged or cut short"),
        (b"Ann: hi\rCem: ho\r", "its lines end with CR only"),
    ]:
        path.write_bytes(content)
        assert message in refusal(path)


def test_an_archive_of_several_files_needs_a_choice(tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "Ann: Tea?")
        archive.writestr("b.json", "[]")
    assert refusal(path) == f"{path} holds 2 files ({path}/a.txt, {path}/b.json, …); choose one"


def test_a_forced_format_is_used(tmp_path):
    path = tmp_path / "data"
    path.write_text(json.dumps({**CHAT, "prompt": "x", "completion": "y"}))
    assert read(path, "pairs") == [talk(("User", "x"), ("Assistant", "y"))]
    assert read(path, "messages") == [talk(("User", "a"), ("Assistant", "b"))]
    path.write_text('[{"text": "a", "label": "b"}]')
    assert read(path, "names") == [talk(("text", "a"), ("label", "b"))]
    path.write_text("1.1.24 10:00 Ann: hi\nCem: ho")
    assert "line 1: no speaker for this line" in refusal(path, "text")
    path.write_text("Ann: hi\nCem: ho")
    assert "no chat export found" in refusal(path, "chat-export")
    for name in FORMATS:
        path.write_text('{"a": 1}')
        refusal(path, name)


def test_unusual_text_is_kept(tmp_path):
    """The text has right-to-left marks, NUL characters, emoji, or 20 MB on one line."""
    path = tmp_path / "data.json"
    odd = "\u200fשלום\u200e \u202eabc \0 🙂\u200d♂️ <|endoftext|> ### Bob:"
    path.write_text(json.dumps([{"A": odd, "B": "b"}]))
    assert read(path)[0].turns[0].text == odd
    path.write_text('[{"A": "' + "word " * 4_000_000 + '", "B": "b"}]')
    assert len(read(path)[0].turns[0].text) == 19_999_999
    path.write_text("x" * 20_000_000)
    refusal(path)


@pytest.mark.parametrize("number", ["1" * 400, "-" + "1" * 400, "1e999", json.dumps("1" * 5000)])
def test_numbers_too_large_for_a_float_are_accepted(number, tmp_path):
    """The numbers are times, turn numbers, or the ranks of answers."""
    two = [{"role": "prompter", "text": "a"}, {"role": "assistant", "text": "b"}]
    numbered = [{"dialogue_id": 1, "turn": 0, **turn, "timestamp": 0} for turn in two]
    ranked = {"prompt": {**two[0], "replies": [{**two[1], "rank": 0}, {**two[1], "rank": 0}]}}
    path = tmp_path / "data.json"
    for value in (numbered, ranked):
        path.write_text(json.dumps(value).replace(": 0", f": {number}"))
        (dialogue,) = read(path)
        assert [turn.text for turn in dialogue.turns] == ["a", "b"]


def test_json_lines_can_be_read_as_an_exported_chat(tmp_path):
    path = tmp_path / "chat.jsonl"
    lines = [{"sender": "AB"[number % 2], "text": "hi", "timestamp": 1_700_000_000 + number} for number in range(4)]
    path.write_text("\n".join(map(json.dumps, lines)))
    source = open_source(path, "chat-export")
    assert source.format == "chat-export"
    assert [len(dialogue.turns) for dialogue in dialogues_of(source)] == [4]
