"""LoRA (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"): swaps layers before training.

Each matrix W (out, in) of attention and MLP is frozen and gets two matrices of rank R, A (R, in) and B (out, R):
y = W x + (16 / R) B A x. Only A, B and the embeddings of new tokens are trained.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from fast import Embedding, Linear
from fast.linear import linear
from gpt_model import GPTModel
from support.errors import UserError, reason
from support.files import atomic_path, write_json, writing

ALPHA = 16  # scale the product by ALPHA / R, so that one learning rate suits every rank
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names


class LoRALinear(Linear):
    """A frozen linear layer plus a trained low-rank product."""

    def __init__(self, base: Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale = ALPHA / rank
        A = torch.empty(rank, base.in_features)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))  # 0, to start from the base model

    def forward(self, input: Tensor) -> Tensor:
        low = self.scale * F.linear(input, self.lora_A)  # (..., R); scale here, where the tensor is smallest
        return super().forward(input) + F.linear(low, self.lora_B)

    def merge(self, weight: Tensor) -> Tensor:
        """`weight` (out, in), in fp32, plus the low-rank product."""
        return torch.addmm(weight, self.lora_B.detach().cpu(), self.lora_A.detach().cpu(), alpha=self.scale)


class ExtendedEmbedding(Embedding):
    """A frozen token embedding, followed by trained rows for new tokens."""

    def __init__(self, base: Embedding, new_tokens: int) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, device="meta")
        old, new = base.weight.detach().split([base.num_embeddings - new_tokens, new_tokens])
        self.weight = nn.Parameter(old, requires_grad=False)
        self.new_rows = nn.Parameter(new.to(torch.float32, copy=True))

    def forward(self, input: Tensor) -> Tensor:
        place = input - len(self.weight)  # row number among the new rows
        old = F.embedding(input.clamp(max=len(self.weight) - 1), self.weight)
        new = F.embedding(place.clamp(min=0), self.new_rows)
        return torch.where((place >= 0)[..., None], new, old)

    def merge(self, weight: Tensor) -> Tensor:
        """`weight`, the old rows in fp32, followed by the new rows."""
        return torch.cat([weight, self.new_rows.detach().cpu()])


class ExtendedHead(nn.Module):
    """The output head tied to an `ExtendedEmbedding`: the frozen rows, then the new ones."""

    def __init__(self, head: Linear, embedding: ExtendedEmbedding) -> None:
        super().__init__()
        head.weight = embedding.weight
        self.old = head
        self.tied = [embedding]  # in a list, so that the parameters of `wte` are not registered twice

    @property
    def weight(self) -> tuple[Tensor, Tensor]:
        return self.tied[0].weight, self.tied[0].new_rows

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([self.old(input), linear(input, self.tied[0].new_rows)], dim=-1)


def add_adapters(model: GPTModel, rank: int, seed: int, new_tokens: int = 0) -> None:
    """Freeze `model` and add an adapter to each matrix of attention and MLP; new embeddings stay trainable.

    Call it while the model is on the CPU. The initial adapters depend only on `seed`.

    Args:
        new_tokens: number of rows that `add_embeddings` has added to the end of the embedding.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parent in list(model.h.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Linear):
                setattr(parent, name, LoRALinear(layer, rank, generator))
    if new_tokens:
        model.wte = ExtendedEmbedding(model.wte, new_tokens)
        model.lm_head = ExtendedHead(model.lm_head, model.wte)  # pyright: ignore[reportAttributeAccessIssue]


def merge_adapters(model: GPTModel, base: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of each parameter of `model`, with its adapters merged.

    Args:
        base: the parameters before training, in fp32, read again from their file: adding the change to bf16 weights
            would lose a fifth of it to rounding.

    Raises:
        UserError: `base` is not the model on which the adapters were trained.
    """
    frozen = dict(model.named_parameters())
    for name, parameter in base:
        layer = model.get_submodule(name.rpartition(".")[0])
        if not torch.equal(parameter.to(frozen[name].dtype), frozen[name].cpu()):
            raise UserError(
                f"the base model's file has changed since training began ({name} differs);"
                " restore it: the saved adapter fits only the old file"
            )
        if isinstance(layer, LoRALinear | ExtendedEmbedding) and name.endswith("weight"):
            parameter = layer.merge(parameter)
        yield name, parameter


def save_adapter(model: GPTModel, folder: Path, base: str) -> None:
    """Write the trained parameters to `folder` in PEFT's format.

    To load an adapter with new tokens in PEFT, first call the base model's `resize_token_embeddings`.

    Args:
        base: name or folder of the base model.

    Raises:
        UserError: the folder can't be written.
    """
    tensors = adapter_tensors(model)
    rank = next(layer.lora_A.size(0) for layer in model.modules() if isinstance(layer, LoRALinear))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": ALPHA,
        "target_modules": ["c_attn", "c_proj", "c_fc"],
        "fan_in_fan_out": True,  # the base model's file stores its matrices input-first
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    if isinstance(model.wte, ExtendedEmbedding):
        config["trainable_token_indices"] = list(range(len(model.wte.weight), model.config.vocab_size))
    with writing(folder):
        folder.mkdir(exist_ok=True)
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        temporary.write_bytes(save({name: tensor.detach().cpu() for name, tensor in tensors.items()}, {"format": "pt"}))
    write_json(folder / CONFIG_FILE, config)


def load_adapter(model: GPTModel, folder: Path) -> None:
    """Load the parameters that `save_adapter` wrote to `folder`, bit for bit; `model` has adapters of the same shape.

    Raises:
        UserError: the file is unreadable or damaged, or has a different shape.
    """
    path = folder / WEIGHTS_FILE
    try:
        stored = load(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short ({error}); restore it, or start a new run") from None
    tensors = adapter_tensors(model)
    if {name: tensor.shape for name, tensor in stored.items()} != {name: t.shape for name, t in tensors.items()}:
        raise UserError(
            f"{path} belongs to another model or --lora-rank; restore this run's adapter, or start a new run"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(stored[name])


def adapter_tensors(model: GPTModel) -> dict[str, Tensor]:
    """The trained parameters, by PEFT's names."""
    return {
        "base_model.model.transformer." + peft_name(name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def peft_name(name: str) -> str:
    """h.0.attn.c_attn.lora_A → h.0.attn.c_attn.lora_A.weight, and wte.new_rows → PEFT's name for new embeddings."""
    return "wte.token_adapter.trainable_tokens_delta" if name == "wte.new_rows" else f"{name}.weight"
