"""Build the bundled model from a corpus of dialogues: learn a vocabulary, then pretrain with the project's loop.

    python -m models.tiny.build --corpus dialogues.jsonl.xz --start first

The bundled model was trained twice, the second time from its own weights: README.md has both commands.

The corpus has one JSON object per line, {"turns": [{"speaker": ..., "text": ...}, ...]}. A stopped build resumes from
its last checkpoint when it is started again with the same options.
"""

import gzip
import json
import lzma
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from dialogues.batches import DialogueDataset
from dialogues.conversations import Conversations
from dialogues.dialogue import INSTRUCTION, Dialogue, Turn
from dialogues.template import Renderer, render
from dialogues.tokenizer import END_OF_TEXT, copy_vocabulary, load_tokenizer
from gpt_model import GPTConfig, GPTModel
from hub.find import CHECKSUMS, checksum
from load_gpt2_weights import load_model, save_model
from settings import RunSettings, TrainingSettings
from support.command_line import parse_command_line
from support.errors import display, run_command
from support.files import write_json, write_text
from training.checkpoint import Checkpoints
from training.device import choose_machine, keep_freed_memory
from training.loop import Examples, Trainer, TrainingSetup, evaluate, train
from training.stopping import StopSignals

DIALOGUE = {"template": "prompt", "instruction": INSTRUCTION, "speakers": [], "learn": "all"}  # saved with the model
NAMES = """
Alex Bob Anna Ben Clara Daniel Emma Frank Grace Henry Isabel Jack Kate Leo Maria Nick Olivia Paul Rosa Sam Tom Uma
Victor Wendy Amir Yuki Zoe Liam Nora Oscar Priya Quinn Ravi Sofia Theo Chloe David Ella Fatima George Hannah Ivan
Julia Kevin Laura Max Nina Omar Peter Rachel Simon Tina Will Alice Carlos Diana Eric Lucy Mark Sarah
"""


@dataclass(frozen=True)
class BuildSettings:
    corpus: Path
    """JSON Lines of two-person dialogues, plain or .xz"""
    folder: Path = Path(__file__).parent
    """folder to write the model to"""
    work: Path = Path("runs/build-tiny")
    """folder for the checkpoints and logs of pretraining"""
    start: Path | None = None
    """model folder to continue from, with its vocabulary and shape; otherwise the model starts from random weights"""
    held_out: int = 1000
    """number of dialogues to hold out from training and evaluate on"""
    shape: GPTConfig = field(default_factory=lambda: GPTConfig(4, 4, 352, vocab_size=4096, n_positions=512))
    training: TrainingSettings = field(
        default_factory=lambda: TrainingSettings(
            epochs=3,
            max_steps=3600,
            batch_size=24,
            learning_rate=3e-3,
            schedule="linear",
            warmup=0.02,
            evaluate_every=1000,
            seed=2,
        )
    )


