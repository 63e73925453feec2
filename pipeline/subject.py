"""Choose the conversations and replies for measuring models."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dialogues.batches import DialogueDataset
from evaluation.comparison import REPLY_TOKENS
from evaluation.likelihood import Subject
from evaluation.scoring import choose_replies
from evaluation.voice import choose_voices
from pipeline.job import Data
from pipeline.prepare import choose_length, read_rendered, read_turns, rendered_path
from pipeline.train import OpenRun
from settings import GenerationSettings
from support.errors import UserError, display
from talking.generation import choose_turn
from training.device import Machine
from training.loop import TRAIN_SAMPLE

MOST_DIALOGUES = 1000  # maximum number of dialogues measured per part at the end of a run
FEWEST_REPLIES = 5
FEWEST_VOICES, MOST_VOICES = 24, 200  # number of replies whose speaker is guessed
ENOUGH_REPLIES = 10  # with fewer scored replies (below 300 training examples), guessing speakers would take too long
REPLIES = 100  # number of replies that evaluate.py scores; if there are more held-out dialogues, one per dialogue
TRAINED_FOR_EACH_REPLY = 30  # training examples per scored reply, so that scoring stays a small part of a run's time


def replies_after(training_examples: int) -> int:
    """Return the number of replies to score after training on this many examples, summed over the epochs."""
    return min(MOST_DIALOGUES, max(FEWEST_REPLIES, training_examples // TRAINED_FOR_EACH_REPLY))


@dataclass(frozen=True)
class Scope:
    """How much to measure."""

    length: int  # maximum number of tokens that a model sees at a time
    dialogues: int  # maximum number of dialogues per part whose loss is measured
    replies: int  # maximum number of replies to score
    answers: int  # number of dialogues with a generated reply, including the shown cases
    generation: GenerationSettings
    seed: int

    @property
    def voices(self) -> int:
        """The number of replies whose speaker is guessed."""
        return min(MOST_VOICES, max(FEWEST_VOICES, self.replies)) if self.replies >= ENOUGH_REPLIES else 0


def choose_subject(data: Data, run: Path | None, machine: Machine, scope: Scope) -> Subject:
    """Choose the measured part of `data`: a sample of each part for the loss, and held-out dialogues for the rest.

    Args:
        run: the folder of the run that trained the model, if there is one.
    """
    random = np.random.default_rng(scope.seed)

    def draw(numbers: np.ndarray, size: int) -> np.ndarray:
        return numbers if len(numbers) <= size else np.sort(random.choice(numbers, size, replace=False))

    parts = {name: draw(numbers, scope.dialogues) for name, numbers in data.parts.items()}
    if "train" in parts:
        parts["train"] = data.parts["train"][:TRAIN_SAMPLE]
    datasets = {name: DialogueDataset(data.conversations, numbers, scope.length) for name, numbers in parts.items()}
    if "train" in parts:  # use the examples that the training loop evaluates
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
        voices=choose_voices(data.conversations, data.held_out, scope.voices, scope.seed),
        answered=answered,
        reply_tokens=min(REPLY_TOKENS, longest_reply(data, answered)),
        training=(lambda: read_turns(rendered, renderer, speakers)) if rendered and rendered.exists() else None,
        generation=scope.generation,
        seed=scope.seed,
        autocast=machine.autocast,
        trained=data.parts.get("train"),
    )


def leave_out_trained(data: Data, run: Path) -> Data:
    """`data` without the dialogues that the model of `run` was trained on.

    Raises:
        UserError: no dialogues are left.
    """
    rendered = rendered_path(run, "train")
    if not rendered.exists():
        display(f"{rendered} is missing, so dialogues that the model was trained on can't be left out")
        return data
    trained = set(map(hash, read_rendered(rendered)))
    new = [number for number in data.held_out.tolist() if hash(data.conversations.render(number)) not in trained]
    seen = len(data.held_out) - len(new)
    if not new:
        raise UserError(f"{data.name}: {run} was trained on all of these conversations; choose others with --data")
    if seen:
        display(f"left out: {seen:,} of {len(data.held_out):,} dialogues, because the model was trained on them")
    return data._replace(parts={"all": np.array(new)})


def longest_reply(data: Data, dialogues: Sequence[int]) -> int:
    """Return the number of tokens in the longest true reply of these dialogues."""
    conversations = data.conversations
    turns = [choose_turn(conversations.renderer, conversations[number], conversations.learn) for number in dialogues]
    texts = [conversations.texts_of(number)[turn].tolist() for number, turn in zip(dialogues, turns, strict=True)]
    return max(end - start for start, end, _ in texts)


def subject_of_run(run: OpenRun) -> Subject:
    """Choose the data on which a run's model is measured, before and after training."""
    job, settings = run.job, run.job.settings
    replies = replies_after((settings.training.epochs or 1) * len(job.data.parts["train"]))
    length = choose_length(settings.data.max_length, job.config.n_positions)
    scope = Scope(length, MOST_DIALOGUES, replies, 0, settings.generation, job.seed)
    return choose_subject(job.data, run.folder, job.machine, scope)
