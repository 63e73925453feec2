"""Turn the options into training data: read and split the conversations, and make and count examples."""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dialogues.conversations import Changes
from dialogues.dialogue import Dialogue
from dialogues.encoding import account_of, encode_source
from dialogues.inputs import is_pipe
from dialogues.layouts.account import judge_turns
from dialogues.opening import open_paths
from dialogues.reading import Source, choose_template, name_sources
from dialogues.split import split_conversations
from dialogues.template import Renderer
from dialogues.tokenizer import END_OF_TEXT
from hub.find import find_model_folder
from pipeline.job import Data, Job, RunFacts
from pipeline.run_folder import lock_run_folder
from settings import ConversationSettings, DataSettings, FinetuneSettings
from support.errors import UserError, amount, display
from support.files import atomic_path, check_output_path, write_text, writing
from training.mirror import check_tracker

if TYPE_CHECKING:
    from dialogues.batches import DialogueDataset
    from training.memory import Size


LEARNED_EXAMPLES = 100  # maximum number of examples in learned.txt
MOST_READ_BACK = 10_000  # maximum number of held-out dialogues to read back from a run folder


def prepare_job(settings: FinetuneSettings, facts: RunFacts) -> Job:
    """Read and split the conversations, find the model and choose the machine; print a summary of the data.

    All errors in files and folders are found here, before training. `--preview` also shows and writes some
    examples.

    Raises:
        UserError: a problem that the user can fix.
    """
    lock = lock_run_folder(settings.run.resume) if settings.run.resume else None
    check_tracker(settings.run.track)
    opened = open_data(settings.data)
    check_output_path(settings.output, [source.input.path for source in opened.sources])
    folder = find_model_folder(settings.model.name, settings.model.model_path, weights=False)
    data = read_data(opened, folder, settings.data, settings.training.seed, facts.fold)

    # Importing PyTorch takes a second; `--help` and errors in options or files should not wait for it.
    from dialogues.ledger import make_ledger
    from gpt_model import count_parameters
    from load_gpt2_weights import read_config
    from training.defaults import complete, explain
    from training.device import choose_machine, keep_freed_memory

    keep_freed_memory()
    machine = choose_machine(settings.training.device, settings.training.precision)
    if not settings.run.resume:
        facts = replace(facts, processes=machine.processes)
    config = replace(read_config(folder / "config.json"), vocab_size=data.conversations.renderer.tokenizer.n_vocab)
    datasets = make_datasets(data, settings.data.max_length, config.n_positions)
    size = count_parameters(config), datasets["train"].count_learned()
    chosen = explain(settings.training, *size)
    settings = replace(settings, training=complete(settings.training, *size))
    ledger = make_ledger(data.sources, datasets, settings.training, facts.processes)
    ledger = replace(ledger, notes=list(data.notes))
    job = Job(settings, facts, machine, data, datasets, ledger, config, folder, lock, settings.run.resume)
    if settings.preview:
        preview(job)
    show_data(job)
    if settings.preview:
        return job
    source = find_model_folder(settings.model.name, settings.model.model_path)
    check_output_path(settings.output, list(source.iterdir()))
    job = replace(job, source=source)
    check_machine(job, f"options: as in {settings.run.resume}" if settings.run.resume else chosen)
    return job


def check_machine(job: Job, chosen: str) -> None:
    """Check that this machine can train the model; print the model, the `chosen` options, and the required memory.

    Raises:
        UserError: not enough memory, or PyTorch can't compile.
    """
    from training.device import check_compiler, return_freed_memory
    from training.memory import check_memory

    size, training, machine = model_size(job), job.settings.training, job.machine
    display(f"model: {job.source}, {size.parameters:,} parameters", machine.explanation, chosen)
    if training.compile:
        check_compiler(machine)
        display("--compile: the first steps take longer, since they compile the model")
    return_freed_memory()  # memory that the previous fold has freed would count as used
    display(check_memory(size, training, machine))


class OpenedData(NamedTuple):
    """Recognised conversation files, their template, and notes about files that were not read."""

    sources: list[Source]
    template: str
    notes: tuple[str, ...] = ()


