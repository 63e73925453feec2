"""The formats of records, the functions that recognise and read each format, and the choice among them.

A record is the JSON value, or the table row, that holds a conversation. Objects are dicts, or `Pairs` if a key occurs
twice. A new format needs two functions and an entry in `FORMATS`.
"""

import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from dialogues.dialogue import Dialogue
from dialogues.layouts.answers import choose_pair, fits_alpaca, fits_pairs, from_alpaca, from_pairs
from dialogues.layouts.messages import PAUSE
from dialogues.layouts.people import fits_names, from_names, people_of
from dialogues.layouts.records import FormatError, NotRecognisedError, is_list, is_object, keys_of, kind, pairs_of
from dialogues.layouts.trees import unfold
from dialogues.layouts.turns import from_turns, holds_turns, kind_of_turn, turn_list
from dialogues.layouts.words import (
    INPUTS,
    INSTRUCTIONS,
    OUTPUTS,
    SYSTEM_PROMPTS,
    TURN_LISTS,
    Columns,
    find_key,
    is_nothing,
    plain,
    turn_keys,
)
from support.errors import printable

LISTS = frozenset(("turns", "messages", "sharegpt"))  # formats with a list of turns
PEEKED = 100  # number of records to look at when choosing the format of a file
TURN_ASIDES = frozenset(("toolcalls", "functioncall", "toolcallid"))
# Signs that a text may be a whole dialogue: a second line, or a separator between speakers.
TRANSCRIPT = re.compile(r"\n|__eou__|\[/INST\]|<\||###|<start_of_turn>|ASSISTANT:|\[SEP\]")


class Options(NamedTuple):
    """The user's options for reading records."""

    columns: Columns = ()
    pause: timedelta = PAUSE


class Format(NamedTuple):
    fits: Callable[[Any, Columns], bool]
    convert: Callable[[Any, Options], list[Dialogue]]


def has_turns(record: Any, columns: Columns = ()) -> bool:
    """Whether a record is or holds a list of turns."""
    try:
        _, items, _ = turn_list(record, columns)
    except FormatError:
        return False
    return holds_turns(items, columns) if not is_list(record) else is_conversation(record, columns)


def is_conversation(items: list[Any], columns: Columns = ()) -> bool:
    """Whether a list without a key is one conversation: messages, pairs, or objects with one name each."""
    kinds = [kind_of_turn(item, columns) for item in items[:3]]
    if "message" in kinds:
        return True
    if kinds and all(kind == "pair" for kind in kinds):
        return not isinstance(items[0][0], str)
    return len(kinds) > 1 and all(kind == "named" for kind in kinds)


def list_form(record: Any, columns: Columns = ()) -> str | None:
    """Return the format of a record with a list of turns; None for a record without one."""
    if not has_turns(record, columns):
        return None
    first = next((item for item in turn_list(record, columns)[1][:2] if is_object(item)), {})
    keys = {plain(key) for key, _ in pairs_of(first)}
    return "messages" if {"role", "content"} <= keys else "sharegpt" if {"from", "value"} <= keys else "turns"


def transcript_key(record: Any, columns: Columns = ()) -> str | None:
    """Return the key of the text that holds a whole dialogue; None without one."""
    asked = dict(columns)
    if "text" in asked and "speaker" not in asked:
        return asked["text"] if asked["text"] in dict(pairs_of(record)) else None
    found = {plain(key): (key, value) for key, value in reversed(pairs_of(record))}
    for word in TURN_LISTS:
        if word in found and isinstance(text := found[word][1], str) and TRANSCRIPT.search(text):
            return found[word][0]
    return None


def convert_messages(record: Any, options: Options) -> list[Dialogue]:
    return from_turns(record, options.columns, options.pause)


FORMATS = {
    "names": Format(lambda record, columns: not columns and fits_names(record), lambda record, _: [from_names(record)]),
    "turns": Format(lambda record, columns: list_form(record, columns) == "turns", convert_messages),
    "messages": Format(lambda record, columns: list_form(record, columns) == "messages", convert_messages),
    "sharegpt": Format(lambda record, columns: list_form(record, columns) == "sharegpt", convert_messages),
    "alpaca": Format(lambda record, _: fits_alpaca(record), lambda record, _: [from_alpaca(record)]),
    "pairs": Format(fits_pairs, lambda record, options: [from_pairs(record, options.columns)]),
}


