"""What became of a file's conversations: whatever is not learned stands here, with the reason."""

from typing import Any

import numpy as np

from dialogues.batches import DialogueDataset, epoch_steps, padding_share
from dialogues.conversations import FIRST, SAMPLE, Conversations
from dialogues.reading import Source

# For a word, by the least size of the vocabulary; GPT-2's takes 1.3 for English and 2.6 for German.
MANY_TOKENS = {40_000: 1.8, 0: 2.4}


def count_data(source: Source, conversations: Conversations) -> dict[str, Any]:
    """The ledger of a whole file."""
    unique = len(np.unique(conversations.fingerprints))
    per_word, n_vocab = tokens_per_word(conversations), conversations.renderer.tokenizer.n_vocab
    return {
        "file": str(source.path),
        "format": source.format,
        "not_used": list(source.not_used),
        "unit": source.unit,
        "dialogues": len(conversations),
        "turns": len(conversations.texts),
        "tokens": len(conversations.tokens),
        "speakers": len(conversations.speakers),
        "named_speakers": conversations.name_speakers(),
        "tokens_per_word": round(per_word, 2),
        "many_tokens_per_word": per_word > next(many for size, many in MANY_TOKENS.items() if n_vocab >= size),
        "duplicates": len(conversations) - unique,
        "skipped": {why: {"count": count, "first": first} for why, (count, first) in conversations.skipped.items()},
    }


def tokens_per_word(conversations: Conversations) -> float:
    """How many tokens a word between spaces takes, in the first dialogues."""
    tokens = words = 0
    for dialogue in range(min(len(conversations), SAMPLE)):
        texts = conversations.texts_of(dialogue)
        tokens += int((texts[:, 1] - texts[:, 0]).sum())
        words += sum(len(turn.text.split()) for turn in conversations[dialogue].turns)
    return tokens / words


def count_part(dataset: DialogueDataset, batch_size: int, accumulation: int, seed: int) -> dict[str, Any]:
    """The ledger of one part of the split."""
    conversations, dialogues = dataset.conversations, dataset.dialogues
    sizes = conversations.starts[dialogues + 1] - conversations.starts[dialogues]
    steps = epoch_steps(dataset.lengths(), batch_size, accumulation, seed, epoch=0)
    return {
        "dialogues": len(dialogues),
        "turns": int((conversations.turn_starts[dialogues + 1] - conversations.turn_starts[dialogues]).sum()),
        "tokens": int(sizes.sum()),
        # Nothing predicts the first token of a dialogue, so it can't be learned.
        "learned_share": round(dataset.count_learned() / (int(sizes.sum()) - len(dialogues)), 4),
        "examples": len(dataset),
        "longest": max(dataset.lengths()),
        "padding_share": round(padding_share(dataset, steps), 4),
        "shortened_turns": dataset.shortened,
        "cut_off_tokens": dataset.cut_off,
        "unlearned_examples": dataset.unlearned,
        "steps_per_epoch": len(steps),
    }


def also_in(train: DialogueDataset, other: DialogueDataset) -> list[int]:
    """The places in the file of the dialogues of `other` that stand in `train` word for word."""
    conversations = train.conversations
    known = np.isin(conversations.fingerprints[other.dialogues], conversations.fingerprints[train.dialogues])
    return conversations.numbers[other.dialogues][known].tolist()


def make_ledger(
    source: Source,
    parts: dict[str, DialogueDataset],
    batch_size: int,
    accumulation: int,
    seed: int,
) -> dict[str, Any]:
    """The ledger of a run, as JSON holds it."""
    counted = {name: count_part(part, batch_size, accumulation, seed) for name, part in parts.items()}
    for name in parts.keys() - {"train"}:
        shared = also_in(parts["train"], parts[name])
        counted[name]["also_in_train"] = {"count": len(shared), "first": shared[:FIRST]}
    whole = count_data(source, parts["train"].conversations)
    left_out = whole["dialogues"] - sum(part["dialogues"] for part in counted.values())
    return {**whole, "nothing_to_learn": left_out, "parts": counted}


def ledger_lines(ledger: dict[str, Any]) -> list[str]:
    """The ledger as it is printed."""
    unit = ledger["unit"]
    lines = [
        f"data: {ledger['file']} ({ledger['format']}), {ledger['dialogues']:,} dialogues, {ledger['turns']:,} turns,"
        f" {ledger['tokens']:,} tokens, {ledger['tokens_per_word']} tokens a word; {ledger['named_speakers']}"
    ]
    lines += [
        f"skipped: {skipped['count']:,} {why} ({places(unit, skipped)})" for why, skipped in ledger["skipped"].items()
    ]
    if ledger["duplicates"]:
        lines.append(f"duplicates: {ledger['duplicates']:,} dialogues stand in the file more than once; they are kept")
    if ledger["not_used"]:
        lines.append(f"not used: what records have under {', '.join(map(repr, ledger['not_used']))}")
    if ledger["nothing_to_learn"]:
        lines.append(f"left out: {ledger['nothing_to_learn']:,} dialogues in which nothing is to be learned")
    if ledger["many_tokens_per_word"]:
        lines.append(
            "warning: that is many tokens for a word; GPT-2 learned English, so expect weaker replies in others"
        )
    for name, part in ledger["parts"].items():
        examples = f" in {part['examples']:,} examples" if part["examples"] != part["dialogues"] else ""
        lines.append(
            f"{name}: {part['dialogues']:,} dialogues{examples}, {part['turns']:,} turns, {part['tokens']:,} tokens,"
            f" {part['learned_share']:.0%} learned, longest {part['longest']:,}; {part['steps_per_epoch']:,} steps an"
            f" epoch, {part['padding_share']:.0%} padding"
        )
        if part["shortened_turns"]:
            lines.append(
                f"  {part['shortened_turns']:,} turns (or system prompts) exceed --max-length and lose their end,"
                f" {part['cut_off_tokens']:,} tokens"
            )
        if part["unlearned_examples"]:
            lines.append(f"  {part['unlearned_examples']:,} examples without anything to learn are left out")
        if name != "train" and part["also_in_train"]["count"]:
            shared = part["also_in_train"]
            lines.append(
                f"warning: {shared['count']:,} dialogues of {name} stand in train word for word"
                f" ({places(unit, shared)}): their loss says nothing about new ones"
            )
    return lines


def places(unit: str, counted: dict[str, Any]) -> str:
    """The first few places of what was counted."""
    first = list(dict.fromkeys(counted["first"]))
    return f"{unit} {', '.join(map(str, first))}{', …' if counted['count'] > FIRST else ''}"
