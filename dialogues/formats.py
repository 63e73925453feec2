"""Conversation files in: one small function for each form a file can have, all ending in `Dialogue`.

A further form is a further function from the parsed file to dialogues, chosen in `read_dialogues`.
"""

import json
from pathlib import Path
from typing import Any

from dialogues.dialogue import Dialogue, Turn
from files import UserError, reason


class Pairs(list[tuple[str, Any]]):
    """A JSON object as its key-value pairs in order, so that a key that stands twice is there twice."""


def read_dialogues(path: Path) -> list[Dialogue]:
    """Read a conversation file.

    Raises:
        UserError: the file is missing, unreadable, not UTF-8, not JSON, or holds something that is no dialogue; the
            message names the place.
    """
    value = parse_json(path)
    if not isinstance(value, list) or isinstance(value, Pairs):
        raise UserError(f"{path}: a list of conversations is needed, this is {kind(value)}")
    if not value:
        raise UserError(f"{path} holds no conversations: its list is empty")
    return [from_names(entry, f"{path}, entry {number}") for number, entry in enumerate(value, 1)]


def parse_json(path: Path) -> Any:
    """Parse a JSON file, objects as `Pairs`; the errors name line and column."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"--data {path} does not exist; name your conversation file") from None
    except OSError as error:
        raise UserError(f"cannot read --data {path}: {reason(error)}") from error
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=Pairs)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None  # a number of thousands of digits
    except RecursionError:
        raise UserError(f"{path}: JSON nested too deeply to be conversations") from None


def from_names(entry: Any, where: str) -> Dialogue:
    """`{"Alex": "...", "Bob": "...", "Alex": "..."}`: the keys are the speakers in order, repeats kept."""
    if not isinstance(entry, Pairs):
        raise UserError(f'{where}: an object {{"speaker": "text", ...}} is needed, this is {kind(entry)}')
    if len(entry) < 2:
        raise UserError(f"{where}: a dialogue needs two turns or more, this has {len(entry)}")
    turns = (make_turn(speaker, text, f"{where}, turn {number}") for number, (speaker, text) in enumerate(entry, 1))
    return Dialogue(tuple(turns))


def make_turn(speaker: str, text: Any, where: str) -> Turn:
    """A checked turn, name and text stripped at both ends."""
    if not isinstance(text, str):
        raise UserError(f"{where}: what {speaker!r} says must be text, this is {kind(text)}")
    turn = Turn(speaker.strip(), text.strip())
    if not turn.text:
        raise UserError(f"{where}: {speaker!r} says nothing; remove the turn or fill it")
    if not turn.speaker or "\n" in turn.speaker:
        raise UserError(f"{where}: {speaker!r} is no speaker's name; use a name on one line")
    try:
        str(turn).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: half a surrogate pair stands in it (as in \\ud83d); save the text anew") from None
    return turn


def kind(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    if isinstance(value, Pairs):
        return "an object"
    if isinstance(value, bool):
        return "true or false"
    return {list: "a list", str: "text", int: "a number", float: "a number"}.get(type(value), "null")
