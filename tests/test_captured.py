"""Capturable optimizer steps give the same numbers as plain steps; tested on the CPU."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch

from conftest import CPU, make_examples
from dialogues.batches import IGNORED
from fast.loss import TRAINED_ROWS, LinearCrossEntropy
from fast.optimizer import AdamW
from gpt_model import GPTConfig, GPTModel
from settings import TrainingSettings
from training import captured
from training.captured import LEAST, MOST, CapturedSteps, choose_lengths, graph_length, why_eager
from training.loop import batch_seed
from training.lora import add_adapters
from training.optimizer import make_optimizer
from training.step import Batch, Learner, set_learning_rate, take_step

LENGTHS = [16, 32, 64]
SETTINGS = TrainingSettings(learning_rate=1e-3)


def make_learner(max_grad_norm: float = 0.5, dropout: float = 0.1, lora_rank: int = 0) -> Learner:
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=101, n_positions=64), dropout)
    if lora_rank:
        add_adapters(model, lora_rank, seed=1)
    optimizer = make_optimizer(model, SETTINGS)
    return Learner(model, optimizer, CPU.gradient_scaler({}), max_grad_norm)


def make_batches(step: int, rows: int, lengths: list[int], seed: int = 0) -> list[Batch]:
    """Random batches of these lengths; a third of the targets are ignored."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    batches = []
    for place, T in enumerate(lengths):
        inputs, targets = torch.randint(101, (2, rows, T), generator=generator).unbind()
        targets[torch.rand(rows, T, generator=generator) < 1 / 3] = IGNORED
        batches.append(Batch(inputs, targets, int((targets != IGNORED).sum()), batch_seed(1, step, place)))
    return batches


def run(take, learner: Learner, plan: list[list[Batch]]) -> list[tuple[float, int, float | None]]:
    """Take the steps of a plan with a falling learning rate, and return their results."""
    results = []
    for step, batches in enumerate(plan):
        set_learning_rate(learner.optimizer, 1e-3 / (1 + step))
        results.append(take(batches))
    return results


@pytest.mark.parametrize(("accumulation", "lora_rank"), [(1, 0), (3, 0), (1, 4)])
@pytest.mark.parametrize("max_grad_norm", [0.5, 0.0])
def test_twenty_captured_steps_equal_plain_ones(accumulation, lora_rank, max_grad_norm):
    plan = [make_batches(step, 4, [LENGTHS[(step + n) % 3] for n in range(accumulation)]) for step in range(20)]
    plain, captured = (make_learner(max_grad_norm, lora_rank=lora_rank) for _ in range(2))
    expected = run(lambda batches: take_step(plain, batches, CPU), plain, plan)
    steps = CapturedSteps(captured, CPU, 4, LENGTHS, accumulates=accumulation > 1)
    got = run(steps, captured, plan)
    for (loss, learned, norm), (their_loss, their_learned, their_norm) in zip(got, expected, strict=True):
        assert loss == pytest.approx(their_loss, rel=1e-6)
        assert learned == their_learned
        assert norm == pytest.approx(their_norm, rel=1e-5) if max_grad_norm else norm is their_norm is None
    assert got[-1][0] != got[0][0]
    torch.testing.assert_close(dict(captured.model.named_parameters()), dict(plain.model.named_parameters()))


