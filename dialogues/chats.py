"""Conversations as lines: plain text, and what WhatsApp, Signal and Telegram export."""

import re
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from dialogues.dialogue import Dialogue, Turn
from dialogues.formats import FormatError, Pairs, is_list, make_turn

SPOKEN = re.compile(r"(?P<speaker>(?:[^\W\d_]|[^\x00-\x7f\s])[^:\n]{0,60}?):(?:\s+(?P<text>.*))?$")
RULE = re.compile(r"\s*([-=_*~#])\1{2,}\s*$")
MARKS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"  # direction marks, which phones add
# Dates and clocks of many countries: [31.12.23, 22:15:32], 12/31/23, 10:15 PM -, 2023. 12. 31. 오후 10:15 -,
# 31/12/2023 à 22:15 -, 22:15, 31/12/2023 -
DATE = r"(?P<date{0}>\d{{1,4}}\.?\u200f?[ ./-]\s?\d{{1,2}}\.?\u200f?[ ./-]\s?\d{{1,4}})\.?"
TIME = (
    r"(?:(?P<early{0}>上午|午前|오전)|(?P<late{0}>下午|午後|오후))?\s?(?P<time{0}>\d{{1,2}}[:.]\d{{2}}(?:[:.]\d{{2}})?)"
    r"\s?(?:(?P<am{0}>[Aa]\.?\s?[Mm]\.?|ص)|(?P<pm{0}>[Pp]\.?\s?[Mm]\.?|م))?"
)
WORD = r"(?!上|午|下|오)[^\W\d]{1,4}"  # à, klo, г., but no half of the day
STAMP = re.compile(
    rf"\[?(?:{DATE.format(1)}(?:\s?{WORD}\.?)?[,،]?\s+(?:{WORD}\s+)?{TIME.format(1)}"
    rf"|{TIME.format(2)},?\s+{DATE.format(2)})(?:\]\s?|\s[-–]\s)(?P<rest>.*)$"
)
NAMED = re.compile(r"(?P<speaker>[^:\"“„«\n]{1,100}?): ?(?P<text>.*)$", re.DOTALL)
# What stands in an export where there was no text. iOS marks it with U+200E; elsewhere it is known by its brackets,
# or by its words, in the languages most seen.
NO_TEXT = re.compile(
    r"[<‹][^<>‹›\n]{3,60}[>›]"
    r"|(image|video|audio|sticker|gif|document|contact card) omitted"
    r"|null|missed (voice|video) call|waiting for this message.*"
    r"|(this message was|you) deleted( this message)?|diese nachricht wurde gelöscht|du hast diese nachricht gelöscht"
    r"|se eliminó este mensaje|eliminaste este mensaje|ce message a été supprimé|vous avez supprimé ce message"
    r"|questo messaggio è stato eliminato|hai eliminato questo messaggio|dit bericht is verwijderd"
    r"|(essa )?mensagem (foi )?apagada|você apagou esta mensagem",
    re.IGNORECASE,
)
ATTACHED = re.compile(r"[^\n]*\.\w{2,5} \([^()\n]+\)(\n|$)")  # IMG-1.jpg (file attached), and perhaps a caption
EDITED = re.compile(r"\s*<This message was edited>$")


class Message(NamedTuple):
    """One message of an exported chat; without a `turn`, and with the reason why, when there is nothing to learn."""

    time: datetime
    turn: Turn | None
    skipped: str = ""


def dialogues_of_text(lines: Iterable[str]) -> Iterator[tuple[int, Dialogue]]:
    """`Name: what they said`, continuation lines, dialogues separated by a rule or else by blank lines.

    Blank lines between all the turns separate nothing: such a file is one dialogue.

    Yields the number of each dialogue's first line with it.

    Raises:
        FormatError: text before the first name; it says the line.
    """
    numbered = list(enumerate(lines, 1))
    separator = RULE.match if any(RULE.match(line) for _, line in numbered) else is_blank
    groups = groupby(numbered, key=lambda numbered_line: bool(separator(numbered_line[1])))
    blocks = [list(block) for separates, block in groups if not separates]
    blocks = [block for block in blocks if not all(is_blank(line) for _, line in block)]
    if separator is is_blank and blocks and all(sum(map(is_spoken, block)) == 1 for block in blocks):
        blocks = [[line for block in blocks for line in block]]
    for block in blocks:
        yield block[0][0], dialogue_of_lines(block)


