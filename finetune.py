"""Fine-tune GPT-2 on conversations: read → render → load → train → save → generate → write."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dialogues.tokenizer import copy_vocabulary
from files import UserError, check_output_path, printable, run_command, write_json
from find_model import BUNDLED, find_model_folder, weights_checksum
from prepare import Data, fingerprint, make_datasets, open_data, read_data, show_data, write_rendered
from run_folder import (
    OUTPUT,
    check_record,
    create_run_folder,
    lock_run_folder,
    parse_finetune_settings,
    write_settings,
)
from settings import FinetuneSettings

if TYPE_CHECKING:
    from dialogues.batches import DialogueDataset
    from gpt_model import GPTConfig, GPTModel
    from training.checkpoint import Checkpoints, RunState
    from training.device import Machine

NEXT_STEP = """
That was the small practice model that comes with the program. GPT-2 with 355M parameters, a download of 1.5 GB, writes
far better: python finetune.py --model gpt2-medium"""


def main() -> None:
    finetune(parse_finetune_settings())


def finetune(settings: FinetuneSettings) -> None:
    """The whole job. What can be wrong with files and folders is found before the training, not after it.

    Raises:
        UserError: something that the user can mend.
    """
    started = time.perf_counter()
    lock = lock_run_folder(settings.run.resume) if settings.run.resume else None
    check_output_path(settings.output, [settings.data.locate()])
    source, template = open_data(settings.data)
    folder = find_model_folder(settings.model.name, settings.model.model_path, weights=False)
    data = read_data(source, template, folder, settings.data, settings.training.seed)

    # PyTorch takes a second to import: `--help`, a mistyped option and an unreadable file don't wait for it.
    from load_gpt2_weights import read_config
    from training.checkpoint import Checkpoints
    from training.device import choose_machine, keep_freed_memory
    from training.tracking import explain_losses

    keep_freed_memory()
    machine = choose_machine(settings.training.device, settings.training.precision)
    config = read_config(folder / "config.json")
    datasets = make_datasets(data, settings.data.max_length, config.n_positions)
    ledger = show_data(data, datasets, settings, config, machine)
    if settings.preview:
        return

    folder = find_model_folder(settings.model.name, settings.model.model_path)
    check_output_path(settings.output, list(folder.iterdir()))
    config = replace(config, vocab_size=data.conversations.renderer.tokenizer.n_vocab)
    settings = complete(settings, folder, config, machine)
    fingerprints = {"conversations": fingerprint(data), "model": weights_checksum(folder)}
    run_folder = open_run(settings, {"machine": machine.record(), "fingerprints": fingerprints}, machine)
    lock = lock or lock_run_folder(run_folder)
    checkpoints = Checkpoints(run_folder / "checkpoint", fingerprints)
    if machine.primary:
        copy_vocabulary(folder, run_folder / "model", data.conversations.renderer.tokenizer)  # the source may change
        write_json(run_folder / "ledger.json", ledger)
        write_rendered(run_folder, data)

    model, state = train_model(settings, folder, data, datasets, machine, checkpoints)
    machine.leave()
    if not machine.primary:
        return
    written = write_cases(model, data, settings, run_folder)
    if not settings.run.keep_checkpoint:
        checkpoints.remove()
    print(*explain_losses(state, settings.training.steps(len(datasets["train"]))[0]), sep="\n")
    seconds = time.perf_counter() - started
    print(f"{written}; the model: {run_folder / 'model'}; {seconds:.0f} s in all")
    if folder.resolve() == BUNDLED:
        print(NEXT_STEP)


def complete(settings: FinetuneSettings, folder: Path, config: "GPTConfig", machine: "Machine") -> FinetuneSettings:
    """What was left open filled in for this model and machine, and printed; of a resumed run all of it is known."""
    from gpt_model import count_parameters

    parameters = count_parameters(config)
    training, chosen = settings.training.with_defaults(parameters)
    if not settings.run.resume:
        training = replace(training, processes=machine.processes)
    print(f"model: {folder}, {parameters:,} parameters", machine.explanation, chosen, sep="\n")
    return replace(settings, training=training)


def open_run(settings: FinetuneSettings, record: dict[str, Any], machine: "Machine") -> Path:
    """The folder of this run, new or gone on with, with its settings and what it works with written into it.

    Raises:
        UserError: it can't be made, or the run in it can't be gone on with.
    """
    if not machine.primary:
        return Path(machine.agree(""))
    if settings.run.resume:
        run_folder = settings.run.resume
        if note := check_record(run_folder, record, settings.run.resume_inexactly):
            print(note)
    else:
        run_folder = create_run_folder(settings.run.run_dir, Path(settings.model.name).resolve().name, 0)
    print(f"run folder: {run_folder}")
    write_settings(run_folder, settings, record)
    return Path(machine.agree(str(run_folder)))


def train_model(
    settings: FinetuneSettings,
    folder: Path,
    data: Data,
    datasets: "dict[str, DialogueDataset]",
    machine: "Machine",
    checkpoints: "Checkpoints",
) -> "tuple[GPTModel, RunState]":
    """The model of `folder`, fine-tuned and saved in the run folder, and how its training went.

    Of a run that was stopped after its training, the saved model is taken.

    Raises:
        UserError: the run is finished, a loss is no number, or the disk is full.
    """
    from load_gpt2_weights import add_embeddings, load_model, save_model
    from training.loop import Examples, train
    from training.optimizer import make_optimizer

    training, run_folder, tokenizer = (
        settings.training,
        checkpoints.folder.parent,
        data.conversations.renderer.tokenizer,
    )
    state = checkpoints.trained(training.steps(len(datasets["train"]))[1])
    if (run_folder / OUTPUT).exists() and (state or not checkpoints.paths()):
        raise UserError(
            f"{run_folder} is finished; more --epochs go on in it if its checkpoint was kept (--keep-checkpoint),"
            f" and --model {run_folder} starts a new run from its model"
        )
    model = load_model(run_folder / "model" if state else folder, training.dropout)[0]
    add_embeddings(model, tokenizer.n_vocab)
    model.to(machine.device)
    if state:
        print(f"the training was over after {state.steps} steps")
        return model, state

    description = data.conversations.describe(data.parts["train"])

    def after_epoch(number: int) -> None:
        if settings.run.keep_epochs and machine.primary:
            copy_vocabulary(run_folder / "model", run_folder / "epochs" / str(number), tokenizer)
            save_model(model, run_folder / "epochs" / str(number), description)

    model.gradient_checkpointing = training.gradient_checkpointing
    optimizer = make_optimizer(model, training)
    examples = Examples(datasets["train"], datasets["val"], tokenizer.eot_token)
    state = train(model, optimizer, examples, training, machine, checkpoints, settings.run, after_epoch)
    if machine.primary:
        save_model(model, run_folder / "model", description)
        checkpoints.mark_trained(state)
    return model, state


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
    write_json(run_folder / OUTPUT, cases)
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
