"""How likely a model finds what was said: each token, each reply under other histories, and other replies in its place.

Everything here is a negative log-likelihood in nats, computed as in training: the same tokens, under the same
autocast.
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

HISTORIES = {"none": 0, "1": 1, "2": 2, "4": 4, "all": None}  # how many turns before a reply the model sees
OTHERS = 19  # turns that a reply is ranked among
COPYING = 8  # tokens of a context to be copied take the room of one to be computed


class Scorer(NamedTuple):
    """A model, and what it computes in."""

    model: GPTModel
    autocast: Callable[[], contextlib.AbstractContextManager[object]]
    padding_id: int

    @torch.inference_mode()
    def token_losses(self, examples: Sequence[Example], what: str) -> list[np.ndarray]:
        """The loss of each learned token of each example. `what` is computed stands beside the progress bar."""
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
        """The losses of the tokens of each of the continuations of each context, which is computed once for all.

        A context has at least one token; with a continuation it may be one longer than there are positions.
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
                # What goes on from any of these contexts, in batches of similar length.
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
        """The losses of the tokens of each branch after its first, where `branches[b]` goes on from row `rows[b]`."""
        examples = [Example(np.array(branch), np.arange(len(branch)) > 0) for branch in branches]
        inputs, targets = self.collate(examples)
        with self.autocast():
            branched = BranchedCache(cache, rows, self.model.config.n_positions)
            return split_rows(self.model(inputs, targets, branched, reduction="none"), targets)

    @property
    def device(self) -> torch.device:
        return self.model.wpe.weight.device

    def collate(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """(B, T) inputs and targets on the model's device, T rounded up as far as the model's positions go."""
        positions = self.model.config.n_positions
        inputs, targets = collate(examples, self.padding_id, lambda longest: min(round_up(longest), positions))
        return inputs.to(self.device), targets.to(self.device)


class BranchedCache(KVCache):
    """Keys and values of contexts, each of which goes on in several ways, for one pass over these.

    Args:
        cache: of the contexts, aligned at their ends.
        rows: (B,) which of them each row goes on from.
        n_positions: of the model. Padding behind a row may lie past them; any position does for it.
    """

    def __init__(self, cache: KVCache, rows: Sequence[int], n_positions: int) -> None:
        self.rows, self.n_positions = torch.tensor(rows, device=cache.padding.device), n_positions
        self.keys, self.values = cache.keys, cache.values
        self.padding, self.length = cache.padding[self.rows], cache.length

    def positions(self, T: int) -> Tensor:
        """(B, T) positions of the next T tokens."""
        return super().positions(T).clamp(max=self.n_positions - 1)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, T, D) keys and values behind those of their contexts, (B, H, S, D). Copied for one layer at a time."""
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
    """A bar for what takes longer than a moment."""
    return tqdm(desc=what, total=total, delay=2, leave=False, disable=None)


class TokenLosses(NamedTuple):
    """The learned tokens of some dialogues: their places in the tokens of all conversations, and the loss of each."""

    places: np.ndarray  # (tokens,)
    nats: np.ndarray  # (tokens,)


def score_tokens(scorer: Scorer, dataset: DialogueDataset, what: str) -> TokenLosses:
    """The loss of everything in `dataset` that a training on it would learn."""
    examples = [dataset[number] for number in range(len(dataset))]
    starts = dataset.spans[:, 0].tolist()
    places = [start + np.flatnonzero(learned) for start, (_, learned) in zip(starts, examples, strict=True)]
    return TokenLosses(np.concatenate(places), np.concatenate(scorer.token_losses(examples, what)))


class Reply(NamedTuple):
    """A turn that answers something: the place of its dialogue among all conversations, and its own in the dialogue."""

    dialogue: int
    turn: int


def choose_replies(conversations: Conversations, dialogues: np.ndarray, most: int, seed: int) -> list[Reply]:
    """At most about `most` replies, as many of each dialogue: of few dialogues all, of many one each, drawn by `seed`.

    They are of the kind that the model learns: with `--learn Bob` Bob's, of instruction data the response.
    """
    random = np.random.default_rng(seed)
    if len(dialogues) > most:
        dialogues = np.sort(random.choice(dialogues, most, replace=False))
    each, replies = max(1, most // len(dialogues)), []
    for dialogue in dialogues.tolist():
        texts = conversations.texts_of(dialogue)
        said = conversations[dialogue].turns  # decoded: a text's space has a token even where there is no text
        turns = np.array([turn for turn, (_, text) in enumerate(said) if turn and text], int)
        if conversations.renderer.name == "alpaca":
            turns = turns[turns == len(texts) - 1]
        elif conversations.learn not in ("all", "replies"):
            turns = turns[texts[turns, 2] == conversations.speakers.index(conversations.learn)]
        chosen = np.sort(random.permutation(turns)[:each])
        replies += [Reply(dialogue, turn) for turn in chosen.tolist()]
    return replies


class Pieces:
    """A dialogue's tokens in the pieces of which other histories are made."""

    def __init__(self, conversations: Conversations, dialogue: int) -> None:
        renderer, tokens = conversations.renderer, conversations.tokens_of(dialogue).tolist()
        texts = conversations.texts_of(dialogue).tolist()
        self.labels = [renderer.label(conversations.speakers[speaker]) for _, _, speaker in texts]
        ends = [end + len(renderer.stop) for _, end, _ in texts[:-1]] + [len(tokens)]
        self.texts = [tokens[start:end] for (start, _, _), end in zip(texts, ends, strict=True)]  # with their stops
        self.beginning = tokens[: texts[0][0] - len(self.labels[0])]  # the instruction

    def history(self, turn: int, recent: int | None = None) -> list[list[int]]:
        """The `recent` turns before `turn` (none: all), each with its label."""
        first = 0 if recent is None else max(0, turn - recent)
        return [self.labels[place] + self.texts[place] for place in range(first, turn)]

    def history_of(self, other: "Pieces", turn: int) -> list[list[int]]:
        """What was said in another dialogue before its turn of that number, as if the speakers of this one said it."""
        turn = min(turn, len(other.texts) - 1)
        return [label + text for label, text in zip(self.labels[:turn], other.texts[:turn], strict=True)]

    def context(self, turn: int, history: Sequence[list[int]], room: int) -> list[int]:
        """What a model sees before it says `turn`, as much as fits into `room`: older turns go first."""
        label, history = self.labels[turn], list(history)
        while history and len(self.beginning) + sum(map(len, history)) + len(label) > room:
            del history[0]
        return (self.beginning + [token for piece in history for token in piece] + label)[-room:]


