"""A model, the one it began as, and the true replies, measured on held-out conversations."""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import tiktoken

from dialogues.batches import DialogueDataset
from dialogues.conversations import Conversations
from dialogues.dialogue import Turn
from gpt_model import GPTModel
from results import metrics
from results.generation import Case, complete_dialogues
from results.metrics import Copied, Estimate
from results.scoring import (
    HISTORIES,
    Reply,
    Scorer,
    TokenLosses,
    score_candidates,
    score_histories,
    score_tokens,
)
from settings import GenerationSettings

VERSION = 1
REPLY_TOKENS = 64  # of a reply that are measured, at most
FEWEST_OTHERS = 9  # turns that a reply is ranked among
MOST_SPEAKERS = 10
MOST_TURNS = 20  # positions in a dialogue; what comes later is measured together


class Subject(NamedTuple):
    """What models are measured on.

    Attributes:
        datasets: the dialogues of each part; the loss of each part is measured.
        part: the one of `datasets` that the model has not seen: everything else is measured on it.
        replies: turns that are scored under several histories and ranked among others.
        answered: the dialogues of which a reply is generated; the first `generation.cases` are shown.
        reply_tokens: as much of a reply is measured; a model that does not know how to stop would write on.
        training: reads the turns of each training dialogue; none where these are not known.
        autocast: what the models compute in.
    """

    conversations: Conversations
    datasets: dict[str, DialogueDataset]
    part: str
    replies: list[Reply]
    answered: list[int]
    training: Callable[[], Iterable[Sequence[str]]] | None
    generation: GenerationSettings
    reply_tokens: int
    seed: int
    autocast: Callable[[], contextlib.AbstractContextManager[object]]

    @property
    def tokenizer(self) -> tiktoken.Encoding:
        return self.conversations.renderer.tokenizer


class Metrics:
    """The metrics of one column: numbers, their intervals, and why one is missing."""

    def __init__(
        self, intervals: dict[str, Any] | None = None, too_small: dict[str, str] | None = None, **values: Any
    ) -> None:
        self.values, self.intervals, self.too_small = values, intervals or {}, too_small or {}

    def add(self, name: str, estimate: Estimate | float | None, needed: str = "") -> None:
        """A number, or where there is none, what would be `needed`."""
        if isinstance(estimate, Estimate):
            if estimate.interval:
                self.intervals[name] = estimate.interval
            estimate = estimate.value
        self.values[name] = estimate
        if estimate is None:
            self.too_small[name] = needed

    def add_group(self, name: str, estimates: dict[str, Estimate]) -> None:
        """Several numbers of one kind."""
        self.values[name] = {key: estimate.value for key, estimate in estimates.items()}
        self.intervals[name] = {key: estimate.interval for key, estimate in estimates.items() if estimate.interval}

    def joined(self, other: "Metrics") -> "Metrics":
        """The metrics of both."""
        return Metrics(
            self.intervals | other.intervals, self.too_small | other.too_small, **self.values, **other.values
        )

    def as_json(self) -> dict[str, Any]:
        return {**self.values, "intervals": self.intervals, "too_small": self.too_small}


class Sums:
    """Sums over the dialogues of a set, of which ratios and their intervals are made."""

    def __init__(self, dialogues: np.ndarray, seed: int) -> None:
        """`dialogues` says of each thing that is summed to which dialogue it belongs."""
        self.seed = seed
        self.places = np.unique(dialogues, return_inverse=True)[1]

    def ratio(self, numerators: np.ndarray, denominators: np.ndarray, where: np.ndarray | None = None) -> Estimate:
        """Σ numerators / Σ denominators of the things `where` it is true; those of a dialogue stay together."""
        chosen = np.ones(len(self.places), bool) if where is None else where
        size = self.places.max() + 1
        above, below = (np.bincount(self.places[chosen], values[chosen], size) for values in (numerators, denominators))
        there = below > 0
        return metrics.ratio(above[there], below[there], self.seed)


