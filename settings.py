"""Every option of every command: a frozen dataclass for each command, made of shared groups.

The field is the option, its default the default, the text under it the help. Nothing here imports torch, so that
`--help` answers at once.
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
COLUMNS = ("speaker", "text", "dialogue", "time", "prompt", "reply")  # what a column can hold
MOST = 1_000_000_000  # upper limit of counts and times; larger values are typing errors and would overflow
FROM_ONE = ("from 1 to 1e9", lambda value: 1 <= value <= MOST)
FROM_ZERO = ("from 0 to 1e9", lambda value: 0 <= value <= MOST)


@dataclass(frozen=True)
class ModelSettings:
    name: Annotated[str, arg(name="model")] = "tiny"
    """tiny (comes with the program), distilgpt2, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a Hugging Face id such as
    microsoft/DialoGPT-medium, a model folder, or a run folder"""
    model_path: Path = Path("models")
    """where model folders live and where downloads go"""


@dataclass(frozen=True)
class FormatSettings:
    paths: tuple[Path, ...] = ()
    """files, folders of them, patterns such as 'chats/*.txt', or - for standard input"""
    format: Literal[
        "auto", "names", "turns", "messages", "sharegpt", "alpaca", "pairs", "text", "chat-export", "csv", "tsv"
    ] = "auto"
    """what form the files have; auto: each is recognised by its content"""
    columns: tuple[str, ...] = ()
    """what a column or key holds, where its name does not say it: speaker=Character text=Line dialogue=Scene time=Date,
    or prompt=... and reply=..."""
    pause_hours: float = 8
    """hours of silence that begin a new dialogue, where messages have times"""
    allow_loss: bool = False
    """read a file although too much of its text can't be accounted for"""
    mask: bool = False
    """replace phone numbers, e-mail addresses, links and IBANs by placeholders (an extra: requirements-extra.txt)"""

    @property
    def named_columns(self) -> tuple[tuple[str, str], ...]:
        """`columns` as pairs: what a column holds, and its name."""
        return split_pairs(self.columns)

    def problems(self) -> list[str]:
        """What is wrong with the values, a sentence each."""
        holds, known = [what for what, _ in self.named_columns], ", ".join(f"{what}=..." for what in COLUMNS)
        pairs = zip(self.columns, self.named_columns, strict=True)
        wrong = [pair for pair, (what, name) in pairs if what not in COLUMNS or not name]
        found = [f"--columns {pair}: {known} are known" for pair in wrong]
        if not self.paths:
            found.append("--data: name a file, a folder, or - for standard input")
        if len(set(holds)) < len(holds) or ("prompt" in holds) != ("reply" in holds):
            found.append(f"--columns {' '.join(self.columns)}: each once, and prompt=... with reply=...")
        return found + out_of_range(self, "above 0", lambda value: 0 < value <= 1e6, "pause_hours")


@dataclass(frozen=True)
class ReadSettings(FormatSettings):
    """Print what is read from conversation files as JSON Lines, and the account of it on standard error."""

    paths: Annotated[tyro.conf.Positional[tuple[Path, ...]], arg(metavar="FILE...")] = ()


@dataclass(frozen=True)
class ConversationSettings(FormatSettings):
    paths: Annotated[tuple[Path, ...], arg(name="data")] = (BUNDLED_DATA,)
    """the conversations: files (JSON, JSON Lines, text, tables, exported chats, Parquet, also as .gz, .xz or .zip),
    folders of them, patterns such as 'chats/*.txt', or - for standard input"""
    template: Literal["auto", "prompt", "labels", "tokens", "alpaca"] = "auto"
    """how a dialogue becomes text; auto: alpaca for instruction data, prompt otherwise"""
    learn: str = "all"
    """which tokens count in the loss: all, replies (every turn but the first), or a speaker's name (their turns); a run
    shows them in learned.txt"""
    rename: tuple[str, ...] = ()
    """other names for speakers, as in Alice=Alex Robert=Bob"""
    max_length: int = 0
    """most input tokens in an example; a longer dialogue becomes several examples; 0: the model's context"""

    def locate(self) -> tuple[Path, ...]:
        """The paths: the bundled file is found beside the program when the current folder has none of its name."""
        return tuple(PROJECT / path if path == BUNDLED_DATA and not path.exists() else path for path in self.paths)

    @property
    def new_names(self) -> dict[str, str]:
        """`rename` as old name → new name."""
        return dict(split_pairs(self.rename))

    def problems(self) -> list[str]:
        found = super().problems()
        found += [
            f"--rename {pair}: old=new is needed" for pair in self.rename if not re.fullmatch(r"[^=]*\S=\s*\S.*", pair)
        ]
        if len(self.new_names) < len(self.rename):
            found.append(f"--rename {' '.join(self.rename)}: a name stands there twice")
        if self.max_length and self.max_length < 16:
            found.append(f"--max-length {self.max_length}: 16 or more (or 0, the model's context)")
        return found


