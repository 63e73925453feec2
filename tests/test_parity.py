"""The same numbers as transformers for every published layout of GPT-2, in both directions."""

import json

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from conftest import LAYOUTS, bundled_dialogues, fit, tiny_reference, write_layout
from dialogues import tokenizer as reading
from dialogues.batches import IGNORED, DialogueDataset, epoch_batches
from dialogues.conversations import Conversations
from dialogues.template import Renderer
from dialogues.tokenizer import copy_vocabulary, load_tokenizer
from load_gpt2_weights import TRANSPOSED, load_model, save_model
from models.tiny.build import DIALOGUE
from settings import GenerationSettings, TrainingSettings
from support.errors import UserError
from talking.decoder import Decoder
from talking.generation import Bounds, generate


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers(layout, vocabulary, tmp_path):
    reference = tiny_reference()
    model, _ = load_model(write_layout(reference, vocabulary, tmp_path / "m", layout))
    if layout == "fp16":
        reference.half().float()  # compare with the rounded weights in the file
    ids = torch.randint(400, (3, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(ids).logits
        assert expected.std() > 0.5  # or the comparison would prove little
        torch.testing.assert_close(model.eval()(ids), expected, atol=1e-4, rtol=0)


def test_config_fields_are_honoured(vocabulary, tmp_path):
    reference = tiny_reference(n_inner=100, layer_norm_epsilon=1e-2, activation_function="gelu_pytorch_tanh")
    model, _ = load_model(write_layout(reference, vocabulary, tmp_path / "m", "bare"))
    ids = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids), reference(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_generation_equals_transformers(vocabulary, tmp_path, penalty):
    reference = tiny_reference(std=0.25)  # larger weights, or it would repeat one token forever
    model, _ = load_model(write_layout(reference, vocabulary, tmp_path / "m", "bare"))
    prompts = [[5, 80, 7, 250, 9], [300, 20, 11]]
    settings = GenerationSettings(max_new_tokens=60, repetition_penalty=penalty)
    ours = generate(Decoder(model), prompts, Bounds(399), settings, 0)
    for prompt, reply in zip(prompts, ours, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]),
            max_new_tokens=60,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=399,
            pad_token_id=399,
        )
        written = expected[0, len(prompt) :].tolist()
        assert reply == (written[: written.index(399)] if 399 in written else written)
        assert len(set(reply)) > 5


