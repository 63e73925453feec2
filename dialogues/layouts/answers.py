"""Questions and answers: instruction data, and prompts with completions, with the keys of many datasets."""

import re
from collections.abc import Sequence
from typing import Any

from dialogues.dialogue import ALPACA, ALPACA_SPEAKERS, ALPACA_WITH_INPUT, INSTRUCTION, Dialogue, Turn
from dialogues.layouts.fields import system_prompt
from dialogues.layouts.records import FormatError, is_container, is_list, keys_of, kind, make_turn, once, pairs_of
from dialogues.layouts.words import (
    ASSISTANT,
    INPUTS,
    INSTRUCTIONS,
    OUTPUTS,
    PAIRS,
    ROLES,
    USER,
    Columns,
    find_key,
    is_nothing,
    plain,
)


def from_alpaca(record: Any) -> Dialogue:
    """Read `{"instruction": ..., "input": ..., "output": ...}`; the input may be empty or absent.

    `context` is a synonym for the input, and `response` for the output. Earlier turns in `history`, `[[instruction,
    output], ...]`, come first. A `system` prompt replaces Alpaca's instruction line.
    """
    values = once(record)
    asked, answer = find_key(values, INSTRUCTIONS), find_key(values, OUTPUTS)
    if asked is None or answer is None:
        raise FormatError(f"instruction and output are needed; this has {keys_of(record)}")
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
    dialogue = make_answered(said, line)
    return dialogue._replace(skipped=(*dialogue.skipped, *["messages without text"] * empty))


def unfold_prompt(text: Any) -> list[tuple[str, Any]]:
    """Return the turns of a prompt that holds a dialogue as `Human: ...` and ends in `Assistant:` (BELLE, hh-rlhf)."""
    if not isinstance(text, str) or not text.rstrip().endswith(":"):
        return []
    pieces = re.split(r"(?:^|\n)\s*(Human|User|Assistant|AI|Bot|GPT)\s?:\s?", text.strip())
    roles = [ROLES.get(plain(role), role) for role in pieces[1::2]]
    if pieces[0].strip() or len(roles) < 2 or roles[-1] != ASSISTANT or pieces[-1].strip():
        return []
    return list(zip(roles[:-1], [piece.strip() for piece in pieces[2:-1:2]], strict=True))


def read_history(values: dict[str, Any], speakers: tuple[str, str]) -> list[tuple[str, Any]]:
    """Return the earlier turns of a record: `[[asked, answered], ...]` under `history`."""
    key = find_key(values, ("history", "chathistory"))
    earlier = (values[key] if key else None) or []
    if not is_list(earlier) or not all(is_list(pair) and len(pair) == 2 for pair in earlier):
        raise FormatError(f"history must be a list of pairs [instruction, output]; this is {kind(earlier)}")
    return [turn for pair in earlier for turn in zip(speakers, pair, strict=True)]


def from_pairs(record: Any, columns: Columns = ()) -> Dialogue:
    """Read `{"prompt": ..., "completion": ...}`, `{"question": ..., "answer": ...}`, or the same under other keys.

    The separators of GPT-3's fine-tuning data (`\\n\\n###\\n\\n`, ` END`) are removed.
    """
    values = once(record)
    pair = choose_pair(values, columns)
    if pair is None:
        raise FormatError(f"prompt and completion, or question and answer, are needed; this has {keys_of(record)}")
    asked, answered = (values.get(key) for key in pair)
    if talk := unfold_prompt(asked):
        return make_answered([*talk, (ASSISTANT, answered)], system_prompt(values) or INSTRUCTION)
    if isinstance(asked, str) and isinstance(answered, str):
        bare = asked.rstrip()
        for mark in ("###", "->", "===", "---"):
            if bare.endswith(("\n" + mark, " " + mark)):
                asked, answered = bare.removesuffix(mark), strip_end(answered)
    said = [*read_history(values, (USER, ASSISTANT)), *read_context(values), (USER, asked), (ASSISTANT, answered)]
    if said[-3:-2] and said[-3][0] == USER:  # the context is a dialogue that ends in the question
        said = alternate_from_end(said)
    return make_answered(said, system_prompt(values) or INSTRUCTION)


def strip_end(answer: str) -> str:
    bare = answer.rstrip()
    for mark in ("END", "###", "<|endoftext|>"):
        bare = bare.removesuffix(mark)
    return bare


def read_context(values: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the turns before `context`, oldest first; `context/0` is the latest, then `context/1` (DialoGPT)."""
    found = {plain(key): key for key in values}
    earlier = [values[found[f"context{number}"]] for number in range(100) if f"context{number}" in found]
    return [(USER, text) for text in reversed(earlier) if not is_nothing(text)]


def alternate_from_end(said: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Assign the texts to two alternating speakers so that the last one is the assistant's."""
    return [((USER, ASSISTANT)[(len(said) - number) % 2 == 1], text) for number, (_, text) in enumerate(said)]


def choose_pair(values: dict[str, Any], columns: Columns = ()) -> tuple[str, str] | None:
    """Return the keys of the first of `PAIRS` that has an answer here, or else of the first that occurs."""
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
    """Turn a question and its answer into an instruction and its response."""
    names = [ALPACA_SPEAKERS[0] if turn.speaker == USER else ALPACA_SPEAKERS[-1] for turn in dialogue.turns]
    turns = tuple(Turn(name, turn.text) for name, turn in zip(names, dialogue.turns, strict=True))
    return dialogue._replace(turns=turns, instruction=ALPACA)


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


def make_answered(said: Sequence[tuple[str, Any]], instruction: str) -> Dialogue:
    """Return the dialogue of these speakers and texts; if the last text is empty, skip all turns."""
    _, answer = said[-1]
    if isinstance(answer, str) and not answer.strip():
        return Dialogue((), skipped=("turns of records without an answer",) * len(said))
    return Dialogue(tuple(make_turn(*turn, f"turn {number}") for number, turn in enumerate(said, 1)), instruction)
