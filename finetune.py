"""Fine-tune GPT-2 on conversations: read → load → render → train → save → generate → write."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dialogues.dialogue import Dialogue, split_dialogues
from dialogues.formats import read_dialogues
from dialogues.template import describe, encode, render
from dialogues.tokenizer import copy_vocabulary
from files import UserError, check_output_path, create_run_folder, run_command, write_json, write_text
from settings import FinetuneSettings, parse_command_line

if TYPE_CHECKING:
    import tiktoken

    from dialogues.batches import DialogueDataset

NEXT_STEP = """
That was the small practice model that comes with the program. GPT-2 with 355M parameters, a download of 1.5 GB, writes
far better: python finetune.py --model gpt2-medium"""


def main() -> None:
    finetune(parse_command_line(FinetuneSettings))


def finetune(settings: FinetuneSettings) -> None:
    """The whole job. What can be wrong with files and folders is found before the training, not after it.

    Raises:
        UserError: something that the user can mend.
    """
    started = time.perf_counter()
    data = settings.data.locate()
    check_output_path(settings.output, [data])
    dialogues = read_dialogues(data)
    names = ["train", "val", "test"]
    parts = dict(zip(names, split_dialogues(dialogues, settings.data.percents), strict=False))
    print(f"data: {data}, {len(dialogues)} dialogues, split {settings.data.split} in file order")

    # PyTorch takes a second to import: `--help`, a mistyped option and an unreadable file don't wait for it.
    from load_gpt2_weights import BUNDLED, find_model_folder, load_model, save_model
    from results.generation import complete_dialogues
    from training.device import choose_machine, keep_freed_memory
    from training.loop import train
    from training.optimizer import make_optimizer

    keep_freed_memory()
    machine = choose_machine(settings.training.device, settings.training.precision)
    folder = find_model_folder(settings.model.name, settings.model.model_path)
    check_output_path(settings.output, list(folder.iterdir()))
    model, tokenizer = load_model(folder, settings.training.dropout)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"model: {folder}, {parameters:,} parameters", machine.explanation, sep="\n")

    training, chosen = settings.training.with_defaults(parameters)
    print(chosen)
    datasets = make_datasets(parts, tokenizer, settings.data.max_length, model.config.n_positions)

    run_folder = create_run_folder(settings.run_dir, Path(settings.model.name).resolve().name, 4 * parameters)
    print(f"run folder: {run_folder}")
    copy_vocabulary(folder, run_folder / "model")  # now: by the end the source may have changed
    write_inputs(run_folder, {**asdict(replace(settings, training=training)), "machine": machine.record()}, parts)

    model.to(machine.device)
    optimizer = make_optimizer(model, training)
    before, after = train(
        model, optimizer, datasets["train"], datasets["val"], tokenizer.eot_token, training, machine, run_folder
    )
    save_model(model, run_folder / "model", describe(parts["train"]))

    held_out = parts.get("test", parts["val"])[: settings.generation.cases]
    cases = complete_dialogues(model, tokenizer, held_out, settings.generation, training.seed)
    print_cases(cases, settings.generation.cases)
    print(f"\ntrain loss {before.train:.3f} → {after.train:.3f}, validation loss {before.val:.3f} → {after.val:.3f}")
    replaced = "replaced" if settings.output.exists() else "written"
    write_json(run_folder / "generated_conversations.json", cases)
    write_json(settings.output, cases)
    seconds = time.perf_counter() - started
    print(f"{replaced}: {settings.output}; the model: {run_folder / 'model'}; {seconds:.0f} s in all")
    if folder.resolve() == BUNDLED:
        print(NEXT_STEP)


def make_datasets(
    parts: dict[str, Sequence[Dialogue]], tokenizer: "tiktoken.Encoding", max_length: int, n_positions: int
) -> "dict[str, DialogueDataset]":
    """Each part of the data as examples of at most `max_length` tokens (0: as many as the model has positions).

    Raises:
        UserError: more than the model has positions.
    """
    from dialogues.batches import DialogueDataset

    if max_length > n_positions:
        raise UserError(f"--max-length {max_length}: the model has {n_positions} positions")
    datasets = {}
    for name, part in parts.items():
        encoded = (encode(dialogue, tokenizer) for dialogue in part)
        datasets[name] = DialogueDataset(encoded, max_length or n_positions, tokenizer.n_vocab)
        print(f"{name}: {datasets[name].describe()}")
    return datasets


def write_inputs(run_folder: Path, settings: dict[str, Any], parts: dict[str, Sequence[Dialogue]]) -> None:
    """Keep what the run is made of: its settings, and the dialogues of each part exactly as the model sees them."""
    write_json(run_folder / "settings.json", settings)
    for name, part in parts.items():
        write_text(run_folder / f"{name}_data.txt", "".join(render(dialogue) + "\n" for dialogue in part))


def print_cases(cases: list[dict[str, str]], wanted: int) -> None:
    """Show what the model wrote beside what was said."""
    if len(cases) < wanted:
        print(f"{len(cases)} cases, all there are (--cases {wanted})")
    for number, case in enumerate(cases, 1):
        print(f"\ncase {number}\n  input      {case['input']}\n  true       {case['response']}")
        print(f"  generated  {case['model_response']}")


if __name__ == "__main__":
    run_command(main)
