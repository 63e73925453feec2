"""Command-line options: one frozen dataclass per command, built from shared groups.

Each field is an option, and the string below it is its help text. Nothing here imports torch, so `--help` is instant.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import arg

from support.files import PROJECT, resolved

GENERATED = Path("generated_conversations.json")
BUNDLED_DATA = Path("llm_train_text.json")
RUNS = Path("runs")  # parent of run folders without --run-dir
COLUMNS = ("speaker", "text", "dialogue", "time", "prompt", "reply")  # the possible contents of a column
MOST = 1_000_000_000  # upper limit of counts and times: larger values are typos, and would overflow
FROM_ONE = ("between 1 and 1e9", lambda value: 1 <= value <= MOST)
FROM_ZERO = ("between 0 and 1e9", lambda value: 0 <= value <= MOST)


@dataclass(frozen=True)
class ModelSettings:
    name: Annotated[str, arg(name="model")] = "tiny"
    """tiny (bundled), distilgpt2, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a Hugging Face id, a model or run folder"""
    model_path: Path = Path("models")
    """folder that holds the models and receives downloads"""


@dataclass(frozen=True)
class FormatSettings:
    paths: tuple[Path, ...] = ()
    """files, folders, patterns such as 'chats/*.txt', or - for standard input"""
    format: Literal[
        "auto", "names", "turns", "messages", "sharegpt", "alpaca", "pairs", "text", "chat-export", "csv", "tsv"
    ] = "auto"
    """file format; auto: detect it from the content"""
    columns: tuple[str, ...] = ()
    """map columns or keys: speaker=Character text=Line dialogue=Scene time=Date, or prompt=... reply=..."""
    pause_hours: float = 8
    """hours of silence that start a new dialogue (for messages with timestamps)"""
    allow_loss: bool = False
    """accept a file even if much of its text cannot be read as turns"""
    mask: bool = False
    """replace phone numbers, e-mail addresses, links and IBANs with placeholders (needs requirements-extra.txt)"""

    @property
    def named_columns(self) -> tuple[tuple[str, str], ...]:
        """`columns` as (content, column name) pairs."""
        return split_pairs(self.columns)

    def problems(self) -> list[str]:
        """Return one message per invalid value."""
        holds, known = [what for what, _ in self.named_columns], ", ".join(f"{what}=..." for what in COLUMNS)
        pairs = zip(self.columns, self.named_columns, strict=True)
        wrong = [pair for pair, (what, name) in pairs if what not in COLUMNS or not name]
        found = [f"--columns {pair}: expected one of {known}" for pair in wrong]
        if not self.paths:
            found.append("no data: give a file, a folder, or - for standard input")
        if len(set(holds)) < len(holds) or ("prompt" in holds) != ("reply" in holds):
            found.append(f"--columns {' '.join(self.columns)}: give each name once, and prompt= together with reply=")
        return found + out_of_range(self, "above 0 and at most 1e6", lambda value: 0 < value <= 1e6, "pause_hours")


@dataclass(frozen=True)
class ReadSettings(FormatSettings):
    """Convert conversation files to JSON Lines, and print a summary of what was read to standard error."""

    paths: Annotated[tyro.conf.Positional[tuple[Path, ...]], arg(metavar="FILE...")] = ()


@dataclass(frozen=True)
class ConversationSettings(FormatSettings):
    paths: Annotated[tuple[Path, ...], arg(name="data")] = (BUNDLED_DATA,)
    """files (JSON, JSONL, text, CSV, chat exports, Parquet; also .gz, .xz, .zip), folders, patterns, or - for stdin"""
    template: Literal["auto", "prompt", "labels", "tokens", "alpaca"] = "auto"
    """text format of a dialogue; auto: alpaca for instruction data, prompt otherwise"""
    learn: str = "all"
    """tokens in the loss: all, replies (all turns but the first), or a speaker's name; learned.txt shows them"""
    rename: tuple[str, ...] = ()
    """new names for speakers, as in Alice=Alex Robert=Bob"""
    max_length: int = 0
    """maximum tokens per example; longer dialogues become several examples (0: the model's context)"""

    def locate(self) -> tuple[Path, ...]:
        """`paths`, with the bundled file from the program's folder if the current folder has none of that name."""
        return tuple(PROJECT / path if path == BUNDLED_DATA and not path.exists() else path for path in self.paths)

    @property
    def new_names(self) -> dict[str, str]:
        """`rename` as a dictionary from old to new names."""
        return dict(split_pairs(self.rename))

    def problems(self) -> list[str]:
        found = super().problems()
        found += [
            f"--rename {pair}: expected OLD=NEW" for pair in self.rename if not re.fullmatch(r"[^=]*\S=\s*\S.*", pair)
        ]
        if len(self.new_names) < len(self.rename):
            found.append(f"--rename {' '.join(self.rename)}: an old name occurs twice")
        if self.max_length and self.max_length < 16:
            found.append(f"--max-length {self.max_length}: must be 16 or more, or 0 for the model's context")
        return found


