"""Recognise a conversation file, and read it as numbered records that become dialogues."""

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dialogues.dialogue import Dialogue
from dialogues.inputs import LIMIT, Input, reading
from dialogues.layouts.account import MOST_LOST
from dialogues.layouts.answers import as_alpaca
from dialogues.layouts.formats import (
    FORMATS,
    LISTS,
    PEEKED,
    Options,
    fitting,
    recognise,
    transcript_key,
    unknown_record,
    unused_keys,
)
from dialogues.layouts.messages import join_turns
from dialogues.layouts.order import are_chats
from dialogues.layouts.people import from_names, people_problem
from dialogues.layouts.quick import Quick, find_quick, read_quickly
from dialogues.layouts.records import FormatError, NotRecognisedError, is_list, is_object, pairs_of
from dialogues.layouts.tables import SEPARATOR, read_header, rows_of_table
from dialogues.layouts.turns import kind_of_turn, turn_list
from dialogues.layouts.values import NO_JSON, find_records, group_exchanges, parse_json, parse_line, parse_lines
from dialogues.layouts.words import ROLES, Columns, plain, turn_keys
from support.errors import UserError, amount

if TYPE_CHECKING:
    from dialogues.layouts.texts import Read

HEAD = 1 << 16  # number of bytes to look at when recognising a file
NAMED = 3  # maximum number of inputs to name
MOST_ROWS = 0.7  # maximum distinct speakers per row; a column with more does not hold speakers


class Source(NamedTuple):
    """A recognised file: numbered records, which can be read only once, and a function that converts one to dialogues.

    `form` is the format of a record, which may differ from that of the file (a "csv" may hold "pairs"). `unit` is the
    unit of the numbers: "line", "record", "dialogue". `convert` and a record can be sent to another process. `size` is
    the size of all records in bytes if they are lines, else their number if it is known. `not_used` holds the keys of
    the first record that are not read. `account` is a summary of the file's characters, as lines to print. `cut` is
    true if the program divided the file into dialogues at pauses.
    """

    input: Input
    format: str
    form: str
    unit: str
    records: Iterable[tuple[int, Any]]
    convert: Callable[[Any], list[Dialogue]]
    size: int | None = None
    not_used: tuple[str, ...] = ()
    account: tuple[str, ...] = ()
    cut: bool = False

    def dialogues(self, number: int, record: Any, join: bool = True) -> list[Dialogue]:
        """Return the dialogues of a record; a dialogue may have one turn, or none.

        In a chat, consecutive messages from one person become one turn unless `join` is false.

        Raises:
            UserError: the record is malformed; the error names the record and the fault.
        """
        try:
            found = self.convert(record)
        except FormatError as error:
            raise UserError(f"{self.input}: {self.unit} {number}: {error}") from None
        return [join_turns(dialogue) for dialogue in found] if self.cut and join else found

    def for_template(self, template: str) -> "Source":
        """Return the source with its dialogues in the format that a template needs.

        Raises:
            UserError: the template is `alpaca`, and the file holds no instruction data.
        """
        if template != "alpaca" or self.form == "alpaca":
            return self
        if self.form != "pairs":
            raise UserError(
                f"--template alpaca is for instruction data (instruction and output, or prompt and completion);"
                f" {self.input} is {self.format}: choose another template"
            )
        return self._replace(convert=partial(convert_to_alpaca, self.convert))


def choose_template(sources: Iterable[Source], template: str) -> str:
    """Return the template that `auto` means: alpaca if all sources hold instruction data, else prompt."""
    if template != "auto":
        return template
    return "alpaca" if all(source.form == "alpaca" for source in sources) else "prompt"


def name_sources(sources: Sequence[Source]) -> str:
    """Return the names of the first few inputs, as text."""
    names = ", ".join(source.input.name for source in sources[:NAMED])
    return names + (f" and {amount(len(sources) - NAMED, 'more file')}" if len(sources) > NAMED else "")


def name_formats(sources: Iterable[Source]) -> str:
    return ", ".join(dict.fromkeys(source.format for source in sources))


