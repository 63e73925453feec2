"""Shared fixtures: tiny models in every published layout, made by transformers, and helpers that run commands."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # two tests run in parallel
os.environ["HF_HUB_OFFLINE"] = "1"  # transformers must also not use the network

import hypothesis
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from dialogues.batches import DialogueDataset
from dialogues.conversations import Conversations
from dialogues.dialogue import Dialogue
from dialogues.reading import Source, open_source
from dialogues.template import Renderer
from dialogues.tokenizer import copy_vocabulary, load_tokenizer
from gpt_model import GPTModel
from load_gpt2_weights import add_embeddings, load_model, save_model
from models.tiny.build import train_vocabulary
from settings import RunSettings, TrainingSettings
from training.checkpoint import Checkpoints, TrainingState
from training.device import Machine, choose_machine
from training.loop import Examples, Trainer, TrainingSetup, train
from training.optimizer import make_optimizer
from training.stopping import StopSignals

hypothesis.settings.register_profile("repeatable", derandomize=True)  # the same examples in every run
hypothesis.settings.load_profile("repeatable")

PROJECT = Path(__file__).resolve().parent.parent
CPU = Machine(torch.device("cpu"), "fp32", "")
LAYOUTS = ("bare", "prefixed", "head beside", "head instead", "fp16", "bin", "old bin")


def bundled_dialogues() -> list[Dialogue]:
    return list(dialogues_of(open_source(PROJECT / "llm_train_text.json")))


def dialogues_of(source: Source) -> Iterator[Dialogue]:
    """All dialogues of a file, one by one."""
    return (dialogue for number, record in source.records for dialogue in source.dialogues(number, record))


def encoded(*dialogues: tuple[list[int], list[int]]) -> SimpleNamespace:
    """A stand-in for conversations, from (token ids, ends of turns) pairs; every token is learned."""
    ids = [token for tokens, _ in dialogues for token in tokens]
    return SimpleNamespace(
        tokens=np.array(ids, np.uint16),
        learned=np.ones(len(ids), bool),
        place_of=lambda number: number + 1,
        starts=np.cumsum([0, *(len(tokens) for tokens, _ in dialogues)]),
        turn_ends=lambda number: list(dialogues[number][1]),
        instruction_end=lambda number: 0,
    )


def make_examples(*dialogues: tuple[list[int], list[int]], max_length: int) -> DialogueDataset:
    return DialogueDataset(encoded(*dialogues), np.arange(len(dialogues)), max_length)


def fit(
    model: GPTModel,
    train_set: DialogueDataset,
    val_set: DialogueDataset,
    settings: TrainingSettings,
    folder: Path,
    machine: Machine = CPU,
    saving: RunSettings = RunSettings(),  # noqa: B008
    optimizer: torch.optim.Optimizer | None = None,
    watch: Callable[[GPTModel], dict[str, str]] | None = None,
) -> TrainingState:
    """Train `model` as the command does, and write to `folder`; padding is token 100."""
    folder.mkdir(exist_ok=True)
    setup = TrainingSetup(
        model=model,
        optimizer=optimizer or make_optimizer(model, settings),
        examples=Examples(train_set, val_set, 100),
        settings=settings,
        saving=saving,
        machine=machine,
        checkpoints=Checkpoints(folder / "checkpoint", {"model": "a test's"}),
        watch=partial(watch, model) if watch else None,
    )
    with StopSignals(machine) as signals:
        return train(Trainer(setup), signals)


def logged(folder: Path, name: str) -> list[float]:
    """The values of `name` in the metrics of a run, in order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory) -> Path:
    """A folder with `vocab.json` and `merges.txt`: 400 tokens learned from the bundled conversations."""
    folder = tmp_path_factory.mktemp("vocabulary")
    train_vocabulary(bundled_dialogues(), 400, folder)
    return folder


def tiny_reference(std: float = 0.1, **changes) -> GPT2LMHeadModel:
    """A GPT-2 of transformers with random weights, large enough that different inputs give different outputs."""
    torch.manual_seed(0)
    shape = dict(n_layer=3, n_head=4, n_embd=48, n_positions=128, vocab_size=400, bos_token_id=399, eos_token_id=399)
    no_dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    config = GPT2Config(**{**shape, **no_dropout, **changes})
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=std)
            if ".ln_" in name and name.endswith("weight"):
                parameter.add_(1)
    return model


def write_layout(reference: GPT2LMHeadModel, vocabulary: Path, folder: Path, layout: str) -> Path:
    """Save `reference` in one of the layouts in which GPT-2 models are published."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((vocabulary / name).read_bytes())
    (folder / "config.json").write_text(json.dumps(reference.config.to_dict(), default=str))
    tensors = {name: value.detach().clone() for name, value in reference.transformer.named_parameters()}
    if layout in ("bare", "bin"):
        size = reference.config.n_positions
        for layer in range(reference.config.n_layer):  # older files contain the causal masks
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, size, size).tril()
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if layout in ("prefixed", "fp16", "old bin"):
        tensors = {f"transformer.{name}": value for name, value in tensors.items()}
    if layout in ("head beside", "fp16", "old bin"):
        wte = next(value for name, value in tensors.items() if name.endswith("wte.weight"))
        tensors["lm_head.weight"] = wte.clone()
    if layout == "head instead":
        tensors["lm_head.weight"] = tensors.pop("wte.weight")
    if layout == "fp16":
        tensors = {name: value.half() for name, value in tensors.items()}
    if layout.endswith("bin"):
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=layout == "bin")
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_conversation(base: Path, folder: Path, dialogue: Dialogue, template: str, learn: str = "all") -> Conversations:
    """Write the model of `base` into `folder` as a run would after training on one dialogue."""
    conversations = Conversations.of(Renderer(load_tokenizer(base), template), [dialogue], learn)
    tokenizer = conversations.renderer.tokenizer
    copy_vocabulary(base, folder, tokenizer)
    model, _ = load_model(base)
    add_embeddings(model, tokenizer.n_vocab)
    save_model(model, folder, conversations.describe([0]))
    return conversations


@pytest.fixture
def gpu() -> Machine:
    """The GPU, in bf16."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return choose_machine("cuda", "bf16")


@pytest.fixture
def model_folder(tmp_path, vocabulary) -> Path:
    """A complete tiny model folder in the layout of the published gpt2."""
    return write_layout(tiny_reference(), vocabulary, tmp_path / "tiny-random", "bare")


@pytest.fixture
def command(tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command of the project as a user would, in an empty current folder and without a network."""
    work = tmp_path / "work"
    work.mkdir()
    return partial(run_in, work)


def run_in(folder: Path, script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROJECT / script), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONUTF8": "1", **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


@pytest.fixture
def work(tmp_path, command) -> Path:
    return tmp_path / "work"


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """Check that `done` ended with a one-line user error, and return the line."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "it/s" not in line and "step/s" not in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def launch_browser(playwright: Any) -> Any:
    """Launch the browser; as root it must run without its sandbox."""
    as_root = hasattr(os, "geteuid") and not os.geteuid()
    return playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"] if as_root else [])


needs_browser = pytest.mark.skipif(
    find_browser() is None, reason="no browser found: chromium, chromium-browser or google-chrome"
)


def written(work: Path) -> list[str]:
    """All files and folders in a command's current folder."""
    return sorted(str(path.relative_to(work)) for path in work.rglob("*"))
