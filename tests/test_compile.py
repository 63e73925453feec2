"""`--compile`: blocks as PyTorch makes them, in training alone, and a word where it can't."""

import copy
import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import gpt_model
from conftest import CPU, fit, logged, make_examples, refused, written
from gpt_model import Block, GPTConfig, GPTModel
from settings import TrainingSettings
from training.checkpoint import RunState
from training.pace import Pace


def test_a_compiled_model_learns_the_same(tmp_path, monkeypatch):
    """The graphs are traced and differentiated as for any backend; what the C++ compiler makes of them is its own."""
    compiled = torch.compile(Block.add_halves, backend="aot_eager", dynamic=True)
    calls = []

    def counted(block, x, *rest):
        calls.append(tuple(x.shape))
        return compiled(block, x, *rest)

    monkeypatch.setattr(gpt_model, "compiled_block", lambda: counted)
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=101, n_positions=64))
    again = copy.deepcopy(model)
    for block in again.h:
        block.compiled = True  # pyright: ignore
    random = torch.Generator().manual_seed(0)
    texts = [torch.randint(100, (length,), generator=random).tolist() for length in (20, 35, 30, 25, 12)]
    dataset = make_examples(*((text, [2, len(text)]) for text in texts), max_length=64)
    settings = TrainingSettings(epochs=2, batch_size=2, learning_rate=1e-3)
    for each, name in ((model, "plain"), (again, "compiled")):
        fit(each, dataset, dataset, settings, tmp_path / name, CPU._replace(precision="bf16"))
    assert len(calls) == 2 * 6  # two blocks, six steps, and no evaluation
    assert len(set(calls)) > 2  # lengths differ, and the last batch of an epoch is a single row
    losses = [logged(tmp_path / name, "val_loss") for name in ("compiled", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.skipif(sys.platform != "linux", reason="compilers are found in other ways there")
def test_no_compiler_is_said_before_anything_is_written(command, work):
    environment = {"CXX": "", "TORCHINDUCTOR_CACHE_DIR": str(work.parent / "cache"), "PATH": os.devnull}
    line = refused(command("finetune.py", "--compile", **environment))
    assert line.startswith("error: --compile: PyTorch can't compile here (")
    assert line.endswith("; leave it out")
    assert written(work) == []


@pytest.mark.parametrize("compiles", [False, True])
def test_what_is_compiled_later_is_not_taken_for_the_pace(compiles, tmp_path, capsys, monkeypatch):
    """20 s for the loss at the second step, where the others take one; the clock stands still meanwhile."""
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    settings = TrainingSettings(max_minutes=10, compile=compiles)
    pace = Pace(tmp_path, settings, evaluate_every=1000, machine=CPU)
    progress = SimpleNamespace(step_seconds=[], say=print, bar=SimpleNamespace())
    state = RunState(step=0, steps=1000)
    for seconds in (40, 20, 1, 1, 1):
        state.step += 1
        progress.step_seconds.append(seconds)
        pace.measure(state, progress)  # pyright: ignore[reportArgumentType]
    assert ("1.00" if compiles else "5.75") + " s a step, to end after 10 minutes" in capsys.readouterr().out
    assert state.steps == 5 + (600 if compiles else 104)
