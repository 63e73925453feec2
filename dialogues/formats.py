"""Conversations as JSON: a function for each form that a record can have, and the choice between them.

A record is what JSON holds for a conversation; a row of a table is one too. Objects are dicts, or `Pairs` where a key
occurs twice. A further form is two further functions and a line in `FORMATS`.
"""

import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from dialogues.dialogue import INSTRUCTION, Dialogue, Turn
from dialogues.messages import PAUSE
from dialogues.records import (
    FormatError,
    is_container,
    is_list,
    is_object,
    keys_of,
    kind,
    make_turn,
    once,
    pairs_of,
    shorten,
)
from dialogues.trees import unfold
from dialogues.turns import from_turns, holds_turns, kind_of_turn, turn_list
from dialogues.words import (
    ASSISTANT,
    INPUTS,
    INSTRUCTIONS,
    OTHER_KEYS,
    OUTPUTS,
    PAIRS,
    ROLES,
    SPEAKER_KEYS,
    SYSTEM_PROMPTS,
    TEXT_KEYS,
    TURN_LISTS,
    USER,
    Columns,
    find_key,
    is_nothing,
    plain,
    turn_keys,
)
from support.errors import printable

PEEKED = 100  # records that show what form a file has
TURN_ASIDES = frozenset(("toolcalls", "functioncall", "toolcallid"))
# A text that may be a whole dialogue: a second line or mark that says who speaks.
TRANSCRIPT = re.compile(r"\n|__eou__|\[/INST\]|<\||###|<start_of_turn>|ASSISTANT:|\[SEP\]")

# The published wording (Taori et al. 2023, "Stanford Alpaca").
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context."
    " Write a response that appropriately completes the request."
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ALPACA_SPEAKERS = ("Instruction", "Input", "Response")


def from_names(record: Any) -> Dialogue:
    """`{"Alex": "...", "Bob": "...", "Alex": "..."}`: the keys are the speakers in order, repeats kept."""
    if not is_object(record):
        raise FormatError(f'an object {{"speaker": "text", ...}} is needed, this is {kind(record)}')
    said = [turn for turn in pairs_of(record) if not is_aside(*turn)]
    if len(said) < 2:
        raise FormatError(f"a dialogue needs two turns or more, this has {len(said)}")
    return Dialogue(tuple(make_turn(*turn, f"turn {number}") for number, turn in enumerate(said, 1)))


def from_every_key(record: Any) -> Dialogue:
    """`from_names` where the user says so: every key is a speaker."""
    if not is_object(record):
        return from_names(record)
    said = pairs_of(record)
    if len(said) < 2:
        raise FormatError(f"a dialogue needs two turns or more, this has {len(said)}")
    return Dialogue(tuple(make_turn(*turn, f"turn {number}") for number, turn in enumerate(said, 1)))


def is_aside(key: str, value: Any) -> bool:
    """Whether a member of an object of names is none of its turns: its key is a word for something else."""
    return plain(key) in OTHER_KEYS


def from_alpaca(record: Any) -> Dialogue:
    """`{"instruction": ..., "input": ..., "output": ...}`, the input possibly empty or absent.

    `context` is another word for the input, `response` for the output. With `history`, `[[instruction, output], ...]`,
    earlier turns come first; a `system` prompt takes the place of Alpaca's line.
    """
    values = once(record)
    asked, answer = find_key(values, INSTRUCTIONS), find_key(values, OUTPUTS)
    if asked is None or answer is None:
        raise FormatError(f"instruction and output are needed, this has {keys_of(record)}")
    if talk := unfold_prompt(values[asked]):
        return make_answered([*talk, (ASSISTANT, values[answer])], INSTRUCTION)
    instruction, input, response = ALPACA_SPEAKERS
    said = read_history(values, (instruction, response))
    given = find_key(values, INPUTS)
    empty = is_nothing(values[asked]) and given is not None and not is_nothing(values[given])
    if empty:  # the input is the instruction
        asked, given = given or "", None
    said.append((instruction, values[asked]))
    if given and not is_nothing(values[given]):
        said.append((input, values[given]))
    said.append((response, values[answer]))
    line = system_prompt(values) or (ALPACA_WITH_INPUT if said[-2][0] == input else ALPACA)
    dialogue = make_answered(said, make_turn("system", line, "the system prompt").text)
    return dialogue._replace(skipped=(*dialogue.skipped, *["messages without text"] * empty))