class MuonAndAdamW(torch.optim.AdamW):
    """Muon for the matrices of the blocks, AdamW for embeddings, biases and norms, as one optimizer.

    Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") learns more from the same
    tokens; its steps are scaled to AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2), so that
    one learning rate suits both.
    """

    def __init__(self, model: GPTModel, weight_decay: float) -> None:
        blocks = [parameter for parameter in model.h.parameters() if parameter.dim() == 2]
        norms = [parameter for parameter in model.parameters() if parameter.dim() < 2]
        super().__init__(
            [
                {"params": [model.wte.weight, model.wpe.weight], "weight_decay": weight_decay},
                {"params": norms, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
            fused=True,
        )
        self.muon = torch.optim.Muon(blocks, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.muon.state = self.state  # keyed by parameter, and no parameter is in both optimizers

    def step(self, closure: None = None) -> None:
        for group in self.muon.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        self.muon.step()
        super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.muon.zero_grad(set_to_none)
        super().zero_grad(set_to_none)


def main() -> None:
    build(parse_command_line(BuildSettings))


def build(settings: BuildSettings) -> None:
    """Run the whole build, and print bits per byte of the model before and after it, gzip and xz."""
    keep_freed_memory()
    settings.work.mkdir(parents=True, exist_ok=True)
    dialogues = read_corpus(settings.corpus)
    chance = random.Random(settings.training.seed)
    held_out = dialogues[: settings.held_out]
    training = [rename(dialogue, chance) for dialogue in dialogues[settings.held_out :]]
    vocabulary = settings.start or settings.work / "vocabulary"
    if not (settings.start or vocabulary.exists()):
        train_vocabulary(training, settings.shape.vocab_size, vocabulary)
    model, tokenizer = make_model(settings, vocabulary)
    renderer = Renderer(tokenizer)
    train_set, val_set = (
        DialogueDataset(Conversations.of(renderer, part), np.arange(len(part)), model.config.n_positions)
        for part in (training, held_out)
    )
    leave_out_context(train_set)
    display(
        f"train: {len(training):,} dialogues, {train_set.count_learned():,} learned tokens; held out: {len(held_out):,}"
    )
    machine = choose_machine(settings.training.device, settings.training.precision)
    display(machine.explanation)
    model.to(machine.device)
    text = "".join(map(render, held_out)).encode()
    bits = {"start": bits_per_byte(evaluate(model, val_set, tokenizer.eot_token, machine), val_set, text)}

    optimizer = MuonAndAdamW(model, settings.training.weight_decay)
    examples = Examples(train_set, val_set, tokenizer.eot_token)
    parents = [settings.corpus, *([settings.start / "model.safetensors"] if settings.start else [])]
    checkpoints = Checkpoints(settings.work / "checkpoint", {path.name: checksum(path) for path in parents})
    with StopSignals(machine) as signals:
        saving = RunSettings(keep_checkpoint=True)
        setup = TrainingSetup(model, optimizer, examples, settings.training, saving, machine, checkpoints)
        train(Trainer(setup), signals)
    copy_vocabulary(vocabulary, settings.folder)
    save_model(model, settings.folder, DIALOGUE, dtype=torch.float16)
    write_checksums(settings.folder)

    model = load_model(settings.folder)[0].to(machine.device)  # the bundled weights, rounded to fp16
    bits["model"] = bits_per_byte(evaluate(model, val_set, tokenizer.eot_token, machine), val_set, text)
    bits["gzip"] = 8 * len(gzip.compress(text, 9)) / len(text)
    bits["xz"] = 8 * len(lzma.compress(text, preset=9)) / len(text)
    write_json(settings.work / "bits_per_byte.json", bits)
    shown = ", ".join(f"{name} {value:.3f}" for name, value in bits.items())
    display(f"held-out bits per byte: {shown}")


def make_model(settings: BuildSettings, vocabulary: Path) -> tuple[GPTModel, tiktoken.Encoding]:
    """The model to train: from `--start`, or of the given shape with random weights."""
    if settings.start:
        return load_model(settings.start, dropout=settings.training.dropout)
    tokenizer = load_tokenizer(vocabulary)
    torch.manual_seed(settings.training.seed)
    config = replace(settings.shape, vocab_size=tokenizer.n_vocab)
    return GPTModel(config, settings.training.dropout), tokenizer


def leave_out_context(dataset: DialogueDataset) -> None:
    """Start each later example of a long dialogue at its first learned token.

    The earlier turns are learned in earlier examples; computing them again as context took an eighth of the time.
    """
    dataset.spans[:, 0] = np.maximum(dataset.spans[:, 0], dataset.spans[:, 1] - 1)


def read_corpus(path: Path) -> list[Dialogue]:
    """The dialogues of the corpus in random order.

    The order, the names and the instruction lines are always the same, so that every build holds out the same text.
    """
    chance = random.Random(1)
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else open(path, encoding="utf-8") as lines:
        dialogues = [rename(read_dialogue(line), chance) for line in lines]
    chance.shuffle(dialogues)
    return dialogues


def read_dialogue(line: str) -> Dialogue:
    return Dialogue(tuple(Turn(turn["speaker"], turn["text"].strip()) for turn in json.loads(line)["turns"]))


def rename(dialogue: Dialogue, chance: random.Random) -> Dialogue:
    """The dialogue with random first names for the speakers, and with the instruction line in half of the cases."""
    labels, names_known = dict.fromkeys(turn.speaker for turn in dialogue.turns), NAMES.split()
    names = dict(zip(labels, chance.sample(names_known, len(labels)), strict=True))
    turns = tuple(Turn(names[turn.speaker], turn.text) for turn in dialogue.turns)
    return Dialogue(turns, chance.choice((INSTRUCTION, "")))


def train_vocabulary(dialogues: Sequence[Dialogue], size: int, folder: Path) -> None:
    """Learn a byte-level BPE in GPT-2's format: the 256 bytes, the merges, and last `<|endoftext|>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet)
    tokenizer.train_from_iterator((render(dialogue).removesuffix(END_OF_TEXT) for dialogue in dialogues), trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    vocabulary = {**bpe["vocab"], END_OF_TEXT: len(bpe["vocab"])}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, bpe["merges"]), ""]))


def write_checksums(folder: Path) -> None:
    """Write `SHA256SUMS`, which the program and `sha256sum --check` use to verify the bundled files."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".txt", ".safetensors"))
    lines = [f"{checksum(folder / name)}  {name}\n" for name in names]
    write_text(folder / CHECKSUMS, "".join(lines))


def bits_per_byte(loss: float, dataset: DialogueDataset, text: bytes) -> float:
    """Bits per byte of the rendered dialogues, from `loss` in nats per predicted token."""
    return loss * dataset.count_learned() / math.log(2) / len(text)


if __name__ == "__main__":
    run_command(main)
