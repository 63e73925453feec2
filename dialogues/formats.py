"""Conversations as JSON: one small pure function for each form a record can have, and the choice between them.

A further form is a further function from a record to a `Dialogue`, and a line in `FORMATS`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeGuard

from dialogues.dialogue import INSTRUCTION, Dialogue, Turn

TURN_LISTS = ("messages", "conversations", "conversation", "turns", "dialog", "dialogue", "utterances")
SPEAKER_KEYS = ("speaker", "sender", "author", "role", "from")
ROLE_KEYS = ("role", "from")  # what stands here may be user, assistant, system or tool
TEXT_KEYS = ("text", "message", "content", "utterance", "value")
PAIRS = (("prompt", "completion"), ("question", "answer"), ("prompt", "response"), ("question", "response"))
INPUTS, OUTPUTS = ("input", "context"), ("output", "response")
USER, ASSISTANT = "User", "Assistant"
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), USER),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "model"), ASSISTANT),
}
SYSTEM = ("system", "developer")
TOOLS = ("tool", "function", "function_call", "function_response", "observation")
NO_NAMES = {
    *(*TEXT_KEYS, *SPEAKER_KEYS, *TURN_LISTS, "instruction", "input", "output", "prompt", "completion", "response"),
    *("question", "answer", "id", "label", "title", "summary", "body", "url", "source", "date", "category", "msg"),
    *("timestamp", "time", "username", "channel", "context", "lang", "language", "score", "tags", "type"),
}
LONGEST_NAME = 200  # characters; what is longer is no name
NO_TEXT = object()

# The published wording (Taori et al. 2023, "Stanford Alpaca").
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context."
    " Write a response that appropriately completes the request."
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ALPACA_SPEAKERS = ("Instruction", "Input", "Response")


class Pairs(list[tuple[str, Any]]):
    """A JSON object as its key-value pairs in order, so that a key that stands twice is there twice."""


class FormatError(ValueError):
    """What is wrong with a record, as the end of a sentence that began with its place."""


class NotRecognisedError(FormatError):
    """What begins a file is in no known form: it may hold something else than conversations."""


class Format(NamedTuple):
    fits: Callable[[Any], bool]
    convert: Callable[[Any], Dialogue]


def from_names(record: Any) -> Dialogue:
    """`{"Alex": "...", "Bob": "...", "Alex": "..."}`: the keys are the speakers in order, repeats kept."""
    if not isinstance(record, Pairs):
        raise FormatError(f'an object {{"speaker": "text", ...}} is needed, this is {kind(record)}')
    if len(record) < 2:
        raise FormatError(f"a dialogue needs two turns or more, this has {len(record)}")
    return Dialogue(tuple(make_turn(*turn, f"turn {number}") for number, turn in enumerate(record, 1)))


def from_turn_list(
    record: Any, speaker_keys: Sequence[str] = SPEAKER_KEYS, text_keys: Sequence[str] = TEXT_KEYS
) -> Dialogue:
    """A list of turns, each an object with a speaker and a text: the forms `turns`, `messages` and `sharegpt`.

    A system message at the beginning, or a system prompt beside the list, becomes the instruction (an empty one: none).
    Tool calls and messages without text are left out and counted. The roles user and assistant, and their synonyms, are
    User and Assistant; every other role, and whatever stands under `speaker`, is a name.
    """
    turns, skipped, instruction = [], [], []
    if has_keys(record, "system") and (system := dict(record)["system"]) is not None:
        instruction.append(make_turn("system", system, "the system prompt").text if system else "")
    for number, item in enumerate(turn_list(record), 1):
        if not isinstance(item, Pairs):
            raise FormatError(f"turn {number} must be an object with speaker and text, this is {kind(item)}")
        values = dict(item)
        speaker_key, text_key = first_key(values, speaker_keys), first_key(values, text_keys)
        speaker, text = values.get(speaker_key or ""), join_parts(values.get(text_key or ""))
        if not isinstance(speaker, str):
            raise FormatError(f"turn {number} has no speaker ({', '.join(SPEAKER_KEYS)})")
        role = speaker.strip().lower() if speaker_key in ROLE_KEYS else ""
        if role in TOOLS or values.get("tool_calls") or values.get("function_call"):
            skipped.append("tool calls")
        elif text is NO_TEXT:
            skipped.append("messages of more than text")
        elif role in SYSTEM and not turns:
            instruction.append(make_turn(speaker, text, "the system message").text if text else "")
        elif role in SYSTEM:
            skipped.append("system messages inside a conversation")
        elif text is None or text == "":
            skipped.append("messages without text")
        else:
            turns.append(make_turn(ROLES.get(role, speaker), text, f"turn {number}"))
    if turns and {turn.speaker for turn in turns} == {USER}:
        if not skipped:
            raise FormatError("only the user speaks here; the answers are needed too")
        skipped += ["questions without an answer"] * len(turns)
        turns = []
    return Dialogue(tuple(turns), "\n".join(instruction) if instruction else INSTRUCTION, tuple(skipped))


def from_messages(record: Any) -> Dialogue:
    return from_turn_list(record, ("role", *SPEAKER_KEYS), ("content", *TEXT_KEYS))


def from_sharegpt(record: Any) -> Dialogue:
    return from_turn_list(record, ("from", *SPEAKER_KEYS), ("value", *TEXT_KEYS))


def from_alpaca(record: Any) -> Dialogue:
    """`{"instruction": ..., "input": ..., "output": ...}`, the input possibly empty or absent.

    `context` is another word for the input, `response` for the output. With `history`, `[[instruction, output], ...]`,
    earlier turns come first; a `system` prompt takes the place of Alpaca's line.
    """
    values = dict(record) if isinstance(record, Pairs) else {}
    if "instruction" not in values or not values.keys() & {"output", "response"}:
        raise FormatError(f"instruction and output are needed, this has {keys_of(record)}")
    earlier = values.get("history") or []
    if not is_list(earlier) or not all(is_list(pair) and len(pair) == 2 for pair in earlier):
        raise FormatError(f"history must be a list of [instruction, output], this is {kind(earlier)}")
    instruction, input, response = ALPACA_SPEAKERS
    said: list[tuple[str, Any]] = []
    for asked, answered in earlier:
        said += [(instruction, asked), (response, answered)]
    said.append((instruction, values["instruction"]))
    given, answer = first_key(values, INPUTS), first_key(values, OUTPUTS)
    if given and not is_nothing(values[given]):
        said.append((input, values[given]))
    said.append((response, values[answer or OUTPUTS[0]]))
    line = values.get("system") or (ALPACA_WITH_INPUT if said[-2][0] == input else ALPACA)
    return make_answered(said, make_turn("system", line, "the system prompt").text)


def from_pairs(record: Any) -> Dialogue:
    """`{"prompt": ..., "completion": ...}` or `{"question": ..., "answer": ...}`."""
    values = dict(record) if isinstance(record, Pairs) else {}
    pair = choose_pair(values)
    if pair is None:
        raise FormatError(f"prompt and completion, or question and answer, are needed, this has {keys_of(record)}")
    asked, answered = pair
    return make_answered([(USER, values[asked]), (ASSISTANT, values[answered])], INSTRUCTION)


def choose_pair(values: dict[str, Any]) -> tuple[str, str] | None:
    """The first of `PAIRS` that is there and has an answer, or else the first that is there."""
    there = [pair for pair in PAIRS if set(pair) <= values.keys()]
    return next((pair for pair in there if not is_nothing(values[pair[1]])), there[0] if there else None)


def as_alpaca(dialogue: Dialogue) -> Dialogue:
    """A question and its answer as an instruction and its response."""
    names = (ALPACA_SPEAKERS[0], ALPACA_SPEAKERS[-1]) if dialogue.turns else ()
    turns = tuple(Turn(name, turn.text) for name, turn in zip(names, dialogue.turns, strict=True))
    return dialogue._replace(turns=turns, instruction=ALPACA)


def turn_list(record: Any) -> list[Any]:
    """The list of turns that a record is, or holds under one of `TURN_LISTS`.

    Raises:
        FormatError: it holds none, or several.
    """
    if is_list(record):
        return record
    lists = [value for key, value in record if key in TURN_LISTS and is_list(value)] if has_keys(record) else []
    if len(lists) != 1:
        raise FormatError(f"one list of turns is needed ({', '.join(TURN_LISTS)}), this has {keys_of(record)}")
    return lists[0]


def first_key(values: dict[str, Any], keys: Iterable[str]) -> str | None:
    """The first of `keys` that is there and holds something, or else the first that is there."""
    there = [key for key in keys if key in values]
    return next((key for key in there if not is_nothing(values[key])), there[0] if there else None)


def is_nothing(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def has_turns(record: Any, speaker_keys: Iterable[str], text_keys: Iterable[str]) -> bool:
    """Whether `record` holds a list of turns, the first of which has one of these keys for both."""
    try:
        items = turn_list(record)
    except FormatError:
        return False
    keys = {key for key, _ in items[0]} if items and isinstance(items[0], Pairs) else set()
    return bool(keys & set(speaker_keys)) and bool(keys & {*text_keys, "tool_calls"})


def has_keys(record: Any, *needed: str) -> bool:
    return isinstance(record, Pairs) and set(needed) <= {key for key, _ in record}


def is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and not isinstance(value, Pairs)


def fits_messages(record: Any) -> bool:
    return has_turns(record, ["role"], ["content"])


def fits_sharegpt(record: Any) -> bool:
    return has_turns(record, ["from"], ["value"])


def fits_turns(record: Any) -> bool:
    others = fits_messages(record) or fits_sharegpt(record)
    return not others and has_turns(record, SPEAKER_KEYS, TEXT_KEYS)


def fits_alpaca(record: Any) -> bool:
    return has_keys(record, "instruction", "output") or has_keys(record, "instruction", "response")


def fits_pairs(record: Any) -> bool:
    return any(has_keys(record, *pair) for pair in PAIRS)


def fits_names(record: Any) -> bool:
    """An object of plain values under keys that are no words of another form."""
    pairs = record if isinstance(record, Pairs) else []
    others = any(is_list(text) or name.strip().lower() in NO_NAMES for name, text in pairs)
    return not others and any(isinstance(text, str) for _, text in pairs)


FORMATS = {
    "names": Format(fits_names, from_names),
    "turns": Format(fits_turns, from_turn_list),
    "messages": Format(fits_messages, from_messages),
    "sharegpt": Format(fits_sharegpt, from_sharegpt),
    "alpaca": Format(fits_alpaca, from_alpaca),
    "pairs": Format(fits_pairs, from_pairs),
}


def fitting(record: Any) -> list[str]:
    """The names of the forms that `record` could have."""
    return [name for name, form in FORMATS.items() if form.fits(record)]


def recognise(record: Any) -> str:
    """The name of the one form that `record` has.

    Raises:
        FormatError: none, or more than one.
    """
    names = fitting(record)
    if len(names) == 1:
        return names[0]
    if names:
        raise FormatError(f"this could be {' or '.join(names)} ({keys_of(record)}); say which with --format")
    if has_keys(record, "input_ids") or (is_list(record) and record and isinstance(record[0], int)):
        raise FormatError("these are token ids; conversations are needed as text")
    if isinstance(record, Pairs):
        raise NotRecognisedError(
            f"no known form of a conversation has {keys_of(record)}; see the formats in README.md"
            " (--format names takes every key as a speaker's name)"
        )
    raise NotRecognisedError(f"{kind(record)} is no conversation; see the formats in README.md")


def unused_keys(record: Any, form: str) -> list[str]:
    """The keys of a record, and of its turns, that its form has no use for."""
    keys = [key for key, _ in record] if isinstance(record, Pairs) else []
    values = dict(record) if isinstance(record, Pairs) else {}
    used = {
        "names": keys,
        "alpaca": ("instruction", "history", "system", first_key(values, INPUTS), first_key(values, OUTPUTS)),
        "pairs": choose_pair(values) or (),
    }
    if form in used:
        return [key for key in keys if key not in used[form]]
    known = (*SPEAKER_KEYS, *TEXT_KEYS, "tool_calls", "function_call", "tool_call_id")
    inside = [key for turn in turn_list(record) if isinstance(turn, Pairs) for key, _ in turn if key not in known]
    return [key for key in keys if key not in (*TURN_LISTS, "system")] + list(dict.fromkeys(inside))


def join_parts(content: Any) -> Any:
    """A message's content, stripped; a list of parts becomes their text, or `NO_TEXT` where one is an image."""
    if not is_list(content):
        return content.strip() if isinstance(content, str) else content
    parts = [dict(part).get("text") if isinstance(part, Pairs) else part for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    return "\n".join(texts).strip() if len(texts) == len(parts) else NO_TEXT


def make_turn(speaker: str, text: Any, where: str) -> Turn:
    """A checked turn, name and text stripped at both ends."""
    if not isinstance(text, str):
        raise FormatError(f"{where}: what {shorten(speaker)} says must be text, this is {kind(text)}")
    turn = Turn(speaker.strip(), text.strip())
    if not turn.text:
        raise FormatError(f"{where}: {shorten(speaker)} says nothing; remove the turn or fill it")
    if not turn.speaker or len(turn.speaker.splitlines()) != 1 or len(turn.speaker) > LONGEST_NAME:
        raise FormatError(f"{where}: {shorten(speaker)} is no speaker's name; use a name on one line")
    try:
        (turn.speaker + turn.text).encode()
    except UnicodeEncodeError:
        raise FormatError(f"{where}: half a surrogate pair stands in it (as in \\ud83d); save the text anew") from None
    return turn


def shorten(name: str) -> str:
    return repr(name if len(name) <= 40 else name[:40] + "…")


def make_answered(said: Sequence[tuple[str, Any]], instruction: str) -> Dialogue:
    """The dialogue of these speakers and texts; without an answer at its end there is none, and all are skipped."""
    _, answer = said[-1]
    if isinstance(answer, str) and not answer.strip():
        return Dialogue((), skipped=("turns of records without an answer",) * len(said))
    return Dialogue(tuple(make_turn(*turn, f"turn {number}") for number, turn in enumerate(said, 1)), instruction)


def keys_of(record: Any) -> str:
    """The keys of an object, the first few, for messages."""
    if not isinstance(record, Pairs):
        return kind(record)
    keys = [repr(key[:40]) for key, _ in record]
    return f"the keys {', '.join(keys[:8])}{', …' if len(keys) > 8 else ''}" if keys else "no keys"


def kind(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    if isinstance(value, Pairs):
        return "an object"
    if isinstance(value, bool):
        return "true or false"
    return {list: "a list", str: "text", int: "a number", float: "a number"}.get(type(value), "null")
