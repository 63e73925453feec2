"""A run from its model folder to its fine-tuned one: opened, or gone on with, trained, and saved."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken
import torch
from filelock import FileLock

from dialogues.batches import DialogueDataset
from dialogues.tokenizer import copy_vocabulary
from gpt_model import GPTModel, count_parameters
from hub.find import HUB_IDS, weights_checksum
from load_gpt2_weights import add_embeddings, load_model, read_weights, save_model
from pipeline.prepare import Data, fingerprint, write_rendered
from pipeline.run_folder import OUTPUT, create_run_folder, lock_run_folder
from pipeline.run_settings import check_record, write_settings
from settings import FinetuneSettings, TrainingSettings
from support.errors import UserError
from talking.decoder import Decoder
from talking.generation import complete_dialogues
from training.checkpoint import Checkpoints, RunState
from training.device import Machine, check_compiler, return_freed_memory
from training.loop import Examples, Run, train
from training.lora import add_adapters, load_adapter, merge_adapters, save_adapter
from training.memory import Size, check_memory
from training.optimizer import make_optimizer
from training.stopping import StopSignals


def complete_settings(settings: FinetuneSettings, folder: Path, size: Size, machine: Machine) -> FinetuneSettings:
    """What was left open, filled in for this model and machine, and printed; of a resumed run all of it is known.

    Raises:
        UserError: there is too little memory.
    """
    training, chosen = settings.training.with_defaults(size.parameters)
    chosen = f"options: those of {settings.run.resume}" if settings.run.resume else chosen
    print(f"model: {folder}, {size.parameters:,} parameters", machine.explanation, chosen, sep="\n")
    if training.compile:
        check_compiler(machine)
        print("--compile: the first steps take longer, since they compile the model")
    print(check_memory(size, training, machine))
    return replace(settings, training=training)


class OpenRun(NamedTuple):
    """A run that is ready to be trained: its folder, the model, and what the folder holds to go on from."""

    folder: Path
    source: Path  # the model folder that it began with
    model: GPTModel
    checkpoints: Checkpoints
    trained: RunState | None  # of a run that was stopped after its training
    lock: FileLock | None


def open_run(
    settings: FinetuneSettings,
    source: Path,
    data: Data,
    datasets: dict[str, DialogueDataset],
    machine: Machine,
    lock: FileLock | None,
) -> OpenRun:
    """Load the model of `source`, and then make the folder of this run, or check the one that is gone on with.

    Args:
        lock: on the folder that is gone on with.

    Raises:
        UserError: the model is damaged, no folder can be made, or the run in it can't be gone on with.
    """
    training, tokenizer, folder = settings.training, data.conversations.renderer.tokenizer, settings.run.resume
    fingerprints = {"conversations": fingerprint(data), "model": weights_checksum(source)}
    record = {"machine": machine.record(), "fingerprints": fingerprints}
    trained = check_resumed(folder, settings, record, len(datasets["train"])) if folder else None
    # Adapters lie without the weights beside which they were trained.
    weights = folder / "model" if folder and trained and not training.lora_rank else source
    model = make_model(weights, training, tokenizer, machine.precision)
    model.to(machine.device)
    if folder and trained and training.lora_rank:
        load_adapter(model, folder / "adapter")
    if machine.primary:
        if not folder:
            name, needed = Path(settings.model.name).resolve().name, 4 * count_parameters(model.config)
            folder = create_run_folder(settings.run.run_dir, name, needed)
            lock = lock_run_folder(folder)
        print(f"run folder: {folder}")
        write_settings(folder, settings, source, record)
        copy_vocabulary(source, folder / "model", tokenizer)  # now: by the end the source may have changed
        write_rendered(folder, data)
    folder = Path(machine.agree(str(folder)))
    checkpoints = Checkpoints(folder / "checkpoint", fingerprints, machine.primary)
    return OpenRun(folder, source, model, checkpoints, trained, lock)


def check_resumed(folder: Path, settings: FinetuneSettings, record: dict[str, Any], examples: int) -> RunState | None:
    """Whether the run in `folder` can go on; where it has come to, if its training is over.

    Raises:
        UserError: it is finished, or something about it has changed.
    """
    if note := check_record(folder, record, settings.run.resume_inexactly):
        print(note)
    checkpoints = Checkpoints(folder / "checkpoint", record["fingerprints"])
    trained = checkpoints.trained(settings.training.steps(examples)[1])
    over = trained if settings.run.keep_checkpoint else not checkpoints.folder.exists()
    if over and (folder / OUTPUT).exists():
        longer = (
            "its length was set by --max-minutes"
            if trained and trained.measured
            else "more --epochs go on in it if its checkpoint was kept (--keep-checkpoint)"
        )
        raise UserError(f"{folder} is finished; {longer}, and --model {folder} starts a new run from its model")
    return trained


def make_model(folder: Path, training: TrainingSettings, tokenizer: tiktoken.Encoding, precision: str) -> GPTModel:
    """The model of `folder`, with room for new tokens, and with adapters where these are trained.

    Frozen weights are bf16 where the machine computes in it: half the memory, and nothing to cast.
    """
    frozen_dtype = torch.bfloat16 if training.lora_rank and precision == "bf16" else torch.float32
    model = load_model(folder, training.dropout, frozen_dtype)[0]
    new_tokens = tokenizer.n_vocab - model.config.vocab_size
    add_embeddings(model, tokenizer.n_vocab)
    if training.lora_rank:
        add_adapters(model, training.lora_rank, training.seed, new_tokens)
    return model


def train_model(
    run: OpenRun, settings: FinetuneSettings, data: Data, datasets: dict[str, DialogueDataset], machine: Machine
) -> RunState:
    """Train the model of a run and save it in the run's folder; return how that went.

    Raises:
        UserError: a loss is no number, or the disk is full.
    """
    if run.trained:
        print(f"the training was over after {run.trained.step} steps")
        return run.trained
    return_freed_memory()  # of measuring the base model: packed matrices leave holes in what training takes
    training, model, tokenizer = settings.training, run.model, data.conversations.renderer.tokenizer
    description = data.conversations.describe(data.parts["train"])

    def save(target: Path) -> None:
        if machine.primary:
            merged = merge_adapters(model, read_weights(run.source)) if training.lora_rank else None
            save_model(model, target, description, parameters=merged)

    def after_epoch(number: int) -> None:
        if settings.run.keep_epochs:
            if machine.primary:
                copy_vocabulary(run.folder / "model", run.folder / "epochs" / str(number), tokenizer)
            save(run.folder / "epochs" / str(number))

    optimizer = make_optimizer(model, training)
    examples = Examples(datasets["train"], datasets["val"], tokenizer.eot_token)
    # The model is whole in each process, and one is enough to ask.
    watch = make_watch(model, data, settings) if settings.run.watch and machine.primary else None
    with StopSignals(machine) as signals:
        training_run = Run(model, optimizer, examples, training, machine, run.checkpoints, settings.run, watch)
        state = train(training_run, signals, after_epoch)
        if machine.primary and training.lora_rank:
            save_adapter(model, run.folder / "adapter", base_name(settings, run.source))  # before the merging
        save(run.folder / "model")
        if machine.primary:
            run.checkpoints.mark_trained(state)
        del training_run  # now: a signal that meets the end of its progress bar would be lost
    return state


def make_watch(model: GPTModel, data: Data, settings: FinetuneSettings) -> Callable[[], dict[str, str]]:
    """What asks `model`, as it then is, for its next turn in the first case, beside the true one."""
    renderer, first = data.conversations.renderer, data.conversations[data.held_out[0]]
    learn, generation, seed = settings.data.learn, settings.generation, settings.training.seed

    def watch() -> dict[str, str]:
        (case,) = complete_dialogues(Decoder(model), renderer, [first], learn, generation, seed, one_turn=True)
        return case._replace(true=case.true[:1]).as_texts(renderer.name)

    return watch


def base_name(settings: FinetuneSettings, source: Path) -> str:
    """How others find the model that adapters were trained on."""
    return HUB_IDS.get(settings.model.name, str(source.absolute()))


def finished_decoder(run: OpenRun, machine: Machine) -> Decoder:
    """The trained model of a run, ready to generate."""
    return_freed_memory()  # of gradients and moments: the bf16 copy comes on top of what is kept
    return Decoder(run.model, machine.inference_dtype)
