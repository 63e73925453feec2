"""Each drop-in gives the same numbers as torch's own function or layer."""

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from fast import Embedding, linear_cross_entropy, loss
from fast.attention import short_attention
from fast.linear import CastLinear
from fast.loss import TRAINED_ROWS, LinearCrossEntropy


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
def test_cross_entropy_in_chunks_equals_pytorchs(autocast, tolerance, frozen, rows, compiled, monkeypatch):
    traced = torch.compile(loss.loss_and_gradient, backend="aot_eager", dynamic=True)
    monkeypatch.setattr(loss, "compiled_differentiation", traced)
    torch.manual_seed(0)
    x, weight, targets = torch.randn(rows, 64), torch.randn(301, 64) / 4, torch.randint(301, (rows,))
    targets[1::3] = -100
    results = []
    for function in (cross_entropy, lambda *given: LinearCrossEntropy.apply(*given, compiled)):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            total = function(inputs[0], inputs[1], targets)
        (total / 7).backward()
        results.append([total, *(tensor.grad for tensor in inputs)])
    assert (results[1][2] is None) == frozen
    for expected, got in zip(*results, strict=True):
        if expected is not None:
            assert got.dtype == expected.dtype == torch.float32
            assert (got - expected).norm() < tolerance * expected.norm()
    assert not results[1][1][1::3].any()  # ignored targets have no gradient


def test_fp16_keeps_the_gradients_of_unlikely_tokens():
    """A token of probability 2e-8, which is 0 in fp16 before the loss is scaled."""
    rows, scale = 2 * TRAINED_ROWS, 65536
    embedding = Embedding(300, 64)
    with torch.no_grad():
        embedding.weight.zero_()
        embedding.weight[0] = -12 / 64
    with torch.autocast("cpu", dtype=torch.float16):
        targets = torch.arange(rows) % 299 + 1
        total = linear_cross_entropy(torch.ones(rows, 64), embedding.weight, targets, reduction="sum")
    (total / rows * scale).backward()
    unlikely = 1 / (1 + 299 * math.exp(12))
    assert embedding.weight.grad is not None
    torch.testing.assert_close(embedding.weight.grad[0] / scale, torch.full((64,), unlikely), rtol=0.05, atol=0)


@pytest.mark.parametrize("target", [-1, 400])
def test_a_target_outside_the_vocabulary_is_an_error(target):
    x, weight = torch.randn(2, 8, requires_grad=True), torch.randn(10, 8)
    with pytest.raises(RuntimeError, match="out of bounds"):
        LinearCrossEntropy.apply(x, weight, torch.tensor([3, target]), False)


def test_ignored_targets_have_a_loss_of_zero():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(10, 8, requires_grad=True)
    for rows in (4, 0):
        total = LinearCrossEntropy.apply(x[:rows], weight, torch.full((rows,), -100), False)
        total.backward()  # pyright: ignore
        assert total.item() == 0  # pyright: ignore
        assert not weight.grad.any()  # pyright: ignore


def test_the_logits_of_all_rows_never_exist_at_once():
    rows = 3 * TRAINED_ROWS
    x, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    with torch.profiler.profile(record_shapes=True) as profile:
        LinearCrossEntropy.apply(x, weight, torch.randint(40, (rows,)), False).backward()  # pyright: ignore
    shapes = [shape for event in profile.events() or [] for shape in event.input_shapes]
    assert [TRAINED_ROWS, 40] in shapes
    assert [rows, 40] not in shapes


@pytest.mark.parametrize("rows", [9, 2 * TRAINED_ROWS])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_tied_weight_gets_its_gradient_without_a_second_tensor_of_its_size(rows, autocast):
    torch.manual_seed(0)
    ids, targets, gradients = torch.randint(300, (rows,)), torch.randint(300, (rows,)), []
    for make in (Embedding, torch.nn.Embedding):
        embedding = make(300, 16)
        with torch.no_grad():
            embedding.weight.copy_(torch.randn(300, 16, generator=torch.Generator().manual_seed(1)))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total = linear_cross_entropy(embedding(ids), embedding.weight, targets, reduction="sum")
        with torch.profiler.profile(record_shapes=True) as profile:
            total.backward()
        gradients.append(embedding.weight.grad)
        made = {event.name for event in profile.events() or [] if [300, 16] in event.input_shapes}
        assert ("aten::index_add_" in made) == (make is Embedding)
        assert bool({"aten::add", "aten::add_", "aten::clone"} & made) == (make is not Embedding)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_without_a_head_has_torchs_gradient(tied):
    """For a loss that does not pass through the head, even after one that did."""
    embedding, ids = Embedding(20, 4), torch.tensor([3, 3, 19])
    with torch.no_grad():
        embedding.weight.normal_()
    if tied:
        linear_cross_entropy(embedding(ids), embedding.weight, ids, reduction="sum").backward()
        embedding.weight.grad = None
    embedding(ids).sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.sum(dim=1).tolist() == [0] * 3 + [8] + [0] * 15 + [4]


def test_short_attention_equals_pytorchs():
    """Forward and backward in bf16, as close to fp32 as PyTorch's own."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, gradient = (torch.randn(2, 3, 20, 16, generator=generator) for _ in range(4))
    results = []
    for dtype, function in (
        (torch.float32, partial(F.scaled_dot_product_attention, is_causal=True)),
        (torch.bfloat16, partial(F.scaled_dot_product_attention, is_causal=True)),
        (torch.bfloat16, partial(short_attention, dropout=0.0)),
    ):
        inputs = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (q, k, v)]
        y = function(*inputs)
        y.backward(gradient.to(dtype))
        results.append([y, *(tensor.grad for tensor in inputs)])
    for exact, theirs, ours in zip(*results, strict=True):
        assert (ours - exact).norm() < max(0.01 * exact.norm(), 1.5 * (theirs - exact).norm())
