"""A blind test: which of two replies is real, and which did the model write? This is the game without input and output.

Each round shows a held-out history, the true reply, and a reply that the model generates as in a chat.
"""

import contextlib
import random
import re
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from dialogues.dialogue import ALPACA_SPEAKERS, Dialogue, Turn
from settings import AnswerSettings
from support.errors import UserError
from talking.conversation import Conversation, People
from talking.guesses import GUESSES, add_guess, read_guesses, score_of

SHOWN_TURNS = 6  # maximum turns of history to show; the model sees all of them
FEWEST_WORDS = 5  # do not cut a reply below this
TRIES = 3  # replies to generate for a place before it is skipped


class HeldOut(NamedTuple):
    """The dialogues of a held-out part, and the speakers whose replies are shown."""

    part: str
    dialogues: Sequence[Dialogue]
    speakers: Sequence[str]


class Place(NamedTuple):
    """A reply in a held-out part; both numbers count from 1."""

    dialogue: int
    turn: int


class Round(NamedTuple):
    place: Place
    history: Sequence[Turn]
    speaker: str
    texts: tuple[str, str]
    real: int  # 1 or 2: the number of the true reply
    repeated: bool  # whether this place was shown before


class Game:
    """Makes rounds and keeps the guesses. Several threads may use it.

    Attributes:
        path: the file with all guesses, including those of earlier sessions.
        score: the score of all guesses.
    """

    def __init__(
        self, held_out: HeldOut, conversation: Conversation, settings: AnswerSettings, folder: Path, seed: int | None
    ) -> None:
        """Find the replies that can be shown.

        Args:
            conversation: generates the replies; the game replaces its turns and people.
            folder: the run folder.
            seed: makes the places and the order repeatable; None: random.

        Raises:
            UserError: no reply can be shown, or `guesses.json` is damaged.
        """
        self.held_out, self.conversation, self.settings = held_out, conversation, settings
        self.people = conversation.people
        self.path, self.random, self.lock = folder / GUESSES, random.Random(seed), threading.Lock()
        self.places = find_places(held_out, conversation.renderer.name == "alpaca")
        if not self.places:
            names = ", ".join(held_out.speakers[:8])
            raise UserError(f"{folder}: the held-out conversations ({held_out.part}) have no reply by {names}")
        guesses = read_guesses(self.path)
        self.score = score_of(guesses)
        own = (guess for guess in guesses if guess["part"] == held_out.part)
        self.shown = Counter(Place(guess["dialogue"], guess["turn"]) for guess in own)

    def next_round(self) -> Round | None:
        """Make a round at a place that was shown least often; None if the model has no usable reply anywhere.

        Raises:
            UnusableModelError: the model's logits are NaN or infinite.
        """
        with self.lock:
            while self.places:
                fewest = min(self.shown[place] for place in self.places)
                place = self.random.choice([place for place in self.places if self.shown[place] == fewest])
                if texts := self.make_texts(place):
                    self.shown[place] += 1
                    real = self.random.choice((1, 2))
                    turns = self.held_out.dialogues[place.dialogue - 1].turns
                    history = turns[max(0, place.turn - 1 - SHOWN_TURNS) : place.turn - 1]
                    ordered = texts if real == 1 else (texts[1], texts[0])
                    return Round(place, history, turns[place.turn - 1].speaker, ordered, real, fewest > 0)
                self.places.remove(place)
        return None

    def make_texts(self, place: Place) -> tuple[str, str] | None:
        """Return the true and a generated reply of comparable length; None if every attempt is empty or identical."""
        dialogue = self.held_out.dialogues[place.dialogue - 1]
        true = dialogue.turns[place.turn - 1].text
        for _ in range(TRIES):
            generated, unfinished = self.generate(dialogue, place.turn - 1, max(len(true.split()), FEWEST_WORDS))
            texts = cut_alike(true, generated, unfinished)
            if generated and texts[0] != texts[1]:
                return texts
        return None

    def generate(self, dialogue: Dialogue, turn: int, words: int) -> tuple[str, bool]:
        """Return the model's reply, stopped soon after `words` words, and whether it hit the token limit."""
        talk = self.conversation
        talk.start_over()
        talk.turns += dialogue.turns[:turn]
        talk.people = people_at(dialogue, turn, self.people)
        text = ""
        with contextlib.closing(talk.answer(self.settings)) as pieces:
            for piece in pieces:
                text += piece
                if len(text.split()) > words:  # the rest would be cut
                    break
        return text, talk.cut_off

    def take(self, made: Round, choice: int) -> bool:
        """Keep a guess, 1 or 2, and return whether it is right.

        Raises:
            UserError: `guesses.json` can't be written.
        """
        correct = choice == made.real
        guess = {"part": self.held_out.part, **made.place._asdict(), "correct": correct}
        with self.lock:
            self.score = score_of(add_guess(self.path, {**guess, "sampling": asdict(self.settings)}))
        return correct


def find_places(held_out: HeldOut, alpaca: bool) -> list[Place]:
    """The replies that can be shown: all turns with text after the first, by the speakers in question.

    An instruction model sees only one turn in a chat, so it is asked only for responses to an instruction alone.
    """
    speakers = set(held_out.speakers)
    return [
        Place(number, place)
        for number, dialogue in enumerate(held_out.dialogues, start=1)
        for place, turn in enumerate(dialogue.turns, start=1)
        if place > 1 and turn.text and turn.speaker in speakers
        if not alpaca or (place == 2 and turn.speaker == ALPACA_SPEAKERS[-1])
    ]


def people_at(dialogue: Dialogue, turn: int, known: People) -> People:
    """The speakers of a place in a dialogue: the model plays the one whose turn it is."""
    you = dialogue.turns[turn].speaker
    names = dict.fromkeys((*(each.speaker for each in dialogue.turns), known.me, known.you, *known.others))
    me, *others = (name for name in names if name != you)
    return People(me, you, dialogue.instruction, tuple(others))


def cut_alike(true: str, generated: str, unfinished: bool) -> tuple[str, str]:
    """Cut both replies to one word less than the shorter one has, but not below FEWEST_WORDS.

    So both end in the middle of a sentence, and the cut does not show which one was longer. Replies of equal length
    stay whole, unless the generated one is `unfinished`.
    """
    lengths = len(true.split()), len(generated.split())
    if lengths[0] == lengths[1] and not unfinished:
        return true, generated
    limit = max(FEWEST_WORDS, min(lengths) - 1)
    return cut(true, limit), cut(generated, limit)


def cut(text: str, words: int) -> str:
    """The first `words` words of a text, with an ellipsis if there are more."""
    ends = [word.end() for word in re.finditer(r"\S+", text)]
    return text if len(ends) <= words else f"{text[: ends[words - 1]]}\N{NO-BREAK SPACE}…"


def choose_speakers(learn: str, speakers: Sequence[str], you: str | None) -> list[str]:
    """The speakers whose replies are shown: those that the model has learned, or only `you`.

    Args:
        learn: what the model has learned: all, replies, or a speaker's name.
    """
    one = learn in speakers and learn not in ("all", "replies")  # these words may also be names
    return [you] if you else [learn] if one else list(speakers)