@dataclass(frozen=True)
class DataSettings(ConversationSettings):
    split: str = "70/30"
    """train/validation or train/validation/test, in percent, each file in its order; equal dialogues stay together"""
    shuffle: bool = False
    """shuffle the dialogues of all files (by --seed) before the split"""
    folds: int = 0
    """cross-validation: train this many times, each time holding out another part of the conversations; 0: once"""
    try_: Annotated[Literal["nothing", "learning-rate"], arg(name="try")] = "nothing"
    """cross-validate five values of this option around its default, and compare them (five folds unless --folds)"""

    @property
    def percents(self) -> list[int]:
        """`split` as numbers: 70/30 → [70, 30]."""
        return [int(percent) for percent in self.split.split("/")]

    def problems(self) -> list[str]:
        found = super().problems()
        if not re.fullmatch(r"\d{1,2}(/\d{1,2}){1,2}", self.split, re.ASCII) or 0 in self.percents:
            found.append(f"--split {self.split}: two or three whole percentages are needed, as in 70/30 or 80/10/10")
        elif sum(self.percents) != 100:
            found.append(f"--split {self.split}: the parts sum to {sum(self.percents)}, not to 100")
        elif self.folds and self.split != DataSettings.split:
            found.append(f"--split {self.split}: --folds {self.folds} divides the conversations itself; leave one out")
        return found + out_of_range(self, "2 to 100, or 0,", lambda value: value == 0 or 2 <= value <= 100, "folds")


