"""A conversation between people."""

from typing import NamedTuple

INSTRUCTION = "The following is a conversation between two people."
# The published wording for instruction data (Taori et al. 2023, "Stanford Alpaca").
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context."
    " Write a response that appropriately completes the request."
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ALPACA_SPEAKERS = ("Instruction", "Input", "Response")


class Turn(NamedTuple):
    """A speaker, and the text of one uninterrupted turn."""

    speaker: str
    text: str

    def __str__(self) -> str:
        return f"{self.speaker}: {self.text}"


class Dialogue(NamedTuple):
    """Turns in the order in which they were spoken; a speaker may take several turns in a row."""

    turns: tuple[Turn, ...]
    instruction: str = INSTRUCTION  # the line before the first turn; empty for none
    skipped: tuple[str, ...] = ()  # the reason for each turn of the file that was left out
    context: tuple[int, ...] = ()  # indices of turns that are context and are not learned
