"""The object that all stages of a run share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dialogues.reading import name_sources
from settings import FinetuneSettings

if TYPE_CHECKING:  # `--help` imports none of these
    import numpy as np
    from filelock import FileLock

    from dialogues.batches import DialogueDataset
    from dialogues.conversations import Conversations
    from dialogues.ledger import Ledger
    from dialogues.reading import Source
    from gpt_model import GPTConfig
    from training.device import Machine


class Data(NamedTuple):
    """Conversations, and the numbers of the conversations in each part: train, val and optionally test.

    `notes` are sentences about unread files and the split.
    """

    sources: "Sequence[Source]"
    conversations: "Conversations"
    parts: "dict[str, np.ndarray]"
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The names of the first few files."""
        return name_sources(self.sources)

    @property
    def held_out_part(self) -> str:
        """The part for evaluation: test if there is one, else val, or all data if it is not split."""
        return next(name for name in ("test", "val", "all") if name in self.parts)

    @property
    def held_out(self) -> "np.ndarray":
        """The numbers of the conversations in the held-out part."""
        return self.parts[self.held_out_part]


@dataclass(frozen=True)
class RunFacts:
    """Facts about the start of a run, apart from its options; recorded in `settings.json`."""

    fold: int = 0  # number of the held-out fold in a cross-validation, from 1; 0: none
    processes: int = 1  # number of processes under torchrun; each computes a share of a step's batches


@dataclass(frozen=True)
class Job:
    """Everything that a run needs, from its options to its folder."""

    settings: FinetuneSettings
    facts: RunFacts
    machine: "Machine"
    data: Data
    datasets: "dict[str, DialogueDataset]"
    ledger: "Ledger"  # counts of the data used and left out
    config: "GPTConfig"  # configuration of the trained model, new tokens included
    source: Path  # the model folder that training starts from
    lock: "FileLock | None" = None  # lock of the run folder
    run_folder: Path | None = None  # None until a new run creates it

    @property
    def folder(self) -> Path:
        """The run folder."""
        assert self.run_folder, "open_run creates it"
        return self.run_folder

    @property
    def seed(self) -> int:
        return self.settings.training.seed

    @property
    def total_steps(self) -> int:
        """The number of optimizer steps in the whole run."""
        return self.settings.training.steps(len(self.datasets["train"]), self.facts.processes)[1]