@dataclass(frozen=True)
class MachineSettings:
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to compute; auto: a GPU if there is one"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """number format of the matrix products; the weights stay fp32; auto: bf16 where the hardware has it"""
    seed: int = 123
    """fixes every random choice"""

    def problems(self) -> list[str]:
        return out_of_range(self, "from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63, "seed")


@dataclass(frozen=True)
class TrainingSettings(MachineSettings):
    epochs: int | None = None
    """how often every training dialogue is seen; default: 10, for a model as small as tiny 3"""
    max_steps: int = 0
    """stop after so many optimizer steps, and fit the schedule to them; 0: when the epochs are over"""
    max_minutes: float = 0.0
    """train for about so long: the speed of the first steps sets the number of steps; 0: until the epochs are over"""
    batch_size: int = 2
    """examples that are computed together (8 for a small model on much data; see docs/training.md)"""
    gradient_accumulation: int = 1
    """batches in each optimizer step: as one large batch, in the memory of a small one"""
    learning_rate: float | None = None
    """AdamW's step size at its highest; default: 5e-5, with LoRA 8e-4; for a model as small as tiny 1.2e-4 and 2e-3"""
    weight_decay: float = 0.1
    """pull of the weight matrices towards zero (biases and norms are left alone)"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """what the learning rate does after the warm-up: stay, or fall to 0"""
    warmup: float = 0.0
    """share of the steps over which the learning rate rises from 0"""
    max_grad_norm: float = 1.0
    """longer gradients are scaled down to this norm; 0: never"""
    dropout: float = 0.0
    """share of activations dropped in training"""
    lora_rank: int = 0
    """train low-rank adapters of this rank (LoRA) in place of the weights; 0: train every weight"""
    compile: bool = False
    """compile the model's blocks and its loss for training (torch.compile): slow first steps, then faster ones"""
    gradient_checkpointing: bool = False
    """compute activations twice rather than keep them: less memory for long dialogues, a third more time"""
    evaluate_every: int = 0
    """steps between evaluations on the validation part; 0: after each epoch"""
    keep: Literal["best", "last"] = "best"
    """weights that the run keeps: best (those with the lowest validation loss) or last"""
    early_stopping: int = 0
    """stop after this many evaluations without improvement; 0: never"""

    def step_batches(self, processes: int) -> int:
        """Batches in each optimizer step, over all processes."""
        return self.gradient_accumulation * processes

    def steps(self, examples: int, processes: int) -> tuple[int, int]:
        """Optimizer steps of an epoch over `examples`, and of the whole run."""
        assert self.epochs is not None  # `complete_settings` has filled it in
        steps_per_epoch = -(-examples // (self.batch_size * self.step_batches(processes)))
        steps = self.epochs * steps_per_epoch
        return steps_per_epoch, min(steps, self.max_steps or steps)

    def problems(self) -> list[str]:
        return [
            *out_of_range(self, *FROM_ONE, "epochs", "batch_size", "gradient_accumulation"),
            *out_of_range(self, "above 0 and at most 1", lambda value: 0 < value <= 1, "learning_rate"),
            *out_of_range(self, "from 0 to 1", lambda value: 0 <= value <= 1, "weight_decay"),
            *out_of_range(self, "0 or more and below 1", lambda value: 0 <= value < 1, "dropout", "warmup"),
            *out_of_range(self, *FROM_ZERO, "max_grad_norm", "evaluate_every", "max_steps", "max_minutes"),
            *out_of_range(self, *FROM_ZERO, "early_stopping", "lora_rank"),
            *super().problems(),
        ]


@dataclass(frozen=True)
class SamplingSettings:
    max_new_tokens: int = 128
    """longest completion in tokens"""
    temperature: float = 0.0
    """0: always the likeliest token; 1: the model's own distribution"""
    top_k: int = 0
    """draw among the k likeliest tokens; 0: all"""
    top_p: float = 1.0
    """draw among the likeliest tokens that together reach this probability"""
    repetition_penalty: float = 1.0
    """above 1: tokens already used become less likely"""

    def problems(self) -> list[str]:
        return [
            *out_of_range(self, *FROM_ONE, "max_new_tokens"),
            *out_of_range(self, "0, or 0.01 to 100", lambda value: value == 0 or 0.01 <= value <= 100, "temperature"),
            *out_of_range(self, *FROM_ZERO, "top_k"),
            *out_of_range(self, "above 0 and at most 1", lambda value: 0 < value <= 1, "top_p"),
            *out_of_range(self, "from 0.1 to 10", lambda value: 0.1 <= value <= 10, "repetition_penalty"),
        ]


@dataclass(frozen=True)
class GenerationSettings(SamplingSettings):
    cases: int = 3
    """how many conversations of the test part (or of validation, where there is no test part) the model completes"""

    def problems(self) -> list[str]:
        found = [*out_of_range(self, *FROM_ONE, "cases"), *super().problems()]
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            found.append("--top-k and --top-p choose among drawn tokens: give --temperature too, as in 0.7")
        return found


@dataclass(frozen=True)
class RunSettings:
    run_dir: Path | None = None
    """folder of this run; none: the next free runs/<model>-<n>"""
    resume: Path | None = None
    """folder of a run that was stopped: go on with it, with its own options"""
    checkpoint_minutes: float = 5.0
    """at most one checkpoint in that time, and one when the run is stopped; 0: after every epoch"""
    keep_checkpoint: bool = False
    """keep the checkpoint of a finished run, so that it can go on with more --epochs"""
    keep_epochs: bool = False
    """also write a model folder after each epoch, epochs/<n>/"""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """mirror the run's numbers there too (an extra: requirements-extra.txt)"""
    watch: bool = False
    """after each evaluation, show what the model now replies in the first case, beside the true reply"""

    def problems(self) -> list[str]:
        found = out_of_range(self, *FROM_ZERO, "checkpoint_minutes")
        if self.resume and self.run_dir:
            found.append(f"--run-dir {self.run_dir}: --resume goes on in the folder of its run; leave one out")
        return found


@dataclass(frozen=True)
class FinetuneSettings:
    """Fine-tune GPT-2 on conversations, and write what it says beside what was said."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    run: RunSettings = field(default_factory=RunSettings)
    preview: bool = False
    """show what the model would see and learn, write the dialogues as the model sees them, and stop"""
    output: Path = GENERATED
    """generated beside true conversations"""

    def problems(self) -> list[str]:
        """What is wrong between the groups, a sentence each."""
        output, folder = resolved(self.output), resolved(self.run.run_dir or RUNS)
        numbered = not self.run.run_dir and output.parent == folder and re.fullmatch(r".+-\d+", output.name)
        many = "--folds" * bool(self.data.folds) or "--try" * (self.data.try_ != "nothing")
        found = [f"--preview shows one run: leave out {many}"] * bool(self.preview and many)
        if not output.exists() and (output in (folder, *folder.parents) or numbered):
            found.append(f"--output {self.output}: the run makes a folder of that name; name a file")
        elif self.run.run_dir and folder in output.parents and output != folder / GENERATED:
            found.append(f"--output {self.output}: the run folder keeps a copy of its own; name a file elsewhere")
        return found


@dataclass(frozen=True)
class EvaluateSettings(MachineSettings):
    """Measure a model on conversations that it has not seen, and write a report."""

    model: Annotated[tyro.conf.Positional[str | None], arg(metavar="MODEL")] = None
    """a run folder, a model folder, or a name; default: the newest finished run in runs/"""
    model_path: Path = Path("models")
    """where model folders live and where downloads go"""
    data: ConversationSettings = field(default_factory=ConversationSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    base: str | None = None
    """a model to compare with, or none; default: of a run, the one that it began as"""
    dialogues: int = 1000
    """at most so many conversations are measured, drawn by --seed (of the training part the first 100)"""
    report_dir: Path | None = None
    """folder for evaluation.json and report.html; default: the run's own, or of other conversations the next free
    runs/<model>-evaluation-<n>"""

    def problems(self) -> list[str]:
        return out_of_range(self, *FROM_ONE, "dialogues") + super().problems()


@dataclass(frozen=True)
class AnswerSettings(SamplingSettings):
    """Sampling that suits small models: the likeliest words alone make them repeat themselves, and rare ones ramble."""

    max_new_tokens: int = 200
    """longest answer in tokens"""
    temperature: float = 0.7
    """how freely words are drawn; 1: the model's own distribution; 0: always the likeliest"""
    top_p: float = 0.9
    """draw among the likeliest tokens that together reach this probability; 1: all"""
    repetition_penalty: float = 1.1
    """above 1: what it has just said, in this answer or its last one, becomes less likely"""


@dataclass(frozen=True)
class ChatSettings:
    """Talk to a model: you write as one of the two people, it answers as the other."""

    model: Annotated[tyro.conf.Positional[str | None], arg(metavar="MODEL")] = None
    """a run folder, a model folder, or a name; default: the newest finished run in runs/"""
    model_path: Path = Path("models")
    """where model folders live and where downloads go"""
    me: str | None = None
    """who you are; default: of the two people that the model knows the first, or You"""
    you: str | None = None
    """who the model is; default: the other one, or Bot"""
    answer: AnswerSettings = field(default_factory=AnswerSettings)
    seed: int | None = None
    """fixes what is drawn, so that the same messages get the same answers; default: another talk each time"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to compute; auto: a GPU if there is one"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """number format of the matrix products; the weights stay fp32; auto: bf16 where the hardware has it"""
    web: bool = False
    """talk on a page in the browser rather than in the terminal (an extra: requirements-extra.txt)"""
    host: str = "127.0.0.1"
    """address at which the page is served; 0.0.0.0: to every computer that reaches this one"""
    port: int = 7860
    """port at which the page is served"""
    base: str | None = None
    """model to talk to beside it on the page, or none; default: of a run, the one that it began as"""

    def problems(self) -> list[str]:
        return [
            *out_of_range(self, "from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63, "seed"),
            *out_of_range(self, "1 to 65535", lambda value: 1 <= value <= 65535, "port"),
        ]


def split_pairs(values: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((left.strip(), right.strip()) for left, _, right in (value.partition("=") for value in values))


def out_of_range(settings: object, needed: str, allowed, *names: str) -> list[str]:
    """A sentence for each of the fields `names` whose value `allowed` refuses; None is a value left open."""
    values = {name: getattr(settings, name) for name in names}
    return [
        f"--{name.replace('_', '-')} {value}: {needed} is needed"
        for name, value in values.items()
        if value is not None and not allowed(value)
    ]
