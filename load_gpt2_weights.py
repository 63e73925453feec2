"""Load a model from a model folder, and write a model to a folder.

A model folder has the published Hugging Face layout: `config.json`, `model.safetensors` (or `pytorch_model.bin`),
`vocab.json`, `merges.txt`. Folders written here load in transformers, and vice versa.
"""

import json
import pickle
import reprlib
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dialogues.chat_template import chat_template, response_template
from dialogues.template import Renderer
from dialogues.tokenizer import END_OF_TEXT, load_tokenizer
from gpt_model import GPTConfig, GPTModel
from hub.download import WEIGHT_FILES
from support.errors import UserError, reason
from support.files import REPLACE, atomic_path, read_json_object, write_json

# The published files store these as (in, out); nn.Linear has (out, in). `attn.c_proj` is square, so a forgotten
# transpose would load without an error, and the model would generate nonsense.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Older files also hold each layer's causal mask. (The leading dot excludes the parameter `attn.c_attn.bias`.)
MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")

# Errors that torch.load raises for a file that is truncated or not a pickle.
DAMAGED_PICKLE = (
    *(RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError),
    struct.error,
)

# Supported values of options that transformers has for GPT-2; this model does not compute the others.
FIXED_CONFIG = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", None),
    "scale_attn_weights": (True, None),
    "scale_attn_by_inverse_layer_idx": (False, None),
    "add_cross_attention": (False, None),
    "tie_word_embeddings": (True, None),
}
# Maximum of any number in a configuration, and of its number of layers, so that a damaged file can't exhaust memory or
# time. GPT-2 XL has 48 layers.
LARGEST, MOST_LAYERS = 1 << 20, 1000
NAMED = 5  # maximum number of tensors that an error names per fault; a damaged file may have a million
LONGEST = 200  # maximum number of characters that an error quotes from a file