def test_training_follows_transformers_and_torch_adamw(vocabulary, tmp_path):
    """The training loop in fp32 against a plain one, with dialogues of uneven length and clipped gradients."""
    model, tokenizer = load_model(write_layout(tiny_reference(), vocabulary, tmp_path / "m", "bare"))
    reference = tiny_reference().train()
    dataset = DialogueDataset(Conversations.of(Renderer(tokenizer), bundled_dialogues()), np.arange(10), 128)
    settings = TrainingSettings(epochs=2, batch_size=3, learning_rate=1e-3, max_grad_norm=0.5)
    fit(model, dataset, dataset, settings, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = iter([line for line in lines if "train_loss" in line])

    matrices = [p for p in reference.parameters() if p.dim() >= 2]
    vectors = [p for p in reference.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-3, foreach=False)
    for epoch in range(2):
        for batch in epoch_batches(dataset.lengths(), 3, settings.seed, epoch):
            losses = []
            for number in batch:  # one example at a time: no padding, and only context tokens are masked
                example = dataset[number]
                ids = torch.from_numpy(example.tokens.astype("int64"))[None]
                labels = ids.clone()
                labels[0, ~torch.from_numpy(example.learned)] = IGNORED
                logits = reference(ids).logits[0, :-1]
                losses.append(torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="none"))
            learned = sum(int((loss != 0).sum()) for loss in losses)
            loss = torch.cat(losses).sum() / learned
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            adamw.step()
            adamw.zero_grad()
            logged = next(steps)
            assert logged["train_loss"] == pytest.approx(loss.item(), abs=1e-4)
            assert logged["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
            assert norm > 0.5
    assert next(steps, None) is None
    wanted = dict(reference.transformer.named_parameters())
    for name, parameter in model.named_parameters():
        expected = wanted[name].t() if name.endswith(TRANSPOSED) else wanted[name]
        torch.testing.assert_close(parameter, expected, atol=2e-4, rtol=0, msg=name)


def test_bf16_gradients_equal_autocast(model_folder):
    """Casting each weight on use gives the same gradients as autocast's copies, up to bf16 rounding."""
    model, _ = load_model(model_folder)
    reference = tiny_reference()
    ids = torch.randint(400, (2, 30), generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids[:, :-1], ids[:, 1:])
        logits = reference(ids[:, :-1]).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    wanted = dict(reference.transformer.named_parameters())
    for name, parameter in model.named_parameters():
        theirs = wanted[name].grad
        assert parameter.grad is not None
        assert theirs is not None
        ours = parameter.grad.t() if name.endswith(TRANSPOSED) else parameter.grad
        similarity = torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
        assert similarity > 0.995, name


@pytest.mark.parametrize("layout", ["bare", "old bin"])
def test_a_saved_model_loads_in_transformers(layout, vocabulary, tmp_path):
    reference = tiny_reference()
    source = write_layout(reference, vocabulary, tmp_path / "m", layout)
    model, tokenizer = load_model(source)
    copy_vocabulary(source, tmp_path / "saved")
    save_model(model, tmp_path / "saved", DIALOGUE)
    theirs, problems = GPT2LMHeadModel.from_pretrained(tmp_path / "saved", output_loading_info=True)  # pyright: ignore[reportGeneralTypeIssues]
    assert not any(problems.values())
    ids = torch.arange(100)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(ids).logits, reference(ids).logits, atol=1e-5, rtol=0)
    text = "Did you end up adopting that dog? 🐕 Yes,  I did!\n\nWow."
    assert GPT2Tokenizer.from_pretrained(tmp_path / "saved")(text)["input_ids"] == tokenizer.encode_ordinary(text)
    assert theirs.generation_config.eos_token_id[0] == 399


def test_a_model_saved_by_transformers_loads_here(vocabulary, tmp_path):
    """Both by `save_pretrained`, which in transformers 5 writes `tokenizer.json` and no `vocab.json`."""
    reference = tiny_reference()
    reference.save_pretrained(tmp_path / "theirs")
    tokenizer = GPT2Tokenizer(str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt"))
    tokenizer.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "vocab.json").exists()
    model, ours = load_model(tmp_path / "theirs")
    ids = torch.arange(100)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids), reference(ids).logits, atol=1e-4, rtol=0)
    assert ours.encode_ordinary("Beautiful, but my legs") == tokenizer("Beautiful, but my legs")["input_ids"]


def test_tokenizer_equals_transformers_on_hard_text(vocabulary):
    ours = load_tokenizer(vocabulary)
    theirs = GPT2Tokenizer(str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt"))
    for text in ["", " ", "a  b\t\n\n c", "naïve café — 東京 🏔️", "it's they'LL 12345 x_y", "\u200f\u00a0\u2028end"]:
        assert ours.encode_ordinary(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode_ordinary(text)) == text


def test_a_vocabulary_is_read_once_and_again_when_it_has_changed(vocabulary, tmp_path, monkeypatch):
    read: list[str] = []
    inner = reading.data_gym_to_mergeable_bpe_ranks
    monkeypatch.setattr(
        reading, "data_gym_to_mergeable_bpe_ranks", lambda *paths: read.append(paths[0]) or inner(*paths)
    )
    reading.read_ranks.cache_clear()
    first, second = load_tokenizer(vocabulary), load_tokenizer(vocabulary)
    assert first._mergeable_ranks == second._mergeable_ranks
    assert len(read) == 1
    copy_vocabulary(vocabulary, tmp_path)
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").split("\n")
    (tmp_path / "merges.txt").write_text("\n".join([*merges[:-2], ""]), encoding="utf-8")
    with pytest.raises(UserError, match=r"damaged or don't match"):
        load_tokenizer(tmp_path)
    assert len(read) == 2
