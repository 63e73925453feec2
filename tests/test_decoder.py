"""Decoding with the KV cache, the captured step and packed bf16 weights, compared with the plain model."""

import copy
import gc
import weakref

import pytest
import torch

from fast import Linear
from fast.packed import FEW_ROWS, PackedLinear
from gpt_model import GPTModel
from talking.decoder import CapturedStep, Decoder
from test_gpt_model import TINY, make_model, random_ids


@pytest.fixture
def model() -> GPTModel:
    return make_model()


def test_cached_logits_equal_uncached_ones(model):
    ids = random_ids(3, 40)
    expected = model(ids)
    decoding = Decoder(model).start(torch.zeros(3, dtype=torch.long), 40)
    with torch.inference_mode():
        for start, end in [(0, 7), (7, 8), (8, 20), *((t, t + 1) for t in range(20, 40))]:
            logits = decoding.next_logits(ids[:, start:end])
            torch.testing.assert_close(logits, expected[:, end - 1], atol=1e-4, rtol=0)


def test_left_padding_does_not_change_the_logits(model):
    ids = random_ids(1, 10)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    batch = torch.cat([padded, random_ids(1, 15)])
    decoding = Decoder(model).start(torch.tensor([5, 0]), 20)
    with torch.inference_mode():
        logits = decoding.next_logits(batch)
        torch.testing.assert_close(logits[:1], model(ids)[:, -1], atol=1e-4, rtol=0)
        assert logits.isfinite().all()


def test_a_captured_step_equals_a_plain_one(model):
    """The rows are padded, and the cache has unused, uninitialised space and is cut back."""
    prompt, more = random_ids(2, 9), random_ids(2, 8)
    decodings = [Decoder(model).start(torch.tensor([0, 4]), 40) for _ in range(2)]
    caches = [decoding.cache for decoding in decodings]
    caches[1].keys.fill_(torch.nan)
    caches[1].values.fill_(torch.nan)
    with torch.inference_mode():
        for decoding in decodings:
            decoding.next_logits(prompt)
        step = CapturedStep(model, caches[1])
        for t in (0, 1, 2, 3, 4, 2, 5, 6):
            for decoding in decodings:
                decoding.cache.length = min(decoding.cache.length, len(prompt[0]) + t)
            expected = decodings[0].next_logits(more[:, t : t + 1])
            torch.testing.assert_close(step(more[:, t : t + 1]), expected, atol=1e-4, rtol=0)
            assert caches[0].length == caches[1].length


def test_a_cache_is_freed_with_its_step(model):
    """It is freed immediately, not by the cycle collector: on a GPU, the cache of each batch takes gigabytes."""
    decoding = Decoder(model).start(torch.zeros(1, dtype=torch.long), 8)
    decoding.step = CapturedStep(model, decoding.cache)
    gone = weakref.ref(decoding.cache)
    gc.disable()
    try:
        del decoding
        assert gone() is None
    finally:
        gc.enable()


def test_a_copy_in_bf16_rounds_the_matrices_and_shares_the_rest(model):
    copied, ids = Decoder(model, torch.bfloat16).model, random_ids(2, 30)
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
def test_a_bf16_model_decodes_with_packed_weights(model):
    """The packed weights have a different layout, but the logits equal those of the same weights in fp32."""
    rounded, ids = Decoder(model, torch.bfloat16), random_ids(3, 12)
    exact = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, other in zip(exact.parameters(), rounded.model.parameters(), strict=True):
            parameter.copy_(other)

    def step(decoder: Decoder) -> torch.Tensor:
        decoding = decoder.start(torch.zeros(3, dtype=torch.long), 12)
        with torch.inference_mode():
            return torch.stack([decoding.next_logits(ids[:, t : t + 1]) for t in range(12)])

    torch.testing.assert_close(step(rounded), step(Decoder(exact)), atol=1e-4, rtol=1e-4)
    layers = [layer for layer in rounded.model.modules() if isinstance(layer, PackedLinear)]
    assert len(layers) == 4 * TINY.n_layer + 1
    assert all(layer.packed is not None for layer in layers)
    assert not any(isinstance(layer, PackedLinear) for layer in model.modules())


@pytest.mark.parametrize(("rows", "autocast"), [(FEW_ROWS, False), (FEW_ROWS + 1, False), (FEW_ROWS, True)])
def test_packed_weights_are_used_for_few_rows_and_not_under_autocast(rows, autocast):
    layer = Linear(32, 8)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.zero_()
    layer.weight.data = layer.weight.data.bfloat16()
    packed, x = PackedLinear(layer), torch.randn(rows, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = packed(x).float()
    exact = torch.allclose(y, x @ layer.weight.float().t(), atol=1e-5)
    assert exact == (rows <= FEW_ROWS and not autocast and packed.packed is not None)


def test_weights_that_fp16_cannot_hold_are_not_packed():
    layer = Linear(32, 8)
    layer.weight.data = torch.full((8, 32), -1e5).bfloat16()
    assert PackedLinear(layer).packed is None
