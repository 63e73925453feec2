"""From the options to what a model is trained on: conversations, split, examples, and an account of them."""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dialogues.conversations import Conversations
from dialogues.dialogue import hold_out_fold, split_dialogues
from dialogues.encoding import encode_source
from dialogues.reading import Source, open_source
from dialogues.template import Renderer
from dialogues.tokenizer import END_OF_TEXT
from settings import ConversationSettings, DataSettings, FinetuneSettings, TrainingSettings
from support.errors import UserError
from support.files import atomic_path, check_output_path, writing

if TYPE_CHECKING:
    from dialogues.batches import DialogueDataset
    from dialogues.ledger import Ledger
    from gpt_model import GPTConfig
    from training.device import Machine
    from training.memory import Size


class Data(NamedTuple):
    """The conversations of a file, and the numbers of those in each part: train, val and perhaps test."""

    source: Source
    conversations: Conversations
    parts: dict[str, np.ndarray]

    @property
    def held_out_part(self) -> str:
        """The part that the model is asked to complete: test, or where there is none, validation; of others all."""
        return next(name for name in ("test", "val", "all") if name in self.parts)

    @property
    def held_out(self) -> np.ndarray:
        """The numbers of the conversations in that part."""
        return self.parts[self.held_out_part]


def open_data(settings: ConversationSettings) -> tuple[Source, str]:
    """The file of `--data`, recognised, and the template for it.

    Raises:
        UserError: it can't be read as asked.
    """
    source = open_source(settings.locate(), settings.format, settings.pause_hours)
    return source.for_template(settings.template)


def read_data(source: Source, template: str, vocabulary: Path, settings: DataSettings, seed: int) -> Data:
    """Read the whole file, with the vocabulary of a model folder, and split it, or hold out one fold of it.

    Raises:
        UserError: as `read_conversations`, or too few dialogues.
    """
    data = read_conversations(source, template, vocabulary, settings)
    numbers = data.parts["all"]
    if settings.shuffle:
        numbers = np.random.default_rng(seed).permutation(numbers)
    try:
        if settings.fold:
            parts = hold_out_fold(numbers, settings.folds, settings.fold)
        else:
            parts = split_dialogues(numbers, settings.percents)
    except UserError as error:
        cut = ", or cut the chat at shorter pauses with --pause-hours" if source.format == "chat-export" else ""
        raise UserError(f"{source.path}: {error}{cut}") from None
    return data._replace(parts=dict(zip(["train", "val", "test"], parts, strict=False)))


def read_conversations(source: Source, template: str, vocabulary: Path, settings: ConversationSettings) -> Data:
    """Read the whole file, with the vocabulary of a model folder, as one part.

    Raises:
        UserError: a broken record, or one in which nothing is to be learned. (Of an exported chat, which the program
            has cut and not its user, such dialogues are left out.)
    """
    if template == "alpaca" and settings.rename:
        raise UserError("--rename: the speakers of the alpaca template are the published ones; leave it out")
    conversations = encode_source(source, vocabulary, template, settings.learn, settings.new_names)
    numbers = conversations.with_something_learned()
    left_out = len(conversations) - len(numbers)
    if left_out and source.format != "chat-export":
        first = conversations.numbers[np.setdiff1d(np.arange(len(conversations)), numbers)[0]]
        others = f" (nor in {left_out - 1:,} others)" if left_out > 1 else ""
        raise UserError(
            f"{source.path}: {source.unit} {first}: with --learn {settings.learn} there is nothing to learn in it"
            f"{others}; remove it or choose another --learn"
        )
    return Data(source, conversations, {"all": numbers})


def fingerprint(data: Data) -> str:
    """64 bits that are the same for the same tokens, learned and divided in the same way."""
    conversations = data.conversations
    digest = hashlib.blake2b(digest_size=8)
    for values in (conversations.tokens, conversations.learned, conversations.starts, *data.parts.values()):
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def make_datasets(data: Data, max_length: int, n_positions: int) -> "dict[str, DialogueDataset]":
    """Each part as examples of at most `max_length` tokens (0: as many as the model has positions).

    Raises:
        UserError: more than the model has positions.
    """
    from dialogues.batches import DialogueDataset

    length = choose_length(max_length, n_positions)
    datasets = {name: DialogueDataset(data.conversations, numbers, length) for name, numbers in data.parts.items()}
    for name, dataset in datasets.items():
        if not len(dataset):
            raise UserError(f"nothing to learn is left of {name} in examples of {length} tokens; raise --max-length")
    return datasets


