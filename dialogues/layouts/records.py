"""JSON objects that keep repeated keys, turns with checks, and the wording of errors."""

import re
from collections import Counter
from typing import Any, TypeGuard

from dialogues.dialogue import Turn

LONGEST_NAME = 200  # characters; a longer text is not a name
NOT_IN_NAMES = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # control characters and line ends


class Pairs(list[tuple[str, Any]]):
    """A JSON object in which a key occurs twice, as its key-value pairs in order."""


class FormatError(ValueError):
    """A fault in a record; the caller prefixes the message with the location.

    `account` is a summary of the file, as lines to print.
    """

    account: tuple[str, ...] = ()


class NotRecognisedError(FormatError):
    """The beginning of a file has no known format; the file may not contain conversations."""


def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Pairs:
    """Return a JSON object as a dict, or as `Pairs` if a key occurs twice."""
    made = dict(pairs)
    return made if len(made) == len(pairs) else Pairs(pairs)


def once(record: Any) -> dict[str, Any]:
    """Return an object as a dict; an empty dict for any other value.

    Raises:
        FormatError: a key occurs more than once, so that a dict would lose a value.
    """
    if isinstance(record, Pairs):
        key, count = Counter(key for key, _ in record).most_common(1)[0]
        raise FormatError(
            f"the key {shorten(key)} occurs {count} times; rename the duplicates, or use --format names if"
            " keys are speakers"
        )
    return record if isinstance(record, dict) else {}


def pairs_of(record: Any) -> list[tuple[str, Any]]:
    return list(record.items()) if isinstance(record, dict) else record if isinstance(record, Pairs) else []


def is_object(value: Any) -> bool:
    return isinstance(value, dict | Pairs)


def is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and not isinstance(value, Pairs)


def is_container(value: Any) -> bool:
    return isinstance(value, dict | list)


def make_turn(speaker: str, text: Any, where: str) -> Turn:
    """Return a checked turn, with name and text stripped.

    Raises:
        FormatError: the text is missing, empty or damaged, or the name is not valid; the error begins with `where`.
    """
    if not isinstance(text, str):
        raise FormatError(f"{where}: the text of {shorten(speaker)} must be a string, not {kind(text)}")
    turn = Turn(speaker.strip(), text.strip())
    if not turn.text:
        raise FormatError(f"{where}: {shorten(speaker)} says nothing; remove the turn or add its text")
    name = turn.speaker
    if not name or len(name) > LONGEST_NAME or NOT_IN_NAMES.search(name):
        raise FormatError(
            f"{where}: {shorten(speaker)} is not a speaker's name; use one line of 1 to {LONGEST_NAME} printable"
            " characters"
        )
    if not turn.text.isascii() or not name.isascii():
        try:
            (name + turn.text).encode()
        except UnicodeEncodeError:
            raise FormatError(
                f"{where}: it contains an unpaired surrogate (such as \\ud83d); save the text again as UTF-8"
            ) from None
    return turn


def shorten(name: str) -> str:
    return repr(name if len(name) <= 40 else name[:40] + "…")


def keys_of(record: Any) -> str:
    """Return the first few keys of an object, for error messages."""
    if not is_object(record):
        return kind(record)
    keys = [repr(key[:40]) for key, _ in pairs_of(record)]
    return f"the keys {', '.join(keys[:8])}{', …' if len(keys) > 8 else ''}" if keys else "no keys"


def kind(value: Any) -> str:
    """Return the JSON name of a value's type, for error messages."""
    if is_object(value):
        return "an object"
    if isinstance(value, bool):
        return "true or false"
    return {list: "a list", str: "text", int: "a number", float: "a number"}.get(type(value), "null")
