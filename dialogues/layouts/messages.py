"""Cut messages into dialogues, and join them into turns."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from itertools import groupby, pairwise
from typing import NamedTuple

from dialogues.dialogue import Dialogue, Turn

PAUSE = timedelta(hours=8)
CLOCK_CHANGE = timedelta(hours=1)  # within a dialogue, clocks may be set back by this much
DAY = timedelta(days=1)


class Message(NamedTuple):
    """One message: a turn, or the reason to skip it; and its time, if the file has one.

    A `time` without a date is on the first day of the calendar, and such times start again every day. `context` is true
    if the file excludes the turn from learning.
    """

    turn: Turn | None
    skipped: str = ""
    time: datetime | None = None
    context: bool = False


def gather(messages: Sequence[Message], instruction: str) -> Dialogue:
    """Make one dialogue from messages."""
    said = [message for message in messages if message.turn]
    return Dialogue(
        tuple(message.turn for message in said if message.turn),
        instruction,
        tuple(message.skipped for message in messages if message.turn is None),
        tuple(place for place, message in enumerate(said) if message.context),
    )


def is_clock(time: datetime) -> bool:
    """Whether `time` has no date."""
    return time.year == 1


def cut(messages: Iterable[Message], pause: timedelta, instruction: str) -> Iterator[Dialogue]:
    """Yield the dialogues of messages in order, cut at pauses."""
    taken: list[Message] = []
    last: datetime | None = None
    for message in messages:
        if message.time and last and is_new(last, message.time, pause):
            yield gather(taken, instruction)
            taken = []
        last = message.time or last
        taken.append(message)
    if taken:
        yield gather(taken, instruction)


def join_turns(dialogue: Dialogue) -> Dialogue:
    """Join consecutive turns of one speaker, each message on its own line.

    Learned turns and context turns are not joined.
    """
    if not any(turn.speaker == following.speaker for turn, following in pairwise(dialogue.turns)):
        return dialogue
    unlearned = set(dialogue.context)
    marked = [(turn.speaker, place in unlearned, turn.text) for place, turn in enumerate(dialogue.turns)]
    groups = [(key, [text for *_, text in group]) for key, group in groupby(marked, key=lambda each: each[:2])]
    return dialogue._replace(
        turns=tuple(Turn(speaker, "\n".join(texts)) for (speaker, _), texts in groups),
        context=tuple(place for place, ((_, context), _) in enumerate(groups) if context),
    )


def is_new(last: datetime, time: datetime, pause: timedelta) -> bool:
    """Whether a message at `time` begins a new dialogue after a message at `last`."""
    if is_clock(last) and is_clock(time):
        return (time - last) % DAY >= pause
    return time - last >= pause or last - time > CLOCK_CHANGE


def without_numbers(names: set[str]) -> dict[str, str]:
    """Map Discord's names to names without numbers: `Nora#0001` → Nora, if there is only one Nora."""
    short = {name: re.sub(r"#\d{4}$", "", name) for name in names}
    counts = Counter(short.values())
    return {name: bare for name, bare in short.items() if bare != name and bare and counts[bare] == 1}
