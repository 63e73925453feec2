"""A model's token losses: for whole dialogues, for replies after different histories, and for candidate replies.

All losses are negative log-likelihoods in nats, computed as in training: on the same tokens, under the same autocast.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dialogues.batches import IGNORED, DialogueDataset, Example, collate, evaluation_batches, round_up
from dialogues.conversations import Conversations
from gpt_model import GPTModel, KVCache
from talking.generation import check_finite, pad_left

HISTORIES = {"none": 0, "1": 1, "2": 2, "4": 4, "all": None}  # number of turns that the model sees before a reply
OTHERS = 19  # number of other replies to rank a reply among
COPYING = 8  # copying this many context tokens takes the memory of computing one


class Scorer(NamedTuple):
    """A model and its autocast."""

    model: GPTModel
    autocast: Callable[[], contextlib.AbstractContextManager[object]]
    padding_id: int

    @torch.inference_mode()
    def token_losses(self, examples: Sequence[Example], what: str) -> list[np.ndarray]:
        """The loss of each learned token of each example; `what` is the label of the progress bar."""
        self.model.eval()
        losses = [np.zeros(0)] * len(examples)
        with progress(what, len(examples)) as bar:
            for numbers in evaluation_batches([len(example.tokens) for example in examples]):
                inputs, targets = self.collate([examples[number] for number in numbers])
                with self.autocast():
                    flat = self.model(inputs, targets, reduction="none")
                for number, part in zip(numbers, split_rows(flat, targets), strict=True):
                    losses[number] = part
                bar.update(len(numbers))
        return losses

    @torch.inference_mode()
    def continuation_losses(
        self, contexts: Sequence[list[int]], continuations: Sequence[Sequence[list[int]]], what: str
    ) -> list[list[np.ndarray]]:
        """The token losses of each continuation of each context; a context is computed once for all its continuations.

        A context has at least one token. With a continuation, it may exceed the model's positions by one token.
        """
        self.model.eval()
        for context, branches in zip(contexts, continuations, strict=True):
            assert len(context) + max(map(len, branches)) <= self.model.config.n_positions + 1
        losses: list[list[np.ndarray]] = [[np.zeros(0)] * len(branches) for branches in continuations]
        with progress(what, len(contexts)) as bar:
            for numbers in evaluation_batches(list(map(len, contexts))):
                ids, padding = pad_left([contexts[number][:-1] for number in numbers], self.device)
                with self.autocast():
                    cache = KVCache(self.model.config, padding, ids.size(1))
                    self.model(ids, cache=cache)
                # Batch the continuations of all these contexts by length.
                places = [
                    (row, place) for row, number in enumerate(numbers) for place in range(len(continuations[number]))
                ]
                branches = [[contexts[numbers[row]][-1], *continuations[numbers[row]][place]] for row, place in places]
                for chosen in evaluation_batches([len(branch) + ids.size(1) // COPYING for branch in branches]):
                    parts = self.branch_losses(
                        cache, [places[branch][0] for branch in chosen], [branches[branch] for branch in chosen]
                    )
                    for branch, part in zip(chosen, parts, strict=True):
                        row, place = places[branch]
                        losses[numbers[row]][place] = part
                bar.update(len(numbers))
        return losses

    def branch_losses(self, cache: KVCache, rows: Sequence[int], branches: Sequence[list[int]]) -> list[np.ndarray]:
        """The losses of each branch's tokens after the first, where `branches[b]` continues the context `rows[b]`."""
        examples = [Example(np.array(branch), np.arange(len(branch)) > 0) for branch in branches]
        inputs, targets = self.collate(examples)
        with self.autocast():
            branched = BranchedCache(cache, rows, self.model.config.n_positions)
            return split_rows(self.model(inputs, targets, branched, reduction="none"), targets)

    @property
    def device(self) -> torch.device:
        return self.model.wpe.weight.device

    def collate(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """(B, T) inputs and targets on the model's device, with T rounded up, at most to the model's positions."""
        positions = self.model.config.n_positions
        inputs, targets = collate(examples, self.padding_id, lambda longest: min(round_up(longest), positions))
        return inputs.to(self.device), targets.to(self.device)


class BranchedCache(KVCache):
    """KV cache of contexts with several continuations each, for one forward pass over the continuations.

    Args:
        cache: the cache of the contexts, padded on the left.
        rows: (B,) the context that each row continues.
        n_positions: positions of the model. Padding on the right may exceed them; its positions don't matter.
    """

    def __init__(self, cache: KVCache, rows: Sequence[int], n_positions: int) -> None:
        self.rows, self.n_positions = torch.tensor(rows, device=cache.padding.device), n_positions
        self.keys, self.values = cache.keys, cache.values
        self.padding, self.length = cache.padding[self.rows], cache.length

    def positions(self, T: int) -> Tensor:
        """(B, T) positions of the next T tokens."""
        return super().positions(T).clamp(max=self.n_positions - 1)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, H, T, D) keys and values to those of their contexts, (B, H, S, D), copied one layer at a time."""
        keys, values = self.keys[layer, self.rows], self.values[layer, self.rows]
        return torch.cat([keys, k.to(keys.dtype)], dim=2), torch.cat([values, v.to(values.dtype)], dim=2)


def split_rows(flat: Tensor, targets: Tensor) -> list[np.ndarray]:
    """The losses of the learned targets of a batch (B, T), one array for each row.

    Raises:
        UserError: a loss is NaN or infinite.
    """
    learned = targets != IGNORED
    counts, losses = learned.sum(dim=1).tolist(), flat[learned.flatten()].float()
    check_finite(losses)
    return [part.double().cpu().numpy() for part in losses.split(counts)]


def progress(what: str, total: int) -> tqdm:
    """A progress bar, which appears after two seconds."""
    return tqdm(desc=what, total=total, delay=2, leave=False, disable=None)


class TokenLosses(NamedTuple):
    """The learned tokens of some dialogues: their indices among the tokens of all conversations, and their losses."""

    places: np.ndarray  # (tokens,)
    nats: np.ndarray  # (tokens,)


def score_tokens(scorer: Scorer, dataset: DialogueDataset, what: str) -> TokenLosses:
    """The loss of every token in `dataset` that counts in the training loss."""
    examples = [dataset[number] for number in range(len(dataset))]
    starts = dataset.spans[:, 0].tolist()
    places = [start + np.flatnonzero(learned) for start, (_, learned) in zip(starts, examples, strict=True)]
    return TokenLosses(np.concatenate(places), np.concatenate(scorer.token_losses(examples, what)))


class Reply(NamedTuple):
    """A turn that answers another: the index of its dialogue among all conversations, and its index in the dialogue."""

    dialogue: int
    turn: int


def choose_replies(conversations: Conversations, dialogues: np.ndarray, most: int, seed: int) -> list[Reply]:
    """Choose about `most` replies at random by `seed`: all replies of a few dialogues, or one reply of each of many.

    Each dialogue contributes the same number if it has enough. Only replies that the model learns are chosen: with
    `--learn Bob` those of Bob, and in instruction data the response.
    """
    random = np.random.default_rng(seed)
    if len(dialogues) > most:
        dialogues = np.sort(random.choice(dialogues, most, replace=False))
    each, replies = max(1, most // len(dialogues)), []
    for dialogue in dialogues.tolist():
        texts = conversations.texts_of(dialogue)
        said = conversations[dialogue].turns  # decoded, because an empty text still has a token for its space
        turns = np.array([turn for turn, (_, text) in enumerate(said) if turn and text], int)
        if conversations.renderer.name == "alpaca":
            turns = turns[turns == len(texts) - 1]
        elif conversations.learn not in ("all", "replies"):
            turns = turns[texts[turns, 2] == conversations.speakers.index(conversations.learn)]
        chosen = np.sort(random.permutation(turns)[:each])
        replies += [Reply(dialogue, turn) for turn in chosen.tolist()]
    return replies


class Pieces:
    """A dialogue's tokens in pieces, for assembling different histories."""

    def __init__(self, conversations: Conversations, dialogue: int) -> None:
        renderer, tokens = conversations.renderer, conversations.tokens_of(dialogue).tolist()
        texts = conversations.texts_of(dialogue).tolist()
        self.labels = [renderer.label(conversations.speakers[speaker]) for _, _, speaker in texts]
        ends = [end + len(renderer.stop) for _, end, _ in texts[:-1]] + [len(tokens)]
        self.texts = [tokens[start:end] for (start, _, _), end in zip(texts, ends, strict=True)]  # with the stops
        self.beginning = tokens[: texts[0][0] - len(self.labels[0])]  # the instruction

    def history(self, turn: int, recent: int | None = None) -> list[list[int]]:
        """The last `recent` turns before `turn` (None: all), each with its label."""
        first = 0 if recent is None else max(0, turn - recent)
        return [self.labels[place] + self.texts[place] for place in range(first, turn)]

    def history_of(self, other: "Pieces", turn: int) -> list[list[int]]:
        """The first `turn` turns of a different dialogue, never its last one, with the labels of this dialogue."""
        turn = min(turn, len(other.texts) - 1)
        return [label + text for label, text in zip(self.labels[:turn], other.texts[:turn], strict=True)]

    def context(self, label: Sequence[int], history: Sequence[list[int]], room: int) -> list[int]:
        """The tokens before a text, with its label, cut to `room` tokens: the oldest turns are dropped first."""
        history = list(history)
        while history and len(self.beginning) + sum(map(len, history)) + len(label) > room:
            del history[0]
        return [*self.beginning, *(token for piece in history for token in piece), *label][-room:]


