"""From a conversation file, whatever its form, to records that each become a dialogue, and the place of mistakes."""

import json
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from dialogues.chats import (
    dialogues_of_export,
    dialogues_of_text,
    is_export,
    is_spoken,
    messages_of_export,
    messages_of_telegram,
    telegram_chats,
)
from dialogues.dialogue import Dialogue
from dialogues.formats import (
    FORMATS,
    FormatError,
    NotRecognisedError,
    Pairs,
    as_alpaca,
    fitting,
    has_keys,
    is_list,
    kind,
    recognise,
    unused_keys,
)
from dialogues.inputs import LIMIT, Input, reading
from dialogues.tables import SEPARATOR, group_turns, read_columns, records_of_table
from support.errors import UserError

HEAD = 1 << 16  # bytes that decide what a file is
PEEKED = 100  # records of which one decides what form they have


class Source(NamedTuple):
    """A recognised file: numbered records, to be read once, and the function that turns one into a dialogue.

    `form` is what a record has in it, where that is another thing than the format ("csv" of "pairs"). `unit` is what
    the numbers count: "line", "record", "dialogue". `convert` and a record can be sent to another process. `size` is
    what the records sum to in bytes where they are lines, in number where that is known. `not_used` are keys of the
    first record that nothing is taken from.
    """

    input: Input
    format: str
    form: str
    unit: str
    records: Iterable[tuple[int, Any]]
    convert: Callable[[Any], Dialogue]
    size: int | None = None
    not_used: tuple[str, ...] = ()

    def dialogue(self, number: int, record: Any) -> Dialogue:
        """The dialogue of one of the records, perhaps of one turn or none.

        Raises:
            UserError: the record is broken; it says which, and how.
        """
        try:
            return self.convert(record)
        except FormatError as error:
            raise UserError(f"{self.input}: {self.unit} {number}: {error}") from None

    def for_template(self, template: str) -> "tuple[Source, str]":
        """The source as a template needs it, and the template that `auto` stands for.

        Raises:
            UserError: `alpaca` for what is no instruction data.
        """
        if template == "auto":
            template = "alpaca" if self.form == "alpaca" else "prompt"
        if template != "alpaca" or self.form == "alpaca":
            return self, template
        if self.form != "pairs":
            raise UserError(
                f"--template alpaca is for instruction data (instruction and output, or prompt and completion);"
                f" {self.input} is {self.format}: choose another template"
            )
        return self._replace(convert=partial(convert_to_alpaca, self.convert)), template


def open_source(path: Path | Input, format: str = "auto", pause_hours: float = 8) -> Source:
    """Recognise a conversation file by its content.

    JSON Lines are then read one by one, every other form at once.

    Raises:
        UserError: the file is missing, unreadable, binary, not UTF-8, or holds no conversations in a known form.
    """
    input = path if isinstance(path, Input) else Input.of(path)
    with reading(input):
        with input.open() as file:
            head = file.read(HEAD)
        container = recognise_container(head, input, format)
        pause = timedelta(hours=pause_hours)
        if container == "JSON Lines":
            return json_lines_source(input, format)
        if container == "JSON":
            return json_source(input, format, pause)
        lines = (decode(line, number) for number, line in input.lines(LIMIT))
        if container == "chat-export":
            dialogues = list(enumerate(dialogues_of_export(messages_of_export(lines), pause), 1))
            return Source(input, container, "turns", "dialogue", dialogues, as_it_is, len(dialogues))
        if container == "text":
            dialogues = list(dialogues_of_text(lines))
            return Source(input, container, "turns", "line", dialogues, as_it_is, len(dialogues))
        records = list(records_of_table(lines, container))
        if not records:
            raise FormatError("there is nothing below the names of the columns")
        form = recognise(records[0][1])
        return Source(input, container, form, "line", records, FORMATS[form].convert, len(records))


