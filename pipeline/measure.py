"""Evaluate models on held-out conversations, at the end of every run and for evaluate.py."""

import contextlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from evaluation.comparison import Column, compare, measure_column
from evaluation.exposure import measure_exposure
from evaluation.findings import describe_size, find_out, measure_overfitting, short_table
from evaluation.likelihood import Subject
from evaluation.report import write_report
from evaluation.results import DAMAGED, Evaluation, Options, Origin, Size
from evaluation.run_files import EVALUATION_VERSION, number, read_lines, read_losses
from pipeline.model_card import write_card
from pipeline.prepare import rendered_path
from pipeline.train import OpenRun
from support.errors import UserError, command_for, display
from support.files import Json, read_json_object, write_json
from talking.decoder import Decoder
from talking.generation import Case

BASE = "base_evaluation.json"  # measurements of the base model, made before training


def measure_base(run: OpenRun, subject: Subject) -> Column | None:
    """Measure the base model of a run, or read the measurements made before the run was stopped.

    Call this while the base model is in memory. Only the first process measures; the others return None. A run
    that was trained without these measurements also gets None: its base model is no longer in memory.
    """
    machine = run.job.machine
    if not machine.primary:
        return None
    path = run.folder / BASE
    measured = [EVALUATION_VERSION, subject.seed, subject.replies, subject.answered, asdict(subject.generation)]
    key = json.loads(json.dumps(measured))
    # Recompute if it is damaged or was made with other options.
    with contextlib.suppress(UserError, *DAMAGED):
        known = read_json_object(path)
        if known["subject"] == key:
            return Column.from_json(known)
    if run.trained:
        why = f"{path} {'was made with other options' if path.exists() else 'is missing'}"
        display(f"base model: left out ({why}); {command_for('evaluate.py')} {run.folder} measures both")
        return None
    column = measure_column(Decoder(run.model, machine.inference_dtype), subject)
    write_json(path, {"subject": key, **column.to_json()})
    return column


def read_logs(run: Path) -> list[Json]:
    """The lines of a run's metrics.jsonl, if it exists."""
    path = run / "metrics.jsonl"
    return read_lines(path, []) if path.exists() else []


def write_evaluation(
    columns: dict[str, Column], origin: Origin, subject: Subject, folder: Path, trained: Path | None
) -> Path:
    """Write `evaluation.json` and the report into `folder`; print the main metrics and the findings.

    A run's own evaluation also goes into its model card.

    Args:
        columns: the measurements of each model: "model", and "base" for its base model.
        trained: the folder of the run whose held-out part was measured, if any; its losses go into the report.

    Returns:
        The path of the report.

    Raises:
        UserError: `folder` can't be written.
    """
    found = compare(columns, subject)
    losses = read_losses(read_logs(trained) if trained else [])
    conversations = subject.conversations
    dialogues = {name: len(dataset.dialogues) for name, dataset in subject.datasets.items()}
    evaluation = Evaluation(
        origin=origin,
        size=Size(subject.part, dialogues, len(subject.replies), len(subject.answered)),
        options=Options(
            seed=subject.seed,
            template=conversations.renderer.name,
            learn=conversations.learn,
            max_length=subject.length,
            reply_tokens=subject.reply_tokens,
            generation=subject.generation,
            signatures=found.signatures,
        ),
        metrics=found.metrics,
        cases=found.cases,
        overfitting=measure_overfitting(losses),
        exposure=columns["model"].exposure,
    )
    findings = find_out(evaluation, losses)
    write_json(folder / "evaluation.json", replace(evaluation, findings=findings).to_json())
    if subject.training is None and trained:
        display(f"memorisation: not measured ({rendered_path(trained, 'train')} is missing)")
    display("", describe_size(evaluation.size))
    display(*short_table(evaluation.metrics), "", *findings)
    if folder == trained:
        write_card(folder)
    return write_report(folder)


def measure_trained(decoder: Decoder, subject: Subject, run: Path | None, written: list[Case] | None = None) -> Column:
    """Measure a fine-tuned model, and if the data is that of its `run`, the private strings that it gives away.

    Args:
        written: existing completions; None: generate them, completing the shown dialogues to their end.
    """
    column = measure_column(decoder, subject, written, whole=True)
    if run is None or subject.trained is None:
        return column
    epochs = max([number(line.get("epoch")) or 0 for line in read_logs(run)], default=0)
    tokens = int(np.diff(subject.conversations.starts)[subject.trained].sum())
    return replace(column, exposure=measure_exposure(decoder, subject, epochs * tokens))


def measure_run(run: OpenRun, subject: Subject, base: Column | None, decoder: Decoder, cases: list[Case]) -> Path:
    """Compare the trained model of a run, which generated `cases`, with its base; see `write_evaluation`."""
    columns = {"model": measure_trained(decoder, subject, run.folder, cases)} | ({"base": base} if base else {})
    job = run.job
    origin = Origin(
        model=str(run.folder / "model"),
        base_model=str(job.source),
        file=job.data.name,
        device=job.machine.device.type,
        precision=job.machine.precision,
    )
    return write_evaluation(columns, origin, subject, run.folder, run.folder)
