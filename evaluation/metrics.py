"""Metrics computed from losses and replies, each with its source. None of them needs the model.

A word is a run of letters and digits with their accents and vowel signs, in lower case. In scripts without spaces, each
character is a word.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 1000
SHARE = (0.0, 1.0)  # bounds of a fraction
DRAWN_TOGETHER = 1_000_000  # number of dialogues to draw in one batch of resamples
FEWEST_FOR_INTERVAL = 3  # minimum number of dialogues for an interval
FEWEST_TO_DRAW = 8  # minimum number of dialogues to resample; three have only ten different resamples
COPIED_WORDS = 5
REPEATED_WORDS = 4
WITHOUT_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Thai to Han
# Characters that belong to the letter before them, but do not match `\w`: combining accents, Hebrew and Arabic vowels,
# the Indic blocks except for their full stops, and joiners.
MARKS = "\u0300-\u036f\u0591-\u05bd\u05bf-\u05c7\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff\u200c\u200d"
LETTERS = rf"[^\W_{WITHOUT_SPACES}](?:[^\W_{WITHOUT_SPACES}]|[{MARKS}])*"
WORD = re.compile(rf"[{WITHOUT_SPACES}]|{LETTERS}(?:['’]{LETTERS})*")


class Estimate(NamedTuple):
    """A number and its interval, which is None if there are too few dialogues."""

    value: float
    interval: list[float] | None = None

    def map(self, function: Callable[[float], float]) -> "Estimate":
        """Apply an increasing `function` to the value and the interval."""
        return Estimate(function(self.value), self.interval and list(map(function, self.interval)))


def ratio(
    numerators: np.ndarray,
    denominators: np.ndarray,
    seed: int,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    resamples: int = RESAMPLES,
) -> Estimate:
    """Σ numerators / Σ denominators over dialogues, with its 95% interval.

    Whole dialogues are resampled, because the tokens or replies of one dialogue are not independent (Efron and
    Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13). Resamples whose denominators are all 0 have no
    ratio and are ignored. Fewer than eight dialogues have too few different resamples: they get Student's t interval.

    Args:
        numerators, denominators: (dialogues,) each, such as a dialogue's summed loss and its number of tokens.
        bounds: the smallest and largest possible ratio, such as 0 and 1 for a fraction.
    """
    value = float(numerators.sum() / denominators.sum())
    if FEWEST_FOR_INTERVAL <= len(numerators) < FEWEST_TO_DRAW:
        return Estimate(value, np.clip(student_interval(numerators, denominators), *bounds).tolist())
    samples: list[float] = []
    for drawn in resample(len(numerators), seed, resamples):
        above, below = numerators[drawn].sum(axis=1), denominators[drawn].sum(axis=1)
        samples += (above[below > 0] / below[below > 0]).tolist()
    return Estimate(value, middle(samples, len(numerators)))


def student_interval(numerators: np.ndarray, denominators: np.ndarray) -> list[float]:
    """A ratio's interval by Student's t, from its linearised error (Cochran 1977, "Sampling Techniques", 2.11)."""
    n, value = len(numerators), numerators.sum() / denominators.sum()
    error = math.sqrt(n / (n - 1) * ((numerators - value * denominators) ** 2).sum()) / denominators.sum()
    return [float(value - t_quantile(n - 1) * error), float(value + t_quantile(n - 1) * error)]


def resample(size: int, seed: int, resamples: int = RESAMPLES) -> Iterator[np.ndarray]:
    """Yield resamples of `size` dialogues, with replacement, as rows of (resamples, size), in batches.

    If there are too few dialogues for an interval, yield nothing.
    """
    random, left = np.random.default_rng(seed), resamples if size >= FEWEST_FOR_INTERVAL else 0
    while left:
        rows = min(left, max(1, DRAWN_TOGETHER // size))
        left -= rows
        yield random.integers(size, size=(rows, size))


def middle(values: Sequence[float], size: int) -> list[float] | None:
    """The interval from the values of resamples of `size` dialogues; None without values.

    For few dialogues, the middle 95% of the values is too narrow. Widen it by the amount that the interval of a mean
    needs, to 98% for ten dialogues (the expanded percentile interval; Hesterberg 2015, "What Teachers Should Know About
    the Bootstrap").
    """
    if not len(values):
        return None
    tail = NormalDist().cdf(-math.sqrt(size / (size - 1)) * t_quantile(size - 1))
    return np.quantile(values, [tail, 1 - tail]).tolist()


@cache
def t_quantile(freedom: int) -> float:
    """The t for which Student's distribution with `freedom` degrees of freedom is within ±t with 95% probability.

    The confidence is a finite sum in the angle arctan(t / √freedom) (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4). It
    grows with the angle, so bisection finds it.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # enough halvings for the precision of a float
        angle = (low + high) / 2
        sine, cosine, odd = math.sin(angle), math.cos(angle), freedom % 2
        total, term = 0.0, cosine if odd else 1.0
        for power in range(odd, freedom - 1, 2):
            total += term
            term *= (power + 1) / (power + 2) * cosine**2
        share = 2 / math.pi * (angle + sine * total) if odd else sine * total
        low, high = (angle, high) if share < CONFIDENCE else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def ranks(losses: Iterable[np.ndarray]) -> np.ndarray:
    """(replies,) the rank of each true reply among its candidates, 1 for the likeliest.

    Ties and NaN count against the true reply.

    Args:
        losses: for each reply, its mean loss per token, followed by the losses of the other candidates.
    """
    return np.array([1 + np.count_nonzero(~(others[1:] > others[0])) for others in losses])


def words(text: str) -> list[str]:
    return [spell(match) for match in WORD.finditer(text)]


def spell(match: re.Match[str]) -> str:
    """Normalise a word, so that different encodings of its accents and apostrophes become equal."""
    return unicodedata.normalize("NFC", match[0].lower()).replace("’", "'")


def ngrams(tokens: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(tokens[start:] for start in range(n)), strict=False)


def distinct(replies: Sequence[Sequence[str]], n: int) -> float | None:
    """Distinct-n (Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models").

    The number of distinct n-grams divided by the number of all n-grams, over all replies: 1 if none repeats. (The
    paper divides by words; this divides by n-grams, like most later work.) None without n-grams.
    """
    found = [ngram for reply in replies for ngram in ngrams(reply, n)]
    return len(set(found)) / len(found) if found else None


def repetition(reply: Sequence[str]) -> tuple[int, int]:
    """The number of a reply's 4-grams that occur earlier in it, and the number of all its 4-grams.

    Their ratio is seq-rep-4 (Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training"). Sum both over
    replies before dividing, so that long replies weigh more than short ones. (In the paper all have the same length.)
    """
    found = list(ngrams(reply, REPEATED_WORDS))
    return len(found) - len(set(found)), len(found)


def likeness(replies: Sequence[str], true: Sequence[str], seed: int) -> tuple[dict[str, Estimate], dict[str, str]]:
    """chrF and BLEU of all replies against the true ones (sacrebleu; Post 2018), and sacrebleu's signature of each.

    The statistics of a resample are summed before they are scored, as sacrebleu does for a corpus.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    estimates, signatures = {}, {}
    for name, metric in (("chrf", CHRF()), ("bleu", BLEU())):
        score = float(metric.corpus_score(replies, [list(true)]).score)
        # sacrebleu's own bootstrap fails if some scores are 0 (version 2.6 can't add float and float32).
        statistics = np.array(metric._extract_corpus_statistics(replies, [list(true)]))
        scores = [
            metric._compute_score_from_stats(statistics[drawn].sum(axis=0).tolist()).score
            for rows in resample(len(replies), seed)
            for drawn in rows
        ]
        estimates[name] = Estimate(score, middle(scores, len(replies)))
        signatures[name] = str(metric.get_signature())
    return estimates, signatures


class Span(NamedTuple):
    """A run of words that also occurs in a training dialogue: character range, number of words, and the dialogue."""

    start: int
    end: int
    words: int
    dialogue: int  # number of the dialogue, from 1


class Copied(NamedTuple):
    """The parts of a text that occur word for word in the training dialogues."""

    ngrams: int  # number of 5-grams
    copied: int  # number of copied 5-grams
    marks: list[tuple[int, int]]  # copied ranges of characters
    longest: Span | None


def find_copies(texts: Sequence[str], training: Iterable[Sequence[str]]) -> list[Copied]:
    """Find the runs of at least five words that each text shares with a turn of the training dialogues.

    Carlini et al. 2023, "Quantifying Memorization Across Neural Language Models", also count exact repetition, but of
    tokens. Readers see words.

    Args:
        training: the turns of each dialogue.
    """
    found = [[(spell(match), *match.span()) for match in WORD.finditer(text)] for text in texts]
    said = [[word for word, _, _ in text] for text in found]
    places: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for text, spoken in enumerate(said):
        for place, ngram in enumerate(ngrams(spoken, COPIED_WORDS)):
            places.setdefault(ngram, []).append((text, place))
    copied: list[set[int]] = [set() for _ in texts]
    longest: list[Span | None] = [None] * len(texts)
    for dialogue, turns in enumerate(training, 1):
        for turn in turns:
            spoken = words(turn)
            for start, ngram in enumerate(ngrams(spoken, COPIED_WORDS)):
                for text, place in places.get(ngram, ()):
                    copied[text].add(place)
                    if place and start and said[text][place - 1] == spoken[start - 1]:
                        continue  # the run began earlier
                    length = common_prefix(said[text][place:], spoken[start:])
                    best = longest[text]
                    if best is None or length > best.words:
                        characters = found[text][place][1], found[text][place + length - 1][2]
                        longest[text] = Span(*characters, length, dialogue)
    return [
        Copied(max(len(spoken) - COPIED_WORDS + 1, 0), len(places), marks(spoken_at, places), span)
        for spoken, spoken_at, places, span in zip(said, found, copied, longest, strict=True)
    ]


def common_prefix(first: Sequence[str], second: Sequence[str]) -> int:
    """The number of words in the common prefix of two texts."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def marks(found: Sequence[tuple[str, int, int]], places: Iterable[int]) -> list[tuple[int, int]]:
    """The ranges of characters of the copied 5-grams that begin at the indices `places`, merged where they overlap."""
    merged: list[tuple[int, int]] = []
    last = -1  # index of the last marked word
    for place in sorted(places):
        end = found[place + COPIED_WORDS - 1][2]
        if place <= last and merged:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((found[place][1], end))
        last = place + COPIED_WORDS - 1
    return merged