def unfold_prompt(text: Any) -> list[tuple[str, Any]]:
    """The turns of a prompt that holds the talk so far, as `Human: ...`, and ends with the mark of the answer (BELLE)."""
    if not isinstance(text, str) or not text.rstrip().endswith(":"):
        return []
    pieces = re.split(r"(?:^|\n)\s*(Human|User|Assistant|AI|Bot|GPT)\s?:\s?", text.strip())
    roles = [ROLES.get(plain(role), role) for role in pieces[1::2]]
    if pieces[0].strip() or len(roles) < 2 or roles[-1] != ASSISTANT or pieces[-1].strip():
        return []
    return list(zip(roles[:-1], [piece.strip() for piece in pieces[2:-1:2]], strict=True))


def read_history(values: dict[str, Any], speakers: tuple[str, str]) -> list[tuple[str, Any]]:
    """The earlier turns of a record: `[[asked, answered], ...]` under `history`."""
    key = find_key(values, ("history", "chathistory"))
    earlier = (values[key] if key else None) or []
    if not is_list(earlier) or not all(is_list(pair) and len(pair) == 2 for pair in earlier):
        raise FormatError(f"history must be a list of [instruction, output], this is {kind(earlier)}")
    return [turn for pair in earlier for turn in zip(speakers, pair, strict=True)]


def system_prompt(values: dict[str, Any]) -> Any:
    key = find_key(values, SYSTEM_PROMPTS)
    return values[key] if key else None


def from_pairs(record: Any, columns: Columns = ()) -> Dialogue:
    """`{"prompt": ..., "completion": ...}`, `{"question": ..., "answer": ...}`, and other words for the two.

    The marks that GPT-3's fine-tuning wanted at the ends (`\\n\\n###\\n\\n`, ` END`) are left out.
    """
    values = once(record)
    pair = choose_pair(values, columns)
    if pair is None:
        raise FormatError(f"prompt and completion, or question and answer, are needed, this has {keys_of(record)}")
    asked, answered = (values.get(key) for key in pair)
    if isinstance(asked, str) and isinstance(answered, str):
        bare = asked.rstrip()
        for mark in ("###", "->", "===", "---"):
            if bare.endswith(("\n" + mark, " " + mark)):
                asked, answered = bare.removesuffix(mark), strip_end(answered)
    said = [*read_history(values, (USER, ASSISTANT)), *read_context(values), (USER, asked), (ASSISTANT, answered)]
    if said[-3:-2] and said[-3][0] == USER:  # the context ends with what is answered
        said = alternate_from_end(said)
    system = system_prompt(values)
    line = make_turn("system", system, "the system prompt").text if system else INSTRUCTION
    return make_answered(said, line)


def strip_end(answer: str) -> str:
    bare = answer.rstrip()
    for mark in ("END", "###", "<|endoftext|>"):
        bare = bare.removesuffix(mark) if bare.removesuffix(mark) != bare else bare
    return bare


def read_context(values: dict[str, Any]) -> list[tuple[str, Any]]:
    """What was said before `context`, where it is `context/0`, `context/1` and on, the latest first (DialoGPT)."""
    found = {plain(key): key for key in values}
    earlier = [values[found[f"context{number}"]] for number in range(100) if f"context{number}" in found]
    return [(USER, text) for text in reversed(earlier) if not is_nothing(text)]


