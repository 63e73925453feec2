"""Read objects whose keys are the speakers, and decide whether keys can be people."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dialogues.dialogue import Dialogue
from dialogues.layouts.records import FormatError, Pairs, is_container, is_object, kind, make_turn, pairs_of, shorten
from dialogues.layouts.words import (
    INPUTS,
    INSTRUCTIONS,
    OTHER_KEYS,
    OUTPUTS,
    PAIRS,
    SPEAKER_KEYS,
    SYSTEM_PROMPTS,
    TEXT_KEYS,
    TURN_LISTS,
    has_sentences,
    plain,
)

FORM_WORDS = {
    *(*SPEAKER_KEYS, *TEXT_KEYS, *TURN_LISTS, *INPUTS, *OUTPUTS, *INSTRUCTIONS, *SYSTEM_PROMPTS, "chosen", "rejected"),
    *(word for pair in PAIRS for word in pair if word not in ("doctor", "patient", "customer", "agent", "q", "a")),
}


def from_names(record: Any, every_key: bool = False) -> Dialogue:
    """Read `{"Alex": "...", "Bob": "...", "Alex": "..."}`: the keys are the speakers, and may repeat.

    Keys with a known meaning are not speakers, unless `--format names` requests `every_key`.
    """
    if not is_object(record):
        raise FormatError(f'an object {{"speaker": "text", ...}} is needed; this is {kind(record)}')
    said = pairs_of(record) if every_key else people_of(record)
    if len(said) < 2:
        raise FormatError(f"a dialogue needs two turns or more; this has {len(said)}")
    return Dialogue(tuple(make_turn(*turn, f"turn {number}") for number, turn in enumerate(said, 1)))


def people_of(record: Any) -> list[tuple[str, Any]]:
    """Return the members of an object that are turns of named people.

    A key with a known meaning is not a person unless it occurs twice: then even `Server` is a speaker.
    """
    pairs = pairs_of(record)
    counts = Counter(name for name, _ in pairs) if isinstance(record, Pairs) else Counter()
    return [(name, text) for name, text in pairs if plain(name) not in OTHER_KEYS or counts[name] > 1]


def fits_names(record: Any) -> bool:
    """Whether an object has plain values under two or more keys that do not belong to a different format."""
    pairs = pairs_of(record)
    if not pairs or any(is_container(text) for _, text in pairs):
        return False
    people = people_of(record)
    if any(plain(name) in FORM_WORDS for name, _ in people) or len(people) < min(len(pairs), 2):
        return False
    return any(isinstance(text, str) for _, text in people)


def people_problem(records: Sequence[Any]) -> str | None:
    """Return the reason why the keys of records can't be people; None if they can.

    People speak in sentences. Lower-case keys that are the same in every record are columns.
    """
    values: dict[str, list[str]] = {}
    for record in records:
        for name, text in people_of(record):
            if isinstance(text, str):
                values.setdefault(name, []).append(text)
    for name, texts in values.items():
        if is_identifier(name):
            return f"{shorten(name)} looks like a column, not a speaker"
        if name.islower() and len(texts) > 2 and is_label_column(texts):
            return (
                f"the values of {shorten(name)} are labels"
                f" ({', '.join(shorten(text) for text in dict.fromkeys(texts[:3]))})"
            )
    for name in {name for record in records[:3] for name, _ in people_of(record)} - values.keys():
        if len(records) > 2:
            return f"the values of {shorten(name)} are not text"
    schemas = {tuple(name for name, _ in pairs_of(record)) for record in records}
    once = len(schemas) == 1 and not any(isinstance(record, Pairs) for record in records)
    lower = all(name.islower() for name in values)
    fields = len(records) > 1 and len(values) > 2 and not all(map(has_sentences, values.values()))
    if once and ((len(records) > 2 and lower) or fields):
        return f"all records have the same keys ({', '.join(map(shorten, values))}), like columns"
    return None


def is_identifier(name: str) -> bool:
    """Whether a key looks like an identifier: snake_case, camelCase, or a number."""
    bare = name.strip()
    return "_" in bare.strip("_") or bare.isdigit() or (bare[:1].islower() and any(map(str.isupper, bare[1:])))


def is_label_column(texts: Sequence[str]) -> bool:
    """Whether values are labels, ids or categories: few different short ones, or none with letters."""
    stripped = [text.strip() for text in texts if text.strip()]
    if not stripped:
        return False
    if all(not any(map(str.isalpha, text)) for text in stripped):
        return True
    short = all(len(text.split()) <= 2 and text[-1:] not in ".!?…" for text in stripped)
    return short and len(set(stripped)) <= max(1, 0.7 * len(stripped)) and all(text.islower() for text in stripped)
