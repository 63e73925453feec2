"""Count the characters of a file by use: turns, known markup, or neither."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from support.errors import amount

MOST_LOST = 0.1  # maximum fraction of characters that may be unaccounted for
MOST_SKIPPED = 0.5  # maximum fraction of turns that may be skipped for a reason in LOSSES
# Reasons that leave a conversation incomplete, unlike skipped notices or tool calls.
LOSSES = (
    *("multimodal messages", "answers to multimodal messages", "questions without an answer"),
    *("single turns", "messages of other branches", "system messages inside a conversation"),
)
SHOWN = 3  # number of examples to print


def judge_turns(turns: int, skipped: Mapping[str, int]) -> str | None:
    """Return an error if too many turns are skipped, else None."""
    lost = {why: skipped[why] for why in LOSSES if skipped.get(why)}
    if sum(lost.values()) <= MOST_SKIPPED * (turns + sum(lost.values())):
        return None
    named = ", ".join(f"{count:,} {why}" for why, count in lost.items())
    return f"more turns are skipped than read ({named}; {turns:,} turns are left); to read it anyway, use --allow-loss"


@dataclass
class Account:
    """The number of characters of a file, by use.

    Attributes:
        spoken: characters in turns.
        markup: characters in timestamps, names, notices, separators and other known fields.
        lost: all other characters.
        examples: the first lost lines or keys, with their locations.
        as_text: words that begin a line like a name but were read as text → number of occurrences.
    """

    spoken: int = 0
    markup: int = 0
    lost: int = 0
    examples: list[str] = field(default_factory=list)
    as_text: Counter[str] = field(default_factory=Counter)

    def lose(self, what: str, size: int) -> None:
        """Count `size` lost characters; `what` is an excerpt with its location."""
        self.lost += size
        if len(self.examples) < SHOWN:
            self.examples.append(what)

    @property
    def total(self) -> int:
        return self.spoken + self.markup + self.lost

    @property
    def lost_share(self) -> float:
        return self.lost / (self.spoken + self.lost) if self.lost else 0.0

    def lines(self) -> list[str]:
        """Return a summary as lines to print."""
        if not self.total:
            return []
        told = [
            f"account: {self.spoken:,} characters in turns, {self.markup:,} in timestamps, names and markup,"
            f" {self.lost:,} unaccounted for ({self.lost / self.total:.1%})"
        ]
        if self.lost:
            told.append(f"unaccounted for: {'; '.join(self.examples)}")
        if self.as_text:
            names = ", ".join(repr(name) for name, _ in self.as_text.most_common(SHOWN))
            lines = amount(sum(self.as_text.values()), "line")
            told.append(f"read as text: {lines} like `Name: text`, but no speaker has that name ({names})")
        return told
