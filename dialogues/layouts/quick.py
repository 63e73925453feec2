"""A fast reader for the most common layout of JSON Lines; it does not analyse every line.

The layout is `{"messages": [{"role": ..., "content": ...}, ...]}`, possibly with other keys: every record has the same
keys as the first, and every turn has two keys. All other records are left to `layouts.turns`. Both readers give the
same result.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from dialogues.dialogue import Dialogue, Turn
from dialogues.layouts.fields import ROLE_KEYS
from dialogues.layouts.records import FormatError, make_turn
from dialogues.layouts.turns import from_turns, turn_list
from dialogues.layouts.words import ROLES, SYSTEM_PROMPTS, USER, plain, turn_keys


class Quick(NamedTuple):
    """The keys of the records of a file, and of their turns."""

    keys: tuple[str, ...]
    turns: str
    speaker: str
    text: str
    has_roles: bool


def find_quick(records: Sequence[Any]) -> Quick | None:
    """Return the keys of the first record; None if the general reader would read one of these records differently."""
    first = records[0]
    if not isinstance(first, dict) or any(plain(key) in SYSTEM_PROMPTS for key in first):
        return None
    name, items, _ = turn_list(first)
    if not name or not items or not isinstance(items[0], dict) or len(items[0]) != 2 or first.get(name) is not items:
        return None
    keys = turn_keys(tuple(items[0]))
    if not keys.speaker or not keys.text or keys.speaker[0] == keys.text[0]:
        return None
    quick = Quick(tuple(first), name, keys.speaker[0], keys.text[0], plain(keys.speaker[0]) in ROLE_KEYS)
    for record in records:
        dialogue = read_quickly(record, quick)
        if dialogue is not None and [dialogue] != from_turns(record):
            return None
    return quick


def read_quickly(record: Any, quick: Quick) -> Dialogue | None:
    """Return the dialogue of a record; None if it contains anything other than these keys, names and texts."""
    if type(record) is not dict or tuple(record) != quick.keys:
        return None
    _, turns_key, speaker_key, text_key, has_roles = quick
    turns, speakers = [], set()
    for item in record[turns_key]:
        if type(item) is not dict or len(item) != 2:
            return None
        speaker, text = item.get(speaker_key), item.get(text_key)
        if type(speaker) is not str or type(text) is not str:
            return None
        name = name_of_role(speaker) if has_roles else name_as_it_is(speaker)
        text = text.strip()
        if name is None or not text or not (text.isascii() or is_whole(text)):
            return None
        speakers.add(name)
        turns.append(Turn(name, text))
    return Dialogue(tuple(turns)) if turns and speakers != {USER} else None


@lru_cache(maxsize=1 << 12)
def name_of_role(role: str) -> str | None:
    return ROLES.get(plain(role))


@lru_cache(maxsize=1 << 12)
def name_as_it_is(name: str) -> str | None:
    """Return a name, stripped; None if it is not a valid name."""
    try:
        return make_turn(name, "text", "").speaker
    except FormatError:
        return None


def is_whole(text: str) -> bool:
    """Whether a text has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
