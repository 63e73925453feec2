"""The model against itself: sizes, cache, padding, loss."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from fast.attention import short_attention
from fast.kv_cache import FixedStep, KVCache
from fast.packed import FEW_ROWS, Packable
from gpt_model import PUBLISHED, GPTConfig, GPTModel, in_bf16

PARAMETERS = {
    "distilgpt2": 81_912_576,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}
TINY = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=101, n_positions=64)


@pytest.fixture
def model() -> GPTModel:
    torch.manual_seed(0)
    model = GPTModel(TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(101, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    with torch.device("meta"):
        model = GPTModel(PUBLISHED[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(n_layer=8, n_head=4, n_embd=256, vocab_size=1000))
    parameters = dict(model.named_parameters())
    assert parameters["h.0.mlp.c_fc.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert parameters["h.0.mlp.c_proj.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert parameters["h.3.ln_1.weight"].unique().tolist() == [1]
    assert parameters["h.3.attn.c_attn.bias"].unique().tolist() == [0]


def test_no_token_sees_what_comes_after_it(model):
    ids = random_ids(1, 20)
    changed = ids.clone()
    changed[0, 12:] = 0
    torch.testing.assert_close(model(ids)[:, :12], model(changed)[:, :12])
    assert not torch.allclose(model(ids)[:, 12], model(changed)[:, 12])


def test_cached_equals_uncached(model):
    ids = random_ids(3, 40)
    expected = model(ids)
    cache = KVCache(TINY, padding=torch.zeros(3, dtype=torch.long), capacity=40)
    with torch.inference_mode():
        for start, end in [(0, 7), (7, 8), (8, 20), *((t, t + 1) for t in range(20, 40))]:
            logits = model.next_token_logits(ids[:, start:end], cache)
            torch.testing.assert_close(logits, expected[:, end - 1], atol=1e-4, rtol=0)


def test_left_padding_changes_nothing(model):
    ids = random_ids(1, 10)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    batch = torch.cat([padded, random_ids(1, 15)])
    cache = KVCache(TINY, padding=torch.tensor([5, 0]), capacity=20)
    with torch.inference_mode():
        logits = model.next_token_logits(batch, cache)
        torch.testing.assert_close(logits[:1], model(ids)[:, -1], atol=1e-4, rtol=0)
        assert logits.isfinite().all()


def test_the_step_that_a_gpu_records_equals_any_other(model):
    """Padded rows, a cache with more room than is used, never written memory in it, and one that is made shorter."""
    prompt, more = random_ids(2, 9), random_ids(2, 8)
    caches = [KVCache(TINY, padding=torch.tensor([0, 4]), capacity=40) for _ in range(2)]
    caches[1].keys.fill_(torch.nan)
    caches[1].values.fill_(torch.nan)
    with torch.inference_mode():
        for cache in caches:
            model.next_token_logits(prompt, cache)
        step = FixedStep(model.last_logits, caches[1])
        for t in (0, 1, 2, 3, 4, 2, 5, 6):
            for cache in caches:
                cache.length = min(cache.length, len(prompt[0]) + t)
            expected = model.next_token_logits(more[:, t : t + 1], caches[0])
            torch.testing.assert_close(step(more[:, t : t + 1], caches[1]), expected, atol=1e-4, rtol=0)
            assert caches[0].length == caches[1].length


def test_a_cache_is_freed_with_its_step(model):
    """At once, not when Python looks for cycles: on a GPU they are gigabytes, batch after batch."""
    cache = KVCache(TINY, padding=torch.zeros(1, dtype=torch.long), capacity=8)
    cache.step = FixedStep(model.last_logits, cache)
    gone = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert gone() is None
    finally:
        gc.enable()


def test_loss_is_the_summed_negative_log_likelihood_of_learned_tokens(model):
    ids, targets = random_ids(2, 12), random_ids(2, 12).roll(1)
    targets[0, 3:] = -100
    log_probabilities = model(ids).log_softmax(dim=-1)
    expected = sum(
        -log_probabilities[b, t, targets[b, t]] for b in range(2) for t in range(12) if targets[b, t] != -100
    )
    torch.testing.assert_close(model(ids, targets), expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_tied_weight_gets_one_gradient_without_a_second_of_its_size(model, autocast):
    ids, weight = random_ids(2, 9), model.wte.weight
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(ids, ids)
        with torch.profiler.profile(record_shapes=True) as profile:
            loss.backward()
        other = weight.detach().clone().requires_grad_()  # autograd's own sum
        model.loss(model.transform(F.embedding(ids, other)), ids, other).backward()
    torch.testing.assert_close(weight.grad, other.grad)
    made = [event.name for event in profile.events() or [] if list(weight.shape) in event.input_shapes]
    assert "aten::index_add_" in made
    assert not {"aten::add", "aten::clone"} & set(made)


def test_dropout_only_in_training():
    model = GPTModel(TINY, dropout=0.5)
    ids = random_ids(1, 8)
    assert not torch.equal(model.train()(ids), model.train()(ids))
    assert torch.equal(model.eval()(ids), model.eval()(ids))


def test_a_copy_in_bf16_rounds_the_matrices_and_shares_the_rest(model):
    copied, ids = in_bf16(model), random_ids(2, 30)
    for (name, parameter), (_, rounded) in zip(model.named_parameters(), copied.named_parameters(), strict=True):
        assert parameter.dtype == torch.float32
        if parameter.dim() == 2 and name != "wpe.weight":
            torch.testing.assert_close(rounded, parameter.bfloat16())
        else:
            assert rounded is parameter
    with torch.inference_mode():
        expected, got = model(ids), copied(ids)
        assert got.dtype == torch.float32
        assert 0 < (got - expected).norm() < 0.03 * expected.norm()


@pytest.mark.skipif(torch.backends.quantized.engine not in ("x86", "fbgemm"), reason="the kernels are for x86")
def test_a_token_at_a_time_a_bf16_model_reads_packed_weights(model):
    """They are its own, in another layout: what it writes is what the same weights give in fp32."""
    rounded, ids = in_bf16(model), random_ids(3, 12)
    exact = copy.deepcopy(rounded).float()

    def step(model: GPTModel) -> torch.Tensor:
        cache = KVCache(TINY, padding=torch.zeros(3, dtype=torch.long), capacity=12)
        with torch.inference_mode():
            model.next_token_logits(ids[:, :1], cache)
            return torch.stack([model.next_token_logits(ids[:, t : t + 1], cache) for t in range(1, 12)])

    def layers(model: GPTModel) -> list[Packable]:
        return [layer for layer in model.modules() if isinstance(layer, Packable)]

    torch.testing.assert_close(step(rounded), step(exact), atol=1e-4, rtol=1e-4)
    assert len(layers(rounded)) == 4 * TINY.n_layer + 1
    assert all(layer.packed is not None for layer in layers(rounded))
    assert all(layer.packed is None for layer in [*layers(exact), *layers(model)])
    with torch.no_grad():
        assert layers(rounded)[0].few_rows(torch.zeros(FEW_ROWS, 1, 32)) is not None
        assert layers(rounded)[0].few_rows(torch.zeros(FEW_ROWS + 1, 1, 32)) is None
    x = torch.ones(1, 32, requires_grad=True)  # adapters may be trained beside a packed matrix
    layers(rounded)[0].logits(x).sum().backward()
    torch.testing.assert_close(x.grad, layers(exact)[0].weight.sum(0, keepdim=True), atol=1e-3, rtol=1e-3)


def test_short_attention_equals_pytorchs():
    """Forward and backward in bf16, as near to fp32 as PyTorch's own."""
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
