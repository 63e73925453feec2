"""Checkpoints: written atomically, verified when read, and enough to resume as if the run had never been stopped.

Batches and dropout depend only on the seed and the step, and the learning rate only on the step. So no random generator
state is saved: the weights, the optimizer's moments and a few numbers are enough.

A run that is stopped by Ctrl-C, SIGTERM or (not on Windows) a closed terminal writes a checkpoint and loses nothing. A
killed run repeats the work since its last checkpoint (at most `--checkpoint-minutes`, 5 by default), with the same
result to the last bit.
"""

import json
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from support.errors import UserError, display
from support.files import atomic_path, crc_of, flush, read_json_object, write_json, writing
from training.best_weights import load_best, save_best

VERSION = 2
TRAINED = "trained.json"
KEPT = 2  # number of checkpoints to keep: the newest, and its predecessor in case the newest is damaged


class Losses(NamedTuple):
    """Mean negative log-likelihood of a token, in nats; perplexity is its exponential."""

    train: float
    val: float


@dataclass
class TrainingState:
    """The progress of a run, without weights and moments."""

    step: int = 0  # finished optimizer steps
    steps: int = 0  # total optimizer steps of the run
    measured: int = 0  # step at which `steps` was set for --max-minutes; 0: not set
    loss_sum: float = 0.0  # summed loss of the tokens learned since the last evaluation
    tokens: int = 0  # number of these tokens
    evaluations: list[tuple[int, float]] = field(default_factory=list)  # (step, validation loss)
    before: Losses | None = None  # losses at the first evaluation
    after: Losses | None = None  # losses of the kept weights, at the last evaluation
    kept: int = -1  # step of the best weights so far, which have a separate file; -1: none
    kept_crc: int = 0  # CRC-32 of that file
    scaler: dict[str, float] = field(default_factory=dict)  # state of the fp16 gradient scaler
    sizes: dict[str, int] = field(default_factory=dict)  # sizes of the logs in bytes

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainingState":
        """Rebuild a state from the output of `asdict` in JSON, which has lists instead of tuples."""
        losses = {name: Losses(*values[name]) if values[name] else None for name in ("before", "after")}
        evaluations = [(step, loss) for step, loss in values["evaluations"]]
        return cls(**{**values, **losses, "evaluations": evaluations})

    @property
    def best_place(self) -> int:
        """The index in `evaluations` of the lowest validation loss; of equal losses, the first."""
        return min(range(len(self.evaluations)), key=lambda place: self.evaluations[place][1])

    @property
    def best(self) -> int:
        """The step with the lowest validation loss."""
        return self.evaluations[self.best_place][0]


class Damaged(Exception):  # noqa: N818
    """The content of a file is not the content that was written to it."""


