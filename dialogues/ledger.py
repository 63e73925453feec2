"""The account of the data: what was skipped, cut or left out, and why."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from dialogues.batches import DialogueDataset, epoch_steps, padding_share
from dialogues.conversations import FIRST, SAMPLE, Conversations
from dialogues.private import KINDS, PrivateCounts, find_private
from dialogues.reading import Source, name_formats, name_sources
from settings import TrainingSettings
from support.errors import amount
from support.files import Json, without_none

FILES = 10  # maximum number of files to print
# Minimum vocabulary size → tokens per word above which to warn; GPT-2's is 1.3 for English and 2.6 for German.
MANY_TOKENS = {40_000: 1.8, 0: 2.4}
SPOKEN_BY = 3  # maximum number of speakers to print per kind of private data


@dataclass(frozen=True)
class Counted:
    """A count, and the first few locations: numbers, or file names with numbers if there are several files."""

    count: int
    first: list[int | str]


@dataclass(frozen=True)
class PartLedger:
    """The ledger of one part of the split."""

    dialogues: int
    turns: int
    tokens: int
    learned_share: float
    examples: int
    longest: int
    padding_share: float
    shortened_turns: int
    cut_off_tokens: int
    unlearned_examples: int
    steps_per_epoch: int


@dataclass(frozen=True)
class FileLedger:
    """The ledger of one of several files; a dialogue that the split cuts counts as several."""

    file: str
    format: str
    unit: str
    dialogues: int
    turns: int
    not_used: list[str]


@dataclass(frozen=True)
class PrivateLedger:
    """The number of occurrences of one kind of private data.

    Attributes:
        speakers: name → number of occurrences, highest first.
    """

    count: int
    dialogues: int
    speakers: dict[str, int]


@dataclass(frozen=True)
class Ledger:
    """The ledger of a run.

    Attributes:
        unit: the unit of a location, such as "line"; empty for several files, whose locations include it.
        duplicates: number of dialogues that equal an earlier one.
        skipped: reason → skipped turns.
        nothing_to_learn: number of dialogues left out because they have no learned tokens.
        private: kind of private data → its ledger, over all files.
        masked: whether all private data is replaced by placeholders.
        private_names: number of speakers whose name is private data, such as a phone number.
        files: one ledger for each file, if there are several.
        notes: sentences on unread files and on how the dialogues were divided.
    """

    file: str
    format: str
    not_used: list[str]
    unit: str
    dialogues: int
    turns: int
    tokens: int
    speakers: int
    named_speakers: str
    tokens_per_word: float
    many_tokens_per_word: bool
    duplicates: int
    skipped: dict[str, Counted]
    nothing_to_learn: int
    private: dict[str, PrivateLedger]
    masked: bool
    private_names: int
    parts: dict[str, PartLedger]
    files: list[FileLedger] | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> Json:
        """Return the content of ledger.json."""
        return asdict(self, dict_factory=without_none)


def make_ledger(
    sources: Sequence[Source], datasets: dict[str, DialogueDataset], training: TrainingSettings, processes: int = 1
) -> Ledger:
    """Count the conversations of `sources` and the examples in the datasets of their parts."""
    conversations, several = datasets["train"].conversations, len(sources) > 1
    parts = {name: count_part(dataset, training, processes) for name, dataset in datasets.items()}
    per_word, n_vocab = tokens_per_word(conversations), conversations.renderer.tokenizer.n_vocab
    return Ledger(
        file=name_sources(sources),
        format=name_formats(sources),
        not_used=list(dict.fromkeys(key for source in sources for key in source.not_used)),
        unit="" if several else sources[0].unit,
        dialogues=len(conversations),
        turns=len(conversations.texts),
        tokens=len(conversations.tokens),
        speakers=len(conversations.speakers),
        named_speakers=conversations.name_speakers(),
        tokens_per_word=round(per_word, 2),
        many_tokens_per_word=per_word > next(many for size, many in MANY_TOKENS.items() if n_vocab >= size),
        duplicates=len(conversations) - len(np.unique(conversations.fingerprints)),
        skipped={
            why: Counted(count, [conversations.place(*place) for place in first])
            for why, (count, first) in conversations.skipped.items()
        },
        nothing_to_learn=len(conversations) - sum(part.dialogues for part in parts.values()),
        private=count_private(conversations.private),
        masked=conversations.private.masked,
        private_names=sum(bool(find_private(speaker)) for speaker in conversations.speakers),
        parts=parts,
        files=count_files(sources, conversations) if several else None,
    )


def count_private(counts: PrivateCounts) -> dict[str, PrivateLedger]:
    """Return the kinds that occur, each with its count and its speakers."""
    found = {}
    for kind in KINDS:
        speakers = {speaker: count for (each, speaker), count in counts.found.most_common() if each == kind}
        if speakers:
            found[kind] = PrivateLedger(sum(speakers.values()), counts.dialogues[kind], speakers)
    return found


def count_files(sources: Sequence[Source], conversations: Conversations) -> list[FileLedger]:
    dialogues = np.bincount(conversations.files, minlength=len(sources)).tolist()
    turns = np.bincount(conversations.files, np.diff(conversations.turn_starts), len(sources)).astype(int).tolist()
    return [
        FileLedger(source.input.name, source.format, source.unit, dialogues[place], turns[place], list(source.not_used))
        for place, source in enumerate(sources)
    ]


def tokens_per_word(conversations: Conversations) -> float:
    """Return the number of tokens per word in the first dialogues."""
    tokens = words = 0
    for dialogue in range(min(len(conversations), SAMPLE)):
        texts = conversations.texts_of(dialogue)
        tokens += int((texts[:, 1] - texts[:, 0]).sum())
        words += sum(len(turn.text.split()) for turn in conversations[dialogue].turns)
    return tokens / words


def count_part(dataset: DialogueDataset, training: TrainingSettings, processes: int) -> PartLedger:
    conversations, dialogues = dataset.conversations, dataset.dialogues
    tokens = int((conversations.starts[dialogues + 1] - conversations.starts[dialogues]).sum())
    step_batches = training.step_batches(processes)
    steps = epoch_steps(dataset.lengths(), training.batch_size, step_batches, training.seed, epoch=0)
    return PartLedger(
        dialogues=len(dialogues),
        turns=int((conversations.turn_starts[dialogues + 1] - conversations.turn_starts[dialogues]).sum()),
        tokens=tokens,
        # The first token of a dialogue has no context, so it can't be learned.
        learned_share=round(dataset.count_learned() / (tokens - len(dialogues)), 4),
        examples=len(dataset),
        longest=max(dataset.lengths()),
        padding_share=round(padding_share(dataset, steps), 4),
        shortened_turns=dataset.shortened,
        cut_off_tokens=dataset.cut_off,
        unlearned_examples=dataset.unlearned,
        steps_per_epoch=len(steps),
    )


def ledger_lines(ledger: Ledger) -> list[str]:
    """Return the ledger as lines to print."""
    lines = [
        f"data: {ledger.file} ({ledger.format}), {amount(ledger.dialogues, 'dialogue')},"
        f" {amount(ledger.turns, 'turn')}, {ledger.tokens:,} tokens, {ledger.tokens_per_word} tokens per word;"
        f" {ledger.named_speakers}"
    ]
    files = ledger.files or []
    lines += [
        f"  {each.file} ({each.format}): {amount(each.dialogues, 'dialogue')}, {amount(each.turns, 'turn')}"
        for each in files[:FILES]
    ]
    if len(files) > FILES:
        lines.append(f"  and {amount(len(files) - FILES, 'more file')}; ledger.json lists all of them")
    lines += [
        f"skipped: {why} ({skipped.count:,}; {places(ledger.unit, skipped)})" for why, skipped in ledger.skipped.items()
    ]
    if ledger.duplicates:
        lines.append(
            f"duplicates: {amount(ledger.duplicates, 'dialogue')} equal to an earlier one; kept, in the same part"
        )
    if ledger.not_used:
        lines.append(f"not used: the fields {', '.join(map(repr, ledger.not_used))}")
    if ledger.nothing_to_learn:
        lines.append(f"left out: {amount(ledger.nothing_to_learn, 'dialogue')} with nothing to learn")
    lines += private_lines(ledger)
    if ledger.many_tokens_per_word:
        lines.append(
            "warning: many tokens per word; GPT-2 was trained on English, so expect weaker replies in other languages"
        )
    for name, part in ledger.parts.items():
        examples = f" in {amount(part.examples, 'example')}" if part.examples != part.dialogues else ""
        lines.append(
            f"{name}: {amount(part.dialogues, 'dialogue')}{examples}, {amount(part.turns, 'turn')},"
            f" {part.tokens:,} tokens, {part.learned_share:.0%} learned, longest {part.longest:,};"
            f" {amount(part.steps_per_epoch, 'step')} per epoch, {part.padding_share:.0%} padding"
        )
        if part.shortened_turns:
            lines.append(
                f"  {amount(part.shortened_turns, 'turn')} (or system prompts) longer than --max-length, truncated"
                f" ({part.cut_off_tokens:,} tokens lost)"
            )
        if part.unlearned_examples:
            lines.append(f"  left out: {amount(part.unlearned_examples, 'example')} with nothing to learn")
    return lines + ledger.notes


def private_lines(ledger: Ledger) -> list[str]:
    """Return the lines to print about private data; none if there is no such data and no --mask."""
    told = []
    for kind, private in ledger.private.items():
        named = [f"{speaker[:40]} {count:,}" for speaker, count in list(private.speakers.items())[:SPOKEN_BY]]
        if (rest := len(private.speakers) - SPOKEN_BY) > 0:
            named.append(f"{rest:,} more")
        in_dialogues = f"{private.dialogues:,}" if told else amount(private.dialogues, "dialogue")
        told.append(f"{private.count:,} {KINDS[kind][private.count > 1]} in {in_dialogues} ({', '.join(named)})")
    lines = []
    if ledger.masked:
        lines.append(f"masked: {', '.join(told) or 'nothing found'}; names are not masked")
    elif told:
        lines.append(f"private: {', '.join(told)}; --mask replaces them")
    if ledger.private_names:
        lines.append(
            f"private: speakers whose name is a phone number, an address or a link: {ledger.private_names:,}; the model"
            " learns these names; --rename replaces them"
        )
    return lines


def places(unit: str, counted: Counted) -> str:
    """Return the first few locations of a count as text."""
    first = list(dict.fromkeys(counted.first))
    units = f"{unit}s" if unit and len(first) > 1 else unit
    return f"{units} {', '.join(map(str, first))}{', …' if counted.count > FIRST else ''}".lstrip()
