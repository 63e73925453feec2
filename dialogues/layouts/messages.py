"""Messages in order, cut into dialogues."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from itertools import groupby, pairwise
from typing import NamedTuple

from dialogues.dialogue import Dialogue, Turn

PAUSE = timedelta(hours=8)
CLOCK_CHANGE = timedelta(hours=1)  # within a dialogue, time may run back by this much
DAY = timedelta(days=1)


class Message(NamedTuple):
    """One message: a turn, or the reason that it is none; and its time, if the file has one.

    A time of day without a date is a `time` on the first day of the calendar; it repeats every day.
    """

    turn: Turn | None
    skipped: str = ""
    time: datetime | None = None


def is_clock(time: datetime) -> bool:
    """Whether `time` has no date."""
    return time.year == 1


def cut(messages: Iterable[Message], pause: timedelta, instruction: str) -> Iterator[Dialogue]:
    """Cut messages in order into dialogues, at pauses of `pause` or more."""
    turns: list[Turn] = []
    skipped: list[str] = []
    last: datetime | None = None
    for turn, why, time in messages:
        if time and last and is_new(last, time, pause) and (turns or skipped):
            yield Dialogue(tuple(turns), instruction, tuple(skipped))
            turns, skipped = [], []
        last = time or last
        if turn is None:
            skipped.append(why)
        else:
            turns.append(turn)
    if turns or skipped:
        yield Dialogue(tuple(turns), instruction, tuple(skipped))


def join_turns(dialogue: Dialogue) -> Dialogue:
    """Join the turns that one person takes in a row, each message on a line of its own."""
    if not any(turn.speaker == following.speaker for turn, following in pairwise(dialogue.turns)):
        return dialogue
    groups = [list(group) for _, group in groupby(dialogue.turns, key=lambda turn: turn.speaker)]
    return dialogue._replace(
        turns=tuple(Turn(group[0].speaker, "\n".join(turn.text for turn in group)) for group in groups)
    )


def is_new(last: datetime, time: datetime, pause: timedelta) -> bool:
    """Whether a message at `time` begins a new dialogue, if the one before it came at `last`."""
    if is_clock(last) and is_clock(time):
        return (time - last) % DAY >= pause
    return time - last >= pause or last - time > CLOCK_CHANGE


def without_numbers(names: set[str]) -> dict[str, str]:
    """Discord's names without their numbers: `Nora#0001` → Nora, if there is only one Nora."""
    short = {name: re.sub(r"#\d{4}$", "", name) for name in names}
    counts = Counter(short.values())
    return {name: bare for name, bare in short.items() if bare != name and bare and counts[bare] == 1}
