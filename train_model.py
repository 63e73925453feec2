"""From a model folder to a fine-tuned one in the folder of a run, which may be gone on with."""

from dataclasses import replace
from pathlib import Path

import tiktoken
import torch

from dialogues.batches import DialogueDataset
from dialogues.tokenizer import copy_vocabulary
from files import UserError
from gpt_model import GPTModel
from load_gpt2_weights import add_embeddings, load_model, read_weights, save_model
from prepare import Data
from run_folder import OUTPUT, check_record, create_run_folder, write_settings
from settings import FinetuneSettings, TrainingSettings
from training.checkpoint import Checkpoints, RunState
from training.device import Machine
from training.loop import Examples, train
from training.lora import add_adapters, load_adapter, merge_adapters, save_adapter
from training.memory import Size, check_memory
from training.optimizer import make_optimizer


def complete_settings(settings: FinetuneSettings, folder: Path, size: Size, machine: Machine) -> FinetuneSettings:
    """What was left open, filled in for this model and machine, and printed; of a resumed run all of it is known.

    Raises:
        UserError: there is too little memory.
    """
    training, chosen = settings.training.with_defaults(size.parameters)
    print(f"model: {folder}, {size.parameters:,} parameters", machine.explanation, chosen, sep="\n")
    if warning := check_memory(size, training, machine):
        print(warning)
    return replace(settings, training=training)


def open_run(
    settings: FinetuneSettings, fingerprints: dict[str, str], examples: int, needed: int, machine: Machine
) -> Checkpoints:
    """The folder of this run, new or gone on with, what it works with written into it, and what was saved there.

    Args:
        fingerprints: of the conversations and the model.
        examples: how many there are to train on.
        needed: bytes that the fine-tuned model will take.

    Raises:
        UserError: it can't be made, or the run in it can't be gone on with.
    """
    run_folder = settings.run.resume
    if machine.primary:
        record = {"machine": machine.record(), "fingerprints": fingerprints}
        if run_folder:
            if note := check_record(run_folder, record, settings.run.resume_inexactly):
                print(note)
            checkpoints = Checkpoints(run_folder / "checkpoint", fingerprints)
            over = checkpoints.trained(settings.training.steps(examples)[1]) or not checkpoints.paths()
            if over and (run_folder / OUTPUT).exists():
                raise UserError(
                    f"{run_folder} is finished; more --epochs go on in it if its checkpoint was kept"
                    f" (--keep-checkpoint), and --model {run_folder} starts a new run from its model"
                )
        else:
            name = Path(settings.model.name).resolve().name
            run_folder = create_run_folder(settings.run.run_dir, name, needed)
        print(f"run folder: {run_folder}")
        write_settings(run_folder, settings, record)
    run_folder = Path(machine.agree(str(run_folder)))
    return Checkpoints(run_folder / "checkpoint", fingerprints)


def make_model(folder: Path, training: TrainingSettings, tokenizer: tiktoken.Encoding, machine: Machine) -> GPTModel:
    """The model of `folder` on its device, with room for new tokens, and with adapters where these are trained.

    Frozen weights are bf16 where the machine computes in it: half the memory, and nothing to cast.
    """
    frozen_dtype = torch.bfloat16 if training.lora_rank and machine.precision == "bf16" else torch.float32
    model = load_model(folder, training.dropout, frozen_dtype)[0]
    new_tokens = tokenizer.n_vocab - model.config.vocab_size
    add_embeddings(model, tokenizer.n_vocab)
    if training.lora_rank:
        add_adapters(model, training.lora_rank, training.seed, new_tokens)
    model.gradient_checkpointing = training.gradient_checkpointing
    return model.to(machine.device)


def train_model(
    settings: FinetuneSettings,
    folder: Path,
    data: Data,
    datasets: dict[str, DialogueDataset],
    machine: Machine,
    checkpoints: Checkpoints,
) -> tuple[GPTModel, RunState]:
    """The model of `folder`, fine-tuned and saved in the run folder, and how its training went.

    Of a run that was stopped after its training, the saved model is taken.

    Raises:
        UserError: a loss is no number, or the disk is full.
    """
    training, run_folder = settings.training, checkpoints.folder.parent
    tokenizer = data.conversations.renderer.tokenizer
    state = checkpoints.trained(training.steps(len(datasets["train"]))[1])
    source = run_folder / "model" if state and not training.lora_rank else folder
    model = make_model(source, training, tokenizer, machine)
    if state:
        if training.lora_rank:
            load_adapter(model, run_folder / "adapter")
        print(f"the training was over after {state.step} steps")
        machine.leave()
        return model, state

    description = data.conversations.describe(data.parts["train"])

    def save(target: Path) -> None:
        merged = merge_adapters(model, read_weights(folder)) if training.lora_rank else None
        save_model(model, target, description, parameters=merged)

    def after_epoch(number: int) -> None:
        if settings.run.keep_epochs and machine.primary:
            copy_vocabulary(run_folder / "model", run_folder / "epochs" / str(number), tokenizer)
            save(run_folder / "epochs" / str(number))

    optimizer = make_optimizer(model, training)
    examples = Examples(datasets["train"], datasets["val"], tokenizer.eot_token)
    state = train(model, optimizer, examples, training, machine, checkpoints, settings.run, after_epoch)
    if machine.primary:
        if training.lora_rank:
            save_adapter(model, run_folder / "adapter", str(folder))  # first: should the merging fail, nothing is lost
        save(run_folder / "model")
        checkpoints.mark_trained(state)
    machine.leave()
    return model, state
