"""How many characters of a file became turns, how many are known markup, and how many are neither."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

MOST_LOST = 0.1  # share of the characters that may be unaccounted for
MOST_SKIPPED = 0.5  # share of the turns
# Why turns are skipped whose talk is then incomplete. Notices, tool calls and the like are not talk.
LOSSES = (
    *("messages of more than text", "answers to messages of more than text", "questions without an answer"),
    *("turns that stand alone", "messages of other branches", "system messages inside a conversation"),
)
SHOWN = 3


def judge_turns(turns: int, skipped: Mapping[str, int]) -> str | None:
    """What is said of conversations of which too much is skipped; none where enough is read."""
    lost = {why: skipped[why] for why in LOSSES if skipped.get(why)}
    if sum(lost.values()) <= MOST_SKIPPED * (turns + sum(lost.values())):
        return None
    named = ", ".join(f"{count:,} {why}" for why, count in lost.items())
    return f"more is skipped than read ({named}; {turns:,} turns are left); read it all the same with --allow-loss"


@dataclass
class Account:
    """The characters of a file, by what became of them.

    Attributes:
        spoken: in turns.
        markup: stamps, names, notices, separators, other known fields.
        lost: neither.
        examples: the first lost lines or keys, with their places.
        as_text: what looks like a name at the beginning of a line but was read as text → how often.
    """

    spoken: int = 0
    markup: int = 0
    lost: int = 0
    examples: list[str] = field(default_factory=list)
    as_text: Counter[str] = field(default_factory=Counter)

    def lose(self, what: str, size: int) -> None:
        """Count `size` lost characters; `what` shows some of them, with their place."""
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
        """The account: lines to print."""
        if not self.total:
            return []
        told = [
            f"account: {self.spoken:,} characters in turns, {self.markup:,} of stamps, names and markup,"
            f" {self.lost:,} unaccounted for ({self.lost / self.total:.1%})"
        ]
        if self.lost:
            told.append(f"unaccounted for: {'; '.join(self.examples)}")
        if self.as_text:
            names = ", ".join(repr(name) for name, _ in self.as_text.most_common(SHOWN))
            count = sum(self.as_text.values())
            told.append(f"read as text: {count:,} lines that begin like a name ({names}), which nobody there has")
        return told