def test_a_smaller_batch_is_padded_in_rows_and_length():
    """Three rows of 20 tokens in buffers of four rows of 32; no dropout, since its masks have the buffers' shape."""
    learners = [make_learner(dropout=0) for _ in range(2)]
    steps = CapturedSteps(learners[1], CPU, 4, LENGTHS, accumulates=False)
    run(steps, learners[1], [make_batches(0, 4, [32])])  # leave other tokens in the buffers
    run(lambda batches: take_step(learners[0], batches, CPU), learners[0], [make_batches(0, 4, [32])])
    batches = make_batches(1, 3, [20])
    expected = take_step(learners[0], batches, CPU)
    got = steps(batches)
    assert got == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(*(dict(learner.model.named_parameters()) for learner in learners))


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_whose_loss_or_gradient_is_not_finite_changes_nothing(where, accumulates):
    learner = make_learner(dropout=0)
    steps = CapturedSteps(learner, CPU, 4, LENGTHS, accumulates)
    run(steps, learner, [make_batches(step, 4, [16]) for step in range(2)])
    before = copy.deepcopy((dict(learner.model.named_parameters()), learner.optimizer.state_dict()["state"]))
    batches = make_batches(2, 4, [32])
    if where == "loss":
        steps.learned.fill_(0)  # the summed loss is divided by this
        broken = [batch._replace(learned=0) for batch in batches]
        with pytest.raises(FloatingPointError, match="the loss is inf"):
            steps(broken)
    else:
        handle = learner.model.ln_f.register_full_backward_hook(lambda *_: (torch.full((4, 32, 32), torch.nan),))
        with pytest.raises(FloatingPointError, match="the gradient is nan"):
            steps(batches)
        handle.remove()
    after = dict(learner.model.named_parameters()), learner.optimizer.state_dict()["state"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    loss, _, norm = steps(batches)  # no trace of the bad step is left
    other = make_learner(dropout=0)
    results = run(
        CapturedSteps(other, CPU, 4, LENGTHS, accumulates), other, [make_batches(s, 4, [16]) for s in range(2)]
    )
    assert len(results) == 2
    assert (loss, norm) == pytest.approx(take_step(other, batches, CPU)[::2], rel=1e-6)


@pytest.mark.parametrize("accumulates", [False, True])
def test_steps_run_eagerly_if_they_cannot_be_captured(accumulates, monkeypatch):
    """Neither the warm-up nor the failed capture changes the training."""

    def fail(work, pool):  # a capture records the work without running it
        raise RuntimeError("operation not permitted\nwhen the stream is capturing")

    monkeypatch.setattr(captured, "warm_up", lambda work: work())
    monkeypatch.setattr(captured, "capture", fail)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    plan = [make_batches(step, 4, [LENGTHS[step % 3]]) for step in range(4)]
    learners = [make_learner() for _ in range(2)]
    steps = [CapturedSteps(learner, CPU, 4, LENGTHS, accumulates) for learner in learners]
    steps[1].capture()
    assert steps[1].failure == "operation not permitted"
    assert not steps[1].graphs
    assert run(steps[1], learners[1], plan) == run(steps[0], learners[0], plan)
    torch.testing.assert_close(*(dict(learner.model.named_parameters()) for learner in learners), rtol=0, atol=0)


def test_the_loss_over_all_rows_equals_the_loss_over_learned_rows():
    """A GPU computes every row of the batch, the CPU only rows with a learned target."""
    torch.manual_seed(0)
    x, weight, targets = torch.randn(3 * TRAINED_ROWS, 16), torch.randn(90, 16), torch.randint(90, (3 * TRAINED_ROWS,))
    targets[torch.rand(len(targets)) < 0.7] = IGNORED
    learned, results = targets != IGNORED, []
    for rows in (torch.ones_like(learned), learned):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        total = LinearCrossEntropy.apply(inputs[0][rows], inputs[1], targets[rows], False)
        total.backward()  # pyright: ignore
        results.append([total, *(tensor.grad for tensor in inputs)])
    torch.testing.assert_close(*results)


def test_graph_lengths_are_few_and_add_an_eighth_at_most():
    lengths = sorted({graph_length(length) for length in range(16, 1025, 16)})
    assert lengths == [*range(16, 257, 16), *range(288, 513, 32), *range(576, 1025, 64)]
    for length in range(16, 1025, 16):
        assert length <= graph_length(length) < length * 9 / 8
    assert graph_length(1025) == 1152


def test_rare_lengths_use_the_next_larger_graph():
    batches = [48] * LEAST + [64] * (LEAST - 1) + [80] * LEAST + [272] * LEAST + [1000]
    assert choose_lengths(batches, longest=1000) == [48, 80, 288, 1000]
    assert choose_lengths([], longest=112) == [112]
    every = [length for length in range(16, 4096, 16) for _ in range(LEAST)]
    assert len(choose_lengths(every, longest=4096)) == MOST
    assert choose_lengths(every, longest=4096)[-1] == 4096


def test_a_resumed_run_has_the_same_graph_lengths(tmp_path):
    """A resumed run must replay the graphs of a run that was never stopped."""
    from conftest import Checkpoints, Examples, RunSettings, Trainer, TrainingSetup

    dataset = make_examples(*(([1] * n + [100], [2, n + 1]) for n in (5, 20, 40, 60, 61)), max_length=64)
    learner = make_learner()
    settings = replace(SETTINGS, epochs=5, batch_size=2)
    setup = TrainingSetup(
        model=learner.model,  # pyright: ignore[reportArgumentType]
        optimizer=learner.optimizer,
        examples=Examples(dataset, dataset, 100),
        settings=settings,
        saving=RunSettings(),
        machine=CPU,
        checkpoints=Checkpoints(tmp_path / "checkpoint", {}),
    )
    trainer = Trainer(setup)
    counted = Counter(trainer.batch_lengths())
    assert sum(counted.values()) == 15
    trainer.state.step = 7
    assert Counter(trainer.batch_lengths()) == counted


def test_the_reasons_for_eager_steps_are_reported():
    adamw, plain = make_learner().optimizer, torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    assert isinstance(adamw, AdamW)
    assert why_eager(CPU, SETTINGS, adamw) == ""
    assert why_eager(CPU._replace(processes=2, precision="fp16"), SETTINGS, adamw) == "several processes, fp16"
    checkpointed = replace(SETTINGS, gradient_checkpointing=True)
    assert why_eager(CPU, checkpointed, plain) == "SGD, --gradient-checkpointing"