def is_blank(line: str) -> bool:
    return not line.strip()


def is_spoken(numbered_line: tuple[int, str]) -> bool:
    return SPOKEN.match(numbered_line[1].strip()) is not None


def dialogue_of_lines(block: list[tuple[int, str]]) -> Dialogue:
    """One dialogue from its numbered lines."""
    turns: list[tuple[int, str, list[str]]] = []
    for number, line in block:
        if match := SPOKEN.match(line.strip()):
            turns.append((number, match["speaker"].strip(), [match["text"] or ""]))
        elif turns:
            turns[-1][2].append(line.strip())
        elif line.strip():
            raise FormatError(f"line {number}: nobody says this; a dialogue begins with `Name: text`")
    said = [(number, speaker, "\n".join(lines).strip()) for number, speaker, lines in turns]
    kept = [make_turn(speaker, text, f"line {number}") for number, speaker, text in said if text]
    return Dialogue(tuple(kept), skipped=("empty turns",) * (len(said) - len(kept)))


def is_export(lines: Iterable[str]) -> bool:
    """Whether one of the first lines has the time stamp of an exported chat."""
    return any(STAMP.match(line.strip(MARKS)) for line, _ in zip(lines, range(5), strict=False))


def messages_of_export(lines: Iterable[str]) -> list[Message]:
    """WhatsApp (iOS and Android) and Signal exports: a stamp, a name and a text; what has no stamp continues.

    Raises:
        FormatError: text before the first stamp, or impossible dates.
    """
    stamped: list[tuple[int, re.Match[str], list[str]]] = []
    for number, raw in enumerate(lines, 1):
        line = raw.rstrip("\r\n").replace("\u202f", " ").replace("\xa0", " ")
        if match := STAMP.match(line.lstrip(MARKS)):
            stamped.append((number, match, [match["rest"]]))
        elif stamped:
            stamped[-1][2].append(line)
        elif line.strip(MARKS + " "):
            raise FormatError(f"line {number} has no date and time, as an exported chat begins with")
    times = read_times([(number, match) for number, match, _ in stamped])
    return [
        make_message(time, "\n".join(texts), number) for time, (number, _, texts) in zip(times, stamped, strict=True)
    ]


def make_message(time: datetime, rest: str, number: int) -> Message:
    """The message of line `number` from what stands after its stamp."""
    match = NAMED.match(rest)
    if not match:
        return Message(time, None, "system lines")
    text = EDITED.sub("", match["text"])
    bare = ATTACHED.sub("", text.strip(MARKS + " \n"), count=1).strip(MARKS + " \n")
    if text.startswith("\u200e") or NO_TEXT.fullmatch(bare.rstrip(".")) or (text.strip(MARKS + " \n") and not bare):
        return Message(time, None, "media and notices")
    if not bare:
        return Message(time, None, "messages without text")
    return Message(time, make_turn(match["speaker"].strip(MARKS + "~ "), bare, f"line {number}"))


def read_times(stamps: list[tuple[int, re.Match[str]]]) -> list[datetime]:
    """The moments of all stamps (each with its line), in one order of day, month and year for the whole file.

    Of the orders in which no date is impossible it is the one in which time runs backwards least.

    Raises:
        FormatError: in every order there is an impossible date; it says the line.
    """
    american = any(stamp["am1"] or stamp["pm1"] for _, stamp in stamps) and all("/" in stamp[0] for _, stamp in stamps)
    best: list[datetime] | None = None
    fewest, reached = len(stamps) + 1, 0
    for order in ("mdy", "dmy", "ymd") if american else ("dmy", "mdy", "ymd"):
        times = []
        for number, stamp in stamps:
            try:
                times.append(moment(stamp, order))
            except ValueError:  # a thirteenth month
                reached = max(reached, number)
                break
        backwards = sum(later < earlier - timedelta(days=1) for earlier, later in pairwise(times))
        if len(times) == len(stamps) and backwards < fewest:
            best, fewest = times, backwards
    if best is None:
        raise FormatError(f"line {reached}: in no order of day, month and year this is a date as those before it are")
    return best


