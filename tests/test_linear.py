"""Products that save memory, against PyTorch's own."""

import math

import pytest
import torch
from torch.nn import functional as F

import fast.loss as linear
from fast.linear import CastLinear
from fast.loss import TRAINED_ROWS, LinearCrossEntropy
from gpt_model import TokenEmbedding


def test_cast_linear_in_blocks_equals_linear():
    """A weight of several blocks (more than 8M numbers), forward and backward, in bf16 against fp32."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 5, 512), torch.randn(17_000, 512), torch.randn(17_000)
    gradient = torch.randn(3, 5, 17_000)
    results = []
    for function in (F.linear, CastLinear.apply):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function(*inputs)
        y.backward(gradient.to(y.dtype))
        results.append([y, *(tensor.grad for tensor in inputs)])
    for expected, got in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        assert (got - expected).float().norm() < 0.01 * expected.float().norm()


def cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, weight), targets, reduction="sum")


@pytest.mark.parametrize(
    ("rows", "compiled"),
    [(3, False), (TRAINED_ROWS, False), (2 * TRAINED_ROWS + 5, False), (2 * TRAINED_ROWS + 5, True)],
)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-5), (True, 0.01)])
def test_cross_entropy_a_few_rows_at_a_time_equals_pytorchs(autocast, tolerance, frozen, rows, compiled, monkeypatch):
    traced = torch.compile(linear.loss_and_gradient, backend="aot_eager", dynamic=True)
    monkeypatch.setattr(linear, "compiled_differentiation", lambda: traced)
    torch.manual_seed(0)
    x, weight, targets = torch.randn(rows, 64), torch.randn(301, 64) / 4, torch.randint(301, (rows,))
    targets[1::3] = -100
    results = []
    for function in (cross_entropy, lambda *given: LinearCrossEntropy.apply(*given, compiled)):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = function(inputs[0], inputs[1], targets)
        (loss / 7).backward()
        results.append([loss, *(tensor.grad for tensor in inputs)])
    assert (results[1][2] is None) == frozen
    for expected, got in zip(*results, strict=True):
        if expected is not None:
            assert got.dtype == expected.dtype == torch.float32
            assert (got - expected).norm() < tolerance * expected.norm()
    assert not results[1][1][1::3].any()  # what is not learned has no gradient


def test_fp16_keeps_the_gradients_of_unlikely_tokens():
    """A token of probability 2e-8, which is 0 in fp16 before the loss is scaled."""
    rows, scale = 2 * TRAINED_ROWS, 65536
    embedding = TokenEmbedding(300, 64)
    with torch.no_grad():
        embedding.weight.zero_()
        embedding.weight[0] = -12 / 64
    with torch.autocast("cpu", dtype=torch.float16):
        loss = embedding.cross_entropy(torch.ones(rows, 64), torch.arange(rows) % 299 + 1)
    (loss / rows * scale).backward()
    unlikely = 1 / (1 + 299 * math.exp(12))
    assert embedding.weight.grad is not None
    torch.testing.assert_close(embedding.weight.grad[0] / scale, torch.full((64,), unlikely), rtol=0.05, atol=0)


@pytest.mark.parametrize("target", [-1, 400])
def test_a_target_outside_the_vocabulary_is_our_bug(target):
    x, weight = torch.randn(2, 8, requires_grad=True), torch.randn(10, 8)
    with pytest.raises(RuntimeError, match="out of bounds"):
        LinearCrossEntropy.apply(x, weight, torch.tensor([3, target]), False)


def test_nothing_learned_is_a_loss_of_zero():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(10, 8, requires_grad=True)
    for rows in (4, 0):
        loss = LinearCrossEntropy.apply(x[:rows], weight, torch.full((rows,), -100), False)
        loss.backward()  # pyright: ignore
        assert loss.item() == 0  # pyright: ignore
        assert not weight.grad.any()  # pyright: ignore


def test_the_logits_of_all_rows_never_exist_at_once():
    rows = 3 * TRAINED_ROWS
    x, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    with torch.profiler.profile(record_shapes=True) as profile:
        LinearCrossEntropy.apply(x, weight, torch.randint(40, (rows,)), False).backward()  # pyright: ignore
    shapes = [shape for event in profile.events() or [] for shape in event.input_shapes]
    assert [TRAINED_ROWS, 40] in shapes
    assert [rows, 40] not in shapes
