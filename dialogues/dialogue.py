"""A conversation between people, and the division of many of them into training and validation."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from support.errors import UserError

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


def split_dialogues(dialogues: np.ndarray, percents: Sequence[int]) -> list[np.ndarray]:
    """Cut `dialogues`, as they stand, into one part for each of `percents` (which sum to 100).

    The cuts are whole-number arithmetic, each rounded down: 10 dialogues at 70/30 are 7 and 3, and no size meets a
    floating-point surprise (`int(100 * 0.57)` is 56).

    Raises:
        UserError: a part would be empty.
    """
    cuts = [len(dialogues) * sum(percents[:part]) // 100 for part in range(len(percents) + 1)]
    parts = [dialogues[start:end] for start, end in pairwise(cuts)]
    if not all(map(len, parts)):
        sizes = "/".join(str(len(part)) for part in parts)
        raise UserError(
            f"{len(dialogues)} dialogues are too few for --split {'/'.join(map(str, percents))}"
            f" (it would give {sizes}); add dialogues or change --split"
        )
    return parts


def hold_out_fold(dialogues: np.ndarray, folds: int, fold: int) -> list[np.ndarray]:
    """Cut `dialogues`, as they stand, into `folds` parts; return all others together, and number `fold`, from 1.

    The cuts are those of `split_dialogues`: whole-number arithmetic, each rounded down.

    Raises:
        UserError: a part would be empty.
    """
    if len(dialogues) < folds:
        raise UserError(f"{len(dialogues)} dialogues are too few for --folds {folds}; add dialogues or lower --folds")
    start, end = len(dialogues) * (fold - 1) // folds, len(dialogues) * fold // folds
    return [np.concatenate([dialogues[:start], dialogues[end:]]), dialogues[start:end]]
