"""The one object that the stages of a run share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dialogues.reading import name_sources
from settings import FinetuneSettings

if TYPE_CHECKING:  # `--help` waits for none of these
    import numpy as np
    from filelock import FileLock

    from dialogues.batches import DialogueDataset
    from dialogues.conversations import Conversations
    from dialogues.ledger import Ledger
    from dialogues.reading import Source
    from gpt_model import GPTConfig
    from training.device import Machine


class Data(NamedTuple):
    """Conversations, and the numbers of those in each part: train, val and perhaps test.

    `notes` are sentences on what was not read and how the conversations were divided.
    """

    sources: "Sequence[Source]"
    conversations: "Conversations"
    parts: "dict[str, np.ndarray]"
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The names of the files, the first few."""
        return name_sources(self.sources)

    @property
    def held_out_part(self) -> str:
        """The part that the model completes: test, or else validation; all of a file that is not split."""
        return next(name for name in ("test", "val", "all") if name in self.parts)

    @property
    def held_out(self) -> "np.ndarray":
        """The numbers of the conversations in that part."""
        return self.parts[self.held_out_part]


@dataclass(frozen=True)
class RunFacts:
    """What a run was started with besides its options; `settings.json` records it."""

    fold: int = 0  # the held-out part of a cross-validation, from 1; 0: no fold
    processes: int = 1  # under torchrun; each computes a share of the batches of a step


@dataclass(frozen=True)
class Job:
    """A training, from its options to the folder it writes."""

    settings: FinetuneSettings
    facts: RunFacts
    machine: "Machine"
    data: Data
    datasets: "dict[str, DialogueDataset]"
    ledger: "Ledger"  # the account of the data
    config: "GPTConfig"  # of the model that is trained, new tokens included
    source: Path  # the model folder that the training starts from
    lock: "FileLock | None" = None  # on the run folder
    run_folder: Path | None = None  # none until a new run makes it

    @property
    def folder(self) -> Path:
        """The run folder."""
        assert self.run_folder, "open_run makes it"
        return self.run_folder

    @property
    def seed(self) -> int:
        return self.settings.training.seed

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.settings.training.steps(len(self.datasets["train"]), self.facts.processes)[1]
