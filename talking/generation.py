"""Generate text of any length in batches, greedily or by sampling."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from dialogues.dialogue import Dialogue, Turn
from dialogues.template import Renderer
from settings import SamplingSettings
from support.errors import UserError
from talking.decoder import Decoder

BATCH = 16  # prompts per batch; more would need more memory for the KV cache


class UnusableModelError(UserError):
    """The model's logits are NaN or infinite, so it can't generate."""


class Case(NamedTuple):
    """The start of a dialogue, its true continuation, and the continuation that a model wrote."""

    asked: tuple[Turn, ...]
    true: tuple[Turn, ...]
    written: tuple[Turn, ...]

    def as_texts(self, template: str) -> dict[str, str]:
        """An object in the output file: turns with speakers, or with the `alpaca` template only the texts."""
        if template == "alpaca":
            asked, true, written = (
                "\n\n".join(turn.text for turn in self.asked),
                self.true[0].text,
                self.written[0].text,
            )
        else:
            asked, true, written = (" ".join(map(str, turns)) for turns in self)
        return {"input": asked, "response": true, "model_response": written}


@dataclass(frozen=True)
class CompletionConfig:
    """How a model completes dialogues.

    Attributes:
        learn: the value of `--learn` in the model's training.
        one_turn: whether to write a single turn, as a model that has not learned `all` always does.
    """

    renderer: Renderer
    learn: str
    sampling: SamplingSettings
    seed: int
    one_turn: bool = False


def complete_dialogues(decoder: Decoder, dialogues: Sequence[Dialogue], config: CompletionConfig) -> list[Case]:
    """Complete each dialogue with the model, and pair its continuation with the true one.

    A model that has learned `all` writes everything after the opening turn, or with `one_turn` only the next turn. A
    model that has learned replies or one speaker can't choose the next speaker, so it writes the first turn of the kind
    it has learned. With the `alpaca` template, it writes the response.
    """
    turns = [choose_turn(config.renderer, dialogue, config.learn) for dialogue in dialogues]
    return complete_turns(decoder, list(zip(dialogues, turns, strict=True)), config)


def complete_turns(decoder: Decoder, places: Sequence[tuple[Dialogue, int]], config: CompletionConfig) -> list[Case]:
    """Continue each dialogue from the given turn on; see `complete_dialogues`."""
    renderer = config.renderer
    one_turn = config.one_turn or config.learn != "all"
    stop = renderer.stop if one_turn and renderer.name != "labels" else []  # a newline does not always end the turn
    bounds = Bounds(renderer.tokenizer.eot_token, renderer.newest_turns, stop)
    prompts = [renderer.encode_prompt(dialogue, turn) for dialogue, turn in places]
    replies: list[list[int]] = []
    starts = range(0, len(prompts), BATCH)
    for start in tqdm(starts, desc="generating", unit="batch", delay=2, leave=False, disable=None):
        batch = prompts[start : start + BATCH]
        replies += generate(decoder, batch, bounds, config.sampling, config.seed + start)
    cases = []
    for (dialogue, turn), reply in zip(places, replies, strict=True):
        speakers = [speaker for speaker, _ in dialogue.turns]
        written = renderer.parse_turns(renderer.tokenizer.decode(reply), speakers[turn], speakers)
        written = written[:1] if one_turn else written
        cases.append(Case(dialogue.turns[:turn], dialogue.turns[turn:], tuple(written)))
    return cases


def choose_turn(renderer: Renderer, dialogue: Dialogue, learn: str) -> int:
    """The index of the first turn that the model writes."""
    if renderer.name == "alpaca":
        return len(dialogue.turns) - 1
    spoken = (turn for turn, (speaker, _) in enumerate(dialogue.turns) if turn and speaker == learn)
    return next(spoken, 1)


@dataclass(frozen=True)
class Bounds:
    """When a text ends, and how to shorten one that exceeds the model's context.

    Attributes:
        end_id: the token that ends a text; it is not part of the result.
        shorten: `shorten(tokens, limit)` returns the last part of a text, at most `limit` tokens, to continue from.
        stop: a sequence of tokens that also ends a text; it is part of the result.
    """

    end_id: int
    shorten: Callable[[list[int], int], list[int]] = lambda tokens, limit: tokens[-limit:]
    stop: Sequence[int] = ()


@torch.inference_mode()
def generate(
    decoder: Decoder, prompts: Sequence[list[int]], bounds: Bounds, settings: SamplingSettings, seed: int
) -> list[list[int]]:
    """Continue each prompt until the model ends it or `settings.max_new_tokens` are written.

    Greedy results equal those of each prompt alone, and those of transformers' `generate`.

    Args:
        prompts: token ids, one or more for each prompt; lengths may differ.
        seed: for sampling at a temperature above 0.
    """
    device = decoder.device
    generator = torch.Generator(device).manual_seed(seed)
    positions = decoder.config.n_positions
    texts = {row: list(prompt) for row, prompt in enumerate(prompts)}  # the model's input for each unfinished row
    replies: list[list[int]] = [[] for _ in prompts]
    stop, left = bounds.stop, settings.max_new_tokens
    while texts and left:
        outgrown = [row for row, text in texts.items() if len(text) > positions]
        texts |= {row: bounds.shorten(texts[row], positions // 2) for row in outgrown}
        rows = list(texts)
        ids, padding = pad_left(list(texts.values()), device)
        decoding = decoder.start(padding, capacity=min(positions, ids.size(1) + left))
        while texts and left and decoding.cache.length + ids.size(1) <= positions:
            logits = decoding.next_logits(ids)  # (B, V)
            penalize_repetition(logits, [prompts[row] + replies[row] for row in rows], settings.repetition_penalty)
            ids = draw(logits, settings, generator)  # (B, 1)
            left -= 1
            for row, token in zip(rows, ids[:, 0].tolist(), strict=True):
                if row in texts and token == bounds.end_id:
                    del texts[row]
                elif row in texts:
                    texts[row].append(token)
                    replies[row].append(token)
                    if stop and replies[row][-len(stop) :] == stop:
                        del texts[row]
    return replies


def pad_left(texts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Texts as (B, T) ids, aligned at their ends, and the (B,) numbers of padding tokens on their left.

    Padding is masked, so its id does not matter.
    """
    T = max(map(len, texts))
    padding = [T - len(text) for text in texts]
    ids = [[0] * pad + text for pad, text in zip(padding, texts, strict=True)]
    return torch.tensor(ids, dtype=torch.long, device=device), torch.tensor(padding, device=device)


