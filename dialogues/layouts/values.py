"""Parse JSON with the location of every error, and find records at any depth."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from dialogues.layouts.answers import fits_pairs
from dialogues.layouts.formats import fitting, has_turns
from dialogues.layouts.order import put_rows_in_order
from dialogues.layouts.records import FormatError, is_container, is_list, is_object, make_object, pairs_of
from dialogues.layouts.trees import rows_of_columns
from dialogues.layouts.words import Columns, plain, turn_keys

# Beginnings of text that looks like JSON but is not: [20:01], [31.12.23, [Nora], {{.
NO_JSON = re.compile(
    r"\[\s*(?:\d+[:/-]|\d+\.?\s+[^\W\d]|\d+\.\s?\d+\.|(?!true|false|null)[^\W\d_]|[^\x00-\x7f])|\{\\rtf|\{\{|\[[+@#~]"
)
RECORD_LISTS = ("data", "rows", "records", "examples", "items", "samples", "entries", "train")
DEEPEST = 12  # maximum nesting depth of the records


def parse_line(line: bytes) -> Any:
    """Parse a line as one JSON value.

    Raises:
        FormatError: the line is not UTF-8 or not JSON.
    """
    try:
        return json.loads(line.decode(), object_pairs_hook=make_object)
    except UnicodeDecodeError:
        raise FormatError("not UTF-8 text; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise FormatError(f"column {error.colno}: not JSON ({error.msg}){advice(line)}") from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, a million brackets
        raise FormatError(f"this JSON can't be read ({error})") from None


def advice(content: bytes) -> str:
    """Return advice on how to repair text that is not JSON; empty if there is none."""
    if re.match(rb"\s*[\[{]\s*[{\[]?\s*'", content):
        return "; it has Python's single quotes: write the file with json.dump"
    return ""


def parse_lines(lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, Any]]:
    """Parse numbered lines as JSON values."""
    for number, line in lines:
        try:
            yield number, parse_line(line)
        except FormatError as error:
            raise FormatError(f"line {number}: {error}") from None


def parse_json(content: bytes) -> Any:
    """Return the JSON value of a file, or a list of the values if there are several.

    Raises:
        FormatError: the file is not UTF-8 or not JSON; the error names the location.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise FormatError(f"line {line} is not UTF-8 text; save the file as UTF-8") from None
    decoder, values, at = json.JSONDecoder(object_pairs_hook=make_object), [], 0
    try:
        while match := re.compile(r"\s*(?=\S)").match(text, at):
            if values and not is_object(values[-1]):
                raise json.JSONDecodeError("Extra data", text, match.end())
            value, at = decoder.raw_decode(text, match.end())
            values.append(value)
    except json.JSONDecodeError as error:
        raise FormatError(
            f"line {error.lineno}, column {error.colno}: not JSON ({error.msg}){advice(content)}"
        ) from None
    except ValueError as error:
        raise FormatError(str(error)) from None  # a number with thousands of digits
    except RecursionError:
        raise FormatError("its JSON is nested too deeply to hold conversations") from None
    return values[0] if len(values) == 1 else values


def find_records(value: Any, columns: Columns = ()) -> list[Any]:
    """Return the records in a JSON value: the value itself, its items, or the items of lists and objects inside it."""
    return search(value, columns, 0) or (value if is_list(value) else [value])


def search(value: Any, columns: Columns, depth: int, inside_object: bool = False) -> list[Any]:
    if depth == 0 and (rows := rows_of_columns(value, columns)) and not turn_keys(tuple(rows[0]), columns).speaker:
        return rows
    if depth == 0 and (rows := listed_exchanges(value)):
        return rows
    if is_record(value, columns, depth) and not (inside_object and is_of_names(value, columns)):
        return [value]
    if depth > DEEPEST or not is_container(value):
        return []
    children = value if is_list(value) else [child for _, child in pairs_of(value)]
    known = [child for child in children if is_record(child, columns, depth + 1)]
    lone = not is_list(value) and not all(is_object(child) for child in children)
    if lone:
        known = [child for child in known if not is_of_names(child, columns)]  # a settings object is not a record
    if known:
        alike = [child for child in children if type(child) is type(known[0])]
        return children if is_list(value) else alike if len(known) > 1 else known
    found = [search(child, columns, depth + 1, lone and is_object(child)) for child in children if is_container(child)]
    talks = [records for records in found if any(not is_of_names(record, columns) for record in records)]
    return [record for records in talks or found for record in records]


def listed_exchanges(value: Any) -> list[Any]:
    """Return the question-answer pairs that a file lists under a key for records, such as `data`."""
    lists = [held for key, held in pairs_of(value) if plain(key) in RECORD_LISTS and is_list(held)]
    return lists[0] if len(lists) == 1 and lists[0] and all(map(fits_pairs, lists[0])) else []


def is_of_names(value: Any, columns: Columns) -> bool:
    return is_object(value) and fitting(value, columns) == ["names"]


def is_record(value: Any, columns: Columns, depth: int) -> bool:
    """Whether a value holds a conversation, or several whose turns carry ids."""
    if is_object(value):
        return any(isinstance(held, str | list | dict) for _, held in pairs_of(value)) and bool(fitting(value, columns))
    if not is_list(value):
        return False
    if has_turns(value, columns):
        return True
    return depth > 0 and len(value) > 1 and all(isinstance(item, str) for item in value)


def group_exchanges(records: list[Any], columns: Columns = ()) -> list[Any]:
    """Group questions and answers by dialogue id, into one record for each dialogue; leave other records unchanged."""
    rows = [record for record in records if isinstance(record, dict)]
    if len(rows) < len(records) or not rows or fitting(rows[0], columns) != ["pairs"]:
        return records
    keys = turn_keys(tuple(rows[0]), columns)
    identity = [key for key in keys.identity if plain(key) not in ("id", "topic", "channel")]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row.get(key)) for key in identity), []).append(row)
    if not identity or len(groups) == len(rows):
        return records
    return [{"exchanges": put_rows_in_order(group, keys)[0]} for group in groups.values()]