CPU = torch.device("cpu")
SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def load_model(
    folder: Path, dropout: float = 0.0, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> tuple[GPTModel, tiktoken.Encoding]:
    """Load a model folder; return the model, on `device`, and its tokenizer.

    Memory holds one copy of the weights: the model is created without storage, and each tensor is read, converted and
    stored before the next one is read. The matrices of the layers and the token embedding, nearly all of the weights,
    get `dtype`; positions, biases and norms are fp32, so that the residual stream stays fp32.

    Raises:
        UserError: damaged files, or tensors or a vocabulary that don't fit `config.json`; the message lists the faults.
    """
    config, tokenizer = read_description(folder)
    with torch.device("meta"):
        model = GPTModel(config, dropout)
    parameters = dict(read_weights(folder, dtype, device))
    model.load_state_dict(parameters | {"lm_head.weight": parameters["wte.weight"]}, assign=True)
    model.tie_weights()
    return model, tokenizer


def load_for(
    tokenizer: tiktoken.Encoding, folder: Path, device: torch.device, dtype: torch.dtype = torch.float32
) -> GPTModel:
    """Load the model of `folder` onto a device, with embeddings for all tokens of `tokenizer`; see `load_model`."""
    model = load_model(folder, dtype=dtype, device=device)[0]
    add_embeddings(model, tokenizer.n_vocab)
    return model


def read_description(folder: Path) -> tuple[GPTConfig, tiktoken.Encoding]:
    """Return the configuration of a model folder and its tokenizer.

    Raises:
        UserError: damaged files, or a vocabulary that doesn't fit `config.json`.
    """
    config, tokenizer = read_config(folder / "config.json"), load_tokenizer(folder)
    if tokenizer.n_vocab != config.vocab_size:
        raise UserError(
            f"{folder}: the vocabulary has {tokenizer.n_vocab} tokens and the weights {config.vocab_size};"
            " vocab.json and merges.txt belong to another model"
        )
    return config, tokenizer


def read_weights(
    folder: Path, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of each parameter in a model folder, one at a time; see `load_model` for their dtypes.

    Raises:
        UserError: a damaged file, tensors that don't fit `config.json`, or NaN or infinite weights.
    """
    config = read_config(folder / "config.json")
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), folder / WEIGHT_FILES[0])
    shapes, read = open_weights(path)
    stored_names = match_tensors(shapes, parameter_shapes(config), path)
    head = stored_names.pop("lm_head.weight", None)
    for name, stored in stored_names.items():
        wanted = dtype if name.endswith((*TRANSPOSED, "wte.weight")) else torch.float32
        source = read(stored)
        if source.is_meta or not source.is_floating_point():
            form = "without values" if source.is_meta else f"as {str(source.dtype)[6:]}"
            raise UserError(f"{path}: {stored} is stored {form}; save the model in float32, float16 or bfloat16")
        # Move the tensor before transposing it: a GPU transposes faster than the CPU.
        tensor = own_copy(source.to(device), name.endswith(TRANSPOSED), wanted)
        if not is_finite(tensor):
            raise UserError(
                f"{path}: {stored} holds NaN or infinity in {str(wanted)[6:]}; restore the model or download it again"
            )
        if name == "wte.weight" and head is not None and not torch.equal(read(head).to(tensor), tensor):
            raise UserError(f"{path}: lm_head.weight differs from wte.weight; an untied output head is not supported")
        yield name, tensor


def parameter_shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """Return the shape of each parameter, by name, as it is stored in a file."""
    with torch.device("meta"):
        parameters = GPTModel(config).named_parameters()
    return {name: as_stored(name, parameter).shape for name, parameter in parameters}


def as_stored(name: str, parameter: Tensor) -> Tensor:
    """Return a view of a parameter in the layout of the published files."""
    return parameter.detach().t() if name.endswith(TRANSPOSED) else parameter.detach()


def add_embeddings(model: GPTModel, vocab_size: int) -> None:
    """Add embeddings for new tokens up to `vocab_size`, each the mean of the old embeddings (Hewitt 2021).

    The mean hardly changes the probabilities of the old tokens; a random vector could get the largest logit.
    """
    old = model.wte.weight.detach()
    if vocab_size == len(old):
        return
    new = old.mean(dim=0).expand(vocab_size - len(old), -1)
    model.wte.weight = nn.Parameter(torch.cat([old, new]))
    model.wte.num_embeddings = vocab_size
    model.tie_weights()
    model.config = replace(model.config, vocab_size=vocab_size)


def read_config(path: Path) -> GPTConfig:
    """Read the configuration of a model from `config.json`.

    Raises:
        UserError: not a GPT-2, incomplete, or with options that this model does not support.
    """
    raw = read_json_object(path)
    problems = [
        f"{key} is {reprlib.repr(raw[key])}"
        for key, known in FIXED_CONFIG.items()
        if key in raw and raw[key] not in known
    ]
    if "model_type" not in raw:
        problems.append("model_type is missing")
    sizes = ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")
    numbers = {key: raw.get(key) for key in sizes} | ({} if raw.get("n_inner") is None else {"n_inner": raw["n_inner"]})
    for key, value in numbers.items():
        if type(value) is not int or not 1 <= value <= (MOST_LAYERS if key == "n_layer" else LARGEST):
            problems.append(f"{key} is {reprlib.repr(value)}")
    epsilon = raw.get("layer_norm_epsilon", GPTConfig.layer_norm_epsilon)
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        problems.append(f"layer_norm_epsilon is {reprlib.repr(epsilon)}")
    if not problems and raw["n_embd"] % raw["n_head"]:
        problems.append(f"n_embd {raw['n_embd']} is not divisible by n_head {raw['n_head']}")
    if problems:
        raise UserError(f"{path} is not a supported GPT-2 configuration: {'; '.join(problems)}")
    return GPTConfig(**{key: raw[key] for key in numbers}, layer_norm_epsilon=epsilon)


def open_weights(path: Path) -> tuple[dict[str, torch.Size], Callable[[str], Tensor]]:
    """Return the shape of each tensor in a weight file, and a function that reads a tensor; read each only once."""
    try:
        if path.suffix == ".bin":
            # Reading a pickle can run code: allow only plain tensors.
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            if not all(isinstance(name, str) and tensor.layout == torch.strided for name, tensor in tensors.items()):
                raise TypeError
            return {name: tensor.shape for name, tensor in tensors.items()}, tensors.pop
        # Not memory-mapped: mapped pages count as used memory, and are slower to read.
        file = safe_open(path, framework="pt", backend="pread")
        return {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}, file.get_tensor  # noqa: SIM118
    except SafetensorError as error:
        why = str(error)[:LONGEST]
        raise UserError(f"{path} is damaged or cut short ({why}); {REPLACE}") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is refused: it is truncated, or holds objects other than tensors,"
            " which could run code; use model.safetensors"
        ) from None
    except DAMAGED_PICKLE:
        raise UserError(f"{path} is damaged, or not a PyTorch file of named tensors; {REPLACE}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error


def match_tensors(shapes: dict[str, torch.Size], expected: dict[str, torch.Size], path: Path) -> dict[str, str]:
    """Return the name of the stored tensor for each of the `expected` parameters, in their order.

    If the file has `lm_head.weight` but no `wte.weight`, the former replaces the latter; if it has both, so does the
    result.

    Raises:
        UserError: tensors are missing, stored twice, unexpected or of the wrong shape; the message names the first few.
    """
    stored = {name.removeprefix("transformer."): name for name in shapes if not name.endswith(MASK_BUFFERS)}
    if "wte.weight" not in stored and "lm_head.weight" in stored:
        stored["wte.weight"] = stored.pop("lm_head.weight")
    if "lm_head.weight" in stored:
        expected = expected | {"lm_head.weight": expected["wte.weight"]}
    faults = {
        "missing": [f"{name} missing" for name in expected if name not in stored],
        "twice": [f"{name} twice" for name in stored if name in shapes and f"transformer.{name}" in shapes],
        "unexpected": [f"{name} unexpected" for name in stored if name not in expected],
        "of a different shape": [
            f"{name} has shape {tuple(shapes[stored[name]])}, not {tuple(shape)}"
            for name, shape in expected.items()
            if name in stored and shapes[stored[name]] != shape
        ],
    }
    if problems := [problem for fault, texts in faults.items() for problem in first_few(fault, texts)]:
        raise UserError(f"{path} does not hold the model that config.json describes: {'; '.join(problems)}")
    return {name: stored[name] for name in expected}


def first_few(fault: str, texts: Sequence[str]) -> list[str]:
    """Return the first of `texts`, which describe one tensor each, and the number of the others."""
    more = [f"{len(texts) - NAMED:,} more {fault}"] if len(texts) > NAMED else []
    return [text[:LONGEST] for text in texts[:NAMED]] + more


def own_copy(tensor: Tensor, transposed: bool, dtype: torch.dtype) -> Tensor:
    """Return a copy in memory allocated by PyTorch: aligned, and in huge pages if available."""
    source = tensor.t() if transposed else tensor
    return torch.empty(source.shape, dtype=dtype, device=source.device).copy_(source)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has no NaN and no infinity.

    The sum is cheap and reveals both. Huge numbers can overflow it, so if it is not finite, each number is checked.
    """
    return bool(tensor.sum().isfinite() or tensor.isfinite().all())


def save_model(
    model: GPTModel,
    folder: Path,
    dialogue: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    parameters: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write `model` into `folder`, which already has its vocabulary, as a model folder that transformers can load.

    See `save_description` and `save_weights`.
    """
    save_description(model, folder, dialogue, dtype)
    save_weights(model, folder, dtype, parameters)


def save_description(
    model: GPTModel, folder: Path, dialogue: dict[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """Write all files of a model folder except its vocabulary and its weights.

    Programs that serve a model can only stop at single tokens. For them, a turn ends at the last token of the stop
    sequence between two turns, or at the end-of-text token.

    Args:
        dialogue: the content of `dialogue.json`: how conversations were rendered for this model.

    Raises:
        UserError: the folder can't be written.
    """
    tokenizer = load_tokenizer(folder)
    end_of_text, end_of_turn = tokenizer.eot_token, Renderer(tokenizer, dialogue["template"]).stop[-1]
    added = folder / "added_tokens.json"
    added_tokens = read_json_object(added) if added.exists() else {}
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        **asdict(model.config),
        "n_ctx": model.config.n_positions,  # llama.cpp's converter looks for the old name
        "attn_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_turn,  # llama.cpp takes one; it recognises <|endoftext|> by its text
        "dtype": str(dtype).removeprefix("torch."),
    }
    tokenizer_config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": model.config.n_positions,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
        "added_tokens_decoder": {
            number: {"content": token, "special": True, "lstrip": False, "rstrip": False, "normalized": False}
            for token, number in added_tokens.items()
        },
        "chat_template": chat_template(dialogue),
        "response_template": response_template(dialogue, tokenizer.decode([end_of_turn])),
    }
    generation_config = {"bos_token_id": end_of_text, "eos_token_id": [end_of_text, end_of_turn]}
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    write_json(folder / "generation_config.json", generation_config)
    write_json(folder / "dialogue.json", dialogue)


def save_weights(
    model: GPTModel,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    parameters: Iterable[tuple[str, Tensor]] | None = None,
    spare: Path | None = None,
) -> None:
    """Write the weights of `model` into `folder`. Call this last, so that a folder with weights is complete.

    Args:
        parameters: (name, parameter) pairs in the model's order, read one at a time; by default, those of `model`.
        spare: a file to overwrite; see `atomic_path`.

    Raises:
        UserError: the file can't be written.
    """
    tensors = (as_stored(name, parameter) for name, parameter in parameters or model.named_parameters())
    write_tensors(folder / "model.safetensors", parameter_shapes(model.config), tensors, dtype, spare)


def write_tensors(
    path: Path, shapes: dict[str, torch.Size], tensors: Iterable[Tensor], dtype: torch.dtype, spare: Path | None = None
) -> None:
    """Write a safetensors file of `tensors`, named and shaped as in `shapes`, one at a time.

    The library's own function needs all tensors in memory at once.

    Args:
        spare: a file to overwrite; see `atomic_path`.

    Raises:
        UserError: the file can't be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with atomic_path(path, spare) as temporary, open(temporary, "rb+") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for shape, tensor in zip(shapes.values(), tensors, strict=True):
            assert tensor.shape == shape
            stored = tensor.to(dtype).contiguous().cpu()  # transpose on the tensor's device: a GPU is faster
            file.write(stored.view(-1).view(torch.uint8).numpy().data)  # as bytes: numpy has no bf16
        file.truncate()
