"""Text from a model: greedy or drawn, many prompts at once, as long as one likes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dialogues.dialogue import Dialogue
from dialogues.template import Renderer
from gpt_model import GPTModel, KVCache
from settings import GenerationSettings

BATCH = 16  # prompts at a time: their keys and values take memory


def complete_dialogues(
    model: GPTModel,
    renderer: Renderer,
    dialogues: Sequence[Dialogue],
    settings: GenerationSettings,
    seed: int,
) -> list[dict[str, str]]:
    """Let the model write the rest of each dialogue from its opening turn, beside the rest as it really went.

    With the `alpaca` template it writes the last turn, the response.
    """
    alone = renderer.name == "alpaca"
    prompts = [renderer.encode_prompt(dialogue, len(dialogue.turns) - 1 if alone else 1) for dialogue in dialogues]
    end_of_text = renderer.tokenizer.eot_token
    replies: list[list[int]] = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        replies += generate(model, batch, end_of_text, settings, seed + start, renderer.newest_turns)
    make_case = make_answer_case if alone else make_dialogue_case
    return [make_case(renderer, dialogue, reply) for dialogue, reply in zip(dialogues, replies, strict=True)]


def make_dialogue_case(renderer: Renderer, dialogue: Dialogue, reply: list[int]) -> dict[str, str]:
    """The opening turn, the others, and the model's, each with its speaker."""
    opening, *true = dialogue.turns
    speakers = [turn.speaker for turn in dialogue.turns]
    generated = renderer.parse_turns(renderer.tokenizer.decode(reply), true[0].speaker, speakers)
    return {
        "input": str(opening),
        "response": " ".join(map(str, true)),
        "model_response": " ".join(map(str, generated)),
    }


def make_answer_case(renderer: Renderer, dialogue: Dialogue, reply: list[int]) -> dict[str, str]:
    """The instruction with its input, the response, and the model's, alone."""
    *asked, answer = dialogue.turns
    generated = renderer.parse_turns(renderer.tokenizer.decode(reply), answer.speaker, [])
    return {
        "input": "\n\n".join(turn.text for turn in asked),
        "response": answer.text,
        "model_response": generated[0].text,
    }


@torch.inference_mode()
def generate(
    model: GPTModel,
    prompts: Sequence[list[int]],
    end_id: int,
    settings: GenerationSettings,
    seed: int,
    shorten: Callable[[list[int], int], list[int]],
) -> list[list[int]]:
    """Continue each prompt until the model ends it or `settings.max_new_tokens` are written.

    Greedy results are those of each prompt alone, and those of transformers' `generate`.

    Args:
        prompts: token ids, one or more for each prompt; lengths may differ.
        end_id: the token with which the model ends a text; it is not part of the result.
        seed: for what is drawn at a temperature above 0.
        shorten: `shorten(tokens, limit)` returns the end of a text that has outgrown the positions, to go on from.
    """
    model.eval()
    device = model.wte.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    positions = model.config.n_positions
    texts = {row: list(prompt) for row, prompt in enumerate(prompts)}  # what the model sees, of the rows not yet ended
    replies: list[list[int]] = [[] for _ in prompts]
    left = settings.max_new_tokens
    while texts and left:
        texts = {row: text if len(text) <= positions else shorten(text, positions // 2) for row, text in texts.items()}
        rows = list(texts)
        ids, padding = pad_left(list(texts.values()), device)
        cache = KVCache(model.config, padding, capacity=min(positions, ids.size(1) + left))
        while texts and left and cache.length + ids.size(1) <= positions:
            logits = model.next_token_logits(ids, cache)  # (B, V)
            penalize_repetition(logits, [prompts[row] + replies[row] for row in rows], settings.repetition_penalty)
            ids = draw(logits, settings, generator)  # (B, 1)
            left -= 1
            for row, token in zip(rows, ids[:, 0].tolist(), strict=True):
                if row in texts and token == end_id:
                    del texts[row]
                elif row in texts:
                    texts[row].append(token)
                    replies[row].append(token)
    return replies


def pad_left(texts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Texts as (B, T), aligned at their ends, where they go on, and how much padding each has at its left, (B,).

    Any id will do as padding: nothing looks at it.
    """
    T = max(map(len, texts))
    padding = [T - len(text) for text in texts]
    ids = [[0] * pad + text for pad, text in zip(padding, texts, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(padding, device=device)


def penalize_repetition(logits: Tensor, texts: Sequence[list[int]], penalty: float) -> None:
    """Make the tokens of each text less likely, in place (Keskar et al. 2019, "CTRL", section 4.1).

    A logit above 0 is divided by `penalty`, one below 0 multiplied, as in transformers.
    """
    if penalty == 1:
        return
    for row, text in zip(logits, texts, strict=True):
        used = torch.tensor(sorted(set(text)), device=logits.device)
        row[used] = torch.where(row[used] > 0, row[used] / penalty, row[used] * penalty)


def draw(logits: Tensor, settings: GenerationSettings, generator: torch.Generator) -> Tensor:
    """(B, V) logits → (B, 1) tokens: the likeliest at temperature 0, else drawn from what top-k and top-p leave.

    Top-p keeps the smallest set of tokens whose probabilities reach p (Holtzman et al. 2020, "The Curious Case of
    Neural Text Degeneration").
    """
    if settings.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / settings.temperature
    if settings.top_k:
        kept = logits.topk(min(settings.top_k, logits.size(-1))).values
        logits = logits.masked_fill(logits < kept[:, -1:], -torch.inf)
    if settings.top_p < 1:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        reached = ordered.cumsum(dim=-1) - ordered >= settings.top_p  # without this token p is reached already
        logits = logits.masked_fill(reached.scatter(-1, order, reached), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