def penalize_repetition(logits: Tensor, texts: Sequence[list[int]], penalty: float) -> None:
    """Make the tokens of each text less likely, in place (Keskar et al. 2019, "CTRL", section 4.1).

    A logit above 0 is divided by `penalty`, one below 0 multiplied, as in transformers.
    """
    if penalty == 1:
        return
    for row, text in zip(logits, texts, strict=True):
        used = torch.tensor(sorted(set(text)), dtype=torch.long, device=logits.device)
        row[used] = torch.where(row[used] > 0, row[used] / penalty, row[used] * penalty)


def draw(logits: Tensor, settings: SamplingSettings, generator: torch.Generator) -> Tensor:
    """(B, V) logits → (B, 1) tokens: the most likely ones at temperature 0, else sampled after top-k and top-p.

    Top-p keeps the smallest set of tokens whose probabilities sum to p or more (Holtzman et al. 2020, "The Curious
    Case of Neural Text Degeneration"): always the most likely one, however small p is.

    Raises:
        UnusableModelError: a logit is NaN or infinite.
    """
    if settings.temperature == 0:
        tokens = logits.argmax(dim=-1, keepdim=True)
        check_finite(logits.gather(-1, tokens))  # `argmax` treats NaN as the largest number
        return tokens
    logits = logits.float()
    # Shift the highest logit to 0: a large one divided by a low temperature would overflow.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / settings.temperature
    if settings.top_k:
        kept = logits.topk(min(settings.top_k, logits.size(-1))).values
        logits = logits.masked_fill(logits < kept[:, -1:], -torch.inf)
    if settings.top_p < 1:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        reached = ordered.cumsum(dim=-1) - ordered >= settings.top_p  # the tokens before this one already sum to p
        reached[:, 0] = False  # p may underflow to 0 in fp32
        logits = logits.masked_fill(reached.scatter(-1, order, reached), -torch.inf)
    probabilities = logits.softmax(dim=-1)
    check_finite(probabilities[:, :1])  # one NaN makes its whole row NaN
    return torch.multinomial(probabilities, 1, generator=generator)


def check_finite(values: Tensor) -> None:
    """Raise `UnusableModelError` if any of a model's `values` is NaN or infinite."""
    if not values.isfinite().all():
        raise UnusableModelError(
            "the model's logits are NaN or infinite: its weights are damaged, or too large for this precision;"
            " download or train it again, or try --precision fp32"
        )
