"""Fine-tune GPT-2 on conversations: read → render → load → train → save → generate → write."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hub.find import BUNDLED, find_model_folder
from pipeline.folds import cross_validate
from pipeline.prepare import Data, make_datasets, model_size, open_data, read_data, show_data
from pipeline.run_folder import OUTPUT, lock_run_folder, resumable
from pipeline.run_settings import parse_finetune_settings
from settings import FinetuneSettings
from support.errors import printable, run_command
from support.files import check_output_path, write_json
from training.mirror import check_tracker, mirrored

if TYPE_CHECKING:
    from talking.decoder import Decoder
    from talking.generation import Case

NEXT_STEP = """
That was the small practice model that comes with the program. GPT-2 with 355M parameters, a download of 1.5 GB, writes
far better: python finetune.py --model gpt2-medium"""


def main() -> None:
    settings = parse_finetune_settings()
    if settings.data.folds and not settings.data.fold:
        cross_validate(settings, finetune)
    else:
        finetune(settings)


def finetune(settings: FinetuneSettings) -> None:
    """The whole job. What can be wrong with files and folders is found before the training, not after it.

    Raises:
        UserError: something that the user can mend.
    """
    started = time.perf_counter()
    lock = lock_run_folder(settings.run.resume) if settings.run.resume else None
    check_tracker(settings.run.track)
    check_output_path(settings.output, [settings.data.locate()])
    source, template = open_data(settings.data)
    folder = find_model_folder(settings.model.name, settings.model.model_path, weights=False)
    data = read_data(source, template, folder, settings.data, settings.training.seed)

    # PyTorch takes a second to import: `--help`, a mistyped option and an unreadable file don't wait for it.
    from load_gpt2_weights import read_config
    from pipeline.measure import measure_base, measure_run, subject_of_run
    from pipeline.train import complete_settings, finished_decoder, open_run, train_model
    from training.device import choose_machine, keep_freed_memory
    from training.memory import explain_lack_of_memory
    from training.progress import show_losses

    keep_freed_memory()
    machine = choose_machine(settings.training.device, settings.training.precision)
    config = replace(read_config(folder / "config.json"), vocab_size=data.conversations.renderer.tokenizer.n_vocab)
    if not settings.run.resume:
        settings = replace(settings, training=replace(settings.training, processes=machine.processes))
    datasets = make_datasets(data, settings.data.max_length, config.n_positions)
    ledger = show_data(data, datasets, settings, config, machine)
    if settings.preview:
        return

    folder = find_model_folder(settings.model.name, settings.model.model_path)
    check_output_path(settings.output, list(folder.iterdir()))
    size = model_size(config, datasets["train"])
    settings = complete_settings(settings, folder, size, machine)
    with explain_lack_of_memory(size, settings.training, machine):
        run = open_run(settings, folder, data, datasets, machine, lock)
        with resumable(run.folder), mirrored(settings.run.track if machine.primary else "none", run.folder):
            if machine.primary:
                write_json(run.folder / "ledger.json", ledger.to_json())
            subject = subject_of_run(run, data, settings, machine)
            base = measure_base(run, subject, settings, machine)
            state = train_model(run, settings, data, datasets, machine)
            machine.leave()
            if not machine.primary:
                return
            decoder = finished_decoder(run, machine)
            cases = complete_cases(decoder, data, settings)
            print(show_losses(state))
            report = measure_run(run, decoder, cases, base, data, subject, machine)
            written = write_cases(cases, data, settings, run.folder)
    if not settings.run.keep_checkpoint:
        run.checkpoints.remove()
    seconds = time.perf_counter() - started
    print(f"\n{written}; the model: {run.folder / 'model'}; the report: {report}; {seconds:.0f} s in all")
    if folder.resolve() == BUNDLED and not settings.data.fold:
        print(NEXT_STEP)


def complete_cases(decoder: "Decoder", data: Data, settings: FinetuneSettings) -> "list[Case]":
    """Let the model complete the held-out conversations, and print what it says beside what was said."""
    from talking.generation import complete_dialogues

    dialogues = [data.conversations[number] for number in data.held_out[: settings.generation.cases]]
    renderer = data.conversations.renderer
    cases = complete_dialogues(
        decoder, renderer, dialogues, settings.data.learn, settings.generation, settings.training.seed
    )
    print_cases([case.as_texts(renderer.name) for case in cases], settings.generation.cases)
    return cases


def write_cases(cases: "list[Case]", data: Data, settings: FinetuneSettings, run_folder: Path) -> str:
    """Write what the model says beside what was said, and say where."""
    texts = [case.as_texts(data.conversations.renderer.name) for case in cases]
    replaced = "replaced" if settings.output.exists() else "written"
    write_json(settings.output, texts)
    write_json(run_folder / OUTPUT, texts)  # last: by it a run is known to be finished
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
