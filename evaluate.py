"""Measure a model on held-out conversations: find → read → load → score → generate → report."""

if __name__ == "__main__":  # before the slow imports, so that Ctrl-C during them also prints just one line
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
from pipeline.run_folder import check_report_folder, find_run, lock_run_folder, make_report_folder
from pipeline.run_settings import read_facts, read_fingerprints
from settings import ConversationSettings, EvaluateSettings
from support.command_line import check_settings, parse_command_line
from support.errors import UserError, amount, check_one_process, display
from support.files import resolved

if TYPE_CHECKING:
    from dialogues.conversations import Conversations
    from training.device import Machine


def main() -> None:
    """Run the evaluation.

    Raises:
        UserError: a problem that the user can fix.
    """
    started = time.perf_counter()
    named = parse_command_line(EvaluateSettings, check=False)
    if not find_run(named.model):  # the options of a run are checked together with its own
        check_settings(named)
    measured = find_finished_model(named.model, named.model_path)
    check_one_process("an evaluation")
    settings, own = complete_options(measured, named)
    data = read_held_out(measured, settings, own)
    folder = settings.report_dir or (measured.run if own else None)
    if folder:
        check_report_folder(folder, measured.run or measured.folder)  # fail before the work, not after it
    inside = folder and measured.run and resolved(folder) == resolved(measured.run)
    lock = lock_run_folder(folder) if folder and inside else None

    from evaluation.comparison import Column, measure_column
    from evaluation.results import Origin
    from load_gpt2_weights import load_for, read_config
    from pipeline.measure import measure_trained, write_evaluation
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

    def measure(folder: Path) -> Column:
        model = load_for(tokenizer, folder, machine.device, machine.inference_dtype)
        decoder = Decoder(model, machine.inference_dtype)
        try:
            trained = folder == measured.folder
            return measure_trained(decoder, subject, measured.run) if trained else measure_column(decoder, subject)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None

    columns = {"model": measure(measured.folder)}
    if base:
        columns["base"] = measure(base)
    folder = make_report_folder(folder, measured.run or measured.folder)
    origin = Origin(str(measured.folder), base and str(base), data.name, machine.device.type, machine.precision)
    page = write_evaluation(columns, origin, subject, folder, measured.run if own else None)
    del lock  # held until the report is written
    display(f"\nwritten: {folder / 'evaluation.json'}; report: {page}; {time.perf_counter() - started:.0f} s in total")


def complete_options(measured: FinishedModel, named: EvaluateSettings) -> tuple[EvaluateSettings, bool]:
    """Fill in unset options from the model's training; also return whether the data is that of the model's run.

    Other conversations may have a different format, so the run's options for reading do not apply to them.

    Args:
        named: the options given on the command line.

    Raises:
        UserError: the run's conversations came from a pipe, and no others were given.
    """
    recorded, default = measured.recorded, EvaluateSettings()
    if recorded:
        precision, seed = recorded.training.precision, recorded.training.seed
        default = replace(default, generation=recorded.generation, precision=precision, seed=seed)
        known = {field.name: getattr(recorded.data, field.name) for field in fields(ConversationSettings)}
        data = replace(ConversationSettings(**known), mask=False)  # combined with the run's --mask below
        settings = parse_command_line(EvaluateSettings, default=replace(default, data=data))
        if PIPE in recorded.data.paths and named.data.paths == ConversationSettings.paths:
            raise UserError(
                f"{measured.run} was trained on conversations from a pipe, which were not kept; give conversations"
                " with --data"
            )
        if list(map(resolved, settings.data.locate())) == list(map(resolved, recorded.data.paths)):
            mask = settings.data.mask or recorded.data.mask
            return replace(settings, data=replace(settings.data, mask=mask)), True
    known = {name: measured.dialogue[name] for name in ("template", "learn") if name in measured.dialogue}
    default = replace(default, data=ConversationSettings(**known))
    return parse_command_line(EvaluateSettings, default=default), False


def read_held_out(measured: FinishedModel, settings: EvaluateSettings, own: bool) -> Data:
    """Read the conversations: whole files, or the data of the model's run with the same split.

    Raises:
        UserError: the conversations can't be read, or have changed since the run, so that the held-out part is unknown.
    """
    recorded, run = measured.recorded, measured.run
    if not (own and recorded and run):
        return read_conversations(open_data(settings.data), measured.folder, settings.data)
    seed, fold = recorded.training.seed, read_facts(run).fold
    data = read_data(open_data(recorded.data), measured.folder, recorded.data, seed, fold)
    if fingerprint(data) != read_fingerprints(run).get("conversations"):
        raise UserError(
            f"{data.name} has changed since {run} was trained on it, so its held-out part is unknown;"
            " restore it, or choose other conversations with --data"
        )
    chosen = {field.name: getattr(settings.data, field.name) for field in fields(settings.data)}
    if replace(recorded.data, **chosen) == recorded.data:
        return data
    return read_data(open_data(settings.data), measured.folder, replace(recorded.data, **chosen), seed, fold)


def check_speakers(conversations: "Conversations", measured: FinishedModel, vocab_size: int) -> None:
    """Warn about speakers that the model does not know.

    Raises:
        UserError: the template needs speaker tokens that the model does not have.
    """
    known = measured.dialogue.get("speakers", [])
    strangers = [name for name in conversations.speakers if name not in known]
    unused_first = sorted(known, key=conversations.speakers.__contains__)
    pairs = " ".join(f"{new}={old}" for new, old in zip(strangers, unused_first, strict=False))
    text = f"the data has {', '.join(strangers[:4])}, but the model was trained with {', '.join(known[:4])}"
    if conversations.renderer.tokenizer.n_vocab > vocab_size:
        if measured.dialogue.get("template") != "tokens":
            raise UserError("--template tokens: the model has no speaker tokens; leave this option out")
        raise UserError(f"{text}, and has no tokens for other speakers; rename them: --rename {pairs}")
    if known and strangers and conversations.renderer.name != "alpaca":
        display(f"speakers: {text}; to measure them under the model's names: --rename {pairs}")


def print_plan(folder: Path, base: Path | None, data: Data, own: bool, machine: "Machine") -> None:
    beside = f", compared with {base}" if base else ""
    display(f"model: {folder}{beside}", machine.explanation)
    what = f"the {len(data.held_out):,} held out by the run ({data.held_out_part})" if own else "all of them"
    template, learn = data.conversations.renderer.name, data.conversations.learn
    total = amount(len(data.conversations), "dialogue")
    formats = name_formats(data.sources)
    display(f"data: {data.name} ({formats}), {total}, measured on {what}; template: {template}; learned: {learn}")
    display(*data.notes)
