"""The main job with a plain textbook implementation (after Raschka 2024, "Build a Large Language Model (From Scratch)",
chapters 4, 5 and 7): attention with explicit weights, normalisation and GELU written out, PyTorch's default AdamW,
logits and gradients for every position, and generation without a KV cache. Usage: `textbook.py main_job JSON`.
"""

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from dialogues.tokenizer import load_tokenizer
from material import BUNDLED_DATA, END_OF_TEXT, opening, read_dialogues, render
from measure import run_task

BATCH, CASES = 2, 3


class LayerNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        variance = x.var(dim=-1, keepdim=True, unbiased=False)
        return self.scale * (x - mean) / torch.sqrt(variance + 1e-5) + self.shift


class GELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Attention(nn.Module):
    mask: Tensor

    def __init__(self, width: int, heads: int, positions: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.register_buffer("mask", torch.triu(torch.ones(positions, positions), diagonal=1).bool())

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            layer(x).view(B, T, self.heads, C // self.heads).transpose(1, 2)  # (B, H, T, D)
            for layer in (self.query, self.key, self.value)
        )
        scores = (q @ k.transpose(2, 3)).masked_fill(self.mask[:T, :T], -torch.inf)  # (B, H, T, T)
        weights = torch.softmax(scores / k.size(-1) ** 0.5, dim=-1)
        return self.out((weights @ v).transpose(1, 2).contiguous().view(B, T, C))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, positions: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attention = Attention(width, heads, positions)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class Model(nn.Module):
    """(B, T) token ids → (B, T, V) logits. The head shares the weights of the token embedding."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, heads, positions = config["n_embd"], config["n_head"], config["n_positions"]
        self.tokens = nn.Embedding(config["vocab_size"], width)
        self.positions = nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(Block(width, heads, positions) for _ in range(config["n_layer"])))
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, config["vocab_size"], bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.size(1), device=ids.device))
        return self.head(self.norm(self.blocks(x)))


def load(folder: Path) -> Model:
    """The model with the weights of a published folder, which stores matrices input-first."""
    model = Model(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    stored = load_file(folder / "model.safetensors")
    values = {"tokens.weight": stored["wte.weight"], "positions.weight": stored["wpe.weight"]}
    values |= {"norm.scale": stored["ln_f.weight"], "norm.shift": stored["ln_f.bias"]}
    for number in range(len(model.blocks)):
        block, source = f"blocks.{number}", f"h.{number}"
        for part in ("weight", "bias"):
            matrix = Tensor.t if part == "weight" else Tensor.clone
            for name, value in zip(
                ("query", "key", "value"), stored[f"{source}.attn.c_attn.{part}"].chunk(3, dim=-1), strict=True
            ):
                values[f"{block}.attention.{name}.{part}"] = matrix(value)
            values[f"{block}.attention.out.{part}"] = matrix(stored[f"{source}.attn.c_proj.{part}"])
            values[f"{block}.feed_forward.0.{part}"] = matrix(stored[f"{source}.mlp.c_fc.{part}"])
            values[f"{block}.feed_forward.2.{part}"] = matrix(stored[f"{source}.mlp.c_proj.{part}"])
            name = "scale" if part == "weight" else "shift"
            values[f"{block}.norm1.{name}"] = stored[f"{source}.ln_1.{part}"]
            values[f"{block}.norm2.{name}"] = stored[f"{source}.ln_2.{part}"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    return model


def main_job(folder: str, epochs: int, new_tokens: int, device: str) -> dict[str, Any]:
    """Train, evaluate, save, and complete three dialogues, in fp32."""
    torch.manual_seed(123)
    model, tokenizer = load(Path(folder)).to(device), load_tokenizer(Path(folder))
    dialogues = read_dialogues(BUNDLED_DATA)
    encoded = [tokenizer.encode(render(turns), allowed_special={END_OF_TEXT}) for turns in dialogues]
    cut = len(encoded) * 7 // 10
    train, val = encoded[:cut], encoded[cut:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.1)
    print(f"train loss {evaluate(model, train, device):.3f}, validation loss {evaluate(model, val, device):.3f}")
    chance = random.Random(123)
    for epoch in range(epochs):
        model.train()
        for batch in batches(chance.sample(train, len(train))):
            optimizer.zero_grad()
            loss = batch_loss(model, batch, tokenizer.eot_token, device)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            print(f"loss {loss.item():.3f}")
        print(f"epoch {epoch + 1}: validation loss {evaluate(model, val, device):.3f}")
    print(f"train loss {evaluate(model, train, device):.3f}")
    torch.save(model.state_dict(), "model.pth")
    written = []
    for turns in dialogues[cut:][:CASES]:
        prompt = tokenizer.encode_ordinary(opening(turns))
        ids = write(model, torch.tensor([prompt], device=device), new_tokens)
        written.append(ids.size(1) - len(prompt))
        print(tokenizer.decode(ids[0].tolist()))
    return {"tokens_written": written}


def batches(examples: list[list[int]]) -> list[list[list[int]]]:
    return [examples[start : start + BATCH] for start in range(0, len(examples), BATCH)]


def batch_loss(model: Model, examples: list[list[int]], padding_id: int, device: str) -> Tensor:
    """Mean loss of a batch, padded to its longest example; padding is ignored."""
    T = max(map(len, examples)) - 1
    inputs = [ids[:-1] + [padding_id] * (T + 1 - len(ids)) for ids in examples]
    targets = [ids[1:] + [-100] * (T + 1 - len(ids)) for ids in examples]
    logits = model(torch.tensor(inputs, device=device))  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), torch.tensor(targets, device=device).flatten())


def evaluate(model: Model, examples: list[list[int]], device: str) -> float:
    """The mean of the batches' mean losses, as computed in the textbook."""
    model.eval()
    with torch.no_grad():
        losses = [batch_loss(model, batch, 0, device).item() for batch in batches(examples)]
    return sum(losses) / len(losses)


def write(model: Model, ids: Tensor, new_tokens: int) -> Tensor:
    """(1, T) → (1, T + new_tokens): greedy decoding that recomputes the whole text for each token."""
    model.eval()
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = model(ids)[:, -1]
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return ids


if __name__ == "__main__":
    run_task({"main_job": main_job}, sys.argv[1:])
