"""The model's sizes, initialisation, causality, loss and dropout, and a comparison with torch's own layers."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gpt_model
from gpt_model import PUBLISHED, GPTConfig, GPTModel

PARAMETERS = {
    "distilgpt2": 81_912_576,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}
TINY = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=101, n_positions=64)


def make_model() -> GPTModel:
    torch.manual_seed(0)
    model = GPTModel(TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture
def model() -> GPTModel:
    return make_model()


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(101, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_sizes(name):
    with torch.device("meta"):
        model = GPTModel(PUBLISHED[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_initialisation_equals_that_of_gpt2():
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(n_layer=8, n_head=4, n_embd=256, vocab_size=1000))
    parameters = dict(model.named_parameters())
    assert parameters["h.0.mlp.c_fc.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert parameters["h.0.mlp.c_proj.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert parameters["h.3.ln_1.weight"].unique().tolist() == [1]
    assert parameters["h.3.attn.c_attn.bias"].unique().tolist() == [0]


def test_no_token_sees_later_tokens(model):
    ids = random_ids(1, 20)
    changed = ids.clone()
    changed[0, 12:] = 0
    torch.testing.assert_close(model(ids)[:, :12], model(changed)[:, :12])
    assert not torch.allclose(model(ids)[:, 12], model(changed)[:, 12])


def test_loss_is_the_summed_negative_log_likelihood_of_learned_tokens(model):
    ids, targets = random_ids(2, 12), random_ids(2, 12).roll(1)
    targets[0, 3:] = -100
    log_probabilities = model(ids).log_softmax(dim=-1)
    expected = sum(
        -log_probabilities[b, t, targets[b, t]] for b in range(2) for t in range(12) if targets[b, t] != -100
    )
    torch.testing.assert_close(model(ids, targets), expected)


def test_dropout_applies_only_in_training():
    model = GPTModel(TINY, dropout=0.5)
    ids = random_ids(1, 8)
    assert not torch.equal(model.train()(ids), model.train()(ids))
    assert torch.equal(model.eval()(ids), model.eval()(ids))


TORCHS_OWN = {
    "Linear": nn.Linear,
    "Embedding": nn.Embedding,
    "scaled_dot_product_attention": F.scaled_dot_product_attention,
    "linear_cross_entropy": lambda x, weight, targets, reduction: F.cross_entropy(
        F.linear(x, weight), targets, reduction=reduction
    ),
}
if hasattr(F, "linear_cross_entropy"):  # from torch 2.13 on
    TORCHS_OWN["linear_cross_entropy"] = F.linear_cross_entropy


def test_the_model_imports_only_four_names_from_fast():
    tree = ast.parse(Path(gpt_model.__file__).read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    (seam,) = (node for node in imports if (node.module or "").split(".")[0] == "fast")
    assert {alias.name for alias in seam.names} == TORCHS_OWN.keys()
    assert Path(gpt_model.__file__).read_text(encoding="utf-8").count("\n") <= 200


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("B", "T"), [(2, 12), (8, 60)])  # few rows, and more than one chunk of the loss
def test_torchs_own_layers_give_the_same_numbers(B, T, autocast, model, monkeypatch):
    """Logits, losses and gradients are equal up to rounding in fp32, and in bf16 as close to fp32 as torch's."""
    ids, targets = random_ids(B, T), random_ids(B, T).roll(1)
    targets[0, : T // 2] = -100

    def compute(model: GPTModel, autocast: bool) -> list[torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with torch.no_grad():
                found = [model(ids), model(ids, targets), model(ids, targets, reduction="none")]
            loss = model(ids, targets)
        loss.backward()
        return [*found, loss.detach(), *(parameter.grad for parameter in model.parameters())]  # pyright: ignore

    ours = compute(model, autocast)
    for name, own in TORCHS_OWN.items():
        monkeypatch.setattr(gpt_model, name, own)
    plain = GPTModel(TINY)
    plain.load_state_dict(model.state_dict())
    assert not any(type(layer).__module__.startswith("fast") for layer in plain.modules())
    theirs, exact = compute(plain, autocast), compute(plain, False)
    for got, expected, truth in zip(ours, theirs, exact, strict=True):
        assert got.dtype == expected.dtype
        error, theirs_error = ((each - truth).float().norm() for each in (got, expected))
        assert error <= max(2 * theirs_error, 1e-5 * truth.norm())