class Histories(NamedTuple):
    """Replies under several histories.

    Attributes:
        examples: each reply behind each of its histories, of which only the reply is learned.
        places: name of a history → the example of each reply. Short dialogues have the same by several names.
    """

    examples: list[Example]
    places: dict[str, list[int]]

    def sums(self, losses: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """(replies,) of each history the summed loss of each reply, from those of the examples; `tokens` their tokens.

        By the names of `HISTORIES`; and `other`: the beginning of another dialogue, of as many turns as its own (or
        all but the last, where that one is shorter).
        """
        totals, sizes = np.array([part.sum() for part in losses]), np.array([len(part) for part in losses])
        return {name: totals[found] for name, found in self.places.items()} | {"tokens": sizes[self.places["all"]]}


def make_histories(conversations: Conversations, replies: Sequence[Reply], positions: int, seed: int) -> Histories:
    """Each reply under several histories, for a model of so many `positions`; by `seed` that of another dialogue."""
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
            context = own.context(turn, history, positions + 1 - len(text))
            key = (dialogue, turn, *context)
            if key not in known:
                known[key] = len(found.examples)
                learned = np.arange(len(context) + len(text)) >= len(context)
                found.examples.append(Example(np.array(context + text), learned))
            places.append(known[key])
    return found


def exchange(dialogues: Sequence[int], seed: int) -> dict[int, int]:
    """For each dialogue another one (itself only where it is alone)."""
    order = np.random.default_rng(seed).permutation(np.array(dialogues)).tolist()
    return dict(zip(order, [*order[1:], order[0]], strict=True))


def make_candidates(
    conversations: Conversations, replies: Sequence[Reply], positions: int, seed: int
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """For each reply what comes before it; and its text, and behind it up to 19 other texts that could stand there.

    These are drawn by `seed` from the replies of other dialogues; none says the same as another. Both are cut so that
    they fit into so many `positions` of a model.
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
        contexts.append(own.context(turn, own.history(turn), positions - room))
        others.discard(tuple(texts[place]))
        candidates.append([texts[place], *map(list, sorted(others))])
    return contexts, candidates


def text_tokens(conversations: Conversations, reply: Reply) -> list[int]:
    start, end, _ = conversations.texts_of(reply.dialogue)[reply.turn].tolist()
    return conversations.tokens_of(reply.dialogue)[start:end].tolist()
