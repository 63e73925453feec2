"""From a model's name to its folder, from the folder to a model, and back into a folder.

A model folder has the published Hugging Face layout: `config.json`, `model.safetensors` (or `pytorch_model.bin`),
`vocab.json`, `merges.txt`. Folders written here load in transformers, and the other way round.
"""

import difflib
import hashlib
import pickle
import re
import shlex
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dialogues.tokenizer import END_OF_TEXT, load_tokenizer
from download_model import WEIGHT_FILES, download_model, missing_files
from files import PROJECT, UserError, atomic_path, read_json_object, reason, write_json
from gpt_model import GPTConfig, GPTModel

BUNDLED = PROJECT / "models" / "tiny"
CHECKSUMS = "SHA256SUMS"  # of the bundled files, in the format of `sha256sum --check`
HUB_IDS = {
    "distilgpt2": "distilbert/distilgpt2",
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
}

# The published files store these input-first, (in, out), where nn.Linear has (out, in). `attn.c_proj` is square, so
# that a forgotten transpose would load without an error and talk nonsense.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Older files also hold each layer's causal mask. (`.attn.bias` with its dot: `attn.c_attn.bias` is a parameter.)
MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")

# What torch.load is seen to raise on a file that is no pickle, or half of one.
DAMAGED_PICKLE = (
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)

# What transformers can switch on in a GPT-2 and this model does not compute.
FIXED_CONFIG = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", None),
    "scale_attn_weights": (True, None),
    "scale_attn_by_inverse_layer_idx": (False, None),
    "add_cross_attention": (False, None),
    "tie_word_embeddings": (True, None),
}
LARGEST = 1 << 20  # of any number in a configuration: a damaged file must not ask for more memory than there is


