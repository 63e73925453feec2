"""Where messages and dialogues begin and end in exports: dates, headings and notices inside messages, and pauses."""

import json

import pytest
from test_layouts import json_lines, read, table

from conftest import dialogues_of
from dialogues.layouts.stamps import parse_stamp
from dialogues.reading import open_source


def read_text(tmp_path, text: str, **options) -> list[list[tuple[str, str]]]:
    path = tmp_path / "data.txt"
    path.write_text(text, encoding="utf-8")
    return [dialogue for dialogue in read(path, **options) if dialogue]


def test_dates_inside_messages_of_dated_chats_are_text(tmp_path):
    flight = "Mein Flug:\nAbflug 12.01.2024 um 18:00\nAnkunft 13.01.2024 um 06:00"
    chat = f"31.12.23, 22:15 - Nora: {flight}\n31.12.23, 22:16 - Timo: 31.12.2023\n31.12.23, 22:17 - Nora: Ja"
    assert read_text(tmp_path, chat) == [[("Nora", flight), ("Timo", "31.12.2023"), ("Nora", "Ja")]]
    said = [("Nora", "We met on\n31.12.23"), *[("Timo", "Yes"), ("Nora", "Good")] * 3]
    chat = "".join(f"31.12.23, 22:1{n} - {who}: {text}\n" for n, (who, text) in enumerate(said))
    assert read_text(tmp_path, chat) == [said]


def test_headings_with_the_day_of_dated_messages_are_not_text(tmp_path):
    """KakaoTalk on a phone writes the date above each day and before each message."""
    chat = "Cem 님과 카카오톡 대화\n저장한 날짜 : 2024년 3월 9일 오후 1:00\n"
    for day in (4, 5):
        chat += f"\n2024년 3월 {day}일 월요일\n"
        chat += "".join(f"2024년 3월 {day}일 오후 8:0{n}, {name} : Tea?\n" for n, name in enumerate(("Dora", "Cem")))
    assert read_text(tmp_path, chat) == [[("Dora", "Tea?"), ("Cem", "Tea?")]] * 2


def test_lines_that_end_every_message_of_a_dated_chat_are_text(tmp_path):
    letter = "Dear {}, it rains.\n\nLove,\n{}"
    said = [("Dad", "Ann"), ("Ann", "Dad")] * 2
    chat = "".join(f"0{n}.03.24, 10:00 - {who}: {letter.format(to, who)}\n" for n, (who, to) in enumerate(said, 1))
    assert read_text(tmp_path, chat, pause_hours=99) == [[(who, letter.format(to, who)) for who, to in said]]
    chat = "".join(f"## Day {n}\n0{n}.03.24, 10:00 - {who}: Hi\n\n" for n, (who, _) in enumerate(said, 1))
    assert read_text(tmp_path, chat, pause_hours=99) == [[(who, "Hi") for who, _ in said]]


@pytest.mark.parametrize("line", ["For example:", "Great scene!", "Nice chat!", "A short story:"])
def test_sentences_that_end_like_headings_are_text(line, tmp_path):
    said = [("User", "Tea?"), ("Assistant", f"Yes.\n{line}\ngreen tea"), ("User", "Fine."), ("Assistant", "Good.")]
    assert read_text(tmp_path, "\n".join(f"{who}: {text}" for who, text in said)) == [said]


@pytest.mark.parametrize("label", ["Example", "Part"])
def test_numbered_labels_are_headings_only_in_files_that_begin_with_one(label, tmp_path):
    said = [("User", "How?"), ("Assistant", f"So:\n{label} 1: a cat\n{label} 2: a dog"), ("User", "Fine.")]
    text = "\n".join(f"{who}: {text}" for who, text in said)
    for above in ("", "Dialogue 1\n"):
        assert read_text(tmp_path, above + text) == [said]
    talk = [("User", "How?"), ("Assistant", "So.")]
    below = "\n".join(f"{who}: {text}" for who, text in talk)
    assert read_text(tmp_path, f"{label} 1: a cat\n{below}\n{label} 2: a dog\n{below}") == [talk] * 2


@pytest.mark.parametrize("heading", ["First dialogue", "2nd conversation:", "New chat", "Scene 2: the kitchen"])
def test_headings_separate_dialogues(heading, tmp_path):
    talk = [("User", "How?"), ("Assistant", "So.")]
    below = "\n".join(f"{who}: {text}" for who, text in talk)
    assert read_text(tmp_path, f"{below}\n{heading}\n{below}") == [talk] * 2


AT = "May 17, 2022  5:{}:42 PM\n"


def imessages(*said: tuple[str, str]) -> str:
    """Messages as imessage-exporter writes them in text files."""
    return "".join(f"{AT.format(20 + n)}{who}\n{text}\n\n" for n, (who, text) in enumerate(said))


def test_copies_of_replies_below_their_parents_are_left_out(tmp_path):
    said = [("Me", "Tea?"), ("Dora", "Or coffee?"), ("Me", "Hm"), ("Dora", "It is late"), ("Me", "Tea!\n\nWith milk.")]
    later, answer = "May 19, 2022 10:00:00 AM\n", "\nThis message responded to an earlier message.\n\n"
    copies = f"    {AT.format(24)}    Me\n    Tea!\n\nWith milk.\n\n    {later}    Dora\n    Why not\n\n"
    chat = imessages(*said).replace("Tea?\n", f"Tea?\n{copies}", 1).rstrip() + answer
    chat += f"{later}Dora\nWhy not{answer}"
    assert read_text(tmp_path, chat) == [said, [("Dora", "Why not")]]


