"""The same conversations, written in many layouts of chat programs, data sets and people, are read back unchanged."""

import csv
import html
import io
import json
import subprocess
import sys
import time
from datetime import datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import PROJECT, dialogues_of
from dialogues.dialogue import Dialogue, Turn
from dialogues.layouts.quick import find_quick, read_quickly
from dialogues.layouts.turns import from_turns
from dialogues.reading import open_source
from support.errors import UserError
from whatsapp import write_chat

# The texts contain colons, times, quotation marks, a link and an emoji. Each conversation is on a different day.
TALKS = [
    ["Did the bus: 12 come?", "Yes 😀 at 20:15, they said.", 'He wrote "Cem: stay".', "See https://example.org/a?b=1"],
    ["Is the soup ready?", "Nearly: ten minutes.", "Good."],
    ["What shall we plant?", "Beans [the tall ones]."],
    ["The key is stuck.", "Lift the handle a little.", "It worked!"],
]
PEOPLE, ROLES = ("Dora", "Cem"), ("User", "Assistant")
START = datetime(2024, 3, 4, 20, 0, 5)


def expected(names=PEOPLE):
    return [[(names[turn % 2], text) for turn, text in enumerate(talk)] for talk in TALKS]


def messages():
    """Yield messages: the number of the talk, the number in the talk, the name, the text, and the time."""
    for number, talk in enumerate(TALKS):
        for turn, text in enumerate(talk):
            yield number, turn, PEOPLE[turn % 2], text, START + timedelta(days=number, minutes=turn)


def roles(user="user", assistant="assistant"):
    return [[((user, assistant)[turn % 2], text) for turn, text in enumerate(talk)] for talk in TALKS]


def json_lines(records):
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records)


def table(header, rows, delimiter=","):
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return file.getvalue()


def tree(talk, number):
    """A ChatGPT conversation with a regenerated answer."""
    nodes = {"root": {"id": "root", "message": None, "parent": None, "children": ["0"]}}
    for turn, (role, text) in enumerate(talk):
        message = {"author": {"role": role}, "content": {"content_type": "text", "parts": [text]}, "recipient": "all"}
        nodes[str(turn)] = {"id": str(turn), "message": message, "parent": str(turn - 1) if turn else "root"}
    other = {"author": {"role": "assistant"}, "content": {"content_type": "text", "parts": ["another answer"]}}
    nodes["x"] = {"id": "x", "message": other, "parent": "0", "children": []}
    return {"title": f"talk {number}", "mapping": nodes, "current_node": str(len(talk) - 1)}


def replies(talk, turn=0):
    role, text = talk[turn]
    below = [replies(talk, turn + 1)] if turn + 1 < len(talk) else []
    other = {"text": "worse", "role": "assistant", "rank": 1, "replies": []}
    rank = {"rank": 0} if role == "assistant" else {}
    return {"text": text, "role": role, **rank, "replies": [other, *below] if role == "prompter" and below else below}


def twice(text):
    return text.encode().decode("latin-1")


def lm_studio_content(role, text):
    parts = [{"type": "text", "text": text}]
    return {"content": parts} if role == "user" else {"steps": [{"type": "contentBlock", "content": parts}]}


