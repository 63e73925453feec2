"""Read text files, and transcripts in records, with the reader that recognises most of the text."""

import re
from collections.abc import Sequence
from datetime import timedelta
from itertools import islice
from typing import NamedTuple, NoReturn

from dialogues.dialogue import INSTRUCTION, Dialogue
from dialogues.layouts.account import MOST_LOST, Account
from dialogues.layouts.formats import unknown_record
from dialogues.layouts.lines import dialogues_of_lines
from dialogues.layouts.logs import messages_of_log
from dialogues.layouts.markup import SEPARATED, dialogues_of_template, find_template
from dialogues.layouts.messages import cut
from dialogues.layouts.records import FormatError, NotRecognisedError, make_turn
from dialogues.layouts.shapes import CUT, find_shape, prepare
from dialogues.layouts.tables import unknown_rows
from dialogues.layouts.timed import timed_lines
from dialogues.layouts.words import ASSISTANT, USER

CORNELL = " +++$+++ "
CLOCK_ALONE = re.compile(r"\[?\d{1,2}:\d\d(?::\d\d)?\]?$")
PERSONA = re.compile(r"\d+ (?:your persona|partner's persona): ")
NUMBERED = re.compile(r"(?P<number>\d+) (?P<said>[^\t]+)\t(?P<answer>[^\t]+)(?:\t|$)")
BREAKS = re.compile(r"\r?\n|\\n|<br ?/?>")  # line breaks, as records write them
MOST_WORDLESS = 0.6  # maximum fraction of turns without words
NO_TEXT = "records without text"
HEAD = 5000  # number of characters to search for a template


class Read(NamedTuple):
    """The result of a reader: numbered dialogues, and the counts of characters."""

    format: str
    dialogues: list[tuple[int, Dialogue]]
    account: Account
    cut: bool = False  # whether dialogues were cut at pauses

    @property
    def speakers(self) -> set[str]:
        return {turn.speaker for _, dialogue in self.dialogues for turn in dialogue.turns}

    @property
    def turns(self) -> int:
        return sum(len(dialogue.turns) for _, dialogue in self.dialogues)

    @property
    def is_good(self) -> bool:
        return len(self.speakers) > 1 and self.account.lost_share <= MOST_LOST


def read_file(lines: Sequence[str], format: str, pause: timedelta) -> Read:
    """Read a text file as dialogues; `format` is "text" (no times), "chat-export" (times) or "auto".

    Raises:
        FormatError: no reader recognises the file, or a line has no speaker.
    """
    if format != "chat-export" and (read := read_marked(lines, forced=format == "text")):
        return read
    log, problem = None, None
    try:
        log = read_log(lines, pause) if format != "text" else None
    except FormatError as error:
        problem = error
    if format == "chat-export":
        if log:
            return log
        untimed = f"no chat export found (the text starts with {shown(lines)}): no line has a time; try --format auto"
        raise problem or FormatError(untimed)
    if log and log.is_good and 4 * log.turns > sum(map(bool, map(str.strip, lines))):
        return log
    text = None
    try:
        text = read_lines(lines, forced=format == "text")
    except FormatError as error:
        problem = problem or error
    if log and log.is_good and not (text and text.is_good and text.turns > 2 * log.turns):
        return log
    if text and (text.is_good or not log):
        return text
    if log and len(log.speakers) > 1:
        return log
    if text or problem is None:
        return text or log or refuse(lines)
    raise problem


def refuse(lines: Sequence[str]) -> NoReturn:
    if rows := unknown_rows(lines):
        raise NotRecognisedError(unknown_record(rows))
    raise NotRecognisedError(
        f"no conversation found (the text starts with {shown(lines)}): no line looks like `Name: text` or starts with a"
        " time, and no column is recognised; see the formats in docs/data.md (for a table: --columns speaker=..."
        " text=...)"
    )


def shown(lines: Sequence[str]) -> str:
    first = next((line.strip() for line in lines if line.strip()), "")
    return repr(first[:40])


def read_log(lines: Sequence[str], pause: timedelta) -> Read | None:
    """Read a file whose lines carry times; None for other files."""
    account = Account()
    messages = messages_of_log(timed_lines(lines), account)
    if messages is None:
        return None
    dialogues = list(enumerate(cut(messages, pause, INSTRUCTION), 1))
    return Read("chat-export", dialogues, account, cut=True)


def read_lines(lines: Sequence[str], forced: bool = False) -> Read | None:
    """Read a file of `Name: text` in one of many variants; None for other files."""
    prepared, account = without_clocks(prepare(lines)), Account()
    shape = find_shape(prepared, forced)
    if shape is None:
        return None
    read = Read("text", dialogues_of_lines(prepared, shape, account), account)
    wordless = sum(not any(map(str.isalpha, turn.text)) for _, dialogue in read.dialogues for turn in dialogue.turns)
    if wordless > MOST_WORDLESS * read.turns and not forced:
        raise NotRecognisedError("the names are followed by numbers, not words; to read it anyway, use --format text")
    return read