class Histories(NamedTuple):
    """Replies, each after several histories.

    Attributes:
        examples: each reply after each of its histories; only the reply is learned.
        places: name of a history → index of each reply's example. In short dialogues, several names share an example.
    """

    examples: list[Example]
    places: dict[str, list[int]]

    def sums(self, losses: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """(replies,) the summed loss of each reply for each history, given the examples' losses; and their `tokens`.

        The keys are those of `HISTORIES`, and `other`: the beginning of a different dialogue with the same number of
        turns as the reply's own history (or all but the last turn of a shorter dialogue).
        """
        totals, sizes = np.array([part.sum() for part in losses]), np.array([len(part) for part in losses])
        return {name: totals[found] for name, found in self.places.items()} | {"tokens": sizes[self.places["all"]]}


def make_histories(conversations: Conversations, replies: Sequence[Reply], positions: int, seed: int) -> Histories:
    """Each reply after several histories, cut to the model's `positions`; `seed` selects the other dialogue."""
    pieces = {dialogue: Pieces(conversations, dialogue) for dialogue, _ in replies}
    others = exchange(list(pieces), seed)
    known: dict[tuple[int, ...], int] = {}
    found = Histories([], {name: [] for name in (*HISTORIES, "other")})
    for dialogue, turn in replies:
        own = pieces[dialogue]
        text = own.texts[turn][: positions // 2]
        for name, places in found.places.items():
            if name == "other":
                history = own.history_of(pieces[others[dialogue]], turn)
            else:
                history = own.history(turn, HISTORIES[name])
            context = own.context(own.labels[turn], history, positions + 1 - len(text))
            key = (dialogue, turn, *context)
            if key not in known:
                known[key] = len(found.examples)
                learned = np.arange(len(context) + len(text)) >= len(context)
                found.examples.append(Example(np.array(context + text), learned))
            places.append(known[key])
    return found


def exchange(dialogues: Sequence[int], seed: int) -> dict[int, int]:
    """Pair each dialogue with a different one (with itself if it is the only one)."""
    order = np.random.default_rng(seed).permutation(np.array(dialogues)).tolist()
    return dict(zip(order, [*order[1:], order[0]], strict=True))


def make_candidates(
    conversations: Conversations, replies: Sequence[Reply], positions: int, seed: int
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """For each reply, its context, and its text followed by up to 19 other candidates.

    The candidates are drawn by `seed` from the replies of other dialogues, and all are distinct. Contexts and texts
    are cut to the model's `positions`.
    """
    random, room = np.random.default_rng(seed), positions // 2
    pieces = {dialogue: Pieces(conversations, dialogue) for dialogue, _ in replies}
    texts = [text_tokens(conversations, reply)[:room] for reply in replies]
    contexts, candidates = [], []
    for place, (dialogue, turn) in enumerate(replies):
        own, others = pieces[dialogue], {tuple(texts[place])}
        for other in random.permutation(len(replies)).tolist():
            if len(others) > OTHERS:
                break
            if replies[other].dialogue != dialogue:
                others.add(tuple(texts[other]))
        contexts.append(own.context(own.labels[turn], own.history(turn), positions - room))
        others.discard(tuple(texts[place]))
        candidates.append([texts[place], *map(list, sorted(others))])
    return contexts, candidates


def text_tokens(conversations: Conversations, reply: Reply) -> list[int]:
    start, end, _ = conversations.texts_of(reply.dialogue)[reply.turn].tolist()
    return conversations.tokens_of(reply.dialogue)[start:end].tolist()
