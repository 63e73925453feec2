"""The bundled model is intact, loads everywhere, and is good enough for a demonstration."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from conftest import PROJECT, bundled_dialogues
from dialogues.batches import DialogueDataset
from dialogues.conversations import Conversations
from dialogues.dialogue import Dialogue, Turn
from dialogues.template import Renderer, render
from hub.find import BUNDLED
from load_gpt2_weights import load_model
from training.device import Machine
from training.loop import evaluate

QUESTIONS = [
    "Do you have any pets?",
    "What did you have for dinner last night?",
    "Have you seen any good movies lately?",
]


@pytest.fixture(scope="module")
def bundled():
    model, tokenizer = load_model(BUNDLED)
    return model.eval(), tokenizer


def test_the_model_is_small_and_has_a_model_card():
    files = [path for path in BUNDLED.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    card = (BUNDLED / "README.md").read_text(encoding="utf-8")
    for credit in (
        "Self-dialogue Corpus",
        "Synthetic-Persona-Chat",
        "Taskmaster",
        "Meena",
        "CC BY 4.0",
        "BSD 3-Clause",
    ):
        assert credit.lower() in card.lower(), credit


def test_the_model_loads_in_transformers(bundled):
    model, tokenizer = bundled
    reference = GPT2LMHeadModel.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    theirs = GPT2Tokenizer.from_pretrained(BUNDLED)
    for dialogue in bundled_dialogues():
        text = render(dialogue)
        ids = tokenizer.encode(text, allowed_special="all")
        assert ids == theirs(text)["input_ids"]
        with torch.inference_mode():
            ours, transformers = model(torch.tensor([ids])), reference(torch.tensor([ids])).logits
        torch.testing.assert_close(ours, transformers, atol=1e-4, rtol=0)
    assert theirs.eos_token_id == reference.config.bos_token_id == tokenizer.eot_token


def test_the_model_predicts_small_talk_well(bundled):
    """Measured in bits per byte, which do not depend on the vocabulary, on conversations outside its training data."""
    model, tokenizer = bundled
    dialogues = bundled_dialogues()
    conversations = Conversations.of(Renderer(tokenizer), dialogues)
    dataset = DialogueDataset(conversations, np.arange(len(dialogues)), 512)
    loss = evaluate(model, dataset, tokenizer.eot_token, Machine(torch.device("cpu"), "fp32", ""))
    assert dataset.count_learned() == len(conversations.tokens) - len(dialogues)
    bits = loss * dataset.count_learned() / math.log(2) / len("".join(map(render, dialogues)).encode())
    assert bits < 1.1


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_model_answers_and_ends_its_turn(bundled, question):
    _, tokenizer = bundled
    prompt = Renderer(tokenizer).encode_prompt(Dialogue((Turn("Alex", question), Turn("Bob", ""))), 1)
    reference = GPT2LMHeadModel.from_pretrained(BUNDLED, dtype=torch.float32)
    ids = reference.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)[0, len(prompt) :]
    answer = tokenizer.decode(ids.tolist()).split("\n\n###")[0]
    assert answer.rstrip()[-1] in ".!?"
    assert 3 <= len(answer.split()) <= 50


def test_the_default_run_works_without_options_or_network(command, tmp_path):
    """The first command that a new user types."""
    done = command("finetune.py", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert "finetune.py --model gpt2-medium --lora-rank 8" in done.stdout
    assert "(the default for a small model)" in done.stdout
    run = tmp_path / "work" / "runs" / "tiny-1"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["val_loss"] for line in metrics if "val_loss" in line]
    assert losses[-1] < losses[0] - 0.1
    cases = json.loads((tmp_path / "work" / "generated_conversations.json").read_text(encoding="utf-8"))
    assert len(cases) == 3
    for case in cases:
        assert case["model_response"].startswith("Bob: ")
        assert 5 <= len(case["model_response"].split()) <= 80
    assert sum(case["model_response"].rstrip()[-1] in ".!?" for case in cases) >= 2, "most should end by themselves"


@pytest.mark.parametrize("model", ["tiny", "a  clone/models/tiny"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "SHA256SUMS"])
def test_a_damaged_file_is_named_with_the_command_that_restores_it(name, model, tmp_path):
    copy = tmp_path / "a  clone"
    for folder in (*(path.parent.name for path in PROJECT.glob("*/__init__.py")), "models/tiny"):
        shutil.copytree(PROJECT / folder, copy / folder)
    for file in (*PROJECT.glob("*.py"), PROJECT / "llm_train_text.json"):
        shutil.copy(file, copy)
    path = copy / "models" / "tiny" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if name != "SHA256SUMS" else b"")
    command = [sys.executable, str(copy / "finetune.py"), "--model", model]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"the bundled model is damaged: {path};" in done.stderr
    assert f"restore it with: git -C '{copy}' checkout -- models/tiny/{name}" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_checksums_are_in_the_format_of_sha256sum():
    lines = (BUNDLED / "SHA256SUMS").read_text(encoding="ascii").splitlines()
    assert len(lines) >= 6
    for line in lines:
        checksum, name = line.split("  ")
        assert hashlib.sha256((BUNDLED / name).read_bytes()).hexdigest() == checksum
    assert os.sep not in "".join(lines)