def moment(stamp: re.Match[str], order: str) -> datetime:
    """The moment of a stamp whose date has day, month and year in `order`, as "dmy".

    Raises:
        ValueError: there is no such date.
    """
    found = {name.rstrip("12"): text for name, text in stamp.groupdict().items() if text}
    date = dict(zip(order, map(int, re.findall(r"\d+", found["date"])), strict=True))
    hour, minute, second = [*map(int, re.findall(r"\d+", found["time"])), 0][:3]
    if found.keys() & {"early", "late", "am", "pm"}:
        hour = hour % 12 + (12 if found.keys() & {"late", "pm"} else 0)
    return datetime(date["y"] + 2000 if date["y"] < 100 else date["y"], date["m"], date["d"], hour, minute, second)


def is_telegram(record: Any) -> bool:
    """Whether `record` is Telegram's `result.json`: messages that have a date and a type."""
    messages = dict(record).get("messages") if isinstance(record, Pairs) else None
    if not is_list(messages) or not messages or not isinstance(messages[0], Pairs):
        return False
    return {"date", "type"} <= {key for key, _ in messages[0]}


def telegram_chats(value: Any) -> list[Pairs]:
    """The chats in a `result.json`: of one chat, or of a whole account."""
    if is_telegram(value):
        return [value]
    account: dict[str, Any] = dict(value) if isinstance(value, Pairs) else {}
    chats: list[Any] = []
    for held in (account.get("chats"), account.get("left_chats")):
        listed = dict(held).get("list") if isinstance(held, Pairs) else None
        chats += listed if is_list(listed) else []
    return [chat for chat in chats if is_telegram(chat)]


def messages_of_telegram(record: Pairs) -> list[Message]:
    """The messages of Telegram's `result.json`; service messages and media have no turn.

    Raises:
        FormatError: a message without a date.
    """
    messages = []
    for number, item in enumerate(dict(record)["messages"], 1):
        values = dict(item) if isinstance(item, Pairs) else {}
        text = join_spans(values.get("text"))
        try:
            time = datetime.fromisoformat(values["date"]).replace(tzinfo=None)
        except (KeyError, TypeError, ValueError):
            raise FormatError(f"message {number} has no date") from None
        speaker = values.get("from")
        if values.get("type") != "message":
            messages.append(Message(time, None, "system lines"))
        elif text:
            name = speaker if isinstance(speaker, str) and speaker.strip() else "Unknown"
            messages.append(Message(time, make_turn(name, text, f"message {number}")))
        else:
            media = values.keys() & {"photo", "file", "media_type"}
            messages.append(Message(time, None, "media and notices" if media else "messages without text"))
    return messages


def join_spans(text: Any) -> str:
    """Telegram's text: a string, or a list of strings and of objects with a text, which follow one another."""
    spans = text if is_list(text) else [text]
    texts = [dict(span).get("text") if isinstance(span, Pairs) else span for span in spans]
    return "".join(part for part in texts if isinstance(part, str)).strip()


def dialogues_of_export(messages: Iterable[Message], pause: timedelta) -> Iterator[Dialogue]:
    """Cut a chat wherever nobody wrote for `pause`; what one person writes in a row is one turn, its lines kept."""
    turns: list[Turn] = []
    skipped: list[str] = []
    last: datetime | None = None
    for time, turn, why in messages:
        if last is not None and time - last >= pause and (turns or skipped):
            yield Dialogue(tuple(turns), skipped=tuple(skipped))
            turns, skipped = [], []
        last = time
        if turn is None:
            skipped.append(why)
        elif turns and turns[-1].speaker == turn.speaker:
            turns[-1] = Turn(turn.speaker, f"{turns[-1].text}\n{turn.text}")
        else:
            turns.append(turn)
    yield Dialogue(tuple(turns), skipped=tuple(skipped))