def measure_likelihood(scorer: Scorer, subject: Subject) -> Metrics:
    """How likely the model finds what was said: loss, context use and coherence."""
    found, parts = Metrics(), {}
    for name, dataset in subject.datasets.items():
        losses = score_tokens(scorer, dataset, f"loss on {name}")
        part = loss_metrics(losses, subject)
        parts[name] = part.as_json()
        if name == subject.part:
            found = part
            add_loss_by_turn(found, losses, subject)
    found.values["loss_by_part"] = parts
    add_context_use(found, scorer, subject)
    add_coherence(found, scorer, subject)
    return found


def loss_metrics(losses: TokenLosses, subject: Subject) -> Metrics:
    """Loss in nats a token, perplexity exp(loss), and bits per byte, which does not depend on the vocabulary.

    Bytes are those of the learned text in UTF-8; special tokens have none, but their nats count.
    """
    found, conversations = Metrics(), subject.conversations
    sums = Sums(np.searchsorted(conversations.starts, losses.places, side="right"), subject.seed)
    loss = sums.ratio(losses.nats, np.ones(len(losses.nats)))
    found.add("loss", loss)
    found.add("perplexity", loss.map(lambda nats: math.exp(min(nats, 700))))  # e ** 710 is no float
    sizes = byte_lengths(subject.tokenizer)[conversations.tokens[losses.places]]
    found.add("bits_per_byte", sums.ratio(losses.nats / math.log(2), sizes))
    return found


def byte_lengths(tokenizer: tiktoken.Encoding) -> np.ndarray:
    """(n_vocab,) the bytes of text that each token stands for; special tokens stand for none."""
    sizes = np.zeros(tokenizer.n_vocab)
    for token, number in tokenizer._mergeable_ranks.items():
        sizes[number] = len(token)
    sizes[list(tokenizer._special_tokens.values())] = 0
    return sizes


def add_loss_by_turn(found: Metrics, losses: TokenLosses, subject: Subject) -> None:
    """The loss of what each speaker says, and of the first, the second, ... turn: texts with their stops."""
    conversations = subject.conversations
    starts, ends = conversations.turn_spans()
    turns = np.searchsorted(starts, losses.places, side="right") - 1
    said = (turns >= 0) & (losses.places < ends[turns])  # and no label or instruction
    dialogues = np.searchsorted(conversations.turn_starts, turns, side="right") - 1
    sums, ones = Sums(dialogues, subject.seed), np.ones(len(turns))
    speakers = conversations.texts[turns, 2]
    busiest = np.argsort(-np.bincount(speakers[said]), kind="stable")[:MOST_SPEAKERS]
    by_speaker = {
        conversations.speakers[place]: sums.ratio(losses.nats, ones, said & (speakers == place))
        for place in busiest.tolist()
        if (said & (speakers == place)).any()
    }
    positions = np.minimum(turns - conversations.turn_starts[dialogues], MOST_TURNS)
    by_turn = {
        f"{position + 1}" + "+" * (position == MOST_TURNS): sums.ratio(
            losses.nats, ones, said & (positions == position)
        )
        for position in np.unique(positions[said]).tolist()
    }
    found.add_group("loss_by_speaker", by_speaker)
    found.add_group("loss_by_turn", by_turn)


def add_context_use(found: Metrics, scorer: Scorer, subject: Subject) -> None:
    """Nats a token that a history is worth to a reply: its loss without any, minus its loss with that history.

    Fernandes et al. 2021, "Measuring and Increasing Context Usage in Context-Aware Machine Translation", section 3, for
    dialogues and by sums over tokens. `context_use` is that of the own history; of another dialogue's there should be
    nothing to gain.
    """
    scores = score_histories(scorer, subject.conversations, subject.replies, subject.seed)
    sums, tokens = Sums(np.array([dialogue for dialogue, _ in subject.replies]), subject.seed), scores["tokens"]
    worth = {name: sums.ratio(scores["none"] - scores[name], tokens) for name in (*HISTORIES, "other")}
    found.add("context_use", worth["all"])
    found.add_group("context_use_by_turns", {name: worth[name] for name in HISTORIES if name != "none"})
    alone = len({dialogue for dialogue, _ in subject.replies}) == 1
    found.add("context_use_of_other_history", None if alone else worth["other"], "needs two dialogues, there is one")


