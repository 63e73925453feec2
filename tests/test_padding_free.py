"""Batches without padding: the same losses and gradients as padded ones, dialogue by dialogue."""

import copy
import inspect
import json

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import varlen

from conftest import CPU, fit, make_examples
from dialogues.batches import IGNORED, epoch_steps, pack, padding_share
from fast.attention import Packed, packed_attention, varlen_attention
from gpt_model import GPTConfig, GPTModel
from settings import TrainingSettings
from training.loop import make_batch
from training.lora import add_adapters

END = 100
LENGTHS = (20, 7, 33, 12)  # of examples, whose last token is only a target


@pytest.fixture
def dataset():
    random = torch.Generator().manual_seed(0)
    texts = [torch.randint(100, (length,), generator=random).tolist() for length in LENGTHS]
    return make_examples(*((text, [2, len(text)]) for text in texts), max_length=64)


def make_model(dropout: float = 0.0) -> GPTModel:
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=101, n_positions=64), dropout)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def test_examples_stand_one_after_another():
    dataset = make_examples(([5, 6, 7], [1, 3]), ([8, 9], [2]), max_length=64)
    inputs, targets, lengths = pack([dataset[0], dataset[1]], END)
    assert inputs.tolist() == [[5, 6, 8, *[END] * 13]]
    assert targets.tolist() == [[6, 7, 9, *[IGNORED] * 13]]
    assert lengths == [2, 1, 13]


def test_a_full_row_has_no_padding():
    dataset = make_examples(([5] * 17, [2, 17]), max_length=64)
    inputs, _, lengths = pack([dataset[0]], END)
    assert inputs.shape == (1, 16)
    assert lengths == [16]


def test_how_much_of_the_rows_is_padding(dataset):
    steps = epoch_steps(dataset.lengths(), 4, 1, seed=1, epoch=0)
    assert padding_share(dataset, steps) == 1 - 68 / (4 * 32)
    assert padding_share(dataset, steps, padding_free=True) == 1 - 68 / 80


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 3e-2)])
def test_loss_and_gradients_are_those_of_padded_batches(dataset, precision, tolerance, lora, checkpointing):
    machine = CPU._replace(precision=precision)
    model = make_model()
    model.gradient_checkpointing = checkpointing
    if lora:
        add_adapters(model, rank=2, seed=0)
        for block in model.h:
            torch.nn.init.normal_(block.mlp.c_fc.lora_B)  # pyright: ignore
    again = copy.deepcopy(model)
    for each, padding_free in ((model, False), (again, True)):
        batch = make_batch(dataset, range(len(LENGTHS)), END, machine, padding_free)
        assert batch.inputs.shape == ((1, 80) if padding_free else (4, 32))
        assert batch.learned == 68
        with machine.autocast():
            loss = each.train()(batch.inputs, batch.targets, batch.lengths)
        loss.backward()
        each.found = loss.item()
    assert again.found == pytest.approx(model.found, rel=tolerance / 10)
    for (name, parameter), other in zip(model.named_parameters(), again.parameters(), strict=True):
        if parameter.requires_grad:
            assert parameter.grad is not None
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(other.grad, parameter.grad, atol=tolerance * scale, rtol=0, msg=name)


def test_no_dialogue_sees_another():
    model, ids = make_model().eval(), torch.arange(30)[None]
    changed = ids.clone()
    changed[0, :10] = 50
    lengths = [10, 20]
    first, second = model(ids, lengths=lengths), model(changed, lengths=lengths)
    torch.testing.assert_close(first[:, 10:], second[:, 10:])
    assert not torch.allclose(first[:, :10], second[:, :10])
    torch.testing.assert_close(first[:, 10:], model(ids[:, 10:]))  # positions begin again


def test_the_gpus_kernel_is_called_as_it_asks(monkeypatch):
    """In its place the definition: scores of pairs within the same bounds that don't look ahead."""
    signature = inspect.signature(varlen.varlen_attn)

    def by_definition(*args, **kwargs):
        called = signature.bind(*args, **kwargs).arguments
        q, k, v, bounds = (called[name] for name in ("query", "key", "value", "cu_seq_q"))
        assert called["window_size"] == (-1, 0)
        assert called["cu_seq_k"] is bounds
        assert bounds.dtype == torch.int32
        assert bounds.tolist() == [0, 5, 6, 16]
        assert called["max_q"] == called["max_k"] == 10
        assert q.shape == k.shape == v.shape == (16, 2, 8)
        places = torch.arange(16)
        dialogue = torch.bucketize(places, bounds[1:], right=True)
        mask = (dialogue[:, None] == dialogue) & (places[:, None] >= places)
        return F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask).transpose(0, 1)

    monkeypatch.setattr(varlen, "varlen_attn", by_definition)
    q, k, v = torch.randn(3, 1, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    packed = Packed.of([5, 1, 10], q.device)
    torch.testing.assert_close(varlen_attention(q, k, v, packed), packed_attention(q, k, v, packed, dropout=0.0))


def test_a_run_without_padding_learns_the_same(dataset, tmp_path):
    losses = []
    for padding_free in (False, True):
        folder = tmp_path / str(padding_free)
        folder.mkdir()
        settings = TrainingSettings(epochs=4, batch_size=2, learning_rate=1e-3, padding_free=padding_free)
        fit(make_model(), dataset, dataset, settings, folder)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["train_loss"] for line in lines if "train_loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
