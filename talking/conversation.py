"""A conversation with a model: what was said, as the model was trained to see it, and its answer word by word."""

import codecs
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

import torch

from dialogues.dialogue import ALPACA, ALPACA_SPEAKERS, ALPACA_WITH_INPUT, INSTRUCTION, Dialogue, Turn
from dialogues.template import Renderer
from dialogues.tokenizer import encode_text
from settings import SamplingSettings
from support.errors import UserError
from talking.decoder import Decoder
from talking.generation import draw, penalize_repetition

STRANGERS = ("You", "Bot")  # default names of the user and the model


class People(NamedTuple):
    """Who talks to whom, and the line that stands before their conversation."""

    me: str
    you: str  # whom the model speaks for
    instruction: str = INSTRUCTION
    others: tuple[str, ...] = ()  # whom the model knows besides, and who must not speak


class Conversation:
    """What was said, and the keys and values of all of it that the model has seen.

    A prompt is the whole conversation as in training, token for token. Of its tokens only those are computed that do
    not stand in the cache already, at the same place behind the same others: a turn costs its own tokens, and after
    `undo` or `again` nothing is computed twice either.

    Attributes:
        turns: all that was said.
        notes: of the last answer, what there is to say about it: what the model did not see any more, and whether it
            was cut off.
    """

    def __init__(self, decoder: Decoder, renderer: Renderer, people: People, seed: int) -> None:
        self.renderer, self.people = renderer, people
        self.device, self.positions = decoder.device, decoder.config.n_positions
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.turns: list[Turn] = []
        self.notes: list[str] = []
        self.dropped = 0  # tokens at the beginning of the conversation that the model does not see any more
        self.seen: list[int] = []  # the tokens whose keys and values are in the cache
        self.decoding = decoder.start(torch.zeros(1, dtype=torch.long, device=self.device), self.positions)

    def say(self, text: str) -> None:
        """Add my turn. What would end a turn inside it is broken, or I could speak for somebody else.

        Everything else is plain text as it is, `<|endoftext|>` too.
        """
        stop, text = self.renderer.template.stop, text.strip()
        while stop in text and not self.renderer.has_tokens:
            text = text.replace(stop, stop[1:] or " ")
        self.turns.append(Turn(self.people.me, text))

    def start_over(self) -> None:
        """Forget what was said."""
        self.turns.clear()
        self.dropped = 0

    def undo(self) -> bool:
        """Take back my last turn and everything after it; false when there is none."""
        mine = [place for place, turn in enumerate(self.turns) if turn.speaker == self.people.me]
        del self.turns[mine[-1] if mine else len(self.turns) :]
        self.dropped = 0
        return bool(mine)

    def take_back_answer(self) -> bool:
        """Take back what the model said last, so that it can answer again; false when I have said nothing yet."""
        while self.turns and self.turns[-1].speaker == self.people.you:
            self.turns.pop()
        return bool(self.turns)

    def answer(self, settings: SamplingSettings) -> Generator[str, None, None]:
        """The model's turn, in pieces that are never taken back. What was said of it is added to the conversation, also
        when the iterator is closed, or interrupted by Ctrl-C, before its end; unless that is nothing.

        Yields:
            text: never empty, whole characters, without space at both ends of the turn.

        Raises:
            UnusableModelError: the model's logits are NaN or infinite.
        """
        said = ""
        try:
            for piece in read_turn(self.draw_tokens(settings), self.renderer, self.people):
                said += piece
                yield piece
        finally:
            if said.strip():
                self.turns.append(Turn(self.people.you, said.strip()))

    def dialogue(self) -> Dialogue:
        """What was said and the turn that comes now, still empty; an instruction model sees the last one only."""
        now = Turn(self.people.you, "")
        if self.renderer.name == "alpaca":
            return Dialogue((*self.turns[-1:], now), self.people.instruction)
        return Dialogue((*self.turns, now), self.people.instruction)

    def prompt(self, room: int) -> list[int]:
        """The newest whole turns, as many as leave `room` positions for the answer, up to where the model speaks.

        When they have outgrown that, so many are dropped that the rest takes half of the space: the cache then serves
        for many turns again, rather than for none. Only a single turn that is too long is cut itself.
        """
        dialogue = self.dialogue()
        whole, texts = self.renderer.encode(dialogue)
        whole = whole[: texts[-1][0]]
        limit = self.positions - room
        if len(whole) <= limit or self.renderer.name == "alpaca":
            self.dropped = 0
        if len(whole) - self.dropped > limit:
            ends = [end for _, end in texts[:-2]]  # where a conversation may go on: at the stop behind a turn
            fitting = (end for space in (limit // 2, limit) for end in ends if space // 2 <= len(whole) - end <= space)
            self.dropped = next(fitting, len(whole) - limit)
            gone = sum(end <= self.dropped for _, end in texts[:-1])
            cut = any(start < self.dropped < end for start, end in texts[:-1])
            self.notes.append(describe_dropped(gone, cut, len(whole) - self.dropped))
        return whole[self.dropped :]

    @torch.inference_mode()
    def draw_tokens(self, settings: SamplingSettings) -> Iterator[int]:
        """Token after token of what the model says now, without an end of its own but for the limits."""
        self.notes = []
        room = min(settings.max_new_tokens, self.positions // 2)
        prompt = self.prompt(room)
        mine = [turn for turn in self.turns if turn.speaker == self.people.you]
        used = encode_text(self.renderer.tokenizer, mine[-1].text) if mine else []
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.seen, prompt[:-1], strict=False)))
        new = prompt[known:]
        self.decoding.cut(known)
        del self.seen[known:]
        for _ in range(room):
            logits = self.decoding.next_logits(torch.tensor([new], device=self.device))  # (1, V)
            self.seen += new
            penalize_repetition(logits, [used], settings.repetition_penalty)
            token = int(draw(logits, settings, self.generator))
            yield token
            used.append(token)
            new = [token]
        # Whoever has read the end of the turn does not come here.
        most = "max_new_tokens" if room == settings.max_new_tokens else "half of what the model sees"
        self.notes.append(f"cut off after {room} tokens: {most}")

    def as_json(self) -> Any:
        """The conversation in a form that can be trained on: `turns`, or `alpaca` for what was asked and answered.

        Raises:
            UserError: nothing was answered yet.
        """
        if not any(turn.speaker == self.people.you for turn in self.turns):
            raise UserError("nothing was answered yet")
        alpaca, line = self.renderer.name == "alpaca", self.people.instruction
        system = {} if line == (ALPACA if alpaca else INSTRUCTION) else {"system": line}
        if alpaca:
            pairs = (
                (asked, answered) for asked, answered in pairwise(self.turns) if answered.speaker == self.people.you
            )
            return [{**system, "instruction": asked.text, "output": answered.text} for asked, answered in pairs]
        return {**system, "turns": [{"speaker": turn.speaker, "text": turn.text} for turn in self.turns]}