def add_coherence(found: Metrics, scorer: Scorer, subject: Subject) -> None:
    """Hits@1 and MRR of the true reply among up to 19 others, by the mean loss of a token of its text.

    The task of Dinan et al. 2019, "The Second Conversational Intelligence Challenge (ConvAI2)", section 2.2, where a
    language model's likelihood does the ranking.
    """
    names = ("hits_at_1", "mrr", "chance_hits_at_1")
    dialogues = np.array([dialogue for dialogue, _ in subject.replies])
    others = len(dialogues) - np.bincount(dialogues).max()
    if others < FEWEST_OTHERS:
        for name in names:
            found.add(name, None, f"needs {FEWEST_OTHERS} turns of other dialogues to choose from, there are {others}")
        return
    losses = score_candidates(scorer, subject.conversations, subject.replies, subject.seed)
    ranks, sums, ones = metrics.ranks(losses), Sums(dialogues, subject.seed), np.ones(len(dialogues))
    found.add("hits_at_1", sums.ratio((ranks == 1).astype(float), ones))
    found.add("mrr", sums.ratio(1 / ranks, ones))
    found.add("chance_hits_at_1", float(np.mean([1 / len(each) for each in losses])))


def measure_replies(replies: Sequence[str], subject: Subject, copies: Sequence[Copied] | None) -> Metrics:
    """Diversity, repetition and memorisation of one reply for each dialogue.

    Args:
        copies: of everything that was written, what stands in the training dialogues.
    """
    found = Metrics()
    spoken, few = [metrics.words(reply) for reply in replies], "needs more words than the replies have"
    for n in (1, 2):
        found.add(f"distinct_{n}", metrics.distinct(spoken, n), few)
    tokens = list(map(subject.tokenizer.encode_ordinary, replies))
    adjusted = metrics.expectation_adjusted_distinct(tokens, subject.tokenizer.n_vocab)
    found.add("expectation_adjusted_distinct", adjusted, few)
    found.add("self_bleu", metrics.self_bleu(replies), "needs two replies with words")
    found.add("repetition", share([metrics.repetition(reply) for reply in spoken], subject.seed), few)
    found.add("words_per_reply", share([(len(reply), 1) for reply in spoken], subject.seed))
    found.add("empty_replies", float(sum(not reply for reply in spoken)))
    if copies is not None:
        found.add("copied_5grams", share([(each.copied, each.ngrams) for each in copies], subject.seed), few)
    return found


def share(counts: Sequence[tuple[int, int]], seed: int) -> Estimate | None:
    """Σ firsts / Σ seconds over dialogues; none where there is nothing to divide by."""
    above, below = np.array(counts, float).reshape(-1, 2).T
    return metrics.ratio(above[below > 0], below[below > 0], seed) if below.any() else None


def first_texts(cases: Sequence[Case], subject: Subject, true: bool = False) -> list[str]:
    """The first turn of each completion, as much of it as is measured."""
    texts = [(case.true if true else case.written)[0].text for case in cases]
    encode, decode = subject.tokenizer.encode_ordinary, subject.tokenizer.decode
    return [decode(encode(text)[: subject.reply_tokens]).rstrip("\ufffd") for text in texts]


class Column(NamedTuple):
    """What was measured of one model, and what it has written in the dialogues that are answered."""

    metrics: Metrics
    written: list[Case]

    def as_json(self) -> dict[str, Any]:
        return {"metrics": self.metrics.as_json(), "written": self.written}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Column":
        """What `as_json` and a file made of it.

        Raises:
            KeyError, TypeError, ValueError: `value` is not of that form.
        """
        written = [Case(*(tuple(Turn(*turn) for turn in turns) for turns in case)) for case in value["written"]]
        return cls(Metrics(**value["metrics"]), written)


def measure_column(model: GPTModel, subject: Subject, written: list[Case] | None = None, whole: bool = False) -> Column:
    """Measure a model.

    Args:
        written: what it has written already; none: it writes now, and in the dialogues that are shown, if asked for the
            `whole`, all of the rest.
    """
    if written is None:
        conversations, shown = subject.conversations, subject.generation.cases if whole else 0
        dialogues = [conversations[number] for number in subject.answered]
        short = replace(subject.generation, max_new_tokens=min(subject.reply_tokens, subject.generation.max_new_tokens))
        renderer, learn, seed = conversations.renderer, conversations.learn, subject.seed
        written = complete_dialogues(model, renderer, dialogues[:shown], learn, subject.generation, seed)
        written += complete_dialogues(model, renderer, dialogues[shown:], learn, short, seed, one_turn=True)
    scorer = Scorer(model, subject.autocast, subject.tokenizer.eot_token)
    return Column(measure_likelihood(scorer, subject), written)