def without_clocks(lines: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Remove lines that hold only a time (Google Meet), and the blank lines below them."""
    clocks = {place for place, (_, line) in enumerate(lines) if CLOCK_ALONE.match(line)}
    blank = {place + 1 for place in clocks if place + 1 < len(lines) and not lines[place + 1][1]}
    return [line for place, line in enumerate(lines) if place not in clocks | blank]


def read_marked(lines: Sequence[str], forced: bool = False) -> Read | None:
    """Read a file with a chat template's markers, `__eou__`, or Cornell's fields; None for other files."""
    first = next((line for line in lines if line.strip()), "")
    if CORNELL in first:
        return read_cornell(lines)
    if PERSONA.match(first) or all(map(NUMBERED.match, islice(filter(str.strip, lines), 5))):
        return read_numbered(lines)
    account = Account()
    if SEPARATED.search(first):
        if not forced:
            raise FormatError(
                "separators mark the turns but not the speakers; add --format text to read them as User and Assistant"
                " in turn"
            )
        found = [(number, read_separated(line)) for number, line in enumerate(lines, 1) if line.strip()]
        return Read("text", found, account_of_marks(found, lines))
    text = "".join(line if line.endswith("\n") else line + "\n" for line in lines)
    if not re.search(r"<\|\w|\[INST\]|<start_of_turn>", text[:HEAD]) and not re.search(r"\bASSISTANT: ", text[:HEAD]):
        return None
    template = find_template([text])
    if template is None:
        return None
    dialogues = list(enumerate(dialogues_of_template(text, template, account), 1))
    account.markup += max(len("".join(text.split())) - account.spoken, 0)
    return Read("text", dialogues, account)


def account_of_marks(dialogues: Sequence[tuple[int, Dialogue]], texts: Sequence[str]) -> Account:
    """Return the counts for texts in which everything except the turns is markup."""
    spoken = sum(len(turn.text) for _, dialogue in dialogues for turn in dialogue.turns)
    return Account(spoken, max(sum(len("".join(text.split())) for text in texts) - spoken, 0))


def read_numbered(lines: Sequence[str]) -> Read:
    """Read ParlAI's dialogues: a number, one text, a tab, the answer; the number 1 begins a dialogue."""
    account, found, last = Account(), [], 0
    for number, line in enumerate(lines, 1):
        if PERSONA.match(line) or not line.strip():
            account.markup += len(line)
            last = 0 if PERSONA.match(line) and int(line.split()[0]) <= 1 else last
        elif match := NUMBERED.match(line):
            if not found or int(match["number"]) <= last or not last:
                found.append((number, []))
            last = int(match["number"])
            texts = match["said"].strip(), match["answer"].strip()
            found[-1][1].extend(map(make_turn, (USER, ASSISTANT), texts, [f"line {number}"] * 2))
            account.spoken += sum(map(len, texts))
            account.markup += len(line) - sum(map(len, texts))
        else:
            account.lose(f"line {number}: {line[:40]!r}", len(line))
    return Read("text", [(number, Dialogue(tuple(turns))) for number, turns in found], account)


def read_separated(line: str) -> Dialogue:
    """Read a line of turns with a separator after each; two speakers alternate."""
    texts = [text for piece in SEPARATED.split(line) if (text := piece.strip())]
    said = [make_turn((USER, ASSISTANT)[number % 2], text, f"turn {number + 1}") for number, text in enumerate(texts)]
    return Dialogue(tuple(said))


def read_cornell(lines: Sequence[str]) -> Read:
    """Read Cornell's movie_lines.txt: line id, character id, film, name, text; a gap in the ids separates dialogues."""
    account, rows = Account(), []
    for number, line in enumerate(lines, 1):
        fields = line.rstrip("\n").split(CORNELL.rstrip())
        if len(fields) < 5 or not fields[0].strip()[1:].isdigit():
            account.lose(f"line {number}: {line[:40]!r}", len(line))
        elif fields[4].strip():
            rows.append((fields[2].strip(), int(fields[0].strip()[1:]), fields[3].strip(), fields[4].strip()))
            account.markup += len(line) - len(fields[4].strip())
    rows.sort(key=lambda row: row[:2])
    dialogues: list[list[tuple[str, int, str, str]]] = []
    for row in rows:
        if not dialogues or dialogues[-1][-1][0] != row[0] or row[1] - dialogues[-1][-1][1] > 1:
            dialogues.append([])
        dialogues[-1].append(row)
        account.spoken += len(row[3])
    made = [Dialogue(tuple(make_turn(name, text, "a line") for _, _, name, text in rows)) for rows in dialogues]
    return Read("text", list(enumerate(made, 1)), account)


def read_transcripts(texts: Sequence[tuple[int, str]]) -> Read | None:
    """Read the texts of records, each a whole dialogue; None if they are something else."""
    strings = [text.strip("\n") if text.strip() else "" for _, text in texts]
    filled = [text for text in strings if text]
    if not filled:
        return None
    account, found = Account(), []
    sample = filled[:100]
    if sum(bool(SEPARATED.search(text)) for text in sample) > 0.9 * len(sample):
        found = [(number, read_separated(text)) for (number, _), text in zip(texts, strings, strict=True)]
        return Read("text", found, account_of_marks(found, strings))
    if template := find_template(sample):
        for (number, _), text in zip(texts, strings, strict=True):
            found += [(number, dialogue) for dialogue in dialogues_of_template(text, template, account, whole=True)]
        return Read("text", found, account)
    lines: list[tuple[int, str]] = []
    for (number, _), text in zip(texts, strings, strict=True):
        lines += [(number, CUT), *((number, line) for _, line in prepare(BREAKS.split(text)))]
    shape = find_shape(lines)
    if shape is None:
        return None
    try:
        found = dialogues_of_lines(lines, shape, account)
    except FormatError as error:
        raise FormatError(str(error).replace("line", "record", 1)) from None
    empty = [(number, Dialogue((), skipped=(NO_TEXT,))) for number, text in texts if not text.strip()]
    return Read("text", sorted(found + empty, key=lambda numbered: numbered[0]), account)