def choose_length(max_length: int, n_positions: int) -> int:
    """The longest example: `--max-length`, or for 0 as many tokens as the model has positions.

    Raises:
        UserError: more than the model has positions.
    """
    if max_length > n_positions:
        raise UserError(f"--max-length {max_length}: the model has {n_positions} positions")
    return max_length or n_positions


def show_data(
    data: Data,
    datasets: "dict[str, DialogueDataset]",
    settings: FinetuneSettings,
    config: "GPTConfig",
    machine: "Machine",
) -> "Ledger":
    """Print what the model will see, and with `--preview` some of it; return the account of it for the run folder.

    Raises:
        UserError: the preview can't be written.
    """
    from dialogues.ledger import ledger_lines, make_ledger

    training = settings.training
    ledger = make_ledger(data.source, datasets, training)
    if settings.preview:
        preview(data, datasets, settings, config, machine)
    print(*ledger_lines(ledger), sep="\n")
    default = " (the default)" if settings.data.template == "auto" else ""
    order = f"shuffled by seed {training.seed}" if settings.data.shuffle else "in file order"
    fold, folds = settings.data.fold, settings.data.folds
    split = f"held out: fold {fold} of {folds}" if fold else f"split {settings.data.split}"
    template = data.conversations.renderer.name
    print(f"template: {template}{default}; learned: {settings.data.learn}; {split}, {order}")
    return ledger


def preview(
    data: Data,
    datasets: "dict[str, DialogueDataset]",
    settings: FinetuneSettings,
    config: "GPTConfig",
    machine: "Machine",
) -> None:
    """Show two examples and a batch as the model sees them, say what memory it takes, and write all of them as text.

    Raises:
        UserError: a file that can't be written, or would overwrite the data.
    """
    from dialogues.preview import show_batch, show_examples

    training, train_set = settings.training, datasets["train"]
    print(*show_examples(train_set, colour=sys.stdout.isatty()), sep="\n")
    batch = show_batch(train_set, training.batch_size, training.gradient_accumulation, training.seed)
    print(*batch, sep="\n", end="\n\n")
    print(explain_memory(config, train_set, training, machine))

    folder = settings.run.run_dir or Path()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for path in rendered_paths(folder, data):
        check_output_path(path, [data.source.path])
    write_rendered(folder, data)
    print(f"written: {', '.join(map(str, rendered_paths(folder, data)))}")


def explain_memory(
    config: "GPTConfig", dataset: "DialogueDataset", training: TrainingSettings, machine: "Machine"
) -> str:
    """What the longest batch of `dataset` would take, in one line; the model is never made."""
    from training.memory import expected_memory

    return f"memory: {expected_memory(model_size(config, dataset), training, machine.precision)}"


def model_size(config: "GPTConfig", dataset: "DialogueDataset") -> "Size":
    """What decides on the memory that it takes to train such a model on `dataset`."""
    from gpt_model import count_parameters
    from training.memory import Size

    longest = dataset.padded(max(dataset.lengths()) - 1)
    return Size(count_parameters(config), config.n_layer, config.n_embd, config.vocab_size, longest, len(dataset))


def rendered_path(folder: Path, part: str) -> Path:
    return folder / f"{part}_data.txt"


def rendered_paths(folder: Path, data: Data) -> list[Path]:
    return [rendered_path(folder, part) for part in data.parts]


def write_rendered(folder: Path, data: Data) -> None:
    """Write the dialogues of each part exactly as the model sees them."""
    for path, numbers in zip(rendered_paths(folder, data), data.parts.values(), strict=True):
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for number in numbers:
                file.write(data.conversations.render(number) + "\n")


def read_rendered(path: Path) -> Iterator[str]:
    """Each dialogue of a file that `write_rendered` has written, as the model saw it."""
    lines: list[str] = []
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            lines.append(line)
            if line.endswith(END_OF_TEXT + "\n"):
                yield "".join(lines).removesuffix("\n")
                lines = []


def read_turns(path: Path, renderer: Renderer, speakers: Sequence[str]) -> Iterator[list[str]]:
    """The texts of each dialogue of such a file; the first has the instruction with it."""
    for text in read_rendered(path):
        yield [turn.text for turn in renderer.parse_turns(text.removesuffix(END_OF_TEXT), "", speakers)]