class Checkpoints:
    """The `checkpoint/` folder of a run.

    Args:
        folder: its path; created when first needed.
        fingerprints: hashes of the data and the model, which identify the run.
        primary: whether this process writes checkpoints.
        copies_best: whether to keep the best weights in main memory and write them only with a checkpoint. If training
            itself runs in main memory, they are written at once instead, because a copy may not fit.
    """

    def __init__(
        self, folder: Path, fingerprints: Mapping[str, str], primary: bool = True, copies_best: bool = False
    ) -> None:
        self.folder, self.primary, self.copies_best = folder, primary, copies_best
        self.fingerprints = dict(fingerprints)
        self.copy: list[Tensor] = []  # the best weights, with `copies_best`
        self.copy_is_new = False  # whether `copy` is not yet in a file

    def save(self, model: nn.Module, optimizer: Optimizer, state: TrainingState) -> str:
        """Write a checkpoint, delete all but the newest two, and return a line with its size and time.

        Raises:
            UserError: the checkpoint can't be written (a full disk); the previous one still exists.
        """
        if not self.primary:
            return ""
        started = time.perf_counter()
        tensors = {f"model.{name}": value for name, value in trainable(model).items()}
        for name, values in optimizer_state(model, optimizer).items():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in values.items()}
        for old in self.paths()[KEPT - 1 :]:
            old.unlink()  # delete first, to make room for the new one
        if state.kept >= 0:
            if self.copy_is_new:
                self.write_best(self.copy, state.kept, state)
                self.copy_is_new = False
            with writing(self.folder):
                flush(self.best_path(state.kept))
        size = self.write(self.folder / f"step-{state.step}.safetensors", tensors, asdict(state))
        return f"checkpoint: step {state.step}, {size / 1e6:,.0f} MB in {time.perf_counter() - started:.1f} s"

    def save_best(self, model: nn.Module, state: TrainingState) -> None:
        """Keep the weights of this step, the best so far.

        Raises:
            UserError: the weights can't be written.
        """
        tensors = [tensor.detach() for tensor in trainable(model).values()]
        if self.copies_best:
            self.copy = self.copy or [torch.empty_like(tensor, device="cpu") for tensor in tensors]
            for copied, tensor in zip(self.copy, tensors, strict=True):
                copied.copy_(tensor)
            self.copy_is_new = True
        else:
            state.kept = -1  # until the new file is complete, because the previous one may be overwritten
            self.write_best(tensors, state.step, state)
        state.kept = state.step

    def write_best(self, tensors: Iterable[Tensor], step: int, state: TrainingState) -> None:
        """Write the best weights, those of `step`, over a file that no checkpoint refers to."""
        needed = set(map(kept_by, self.paths()))
        spares = [path for path in self.folder.glob("best-*") if path.suffix == ".tmp" or step_of(path) not in needed]
        state.kept_crc = save_best(self.best_path(step), tensors, spares)

    def check_best(self, state: TrainingState) -> None:
        """Raise `Damaged` if the file of the best weights was changed after `save_best` wrote it."""
        path = self.best_path(state.kept)
        try:
            whole = crc_of(path) == state.kept_crc
        except OSError as error:
            raise Damaged(error) from None
        if not whole:
            raise Damaged(f"{path.name} has changed")

    def load_best(self, model: nn.Module, state: TrainingState) -> None:
        """Copy the weights of `save_best` back into the model.

        Raises:
            Damaged: the file was changed after it was written.
        """
        tensors = trainable(model).values()
        if self.copy:
            for tensor, copied in zip(tensors, self.copy, strict=True):
                tensor.detach().copy_(copied)
        else:
            self.check_best(state)
            load_best(self.best_path(state.kept), tensors)

    def spare(self, state: TrainingState) -> Path | None:
        """Return the file of the best weights if no checkpoint needs it; once loaded, it may be overwritten."""
        path = self.best_path(state.kept)
        return path if path.exists() and state.kept not in map(kept_by, self.paths()) else None

    def load(self, model: nn.Module, optimizer: Optimizer) -> TrainingState | None:
        """Load the newest intact checkpoint and return its state, or None. Damaged ones are reported and removed.

        Raises:
            UserError: a checkpoint belongs to a different run, model or version of the program.
        """
        for path in self.paths():
            try:
                state = TrainingState.from_json(self.read(path))
                if state.kept >= 0:
                    self.check_best(state)
            except Damaged as error:
                display(f"removed a damaged checkpoint: {path} ({error})")
                # Otherwise the next save would keep it as the fallback. All processes reach this line.
                path.unlink(missing_ok=True)
                continue
            restore(model, optimizer, path)
            display(f"resuming after step {state.step}: {path}")
            return state
        return None

    def mark_trained(self, state: TrainingState) -> None:
        """Record that training is over and the model is saved, so that a resumed run repeats only the later stages."""
        self.folder.mkdir(exist_ok=True)
        write_json(self.folder / TRAINED, asdict(state))

    def trained(self, steps: int) -> TrainingState | None:
        """Return the state that `mark_trained` recorded; None if training is not over or now has additional steps.

        Raises:
            UserError: the record is damaged.
        """
        path, advice = self.folder / TRAINED, "delete it to resume the run from its checkpoint"
        try:
            state = TrainingState.from_json(read_json_object(path, advice)) if path.exists() else TrainingState()
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); {advice}") from None
        return state if state.measured or state.steps >= steps else None

    def remove(self) -> None:
        """Delete the folder, which a finished run no longer needs."""
        with writing(self.folder):
            shutil.rmtree(self.folder, ignore_errors=not self.folder.exists())

    def paths(self) -> list[Path]:
        """The checkpoints, newest first."""
        return sorted(self.folder.glob("step-*.safetensors"), key=step_of, reverse=True)

    def best_path(self, step: int) -> Path:
        return self.folder / f"best-{step}.bin"

    def write(self, path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> int:
        """Write tensors and a state, with a checksum over both; return the size in bytes."""
        tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        header = json.dumps({"version": VERSION, "fingerprints": self.fingerprints, "state": state})
        metadata = {"header": header, "crc32": checksum(header, sorted(tensors.items()))}
        with writing(path):
            self.folder.mkdir(exist_ok=True)
        with atomic_path(path) as temporary:
            try:
                save_file(tensors, temporary, metadata)
            except SafetensorError as error:
                raise UserError(f"cannot write {path}: {error}") from error
        return path.stat().st_size

    def read(self, path: Path) -> dict[str, Any]:
        """Return the state from a file written by `write`, after verifying the checksum of the whole file.

        Raises:
            Damaged: the file was changed after it was written.
            UserError: the file belongs to a different run or version of the program.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata, names = file.metadata(), sorted(file.keys())
            header = json.loads(metadata["header"])
            whole = metadata["crc32"] == checksum(metadata["header"], tensors_of(path, names))
        except (SafetensorError, OSError, LookupError, ValueError, TypeError) as error:
            raise Damaged(error) from None
        if not whole:
            raise Damaged("its checksum is wrong")
        if header["version"] != VERSION:
            raise UserError(f"{path} was written by another version of the program; resume with that version")
        if header["fingerprints"] != self.fingerprints:
            raise UserError(f"{path} belongs to another run; restore this run's checkpoint, or start a new run")
        return header["state"]


def kept_by(path: Path) -> int:
    """Return the step of the best weights that a checkpoint refers to; -1 if it can't be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["header"])["state"]["kept"]
    except (SafetensorError, OSError, LookupError, ValueError, TypeError):
        return -1


def tensors_of(path: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file, not memory-mapped: mapped pages count as used memory, and are slower to read."""
    with safe_open(path, framework="pt", backend="pread") as file:
        for name in names:
            yield name, file.get_tensor(name)


def checksum(header: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the CRC-32 (hex) of the header and the named tensors."""
    value = zlib.crc32(header.encode())
    for name, tensor in tensors:
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """Return the optimizer's state of each parameter, by the parameter's name; empty before the first step."""
    return {name: optimizer.state[value] for name, value in trainable(model).items() if value in optimizer.state}


def restore(model: nn.Module, optimizer: Optimizer, path: Path) -> None:
    """Load the tensors of a checkpoint into the model and the optimizer.

    Raises:
        UserError: the tensors belong to a different model.
    """
    parameters = {f"model.{name}": parameter for name, parameter in trainable(model).items()}
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names if name.startswith("model.")}
    if shapes != {name: tuple(parameter.shape) for name, parameter in parameters.items()}:
        raise UserError(f"{path} belongs to another model; restore this run's checkpoint, or start a new run")
    put(parameters, path)
    for name, value in tensors_of(path, (name for name in names if name.startswith("optimizer."))):
        parameter_name, _, key = name.removeprefix("optimizer.").rpartition(".")
        parameter = parameters[f"model.{parameter_name}"]
        # Clone into memory allocated by PyTorch: aligned, and in huge pages if available.
        optimizer.state[parameter][key] = value.clone().to(parameter.device)


@torch.no_grad()
def put(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy the tensors of a file into tensors with the same names."""
    for name, value in tensors_of(path, tensors):
        tensors[name].copy_(value)


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint: step-12.safetensors → 12."""
    return int(path.stem.rpartition("-")[2])