NEWEST_FIRST = list(messages())[::-1]
IN_ROLES = {
    "ChatGPT": json.dumps([tree(talk, number) for number, talk in enumerate(roles())]),
    "Claude": json.dumps(
        [
            {"uuid": "u", "chat_messages": [{"sender": who, "text": text, "content": []} for who, text in talk]}
            for talk in roles("human")
        ]
    ),
    "Gemini": json_lines(
        {"contents": [{"role": who, "parts": [{"text": text}]} for who, text in talk]}
        for talk in roles("user", "model")
    ),
    "OpenAssistant's trees": json_lines(
        {"message_tree_id": "m", "prompt": replies(talk)} for talk in roles("prompter")
    ),
    "thoughts and tool calls": json_lines(
        {
            "messages": [
                {"role": who, "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": text}]}
                for who, text in talk
            ]
        }
        for talk in roles()
    ),
    "lists of strings": json_lines({"id": 1, "data": talk} for talk in TALKS),
    "a Python list in a cell": table(["dialog", "act"], [[repr(talk), "1"] for talk in TALKS]),
    "JSON in a cell": table(
        ["messages"], [[json.dumps([{"role": who, "content": text} for who, text in talk])] for talk in roles()]
    ),
    "ChatML": "\n\n".join("\n".join(f"<|im_start|>{who}\n{text}<|im_end|>" for who, text in talk) for talk in roles()),
    "Vicuna in a key": json_lines(
        {"text": " ".join(f"{who}: {text}" for who, text in talk)} for talk in roles("USER", "ASSISTANT")
    ),
    "hashes in a key": json_lines(
        {"text": "".join(f"### {who}: {text}" for who, text in talk)} for talk in roles("Human", "Assistant")
    ),
    "the chosen one of two": json_lines(
        {"rejected": "\n\nHuman: a\n\nAssistant: b", "chosen": "".join(f"\n\n{who}: {text}" for who, text in talk)}
        for talk in roles("Human", "Assistant")
    ),
    "LM Studio": json_lines(
        {
            "messages": [
                {"versions": [{"role": who, **lm_studio_content(who, text)}], "currentlySelected": 0}
                for who, text in talk
            ]
        }
        for talk in roles()
    ),
    "a turn a line": json_lines(
        {"conversation_id": number, "role": who, "content": text}
        for number, talk in enumerate(roles())
        for who, text in talk
    ),
}
OF_PEOPLE = {
    "Messenger": json.dumps(
        {
            "participants": [{"name": name} for name in PEOPLE],
            "messages": [
                {"sender_name": twice(name), "timestamp_ms": int(sent.timestamp() * 1000), "content": twice(text)}
                for *_, name, text, sent in NEWEST_FIRST
            ],
        }
    ),
    "Discord": json.dumps(
        {
            "guild": {"name": "g"},
            "messages": [
                {
                    "id": "0",
                    "type": "Call",
                    "timestamp": START.isoformat(),
                    "author": {"name": "Cem"},
                    "content": "Started",
                },
                *(
                    {
                        "id": str(n),
                        "type": "Default",
                        "timestamp": sent.isoformat(),
                        "author": {"name": name},
                        "content": text,
                    }
                    for n, (*_, name, text, sent) in enumerate(messages(), 1)
                ),
            ],
        }
    ),
    "Slack": json.dumps(
        [
            {"type": "message", "user": f"U{name}", "ts": str(sent.timestamp()), "text": text}
            | ({} if turn else {"user_profile": {"real_name": name}})
            | ({"user_profile": {"real_name": name}} if turn == 1 else {})
            for _, turn, name, text, sent in messages()
        ]
    ),
    "Google Chat": json.dumps(
        {
            "messages": [
                {
                    "creator": {"name": name, "email": "x@y"},
                    "created_date": f"{sent:%A, %B %d, %Y at %I:%M:%S %p} UTC",
                    "text": text,
                }
                for *_, name, text, sent in messages()
            ]
        }
    ),
    "Teams": json.dumps(
        {
            "value": [
                {
                    "id": str(sent.timestamp()),
                    "messageType": "message",
                    "createdDateTime": sent.isoformat(),
                    "from": {"application": None, "user": {"id": "x", "displayName": name}},
                    "body": {"contentType": "text", "content": text},
                }
                for *_, name, text, sent in NEWEST_FIRST
            ]
        }
    ),
    "Skype": json.dumps(
        {
            "conversations": [
                {
                    "id": "8:cem",
                    "displayName": "Cem",
                    "MessageList": [
                        {
                            "id": "1",
                            "displayName": name,
                            "originalarrivaltime": sent.isoformat(),
                            "messagetype": "RichText",
                            "content": html.escape(text),
                            "from": f"8:{name}",
                        }
                        for *_, name, text, sent in NEWEST_FIRST
                    ],
                }
            ]
        }
    ),
    "rows in any order": table(
        ["Dialogue_ID", "Utterance_ID", "Speaker", "Utterance", "Emotion"],
        [[number, turn, name, text, "joy"] for number, turn, name, text, _ in NEWEST_FIRST[::-1][::-1]][::-1],
    ),
    "newest first": table(
        ["Date", "User", "Message"], [[sent.isoformat(sep=" "), name, text] for *_, name, text, sent in NEWEST_FIRST]
    ),
    "German": table(
        ["Gespräch", "Sprecher", "Nachricht"], [[number, name, text] for number, _, name, text, _ in messages()], ";"
    ),
    "columns": json.dumps(
        {
            "scene": {str(n): number for n, (number, *_) in enumerate(messages())},
            "character": {str(n): name for n, (_, _, name, _, _) in enumerate(messages())},
            "line": {str(n): text for n, (*_, text, _) in enumerate(messages())},
        }
    ),
    "seasons and scenes": json.dumps(
        {
            "season_id": "s1",
            "episodes": [
                {"scenes": [{"utterances": [{"speakers": [who], "transcript": text} for who, text in talk]}]}
                for talk in expected()
            ],
        }
    ),
    "an object of dialogues": json.dumps(
        {f"d{n}": [{"speaker": who, "text": text} for who, text in talk] for n, talk in enumerate(expected())}
    ),
    "objects with one name": json.dumps([{"dialogue": [{who: text} for who, text in talk]} for talk in expected()]),
    "names and texts in two lists": json_lines(
        {"dialogue": [text for _, text in talk], "speakers": [who for who, _ in talk]} for talk in expected()
    ),
    "a dialogue in a cell": table(
        ["id", "dialogue", "summary"],
        [[n, "\n".join(f"{who}: {text}" for who, text in talk), "They talk."] for n, talk in enumerate(expected())],
    ),
}
OF_LINES = {
    "IRC": "".join(f"{sent:[%Y-%m-%d %H:%M:%S]} <{name}> {text}\n" for *_, name, text, sent in messages()),
    "IRC without dates": "".join(f"{sent:[%H:%M]} <{name}> {text}\n" for *_, name, text, sent in messages()),
    "LINE": "[LINE] Chat history with Cem\nSaved on: 2024/04/01 10:00\n"
    + "".join(
        f"\n{sent:%Y/%m/%d(%a)}\n" * (turn == 0) + f"{sent:%H:%M}\t{name}\t{text}\n"
        for _, turn, name, text, sent in messages()
    ),
    "KakaoTalk": "Cem 님과 카카오톡 대화\n"
    + "".join(
        f"--------------- {sent.year}년 {sent.month}월 {sent.day}일 월요일 ---------------\n" * (turn == 0)
        + f"[{name}] [오후 {sent:%I:%M}] {text}\n"
        for _, turn, name, text, sent in messages()
    ),
    "Discord's text": "=====\nChannel: Cem\n=====\n\n"
    + "".join(f"{sent:[%d-%b-%y %I:%M %p]} {name}#0001\n{text}\n\n" for *_, name, text, sent in messages()),
    "a name, then the time": "".join(
        f"{name} — {sent:%d/%m/%Y %H:%M}\n{text}\n" for *_, name, text, sent in messages()
    ),
    "the day in words, then the time": "\n---\n".join(
        "".join(f"{name} — Today at 6:0{turn} PM\n{text}\n" for turn, (name, text) in enumerate(talk))
        for talk in expected()
    ),
    "minutes and seconds since the start": "\n---\n".join(
        "".join(f"( {turn}m 1{turn}s ) {name}: {text}\n" for turn, (name, text) in enumerate(talk))
        for talk in expected()
    ),
    "the time, then a name": "".join(
        f"{sent:%b %d, %Y  %I:%M:%S %p}\n{name}\n{text}\n\n" for *_, name, text, sent in messages()
    ),
    "ISO": "".join(f"[{sent.isoformat()}Z] {name}: {text}\n" for *_, name, text, sent in messages()),
    "Markdown": "\n\n---\n\n".join("\n\n".join(f"**{who}:** {text}" for who, text in talk) for talk in expected()),
    "headings": "\n".join(
        f"Dialogue {n}:\n" + "".join(f"{who}: {text}\n" for who, text in talk) for n, talk in enumerate(expected(), 1)
    ),
    "lists": "\n\n".join("\n".join(f"- {who}: {text}" for who, text in talk) for talk in expected()),
    "brackets": "\n\n".join("\n".join(f"[{who}] {text}" for who, text in talk) for talk in expected()),
    "wide colons": "\n\n".join("\n".join(f"{who}：{text}" for who, text in talk) for talk in expected()),
    "no spaces": "\n\n".join("\n".join(f"{who}:{text}" for who, text in talk) for talk in expected()),
    "GPT-2's marks": "".join(
        "<|startoftext|>" + "\n".join(f"{who}: {text}" for who, text in talk) + "<|endoftext|>\n" for talk in expected()
    ),
    "two blank lines": "\n\n\n".join("\n\n".join(f"{who}: {text}" for who, text in talk) for talk in expected()),
    "names above": "\n\n---\n\n".join("\n\n".join(f"{who}:\n{text}" for who, text in talk) for talk in expected()),
}


