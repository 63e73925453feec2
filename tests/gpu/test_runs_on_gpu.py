"""Whole runs on a GPU: the same command writes the same bytes, stopped or not, for each way to train."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import PROJECT
from gpt_model import KVCache
from load_gpt2_weights import load_model
from talking.decoder import Decoder

pytestmark = pytest.mark.gpu
TINY = PROJECT / "models" / "tiny"


def finetune(folder: Path, *options: str, kill_after: int = 0) -> str:
    """Run the command in `folder` and return its output, or kill it after `kill_after` logged steps."""
    folder.mkdir(exist_ok=True)
    words = [sys.executable, str(PROJECT / "finetune.py"), "--device", "cuda", *options]
    if not kill_after:
        return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True, timeout=300).stdout
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = folder / "runs" / "tiny-1" / "metrics.jsonl"
    while process.poll() is None and steps_in(metrics) < kill_after:
        time.sleep(0.01)
    assert process.poll() is None, "the run ended before it was killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return ""


def steps_in(metrics: Path) -> int:
    return metrics.read_text().count("train_loss") if metrics.exists() else 0


def results(folder: Path) -> dict[str, bytes]:
    run = folder / "runs" / "tiny-1"
    return {name: (run / name).read_bytes() for name in ("model/model.safetensors", "metrics.jsonl")} | {
        "cases": (folder / "generated_conversations.json").read_bytes()
    }


WAYS = {
    "defaults": (),
    "dropout": ("--dropout", "0.1"),
    "accumulation": ("--gradient-accumulation", "2"),
    "LoRA": ("--lora-rank", "8"),
    "tokens": ("--template", "tokens", "--watch"),
    "LoRA and tokens": ("--template", "tokens", "--lora-rank", "8"),
    "compiled": ("--compile",),
    "fp16": ("--precision", "fp16"),
    "fp32": ("--precision", "fp32"),
    "gradient checkpointing": ("--gradient-checkpointing",),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_command_writes_the_same_bytes_twice(gpu, way, tmp_path):
    printed = [finetune(tmp_path / name, *WAYS[way]) for name in "ab"]
    eager = way in ("fp16", "gradient checkpointing")
    assert ("without CUDA graphs" in printed[0]) == eager
    assert ("CUDA graphs, captured in" in printed[0]) != eager
    assert results(tmp_path / "a") == results(tmp_path / "b")


@pytest.mark.parametrize("way", ["defaults", "accumulation", "LoRA"])
def test_a_killed_and_resumed_run_writes_the_bytes_of_an_uninterrupted_one(gpu, way, tmp_path):
    options = (*WAYS[way], "--epochs", "20", "--checkpoint-minutes", "0")
    finetune(tmp_path / "whole", *options)
    finetune(tmp_path / "killed", *options, kill_after=17)
    finetune(tmp_path / "killed", "--resume", "runs/tiny-1")
    assert results(tmp_path / "whole") == results(tmp_path / "killed")


def test_a_captured_decode_step_equals_the_plain_model(gpu):
    model = load_model(TINY)[0].to(gpu.device).eval()
    ids = torch.randint(0, 4000, (3, 12), device=gpu.device)
    decoding = Decoder(model).start(torch.zeros(3, dtype=torch.long, device=gpu.device), 40)
    cache = KVCache(model.config, torch.zeros(3, dtype=torch.long, device=gpu.device), 40)
    with torch.no_grad():
        logits = decoding.next_logits(ids)
        expected = model(ids, cache=cache)[:, -1]
        for _ in range(20):
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
            ids = expected.argmax(-1, keepdim=True)
            logits, expected = decoding.next_logits(ids), model(ids, cache=cache)[:, -1]
    assert decoding.step
    assert decoding.step.graph


def test_the_chat_answers_on_a_gpu(gpu, tmp_path):
    words = [sys.executable, str(PROJECT / "chat.py"), str(TINY), "--device", "cuda"]
    done = subprocess.run(
        words, cwd=tmp_path, input="Hello!\n/save t.json\n", capture_output=True, text=True, check=True, timeout=120
    )
    assert json.loads((tmp_path / "t.json").read_text(encoding="utf-8")), done.stdout
