"""The build of the bundled model turns a corpus of a few hundred dialogues into a working folder."""

import json
import random
import subprocess
import sys

import pytest
import torch
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from conftest import PROJECT
from dialogues.template import Renderer
from load_gpt2_weights import load_model

SMALL = [
    "--n-layer",
    "2",
    "--n-head",
    "2",
    "--n-embd",
    "64",
    "--n-positions",
    "128",
    "--vocab-size",
    "500",
    "--held-out",
    "50",
    "--epochs",
    "4",
    "--seed",
    "3",
]


def write_corpus(path, size: int) -> None:
    """Write dialogues mixed from turns of the bundled ones."""
    bundled = json.loads((PROJECT / "llm_train_text.json").read_text(encoding="utf-8"), object_pairs_hook=list)
    texts = [text for pairs in bundled for _, text in pairs]
    chance = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(size):
            turns = [{"speaker": "AB"[turn % 2], "text": chance.choice(texts)} for turn in range(chance.randint(2, 9))]
            file.write(json.dumps({"source": "test", "turns": turns}) + "\n")


def build(tmp_path, name: str, *options: str) -> str:
    """Build the model folder `name`, with its checkpoints in `name`-work."""
    options = (
        *("--corpus", tmp_path / "corpus.jsonl", "--folder", tmp_path / name, "--work", tmp_path / f"{name}-work"),
        *SMALL,
        *options,
    )
    command = [sys.executable, "-m", "models.tiny.build", *map(str, options)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True, encoding="utf-8").stdout


@pytest.mark.slow
def test_a_small_build_makes_a_working_folder(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", 300)
    output = build(tmp_path, "model")
    assert "held-out bits per byte: start" in output
    bits = json.loads((tmp_path / "model-work" / "bits_per_byte.json").read_text())
    assert bits["model"] < 0.8 * bits["start"]
    assert 0.2 < bits["xz"] < 3

    sums = (tmp_path / "model" / "SHA256SUMS").read_text(encoding="ascii")
    assert {line.split()[1] for line in sums.splitlines()} >= {
        "config.json",
        "model.safetensors",
        "vocab.json",
        "merges.txt",
    }

    model, tokenizer = load_model(tmp_path / "model")
    assert tokenizer.n_vocab == 500
    reference = GPT2LMHeadModel.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    theirs = GPT2Tokenizer.from_pretrained(tmp_path / "model")
    text = "### Anna:\nDid you finish painting?\n\n### Ben:\n"
    ids = torch.tensor([tokenizer.encode_ordinary(text)])
    assert ids.tolist() == [theirs(text)["input_ids"]]
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(ids), reference(ids).logits, atol=1e-4, rtol=0)
        continuation = reference.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=499)[0, ids.size(1) :]
    assert Renderer(tokenizer).parse_turns(tokenizer.decode(continuation.tolist()), "Ben", [])[0].text
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.slow
def test_a_build_continues_from_a_model_folder_with_the_same_held_out_dialogues(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", 300)
    build(tmp_path, "first", "--epochs", "2")
    build(tmp_path, "second", "--epochs", "2", "--seed", "5", "--start", str(tmp_path / "first"))
    first, second = (
        json.loads((tmp_path / f"{name}-work" / "bits_per_byte.json").read_text()) for name in ("first", "second")
    )
    assert second["start"] == pytest.approx(first["model"], rel=1e-6)
    assert second["model"] < second["start"]
    assert second["xz"] == first["xz"]  # the same held-out text
    same = "vocab.json", "merges.txt", "dialogue.json"
    assert all((tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes() for name in same)