def read(path, **options) -> list[list[tuple[str, str]]]:
    return [
        [(turn.speaker, turn.text) for turn in dialogue.turns]
        for dialogue in dialogues_of(open_source(path, **options))
    ]


@pytest.mark.parametrize("layout", IN_ROLES)
def test_layouts_with_users_and_assistants_are_read(layout, tmp_path):
    (tmp_path / "data").write_text(IN_ROLES[layout], encoding="utf-8")
    assert read(tmp_path / "data") == expected(ROLES)


@pytest.mark.parametrize("layout", OF_PEOPLE | OF_LINES)
def test_layouts_with_people_are_read(layout, tmp_path):
    (tmp_path / "data").write_text((OF_PEOPLE | OF_LINES)[layout], encoding="utf-8")
    assert read(tmp_path / "data") == expected()


@pytest.mark.parametrize("layout", OF_LINES)
def test_every_character_is_accounted_for(layout, tmp_path):
    """Turns, markup and lost characters together are at least all characters of the file, without spaces."""
    (tmp_path / "data").write_text(OF_LINES[layout], encoding="utf-8")
    account = open_source(tmp_path / "data").account
    numbers = [int(word.replace(",", "")) for word in account[0].split() if word.replace(",", "").isdigit()]
    spoken, markup, lost = numbers
    assert spoken >= sum(len(text) for talk in TALKS for text in talk)
    assert spoken + markup + lost >= len("".join(OF_LINES[layout].split()))
    assert lost == 0


