"""A conversation between people."""

from typing import NamedTuple

INSTRUCTION = "The following is a conversation between two people."


class Turn(NamedTuple):
    """What one speaker says before another speaks."""

    speaker: str
    text: str

    def __str__(self) -> str:
        return f"{self.speaker}: {self.text}"


class Dialogue(NamedTuple):
    """Turns in the order they were spoken; the same speaker may come twice in a row."""

    turns: tuple[Turn, ...]
    instruction: str = INSTRUCTION  # the line before the first turn; empty for none
    skipped: tuple[str, ...] = ()  # why, for each turn of the file that is not among `turns`
    context: tuple[int, ...] = ()  # turns, by number from 0, that are not learned
