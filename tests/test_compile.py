"""`--compile` gives the same losses, affects training only, and reports a missing compiler."""

import copy
import os
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from conftest import CPU, fit, logged, make_examples, refused, written
from gpt_model import GPTConfig, GPTModel
from settings import TrainingSettings
from training.checkpoint import TrainingState
from training.device import for_training
from training.pace import Pace


def test_a_compiled_model_has_the_same_losses(tmp_path, monkeypatch):
    """The graphs are traced and differentiated as for any backend, but the C++ compiler is not tested."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    torch.manual_seed(0)
    # The width equals no batch length: PyTorch assumes that equal sizes are the same size.
    model = GPTModel(GPTConfig(n_layer=12, n_head=2, n_embd=40, vocab_size=101, n_positions=64))
    again = copy.deepcopy(model)
    random = torch.Generator().manual_seed(0)
    texts = [torch.randint(100, (length,), generator=random).tolist() for length in (20, 35, 30, 25, 12)]
    dataset = make_examples(*((text, [2, len(text)]) for text in texts), max_length=64)
    settings = TrainingSettings(epochs=2, batch_size=2, learning_rate=1e-3)
    for each, name in ((model, "plain"), (again, "compiled")):
        chosen = replace(settings, compile=name == "compiled")
        fit(each, dataset, dataset, chosen, tmp_path / name, CPU._replace(precision="bf16"))
    # All blocks share their graphs: one for any length, others for the last batch of an epoch, which is a single row.
    assert 1 <= counter.frame_count <= 3
    losses = [logged(tmp_path / name, "val_loss") for name in ("compiled", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]


def test_compiled_blocks_can_be_checkpointed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    losses = []
    for options in ({}, {"compile": True, "gradient_checkpointing": True}):
        torch.manual_seed(0)
        model = GPTModel(GPTConfig(n_layer=2, n_head=2, n_embd=40, vocab_size=101, n_positions=64))
        dataset = make_examples(([*range(20), 100], [2, 21]), ([*range(30, 60), 100], [9, 31]), max_length=64)
        settings = TrainingSettings(epochs=2, batch_size=2, learning_rate=1e-3, **options)
        fit(model, dataset, dataset, settings, tmp_path / str(len(losses)))
        losses.append(logged(tmp_path / str(len(losses)), "val_loss"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_a_model_can_be_compiled_as_a_whole():
    """The loss then also runs inside the graph."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(n_layer=1, n_head=2, n_embd=40, vocab_size=101, n_positions=64))
    whole = copy.deepcopy(model)
    whole.compile(backend="aot_eager", dynamic=True)
    # More rows than a chunk of the loss has.
    ids = torch.randint(101, (8, 60), generator=torch.Generator().manual_seed(0))
    losses = [each(ids, ids.roll(-1, dims=1)) for each in (model, whole)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0])
    for (name, parameter), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, msg=name)


def test_only_training_runs_compiled_blocks():
    model = GPTModel(GPTConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=101, n_positions=64))
    trained = for_training(model, TrainingSettings(compile=True))
    assert trained.h[0]._compiled_call_impl is not None
    assert model.h[0]._compiled_call_impl is None
    assert all(a is b for a, b in zip(trained.parameters(), model.parameters(), strict=True))
    assert for_training(model, TrainingSettings()) is model


@pytest.mark.skipif(sys.platform != "linux", reason="compilers are found in other ways on this system")
def test_a_missing_compiler_is_reported_before_anything_is_written(command, work):
    environment = {"CXX": "", "TORCHINDUCTOR_CACHE_DIR": str(work.parent / "cache"), "PATH": os.devnull}
    line = refused(command("finetune.py", "--compile", **environment))
    assert line.startswith("error: --compile: PyTorch can't compile here (")
    assert line.endswith("; run without it")
    assert written(work) == []


@pytest.mark.parametrize("compiles", [False, True])
def test_a_late_compilation_does_not_distort_the_pace(compiles, tmp_path, capsys, monkeypatch):
    """The second step compiles the loss in 20 s, later steps take 1 s; the clock does not move."""
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    settings = TrainingSettings(max_minutes=10, compile=compiles)
    pace = Pace(tmp_path, settings, evaluate_every=1000, machine=CPU)
    progress = SimpleNamespace(step_seconds=[], say=print, bar=SimpleNamespace())
    state = TrainingState(step=0, steps=1000)
    for seconds in (40, 20, 1, 1, 1):
        state.step += 1
        progress.step_seconds.append(seconds)
        pace.measure(state, progress)  # pyright: ignore[reportArgumentType]
    assert ("1.00" if compiles else "5.75") + " s per step; time limit: 10 minutes" in capsys.readouterr().out
    assert state.steps == 5 + (600 if compiles else 104)