NO_CONVERSATIONS = {
    "labels": json_lines({"sentence": text, "emotion": "joy"} for talk in TALKS for text in talk),
    "columns": json_lines({"headline": text, "story": text * 3} for talk in TALKS for text in talk),
    "reviews": json_lines(
        {"author": f"A{n}", "text": text} for n, text in enumerate(text for talk in TALKS for text in talk)
    ),
    "settings": json.dumps({"name": "x", "scripts": {"start": "node", "test": "jest"}, "messages": {"hi": "Hello!"}}),
    "products": "Product,Price,Stock\nKettle,30,4\nCup,5,20\nPot,12,0\n",
    "a glossary": "Aft: towards the back.\nBow: the front.\nPort: left of it.\nCleat: for a rope.\n",
    "amounts": "Dora: 12.50 €\nCem: 3 €\nDora: 7 €\nCem: 1.20 €\n",
    "headings in brackets": "[server]\nhost = 127.0.0.1\nport = 80\n\n[mail]\nfrom = a@x.com\nto = b@x.com\n",
    "a system's log": "".join(f"Mar  4 20:00:0{n} box sshd[80{n}]: Accepted key for ada\n" for n in range(9)),
    "a server's log": "".join(f"2024-03-04 20:00:0{n} INFO [main] app.http: GET /tea/{n}\n" for n in range(9)),
}


