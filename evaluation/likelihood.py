"""Likelihood metrics of a model: loss, context use and coherence, with their intervals."""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import tiktoken

from dialogues.batches import DialogueDataset
from dialogues.conversations import Conversations
from evaluation import metrics
from evaluation.metrics import Estimate
from evaluation.results import Metrics, TooFew
from evaluation.scoring import HISTORIES, Reply, Scorer, TokenLosses, make_candidates, make_histories, score_tokens
from settings import GenerationSettings

FEWEST_OTHERS = 9  # minimum number of other replies to rank a reply among
MOST_SPEAKERS = 50
MOST_TURNS = 20  # number of turns with a separate loss; later turns share one


class Subject(NamedTuple):
    """The data and options of a measurement.

    Attributes:
        datasets: the dialogues of each part; the loss is measured on every part.
        part: the held-out part, a key of `datasets`; all other metrics are measured on it.
        replies: turns that are scored after several histories and ranked among others.
        voices: turns whose speaker the model guesses.
        answered: the dialogues that get a generated reply; the first `generation.cases` are shown.
        reply_tokens: maximum tokens of a reply to measure, because a model may not have learned to stop.
        training: returns the turns of each training dialogue; None if they are unknown.
        trained: the numbers of the training dialogues among all conversations; None if they are unknown.
        autocast: the precision that the models compute in.
    """

    conversations: Conversations
    datasets: dict[str, DialogueDataset]
    part: str
    replies: list[Reply]
    voices: list[Reply]
    answered: list[int]
    training: Callable[[], Iterable[Sequence[str]]] | None
    generation: GenerationSettings
    reply_tokens: int
    seed: int
    autocast: Callable[[], contextlib.AbstractContextManager[object]]
    trained: np.ndarray | None = None

    @property
    def length(self) -> int:
        """The maximum number of tokens that a model sees at once."""
        return self.datasets[self.part].max_length

    @property
    def short_sampling(self) -> GenerationSettings:
        """The settings for writing a reply that is measured and not shown."""
        tokens = min(self.reply_tokens, self.generation.max_new_tokens)
        return replace(self.generation, max_new_tokens=tokens)

    @property
    def tokenizer(self) -> tiktoken.Encoding:
        return self.conversations.renderer.tokenizer


class Sums:
    """Sums per dialogue, and their ratios with intervals."""

    def __init__(self, dialogues: np.ndarray, seed: int) -> None:
        """`dialogues` holds the dialogue number of each item to sum."""
        self.seed = seed
        self.places = np.unique(dialogues, return_inverse=True)[1]

    def ratio(
        self,
        numerators: np.ndarray,
        denominators: np.ndarray,
        where: np.ndarray | None = None,
        bounds: tuple[float, float] = (-math.inf, math.inf),
    ) -> Estimate:
        """Σ numerators / Σ denominators of the items selected by `where`; the interval resamples whole dialogues."""
        chosen = np.ones(len(self.places), bool) if where is None else where
        size = self.places.max() + 1
        above, below = (np.bincount(self.places[chosen], values[chosen], size) for values in (numerators, denominators))
        there = np.bincount(self.places[chosen], minlength=size) > 0
        return metrics.ratio(above[there], below[there], self.seed, bounds)


def measure_likelihood(scorer: Scorer, subject: Subject) -> tuple[Metrics, np.ndarray]:
    """Measure the loss, context use and coherence of a model.

    Also return (held-out dialogues, 2): the summed loss of each dialogue, in nats, and its number of tokens.
    """
    found, sums, parts = Metrics(), np.zeros((0, 2)), {}
    for name, dataset in subject.datasets.items():
        losses = score_tokens(scorer, dataset, f"loss on {name}")
        parts[name] = loss_metrics(losses, subject)
        if name == subject.part:
            found, dialogues = parts[name].joined(loss_by_turn(losses, subject)), dialogues_of(losses, subject)
            sums = np.stack([np.bincount(dialogues, losses.nats), np.bincount(dialogues)], axis=1)
    found = replace(found, loss_by_part=parts)
    if subject.replies:
        histories = make_histories(subject.conversations, subject.replies, subject.length, subject.seed)
        found = found.joined(context_use(histories.sums(scorer.token_losses(histories.examples, "context")), subject))
        found = found.joined(coherence(scorer, subject))
    else:
        needs = TooFew("needs a reply, but every learned turn is the first of its dialogue")
        context = Metrics(context_use=needs, context_use_beyond_other=needs, context_use_of_other_history=needs)
        found = found.joined(context).joined(Metrics(hits_at_1=needs, chance_hits_at_1=needs))
    return found, sums[sums[:, 1] > 0]


