"""JSON parsed with the place of mistakes, and the records in it, at any depth."""

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

# What begins with a bracket and is no JSON: [20:01], [31.12.23, [Nora], {{.
NO_JSON = re.compile(
    r"\[\s*(?:\d+[:/-]|\d+\.?\s+[^\W\d]|\d+\.\s?\d+\.|(?!true|false|null)[^\W\d_]|[^\x00-\x7f])|\{\\rtf|\{\{|\[[+@#~]"
)
RECORD_LISTS = ("data", "rows", "records", "examples", "items", "samples", "entries", "train")
DEEPEST = 12  # levels of objects and lists around the records


def parse_line(line: bytes) -> Any:
    """One JSON value from a line.

    Raises:
        FormatError: it is not UTF-8 or not JSON.
    """
    try:
        return json.loads(line.decode(), object_pairs_hook=make_object)
    except UnicodeDecodeError:
        raise FormatError("not UTF-8 text; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise FormatError(f"column {error.colno}: not JSON ({error.msg}){advice(line)}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a million brackets
        raise FormatError(f"no JSON that can be read ({error})") from None


def advice(content: bytes) -> str:
    """How to mend text that is not JSON, if it is known; else empty."""
    if re.match(rb"\s*[\[{]\s*[{\[]?\s*'", content):
        return "; these are Python's quotes: write the file with json.dump"
    return ""


def parse_lines(lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, Any]]:
    """The values of numbered lines."""
    for number, line in lines:
        try:
            yield number, parse_line(line)
        except FormatError as error:
            raise FormatError(f"line {number}: {error}") from None


def parse_json(content: bytes) -> Any:
    """The JSON value of a file, or the list of several that follow one another.

    Raises:
        FormatError: it is not UTF-8 or not JSON; the error names the place.
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
        raise FormatError(str(error)) from None  # a number of thousands of digits
    except RecursionError:
        raise FormatError("JSON nested too deeply to be conversations") from None
    return values[0] if len(values) == 1 else values


def find_records(value: Any, columns: Columns = ()) -> list[Any]:
    """The records in a JSON value: the value itself, its items, or the items of lists and objects inside it."""
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
        known = [child for child in known if not is_of_names(child, columns)]  # an object of settings is none
    if known:
        alike = [child for child in children if type(child) is type(known[0])]
        return children if is_list(value) else alike if len(known) > 1 else known
    found = [search(child, columns, depth + 1, lone and is_object(child)) for child in children if is_container(child)]
    talks = [records for records in found if any(not is_of_names(record, columns) for record in records)]
    return [record for records in talks or found for record in records]


def listed_exchanges(value: Any) -> list[Any]:
    """The questions and answers that a file of its own lists under a word for records, not for a conversation."""
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
    """Questions and answers with a dialogue's id as one record for each dialogue; other records as they are."""
    rows = [record for record in records if isinstance(record, dict)]
    if len(rows) < len(records) or not rows or fitting(rows[0], columns) != ["pairs"]:
        return records
    keys = turn_keys(tuple(rows[0]), columns)
    identity = [key for key in keys.identity if plain(key) != "id"]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row.get(key)) for key in identity), []).append(row)
    if not identity or len(groups) == len(rows):
        return records
    return [{"exchanges": put_rows_in_order(group, keys)[0]} for group in groups.values()]