def open_data(settings: ConversationSettings) -> OpenedData:
    """Recognise the files of `--data`, and choose their template.

    Raises:
        UserError: a file can't be read with these options.
    """
    sources, notes = open_paths(settings.locate(), settings)
    template = choose_template(sources, settings.template)
    notes += [f"{source.input}: {line}" for source in sources for line in source.account[1:]]
    if any(map(is_pipe, settings.paths)):
        notes.append("read from a pipe: to resume or evaluate this run, give the conversations again with --data")
    return OpenedData([source.for_template(template) for source in sources], template, tuple(notes))


def read_data(opened: OpenedData, vocabulary: Path, settings: DataSettings, seed: int, fold: int = 0) -> Data:
    """Read all files with the vocabulary of a model folder, and split them, or hold out one `fold`.

    Raises:
        UserError: there are too few dialogues; see also `read_conversations`.
    """
    data = read_conversations(opened, vocabulary, settings)
    order = data.parts["all"]
    if settings.shuffle:
        order = np.random.default_rng(seed).permutation(order)
    shares, option = settings.percents, f"--split {settings.split}"
    if fold:
        shares, option = [1] * settings.folds, f"--folds {settings.folds}"
    try:
        split = split_conversations(data.conversations, order, shares, option, by_file=not settings.shuffle)
    except UserError as error:
        exported = any(source.cut for source in data.sources)
        cut = ", or cut the chat at shorter pauses with --pause-hours" if exported else ""
        raise UserError(f"{data.name}: {error}{cut}", account_of(data.sources, data.conversations)) from None
    parts = split.parts
    if fold:
        others = np.concatenate([*parts[: fold - 1], *parts[fold:]])
        parts = [others, parts[fold - 1]]
    return Data(
        data.sources,
        split.conversations,
        dict(zip(["train", "val", "test"], parts, strict=False)),
        (*data.notes, *split.notes),
    )


def read_conversations(opened: OpenedData, vocabulary: Path, settings: ConversationSettings) -> Data:
    """Read all files with the vocabulary of a model folder, as one part.

    Raises:
        UserError: a malformed record, or a dialogue with nothing to learn. (In exported chats, which the program
            cuts into dialogues itself, such dialogues are left out.)
    """
    sources, template, notes = opened
    if template == "alpaca" and settings.rename:
        raise UserError("--rename: the alpaca template has fixed speakers; leave out --rename")
    changes = Changes(settings.new_names, settings.mask)
    conversations = encode_source(sources, vocabulary, template, settings.learn, changes)
    skipped = {why: count for why, (count, _) in conversations.skipped.items()}
    if not settings.allow_loss and (problem := judge_turns(len(conversations.texts), skipped)):
        raise UserError(f"{name_sources(sources)}: {problem}", account_of(sources, conversations))
    numbers = conversations.with_something_learned()
    left_out = np.setdiff1d(np.arange(len(conversations)), numbers)
    written = [place for place, source in enumerate(sources) if not source.cut]
    left_out = left_out[np.isin(conversations.files[left_out], written)]
    if len(left_out):
        source = sources[conversations.files[left_out[0]]]
        others = f" (nor in {amount(len(left_out) - 1, 'other dialogue')})" if len(left_out) > 1 else ""
        raise UserError(
            f"{source.input}: {source.unit} {conversations.numbers[left_out[0]]}: nothing to learn with"
            f" --learn {settings.learn}{others}; remove it or choose another --learn"
        )
    return Data(sources, conversations, {"all": numbers}, notes)


def fingerprint(data: Data) -> str:
    """Return a 64-bit hash of the tokens, the learned mask and the split."""
    conversations = data.conversations
    digest = hashlib.blake2b(digest_size=8)
    for values in (conversations.tokens, conversations.learned, conversations.starts, *data.parts.values()):
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def make_datasets(data: Data, max_length: int, n_positions: int) -> "dict[str, DialogueDataset]":
    """Make the examples of each part, of at most `max_length` tokens (0: the model's context).

    Raises:
        UserError: `max_length` exceeds the model's positions, or a part has nothing to learn.
    """
    from dialogues.batches import DialogueDataset

    length = choose_length(max_length, n_positions)
    datasets = {name: DialogueDataset(data.conversations, numbers, length) for name, numbers in data.parts.items()}
    for name, dataset in datasets.items():
        if not len(dataset):
            raise UserError(f"{name} has nothing to learn in examples of {length} tokens; raise --max-length")
    return datasets