def open_source(
    path: Path | Input,
    format: str = "auto",
    pause_hours: float = 8,
    columns: Columns = (),
    allow_loss: bool = False,
) -> Source:
    """Recognise a conversation file by its content.

    JSON Lines with one conversation per line are streamed; all other formats are read at once.

    Raises:
        UserError: the file is missing, unreadable, binary, not UTF-8, or has no conversations in a known format.
    """
    input = path if isinstance(path, Input) else Input.of(path)
    options = Options(columns, timedelta(hours=pause_hours))
    with reading(input):
        with input.open() as file:
            head = file.read(HEAD)
        container = recognise_container(head, input, format, columns)
        if container == "JSON Lines":
            return json_lines_source(input, format, options)
        if container == "JSON":
            return json_source(input, parse_json(input.read()), format, options)
        lines = [decode(line, number) for number, line in input.lines(LIMIT)]
        if container in ("csv", "tsv"):
            return table_source(input, lines, container, options)
        from dialogues.layouts.texts import read_file  # compiling its patterns takes a tenth of a second

        return text_source(input, read_file(lines, container, options.pause), allow_loss)


def decode(content: bytes, line: int) -> str:
    """Decode UTF-8 text that begins on line `line`.

    Raises:
        FormatError: the text is not UTF-8; the error names the line.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise FormatError(f"line {line} is not UTF-8 text; save the file as UTF-8") from None


def recognise_container(head: bytes, input: Input, format: str, columns: Columns) -> str:
    """Return the kind of file that begins with `head`: "JSON", "JSON Lines", "csv", "tsv", or a text format."""
    if b"\0" in head:
        raise NotRecognisedError("this is a binary file; conversations must be text")
    if b"\r" in head and b"\n" not in head and head[:1] not in b"[{":
        raise FormatError("its lines end with CR only, as on old Macs; save it with LF or CRLF line endings")
    if format in ("text", "csv", "tsv"):
        return format
    text = head.decode("utf-8-sig", errors="replace").strip()
    if not text:
        raise NotRecognisedError("the file is empty")
    json = text[0] in "[{" and not NO_JSON.match(text)
    if json or format in FORMATS:
        return "JSON Lines" if has_json_lines(input) else "JSON"
    if format == "chat-export":
        return format
    lines = [line for line in text.splitlines() if line.strip()]
    if lines[0].startswith(SEPARATOR) and len(lines) > 1:
        lines.pop(0)
    if "\t" in lines[0] and read_header(lines[0], "tsv", columns):
        return "tsv"
    return "csv" if read_header(lines[0], "csv", columns) else "auto"


def has_json_lines(input: Input) -> bool:
    """Whether the first line is a whole JSON value and more lines follow."""
    lines = (line for _, line in input.lines() if line.strip())
    first = next(lines)
    if next(lines, None) is None:
        return False
    try:
        parse_line(first)
    except FormatError:
        return False
    return True


def json_lines_source(input: Input, format: str, options: Options) -> Source:
    """Open JSON Lines: each line is a conversation, parsed only when it is converted, or a turn."""
    records = ((number, line) for number, line in input.lines() if line.strip())
    first = list(islice(records, PEEKED))
    values = list(parse_lines(first))
    whole = format in ("auto", "chat-export", "text") and is_whole([value for _, value in values], options.columns)
    if whole or format == "chat-export":
        rest = ((number, line) for number, line in input.lines(LIMIT) if line.strip())
        return json_source(input, [value for _, value in parse_lines(rest)], format, options)
    name, not_used = choose_form(values, format, "line", options.columns)
    cut = any(is_chat(value, options.columns) for _, value in values[:3])
    quick = find_quick([value for _, value in values]) if name in LISTS and not cut and not options.columns else None
    convert = partial(convert_line, name, format, options, quick)
    return Source(input, name, name, "line", chain(first, records), convert, input.size, not_used, cut=cut)


def is_whole(values: Sequence[Any], columns: Columns) -> bool:
    """Whether the lines must be read together because each one is a turn, an exchange, or a transcript."""
    kinds = [kind_of_turn(value, columns) for value in values if is_object(value) and not is_header(value)]
    forms = [fitting(value, columns) for value in values[:3]]
    if kinds.count("message") > 0.6 * len(kinds) and not any(set(form) - {"text"} for form in forms):
        return True
    rows = list(values)
    return ["text"] in forms or group_exchanges(rows, columns) is not rows


def is_header(value: Any) -> bool:
    return any(plain(key) == "chatmetadata" for key, _ in pairs_of(value))


def json_source(input: Input, value: Any, format: str, options: Options) -> Source:
    """Open one JSON value that holds the records, at any depth."""
    columns = options.columns
    records = group_exchanges(find_records(value, columns), columns)
    if not records:
        raise NotRecognisedError("the file holds no conversations: its list is empty")
    numbered = list(enumerate(records, 1))
    name, not_used = choose_form(numbered, format, "record", columns)
    if name == "text":
        return transcript_source(input, numbered, columns, not_used)
    convert = partial(convert_record, name, format, options)
    cut = any(is_chat(record, columns) for record in records[:3])
    if format == "chat-export" and not cut:
        raise FormatError("this is not an exported chat: no message has a time and a speaker; try --format auto")
    shown = "chat-export" if cut and format in ("auto", "chat-export") else name
    return Source(input, shown, name, "record", numbered, convert, len(records), not_used, cut=cut)


def is_chat(record: Any, columns: Columns = ()) -> bool:
    """Whether a record holds messages from people with times, so that pauses divide it into dialogues."""
    try:
        _, items, _ = turn_list(record, columns)
    except FormatError:
        return False
    for item in items[:3]:
        keys = turn_keys(tuple(dict(pairs_of(item))), columns)
        role = dict(pairs_of(item)).get(keys.role) if keys.role else None
        if keys.time and keys.speaker and not (isinstance(role, str) and plain(role) in ROLES):
            return True
    return False


def choose_form(
    records: Sequence[tuple[int, Any]], format: str, unit: str, columns: Columns
) -> tuple[str, tuple[str, ...]]:
    """Return the format of the first record in a known format, and the keys in it that are not read.

    Raises:
        FormatError: that record matches several formats, or none of the first records matches any.
    """
    sample = records[:PEEKED]
    forced = format in FORMATS
    number, record = next((one for one in sample if forced or fitting(one[1], columns)), sample[0])
    try:
        name = format if forced else recognise(record, columns)
        if name == "names" and format == "auto" and (problem := people_problem([each for _, each in sample])):
            raise NotRecognisedError(f"{problem}; {unknown_record([each for _, each in sample])}")
        if is_list(record) and (problem := rows_problem(record, columns)):
            raise NotRecognisedError(problem)
        return name, tuple(unused_keys(record, name, columns))
    except FormatError as error:
        raise type(error)(f"{unit} {number}: {error}") from None


def rows_problem(rows: Sequence[Any], columns: Columns) -> str | None:
    """Return the reason why the speakers of rows are not people (their names do not recur); None if they are."""
    objects = [dict(pairs_of(row)) for row in rows if is_object(row)]
    if len(objects) < 6 or columns:
        return None
    keys = turn_keys(tuple(objects[1]), columns)
    names = [str(row.get(keys.speaker[0])) for row in objects] if keys.speaker else []
    if keys.identity or len(set(names)) <= MOST_ROWS * len(names):
        return None
    return f"the values of {keys.speaker[0]!r} do not repeat, as speakers do; {unknown_record(objects[:PEEKED])}"


def table_source(input: Input, lines: list[str], format: str, options: Options) -> Source:
    """Open a table whose rows are turns or conversations."""
    rows = list(rows_of_table(iter(lines), format, options.columns))
    if not rows:
        raise FormatError("the table has a header but no rows")
    columns = options.columns
    forms = fitting(rows[0][1], columns)
    keys = turn_keys(tuple(rows[0][1]), columns)
    if keys.speaker and keys.text and "prompt" not in dict(columns):
        records = [row for _, row in rows]
        if problem := rows_problem(records, columns):
            raise NotRecognisedError(problem)
        convert = partial(convert_record, "turns", format, options)
        cut = bool(keys.time) and (not keys.identity or are_chats(records[0], keys))
        unused = tuple(unused_keys(records, "turns", columns))
        return Source(input, format, "turns", "dialogue", [(1, records)], convert, None, unused, cut=cut)
    name = forms[0] if forms else None
    if name is None:
        raise NotRecognisedError(unknown_record([row for _, row in rows[:PEEKED]]))
    records = [row for _, row in rows]
    if (grouped := group_exchanges(records, columns)) is not records:
        convert = partial(convert_record, "turns", format, options)
        return Source(input, format, "turns", "dialogue", list(enumerate(grouped, 1)), convert, len(grouped))
    unused = tuple(unused_keys(rows[0][1], name, columns))
    if name == "text":
        return transcript_source(input, rows, columns, unused, format)
    convert = partial(convert_record, name, format, options)
    return Source(input, format, name, "line", rows, convert, len(rows), unused)


def transcript_source(
    input: Input, records: Sequence[tuple[int, Any]], columns: Columns, unused: tuple[str, ...], format: str = "text"
) -> Source:
    """Open records that each hold a whole dialogue in one text."""
    from dialogues.layouts.texts import read_transcripts

    key = next((found for _, record in records if (found := transcript_key(record, columns))), "")
    texts = [(number, dict(pairs_of(record)).get(key) or "") for number, record in records]
    read = read_transcripts([(number, text) for number, text in texts if isinstance(text, str)])
    whole_ones = sum(len(dialogue.turns) > 1 for _, dialogue in read.dialogues) if read else 0
    if read is None or len(read.speakers) < 2 or whole_ones < MOST_ROWS * len(records):
        raise NotRecognisedError(
            f"the text of {key!r} contains no speaker names (no `Name: text`);"
            f" {unknown_record([record for _, record in records[:PEEKED]])}"
        )
    return Source(input, format, "turns", "record", *whole(read), unused, tuple(read.account.lines()))


def text_source(input: Input, read: "Read", allow_loss: bool) -> Source:
    """Return the source of a text file that has been read.

    Raises:
        FormatError: too much text is unaccounted for and `allow_loss` is off.
    """
    account = tuple(read.account.lines())
    unit = "dialogue" if read.cut else "line"
    if not allow_loss and read.account.lost_share > MOST_LOST:
        error = FormatError(
            f"{read.account.lost_share:.0%} of its text is unaccounted for when read as {read.format}"
            f" ({'; '.join(read.account.examples[:2])}); remove those lines, or read it anyway with --allow-loss"
        )
        error.account = account
        raise error
    return Source(input, read.format, "turns", unit, *whole(read), account=account, cut=read.cut)


def whole(read: "Read") -> tuple[list[tuple[int, Dialogue]], Callable[[Any], list[Dialogue]], int]:
    return read.dialogues, as_it_is, len(read.dialogues)


def as_it_is(dialogue: Dialogue) -> list[Dialogue]:
    return [dialogue]


def convert_to_alpaca(convert: Callable[[Any], list[Dialogue]], record: Any) -> list[Dialogue]:
    return [as_alpaca(dialogue) for dialogue in convert(record)]


def convert_line(name: str, format: str, options: Options, quick: Quick | None, line: bytes) -> list[Dialogue]:
    record = parse_line(line)
    if quick and (dialogue := read_quickly(record, quick)):
        return [dialogue]
    return convert_record(name, format, options, record)


def convert_record(name: str, format: str, options: Options, record: Any) -> list[Dialogue]:
    """Return the dialogues of a record in the format `name`.

    Raises:
        FormatError: the record has a different format, and `format` does not force one.
    """
    form = FORMATS[name]
    if format == "names":
        return [from_names(record, every_key=True)]
    others = [] if format in FORMATS or form.fits(record, options.columns) else fitting(record, options.columns)
    if others and not {name, *others} <= LISTS:
        raise FormatError(
            f"this is {' or '.join(others)}, but the first record was {name}; all records must have the same format"
        )
    return form.convert(record, options)
