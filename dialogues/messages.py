"""Messages with what a file says of them, put in order and cut into dialogues."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from dialogues.dialogue import INSTRUCTION, Dialogue, Turn

PAUSE = timedelta(hours=8)
CLOCK_CHANGE = timedelta(hours=1)  # time may run back by this much within a chat
DAY = timedelta(days=1)


class Message(NamedTuple):
    """One message: a turn, or the reason why there is none; and where in time and in which dialogue it belongs.

    A `time` without a date is a time of the first day of the calendar: it repeats every day.
    """

    turn: Turn | None
    skipped: str = ""
    time: datetime | None = None
    order: float | None = None
    identity: tuple[Any, ...] = ()
    starts: bool = False  # a dialogue, whatever the time says


def dialogues_of_messages(
    messages: Sequence[Message], pause: timedelta = PAUSE, instruction: str = INSTRUCTION
) -> Iterator[Dialogue]:
    """Put messages in order and cut them into dialogues.

    Messages of one identity belong together, wherever they stand. They are ordered by turn number, or else by time
    where most of it runs backwards or the identities give the dialogues. A new dialogue begins where nobody wrote for
    `pause`, where time runs backwards, and where a message says so.
    """
    groups: dict[tuple[Any, ...], list[Message]] = {}
    for message in messages:
        groups.setdefault(message.identity, []).append(message)
    if len(groups) == len(messages) > 1:  # the identity numbers the rows
        groups = {(): list(messages)}
    for group in groups.values():
        yield from cut(put_in_order(group), pause, instruction)


def put_in_order(messages: list[Message]) -> list[Message]:
    """The messages by turn number where all have one of their own, reversed where time runs backwards."""
    orders = [message.order for message in messages]
    if None not in orders and len(set(orders)) == len(orders):
        return sorted(messages, key=lambda message: message.order or 0)
    times = [message.time for message in messages if message.time]
    if len(times) < len(messages) or any(message.starts for message in messages) or is_clock(times[0]):
        return messages
    steps = [(later > earlier) - (later < earlier) for earlier, later in pairwise(times)]
    if sum(steps) < 0:
        messages = messages[::-1]
    return messages


def is_clock(time: datetime) -> bool:
    """Whether `time` has no date."""
    return time.year == 1


def cut(messages: Iterable[Message], pause: timedelta, instruction: str) -> Iterator[Dialogue]:
    """The dialogues of messages in order."""
    turns: list[Turn] = []
    skipped: list[str] = []
    last: datetime | None = None
    for turn, why, time, _, _, starts in messages:
        if (starts or (time and last and is_new(last, time, pause))) and (turns or skipped):
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
    """The dialogue with what one person writes in a row as one turn, its messages on lines of their own."""
    if not any(turn.speaker == following.speaker for turn, following in pairwise(dialogue.turns)):
        return dialogue
    groups = [list(group) for _, group in groupby(dialogue.turns, key=lambda turn: turn.speaker)]
    return dialogue._replace(
        turns=tuple(Turn(group[0].speaker, "\n".join(turn.text for turn in group)) for group in groups)
    )


def is_new(last: datetime, time: datetime, pause: timedelta) -> bool:
    """Whether a message at `time` begins another dialogue than the one before it."""
    if is_clock(last) and is_clock(time):
        return (time - last) % DAY >= pause
    return time - last >= pause or last - time > CLOCK_CHANGE


def alternate(texts: Sequence[str], speakers: Sequence[str]) -> list[tuple[str, str]]:
    """The texts of people who take turns."""
    return [(speakers[number % len(speakers)], text) for number, text in enumerate(texts)]


def blocks(lines: Iterable[Any], separates: Any) -> list[list[Any]]:
    """The runs of lines between those that separate."""
    return [list(block) for found, block in groupby(lines, key=lambda line: bool(separates(line))) if not found]
