"""Loading and saving need little memory, and damaged folders give an error of one line."""

import codecs
import json
import struct
import subprocess
import sys

import pytest
import torch

from conftest import PROJECT, tiny_reference, write_layout
from load_gpt2_weights import load_model
from support.errors import UserError

MEASURE = r"""
import re, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import torch
from dialogues.tokenizer import copy_vocabulary
from load_gpt2_weights import load_model, read_config, read_weights, save_model
from training.lora import add_adapters, merge_adapters

small, large, saved, dtype = *map(Path, sys.argv[2:5]), getattr(torch, sys.argv[5])
dialogue = {"template": "prompt", "instruction": "", "speakers": [], "learn": "all"}


def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def load_and_save(folder, target):  # growth of the peak while loading, then while saving
    before = peak()
    model, _ = load_model(folder, dtype=dtype)
    loaded = peak()
    copy_vocabulary(folder, target)
    parameters = None
    if dtype == torch.bfloat16:
        add_adapters(model, 4, 0)
        parameters = merge_adapters(model, read_weights(folder))
    save_model(model, target, dialogue, parameters=parameters)
    return [(later - earlier) / 202e6 for earlier, later in ((before, loaded), (loaded, peak()))]


load_and_save(small, saved / "small")  # imports and sets up everything once
print(*load_and_save(large, saved / "large"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("layout", "dtype", "copies"), [("bare", "float32", 1), ("old bin", "float32", 1), ("bare", "bfloat16", 0.5)]
)
def test_loading_needs_one_copy_of_the_weights_and_saving_none(layout, dtype, copies, vocabulary, tmp_path):
    """Loading 202 MB of weights adds the memory of the weights, not that of the file as well."""
    small = write_layout(tiny_reference(), vocabulary, tmp_path / "small", layout)
    large = write_layout(tiny_reference(n_layer=4, n_embd=1024), vocabulary, tmp_path / "large", layout)
    command = [sys.executable, "-c", MEASURE, str(PROJECT), str(small), str(large), str(tmp_path / "saved"), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loading, saving = map(float, done.stdout.split())
    assert 0.8 * copies < loading < 1.4 * copies
    assert saving < 0.9  # less than a copy: tensors are copied and cast one at a time


@pytest.mark.parametrize("layout", ["prefixed", "bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_nan_or_infinite_are_refused_by_name(layout, dtype, value, vocabulary, tmp_path):
    reference = tiny_reference()
    with torch.no_grad():
        reference.get_parameter("transformer.h.1.mlp.c_fc.weight")[3, 5] = value
    folder = write_layout(reference, vocabulary, tmp_path / "m", layout)
    with pytest.raises(UserError, match=r"m/(model|pytorch_model)\..*h\.1\.mlp\.c_fc\.weight holds NaN or infinity"):
        load_model(folder, dtype=dtype)


def test_finite_weights_with_an_infinite_sum_are_loaded(vocabulary, tmp_path):
    reference = tiny_reference()
    with torch.no_grad():
        reference.transformer.wte.weight.fill_(3e38)
    assert load_model(write_layout(reference, vocabulary, tmp_path / "m", "bare"))[0].wte.weight.isfinite().all()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("change", "form"),
    [
        (lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8), "as qint8"),
        (lambda weight: weight.to("meta"), "without values"),
        (lambda weight: weight.to(torch.int8), "as int8"),
    ],
)
def test_non_float_tensors_are_refused_by_name(change, form, vocabulary, tmp_path):
    folder = write_layout(tiny_reference(), vocabulary, tmp_path / "m", "bin")
    tensors = torch.load(folder / "pytorch_model.bin")
    tensors["h.0.mlp.c_fc.weight"] = change(tensors["h.0.mlp.c_fc.weight"])
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=rf"pytorch_model.bin: h\.0\.mlp\.c_fc\.weight is stored {form}; save"):
        load_model(folder)


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer.json"])
@pytest.mark.parametrize("token", ["\ud800", 5])
def test_added_tokens_that_are_not_text_are_refused(name, token, model_folder):
    if name == "added_tokens.json":
        content = {str(token): 400}
    else:
        vocab, merges = (model_folder / "vocab.json", model_folder / "merges.txt")
        model = {"vocab": json.loads(vocab.read_text()), "merges": merges.read_text().split("\n")[1:-1]}
        content = {"model": model, "added_tokens": [{"content": token, "id": 400}]}
        vocab.unlink()
    (model_folder / name).write_text(json.dumps(content))
    message = "its added tokens are damaged" if token != 5 or name == "tokenizer.json" else "the weights 400"
    with pytest.raises(UserError, match=message):
        load_model(model_folder)


def test_a_byte_order_mark_changes_nothing(model_folder):
    for name in ("config.json", "vocab.json", "merges.txt"):
        path = model_folder / name
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert load_model(model_folder)[1].encode_ordinary("Hi Bob!")


def test_errors_about_damaged_folders_are_short(model_folder):
    """This holds for any number of layers, tensors and digits in a file."""
    config = json.loads((model_folder / "config.json").read_text())
    for changes in ({"n_layer": 1 << 20}, {"n_head": 10**4000}, {"activation_function": "x" * 10**6}):
        (model_folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(UserError, match="is not a supported GPT-2 configuration") as refused:
            load_model(model_folder)
        assert len(str(refused.value)) < 500
    (model_folder / "config.json").write_text(json.dumps(config))
    names = ["x" * 10**5, *map(str, range(10_000))]
    header = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}).encode()
    (model_folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match="9,996 more unexpected") as refused:
        load_model(model_folder)
    assert len(str(refused.value)) < 2000