def decode(content: bytes, line: int) -> str:
    """UTF-8 text that begins on line `line`; what is none is an error with its line."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise FormatError(f"line {line} is not UTF-8 text; save the file as UTF-8") from None


def recognise_container(head: bytes, input: Input, format: str) -> str:
    """What kind of file begins with `head`: "JSON", "JSON Lines", or the format of a file that is neither."""
    if b"\0" in head:
        raise NotRecognisedError("a binary file; conversations are needed as text")
    if b"\r" in head and b"\n" not in head and head[:1] not in b"[{":
        raise FormatError("its lines end in CR alone, as on old Macs; save it with the line ends of today")
    if format in ("text", "csv", "tsv"):
        return format
    text = head.decode("utf-8-sig", errors="replace").strip()
    if not text:
        raise NotRecognisedError("the file is empty")
    lines = [line for line in text.splitlines() if line.strip()]
    if lines[0].startswith(SEPARATOR) and len(lines) > 1:
        lines.pop(0)
    if format in ("auto", "chat-export") and is_export(lines):
        return "chat-export"
    if text[0] in "[{" or format in FORMATS:
        return "JSON Lines" if has_json_lines(input) else "JSON"
    table = "tsv" if read_columns(lines[0], "tsv") else "csv" if read_columns(lines[0]) else None
    if format == "auto" and table:
        return table
    if format == "auto" and is_spoken((1, lines[0])):
        return "text"
    raise NotRecognisedError(
        f"{text[:40]!r} is no beginning of {'conversations' if format == 'auto' else f'a {format}'};"
        " see the formats in README.md (a text file has lines as in `Alex: Hello!`)"
    )


def has_json_lines(input: Input) -> bool:
    """Whether more lines follow the first, and that is a whole JSON value."""
    lines = (line for _, line in input.lines() if line.strip())
    first = next(lines)
    if next(lines, None) is None:
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def json_lines_source(input: Input, format: str) -> Source:
    """One JSON value a line; they are parsed where they are converted, perhaps in another process."""
    records = ((number, line) for number, line in input.lines() if line.strip())
    first = list(islice(records, PEEKED))
    name, not_used = choose_form(parse_lines(first), format, "line")
    convert = partial(convert_line, name, format != "auto")
    return Source(input, name, name, "line", chain(first, records), convert, input.size, not_used)


def json_source(input: Input, format: str, pause: timedelta) -> Source:
    """One JSON value: a list of records, one record, an object that holds the list, or what Telegram exports."""
    value = parse_json(input.read())
    chats = telegram_chats(value) if format in ("auto", "chat-export") else []
    if chats or format == "chat-export":
        parts = [part for chat in chats for part in dialogues_of_export(messages_of_telegram(chat), pause)]
        if not parts:
            raise FormatError("no exported chat: WhatsApp's and Signal's are text, Telegram's is result.json")
        return Source(input, "chat-export", "turns", "dialogue", list(enumerate(parts, 1)), as_it_is, len(parts))
    records = list_of_records(value)
    if not records:
        raise FormatError("the file holds no conversations: its list is empty")
    numbered = list(enumerate(records, 1))
    name, not_used = choose_form(iter(numbered), format, "record")
    convert = partial(convert_record, name, format != "auto")
    return Source(input, name, name, "record", numbered, convert, len(records), not_used)


def choose_form(records: Iterator[tuple[int, Any]], format: str, unit: str) -> tuple[str, tuple[str, ...]]:
    """The form of the first of `records` that has a known one, and the keys of it that are not used.

    Raises:
        FormatError: it has more than one, or none of the first has any; it says which.
    """
    seen = islice(records, PEEKED)
    first = next(seen)
    number, record = next((one for one in chain([first], seen) if format != "auto" or fitting(one[1])), first)
    try:
        name = recognise(record) if format == "auto" else format
        return name, tuple(unused_keys(record, name))
    except FormatError as error:
        raise type(error)(f"{unit} {number}: {error}") from None


def list_of_records(value: Any) -> list[Any]:
    """The records of a JSON file: the value itself, its items, or those of the one list that it holds."""
    if is_list(value) and value and all(has_keys(item, "speaker", "text") for item in value):
        turns = ((number, dict(item)) for number, item in enumerate(value, 1))
        return [dialogue for _, dialogue in group_turns(turns, dict(value[0]))]
    if fitting(value):
        return [value]
    if isinstance(value, Pairs):
        lists = [held for _, held in value if is_list(held) and held and isinstance(held[0], list)]
        return lists[0] if len(lists) == 1 else [value]
    if not is_list(value):
        raise NotRecognisedError(f"conversations are needed, this is {kind(value)}")
    return [value] if value and isinstance(value[0], int) else value


def as_it_is(dialogue: Dialogue) -> Dialogue:
    return dialogue


def convert_to_alpaca(convert: Callable[[Any], Dialogue], record: Any) -> Dialogue:
    return as_alpaca(convert(record))


def convert_line(name: str, forced: bool, line: bytes) -> Dialogue:
    return convert_record(name, forced, parse_line(line))


def convert_record(name: str, forced: bool, record: Any) -> Dialogue:
    """The dialogue of a record in the form `name`; a record of another form is a mistake, unless the form is forced."""
    others = [] if forced or FORMATS[name].fits(record) else fitting(record)
    if others:
        raise FormatError(f"this is {' or '.join(others)}, the first record was {name}; a file has one form")
    return FORMATS[name].convert(record)


def parse_line(line: bytes) -> Any:
    """One JSON value, objects as `Pairs`."""
    try:
        return json.loads(line.decode(), object_pairs_hook=Pairs)
    except UnicodeDecodeError:
        raise FormatError("not UTF-8 text; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise FormatError(f"column {error.colno}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a million brackets
        raise FormatError(f"no JSON that can be read ({error})") from None


def parse_lines(lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, Any]]:
    """The values of numbered lines."""
    for number, line in lines:
        try:
            yield number, parse_line(line)
        except FormatError as error:
            raise FormatError(f"line {number}: {error}") from None


def parse_json(content: bytes) -> Any:
    """The JSON value that a whole file is, objects as `Pairs`; errors name line and column."""
    try:
        return json.loads(decode(content, 1), object_pairs_hook=Pairs)
    except FormatError:
        raise
    except json.JSONDecodeError as error:
        raise FormatError(f"line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from None
    except ValueError as error:
        raise FormatError(str(error)) from None  # a number of thousands of digits
    except RecursionError:
        raise FormatError("JSON nested too deeply to be conversations") from None