def describe_dropped(turns: int, cut: bool, tokens: int) -> str:
    """What the model does not see any more, in one line."""
    found = [f"the oldest {turns} turns are"] * bool(turns) + ["the beginning of the next is"] * cut
    return f"the conversation has outgrown the model: {' and '.join(found)} not seen any more ({tokens} tokens are)"


def choose_people(dialogue: dict[str, Any], me: str | None, you: str | None) -> People:
    """Who talks to whom, from what `dialogue.json` says and the names that were asked for.

    A model that has learned to be one person is that person. A model without known people is Bot, and the user is You.

    Raises:
        UserError: the names can't be.
    """
    template, learn = dialogue.get("template", "prompt"), dialogue.get("learn", "all")
    names: list[str] = dialogue.get("speakers", [])
    if template == "alpaca":
        if me or you:
            raise UserError("--me and --you: an instruction model has no people; leave them out")
        line = dialogue.get("instruction", ALPACA)
        return People(ALPACA_SPEAKERS[0], ALPACA_SPEAKERS[-1], ALPACA if line == ALPACA_WITH_INPUT else line)
    you = you or (learn if learn in names and learn != me else None)
    me = me or next(name for name in (*names, *STRANGERS) if name != you)
    you = you or next(name for name in (*names, *reversed(STRANGERS)) if name != me)
    strangers = [name for name in (me, you) if name not in names]
    if template == "tokens" and strangers:
        known = ", ".join(names[:8]) or "nobody"
        raise UserError(f"the model has no token for {' and '.join(strangers)}; it knows {known}")
    if me == you:
        raise UserError(f"--me and --you are both {me}; the model answers as somebody else")
    others = tuple(name for name in names if name not in (me, you))
    return People(me, you, dialogue.get("instruction", INSTRUCTION), others)


def read_turn(tokens: Iterable[int], renderer: Renderer, people: People) -> Iterator[str]:
    """The text of one turn from its tokens, in pieces, up to where the turn ends: at a special token, or at its stop.

    What may yet turn out to be the stop, or space at the end, is held back. A line that begins with the label of
    somebody who is known is a stop too, and in `labels`, where the stop is a mere newline, the only one. At the
    beginning, behind the label's own space, a stop needs no space of its own: a label there is somebody else's turn.
    """
    stops = find_stops(renderer, people)
    patterns = (pattern for stop in stops for pattern in (re.escape(stop), rf"\A\s*{re.escape(stop.lstrip())}"))
    end = re.compile("|".join(patterns) or r"(?!)")
    specials = set(renderer.tokenizer._special_tokens.values())
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be several tokens
    text, shown = "", 0
    for token in takewhile(lambda token: token not in specials, tokens):
        text += decoder.decode(renderer.tokenizer.decode_single_token_bytes(token))
        ended = end.search(text)
        certain = text[: ended.start() if ended else len(text) - unfinished(text, stops)].strip()
        if len(certain) > shown:
            yield certain[shown:]
            shown = len(certain)
        if ended:
            return
    if rest := text.strip()[shown:]:  # held back for a stop that did not come
        yield rest


def find_stops(renderer: Renderer, people: People) -> list[str]:
    """The texts by which a turn ends; none where tokens of their own do that."""
    stop, label, _ = renderer.template
    if renderer.has_tokens:
        return []
    names = (people.me, people.you, *people.others)
    labels = [f"\n{stop.lstrip()}{label.format(name).rstrip()}" for name in names]
    return labels if renderer.name == "labels" else [stop, *labels]


def unfinished(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `stops`."""
    if any(stop.lstrip().startswith(text.lstrip()) for stop in stops):
        return len(text)
    most = max(map(len, stops), default=0)
    return next(
        (size for size in range(min(most, len(text)), 0, -1) if any(stop.startswith(text[-size:]) for stop in stops)), 0
    )
