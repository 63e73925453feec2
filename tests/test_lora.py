"""Adapters give the same numbers as peft, merged or not, and nothing else is trained."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from conftest import bundled_dialogues, fit, tiny_reference, write_layout
from dialogues.batches import DialogueDataset
from dialogues.conversations import Conversations
from dialogues.template import Renderer
from dialogues.tokenizer import add_tokens, copy_vocabulary
from fast.packed import PackedLinear
from gpt_model import GPTModel
from hub.find import BUNDLED
from load_gpt2_weights import (
    TRANSPOSED,
    add_embeddings,
    load_model,
    read_weights,
    save_model,
    write_tensors,
)
from models.tiny.build import DIALOGUE
from pipeline.folds import estimate
from settings import GenerationSettings, TrainingSettings
from support.errors import UserError
from talking.decoder import Decoder
from talking.generation import Bounds, generate
from training.defaults import complete
from training.device import Machine
from training.lora import LoRALinear, add_adapters, load_adapter, merge_adapters, save_adapter
from training.optimizer import make_optimizer
from training.step import Batch, Learner, take_step

FP32 = Machine(torch.device("cpu"), "fp32", "")
BF16 = Machine(torch.device("cpu"), "bf16", "")
NEW = ("<|endofturn|>", "<|A|>", "<|B|>")


def adapted(folder: Path, new_tokens: int = 0, dtype: torch.dtype = torch.float32, rank: int = 4, seed: int = 1):
    model, tokenizer = load_model(folder, dtype=dtype)
    add_embeddings(model, tokenizer.n_vocab + new_tokens)
    add_adapters(model, rank, seed, new_tokens)
    return model


def some_ids(vocab_size: int = 400, T: int = 40) -> torch.Tensor:
    ids = torch.randint(vocab_size, (2, T), generator=torch.Generator().manual_seed(5))
    ids[:, 7] = vocab_size - 1  # include the newest token
    return ids


def take_steps(model: GPTModel, machine: Machine = FP32, steps: int = 4) -> list[float]:
    """Take real steps, after which B is no longer 0, and return their losses."""
    settings = TrainingSettings(learning_rate=3e-3)
    optimizer = make_optimizer(model, settings)
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate
    ids = some_ids(model.config.vocab_size)
    batch = Batch(ids[:, :-1], ids[:, 1:], ids[:, 1:].numel())
    learner = Learner(model, optimizer, machine.gradient_scaler({}), 1.0)
    return [take_step(learner, [batch._replace(seed=step)], machine)[0] for step in range(steps)]


def write_merged(model: GPTModel, base: Path, folder: Path) -> Path:
    tokens = NEW[: model.config.vocab_size - 400]
    tokenizer = add_tokens(load_model(base)[1], tokens)
    copy_vocabulary(base, folder, tokenizer)
    save_model(model, folder, DIALOGUE, parameters=merge_adapters(model, read_weights(base)))
    return folder


def with_peft(adapter: Path, vocab_size: int, trainable: bool = False) -> PeftModel:
    reference = tiny_reference()
    if vocab_size > 400:
        reference.resize_token_embeddings(vocab_size, mean_resizing=False)
    return PeftModel.from_pretrained(reference, str(adapter), is_trainable=trainable)


def test_a_fresh_adapter_changes_nothing(model_folder):
    ids = some_ids()
    with torch.no_grad():
        assert torch.equal(adapted(model_folder)(ids), load_model(model_folder)[0](ids))


@pytest.mark.parametrize("new_tokens", [0, 3])
def test_peft_loads_the_adapter(new_tokens, model_folder, tmp_path):
    model = adapted(model_folder, new_tokens)
    ids = some_ids(400 + new_tokens)
    with torch.no_grad():
        before = model.eval()(ids)
    losses = take_steps(model)
    assert losses[-1] < losses[0]
    save_adapter(model, tmp_path / "adapter", str(model_folder))
    theirs = with_peft(tmp_path / "adapter", 400 + new_tokens).eval()
    assert theirs.peft_config["default"].base_model_name_or_path == str(model_folder)
    with torch.no_grad():
        ours = model.eval()(ids)
        assert (ours - before).abs().mean() > 0.1  # training has changed the logits
        torch.testing.assert_close(ours, theirs(input_ids=ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("new_tokens", [0, 3])
def test_gradients_equal_those_of_peft(new_tokens, model_folder, tmp_path):
    model = adapted(model_folder, new_tokens)
    take_steps(model)  # while B is 0, A has no gradient
    save_adapter(model, tmp_path / "adapter", str(model_folder))
    theirs = with_peft(tmp_path / "adapter", 400 + new_tokens, trainable=True)
    ids = some_ids(400 + new_tokens)
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    logits = theirs(input_ids=ids[:, :-1]).logits
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    ours = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(ours) == len(wanted) == 24 + bool(new_tokens)
    for name, grad in ours.items():
        token_rows = "token_adapter.trainable_tokens_delta.default"
        theirs_name = name.replace("new_rows", token_rows) if name == "wte.new_rows" else f"{name}.default.weight"
        expected = wanted[f"base_model.model.transformer.{theirs_name}"]
        assert grad is not None
        assert expected is not None
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(grad, expected, atol=1e-3, rtol=1e-4, msg=name)


@pytest.mark.parametrize("new_tokens", [0, 3])
@pytest.mark.parametrize("layout", ["bare", "fp16", "old bin"])
def test_a_merged_model_equals_the_unmerged_one(layout, new_tokens, vocabulary, tmp_path):
    base = write_layout(tiny_reference(), vocabulary, tmp_path / "m", layout)
    model = adapted(base, new_tokens)
    take_steps(model)
    ids = some_ids(400 + new_tokens)
    merged = load_model(write_merged(model, base, tmp_path / "merged"))[0]
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        ours = model.eval()(ids)
        torch.testing.assert_close(merged.eval()(ids), ours, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(theirs.eval()(ids).logits, ours, atol=1e-4, rtol=0)


def test_a_bf16_model_is_merged_into_the_weights_of_its_file(vocabulary, tmp_path):
    """The change is added to the weights in the file, in their own precision, not to weights rounded to bf16."""
    base = write_layout(tiny_reference(), vocabulary, tmp_path / "m", "prefixed")
    model = adapted(base, 3, torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if name.endswith((*TRANSPOSED, "wte.weight"))} == {
        torch.bfloat16
    }
    small = [p.dtype for name, p in model.named_parameters() if "ln_" in name or "wpe" in name or "bias" in name]
    learned = [p.dtype for p in model.parameters() if p.requires_grad]
    assert set(small + learned) == {torch.float32}
    losses = take_steps(model, BF16)
    assert losses[-1] < losses[0]
    stored = load_file(base / "model.safetensors")
    written = load_file(write_merged(model, base, tmp_path / "merged") / "model.safetensors")
    state = model.state_dict()
    assert len(written) == len(stored)
    for name, tensor in written.items():
        expected = stored[f"transformer.{name}"]
        if name.endswith(TRANSPOSED):
            layer = name.removesuffix("weight")
            change = 16 / 4 * (state[f"{layer}lora_B"] @ state[f"{layer}lora_A"]).t()
            assert change.abs().max() > 1e-4
            torch.testing.assert_close(tensor - expected, change, atol=1e-7, rtol=0, msg=name)
        elif name == "wte.weight":
            assert torch.equal(tensor[:400], expected)
            assert torch.equal(tensor[400:], state["wte.new_rows"])
        else:
            assert torch.equal(tensor, expected), name


def test_only_adapters_and_new_rows_are_trained(model_folder):
    model = adapted(model_folder, 3)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        "wte.new_rows",
        *(f"h.{n}.{layer.removesuffix('weight')}lora_{x}" for n in range(3) for layer in TRANSPOSED for x in "AB"),
    }
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = make_optimizer(model, TrainingSettings())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)
    take_steps(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name


def test_the_loop_trains_adapters(model_folder, tmp_path):
    model, tokenizer = load_model(model_folder, dropout=0.1)
    add_adapters(model, 4, 1)
    dataset = DialogueDataset(Conversations.of(Renderer(tokenizer), bundled_dialogues()), np.arange(10), 128)
    settings = TrainingSettings(epochs=3, learning_rate=3e-3)
    state = fit(model, dataset, dataset, settings, tmp_path)
    assert state.before
    assert state.after
    assert state.after.val < state.before.val - 0.05


def test_losses_in_bf16_follow_those_in_fp32(model_folder):
    """The same steps, with a frozen base in bf16 or cast to it, and the residual stream in fp32."""
    exact, rounded, cast = adapted(model_folder, 3), adapted(model_folder, 3, torch.bfloat16), adapted(model_folder, 3)
    with torch.no_grad(), BF16.autocast():
        assert rounded.h[0](torch.zeros(1, 3, 48), None, None).dtype == torch.float32
    losses = take_steps(exact)
    np.testing.assert_allclose(take_steps(rounded, BF16), losses, rtol=2e-3)
    np.testing.assert_allclose(take_steps(cast, BF16), losses, rtol=2e-3)
    with torch.no_grad():
        ids = some_ids(403)
        assert F.cosine_similarity(rounded(ids), exact(ids), dim=-1).min() > 0.999


def test_logits_of_a_bf16_embedding_are_not_rounded(model_folder):
    """Near -100, bf16 values are 0.5 apart: many tokens would share the highest logit."""
    model = Decoder(adapted(model_folder, 3, torch.bfloat16)).model
    x = 30 * torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    weight = torch.cat([model.wte.weight.float(), model.state_dict()["wte.new_rows"]])
    torch.testing.assert_close(model.lm_head(x), x @ weight.t(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("dtype", "tie"), [(torch.float32, 0), (torch.bfloat16, 0.05)])
def test_unmerged_generation_is_the_same_with_and_without_the_cache(dtype, tie, vocabulary, tmp_path):
    base = write_layout(tiny_reference(std=0.25), vocabulary, tmp_path / "m", "bare")
    model = adapted(base, 3, dtype)
    take_steps(model)
    prompts = [[5, 80, 402, 250, 9], [300, 20, 11]]
    settings = GenerationSettings(max_new_tokens=30)
    decoder = Decoder(model)
    replies = generate(decoder, prompts, Bounds(399), settings, 0)
    for prompt, reply in zip(prompts, replies, strict=True):
        text = list(prompt)
        with torch.no_grad():
            for token in reply:
                logits = decoder.model(torch.tensor([text]))[0, -1]
                assert logits[token] >= logits.max() - tie  # the cached products are not rounded to bf16
                text.append(token)
        assert len(set(reply)) > 5


def test_decoding_makes_no_second_copy_of_frozen_weights(model_folder):
    model = adapted(model_folder, dtype=torch.bfloat16)
    copied = Decoder(model, torch.bfloat16).model
    for parameter, shared in zip(model.parameters(), copied.parameters(), strict=True):
        assert shared is parameter
    generate(Decoder(copied), [[1, 2, 3]], Bounds(-1), GenerationSettings(max_new_tokens=4), 0)
    adapters = [layer for layer in copied.modules() if isinstance(layer, LoRALinear)]
    assert len(adapters) == 4 * model.config.n_layer
    assert not any(type(layer) is PackedLinear for layer in copied.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_adapter_loads_exactly(dtype, model_folder, tmp_path):
    model = adapted(model_folder, 3, dtype)
    take_steps(model, FP32 if dtype == torch.float32 else BF16)
    save_adapter(model, tmp_path / "adapter", "gpt2")
    again = adapted(model_folder, 3, dtype, seed=2)
    load_adapter(again, tmp_path / "adapter")
    expected = model.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_an_adapter_that_does_not_fit_is_refused(model_folder, tmp_path):
    save_adapter(adapted(model_folder), tmp_path / "adapter", "gpt2")
    with pytest.raises(UserError, match="belongs to another model or --lora-rank"):
        load_adapter(adapted(model_folder, rank=5), tmp_path / "adapter")
    with pytest.raises(UserError, match="belongs to another model or --lora-rank"):
        load_adapter(adapted(model_folder, 3), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        load_adapter(adapted(model_folder), tmp_path / "adapter")
    path.unlink()
    with pytest.raises(UserError, match="cannot read"):
        load_adapter(adapted(model_folder), tmp_path / "adapter")


def test_the_initial_adapters_depend_only_on_the_seed(model_folder):
    first = adapted(model_folder).state_dict()
    torch.manual_seed(77)
    again, other = adapted(model_folder).state_dict(), adapted(model_folder, seed=2).state_dict()
    for name in first:
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], other[name]) == (not name.endswith("lora_A")), name
    A = first["h.0.mlp.c_proj.lora_A"]  # (4, 192)
    assert 0.9 < A.abs().max() * 192**0.5 <= 1  # uniform up to 1 / sqrt(in)
    assert A.std().item() == pytest.approx((3 * 192) ** -0.5, rel=0.1)


def test_a_base_model_that_changed_during_training_is_refused(model_folder, vocabulary, tmp_path):
    model = adapted(model_folder, dtype=torch.bfloat16)
    take_steps(model, BF16)
    write_layout(tiny_reference(std=0.11), vocabulary, model_folder, "bare")
    with pytest.raises(UserError, match=r"changed since training began \(wte\.weight"):
        write_merged(model, model_folder, tmp_path / "merged")
    assert not (tmp_path / "merged" / "model.safetensors").exists()
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot read .*model\.safetensors"):
        write_merged(model, model_folder, tmp_path / "merged")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_written_tensors_equal_those_of_safetensors(dtype, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t.{n}": torch.randn(n, 2 * n + 1, generator=generator).t() for n in range(1, 6)}
    tensors["one"] = torch.randn(7, generator=generator)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    write_tensors(tmp_path / "ours", shapes, iter(tensors.values()), dtype)
    rounded = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(rounded, tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == dtype
        assert torch.equal(ours[name], tensor)
    headers = [header_of(tmp_path / name) for name in ("ours", "theirs")]
    assert headers[0]["__metadata__"] == headers[1]["__metadata__"]
    assert int.from_bytes((tmp_path / "ours").read_bytes()[:8], "little") % 8 == 0


def header_of(path: Path) -> dict:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


@pytest.mark.slow
def test_high_ranks_are_no_worse_than_a_low_one(tmp_path):
    """On five folds of the bundled conversations, the same learning rate suits ranks 8, 64 and 256."""
    dialogues = bundled_dialogues()
    losses: dict[int, list[float]] = {}
    for rank in (8, 64, 256):
        for fold in range(5):
            model, tokenizer = load_model(BUNDLED)
            conversations = Conversations.of(Renderer(tokenizer), dialogues)
            held_out = np.arange(2 * fold, 2 * fold + 2)
            kept = np.setdiff1d(np.arange(10), held_out)
            train_set, val_set = (DialogueDataset(conversations, numbers, 512) for numbers in (kept, held_out))
            add_adapters(model, rank, seed=123)
            settings = complete(TrainingSettings(lora_rank=rank), parameters=7_600_000)
            state = fit(model, train_set, val_set, settings, tmp_path / f"{rank}-{fold}")
            losses.setdefault(rank, []).append(state.evaluations[-1][1])
    for rank in (64, 256):
        more = estimate([high - low for high, low in zip(losses[rank], losses[8], strict=True)])
        assert more.interval[0] <= 0, losses
