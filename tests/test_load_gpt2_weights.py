"""What loading costs."""

import subprocess
import sys

import pytest

from conftest import PROJECT, tiny_reference, write_layout

MEASURE = r"""
import re, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import torch
from load_gpt2_weights import load_model

load_model(Path(sys.argv[2]))  # whatever is imported and set up once


def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


before = peak()
model, _ = load_model(Path(sys.argv[3]))
print((peak() - before) / sum(4 * parameter.numel() for parameter in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layout", ["bare", "old bin"])
def test_loading_takes_one_copy_of_the_weights(layout, vocabulary, tmp_path):
    """200 MB of weights: the memory that loading adds is theirs, and not that of the file beside them."""
    small = write_layout(tiny_reference(), vocabulary, tmp_path / "small", layout)
    large = write_layout(tiny_reference(n_layer=4, n_embd=1024), vocabulary, tmp_path / "large", layout)
    command = [sys.executable, "-c", MEASURE, str(PROJECT), str(small), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.8 < float(done.stdout) < 1.4
