"""Tables (.csv, .tsv) as records: their delimiter, column names and rows."""

import ast
import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from dialogues.layouts.answers import fits_alpaca, fits_pairs
from dialogues.layouts.formats import unknown_record
from dialogues.layouts.records import FormatError, NotRecognisedError, make_object
from dialogues.layouts.words import TURN_LISTS, Columns, plain, turn_keys
from support.errors import amount

DELIMITERS = {"csv": ",;\t|", "tsv": "\t"}
SEPARATOR = "sep="  # possible beginning of a file saved by a spreadsheet
PEEKED = 20  # number of lines to look at when deciding whether a file is a table
LONGEST_COLUMN = 60  # maximum characters in a column name


class Header(NamedTuple):
    """A table's column names, from its first line, and its delimiter."""

    names: list[str]
    delimiter: str


def read_header(line: str, format: str = "csv", columns: Columns = ()) -> Header | None:
    """Return the header of a table whose first line is `line`; None if its columns are unknown."""
    for header in headers(line, format):
        if knows_columns(header.names, columns):
            return header
    return None


def headers(line: str, format: str) -> Iterator[Header]:
    csv.field_size_limit(1 << 30)
    for delimiter in DELIMITERS[format]:
        try:
            cells = next(csv.reader([line], delimiter=delimiter), [])
        except csv.Error:
            continue
        yield Header([cell.strip() for cell in cells], delimiter)


def knows_columns(names: Sequence[str], columns: Columns) -> bool:
    """Whether these columns hold turns or records of a known format."""
    if any(len(name) > LONGEST_COLUMN for name in names):
        return False
    record = dict.fromkeys(names, "")
    if columns:
        return {key for _, key in columns} <= set(names)
    keys = turn_keys(tuple(names))
    if (keys.speaker and keys.text) or fits_alpaca(record) or fits_pairs(record):
        return True
    words = [plain(name) for name in names]
    return any(word in TURN_LISTS for word in words) and (
        len(names) > 1 or words[0] not in ("text", "content", "data", "lines")
    )


def unknown_rows(lines: Sequence[str]) -> list[dict[str, str]]:
    """Return the first rows of a table whose column names are unknown; no rows if the lines are not a table.

    Raises:
        NotRecognisedError: the first line is a row like the others, not column names.
    """
    first = [line for line in lines[:PEEKED] if line.strip()]
    for header in headers(first[0], "csv") if len(first) > 1 else ():
        try:
            cells = [next(csv.reader([line], delimiter=header.delimiter), []) for line in first[1:]]
        except csv.Error:
            continue
        rows = [row for row in cells if len(row) == len(header.names)]
        named = all(0 < len(name) < 40 and not re.search(r"[.!?:]$|://", name) for name in header.names[1:])
        if len(header.names) < 2 or len(rows) <= 0.8 * len(cells):
            continue
        if any(name in column for name, column in zip(header.names, zip(*rows, strict=True), strict=True)):
            raise NotRecognisedError("the table's first line has no column names; add a line such as speaker,text")
        if named:
            return [dict(zip(header.names, row, strict=True)) for row in rows]
    return []


def rows_of_table(lines: Iterator[str], format: str, columns: Columns = ()) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a table below its header, each with the number of its first line.

    Raises:
        FormatError: the columns are unknown, two have the same name, or a row has a different length; the error names
            the line.
    """
    line, number = next(lines, ""), 2
    if line.startswith(SEPARATOR):
        line, number = next(lines, ""), 3
    header = read_header(line, format, columns) or next(headers(line, format), None)
    if header is None or not any(header.names):
        raise FormatError("its first line must contain the column names")
    name, count = Counter(header.names).most_common(1)[0]
    if count > 1:
        raise FormatError(f"line {number - 1}: {count} columns are named {name!r}; rename them so that none is lost")
    if not knows_columns(header.names, columns):
        raise FormatError(unknown_record([dict.fromkeys(header.names, "")]))
    yield from read_rows(lines, header, number)


def read_rows(lines: Iterable[str], header: Header, number: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows that begin at line `number`, each with the number of its first line.

    In a tab-separated file, quotation marks are ordinary characters unless they enclose a whole cell. Few programs
    quote cells in such files, and an unclosed quotation mark would swallow the rows below.
    """
    tabs = header.delimiter == "\t"
    quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    reader = csv.reader(lines, delimiter=header.delimiter, strict=True, quoting=quoting)
    first = number
    try:
        for row in reader:
            if any(row):
                if len(row) != len(header.names):
                    raise FormatError(
                        f"line {number} has {amount(len(row), 'column')}, but the header has {len(header.names)};"
                        " fix it, or put texts that contain the separator in quotation marks"
                    )
                cells = map(unquote, row) if tabs else row
                yield number, {name: read_cell(cell) for name, cell in zip(header.names, cells, strict=True)}
            number = first + reader.line_num
    except csv.Error as error:
        raise FormatError(f"line {number}: {' '.join(str(error).split())}") from None


def unquote(cell: str) -> str:
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"'
    return cell[1:-1].replace('""', '"') if quoted else cell


def read_cell(cell: str) -> Any:
    """Return a cell as text, or as a list or object if it contains one in JSON, Python or NumPy notation."""
    if cell[:1] not in ("[", "{") or cell[-1:] not in ("]", "}"):
        return cell.replace("_comma_", ",")  # EmpatheticDialogues writes commas this way
    try:
        return json.loads(cell, object_pairs_hook=make_object)
    except (ValueError, RecursionError):
        pass
    try:
        value = ast.literal_eval(re.sub(r"(?<=['\"])\s*\n\s*(?=['\"{])|(?<=\})\s*\n?\s*(?=\{)", ", ", cell))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return cell
    return value if isinstance(value, list | dict) else cell