def compare(columns: dict[str, Column], subject: Subject) -> dict[str, Any]:
    """Measure what the models of `columns` ("model", and "base" for the one it began as) and people have written.

    Returns:
        `metrics` and `cases` of `evaluation.json`, and the `signatures` of sacrebleu.
    """
    cases = columns["model"].written
    said = {name: [case.written for case in column.written] for name, column in columns.items()}
    said["true_replies"] = [case.true for case in cases]
    copies = find_copies(said, subject)
    true, signatures, found = first_texts(cases, subject, true=True), {}, {}
    for name in ("base", "model", "true_replies"):
        if name not in said:
            continue
        texts = first_texts(columns[name].written, subject) if name in columns else true
        measured = measure_replies(texts, subject, list(chain(*copies[name])) if copies else None)
        if copies:
            measured.values["longest_copied_span"] = longest_span(said[name], copies[name])
        if name in columns:
            signatures = add_likeness(measured, texts, true, subject)
            measured = columns[name].metrics.joined(measured)
        found[name] = measured.as_json()
    return {"metrics": found, "cases": show_cases(said, cases, copies, subject), "signatures": signatures}


def add_likeness(found: Metrics, texts: Sequence[str], true: Sequence[str], subject: Subject) -> dict[str, str]:
    """chrF, BLEU and the words in common with the true replies; returns the signatures of the first two."""
    estimates, signatures = metrics.likeness(texts, true, subject.seed)
    pairs = zip(map(metrics.words, texts), map(metrics.words, true), strict=True)
    f1 = np.array([metrics.word_f1(*pair) for pair in pairs])
    for name, estimate in {**estimates, "word_f1": metrics.ratio(f1, np.ones(len(f1)), subject.seed)}.items():
        found.add(name, estimate)
    return signatures


def find_copies(said: dict[str, list[tuple[Turn, ...]]], subject: Subject) -> dict[str, list[list[Copied]]] | None:
    """What each turn that was said has from the training dialogues, in one reading of these."""
    if subject.training is None:
        return None
    texts = [turn.text for columns in said.values() for turns in columns for turn in turns]
    found = iter(metrics.find_copies(texts, subject.training()))
    return {name: [[next(found) for _ in turns] for turns in column] for name, column in said.items()}


def longest_span(said: Sequence[Sequence[Turn]], copies: Sequence[Sequence[Copied]]) -> dict[str, Any] | None:
    """The longest run of words that stands in a training dialogue, and in which."""
    found = [
        (copied.longest.words, turn.text[copied.longest.start : copied.longest.end], copied.longest.dialogue)
        for turns, each in zip(said, copies, strict=True)
        for turn, copied in zip(turns, each, strict=True)
        if copied.longest
    ]
    return dict(zip(("words", "text", "dialogue"), max(found), strict=True)) if found else None


def show_cases(
    said: dict[str, list[tuple[Turn, ...]]],
    cases: Sequence[Case],
    copies: dict[str, list[list[Copied]]] | None,
    subject: Subject,
) -> list[dict[str, Any]]:
    """The first dialogues turn by turn: how they went on, and how each model went on, with what is copied marked."""
    shown = []
    numbers = subject.answered[: subject.generation.cases]
    for place, (number, case) in enumerate(zip(numbers, cases, strict=False)):
        entry: dict[str, Any] = {
            "place": int(subject.conversations.numbers[number]),
            "input": [turn._asdict() for turn in case.asked],
            "response": [turn._asdict() for turn in case.true],
        }
        for name in ("model", "base"):
            if name not in said:
                continue
            turns = [turn._asdict() for turn in said[name][place]]
            for turn, copied in zip(turns, copies[name][place] if copies else (), strict=copies is not None):
                turn["copied"] = copied.marks
            entry[f"{name}_response"] = turns
        shown.append(entry)
    return shown