def find_model_folder(model: str, model_path: Path) -> Path:
    """The folder of `model`: tiny, a published name, a Hugging Face id, a model folder or a run folder.

    Published models live in `<model_path>/<name>/` and are downloaded there when something is missing; a complete
    folder never touches the network.

    Raises:
        UserError: no such model, an incomplete folder, or a failed download.
    """
    folder = Path(model)
    if model == BUNDLED.name or folder.resolve() == BUNDLED:
        check_bundled_files()
        return BUNDLED.relative_to(Path.cwd()) if BUNDLED.is_relative_to(Path.cwd()) else BUNDLED
    if model in HUB_IDS:
        return download_model(HUB_IDS[model], model_path / model)
    if (folder / "model" / "config.json").exists():  # a run folder
        folder = folder / "model"
    if folder.is_dir():
        if missing := missing_files(folder):
            raise UserError(f"the model folder {folder} {explain_incomplete(folder, missing)}")
        return folder
    owner, slash, name = model.partition("/")
    if slash and re.fullmatch(r"\w[\w.-]*", owner) and re.fullmatch(r"\w[\w.-]*", name) and not Path(owner).is_dir():
        return download_model(model, model_path / owner / name)
    names = [BUNDLED.name, *HUB_IDS]
    nearest = difflib.get_close_matches(model, names, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise UserError(f"--model {model} is no known name ({', '.join(names)}), Hugging Face id or folder{hint}")


def check_bundled_files() -> None:
    """Compare the bundled files with the checksums that lie beside them: an edited or cut file is named, not trained.

    Raises:
        UserError: with the damaged files, and the command that restores them.
    """
    try:
        words = (BUNDLED / CHECKSUMS).read_text(encoding="ascii").split()
        checksums = dict(zip(words[1::2], words[::2], strict=True))
        damaged = [
            name
            for name, expected in checksums.items()
            if not (BUNDLED / name).is_file() or checksum(BUNDLED / name) != expected
        ]
    except (OSError, ValueError):
        checksums, damaged = {}, []
    if not {"config.json", "vocab.json", "merges.txt", WEIGHT_FILES[0]} <= checksums.keys():
        damaged = [CHECKSUMS]
    if damaged:
        # By their names, and the checksums with them: the folder also holds files that somebody may be working on.
        restored = " ".join(f"models/tiny/{name}" for name in dict.fromkeys([*damaged, CHECKSUMS]))
        raise UserError(
            f"the bundled model is damaged: {', '.join(str(BUNDLED / name) for name in damaged)};"
            f" restore it with: git -C {shlex.quote(str(PROJECT))} checkout -- {restored}"
        )


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def explain_incomplete(folder: Path, missing: list[str]) -> str:
    """Why `folder` is no model folder, as the end of a sentence."""
    if (folder / "checkpoint").exists() or any(folder.glob("*.ckpt*")) or (folder / "tf_model.h5").exists():
        return "holds a TensorFlow checkpoint; use the Hugging Face files (config.json, model.safetensors) instead"
    if any(folder.glob("*.index.json")):
        return "has its weights in several files; save the model with one model.safetensors"
    return f"is incomplete: {', '.join(missing)} missing"


def load_model(folder: Path, dropout: float = 0.0) -> tuple[GPTModel, tiktoken.Encoding]:
    """Load a model folder: the model in fp32 on the CPU, and its tokenizer.

    Takes one copy of the weights in memory: the model is built without storage, and each tensor is read, converted and
    put in its place before the next one is touched.

    Raises:
        UserError: damaged files, or tensors or a vocabulary that don't fit `config.json`; everything wrong is listed.
    """
    config = read_config(folder / "config.json")
    tokenizer = load_tokenizer(folder)
    if tokenizer.n_vocab != config.vocab_size:
        raise UserError(
            f"{folder}: the vocabulary has {tokenizer.n_vocab} tokens and the weights {config.vocab_size};"
            " vocab.json and merges.txt belong to another model"
        )
    with torch.device("meta"):
        model = GPTModel(config, dropout)
    path = next(folder / name for name in WEIGHT_FILES if (folder / name).exists())
    shapes, read = open_weights(path)
    stored_names = match_tensors(shapes, model, path)
    head = stored_names.pop("lm_head.weight", None)
    state = {name: own_copy(read(stored), name.endswith(TRANSPOSED)) for name, stored in stored_names.items()}
    if head is not None and not torch.equal(read(head).float(), state["wte.weight"]):
        raise UserError(f"{path}: lm_head.weight differs from wte.weight; an untied output head is not supported")
    model.load_state_dict(state, assign=True)
    return model, tokenizer


def read_config(path: Path) -> GPTConfig:
    """The model's shape from `config.json`.

    Raises:
        UserError: not a GPT-2, not whole, or with options that this model does not compute.
    """
    raw = read_json_object(path)
    problems = [f"{key} is {raw[key]!r}" for key, known in FIXED_CONFIG.items() if key in raw and raw[key] not in known]
    if "model_type" not in raw:
        problems.append("model_type is missing")
    sizes = ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")
    numbers = {key: raw.get(key) for key in sizes} | ({} if raw.get("n_inner") is None else {"n_inner": raw["n_inner"]})
    for key, value in numbers.items():
        if type(value) is not int or not 1 <= value <= LARGEST:
            problems.append(f"{key} is {value!r}")
    epsilon = raw.get("layer_norm_epsilon", GPTConfig.layer_norm_epsilon)
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        problems.append(f"layer_norm_epsilon is {epsilon!r}")
    if not problems and raw["n_embd"] % raw["n_head"]:
        problems.append(f"n_embd {raw['n_embd']} does not divide into {raw['n_head']} heads")
    if problems:
        raise UserError(f"{path} is not the configuration of a GPT-2 that can be loaded: {'; '.join(problems)}")
    return GPTConfig(**{key: raw[key] for key in numbers}, layer_norm_epsilon=epsilon)


def open_weights(path: Path) -> tuple[dict[str, torch.Size], Callable[[str], Tensor]]:
    """The shape of each tensor in a weight file, and a function that reads one, once."""
    try:
        if path.suffix == ".bin":
            # A pickle can run code when read: only plain tensors are let through.
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            if not all(isinstance(name, str) and tensor.layout == torch.strided for name, tensor in tensors.items()):
                raise TypeError
            return {name: tensor.shape for name, tensor in tensors.items()}, tensors.pop
        with safe_open(path, framework="pt") as file:
            shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short ({error}); delete it and fetch it again") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is refused: it is cut short, or holds more than tensors and could run code; use model.safetensors"
        ) from None
    except DAMAGED_PICKLE:
        raise UserError(
            f"{path} is damaged or no PyTorch file of tensors by name; delete it and fetch it again"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error

    def read(name: str) -> Tensor:
        # Opened anew for each tensor: mapped pages count as memory used until the last view of the file is gone.
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    return shapes, read


def match_tensors(shapes: dict[str, torch.Size], model: nn.Module, path: Path) -> dict[str, str]:
    """Which stored tensor is which parameter of `model`, as parameter name → stored name, in the model's order.

    An `lm_head.weight` instead of `wte.weight` takes its place; one beside it is in the result too.

    Raises:
        UserError: with every missing, unexpected and misshapen tensor.
    """
    stored = {name.removeprefix("transformer."): name for name in shapes if not name.endswith(MASK_BUFFERS)}
    if "wte.weight" not in stored and "lm_head.weight" in stored:
        stored["wte.weight"] = stored.pop("lm_head.weight")
    expected = {
        name: parameter.t().shape if name.endswith(TRANSPOSED) else parameter.shape
        for name, parameter in model.named_parameters()
    }
    if "lm_head.weight" in stored:
        expected["lm_head.weight"] = expected["wte.weight"]
    problems = [f"{name} missing" for name in expected if name not in stored]
    problems += [f"{name} twice" for name in stored if name in shapes and f"transformer.{name}" in shapes]
    problems += [f"{name} unexpected" for name in stored if name not in expected]
    problems += [
        f"{name} has shape {tuple(shapes[stored[name]])}, not {tuple(shape)}"
        for name, shape in expected.items()
        if name in stored and shapes[stored[name]] != shape
    ]
    if problems:
        raise UserError(f"{path} does not hold the model that config.json describes: {'; '.join(problems)}")
    return {name: stored[name] for name in expected}


def own_copy(tensor: Tensor, transposed: bool) -> Tensor:
    """An fp32 copy in memory of its own: a view would keep the whole file mapped, and the file may be replaced."""
    source = tensor.t() if transposed else tensor
    return torch.empty(source.shape, dtype=torch.float32).copy_(source)


def save_model(model: GPTModel, folder: Path, dialogue: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Write `model` into `folder`, which has its vocabulary already, as a model folder that transformers loads.

    `dialogue` goes into `dialogue.json`: how this model was taught to see a conversation. The weights come last,
    so that a folder with weights is a whole one.

    Raises:
        UserError: the folder can't be written.
    """
    end_of_text = read_json_object(folder / "vocab.json")[END_OF_TEXT]
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        **asdict(model.config),
        "attn_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": str(dtype).removeprefix("torch."),
    }
    tokenizer_config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": model.config.n_positions,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    }
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    write_json(folder / "generation_config.json", dict.fromkeys(("bos_token_id", "eos_token_id"), end_of_text))
    write_json(folder / "dialogue.json", dialogue)
    tensors = {
        name: (parameter.t() if name.endswith(TRANSPOSED) else parameter).detach().to("cpu", dtype).contiguous()
        for name, parameter in model.named_parameters()
    }
    with atomic_path(folder / "model.safetensors") as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"cannot write {folder / 'model.safetensors'}: {error}") from error