@pytest.mark.parametrize("kind", NO_CONVERSATIONS)
def test_a_file_without_conversations_is_refused_with_advice(kind, tmp_path):
    (tmp_path / "data").write_text(NO_CONVERSATIONS[kind], encoding="utf-8")
    with pytest.raises(UserError, match=r"--columns|--format|docs/data.md") as caught:
        read(tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_messages_from_the_owner_of_the_phone_are_recognised(tmp_path):
    """Their exports use a word or Android's number, and always contain the name of the other person."""
    talk = [("Me", "Is the soup ready?"), ("Cem", "Nearly."), ("Me", "Good.")]
    rows = [["Out" if who == "Me" else "In", "+15550100", "Cem", text] for who, text in talk]
    (tmp_path / "sms.csv").write_text(table(["Type", "Number", "Name", "Message"], rows), encoding="utf-8")
    assert read(tmp_path / "sms.csv") == [talk]
    app = {"address": "+15550100", "creator": "com.google.android.apps.messaging", "__display_name": "Cem"}
    sent = [{**app, "type": "2" if who == "Me" else "1", "body": text} for who, text in talk]
    (tmp_path / "sms.json").write_text(json_lines(sent), encoding="utf-8")
    assert read(tmp_path / "sms.json") == [talk]


def test_notices_around_messages_are_not_turns(tmp_path):
    stacked = "Mar 04, 2024  8:0{}:12 PM\n{}\n{}\n\n"
    talk = [("Me", "I asked:\nMe: can you help?\nDora: only with cake"), ("Dora", "yes"), ("Me", "ok"), ("Dora", "bye")]
    lines = [stacked.format(turn, *said) for turn, said in enumerate(talk)]
    lines[1] = lines[1].rstrip() + "\nTapbacks:\nLoved by Me\n\n"
    lines.insert(2, "Mar 04, 2024  8:01:13 PM You renamed the conversation to Cake\n\n")
    (tmp_path / "imessage.txt").write_text("".join(lines), encoding="utf-8")
    assert read(tmp_path / "imessage.txt") == [talk]
    messages = [
        {"sender_name": "dora_9", "timestamp_ms": 1709662000000, "content": "Hello"},
        {"sender_name": "dora_9", "timestamp_ms": 1709662001000, "content": "dora_9 sent an attachment."},
        {"sender_name": "cem", "timestamp_ms": 1709662002000, "content": '<?xml version="1.0"?><msg><img/></msg>'},
        {"sender_name": "cem", "timestamp_ms": 1709662003000, "content": "Hi"},
    ]
    (tmp_path / "m.json").write_text(json.dumps({"messages": messages}), encoding="utf-8")
    assert read(tmp_path / "m.json") == [[("dora_9", "Hello"), ("cem", "Hi")]]


def test_a_date_above_a_recording_is_not_a_message(tmp_path):
    said = "".join(f"{name}  00:0{turn}\n{text}\n\n" for turn, (name, text) in enumerate(expected()[0]))
    (tmp_path / "otter.txt").write_text(f"Call with Cem\nMon, Mar 4, 2024 8:00PM • 2:41\n\n{said}", encoding="utf-8")
    assert read(tmp_path / "otter.txt") == [expected()[0]]


def test_a_prompt_that_contains_a_dialogue_becomes_several_turns(tmp_path):
    record = {
        "prompt": "\n\nHuman: Tea?\n\nAssistant: Yes.\n\nHuman: Milk?\n\nAssistant:",
        "chosen": " No.",
        "rejected": " A",
    }
    (tmp_path / "data.jsonl").write_text(json_lines([record] * 2), encoding="utf-8")
    talk = [("User", "Tea?"), ("Assistant", "Yes."), ("User", "Milk?"), ("Assistant", "No.")]
    assert read(tmp_path / "data.jsonl") == [talk] * 2


def test_question_answer_pairs_listed_as_data_are_separate_dialogues(tmp_path):
    pairs = [{"input": "Tea?", "output": "Yes."}, {"input": "Milk?", "output": "No."}]
    (tmp_path / "data.json").write_text(json.dumps({"version": "1", "data": pairs}), encoding="utf-8")
    assert read(tmp_path / "data.json") == [[("User", pair["input"]), ("Assistant", pair["output"])] for pair in pairs]


def test_letters_can_label_questions_and_answers(tmp_path):
    (tmp_path / "court.txt").write_text("Q. Were you there?\nA. I was: all day.\nQ. Alone?\nA. No.\n")
    talk = [("Q", "Were you there?"), ("A", "I was: all day."), ("Q", "Alone?"), ("A", "No.")]
    assert read(tmp_path / "court.txt") == [talk]


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl"])
def test_columns_with_any_name_can_be_mapped(kind, tmp_path):
    rows = [{"Wann": number, "Figur1": name, "Satz1": text} for number, _, name, text, _ in messages()]
    content = {"csv": table(list(rows[0]), [list(row.values()) for row in rows]), "json": json.dumps(rows)}
    (tmp_path / "data").write_text(content.get(kind, json_lines(rows)), encoding="utf-8")
    with pytest.raises(UserError, match="--columns speaker=Figur1 text=Satz1"):
        read(tmp_path / "data")
    columns = (("speaker", "Figur1"), ("text", "Satz1"), ("dialogue", "Wann"))
    assert read(tmp_path / "data", columns=columns) == expected()
    pairs = (("prompt", "Figur1"), ("reply", "Satz1"))
    assert read(tmp_path / "data", columns=pairs)[0] == [("User", "Dora"), ("Assistant", TALKS[0][0])]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_questions_and_answers_of_one_conversation_stay_together(kind, tmp_path):
    rows = [{"conversation_id": n // 2, "turn": n % 2, "question": f"q{n}", "answer": f"a{n}"} for n in (0, 1, 3, 2)]
    content = table(list(rows[0]), [list(row.values()) for row in rows]) if kind == "csv" else json_lines(rows)
    (tmp_path / "data").write_text(content)
    assert [[text for _, text in dialogue] for dialogue in read(tmp_path / "data")] == [
        ["q0", "a0", "q1", "a1"],
        ["q2", "a2", "q3", "a3"],
    ]


@pytest.mark.parametrize("language", ["German", "English", "Spanish", "Hindi", "Japanese"])
@pytest.mark.parametrize("seed", [1, 2])  # iPhone and Android
def test_a_whatsapp_chat_is_read_completely(language, seed, tmp_path):
    dialogues, counts = write_chat(tmp_path / "chat.txt", language, 1500, seed)
    source = open_source(tmp_path / "chat.txt")
    found = list(dialogues_of(source))
    assert [list(map(tuple, dialogue.turns)) for dialogue in found if dialogue.turns] == dialogues
    skipped = [why for dialogue in found for why in dialogue.skipped]
    assert (skipped.count("media and notices"), skipped.count("system lines")) == counts
    assert "0 unaccounted for" in source.account[0]


def test_the_time_for_a_long_line_is_proportional_to_its_length(tmp_path):
    """Quadratic time would take minutes."""
    head = "[04.03.24, 20:00:05] Dora: "
    for unit in ("a", "1", "a:", "(", "IMG-1.jpg (", "10:00 ", "- "):
        (tmp_path / "chat.txt").write_text(
            f"{head}{unit * (400_000 // len(unit))}\n{head}\n{head.replace('Dora', 'Cem')}x\n"
        )
        start = time.process_time()
        read(tmp_path / "chat.txt")
        assert time.process_time() - start < 20


names = st.sampled_from(["user", "assistant", "Human", "system", "tool", "Ann", "", " gpt "])
contents = st.one_of(st.text(max_size=9), st.none(), st.just(["x"]))
record = st.fixed_dictionaries(
    {
        "messages": st.lists(
            st.fixed_dictionaries(
                {"role": names, "content": st.one_of(st.text(max_size=9), st.none(), st.just(["x"]))}
            ),
            max_size=5,
        )
    },
    optional={"id": st.text(max_size=3), "system": st.text(max_size=3)},
)


@settings(deadline=None)
@given(record=record)
def test_the_quick_reader_agrees_with_the_general_one(record):
    sample = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    quick = find_quick([sample])
    assert quick is not None
    dialogue = read_quickly(record, quick)
    if dialogue is not None:
        assert [dialogue] == from_turns(record)


class TestCommand:
    def run(self, *arguments, input=None):
        return subprocess.run(
            [sys.executable, "-m", "dialogues", *map(str, arguments)],
            cwd=PROJECT, input=input, capture_output=True, encoding="utf-8", check=False,
        )  # fmt: skip

    def test_printed_dialogues_can_be_read_again(self, tmp_path):
        (tmp_path / "talk.txt").write_text(OF_LINES["IRC"], encoding="utf-8")
        (tmp_path / "data.jsonl").write_text(IN_ROLES["a turn a line"], encoding="utf-8")
        done = self.run(tmp_path / "talk.txt", tmp_path / "data.jsonl")
        assert done.returncode == 0, done.stderr
        said = [
            [(turn["speaker"], turn["text"]) for turn in json.loads(line)["turns"]] for line in done.stdout.splitlines()
        ]
        assert said == expected() + expected(ROLES)
        assert "talk.txt: chat-export, 4 dialogues, 12 turns; Dora 7, Cem 5" in done.stderr
        assert "account: " in done.stderr
        assert self.run("-", input=done.stdout).stdout == done.stdout

    def test_nothing_is_printed_before_an_error(self, tmp_path):
        (tmp_path / "a.txt").write_text("Dora: Hi\nCem: Ho\n")
        (tmp_path / "b.json").write_text('[{"prompt": "a", "prompt": "b", "completion": "c"}]')
        done = self.run(tmp_path / "a.txt", tmp_path / "b.json")
        assert (done.returncode, done.stdout) == (2, "")
        assert "the key 'prompt' occurs 2 times; rename the duplicates" in done.stderr.splitlines()[-1]

    def test_reading_does_not_import_torch(self, tmp_path):
        (tmp_path / "a.txt").write_text("Dora: Hi\nCem: Ho\n")
        code = "import sys; from dialogues.__main__ import main; main([sys.argv[1]]); assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code, tmp_path / "a.txt"], cwd=PROJECT, check=True, capture_output=True)


def test_a_message_with_weight_zero_is_context(tmp_path):
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "assistant", "content": "c"},
    ]
    (tmp_path / "data.jsonl").write_text(json_lines([{"messages": turns}]))
    (dialogue,) = dialogues_of(open_source(tmp_path / "data.jsonl"))
    assert dialogue == Dialogue((Turn("User", "a"), Turn("Assistant", "b"), Turn("Assistant", "c")), context=(1,))
