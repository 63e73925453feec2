"""Write a model as a GGUF file, the format of llama.cpp, with a Modelfile for Ollama next to it."""

import contextlib
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from dialogues.chat_template import chat_template
from dialogues.dialogue import INSTRUCTION
from dialogues.ollama import modelfile
from dialogues.template import Renderer
from dialogues.tokenizer import read_vocabulary
from gpt_model import GPTConfig
from load_gpt2_weights import TRANSPOSED, parameter_shapes, read_description, read_weights
from pipeline.finished_model import FinishedModel
from settings import AnswerSettings
from support.errors import UserError, check_extra, display
from support.files import atomic_path, check_free_space, check_output_path, resolved, write_text

if TYPE_CHECKING:
    import gguf

REQUIREMENT = "gguf>=0.18,<1"
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
MATRICES = (*TRANSPOSED, "wte.weight")  # the other parameters are always stored in f32, as in llama.cpp's converter
METADATA = 5_000_000  # upper limit of the bytes before the weights: the vocabulary of GPT-2 takes 1.8 MB
# The defaults of chat.py for a model without a `dialogue.json`.
UNKNOWN = {"template": "prompt", "instruction": INSTRUCTION, "speakers": [], "learn": "all"}


def export_model(found: FinishedModel, kind: str, output: Path | None) -> None:
    """Write a model's GGUF file and its Modelfile, and print their names.

    Args:
        kind: f32, f16 or q8_0.
        output: the GGUF file; by default `<name>-<kind>.gguf`, in the model's run folder or in the current folder.

    Raises:
        UserError: the package `gguf` is missing, the model folder is damaged, or a file can't be written.
    """
    check_extra("gguf", "export.py", REQUIREMENT)
    name = resolved(found.run or found.folder).name
    path = output or (found.run or Path()) / f"{name}-{kind}.gguf"
    beside = path.with_suffix(".Modelfile")
    check_output_path(path, ())
    dialogue = UNKNOWN | found.dialogue
    config, tokenizer = read_description(found.folder)
    end_of_turn = Renderer(tokenizer, dialogue["template"]).stop[-1]
    text = modelfile(dialogue, tokenizer.decode([end_of_turn]), config.n_positions, path.name, beside.name)

    replaced = "replaced" if path.exists() else "written"
    writer = open_writer(name, kind, config)
    add_tokenizer(writer, found.folder, tokenizer, end_of_turn)
    writer.add_chat_template(chat_template(dialogue, marked=False))
    write_weights(writer, found.folder, config, kind, path)
    write_text(beside, text)
    display(f"{replaced}: {path} ({path.stat().st_size / 1e6:,.0f} MB); for Ollama: {beside}")


def open_writer(name: str, kind: str, config: GPTConfig) -> "gguf.GGUFWriter":
    """Return a GGUF writer that holds the model's architecture and the sampling settings of a chat."""
    import gguf

    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    answer = AnswerSettings()
    writer.add_sampling_temp(answer.temperature)
    writer.add_sampling_top_k(answer.top_k)
    writer.add_sampling_top_p(answer.top_p)
    writer.add_sampling_penalty_repeat(answer.repetition_penalty)
    return writer


def add_tokenizer(writer: "gguf.GGUFWriter", folder: Path, tokenizer: tiktoken.Encoding, end_of_turn: int) -> None:
    """Add the vocabulary of a model folder.

    The end of a turn is both `eos`, for programs that stop at a single token, and `eot`. llama.cpp also stops at
    `<|endoftext|>`, which it recognises by its text.

    llama.cpp does not show control tokens, but it splits a prompt at their texts. An ordinary token at the end of a
    turn, such as `###`, gets the type `UNUSED`: it is encoded as usual, and not shown at the end of an answer.
    """
    import gguf

    vocabulary, merges = read_vocabulary(folder)
    specials = tokenizer._special_tokens
    names = {number: token for token, number in [*vocabulary.items(), *specials.items()]}
    kinds = [gguf.TokenType.NORMAL] * len(names)
    kinds[end_of_turn] = gguf.TokenType.UNUSED
    for number in specials.values():
        kinds[number] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names[number] for number in sorted(names)])
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.eot_token)
    writer.add_eos_token_id(end_of_turn)
    writer.add_eot_token_id(end_of_turn)
    writer.add_add_bos_token(False)


def write_weights(writer: "gguf.GGUFWriter", folder: Path, config: GPTConfig, kind: str, path: Path) -> None:
    """Write `path`: all that `writer` holds, and the weights of a model folder, which are read one at a time.

    Raises:
        UserError: damaged weights, weights that are too large for f16, or a full disk.
    """
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    formats, total = {}, METADATA
    for name, stored in parameter_shapes(config).items():
        shape = tuple(reversed(stored)) if name.endswith(TRANSPOSED) else tuple(stored)  # as in nn.Linear
        formats[name] = choose_format(name, shape, kind)
        size = prod(gguf.quant_shape_to_byte_shape(shape, formats[name]))
        new_name = names.get_name(name, (".weight", ".bias"))
        assert new_name
        writer.add_tensor_info(new_name, shape, np.dtype(np.float32), size, formats[name])
        total += size
    check_free_space(path.parent, total, path.name)
    weights = tqdm(read_weights(folder), "writing", len(formats), delay=2, leave=False, disable=None)
    with atomic_path(path) as temporary, contextlib.closing(writer):
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in weights:
            if formats[name] == gguf.GGMLQuantizationType.F16 and tensor.abs().max() > torch.finfo(torch.float16).max:
                raise UserError(f"{folder}: {name} is too large for f16; use --type f32")
            writer.write_tensor_data(gguf.quantize(tensor.numpy(), formats[name]))


def choose_format(name: str, shape: tuple[int, ...], kind: str) -> "gguf.GGMLQuantizationType":
    """Return the number format of a parameter; q8_0 needs rows of whole blocks, so other matrices get f16."""
    import gguf

    wanted = gguf.GGMLQuantizationType[kind.upper() if name.endswith(MATRICES) else "F32"]
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return gguf.GGMLQuantizationType.F16 if shape[-1] % block else wanted
