"""How likely a model finds what was said: loss, context use and coherence, with their intervals."""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tiktoken

from dialogues.batches import DialogueDataset
from dialogues.conversations import Conversations
from evaluation import metrics
from evaluation.metrics import Estimate
from evaluation.scoring import HISTORIES, Reply, Scorer, TokenLosses, make_candidates, make_histories, score_tokens
from settings import GenerationSettings

FEWEST_OTHERS = 9  # turns that a reply is ranked among
CONTEXT = ("context_use", "context_use_beyond_other", "context_use_of_other_history")
COHERENCE = ("hits_at_1", "mrr", "chance_hits_at_1")
MOST_SPEAKERS = 50
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
    def length(self) -> int:
        """The most tokens that a model sees at a time."""
        return self.datasets[self.part].max_length

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
        return {**self.values, "intervals": dict(self.intervals), "too_small": dict(self.too_small)}


class Sums:
    """Sums over the dialogues of a set, of which ratios and their intervals are made."""

    def __init__(self, dialogues: np.ndarray, seed: int) -> None:
        """`dialogues` says of each thing that is summed to which dialogue it belongs."""
        self.seed = seed
        self.places = np.unique(dialogues, return_inverse=True)[1]

    def ratio(
        self,
        numerators: np.ndarray,
        denominators: np.ndarray,
        where: np.ndarray | None = None,
        bounds: tuple[float, float] = (-math.inf, math.inf),
    ) -> Estimate:
        """Σ numerators / Σ denominators of the things `where` it is true; those of a dialogue stay together."""
        chosen = np.ones(len(self.places), bool) if where is None else where
        size = self.places.max() + 1
        above, below = (np.bincount(self.places[chosen], values[chosen], size) for values in (numerators, denominators))
        there = np.bincount(self.places[chosen], minlength=size) > 0
        return metrics.ratio(above[there], below[there], self.seed, bounds)


def measure_likelihood(scorer: Scorer, subject: Subject) -> tuple[Metrics, np.ndarray]:
    """How likely the model finds what was said: loss, context use and coherence.

    Also (held-out dialogues, 2): the summed loss of each, in nats, and its tokens.
    """
    found, sums, parts = Metrics(), np.zeros((0, 2)), {}
    for name, dataset in subject.datasets.items():
        losses = score_tokens(scorer, dataset, f"loss on {name}")
        part = loss_metrics(losses, subject)
        parts[name] = part.as_json()
        if name == subject.part:
            found, dialogues = part, dialogues_of(losses, subject)
            sums = np.stack([np.bincount(dialogues, losses.nats), np.bincount(dialogues)], axis=1)
            add_loss_by_turn(found, losses, subject)
    found.values["loss_by_part"] = parts
    if subject.replies:
        histories = make_histories(subject.conversations, subject.replies, subject.length, subject.seed)
        add_context_use(found, histories.sums(scorer.token_losses(histories.examples, "context")), subject)
        add_coherence(found, scorer, subject)
    else:
        for name in (*CONTEXT, *COHERENCE):
            found.add(name, None, "needs a turn that answers something; of what is learned all opens its dialogue")
    return found, sums[sums[:, 1] > 0]


def dialogues_of(losses: TokenLosses, subject: Subject) -> np.ndarray:
    """(tokens,) the dialogue that each token belongs to, as its place among all conversations."""
    return np.searchsorted(subject.conversations.starts, losses.places, side="right") - 1


def loss_metrics(losses: TokenLosses, subject: Subject) -> Metrics:
    """Loss in nats a token, perplexity exp(loss), and bits per byte, which does not depend on the vocabulary.

    Bytes are those of the learned text in UTF-8; special tokens have none, but their nats count.
    """
    found, conversations = Metrics(), subject.conversations
    sums = Sums(dialogues_of(losses, subject), subject.seed)
    loss = sums.ratio(losses.nats, np.ones(len(losses.nats)), bounds=(0, math.inf))
    found.add("loss", loss)
    found.add("perplexity", loss.map(lambda nats: math.exp(min(nats, 700))))  # e ** 710 is no float
    sizes = byte_lengths(subject.tokenizer)[conversations.tokens[losses.places]]
    found.add("bits_per_byte", sums.ratio(losses.nats / math.log(2), sizes, bounds=(0, math.inf)))
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


def add_context_use(found: Metrics, sums: dict[str, np.ndarray], subject: Subject) -> None:
    """Nats a token that a history is worth to a reply: its loss without any, minus its loss with that history.

    Fernandes et al. 2021, "Measuring and Increasing Context Usage in Context-Aware Machine Translation", for
    dialogues and by sums over tokens. `context_use` is that of the own history. Another dialogue's is worth something
    too, since a reply is unlike an opening whatever was said: only what the own is worth beyond that comes from what
    was said.

    Args:
        sums: (replies,) the summed loss of each under each history, and its `tokens`.
    """
    dialogues = Sums(np.array([dialogue for dialogue, _ in subject.replies]), subject.seed)
    worth = {name: dialogues.ratio(sums["none"] - sums[name], sums["tokens"]) for name in (*HISTORIES, "other")}
    found.add("context_use", worth["all"])
    found.add_group("context_use_by_turns", {name: worth[name] for name in HISTORIES if name != "none"})
    alone, needed = len({dialogue for dialogue, _ in subject.replies}) == 1, "needs two dialogues, there is one"
    beyond = dialogues.ratio(sums["other"] - sums["all"], sums["tokens"])
    found.add("context_use_beyond_other", None if alone else beyond, needed)
    found.add("context_use_of_other_history", None if alone else worth["other"], needed)


def add_coherence(found: Metrics, scorer: Scorer, subject: Subject) -> None:
    """Hits@1 and MRR of the true reply among up to 19 others, by the mean loss of a token of its text.

    The task of Dinan et al. 2019, "The Second Conversational Intelligence Challenge (ConvAI2)", where a
    language model's likelihood does the ranking.
    """
    dialogues = np.array([dialogue for dialogue, _ in subject.replies])
    contexts, candidates = make_candidates(subject.conversations, subject.replies, subject.length, subject.seed)
    others = min(map(len, candidates)) - 1
    if others < FEWEST_OTHERS:
        for name in COHERENCE:
            found.add(name, None, f"needs {FEWEST_OTHERS} other replies to choose from, there are {others}")
        return
    losses = [
        np.array([part.mean() for part in parts])
        for parts in scorer.continuation_losses(contexts, candidates, "coherence")
    ]
    ranks, sums, ones = metrics.ranks(losses), Sums(dialogues, subject.seed), np.ones(len(dialogues))
    found.add("hits_at_1", sums.ratio((ranks == 1).astype(float), ones, bounds=metrics.SHARE))
    found.add("mrr", sums.ratio(1 / ranks, ones, bounds=metrics.SHARE))
    found.add("chance_hits_at_1", float(np.mean([1 / len(each) for each in losses])))
