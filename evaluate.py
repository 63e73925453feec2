"""Measure a model on conversations that it has not seen: find → read → load → score → generate → report."""

if __name__ == "__main__":  # before the imports, which take a while: a Ctrl-C in it is one line too
    from support.errors import run_script

    run_script("evaluate")

import time
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dialogues.inputs import PIPE
from dialogues.reading import name_formats
from pipeline.finished_model import FinishedModel, find_base, find_finished_model
from pipeline.job import Data
from pipeline.prepare import choose_length, fingerprint, open_data, read_conversations, read_data
from pipeline.run_folder import check_report_folder, lock_run_folder, make_report_folder
from pipeline.run_settings import read_facts, read_fingerprints
from settings import ConversationSettings, EvaluateSettings
from support.command_line import parse_command_line
from support.errors import UserError, check_one_process, display
from support.files import resolved

if TYPE_CHECKING:
    from dialogues.conversations import Conversations
    from training.device import Machine


def main() -> None:
    """The whole job.

    Raises:
        UserError: something that the user can mend.
    """
    started = time.perf_counter()
    named = parse_command_line(EvaluateSettings)
    measured = find_finished_model(named.model, named.model_path)
    check_one_process("an evaluation")
    settings, own = complete_options(measured, named)
    data = read_held_out(measured, settings, own)
    folder = settings.report_dir or (measured.run if own else None)
    if folder:
        check_report_folder(folder, measured.run or measured.folder)  # before the work, not after it
    inside = folder and measured.run and resolved(folder) == resolved(measured.run)
    lock = lock_run_folder(folder) if folder and inside else None

    from evaluation.comparison import Column, measure_column
    from evaluation.results import Origin
    from load_gpt2_weights import load_for, read_config
    from pipeline.measure import write_evaluation
    from pipeline.subject import REPLIES, Scope, choose_subject, leave_out_trained
    from talking.decoder import Decoder
    from training.device import choose_machine, keep_freed_memory

    keep_freed_memory()
    config, tokenizer = read_config(measured.folder / "config.json"), data.conversations.renderer.tokenizer
    check_speakers(data.conversations, measured, config.vocab_size)
    machine = choose_machine(settings.device, settings.precision)
    base = find_base(measured, settings.base, settings.model_path, display)
    print_plan(measured.folder, base, data, own, machine)
    if measured.run and not own:
        data = leave_out_trained(data, measured.run)
    asked = settings.dialogues
    length, replies = choose_length(settings.data.max_length, config.n_positions), max(REPLIES, len(data.held_out))
    scope = Scope(length, asked, min(asked, replies), asked, settings.generation, settings.seed)
    subject = choose_subject(data, measured.run, machine, scope)

    def measure(folder: Path, whole: bool = False) -> Column:
        model = load_for(tokenizer, folder, machine.device, machine.inference_dtype)
        try:
            return measure_column(Decoder(model, machine.inference_dtype), subject, whole=whole)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None

    columns = {"model": measure(measured.folder, whole=True)}
    if base:
        columns["base"] = measure(base)
    folder = make_report_folder(folder, measured.run or measured.folder)
    origin = Origin(str(measured.folder), base and str(base), data.name, machine.device.type, machine.precision)
    page = write_evaluation(columns, origin, subject, folder, measured.run if own else None)
    del lock  # until here nobody else may work there
    display(
        f"\nwritten: {folder / 'evaluation.json'}; the report: {page}; {time.perf_counter() - started:.0f} s in all"
    )


def complete_options(measured: FinishedModel, named: EvaluateSettings) -> tuple[EvaluateSettings, bool]:
    """The options, those that were left open as the model was trained; and whether the data is that of its own run.

    Other conversations may have another form: how they are read is not taken over from the run's.

    Args:
        named: the options as they were typed.

    Raises:
        UserError: the run's conversations came from a pipe, and none were typed.
    """
    recorded, default = measured.recorded, EvaluateSettings()
    if recorded:
        precision, seed = recorded.training.precision, recorded.training.seed
        default = replace(default, generation=recorded.generation, precision=precision, seed=seed)
        known = {field.name: getattr(recorded.data, field.name) for field in fields(ConversationSettings)}
        data = replace(ConversationSettings(**known), mask=False)  # on when the run has it on, or the command line
        settings = parse_command_line(EvaluateSettings, default=replace(default, data=data))
        if PIPE in recorded.data.paths and named.data.paths == ConversationSettings.paths:
            raise UserError(
                f"{measured.run} was trained on conversations from a pipe, and no copy was kept; name conversations"
                " with --data"
            )
        if list(map(resolved, settings.data.locate())) == list(map(resolved, recorded.data.paths)):
            mask = settings.data.mask or recorded.data.mask
            return replace(settings, data=replace(settings.data, mask=mask)), True
    known = {name: measured.dialogue[name] for name in ("template", "learn") if name in measured.dialogue}
    default = replace(default, data=ConversationSettings(**known))
    return parse_command_line(EvaluateSettings, default=default), False


def read_held_out(measured: FinishedModel, settings: EvaluateSettings, own: bool) -> Data:
    """The conversations: all of a file, or those of the model's own run, divided as they were for it.

    Raises:
        UserError: they can't be read, or are not those of the run any more, so that nothing is known to be held out.
    """
    recorded, run = measured.recorded, measured.run
    if not (own and recorded and run):
        return read_conversations(open_data(settings.data), measured.folder, settings.data)
    seed, fold = recorded.training.seed, read_facts(run).fold
    data = read_data(open_data(recorded.data), measured.folder, recorded.data, seed, fold)
    if fingerprint(data) != read_fingerprints(run).get("conversations"):
        raise UserError(
            f"{data.name} is not what {run} was trained with, so nothing in it is known to be held out;"
            " restore it, or name other conversations with --data"
        )
    chosen = {field.name: getattr(settings.data, field.name) for field in fields(settings.data)}
    if replace(recorded.data, **chosen) == recorded.data:
        return data
    return read_data(open_data(settings.data), measured.folder, replace(recorded.data, **chosen), seed, fold)


def check_speakers(conversations: "Conversations", measured: FinishedModel, vocab_size: int) -> None:
    """Say when other people speak than those that the model knows.

    Raises:
        UserError: it knows people by tokens of their own, and has none for these.
    """
    known = measured.dialogue.get("speakers", [])
    strangers = [name for name in conversations.speakers if name not in known]
    pairs = " ".join(f"{new}={old}" for new, old in zip(strangers, known, strict=False))
    text = f"{', '.join(strangers[:4])} speak, and the model was trained with {', '.join(known[:4])}"
    if conversations.renderer.tokenizer.n_vocab > vocab_size:
        if measured.dialogue.get("template") != "tokens":
            raise UserError("--template tokens: the model has no tokens for speakers; leave it out")
        raise UserError(f"{text}: they have no token in it; give them names it knows: --rename {pairs}")
    if known and strangers:
        display(f"speakers: {text}; --rename {pairs} measures them as these")


def print_plan(folder: Path, base: Path | None, data: Data, own: bool, machine: "Machine") -> None:
    beside = f", beside {base}" if base else ""
    display(f"model: {folder}{beside}", machine.explanation)
    what = f"the {len(data.held_out):,} that the run held out ({data.held_out_part})" if own else "all of them"
    template, learn = data.conversations.renderer.name, data.conversations.learn
    total = f"{len(data.conversations):,} dialogues"
    formats = name_formats(data.sources)
    display(f"data: {data.name} ({formats}), {total}, measured on {what}; {template}; learned: {learn}")
    display(*data.notes)
