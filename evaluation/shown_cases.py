"""The cases of an evaluation in the layout of the page: speech bubbles, with copied spans marked."""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from evaluation.run_files import RunFiles, number, objects, sequence
from support.files import Json

MOST_CASES = 100  # maximum number of cases on a page


class Piece(NamedTuple):
    """A part of a turn's text, and whether the part was copied."""

    text: str
    copied: bool


class Bubble(NamedTuple):
    speaker: str
    place: int
    """the speaker's number in this case, from 0; -1 without a name"""
    pieces: list[Piece]


class Case(NamedTuple):
    number: int
    place: int | None
    """number among the dialogues that were read, from 1"""
    asked: list[Bubble]
    true: list[Bubble]
    written: list[Bubble]
    base: list[Bubble]


@dataclass(frozen=True)
class Cases:
    """The cases on a page.

    Attributes:
        all: number of cases in the folder.
        copied: whether copied spans were searched for.
    """

    shown: list[Case]
    all: int
    copied: bool


def read_cases(run: RunFiles) -> Cases:
    """The cases to show, from evaluation.json or, if it has none, from generated_conversations.json."""
    cases = objects(run.evaluation.get("cases"))
    if not cases:
        speakers = [name for name in sequence(run.dialogue.get("speakers")) if isinstance(name, str)]
        cases = [{name: split_turns(text, speakers) for name, text in case.items()} for case in objects(run.generated)]
    shown = [make_case(place, case) for place, case in enumerate(cases[:MOST_CASES], start=1)]
    copied = any("copied" in turn for case in cases for turn in objects(case.get("model_response")))
    return Cases(shown, len(cases), copied)


def split_turns(text: Any, speakers: list[str]) -> list[dict[str, str]]:
    """Split `Alex: ... Bob: ...`, the format of generated_conversations.json; a text without names is one turn."""
    text = text if isinstance(text, str) else ""
    names = "|".join(map(re.escape, sorted(speakers, key=len, reverse=True)))
    parts = re.split(rf"(?:^|(?<= ))({names}): ", text) if names else [text]
    if len(parts) < 3 or parts[0]:
        return [{"speaker": "", "text": text}] if text else []
    return [{"speaker": who, "text": said.rstrip(" ")} for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def make_case(count: int, case: Json) -> Case:
    """A case with its speakers numbered in the order of their first turns."""
    names = ("input", "response", "model_response", "base_response")
    turns = [objects(case.get(name)) for name in names]
    speakers = dict.fromkeys(speaker_of(turn) for part in turns for turn in part if speaker_of(turn))
    places = {name: place for place, name in enumerate(speakers)}
    asked, true, written, base = ([make_bubble(turn, places) for turn in part] for part in turns)
    place = number(case.get("place"))
    return Case(count, None if place is None else int(place), asked, true, written, base)


def speaker_of(turn: Json) -> str:
    return text_of(turn, "speaker")


def text_of(turn: Json, name: str) -> str:
    """The value of `name` if it is a string, else an empty string."""
    value = turn.get(name)
    return value if isinstance(value, str) else ""


def make_bubble(turn: Json, places: dict[str, int]) -> Bubble:
    who = speaker_of(turn)
    return Bubble(who, places.get(who, -1), split_copied(text_of(turn, "text"), turn.get("copied")))


def split_copied(text: str, spans: Any) -> list[Piece]:
    """`text` in pieces, cut where copied spans begin and end; overlapping spans are merged, invalid ones ignored."""
    marked = [False] * len(text)
    for span in sequence(spans):
        ends = [number(end) for end in sequence(span)]
        if len(ends) == 2 and ends[0] is not None and ends[1] is not None:
            start = max(0, int(ends[0]))
            end = max(start, min(len(text), int(ends[1])))
            marked[start:end] = [True] * (end - start)
    pieces: list[Piece] = []
    start = 0
    for end in range(1, len(text) + 1):
        if end == len(text) or marked[end] != marked[start]:
            pieces.append(Piece(text[start:end], marked[start]))
            start = end
    return pieces
