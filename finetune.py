"""Fine-tune GPT-2 on conversations: read → render → load → train → save → generate → write."""

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dialogues.tokenizer import copy_vocabulary
from files import check_output_path, create_run_folder, printable, run_command, write_json
from find_model import BUNDLED, find_model_folder
from prepare import Data, make_datasets, open_data, read_data, show_data, write_rendered
from settings import FinetuneSettings, parse_command_line

if TYPE_CHECKING:
    from gpt_model import GPTModel

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
    check_output_path(settings.output, [settings.data.locate()])
    source, template = open_data(settings.data)
    folder = find_model_folder(settings.model.name, settings.model.model_path, weights=False)
    data = read_data(source, template, folder, settings.data, settings.training.seed)

    # PyTorch takes a second to import: `--help`, a mistyped option and an unreadable file don't wait for it.
    from load_gpt2_weights import add_embeddings, load_model, read_config, save_model
    from training.device import choose_machine, keep_freed_memory
    from training.loop import train
    from training.optimizer import make_optimizer

    keep_freed_memory()
    machine = choose_machine(settings.training.device, settings.training.precision)
    config = read_config(folder / "config.json")
    datasets = make_datasets(data, settings.data.max_length, config.n_positions)
    ledger = show_data(data, datasets, settings, config, machine)
    if settings.preview:
        return

    folder = find_model_folder(settings.model.name, settings.model.model_path)
    check_output_path(settings.output, list(folder.iterdir()))
    model = load_model(folder, settings.training.dropout)[0]
    tokenizer = data.conversations.renderer.tokenizer
    add_embeddings(model, tokenizer.n_vocab)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    training, chosen = settings.training.with_defaults(parameters)
    settings = replace(settings, training=training)
    print(f"model: {folder}, {parameters:,} parameters", machine.explanation, chosen, sep="\n")

    run_folder = create_run_folder(settings.run_dir, Path(settings.model.name).resolve().name, 4 * parameters)
    print(f"run folder: {run_folder}")
    copy_vocabulary(folder, run_folder / "model", tokenizer)  # now: by the end the source may have changed
    write_json(run_folder / "settings.json", {**asdict(settings), "machine": machine.record()})
    write_json(run_folder / "ledger.json", ledger)
    write_rendered(run_folder, data)

    model.to(machine.device)
    optimizer = make_optimizer(model, training)
    before, after = train(
        model, optimizer, datasets["train"], datasets["val"], tokenizer.eot_token, training, machine, run_folder
    )
    save_model(model, run_folder / "model", data.conversations.describe(data.parts["train"]))

    written = write_cases(model, data, settings, run_folder)
    print(f"\ntrain loss {before.train:.3f} → {after.train:.3f}, validation loss {before.val:.3f} → {after.val:.3f}")
    seconds = time.perf_counter() - started
    print(f"{written}; the model: {run_folder / 'model'}; {seconds:.0f} s in all")
    if folder.resolve() == BUNDLED:
        print(NEXT_STEP)


def write_cases(model: "GPTModel", data: Data, settings: FinetuneSettings, run_folder: Path) -> str:
    """Let the model complete the held-out conversations; print and write what it says beside what was said."""
    from results.generation import complete_dialogues

    held_out = data.parts.get("test", data.parts["val"])[: settings.generation.cases]
    dialogues = [data.conversations[number] for number in held_out]
    renderer = data.conversations.renderer
    cases = complete_dialogues(
        model, renderer, dialogues, settings.data.learn, settings.generation, settings.training.seed
    )
    print_cases(cases, settings.generation.cases)
    replaced = "replaced" if settings.output.exists() else "written"
    write_json(run_folder / "generated_conversations.json", cases)
    write_json(settings.output, cases)
    return f"{replaced}: {settings.output}"


def print_cases(cases: list[dict[str, str]], wanted: int) -> None:
    """Show what the model wrote beside what was said."""
    if len(cases) < wanted:
        print(f"{len(cases)} cases, all there are (--cases {wanted})")
    for number, case in enumerate(cases, 1):
        shown = {name: printable(text) for name, text in case.items()}
        print(f"\ncase {number}\n  input      {shown['input']}\n  true       {shown['response']}")
        print(f"  generated  {shown['model_response']}")


if __name__ == "__main__":
    run_command(main)