def choose_length(max_length: int, n_positions: int) -> int:
    """Return the maximum length of an example: `--max-length`, or for 0 the number of the model's positions.

    Raises:
        UserError: `max_length` exceeds the model's positions.
    """
    if max_length > n_positions:
        raise UserError(f"--max-length {max_length}: must be at most {n_positions}, the model's context")
    return max_length or n_positions


def show_data(job: Job) -> None:
    """Print a summary of the data."""
    from dialogues.ledger import ledger_lines

    data, training = job.settings.data, job.settings.training
    display(*ledger_lines(job.ledger))
    default = " (the default)" if data.template == "auto" else ""
    order = f"shuffled by seed {training.seed}" if data.shuffle else "in file order"
    split = f"held out: fold {job.facts.fold} of {data.folds}" if job.facts.fold else f"split {data.split}"
    template = job.data.conversations.renderer.name
    display(f"template: {template}{default}; learned: {data.learn}; {split}, {order}")


def preview(job: Job) -> None:
    """Show two examples and a batch as the model sees them, print the memory estimate, and write all dialogues.

    Raises:
        UserError: a file can't be written, or would overwrite the data.
    """
    from dialogues.preview import EXAMPLES, show_batch, show_examples
    from training.memory import expected_memory

    training, train_set = job.settings.training, job.datasets["train"]
    # Don't use `display`: the texts are already printable, and it would escape the colours.
    print(*show_examples(train_set, EXAMPLES, colour=sys.stdout.isatty()), sep="\n")
    batch = show_batch(train_set, training.batch_size, training.gradient_accumulation, training.seed)
    display(*batch, "")
    display(f"memory: {expected_memory(model_size(job), training, job.machine.precision)}")

    folder = job.settings.run.run_dir or Path()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for path in rendered_paths(folder, job.data):
        inputs = [source.input.path for source in job.data.sources]
        check_output_path(path, inputs, "--preview:", "choose another folder with --run-dir")
    write_rendered(folder, job.data)
    display(f"written: {', '.join(map(str, rendered_paths(folder, job.data)))}")


def model_size(job: Job) -> "Size":
    """Return the sizes that determine the memory for training, without creating the model."""
    from gpt_model import count_parameters
    from training.memory import Size

    config, dataset = job.config, job.datasets["train"]
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


def write_learned(job: Job) -> None:
    """Write the first training examples of a run, with the learned spans marked as in `--preview`."""
    from dialogues.preview import show_examples

    examples = show_examples(job.datasets["train"], LEARNED_EXAMPLES)
    write_text(job.folder / "learned.txt", "\n".join(examples).lstrip("\n") + "\n")


def read_rendered(path: Path) -> Iterator[str]:
    """Yield the dialogues in a file written by `write_rendered`, as the model saw them."""
    lines: list[str] = []
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            lines.append(line)
            if line.endswith(END_OF_TEXT + "\n"):
                yield "".join(lines).removesuffix("\n")
                lines = []


def read_turns(path: Path, renderer: Renderer, speakers: Sequence[str]) -> Iterator[list[str]]:
    """Yield the turns of each dialogue in a file written by `write_rendered`; the first includes the instruction."""
    for text in read_rendered(path):
        yield [turn.text for turn in renderer.parse_turns(text.removesuffix(END_OF_TEXT), "", speakers)]


def read_held_out(run: Path, renderer: Renderer, speakers: Sequence[str]) -> tuple[str, list[Dialogue]]:
    """Return the held-out part of a run (test if there is one, else val), and its dialogues.

    Only files in the run folder are read, so the original conversations may be gone.

    Raises:
        UserError: the run folder has no held-out dialogues.
    """
    part = "test" if rendered_path(run, "test").exists() else "val"
    path = rendered_path(run, part)
    texts = islice(read_rendered(path), MOST_READ_BACK) if path.is_file() else ()
    dialogues = [renderer.parse(text, speakers) for text in texts]
    if not dialogues:
        raise UserError(f"{path} is missing or empty, so {run} has no held-out conversations; restore it")
    return part, dialogues