@dataclass(frozen=True)
class DataSettings(ConversationSettings):
    split: str = "70/30"
    """percent for train/validation or train/validation/test, in each file's order; duplicates stay in one part"""
    shuffle: bool = False
    """shuffle the dialogues of all files before the split (with --seed)"""
    folds: int = 0
    """number of cross-validation folds (0: a single run)"""
    try_: Annotated[Literal["nothing", "learning-rate"], arg(name="try")] = "nothing"
    """cross-validate five values of this option around its default (with 5 folds unless --folds is given)"""

    @property
    def percents(self) -> list[int]:
        """`split` as numbers: [70, 30] for 70/30."""
        return [int(percent) for percent in self.split.split("/")]

    def problems(self) -> list[str]:
        found = super().problems()
        if not re.fullmatch(r"\d{1,2}(/\d{1,2}){1,2}", self.split, re.ASCII) or 0 in self.percents:
            found.append(f"--split {self.split}: expected two or three whole percentages, as in 70/30 or 80/10/10")
        elif sum(self.percents) != 100:
            found.append(f"--split {self.split}: the parts sum to {sum(self.percents)}, not 100")
        elif (self.folds or self.try_ != "nothing") and self.split != DataSettings.split:
            found.append(f"--split {self.split}: --folds and --try make their own split; leave out --split")
        return found + out_of_range(
            self, "0, or between 2 and 100", lambda value: value == 0 or 2 <= value <= 100, "folds"
        )


