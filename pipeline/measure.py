"""Models measured on held-out conversations: the end of every training, and all of evaluate.py."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from dialogues.batches import DialogueDataset
from evaluation.comparison import REPLY_TOKENS, Column, compare, measure_column
from evaluation.findings import describe_size, find_out, measure_overfitting, short_table
from evaluation.likelihood import Subject
from evaluation.report import write_report
from evaluation.results import DAMAGED, Evaluation, Options, Origin, Size
from evaluation.run_files import EVALUATION_VERSION, read_lines, read_losses
from evaluation.scoring import choose_replies
from pipeline.job import Data
from pipeline.prepare import choose_length, read_rendered, read_turns, rendered_path
from pipeline.train import OpenRun
from settings import GenerationSettings
from support.errors import UserError
from support.files import read_json_object, write_json
from talking.decoder import Decoder
from talking.generation import Case, choose_turn
from training.device import Machine
from training.loop import TRAIN_SAMPLE

BASE = "base_evaluation.json"  # what was measured before the training
MOST_DIALOGUES = 1000  # of a part, at the end of a training
FEWEST_REPLIES = 5
REPLIES = 100  # that evaluate.py scores of few dialogues; of many it scores one each
TRAINED_FOR_EACH_REPLY = 30  # examples; so scoring stays a small part of a training's time


def replies_after(training_examples: int) -> int:
    """How many replies are scored after a training of so many examples, each as often as it was seen."""
    return min(MOST_DIALOGUES, max(FEWEST_REPLIES, training_examples // TRAINED_FOR_EACH_REPLY))


@dataclass(frozen=True)
class Scope:
    """How much is measured, and how."""

    length: int  # the most tokens that a model sees at a time
    dialogues: int  # at most, of each part, whose loss is measured
    replies: int  # at most, that are scored
    answers: int  # dialogues in which a reply is generated, besides those that are shown
    generation: GenerationSettings
    seed: int


def choose_subject(data: Data, run: Path | None, machine: Machine, scope: Scope) -> Subject:
    """Choose what is measured of `data`: the loss on a sample of each part, everything else on the held-out part.

    Args:
        run: the folder of the run in which the model was trained, if there is one.
    """
    random = np.random.default_rng(scope.seed)

    def draw(numbers: np.ndarray, size: int) -> np.ndarray:
        return numbers if len(numbers) <= size else np.sort(random.choice(numbers, size, replace=False))

    parts = {name: draw(numbers, scope.dialogues) for name, numbers in data.parts.items()}
    if "train" in parts:
        parts["train"] = data.parts["train"][:TRAIN_SAMPLE]
    datasets = {name: DialogueDataset(data.conversations, numbers, scope.length) for name, numbers in parts.items()}
    if "train" in parts:  # the same examples by which training measures itself
        datasets["train"].spans = datasets["train"].spans[:TRAIN_SAMPLE]
    cases = scope.generation.cases
    shown, others = data.held_out[:cases], data.held_out[cases:]
    answered = np.concatenate([shown, draw(others, max(0, scope.answers - len(shown)))]).tolist()
    renderer, speakers = data.conversations.renderer, data.conversations.speakers
    rendered = rendered_path(run, "train") if run else None
    return Subject(
        conversations=data.conversations,
        datasets=datasets,
        part=data.held_out_part,
        replies=choose_replies(data.conversations, data.held_out, scope.replies, scope.seed),
        answered=answered,
        reply_tokens=min(REPLY_TOKENS, longest_reply(data, answered)),
        training=(lambda: read_turns(rendered, renderer, speakers)) if rendered and rendered.exists() else None,
        generation=scope.generation,
        seed=scope.seed,
        autocast=machine.autocast,
    )


def leave_out_trained(data: Data, run: Path) -> Data:
    """`data` without the dialogues that the model of `run` was trained on.

    Raises:
        UserError: none is left.
    """
    rendered = rendered_path(run, "train")
    if not rendered.exists():
        print(f"there is no {rendered}: whether the model was trained on some of these is not known")
        return data
    trained = set(map(hash, read_rendered(rendered)))
    new = [number for number in data.held_out.tolist() if hash(data.conversations.render(number)) not in trained]
    seen = len(data.held_out) - len(new)
    if not new:
        raise UserError(f"{data.source.path}: {run} was trained on all of these conversations; name others with --data")
    if seen:
        print(f"{seen:,} of {len(data.held_out):,} dialogues are left out: the model was trained on them")
    return data._replace(parts={"all": np.array(new)})


def longest_reply(data: Data, dialogues: Sequence[int]) -> int:
    """The tokens of the longest true reply in these dialogues."""
    conversations = data.conversations
    turns = [choose_turn(conversations.renderer, conversations[number], conversations.learn) for number in dialogues]
    texts = [conversations.texts_of(number)[turn].tolist() for number, turn in zip(dialogues, turns, strict=True)]
    return max(end - start for start, end, _ in texts)


def subject_of_run(run: OpenRun) -> Subject:
    """Choose what the model of a run is measured on, before and after its training."""
    job, settings = run.job, run.job.settings
    replies = replies_after((settings.training.epochs or 1) * len(job.data.parts["train"]))
    length = choose_length(settings.data.max_length, job.config.n_positions)
    scope = Scope(length, MOST_DIALOGUES, replies, 0, settings.generation, job.seed)
    return choose_subject(job.data, run.folder, job.machine, scope)


def measure_base(run: OpenRun, subject: Subject) -> Column | None:
    """Measure the model that a run starts from, or read what was measured before the run was stopped.

    Now, while it is in memory; of several processes one is enough. None for a run that was trained without this: the
    base model is not in memory any more.
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
        why = f"{path} {'is of other options' if path.exists() else 'is not there'}"
        print(f"base model: left out ({why}); python evaluate.py {run.folder} measures both")
        return None
    column = measure_column(Decoder(run.model, machine.inference_dtype), subject)
    write_json(path, {"subject": key, **column.to_json()})
    return column


def write_evaluation(
    columns: dict[str, Column], origin: Origin, subject: Subject, folder: Path, trained: Path | None
) -> Path:
    """Write `evaluation.json` and the report into `folder`, print the main numbers and the findings.

    Args:
        columns: the measurements of each model: "model", and "base" for the one that it began as.
        trained: the folder of the run to whose validation part this belongs, if there is one.

    Returns:
        The path of the report.

    Raises:
        UserError: nothing can be written there.
    """
    found = compare(columns, subject)
    logs = trained and trained / "metrics.jsonl"
    losses = read_losses(read_lines(logs, []) if logs and logs.exists() else [])
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
    )
    findings = find_out(evaluation, losses)
    write_json(folder / "evaluation.json", replace(evaluation, findings=findings).to_json())
    if subject.training is None and trained:
        print(f"memorisation: not measured (there is no {rendered_path(trained, 'train')})")
    print("", describe_size(evaluation.size), sep="\n")
    print(*short_table(evaluation.metrics), "", *findings, sep="\n")
    return write_report(folder)


def measure_run(run: OpenRun, subject: Subject, base: Column | None, decoder: Decoder, cases: list[Case]) -> Path:
    """Measure the trained model of a run, whose `cases` are written, beside its base; see `write_evaluation`."""
    columns = {"model": measure_column(decoder, subject, cases)} | ({"base": base} if base else {})
    job = run.job
    origin = Origin(
        model=str(run.folder / "model"),
        base_model=str(job.source),
        file=str(job.data.source.path),
        device=job.machine.device.type,
        precision=job.machine.precision,
    )
    return write_evaluation(columns, origin, subject, run.folder, run.folder)
