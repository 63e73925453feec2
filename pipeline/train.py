"""Open or resume a run, train its model, and save it."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import tiktoken
import torch

from dialogues.tokenizer import copy_vocabulary
from gpt_model import GPTModel, count_parameters
from hub.find import HUB_IDS, weights_checksum
from load_gpt2_weights import add_embeddings, load_model, read_weights, save_description, save_weights
from pipeline.job import Job
from pipeline.prepare import fingerprint, model_size, write_learned, write_rendered
from pipeline.run_folder import OUTPUT, create_run_folder, lock_run_folder, resumable
from pipeline.run_settings import Record, check_record, write_settings
from settings import TrainingSettings
from support.errors import UserError, display
from support.files import write_json
from support.screen import log_lost_screen
from talking.decoder import Decoder
from talking.generation import CompletionConfig, complete_dialogues
from training.checkpoint import Checkpoints, TrainingState
from training.device import Machine, return_freed_memory
from training.loop import Examples, Trainer, TrainingSetup, train
from training.lora import add_adapters, load_adapter, merge_adapters, save_adapter
from training.memory import explain_lack_of_memory
from training.mirror import mirrored
from training.optimizer import make_optimizer
from training.stopping import StopSignals


@dataclass(frozen=True)
class OpenRun:
    """A run folder with its model in memory."""

    job: Job
    model: GPTModel
    checkpoints: Checkpoints
    trained: TrainingState | None  # final state, if the run was stopped after training

    @property
    def folder(self) -> Path:
        return self.job.folder


@contextlib.contextmanager
def open_run(job: Job) -> Iterator[OpenRun]:
    """Load the model, and create the run folder or check the one to resume.

    Inside this context, running out of memory raises an error with advice, Ctrl-C prints how to resume, and `--track`
    mirrors the run. If the output is closed, `log.txt` says so. At the end, the checkpoint is deleted unless
    `--keep-checkpoint` is given.

    Raises:
        UserError: the model is damaged, the folder can't be created, or its run can't be resumed.
    """
    with explain_lack_of_memory(model_size(job), job.settings.training, job.machine):
        run = load_run(job)
        tracker = job.settings.run.track if job.machine.primary else "none"
        with resumable(run.folder), mirrored(tracker, run.folder):
            if job.machine.primary:
                log_lost_screen(run.folder)
                write_json(run.folder / "ledger.json", job.ledger.to_json())
                write_learned(run.job)
            yield run
    if job.machine.primary and not job.settings.run.keep_checkpoint:
        run.checkpoints.remove()


def load_run(job: Job) -> OpenRun:
    """Load the model, then create the run folder or check the one to resume; see `open_run`."""
    training, tokenizer, folder = job.settings.training, job.data.conversations.renderer.tokenizer, job.run_folder
    fingerprints = {"conversations": fingerprint(job.data)}
    with ThreadPoolExecutor(1) as executor:
        checksum = executor.submit(weights_checksum, job.source)  # runs while the model is loaded

        def record() -> Record:
            return Record(job.facts, job.machine.record(), {**fingerprints, "model": checksum.result()})

        trained = check_resumed(folder, job, record()) if folder else None
        # adapter/ holds no base weights, so load them from the source.
        weights = folder / "model" if folder and trained and not training.lora_rank else job.source
        model = make_model(weights, training, tokenizer, job.machine)
    if folder and trained and training.lora_rank:
        load_adapter(model, folder / "adapter")
    lock = job.lock
    if job.machine.primary:
        if not folder:
            name, needed = Path(job.settings.model.name).resolve().name, 4 * count_parameters(model.config)
            if training.keep == "best" and not training.lora_rank:
                needed *= 2
            folder = create_run_folder(job.settings.run.run_dir, name, needed)
            lock = lock_run_folder(folder)
        display(f"run folder: {folder}")
        write_settings(folder, job.settings, job.source, record())
        copy_vocabulary(job.source, folder / "model", tokenizer)  # now: the source may change during training
        write_rendered(folder, job.data)
    folder = Path(job.machine.agree(str(folder)))
    on_gpu = job.machine.device.type == "cuda"
    checkpoints = Checkpoints(folder / "checkpoint", record().fingerprints, job.machine.primary, copies_best=on_gpu)
    return OpenRun(replace(job, run_folder=folder, lock=lock), model, checkpoints, trained)


def check_resumed(folder: Path, job: Job, record: Record) -> TrainingState | None:
    """Check that the run in `folder` can be resumed; return its state if training is over.

    Raises:
        UserError: the run is finished, or its conversations or model have changed.
    """
    check_record(folder, record)
    checkpoints = Checkpoints(folder / "checkpoint", record.fingerprints)
    trained = checkpoints.trained(job.total_steps)
    over = trained if job.settings.run.keep_checkpoint else not checkpoints.folder.exists()
    if over and (folder / OUTPUT).exists():
        longer = (
            "its length was set by --max-minutes"
            if trained and trained.measured
            else "more --epochs extend it if its checkpoint was kept (--keep-checkpoint)"
        )
        raise UserError(f"{folder} has finished; {longer}, and --model {folder} starts a new run from its model")
    return trained


def make_model(folder: Path, training: TrainingSettings, tokenizer: tiktoken.Encoding, machine: Machine) -> GPTModel:
    """Load the model of `folder` onto the machine, with embeddings for new tokens, and for LoRA with adapters.

    Frozen weights are bf16 if the machine computes in bf16: they take half the memory and need no casts.
    """
    frozen_dtype = torch.bfloat16 if training.lora_rank and machine.precision == "bf16" else torch.float32
    # Add adapters on the CPU, whose random numbers are the same on every machine.
    device = torch.device("cpu") if training.lora_rank else machine.device
    model = load_model(folder, training.dropout, frozen_dtype, device)[0]
    new_tokens = tokenizer.n_vocab - model.config.vocab_size
    add_embeddings(model, tokenizer.n_vocab)
    if training.lora_rank:
        add_adapters(model, training.lora_rank, training.seed, new_tokens)
    return model.to(machine.device)


def train_model(run: OpenRun) -> TrainingState:
    """Train the model of a run, save it in the run folder, and return the final state.

    Raises:
        UserError: a loss is NaN or infinite, or the disk is full.
    """
    if run.trained:
        display(f"training already finished after {run.trained.step} steps")
        run.job.machine.leave()
        return run.trained
    return_freed_memory()  # otherwise the base model's packed weights would fragment the memory for training
    job, tokenizer = run.job, run.job.data.conversations.renderer.tokenizer

    def after_epoch(number: int) -> None:
        if job.settings.run.keep_epochs and job.machine.primary:
            copy_vocabulary(run.folder / "model", run.folder / "epochs" / str(number), tokenizer)
            save(run, run.folder / "epochs" / str(number))

    setup = TrainingSetup(
        model=run.model,
        optimizer=make_optimizer(run.model, job.settings.training),
        examples=Examples(job.datasets["train"], job.datasets["val"], tokenizer.eot_token),
        settings=job.settings.training,
        saving=job.settings.run,
        machine=job.machine,
        checkpoints=run.checkpoints,
        processes=job.facts.processes,
        # The model is the same in all processes, so one generates the reply.
        watch=make_watch(run) if job.settings.run.watch and job.machine.primary else None,
    )
    with StopSignals(job.machine) as signals:
        trainer = Trainer(setup)
        state = train(trainer, signals, after_epoch)
        if job.machine.primary:
            if job.settings.training.lora_rank:
                save_adapter(run.model, run.folder / "adapter", base_name(job))  # save before the adapters are merged
            save(run, run.folder / "model", run.checkpoints.spare(state))
            (run.folder / OUTPUT).unlink(missing_ok=True)  # an extended run has those of the shorter run
            run.checkpoints.mark_trained(state)
        del trainer  # delete now: a signal during the progress bar's destructor would be lost
    job.machine.leave()
    return state


def save(run: OpenRun, target: Path, spare: Path | None = None) -> None:
    """Write the model of a run, adapters merged, into the model folder `target`, which already has its vocabulary.

    Args:
        spare: a file to overwrite; see `atomic_path`.
    """
    description = run.job.data.conversations.describe(run.job.data.parts["train"])
    lora = run.job.settings.training.lora_rank
    merged = merge_adapters(run.model, read_weights(run.job.source)) if lora else None
    save_description(run.model, target, description)
    save_weights(run.model, target, parameters=merged, spare=spare)


def make_watch(run: OpenRun) -> Callable[[], dict[str, str]]:
    """Return a function that generates the current model's reply in the first case, next to the true reply."""
    job, renderer = run.job, run.job.data.conversations.renderer
    first = job.data.conversations[job.data.held_out[0]]
    learn, generation = job.settings.data.learn, job.settings.generation
    config = CompletionConfig(renderer, learn, generation, job.seed, one_turn=True)

    def watch() -> dict[str, str]:
        (case,) = complete_dialogues(Decoder(run.model), [first], config)
        return case._replace(true=case.true[:1]).as_texts(renderer.name)

    return watch


def base_name(job: Job) -> str:
    """The name by which other programs find the adapters' base model."""
    return HUB_IDS.get(job.settings.model.name, str(job.source.absolute()))


def finished_decoder(run: OpenRun) -> Decoder:
    """Return a decoder for the trained model of a run."""
    return_freed_memory()  # from gradients and moments, to make room for the bf16 copy
    return Decoder(run.model, run.job.machine.inference_dtype)