@dataclass(frozen=True)
class MachineSettings:
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """device to compute on; auto: a GPU if there is one"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """precision of matrix products (weights stay fp32); auto: bf16 on hardware with native support"""
    seed: int = 123
    """random seed"""

    def problems(self) -> list[str]:
        return out_of_range(self, "between 0 and 2**63 - 1", lambda value: 0 <= value < 2**63, "seed")


@dataclass(frozen=True)
class TrainingSettings(MachineSettings):
    epochs: int | None = None
    """passes over the training dialogues (unset: 10, or 3 for models as small as tiny)"""
    max_steps: int = 0
    """maximum optimizer steps (0: no limit)"""
    max_minutes: float = 0.0
    """train for at most about this many minutes; the steps that fit follow from the speed of the first (0: no limit)"""
    batch_size: int = 2
    """examples per batch (8 for small models on much data, see docs/training.md)"""
    gradient_accumulation: int = 1
    """batches per optimizer step: a larger batch in the memory of a small one"""
    learning_rate: float | None = None
    """AdamW's peak learning rate (unset: 5e-5, or 8e-4 with LoRA; for models as small as tiny: 1.2e-4 and 2e-3)"""
    weight_decay: float = 0.1
    """AdamW's weight decay (biases and norms: none)"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """learning-rate schedule after the warm-up"""
    warmup: float = 0.0
    """fraction of the steps in which the learning rate rises from 0"""
    max_grad_norm: float = 1.0
    """clip gradients to this norm (0: off)"""
    dropout: float = 0.0
    """dropout probability in training"""
    lora_rank: int = 0
    """rank of the LoRA adapters to train instead of the weights (0: train all weights)"""
    compile: bool = False
    """train with torch.compile: slow first steps, then faster ones"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory for long dialogues, a third more time"""
    evaluate_every: int = 0
    """steps between evaluations on the validation part (0: after each epoch)"""
    keep: Literal["best", "last"] = "best"
    """weights to keep: best (lowest validation loss) or last"""
    early_stopping: int = 0
    """stop after this many evaluations without improvement (0: off)"""

    def step_batches(self, processes: int) -> int:
        """Batches per optimizer step, over all processes."""
        return self.gradient_accumulation * processes

    def steps(self, examples: int, processes: int) -> tuple[int, int]:
        """Optimizer steps per epoch, and in the whole run."""
        assert self.epochs is not None  # filled in by `training.defaults`
        steps_per_epoch = -(-examples // (self.batch_size * self.step_batches(processes)))
        steps = self.epochs * steps_per_epoch
        return steps_per_epoch, min(steps, self.max_steps or steps)

    def problems(self) -> list[str]:
        return [
            *out_of_range(self, *FROM_ONE, "epochs", "batch_size", "gradient_accumulation"),
            *out_of_range(self, "above 0 and at most 1", lambda value: 0 < value <= 1, "learning_rate"),
            *out_of_range(self, "between 0 and 1", lambda value: 0 <= value <= 1, "weight_decay"),
            *out_of_range(self, "at least 0 and below 1", lambda value: 0 <= value < 1, "dropout", "warmup"),
            *out_of_range(self, *FROM_ZERO, "max_grad_norm", "evaluate_every", "max_steps", "max_minutes"),
            *out_of_range(self, *FROM_ZERO, "early_stopping", "lora_rank"),
            *super().problems(),
        ]


@dataclass(frozen=True)
class SamplingSettings:
    max_new_tokens: int = 128
    """maximum tokens per completion"""
    temperature: float = 0.0
    """sampling temperature (0: greedy decoding; 1: the model's own distribution)"""
    top_k: int = 0
    """sample from the k most likely tokens (0: all)"""
    top_p: float = 1.0
    """sample from the most likely tokens that together reach this probability (1: all)"""
    repetition_penalty: float = 1.0
    """above 1, tokens already used become less likely (1: off)"""

    def problems(self) -> list[str]:
        return [
            *out_of_range(self, *FROM_ONE, "max_new_tokens"),
            *out_of_range(
                self, "0, or between 0.01 and 100", lambda value: value == 0 or 0.01 <= value <= 100, "temperature"
            ),
            *out_of_range(self, *FROM_ZERO, "top_k"),
            *out_of_range(self, "above 0 and at most 1", lambda value: 0 < value <= 1, "top_p"),
            *out_of_range(self, "between 0.1 and 10", lambda value: 0.1 <= value <= 10, "repetition_penalty"),
        ]


@dataclass(frozen=True)
class GenerationSettings(SamplingSettings):
    cases: int = 3
    """held-out conversations to complete, from the test part if there is one"""

    def problems(self) -> list[str]:
        found = [*out_of_range(self, *FROM_ONE, "cases"), *super().problems()]
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            found.append("--top-k and --top-p have no effect at temperature 0: add --temperature 0.7 or similar")
        return found


@dataclass(frozen=True)
class RunSettings:
    run_dir: Path | None = None
    """run folder to create (unset: the next free runs/<model>-<n>)"""
    resume: Path | None = None
    """run folder of a stopped run to resume, with its own options"""
    settings: Path | None = None
    """file with defaults for all options that are not given: settings.json of a run, or some of its settings"""
    checkpoint_minutes: float = 5.0
    """minimum minutes between checkpoints (0: one after each epoch); a stopped run always saves one"""
    keep_checkpoint: bool = False
    """keep the checkpoint of a finished run, so that it can be resumed with more --epochs"""
    keep_epochs: bool = False
    """also save a model folder after each epoch, in epochs/<n>/"""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """also log the metrics to TensorBoard or Weights & Biases (needs requirements-extra.txt)"""
    watch: bool = False
    """after each evaluation, show the model's reply in the first case next to the true reply"""

    def problems(self) -> list[str]:
        found = out_of_range(self, *FROM_ZERO, "checkpoint_minutes")
        if self.resume and self.run_dir:
            found.append(f"--run-dir {self.run_dir}: --resume continues in its own folder; leave out one of the two")
        if self.resume and self.settings:
            found.append(f"--settings {self.settings}: a resumed run has its own settings; leave out one of the two")
        return found


@dataclass(frozen=True)
class FinetuneSettings:
    """Fine-tune GPT-2 on conversations, and write its replies next to the true ones."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    run: RunSettings = field(default_factory=RunSettings)
    preview: bool = False
    """show and write what the model would see, with the learned tokens marked, and stop"""
    output: Path = GENERATED
    """file for the generated and true conversations"""

    def problems(self) -> list[str]:
        output, folder = resolved(self.output), resolved(self.run.run_dir or RUNS)
        numbered = not self.run.run_dir and output.parent == folder and re.fullmatch(r".+-\d+", output.name)
        many = "--try" if self.data.try_ != "nothing" else "--folds" * bool(self.data.folds)
        found = [f"--preview shows a single run; leave out {many}"] * bool(self.preview and many)
        if not output.exists() and (output in (folder, *folder.parents) or numbered):
            found.append(f"--output {self.output}: the run creates a folder of that name; give a file name")
        elif self.run.run_dir and folder in output.parents and output != folder / GENERATED:
            found.append(f"--output {self.output}: the run folder gets its own copy; choose a file elsewhere")
        return found


@dataclass(frozen=True)
class FinishedModelSettings:
    model: Annotated[tyro.conf.Positional[str | None], arg(metavar="[MODEL]")] = None
    """run folder, model folder or model name (unset: the newest finished run in runs/)"""
    model_path: Path = Path("models")
    """folder that holds the models and receives downloads"""


@dataclass(frozen=True)
class EvaluateSettings(FinishedModelSettings, MachineSettings):
    """Measure a model on held-out conversations, and write a report."""

    data: ConversationSettings = field(default_factory=ConversationSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    base: str | None = None
    """model to compare with, or none (unset: the run's base model)"""
    dialogues: int = 1000
    """maximum dialogues to measure, sampled with --seed (of the training part, the first 100)"""
    report_dir: Path | None = None
    """folder for the report (unset: the run folder, or for other data the next free runs/<model>-evaluation-<n>)"""

    def problems(self) -> list[str]:
        return out_of_range(self, *FROM_ONE, "dialogues") + super().problems()


@dataclass(frozen=True)
class AnswerSettings(SamplingSettings):
    """Defaults for small models: greedy decoding makes them repeat themselves, and plain sampling makes them ramble."""

    max_new_tokens: int = 200
    """maximum tokens per answer"""
    temperature: float = 0.7
    """sampling temperature (0: greedy decoding; 1: the model's own distribution)"""
    top_p: float = 0.9
    """sample from the most likely tokens that together reach this probability (1: all)"""
    repetition_penalty: float = 1.1
    """above 1, tokens of this answer and the previous one become less likely (1: off)"""


@dataclass(frozen=True)
class ChatSettings(FinishedModelSettings):
    """Chat with a model: you write as one speaker, and it answers as the other."""

    me: str | None = None
    """your name (unset: the first speaker that the model knows, or You)"""
    you: str | None = None
    """the model's name (unset: the other speaker, or Bot)"""
    answer: AnswerSettings = field(default_factory=AnswerSettings)
    seed: int | None = None
    """random seed; with one, the same messages get the same answers (unset: random)"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """device to compute on; auto: a GPU if there is one"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """precision of matrix products (weights stay fp32); auto: bf16 on hardware with native support"""
    guess: bool = False
    """blind test instead of a chat: guess which of two replies is real; --you shows only one speaker's replies"""
    web: bool = False
    """chat on a web page instead of in the terminal (needs requirements-extra.txt)"""
    host: str = "127.0.0.1"
    """address to serve the page on (0.0.0.0: also reachable from other computers)"""
    port: int = 7860
    """port to serve the page on"""
    base: str | None = None
    """model to show next to it on the page, or none (unset: the run's base model)"""

    def problems(self) -> list[str]:
        return [
            *["--guess: --me has no effect; use --you NAME"] * bool(self.guess and self.me and not self.web),
            *out_of_range(self, "between 0 and 2**63 - 1", lambda value: 0 <= value < 2**63, "seed"),
            *out_of_range(self, "from 1 to 65535", lambda value: 1 <= value <= 65535, "port"),
        ]


@dataclass(frozen=True)
class ExportSettings(FinishedModelSettings):
    """Write a model as a GGUF file for llama.cpp, and a Modelfile for Ollama (needs requirements-extra.txt)."""

    type: Literal["f32", "f16", "q8_0"] = "f16"
    """number format of the matrices; q8_0 takes about half the space of f16"""
    output: Path | None = None
    """file to write (unset: <name>-<type>.gguf in the run folder, or in the current one for other models)"""

    def problems(self) -> list[str]:
        fits = self.output is None or self.output.suffix == ".gguf"
        return [] if fits else [f"--output {self.output}: the name must end in .gguf"]


def split_pairs(values: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((left.strip(), right.strip()) for left, _, right in (value.partition("=") for value in values))


def out_of_range(settings: object, needed: str, allowed, *names: str) -> list[str]:
    """Return one message per field in `names` whose value `allowed` rejects; None means unset and is skipped."""
    values = {name: getattr(settings, name) for name in names}
    return [
        f"--{name.replace('_', '-')} {value}: must be {needed}"
        for name, value in values.items()
        if value is not None and not allowed(value)
    ]
