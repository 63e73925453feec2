"""Guesses about which reply is real: their score, and the file that keeps them."""

from collections.abc import Iterable
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

from support.errors import UserError
from support.files import Json, read_json, write_json

GUESSES = "guesses.json"  # in the run folder
ENOUGH = 10  # minimum number of guesses for an interval
CONFIDENCE = 0.95


class Score(NamedTuple):
    right: int
    guesses: int

    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval for the probability of a right guess; needs at least one guess.

        E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the American
        Statistical Association 22 (1927), 209-212.
        """
        z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
        share, spread = self.right / self.guesses, z * z / self.guesses
        centre = share + spread / 2
        half = (share * (1 - share) * spread + spread * spread / 4) ** 0.5
        return (centre - half) / (1 + spread), (centre + half) / (1 + spread)

    def __str__(self) -> str:
        """The score, with its interval if there are at least ENOUGH guesses."""
        text = f"{self.right} of {self.guesses}"
        if self.guesses < ENOUGH:
            return text
        low, high = self.interval()
        return f"{text} (95% interval: {low:.0%} to {high:.0%}; chance is 50%)"


def score_of(guesses: Iterable[Json]) -> Score:
    answers = [guess["correct"] for guess in guesses]
    return Score(sum(answers), len(answers))


def read_guesses(path: Path) -> list[Json]:
    """Read `guesses.json`; without the file, there are no guesses yet.

    Returns:
        for each guess: the `part`, the `dialogue` and the `turn` in it (from 1), whether the guess was `correct`, and
        the `sampling` settings.

    Raises:
        UserError: the file can't be read, or is damaged.
    """
    if not path.exists():
        return []
    advice = "restore or delete it"
    guesses = read_json(path, list, advice)
    kinds = {"part": str, "dialogue": int, "turn": int, "correct": bool}
    for number, guess in enumerate(guesses, start=1):
        if not isinstance(guess, dict) or any(type(guess.get(name)) is not kind for name, kind in kinds.items()):
            raise UserError(f"{path}: entry {number} is not a guess; {advice}")
    return guesses


def add_guess(path: Path, guess: Json) -> list[Json]:
    """Add a guess to the file, and return all of them; another process may have added some too.

    Raises:
        UserError: the file is damaged, or can't be written.
    """
    guesses = [*read_guesses(path), guess]
    write_json(path, guesses)
    return guesses
