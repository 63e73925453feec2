"""What numbers and replies say about a model: each metric with its source; no model is needed here.

A word is a run of letters and digits, with their accents and vowel signs, in lower case; in writing without spaces each
character is one.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 1000
SHARE = (0.0, 1.0)  # the bounds of one
DRAWN_TOGETHER = 1_000_000  # dialogues, of many draws
FEWEST_FOR_INTERVAL = 3  # dialogues
FEWEST_TO_DRAW = 8  # from; three give ten different draws
COPIED_WORDS = 5
REPEATED_WORDS = 4
SELF_BLEU_REPLIES = 100
WITHOUT_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Thai to Han
# Signs that belong to the letter before them and are none for `\w`: accents that stand alone, Hebrew and Arabic vowels,
# all of the Indic blocks but their full stops, joiners.
MARKS = "\u0300-\u036f\u0591-\u05bd\u05bf-\u05c7\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff\u200c\u200d"
LETTERS = rf"[^\W_{WITHOUT_SPACES}](?:[^\W_{WITHOUT_SPACES}]|[{MARKS}])*"
WORD = re.compile(rf"[{WITHOUT_SPACES}]|{LETTERS}(?:['’]{LETTERS})*")


class Estimate(NamedTuple):
    """A number and its interval; none where there are too few dialogues."""

    value: float
    interval: list[float] | None = None

    def map(self, function: Callable[[float], float]) -> "Estimate":
        """The same after a rising `function`."""
        return Estimate(function(self.value), self.interval and list(map(function, self.interval)))


def ratio(
    numerators: np.ndarray,
    denominators: np.ndarray,
    seed: int,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    resamples: int = RESAMPLES,
) -> Estimate:
    """Σ numerators / Σ denominators over dialogues, with its 95% interval.

    Dialogues are drawn for it, not tokens or replies: those of one dialogue are not independent (Efron and Tibshirani
    1993, "An Introduction to the Bootstrap", chapter 13). Draws whose denominators are all 0 have no ratio and don't
    count. Of fewer than eight dialogues there are too few different draws: theirs is Student's.

    Args:
        numerators, denominators: (dialogues,) each, as the summed loss of a dialogue's tokens and their number.
        bounds: between which the ratio lies whatever the dialogues, as that of a share between 0 and 1.
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
    """Draws of `size` dialogues of as many, with replacement, as rows of (draws, size), some at a time.

    None where there are too few to say anything by it.
    """
    random, left = np.random.default_rng(seed), resamples if size >= FEWEST_FOR_INTERVAL else 0
    while left:
        rows = min(left, max(1, DRAWN_TOGETHER // size))
        left -= rows
        yield random.integers(size, size=(rows, size))


def middle(values: Sequence[float], size: int) -> list[float] | None:
    """An interval from what resamples of `size` dialogues gave; None without values.

    The ends of the middle 95% are too narrow for few dialogues. So it takes as much of the middle as makes up for that
    when a mean is estimated: 98% for ten (the expanded percentile interval; Hesterberg
    2015, "What Teachers Should Know About the Bootstrap").
    """
    if not len(values):
        return None
    tail = NormalDist().cdf(-math.sqrt(size / (size - 1)) * t_quantile(size - 1))
    return np.quantile(values, [tail, 1 - tail]).tolist()


@cache
def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t within ± which lies `confidence` of Student's distribution of so many degrees of freedom.

    Its share within ±t is a finite sum in the angle arctan(t / √freedom) (Abramowitz and Stegun 1964, 26.7.3 and
    26.7.4), and grows with it: bisection finds it.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halvings: beyond the precision of a float
        angle = (low + high) / 2
        sine, cosine, odd = math.sin(angle), math.cos(angle), freedom % 2
        total, term = 0.0, cosine if odd else 1.0
        for power in range(odd, freedom - 1, 2):
            total += term
            term *= (power + 1) / (power + 2) * cosine**2
        share = 2 / math.pi * (angle + sine * total) if odd else sine * total
        low, high = (angle, high) if share < confidence else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def ranks(losses: Iterable[np.ndarray]) -> np.ndarray:
    """(replies,) the rank of each true reply among its candidates, 1 for the likeliest.

    Ties and NaN count against the true reply.

    Args:
        losses: of each reply the mean loss of a token, and behind it those of the others.
    """
    return np.array([1 + np.count_nonzero(~(others[1:] > others[0])) for others in losses])


def words(text: str) -> list[str]:
    return [spell(match) for match in WORD.finditer(text)]


def spell(match: re.Match[str]) -> str:
    """A word in the one form in which it is compared, however its accents and its apostrophe were typed."""
    return unicodedata.normalize("NFC", match[0].lower()).replace("’", "'")


def ngrams(tokens: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(tokens[start:] for start in range(n)), strict=False)


def distinct(replies: Sequence[Sequence[str]], n: int) -> float | None:
    """Distinct-n (Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models").

    Different n-grams among all n-grams of all replies: 1 if none comes twice. (The paper divides by words; like most
    who report it, this divides by n-grams.) None without an n-gram.
    """
    found = [ngram for reply in replies for ngram in ngrams(reply, n)]
    return len(set(found)) / len(found) if found else None


def expectation_adjusted_distinct(replies: Sequence[Sequence[int]], n_vocab: int) -> float | None:
    """EAD (Liu et al. 2022, "Rethinking and Refining the Distinct Metric"): different tokens among as many
    as C draws from a vocabulary of V would give, V (1 - ((V - 1) / V) ** C). Longer replies don't lower it.

    Args:
        replies: token ids of the model's vocabulary, which has `n_vocab`.
    """
    tokens = [token for reply in replies for token in reply]
    if not tokens:
        return None
    return len(set(tokens)) / (n_vocab * (1 - ((n_vocab - 1) / n_vocab) ** len(tokens)))


def self_bleu(replies: Sequence[str]) -> float | None:
    """Self-BLEU (Zhu et al. 2018, "Texygen"): the BLEU of a reply with all others as its references, mean
    over at most 100 replies, from 0 to 100. High where all replies sound the same. None for fewer than two."""
    from sacrebleu.metrics.bleu import BLEU

    replies = [reply for reply in replies if words(reply)]
    step = -(-len(replies) // SELF_BLEU_REPLIES) or 1
    replies = replies[::step]
    if len(replies) < 2:
        return None
    bleu = BLEU(effective_order=True)  # replies may be shorter than four words
    scores = [bleu.sentence_score(reply, replies[:n] + replies[n + 1 :]).score for n, reply in enumerate(replies)]
    return sum(scores) / len(scores)


def repetition(reply: Sequence[str]) -> tuple[int, int]:
    """How many of a reply's 4-grams stood in it before, and how many it has; divided they are seq-rep-4 (Welleck et al.
    2020, "Neural Text Generation with Unlikelihood Training"). Over replies both are summed first, so that
    short ones don't weigh as much as long ones; theirs are all equally long."""
    found = list(ngrams(reply, REPEATED_WORDS))
    return len(found) - len(set(found)), len(found)


def word_f1(reply: Sequence[str], true: Sequence[str]) -> float:
    """F1 of the words in common (Rajpurkar et al. 2016, "SQuAD"; articles are kept here)."""
    common = sum((Counter(reply) & Counter(true)).values())
    if not common:
        return float(not reply and not true)
    precision, recall = common / len(reply), common / len(true)
    return 2 * precision * recall / (precision + recall)


def likeness(replies: Sequence[str], true: Sequence[str], seed: int) -> tuple[dict[str, Estimate], dict[str, str]]:
    """chrF and BLEU of all replies beside the true ones (sacrebleu; Post 2018), and sacrebleu's signature of each.

    Of a resample the statistics are summed before a score is made of them, as sacrebleu does it for a corpus.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    estimates, signatures = {}, {}
    for name, metric in (("chrf", CHRF()), ("bleu", BLEU())):
        score = float(metric.corpus_score(replies, [list(true)]).score)
        # Its own bootstrap fails where some scores are 0 (version 2.6: float and float32 can't be added up).
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
    """Words of a text that stand in a training dialogue in the same order: their characters, and where they stand."""

    start: int
    end: int
    words: int
    dialogue: int  # its number, counted from 1


class Copied(NamedTuple):
    """What of a text stands in the training dialogues word for word."""

    ngrams: int  # of five words
    copied: int  # of these
    marks: list[tuple[int, int]]  # characters of the text that are copied
    longest: Span | None


def find_copies(texts: Sequence[str], training: Iterable[Sequence[str]]) -> list[Copied]:
    """What each of `texts` has from the turns of the training dialogues, in runs of at least five words.

    Carlini et al. 2023, "Quantifying Memorization Across Neural Language Models", count exact repetition too, of
    tokens; words are what a reader sees.

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
    """How many words two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def marks(found: Sequence[tuple[str, int, int]], places: Iterable[int]) -> list[tuple[int, int]]:
    """The characters of copied 5-grams that begin at `places`, those that overlap as one."""
    merged: list[tuple[int, int]] = []
    last = -1  # the last word that is marked
    for place in sorted(places):
        end = found[place + COPIED_WORDS - 1][2]
        if place <= last and merged:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((found[place][1], end))
        last = place + COPIED_WORDS - 1
    return merged
