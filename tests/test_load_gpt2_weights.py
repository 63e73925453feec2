"""What loading and saving cost, and weights that are no numbers."""

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


def load_and_save(folder, target):  # how much the peak grows by loading, and then by saving
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


load_and_save(small, saved / "small")  # whatever is imported and set up once
print(*load_and_save(large, saved / "large"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("layout", "dtype", "copies"), [("bare", "float32", 1), ("old bin", "float32", 1), ("bare", "bfloat16", 0.5)]
)
def test_loading_takes_one_copy_of_the_weights_and_saving_none(layout, dtype, copies, vocabulary, tmp_path):
    """202 MB of weights: the memory that loading adds is theirs, and not that of the file beside them."""
    small = write_layout(tiny_reference(), vocabulary, tmp_path / "small", layout)
    large = write_layout(tiny_reference(n_layer=4, n_embd=1024), vocabulary, tmp_path / "large", layout)
    command = [sys.executable, "-c", MEASURE, str(PROJECT), str(small), str(large), str(tmp_path / "saved"), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loading, saving = map(float, done.stdout.split())
    assert 0.8 * copies < loading < 1.4 * copies
    assert saving < 0.9  # of a whole copy: single tensors are copied and cast


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


def test_weights_whose_sum_is_infinite_are_numbers_all_the_same(vocabulary, tmp_path):
    reference = tiny_reference()
    with torch.no_grad():
        reference.transformer.wte.weight.fill_(3e38)
    assert load_model(write_layout(reference, vocabulary, tmp_path / "m", "bare"))[0].wte.weight.isfinite().all()