def fitting(record: Any, columns: Columns = ()) -> list[str]:
    """Return the names of the formats that match `record`."""
    listed = list_form(record, columns)
    names = [name for name in FORMATS if name == listed or (name not in LISTS and FORMATS[name].fits(record, columns))]
    if len(names) > 1 and "turns" in names and plain(turn_list(record, columns)[0]) in ("history", "chosen", "text"):
        names.remove("turns")  # the list is part of the pair
    return names or (["text"] if transcript_key(record, columns) is not None else [])


def recognise(record: Any, columns: Columns = ()) -> str:
    """Return the only format that matches `record`.

    Raises:
        FormatError: no format matches, or several do.
    """
    names = fitting(record, columns)
    if len(names) == 1:
        return names[0]
    if names:
        raise FormatError(f"this could be {' or '.join(names)} ({keys_of(record)}); say which with --format")
    tokens = any(plain(key) == "inputids" for key, _ in pairs_of(record))
    if tokens or (is_list(record) and record and isinstance(record[0], int)):
        raise FormatError("these are token ids; conversations must be text")
    raise NotRecognisedError(unknown_record([record]))


def unknown_record(records: Sequence[Any]) -> str:
    """Return the error for records in no known format: their keys, and the options that would explain them."""
    first = next((record for record in records if is_object(record)), records[0])
    if not is_object(first):
        return f"{kind(first)} is not a conversation; see the formats in docs/data.md"
    if not pairs_of(first):
        return "an object without keys is not a conversation; see the formats in docs/data.md"
    speaker, text = likely_columns(first, records)
    return (
        f"no known format has {keys_of(first)}; say what they hold, as in --columns speaker={speaker}"
        f" text={text} (or prompt=... reply=...; --format names reads every key as a speaker)"
    )


def likely_columns(first: Any, records: Sequence[Any]) -> tuple[str, str]:
    """Guess the keys of speaker and text: speakers are few and short, and texts are the longest values."""
    rows = [dict(pairs_of(record)) for record in records if is_object(record)]
    names = list(dict(pairs_of(first)))
    values = {name: [str(row.get(name) or "") for row in rows] for name in names}
    wordy = [name for name in names if any(map(str.isalpha, "".join(values[name])))]  # without numbers and times
    names = wordy if len(wordy) > 1 else names
    text = max(names, key=lambda name: sum(map(len, values[name])))
    others = [name for name in names if name != text] or names
    speaker = min(others, key=lambda name: (len(set(values[name])), sum(map(len, values[name]))))
    return quote(speaker), quote(text)


def quote(name: str) -> str:
    name = " ".join(printable(name[:40]).split())
    return f"'{name}'" if " " in name else name


def unused_keys(record: Any, form: str, columns: Columns = ()) -> list[str]:
    """Return the keys of a record and of its turns that its format does not use."""
    values = dict(pairs_of(record))
    keys = list(values)
    if form == "names":
        people = {name for name, _ in people_of(record)}
        return [key for key in keys if key not in people]
    if form == "alpaca":
        used = (find_key(values, words) for words in (INSTRUCTIONS, INPUTS, OUTPUTS, SYSTEM_PROMPTS, ("history",)))
    elif form == "pairs":
        used = (*(choose_pair(values, columns) or ()), find_key(values, SYSTEM_PROMPTS), find_key(values, ("history",)))
    elif form == "text":
        used = (transcript_key(record, columns),)
    else:
        return unused_turn_keys(record, columns)
    known = set(used)
    return [key for key in keys if key not in known and not plain(key).startswith("context0")]


def unused_turn_keys(record: Any, columns: Columns) -> list[str]:
    key, items, _ = turn_list(record, columns)
    values = dict(pairs_of(record))
    used = {key, find_key(values, SYSTEM_PROMPTS)} if not unfold(record) else set(values)
    inside: dict[str, None] = {}
    for turn in items[:PEEKED]:
        if is_object(turn):
            names = turn_keys(tuple(dict(pairs_of(turn))), columns)
            read = next((key for key in names.text if not is_nothing(dict(pairs_of(turn))[key])), None)
            known = {*names.speaker, read, *names.identity, *names.time, names.order, names.parent, names.weight}
            known |= {key for key in names.text if is_nothing(dict(pairs_of(turn))[key])}
            inside.update(
                (name, None) for name, _ in pairs_of(turn) if name not in known and plain(name) not in TURN_ASIDES
            )
    return [name for name in values if name not in used] + list(inside)