def alternate_from_end(said: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The texts with the two speakers in turns, so that the last is the assistant's."""
    return [((USER, ASSISTANT)[(len(said) - number) % 2 == 1], text) for number, (_, text) in enumerate(said)]


def choose_pair(values: dict[str, Any], columns: Columns = ()) -> tuple[str, str] | None:
    """The keys of the first of `PAIRS` that is there and has an answer, or else of the first that is there."""
    asked = dict(columns)
    if "prompt" in asked or "reply" in asked:
        pair = asked.get("prompt", ""), asked.get("reply", "")
        return pair if set(pair) <= values.keys() else None
    found = {plain(key): key for key in reversed(values)}
    there = [(found[left], found[right]) for left, right in PAIRS if left in found and right in found]
    there = [
        pair for pair in there if all(values[key] is None or isinstance(values[key], str) for key in pair)
    ] or there
    return next((pair for pair in there if not is_nothing(values[pair[1]])), there[0] if there else None)


def as_alpaca(dialogue: Dialogue) -> Dialogue:
    """A question and its answer as an instruction and its response."""
    names = [ALPACA_SPEAKERS[0] if turn.speaker == USER else ALPACA_SPEAKERS[-1] for turn in dialogue.turns]
    turns = tuple(Turn(name, turn.text) for name, turn in zip(names, dialogue.turns, strict=True))
    return dialogue._replace(turns=turns, instruction=ALPACA)


def has_keys(record: Any, *needed: str) -> bool:
    return set(needed) <= {plain(key) for key, _ in pairs_of(record)}


def fits_alpaca(record: Any) -> bool:
    words = {plain(key) for key, _ in pairs_of(record)}
    return bool(words & set(INSTRUCTIONS)) and bool(words & set(OUTPUTS))


def fits_pairs(record: Any, columns: Columns = ()) -> bool:
    asked = dict(columns)
    if "prompt" in asked or "reply" in asked:
        return {asked.get("prompt"), asked.get("reply")} <= {key for key, _ in pairs_of(record)}
    if fits_alpaca(record):
        return False
    words: dict[str, Any] = {plain(key): value for key, value in reversed(pairs_of(record))}
    return any(
        left in words
        and right in words
        and all(words[word] is None or not is_container(words[word]) for word in (left, right))
        for left, right in PAIRS
    )


def fits_names(record: Any) -> bool:
    """An object of plain values under two or more keys that are no words of another form."""
    pairs = pairs_of(record)
    if not pairs or any(is_container(text) for _, text in pairs):
        return False
    people = [(name, text) for name, text in pairs if not is_aside(name, text)]
    if any(plain(name) in FORM_WORDS for name, _ in people) or len(people) < min(len(pairs), 2):
        return False
    return any(isinstance(text, str) for _, text in people)


FORM_WORDS = {
    *(*SPEAKER_KEYS, *TEXT_KEYS, *TURN_LISTS, *INPUTS, *OUTPUTS, *INSTRUCTIONS, *SYSTEM_PROMPTS, "chosen", "rejected"),
    *(word for pair in PAIRS for word in pair if word not in ("doctor", "patient", "customer", "agent", "q", "a")),
}


def people_problem(records: Sequence[Any]) -> str | None:
    """Why the keys of such records do not behave as people do; none where they do.

    People say prose, and not all records have the same few of them, or their names look like names.
    """
    values: dict[str, list[str]] = {}
    for record in records:
        for name, text in pairs_of(record):
            if not is_aside(name, text) and isinstance(text, str):
                values.setdefault(name, []).append(text)
    for name, texts in values.items():
        if re_identifier(name):
            return f"{shorten(name)} looks like a column, not like a speaker"
        if len(texts) > 2 and is_label_column(texts):
            return (
                f"what {shorten(name)} has are labels ({', '.join(shorten(text) for text in dict.fromkeys(texts[:3]))})"
            )
    schemas = {tuple(name for name, _ in pairs_of(record)) for record in records}
    same = len(schemas) == 1 and len(records) > 2
    if same and all(name.islower() for name in values) and len(set(next(iter(schemas)))) == len(next(iter(schemas))):
        return f"all records have the same keys ({', '.join(map(shorten, values))}), as columns do"
    return None


def re_identifier(name: str) -> bool:
    """Whether a key is written as programs write them: snake_case, camelCase, or a number."""
    bare = name.strip()
    return "_" in bare.strip("_") or bare.isdigit() or (bare[:1].islower() and any(map(str.isupper, bare[1:])))


def is_label_column(texts: Sequence[str]) -> bool:
    """Whether values are labels, ids or categories: short ones of which there are few, or no words at all."""
    stripped = [text.strip() for text in texts if text.strip()]
    if not stripped:
        return False
    if all(not any(map(str.isalpha, text)) for text in stripped):
        return True
    short = all(len(text.split()) <= 2 and text[-1:] not in ".!?…" for text in stripped)
    return short and len(set(stripped)) <= max(1, 0.7 * len(stripped)) and all(text.islower() for text in stripped)


def make_answered(said: Sequence[tuple[str, Any]], instruction: str) -> Dialogue:
    """The dialogue of these speakers and texts; without an answer at its end there is none, and all are skipped."""
    _, answer = said[-1]
    if isinstance(answer, str) and not answer.strip():
        return Dialogue((), skipped=("turns of records without an answer",) * len(said))
    return Dialogue(tuple(make_turn(*turn, f"turn {number}") for number, turn in enumerate(said, 1)), instruction)


class Options(NamedTuple):
    """How the user wants records to be read."""

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
    """Whether a list that nothing names is one conversation: of messages, or of objects with one name each."""
    kinds = [kind_of_turn(item, columns) for item in items[:3]]
    if "message" in kinds:
        return True
    if kinds and all(kind == "pair" for kind in kinds):
        return not isinstance(items[0][0], str)
    return len(kinds) > 1 and all(kind == "named" for kind in kinds)


def keys_of_turns(record: Any, columns: Columns = ()) -> set[str]:
    """The keys of a record's first turn that is an object."""
    if not has_turns(record, columns):
        return set()
    first = next((item for item in turn_list(record, columns)[1][:2] if is_object(item)), {})
    return {plain(key) for key, _ in pairs_of(first)}


def fits_messages(record: Any, columns: Columns = ()) -> bool:
    return {"role", "content"} <= keys_of_turns(record, columns)


def fits_sharegpt(record: Any, columns: Columns = ()) -> bool:
    return {"from", "value"} <= keys_of_turns(record, columns)


def fits_turns(record: Any, columns: Columns = ()) -> bool:
    others = fits_messages(record, columns) or fits_sharegpt(record, columns)
    return not others and has_turns(record, columns)


def fits_text(record: Any, columns: Columns = ()) -> bool:
    return transcript_key(record, columns) is not None


def transcript_key(record: Any, columns: Columns = ()) -> str | None:
    """The key under which a record holds a whole dialogue as one text."""
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
    "names": Format(lambda record, _: fits_names(record), lambda record, _: [from_names(record)]),
    "turns": Format(fits_turns, convert_messages),
    "messages": Format(fits_messages, convert_messages),
    "sharegpt": Format(fits_sharegpt, convert_messages),
    "alpaca": Format(lambda record, _: fits_alpaca(record), lambda record, _: [from_alpaca(record)]),
    "pairs": Format(fits_pairs, lambda record, options: [from_pairs(record, options.columns)]),
}


