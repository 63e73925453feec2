"""Training steps on a GPU: captured steps equal eager ones, and repeated steps are bit-identical."""

import hashlib
from dataclasses import replace

import pytest
import torch

from dialogues.batches import IGNORED
from gpt_model import GPTConfig, GPTModel
from load_gpt2_weights import add_embeddings
from settings import TrainingSettings
from training.captured import CapturedSteps
from training.device import for_training
from training.loop import batch_seed
from training.lora import add_adapters
from training.optimizer import make_optimizer
from training.step import Batch, Learner, set_learning_rate, take_step

pytestmark = pytest.mark.gpu
CONFIG = GPTConfig(n_layer=4, n_head=4, n_embd=256)
SETTINGS = TrainingSettings(learning_rate=1e-3)
STEPS = 20


def make_learner(gpu, settings: TrainingSettings = SETTINGS, new_tokens: int = 0) -> Learner:
    torch.manual_seed(0)
    model = GPTModel(CONFIG, settings.dropout)
    if new_tokens:
        add_embeddings(model, CONFIG.vocab_size + new_tokens)
    if settings.lora_rank:
        add_adapters(model, settings.lora_rank, seed=1, new_tokens=new_tokens)
    model.to(gpu.device)
    optimizer = make_optimizer(model, settings)
    return Learner(for_training(model, settings), optimizer, gpu.gradient_scaler({}), settings.max_grad_norm)


def make_batches(gpu, step: int, rows: int, lengths: list[int]) -> list[Batch]:
    """Random batches of these lengths; a third of the targets are ignored."""
    generator, batches = torch.Generator().manual_seed(step), []
    for place, T in enumerate(lengths):
        inputs, targets = torch.randint(50_000, (2, rows, T), generator=generator).unbind()
        targets[torch.rand(rows, T, generator=generator) < 1 / 3] = IGNORED
        learned = int((targets != IGNORED).sum())
        batches.append(Batch(inputs.to(gpu.device), targets.to(gpu.device), learned, batch_seed(1, step, place)))
    return batches


def run(take, learner: Learner, gpu, rows: int, lengths: list[int], batches: int = 1) -> list[tuple[float, float]]:
    """Take `STEPS` steps of alternating lengths, and return their losses and gradient norms."""
    results = []
    for step in range(STEPS):
        set_learning_rate(learner.optimizer, 2.0 ** -(10 + step % 3))  # exact in fp32, as graphs read it
        chosen = [lengths[(step + place) % len(lengths)] for place in range(batches)]
        loss, _, norm = take(make_batches(gpu, step, rows, chosen))
        results.append((loss, norm or 0.0))
    return results


def flat(learner: Learner) -> torch.Tensor:
    return torch.cat([parameter.detach().float().flatten() for parameter in learner.model.parameters()])


def digest(model: torch.nn.Module) -> str:
    value = hashlib.sha256()
    for parameter in model.parameters():
        value.update(parameter.detach().float().cpu().numpy().tobytes())
    return value.hexdigest()


CASES = {
    "bf16": ("bf16", SETTINGS, 0, 1),
    "dropout": ("bf16", replace(SETTINGS, dropout=0.1), 0, 1),
    "fp32": ("fp32", SETTINGS, 0, 1),
    "accumulation": ("bf16", replace(SETTINGS, dropout=0.1), 0, 3),
    "no clipping": ("bf16", replace(SETTINGS, max_grad_norm=0), 0, 1),
    "LoRA": ("bf16", replace(SETTINGS, lora_rank=8), 0, 1),
    "LoRA and new tokens": ("bf16", replace(SETTINGS, lora_rank=8), 2, 1),
    "new tokens": ("bf16", SETTINGS, 2, 1),
    "compiled": ("bf16", replace(SETTINGS, compile=True), 0, 1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("rows", "lengths"), [(4, [48, 96]), (4, [1024, 512])])
def test_captured_steps_equal_eager_ones(gpu, case, rows, lengths):
    precision, settings, new_tokens, batches = CASES[case]
    gpu = gpu._replace(precision=precision)
    eager, captured = (make_learner(gpu, settings, new_tokens) for _ in range(2))
    expected = run(lambda given: take_step(eager, given, gpu), eager, gpu, rows, lengths, batches)
    steps = CapturedSteps(captured, gpu, rows, sorted(lengths), accumulates=batches > 1)
    assert len(steps.graphs) == len(lengths) + (batches > 1)
    got = run(steps, captured, gpu, rows, lengths, batches)
    assert got[0] == pytest.approx(expected[0], rel=2e-3 if settings.compile else 1e-6)
    assert [loss for loss, _ in got] == pytest.approx([loss for loss, _ in expected], rel=1e-3)
    # Rounding differences grow where Adam divides by moments near 0, so compare with the distance from the start.
    start, ours, theirs = (flat(one) for one in (make_learner(gpu, settings, new_tokens), captured, eager))
    assert (ours - theirs).norm() <= (1e-4 if precision == "fp32" else 2e-2) * (theirs - start).norm()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("captured", [True, False])
def test_repeated_steps_are_bit_identical(gpu, case, captured):
    """The rows are long enough for FlashAttention's backward pass to add from several blocks."""
    precision, settings, new_tokens, batches = CASES[case]
    gpu, digests = gpu._replace(precision=precision), []
    for _ in range(2):
        learner = make_learner(gpu, settings, new_tokens)
        steps = CapturedSteps(learner, gpu, 4, [400], batches > 1) if captured else None
        run(steps or (lambda given, one=learner: take_step(one, given, gpu)), learner, gpu, 4, [400], batches)
        digests.append(digest(learner.model))
    assert digests[0] == digests[1]


def test_a_captured_step_with_an_infinite_loss_changes_nothing(gpu):
    learner = make_learner(gpu)
    steps = CapturedSteps(learner, gpu, 4, [48], accumulates=False)
    run(steps, learner, gpu, 4, [48])
    before = digest(learner.model)
    batches = [batch._replace(learned=0) for batch in make_batches(gpu, 0, 4, [48])]
    with pytest.raises(FloatingPointError, match="the loss is inf"):
        steps(batches)
    assert digest(learner.model) == before
    steps(make_batches(gpu, 0, 4, [48]))
    assert digest(learner.model) != before


def test_captured_steps_wait_for_the_gpu_once(gpu):
    learner = make_learner(gpu)
    steps = CapturedSteps(learner, gpu, 4, [48], accumulates=False)
    batches = make_batches(gpu, 0, 4, [48])
    steps(batches)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as waits:
            steps(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1  # for the loss and the norm