def dialogues_of(losses: TokenLosses, subject: Subject) -> np.ndarray:
    """(tokens,) the dialogue that each token belongs to, as its index among all conversations."""
    return np.searchsorted(subject.conversations.starts, losses.places, side="right") - 1


def loss_metrics(losses: TokenLosses, subject: Subject) -> Metrics:
    """Loss in nats per token, perplexity exp(loss), and bits per byte, which is independent of the vocabulary.

    Bytes are those of the learned text in UTF-8. Special tokens have no bytes, but their nats count.
    """
    sums = Sums(dialogues_of(losses, subject), subject.seed)
    loss = sums.ratio(losses.nats, np.ones(len(losses.nats)), bounds=(0, math.inf))
    sizes = byte_lengths(subject.tokenizer)[subject.conversations.tokens[losses.places]]
    return Metrics(
        loss=loss,
        perplexity=loss.map(lambda nats: math.exp(min(nats, 700))),  # e ** 710 overflows
        bits_per_byte=sums.ratio(losses.nats / math.log(2), sizes, bounds=(0, math.inf)),
    )


def byte_lengths(tokenizer: tiktoken.Encoding) -> np.ndarray:
    """(n_vocab,) the number of bytes in each token's text; 0 for special tokens."""
    sizes = np.zeros(tokenizer.n_vocab)
    for token, number in tokenizer._mergeable_ranks.items():
        sizes[number] = len(token)
    sizes[list(tokenizer._special_tokens.values())] = 0
    return sizes


def loss_by_turn(losses: TokenLosses, subject: Subject) -> Metrics:
    """The loss for each speaker, and for the first, second, ... turn; only texts and their stops count."""
    conversations = subject.conversations
    starts, ends = conversations.turn_spans()
    turns = np.searchsorted(starts, losses.places, side="right") - 1
    said = (turns >= 0) & (losses.places < ends[turns])  # not a label or an instruction
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
    return Metrics(loss_by_speaker=by_speaker, loss_by_turn=by_turn)


def context_use(sums: dict[str, np.ndarray], subject: Subject) -> Metrics:
    """The gain from a history, in nats per token: the loss of a reply without it minus the loss with it.

    Fernandes et al. 2021, "Measuring and Increasing Context Usage in Context-Aware Machine Translation", applied to
    dialogues, with sums over tokens. `context_use` is the gain from the reply's own history. Another dialogue's history
    helps too: it shows that the reply does not open the dialogue. Only the additional gain comes from the content.

    Args:
        sums: (replies,) the summed loss of each reply after each history, and the number of `tokens` in each reply.
    """
    dialogues = Sums(np.array([dialogue for dialogue, _ in subject.replies]), subject.seed)
    worth = {name: dialogues.ratio(sums["none"] - sums[name], sums["tokens"]) for name in (*HISTORIES, "other")}
    beyond, other = dialogues.ratio(sums["other"] - sums["all"], sums["tokens"]), worth["other"]
    if len({dialogue for dialogue, _ in subject.replies}) == 1:
        beyond = other = TooFew("needs two dialogues, but there is one")
    return Metrics(
        context_use=worth["all"],
        context_use_by_turns={name: worth[name] for name in HISTORIES if name != "none"},
        context_use_beyond_other=beyond,
        context_use_of_other_history=other,
    )


def coherence(scorer: Scorer, subject: Subject) -> Metrics:
    """Hits@1 of the true reply among up to 19 others, ranked by the mean loss of their texts' tokens.

    This is the task of Dinan et al. 2019, "The Second Conversational Intelligence Challenge (ConvAI2)", with a language
    model's likelihood as the score.
    """
    dialogues = np.array([dialogue for dialogue, _ in subject.replies])
    contexts, candidates = make_candidates(subject.conversations, subject.replies, subject.length, subject.seed)
    others = min(map(len, candidates)) - 1
    if others < FEWEST_OTHERS:
        few = TooFew(f"needs {FEWEST_OTHERS} other replies, but there are {others}")
        return Metrics(hits_at_1=few, chance_hits_at_1=few)
    losses = [
        np.array([part.mean() for part in parts])
        for parts in scorer.continuation_losses(contexts, candidates, "coherence")
    ]
    ranks, sums, ones = metrics.ranks(losses), Sums(dialogues, subject.seed), np.ones(len(dialogues))
    return Metrics(
        hits_at_1=sums.ratio((ranks == 1).astype(float), ones, bounds=metrics.SHARE),
        chance_hits_at_1=Estimate(float(np.mean([1 / len(each) for each in losses]))),
    )