def test_an_edited_message_is_read_in_its_last_version(tmp_path):
    said = [("Me", "Tea?"), ("Dora", "Yes"), ("Me", "Milk?\nOr lemon?"), ("Dora", "No"), ("Me", "OK"), ("Dora", "Good")]
    edits = (
        f"{AT.format(22).strip()} Mlik?\n{{}}Edited 12 seconds later: Milk\nEdited 1 minute, 2 seconds later: Milk?\n"
    )
    for indent in ("", "\n"):
        chat = imessages(*said).replace("Milk?\n", edits.format(indent))
        assert read_text(tmp_path, chat) == [said]
        assert "0 unaccounted for" in open_source(tmp_path / "data.txt").account[0]


@pytest.mark.parametrize(
    "folder",
    ["attachments/12", "~/Library/Messages/Attachments/ab/11/A B", "/Users/dora/Library/Messages/Attachments/ab"],
)
def test_paths_of_attachments_are_not_text(folder, tmp_path):
    paths = [f"{folder}/IMG_{n}.heic" for n in range(3)]
    said = [("Me", "Tea?"), ("Dora", paths[0]), ("Me", "\n".join(paths)), ("Dora", f"{paths[0]}\nYes"), ("Me", "Fine")]
    assert read_text(tmp_path, imessages(*said)) == [[("Me", "Tea?"), ("Dora", "Yes"), ("Me", "Fine")]]


SAID = [("Ann", "It broke"), ("Support", "Sorry"), ("Ann", "Thanks"), ("Support", "Bye")]


def slow_rows(key: str) -> list[dict[str, str]]:
    """Two dialogues whose second half is written days after the first."""
    return [
        {key: number, "author": who, "body": text, "created_at": f"2024-03-{4 + 3 * (turn // 2):02} 10:0{turn}"}
        for number in "12"
        for turn, (who, text) in enumerate(SAID)
    ]


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl"])
@pytest.mark.parametrize(
    ("key", "dialogues"),
    [("ticket_id", [SAID]), ("Chat Session", [SAID[:2], SAID[2:]]), ("room", [SAID[:2], SAID[2:]])],
)
def test_pauses_divide_whole_chats_but_not_dialogues_with_ids(key, dialogues, kind, tmp_path):
    rows = slow_rows(key)
    content = {"csv": table(list(rows[0]), [list(row.values()) for row in rows]), "json": json.dumps(rows)}
    assert read_text(tmp_path, content.get(kind, json_lines(rows))) == dialogues * 2


def test_pauses_divide_the_threads_of_a_phone(tmp_path):
    """Android's thread holds all messages from and to a number."""
    rows = [
        {
            "thread_id": number,
            "address": "+15550100",
            "__display_name": f"A{number}",
            "type": turn % 2 + 1,
            "body": "Hm",
        }
        | {"type": turn % 2 + 1, "date": row["created_at"]}
        for number in range(2)
        for turn, row in enumerate(slow_rows("id")[:4])
    ]
    assert len(read_text(tmp_path, json_lines(rows))) == 4


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("key", ["topic", "channel"])
def test_questions_of_one_topic_are_separate_dialogues(key, kind, tmp_path):
    rows = [{key: "tea" if n < 2 else "soup", "question": f"q{n}", "answer": f"a{n}"} for n in range(4)]
    content = table(list(rows[0]), [list(row.values()) for row in rows]) if kind == "csv" else json_lines(rows)
    assert read_text(tmp_path, content) == [[("User", f"q{n}"), ("Assistant", f"a{n}")] for n in range(4)]


@pytest.mark.parametrize(
    "kind", ["text_link", "underline", "spoiler", "blockquote", "mention_name", "bank_card", "link"]
)
def test_formatted_words_of_telegram_stay_in_their_line(kind, tmp_path):
    text = ["See ", {"type": kind, "text": "it"}, "!"]
    messages = [{"type": "message", "date": "2024-03-04T10:00", "from": who, "text": text} for who in ("Ann", "Cem")]
    assert read_text(tmp_path, json.dumps({"messages": messages})) == [[("Ann", "See it!"), ("Cem", "See it!")]]


@pytest.mark.parametrize(
    ("text", "date", "hour"),
    [
        ("1:10 PTG", None, 13),
        ("1:10 PG", None, 1),
        ("05-OCT-24 20:15", (5, 10, 24), 20),
        ("2024-03-04T20:15:00Z", (2024, 3, 4), 20),
    ],
)
def test_the_letter_t_in_a_time_is_kept(text, date, hour):
    stamp = parse_stamp(text)
    assert stamp
    assert stamp.clock
    assert (stamp.date, stamp.clock.seconds // 3600) == (date, hour)


def test_claudes_export_is_read_along_the_branch_it_shows(tmp_path):
    said = [("u1", "root", "human", "Tea?"), ("a1", "u1", "assistant", "No."), ("a2", "u1", "assistant", "Yes.")]
    said += [("u2", "a1", "human", "Why?"), ("u3", "a2", "human", "Milk?"), ("a3", "u3", "assistant", "No.")]
    messages = [
        {"uuid": uuid, "parent_message_uuid": parent, "sender": who, "text": text, "created_at": "2024-03-04T10:00:00Z"}
        for uuid, parent, who, text in said
    ]
    (tmp_path / "claude.json").write_text(json.dumps([{"uuid": "c", "name": "Tea", "chat_messages": messages}]))
    (dialogue,) = dialogues_of(open_source(tmp_path / "claude.json"))
    assert [turn.text for turn in dialogue.turns] == ["Tea?", "Yes.", "Milk?", "No."]
    assert dialogue.skipped == ("messages of other branches",) * 2
