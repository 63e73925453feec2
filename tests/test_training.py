"""The training loop: the loss of a step, evaluations, and the logs."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import CPU, fit, make_examples
from dialogues.batches import ROUND, DialogueDataset, Example, collate
from gpt_model import GPTConfig, GPTModel
from settings import RunSettings, TrainingSettings
from support.errors import UserError
from training.defaults import complete, defaults, explain
from training.device import Machine, choose_machine
from training.loop import evaluate, make_batch
from training.optimizer import learning_rate_at, make_optimizer
from training.step import Learner, take_step

END = 100


def make_dataset(*lengths: int) -> DialogueDataset:
    random = torch.Generator().manual_seed(0)
    texts = [torch.randint(100, (length - 1,), generator=random).tolist() + [END] for length in lengths]
    return make_examples(*((text, [2, len(text)]) for text in texts), max_length=64)


@pytest.fixture
def model() -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=101, n_positions=64))


def test_an_evaluation_is_the_mean_over_all_tokens(model):
    """The value follows the definition, example by example; it is not a mean of batch means."""
    dataset = make_dataset(5, 50, 9, 30, 64, 12)
    total, tokens = 0.0, 0
    for example in map(dataset.__getitem__, range(6)):
        ids = torch.from_numpy(example.tokens.astype("int64"))[None]
        log_probabilities = model.eval()(ids[:, :-1]).log_softmax(-1)
        total -= log_probabilities.gather(-1, ids[:, 1:, None]).sum().item()
        tokens += ids.size(1) - 1
    assert evaluate(model, dataset, END, CPU) == pytest.approx(total / tokens, rel=1e-5)
    first_two = evaluate(model, make_dataset(5, 50), END, CPU)
    assert evaluate(model, dataset, END, CPU, examples=2) == pytest.approx(first_two, rel=1e-5)


def test_the_loss_of_a_step_counts_every_token_once(model):
    """A batch with a long and a short example has the gradient of all tokens together, regardless of padding."""
    long, short = (Example(ids.numpy(), np.ones(len(ids), bool)) for ids in (torch.arange(40), torch.arange(50, 56)))
    inputs, targets = collate([long, short], END)
    (model(inputs, targets) / 44).backward()
    together = model.h[0].mlp.c_fc.weight.grad.clone()  # pyright: ignore
    model.zero_grad()
    for example in (long, short):
        inputs, targets = collate([example], END)
        (model(inputs, targets) / 44).backward()
    torch.testing.assert_close(together, model.h[0].mlp.c_fc.weight.grad)  # pyright: ignore


def test_weight_decay_applies_to_matrices_only(model):
    decayed, free = make_optimizer(model, TrainingSettings()).param_groups
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0
    assert {parameter.dim() for parameter in decayed["params"]} == {2}
    assert {parameter.dim() for parameter in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))
    assert decayed["fused"]


def test_training_lowers_the_loss_and_logs_every_step(model, tmp_path):
    settings = TrainingSettings(epochs=20, batch_size=2, learning_rate=3e-3, evaluate_every=5)
    dataset = make_dataset(20, 30, 25)
    optimizer = make_optimizer(model, settings)
    state = fit(model, dataset, make_dataset(10, 12), settings, tmp_path, optimizer=optimizer)
    before, after = state.before, state.after
    assert before
    assert after
    assert before.train == pytest.approx(math.log(101), abs=0.2)
    assert after.train < before.train / 2
    assert after.train == pytest.approx(evaluate(model, dataset, END, CPU))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train_loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 41))
    assert steps[-1]["epoch"] == 20
    assert [line["step"] for line in lines if "val_loss" in line] == list(range(0, 41, 5))
    assert lines[-1]["train_set_loss"] == after.train
    assert all(line["grad_norm"] > 0 for line in steps)
    assert len((tmp_path / "timing.jsonl").read_text().splitlines()) == 40


def test_batch_lengths_are_rounded_up_but_not_beyond_the_positions(model):
    dataset = make_dataset(5, 18, 60, 62)  # max_length is 64
    for number, T in [(0, 16), (1, 32), (2, 64), (3, 64)]:
        inputs, targets, learned, _ = make_batch(dataset, [number], END, CPU)
        assert inputs.shape == targets.shape == (1, T)
        assert T % ROUND == 0
        assert learned == len(dataset[number].tokens) - 1
        rounded = model.eval()(inputs, targets)
        exact = model(*collate([dataset[number]], END))
        torch.testing.assert_close(rounded, exact)
    odd = make_examples(([1] * 50 + [END], [2, 51]), max_length=50)
    assert make_batch(odd, [0], END, CPU)[0].shape == (1, 50)


def test_a_run_ends_at_max_steps(model, tmp_path):
    settings = TrainingSettings(epochs=10**9, batch_size=1, learning_rate=1e-3, schedule="linear", max_steps=4)
    optimizer = make_optimizer(model, settings)
    fit(model, make_dataset(20, 30, 25), make_dataset(10), settings, tmp_path, optimizer=optimizer)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train_loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 3, 4]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 4)  # the schedule has four steps


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (4, 2), (2, 4), (3, 3)])
def test_accumulation_equals_one_large_batch(tmp_path, batch_size, accumulation):
    """8 x 1 = 4 x 2 = 2 x 4, token for token, unlike a mean of means; 3 x 3 is a different step."""
    dataset = make_dataset(*range(4, 60, 3))
    runs = []
    for size, pieces in [(8, 1), (batch_size, accumulation)]:
        torch.manual_seed(0)
        model = GPTModel(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=101, n_positions=64))
        settings = TrainingSettings(epochs=2, batch_size=size, gradient_accumulation=pieces, learning_rate=1e-2)
        folder = tmp_path / f"{size}x{pieces}-{len(runs)}"
        folder.mkdir()
        fit(model, dataset, make_dataset(10), settings, folder)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        runs.append([line["train_loss"] for line in lines if "train_loss" in line])
    assert (runs[1] == pytest.approx(runs[0], rel=1e-4)) == (batch_size * accumulation == 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_loss_stops_the_run_before_the_weights_change(model, tmp_path, value):
    model.ln_f.register_forward_hook(lambda module, _, x: x * value if module.training else x)
    before = model.wte.weight.clone()
    settings = TrainingSettings(epochs=1, batch_size=1, gradient_accumulation=2, learning_rate=1e-3)
    with pytest.raises(UserError, match=r"step 1: the loss is nan on dialogues [12], 3 of the data; try a lower"):
        fit(model, make_dataset(20, 30, 25), make_dataset(9), settings, tmp_path)
    assert torch.equal(model.wte.weight, before)


def test_the_defaults_depend_on_the_size_of_the_model():
    new = TrainingSettings()
    assert defaults(new, 82_000_000) == {"epochs": 10, "learning_rate": 5e-5}
    assert defaults(new, 7_000_000) == {"epochs": 3, "learning_rate": 1.2e-4}
    assert explain(new, 7_000_000).count("the default for a small model") == 2
    asked = TrainingSettings(epochs=3, seed=4)
    assert defaults(asked, 82_000_000) == {"learning_rate": 5e-5}
    assert explain(asked, 82_000_000) == "epochs: 3 (as requested); learning rate: 5e-05 (the default)"
    assert explain(TrainingSettings(max_steps=7), 82_000_000).endswith("; at most 7 steps (as requested)")


def test_a_small_model_gets_larger_batches_for_a_lot_of_data():
    much = {"epochs": 3, "learning_rate": 5e-4, "batch_size": 8, "schedule": "linear"}
    assert defaults(TrainingSettings(), 7_000_000, 2_000_000) == much
    assert complete(TrainingSettings(), 7_000_000, 2_000_000) == TrainingSettings(**much)
    assert explain(TrainingSettings(), 7_000_000, 2_000_000).endswith(
        "schedule: linear (the default for a small model and 2,000,000 training tokens)"
    )
    for asked in ({"batch_size": 4}, {"learning_rate": 1e-4}, {"schedule": "cosine"}, {"lora_rank": 8}):
        assert "batch_size" not in defaults(TrainingSettings(**asked), 7_000_000, 2_000_000)
    assert defaults(TrainingSettings(), 7_000_000, 900_000) == defaults(TrainingSettings(), 7_000_000)
    assert defaults(TrainingSettings(), 82_000_000, 2_000_000) == defaults(TrainingSettings(), 82_000_000)


def test_clipping_can_be_turned_off(model, tmp_path):
    settings = TrainingSettings(epochs=1, learning_rate=1e-3, max_grad_norm=0)
    optimizer = make_optimizer(model, settings)
    fit(model, make_dataset(20, 20), make_dataset(10), settings, tmp_path, optimizer=optimizer)
    assert "grad_norm" not in (tmp_path / "metrics.jsonl").read_text()


def test_the_machine_has_the_requested_device_and_precision():
    machine = choose_machine("cpu", "fp32")
    assert (machine.device.type, machine.precision) == ("cpu", "fp32")
    assert "precision: fp32 (as requested)" in machine.explanation
    assert choose_machine("auto", "auto").precision in ("fp32", "bf16")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda: not found"):
            choose_machine("cuda", "auto")


def test_cudnn_attention_is_off_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        assert choose_machine("cuda", "fp32").device.type == "cuda"
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_the_schedules_equal_those_of_transformers(name, model):
    from transformers import get_scheduler

    steps, warmup = 50, 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    reference = get_scheduler(name if name != "constant" else "constant_with_warmup", optimizer, warmup, steps)
    settings = TrainingSettings(learning_rate=0.3, schedule=name, warmup=0.2)
    for step in range(1, steps + 1):
        # transformers starts at a rate of 0, with which a step learns nothing; our warm-up is one step ahead.
        if step <= warmup:
            optimizer.step()
            reference.step()
        assert learning_rate_at(step, steps, settings) == pytest.approx(reference.get_last_lr()[0]), step
        if step > warmup:
            optimizer.step()
            reference.step()


def test_a_schedule_without_warmup_starts_at_the_full_rate():
    settings = TrainingSettings(learning_rate=0.3)
    assert [learning_rate_at(step, 4, settings) for step in range(1, 5)] == [0.3] * 4
    cosine = TrainingSettings(learning_rate=0.3, schedule="cosine")
    assert [learning_rate_at(step, 2, cosine) for step in (1, 2)] == pytest.approx([0.3, 0.15])


def first_losses(model: GPTModel, tmp_path, name: str, machine: Machine = CPU) -> list[float]:
    (tmp_path / name).mkdir()
    settings = TrainingSettings(epochs=1, batch_size=2, learning_rate=1e-3, max_grad_norm=0)
    fit(model, make_dataset(20, 30, 25), make_dataset(10), settings, tmp_path / name, machine)
    lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    return [line.get("train_loss", line.get("train_set_loss")) for line in lines]


def test_dropout_is_on_in_training_and_off_in_evaluation(model, tmp_path):
    dropped = GPTModel(model.config, dropout=0.5)
    dropped.load_state_dict(model.state_dict())
    without, with_dropout = first_losses(model, tmp_path, "without"), first_losses(dropped, tmp_path, "with")
    assert with_dropout[0] == without[0]  # the evaluation before training
    assert with_dropout[1] != without[1]  # the first step


def test_bf16_is_used_when_chosen(model, tmp_path):
    again = copy.deepcopy(model)
    exact = first_losses(model, tmp_path, "fp32")
    rounded = first_losses(again, tmp_path, "bf16", Machine(torch.device("cpu"), "bf16", ""))
    assert rounded[1] != exact[1]
    assert rounded == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_only_changes_the_memory(tmp_path, dropout):
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=101, n_positions=64), dropout)
    again = copy.deepcopy(model)
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    for block in again.h:
        block.ln_1.register_forward_pre_hook(count)
    settings = TrainingSettings(epochs=1, batch_size=3, learning_rate=1e-3)
    for each, name in ((model, "plain"), (again, "checkpointed")):
        chosen = replace(settings, gradient_checkpointing=name == "checkpointed")
        fit(each, make_dataset(20, 30, 25), make_dataset(10), chosen, tmp_path / name)
    assert calls == 2 * (4 + 2)  # four evaluations, and the step's forward pass twice
    for (name, parameter), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, other), name


FP16 = Machine(torch.device("cpu"), "fp16", "")


def test_fp16_with_scaled_gradients_follows_fp32(model, tmp_path):
    again = copy.deepcopy(model)
    exact = first_losses(model, tmp_path, "fp32")
    rounded = first_losses(again, tmp_path, "fp16", FP16)
    assert rounded[1] != exact[1]
    assert rounded == pytest.approx(exact, rel=1e-2)


def test_a_step_whose_fp16_gradient_overflows_is_skipped(model, tmp_path):
    before = copy.deepcopy(model.state_dict())
    scaler = FP16.gradient_scaler({})
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**40})
    optimizer = make_optimizer(model, TrainingSettings())
    batch = make_batch(make_dataset(20), [0], END, FP16)
    _, _, norm = take_step(Learner(model, optimizer, scaler, 1.0), [batch], FP16)
    assert norm is not None
    assert not math.isfinite(norm)
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    scaler.load_state_dict({**scaler.state_dict(), "scale": 1.0})
    model.wte.weight.register_hook(lambda gradient: gradient + math.inf)
    with pytest.raises(FloatingPointError, match="too large for fp16"):
        take_step(Learner(model, optimizer, scaler, 1.0), [batch], FP16)


def test_the_fp16_gradient_scale_is_saved_in_the_checkpoint(model, tmp_path):
    settings = TrainingSettings(epochs=2, batch_size=1, learning_rate=1e-3)
    state = fit(model, make_dataset(20, 30), make_dataset(10), settings, tmp_path, FP16)
    assert state.scaler == {}  # nothing was saved
    saving = RunSettings(keep_checkpoint=True)
    state = fit(model, make_dataset(20, 30), make_dataset(10), settings, tmp_path / "kept", FP16, saving)
    assert state.scaler["_growth_tracker"] == 4
    assert FP16.gradient_scaler(state.scaler).state_dict() == state.scaler


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_nan_gradient_is_not_applied(model, tmp_path, precision):
    before = copy.deepcopy(model.state_dict())
    model.ln_f.weight.register_hook(lambda gradient: gradient * math.nan)
    settings = TrainingSettings(epochs=1, batch_size=3, learning_rate=1e-3)
    with pytest.raises(UserError, match="step 1: the gradient is nan on dialogues 1, 2, 3 of the data") as stopped:
        fit(model, make_dataset(20, 30, 25), make_dataset(9), settings, tmp_path, CPU._replace(precision=precision))
    assert ("--precision fp32" in str(stopped.value)) == (precision == "bf16")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_nan_validation_loss_stops_the_run(model, tmp_path):
    with torch.no_grad():
        model.wpe.weight[60] = math.nan  # no training example reaches this position
    settings = TrainingSettings(epochs=1, batch_size=3, learning_rate=1e-3)
    with pytest.raises(UserError, match="step 0: the evaluation loss is not finite"):
        # No reply can be sampled from such weights.
        fit(model, make_dataset(20, 30, 25), make_dataset(64), settings, tmp_path, watch=lambda _: pytest.fail("asked"))