def fitting(record: Any, columns: Columns = ()) -> list[str]:
    """The names of the forms that `record` could have."""
    names = [name for name, form in FORMATS.items() if form.fits(record, columns)]
    if len(names) > 1 and "turns" in names and plain(turn_list(record, columns)[0]) in ("history", "chosen", "text"):
        names.remove("turns")  # a part of the pair
    return names or (["text"] if fits_text(record, columns) else [])


def recognise(record: Any, columns: Columns = ()) -> str:
    """The name of the one form that `record` has.

    Raises:
        FormatError: none, or more than one.
    """
    names = fitting(record, columns)
    if len(names) == 1:
        return names[0]
    if names:
        raise FormatError(f"this could be {' or '.join(names)} ({keys_of(record)}); say which with --format")
    if has_keys(record, "inputids") or (is_list(record) and record and isinstance(record[0], int)):
        raise FormatError("these are token ids; conversations are needed as text")
    raise FormatError(unknown_record([record]))


def unknown_record(records: Sequence[Any]) -> str:
    """What is said of records of no known form: their keys, and the option that names them."""
    first = next((record for record in records if is_object(record)), records[0])
    if not is_object(first):
        return f"{kind(first)} is no conversation; see the formats in docs/data.md"
    if not pairs_of(first):
        return "no known form of a conversation has no keys; see the formats in docs/data.md"
    speaker, text = likely_columns(first, records)
    return (
        f"no known form of a conversation has {keys_of(first)}; say what they hold, as in --columns speaker={speaker}"
        f" text={text} (or prompt=... reply=...; --format names takes every key as a speaker's name)"
    )


def likely_columns(first: Any, records: Sequence[Any]) -> tuple[str, str]:
    """The keys that most probably hold speaker and text: few short values that recur, and the longest ones."""
    rows = [dict(pairs_of(record)) for record in records if is_object(record)]
    names = list(dict(pairs_of(first)))
    values = {name: [str(row.get(name) or "") for row in rows] for name in names}
    text = max(names, key=lambda name: sum(map(len, values[name])))
    others = [name for name in names if name != text] or names
    speaker = min(others, key=lambda name: (len(set(values[name])), sum(map(len, values[name]))))
    return quote(speaker), quote(text)


def quote(name: str) -> str:
    name = printable(name[:40])
    return f"'{name}'" if " " in name else name


def unused_keys(record: Any, form: str, columns: Columns = ()) -> list[str]:
    """The keys of a record, and of its turns, that its form has no use for."""
    keys = list(dict(pairs_of(record)))
    values = dict(pairs_of(record))
    if form == "names":
        return [key for key, value in pairs_of(record) if is_aside(key, value)]
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
            known = {*names.speaker, *names.text, *names.identity, *names.time, names.order, names.parent, names.weight}
            inside.update(
                (name, None) for name, _ in pairs_of(turn) if name not in known and plain(name) not in TURN_ASIDES
            )
    return [name for name in values if name not in used] + list(inside)
