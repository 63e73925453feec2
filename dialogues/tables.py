"""Conversations as tables (.csv, .tsv): a row for each turn, or a row for each question and answer."""

import csv
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from dialogues.formats import ROLE_KEYS, SPEAKER_KEYS, TEXT_KEYS, FormatError, Pairs, fits_alpaca, fits_pairs

SPEAKER_COLUMNS = (*SPEAKER_KEYS, "name", "user", "username")
TEXT_COLUMNS = (*TEXT_KEYS, "body", "line")
IDS = ("dialogueid", "dialogid", "conversationid", "convid", "chatid", "threadid", "sessionid", "id")
DELIMITERS = {"csv": ",;\t|", "tsv": "\t"}
SEPARATOR = "sep="  # with which spreadsheets may begin a file


class Columns(NamedTuple):
    """The names in a table's first line, in lower case, and what stands between them."""

    names: list[str]
    delimiter: str

    def first(self, known: Iterable[str]) -> str | None:
        return next((name for name in known if name in self.names), None)


def read_columns(header: str, format: str = "csv") -> Columns | None:
    """The columns of a table whose first line is `header`, if it is the first line of one that can be read."""
    csv.field_size_limit(1 << 30)
    for delimiter in DELIMITERS[format]:
        try:
            cells = next(csv.reader([header], delimiter=delimiter), [])
        except csv.Error:
            continue
        columns = Columns([cell.strip().lower() for cell in cells], delimiter)
        record = Pairs((name, "") for name in columns.names)
        turns = columns.first(SPEAKER_COLUMNS) and columns.first(TEXT_COLUMNS)
        if turns or fits_alpaca(record) or fits_pairs(record):
            return columns
    return None


def records_of_table(lines: Iterator[str], format: str) -> Iterator[tuple[int, Any]]:
    """The records of a table, as JSON would hold them, each with the number of its first line.

    With columns for speaker and text, the rows of one dialogue id are the turns of one dialogue (without an id, all
    rows are); else a row is a record of instruction and output, or of question and answer.

    Raises:
        FormatError: no known columns, or a row of another length; it says the line.
    """
    header = next(lines, "")
    number = 2
    if header.startswith(SEPARATOR):
        header, number = next(lines, ""), 3
    columns = read_columns(header, format)
    if columns is None:
        raise FormatError(
            "its first line must name the columns: speaker and text (and perhaps dialogue_id), question and answer,"
            " or instruction and output"
        )
    rows = read_rows(lines, columns, number)
    speaker, text = columns.first(SPEAKER_COLUMNS), columns.first(TEXT_COLUMNS)
    if speaker is None or text is None:
        yield from ((number, Pairs(row.items())) for number, row in rows)
    else:
        key = "role" if speaker in ROLE_KEYS else "speaker"
        turns = ((number, {**row, key: row[speaker], "text": row[text]}) for number, row in rows)
        yield from group_turns(turns, columns.names, key)


def group_turns(
    rows: Iterable[tuple[int, dict[str, Any]]], names: Iterable[str], speaker: str = "speaker"
) -> Iterable[tuple[int, list[Pairs]]]:
    """Turns that stand one by one, as lists: those of one dialogue id together, or all, each with its first number.

    An id that no two turns share numbers the turns, not the dialogues.
    """
    rows = list(rows)
    plain = {re.sub(r"[\W_]", "", name.lower()): name for name in names}
    identity = next((plain[name] for name in IDS if name in plain), None)
    if identity and len({row[identity] for _, row in rows}) == len(rows) > 1:
        identity = None
    dialogues: dict[Any, tuple[int, list[Pairs]]] = {}
    for number, row in rows:
        _, turns = dialogues.setdefault(row[identity] if identity else "", (number, []))
        turns.append(Pairs([(speaker, row[speaker]), ("text", row["text"])]))
    return dialogues.values()


def read_rows(lines: Iterable[str], columns: Columns, number: int) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows from line `number` on, each with the number of its first line.

    Between tabs a quotation mark is a character like others, unless it stands at both ends of a cell: few programs that
    write such files quote, and one that is never closed would swallow the rows behind it.
    """
    tabs = columns.delimiter == "\t"
    quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    reader = csv.reader(lines, delimiter=columns.delimiter, strict=True, quoting=quoting)
    first = number
    try:
        for row in reader:
            if any(row):
                if len(row) != len(columns.names):
                    raise FormatError(f"line {number} has {len(row)} columns, the header {len(columns.names)}")
                cells = map(unquote, row) if tabs else row
                yield number, dict(zip(columns.names, cells, strict=True))
            number = first + reader.line_num
    except csv.Error as error:
        raise FormatError(f"line {number}: {' '.join(str(error).split())}") from None


def unquote(cell: str) -> str:
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"'
    return cell[1:-1].replace('""', '"') if quoted else cell
