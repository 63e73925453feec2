"""A conversation with a model: prompts in the training format, and streamed answers."""

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
from support.errors import UserError, amount
from talking.decoder import Decoder
from talking.generation import draw, penalize_repetition

STRANGERS = ("You", "Bot")  # default names of the user and the model


class People(NamedTuple):
    """The two speakers, and the instruction line before their conversation."""

    me: str
    you: str  # the speaker that the model plays
    instruction: str = INSTRUCTION
    others: tuple[str, ...] = ()  # other known speakers; the model must not speak for them


class Conversation:
    """The turns so far, and the KV cache of the tokens that the model has seen.

    A prompt is the whole conversation, token for token as in training. Only the tokens after the longest prefix that
    is already in the cache are computed, so a turn costs only its own tokens, even after `undo` or `again`.

    Attributes:
        turns: the turns so far.
        notes: remarks on the last answer: turns that were dropped for it, and whether it was cut off.
        cut_off: whether the last answer reached the token limit.
    """

    def __init__(self, decoder: Decoder, renderer: Renderer, people: People, seed: int) -> None:
        self.renderer, self.people = renderer, people
        self.device, self.positions = decoder.device, decoder.config.n_positions
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.turns: list[Turn] = []
        self.notes: list[str] = []
        self.cut_off = False
        self.dropped = 0  # number of tokens at the beginning of the conversation that the model no longer sees
        self.seen: list[int] = []  # the tokens whose keys and values are in the cache
        self.decoding = decoder.start(torch.zeros(1, dtype=torch.long, device=self.device), self.positions)

    def say(self, text: str) -> None:
        """Add the user's turn. Stop texts inside it are broken up, so that the user can't speak for somebody else.

        Everything else, even `<|endoftext|>`, is kept as plain text.
        """
        stop, text = self.renderer.template.stop, text.strip()
        while stop in text and not self.renderer.has_tokens:
            text = text.replace(stop, stop[1:] or " ")
        self.turns.append(Turn(self.people.me, text))

    def start_over(self) -> None:
        """Clear the conversation."""
        self.turns.clear()
        self.dropped = 0

    def undo(self) -> bool:
        """Remove the user's last turn and everything after it; return whether there was one."""
        mine = [place for place, turn in enumerate(self.turns) if turn.speaker == self.people.me]
        del self.turns[mine[-1] if mine else len(self.turns) :]
        self.dropped = 0
        return bool(mine)

    def take_back_answer(self) -> bool:
        """Remove the model's last answer, so that it can answer again; return whether any turn is left."""
        while self.turns and self.turns[-1].speaker == self.people.you:
            self.turns.pop()
        return bool(self.turns)

    def answer(self, settings: SamplingSettings) -> Generator[str, None, None]:
        """Stream the model's turn, and add the yielded text to the conversation unless it is empty.

        The text is added even if the iterator is closed early or interrupted by Ctrl-C.

        Yields:
            text: a piece of the turn, never empty, in whole characters; the turn has no space at either end.

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
        """The conversation and an empty turn for the model; an instruction model sees only the last turn."""
        now = Turn(self.people.you, "")
        if self.renderer.name == "alpaca":
            return Dialogue((*self.turns[-1:], now), self.people.instruction)
        return Dialogue((*self.turns, now), self.people.instruction)

    def prompt(self, room: int) -> list[int]:
        """The tokens of the newest whole turns up to the start of the answer, with `room` positions left for it.

        If the conversation is too long, drop turns until the rest takes half of the space: the cache then stays valid
        for many turns. A turn is cut only if it alone is too long.
        """
        dialogue = self.dialogue()
        whole, texts = self.renderer.encode(dialogue)
        whole = whole[: texts[-1][0]]
        limit = self.positions - room
        if len(whole) <= limit or self.renderer.name == "alpaca":
            self.dropped = 0
        if len(whole) - self.dropped > limit:
            ends = [end for _, end in texts[:-2]]  # ends of turns, at which the conversation may be cut
            fitting = (end for space in (limit // 2, limit) for end in ends if space // 2 <= len(whole) - end <= space)
            self.dropped = next(fitting, len(whole) - limit)
            gone = sum(end <= self.dropped for _, end in texts[:-1])
            cut = any(start < self.dropped < end for start, end in texts[:-1])
            self.notes.append(describe_dropped(gone, cut, len(whole) - self.dropped))
        return whole[self.dropped :]

    @torch.inference_mode()
    def draw_tokens(self, settings: SamplingSettings) -> Iterator[int]:
        """Yield the model's next tokens up to the limit; the caller stops at the end of the turn."""
        self.notes, self.cut_off = [], False
        room = min(settings.max_new_tokens, self.positions // 2)
        prompt = self.prompt(room)
        mine = [turn for turn in self.turns if turn.speaker == self.people.you]
        used = encode_text(self.renderer.tokenizer, mine[-1].text) if mine else []
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.seen, prompt[:-1], strict=False)))
        new = prompt[known:]
        self.decoding.cache.length = known  # forget the tokens after these
        del self.seen[known:]
        for _ in range(room):
            logits = self.decoding.next_logits(torch.tensor([new], device=self.device))  # (1, V)
            self.seen += new
            penalize_repetition(logits, [used], settings.repetition_penalty)
            token = int(draw(logits, settings, self.generator))
            yield token
            used.append(token)
            new = [token]
        self.cut_off = True  # reached only when the answer hits the token limit
        most = "max_new_tokens" if room == settings.max_new_tokens else "half of the model's context"
        self.notes.append(f"cut off after {room} tokens ({most})")

    def as_json(self) -> Any:
        """The conversation in a format for training: `turns`, or `alpaca` for an instruction model.

        Raises:
            UserError: the model has not answered yet.
        """
        if not any(turn.speaker == self.people.you for turn in self.turns):
            raise UserError("there is no answer yet")
        alpaca, line = self.renderer.name == "alpaca", self.people.instruction
        system = {} if line == (ALPACA if alpaca else INSTRUCTION) else {"system": line}
        if alpaca:
            pairs = (
                (asked, answered) for asked, answered in pairwise(self.turns) if answered.speaker == self.people.you
            )
            return [{**system, "instruction": asked.text, "output": answered.text} for asked, answered in pairs]
        return {**system, "turns": [{"speaker": turn.speaker, "text": turn.text} for turn in self.turns]}


def describe_dropped(turns: int, cut: bool, tokens: int) -> str:
    """Describe in one line what the model no longer sees."""
    found = [f"the oldest {amount(turns, 'turn')}"] * bool(turns) + ["the beginning of a turn"] * cut
    gone = " and ".join(found)
    return f"the conversation is too long for the model: it no longer sees {gone}, only the last {tokens} tokens"


def choose_people(dialogue: dict[str, Any], me: str | None, you: str | None) -> People:
    """Choose the speakers from `dialogue.json` and the requested names.

    A model that was trained on one speaker's turns plays that speaker. If no speakers are known, the model is Bot and
    the user is You.

    Raises:
        UserError: the names are equal, have no speaker token, or are not allowed for an instruction model.
    """
    template, learn = dialogue.get("template", "prompt"), dialogue.get("learn", "all")
    names: list[str] = dialogue.get("speakers", [])
    if template == "alpaca":
        if me or you:
            raise UserError("--me and --you: an instruction model has no names; leave them out")
        line = dialogue.get("instruction", ALPACA)
        return People(ALPACA_SPEAKERS[0], ALPACA_SPEAKERS[-1], ALPACA if line == ALPACA_WITH_INPUT else line)
    you = you or (learn if learn in names and learn != me else None)
    me = me or next(name for name in (*names, *STRANGERS) if name != you)
    you = you or next(name for name in (*names, *reversed(STRANGERS)) if name != me)
    strangers = [name for name in (me, you) if name not in names]
    if template == "tokens" and strangers:
        known = ", ".join(names[:8]) or "nobody"
        raise UserError(f"the model has no speaker token for {' and '.join(strangers)}; it knows {known}")
    if me == you:
        raise UserError(f"--me and --you are both {me}; give two different names")
    others = tuple(name for name in names if name not in (me, you))
    return People(me, you, dialogue.get("instruction", INSTRUCTION), others)


def read_turn(tokens: Iterable[int], renderer: Renderer, people: People) -> Iterator[str]:
    """Yield the text of one turn in pieces; the turn ends at a special token or a stop text.

    Text that may be the start of a stop, and trailing space, is held back. A line that starts with a known speaker's
    label is a stop too; in the `labels` template, whose own stop is just a newline, it is the only one. At the start of
    the turn (after the label's space), a stop matches without its leading whitespace: a label there starts a different
    speaker's turn.
    """
    stops = find_stops(renderer, people)
    patterns = (pattern for stop in stops for pattern in (re.escape(stop), rf"\A\s*{re.escape(stop.lstrip())}"))
    end = re.compile("|".join(patterns) or r"(?!)")
    specials = set(renderer.tokenizer._special_tokens.values())
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span several tokens
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
    if rest := text.strip()[shown:]:  # held back for a stop that did not follow
        yield rest


def find_stops(renderer: Renderer, people: People) -> list[str]:
    """The texts that end a turn; none if the template uses special tokens instead."""
    stop, label, _ = renderer.template
    if renderer.has_tokens:
        return []
    names = (people.me, people.you, *people.others)
    labels = [f"\n{stop.lstrip()}{label.format(name).rstrip()}" for name in names]
    return labels if renderer.name == "labels" else [stop, *labels]


def unfinished(text: str, stops: Sequence[str]) -> int:
    """The number of characters at the end of `text` that may be the start of one of `stops`."""
    if any(stop.lstrip().startswith(text.lstrip()) for stop in stops):
        return len(text)
    most = max(map(len, stops), default=0)
    return next(
        (size for size in range(min(most, len(text)), 0, -1) if any(stop.startswith(text[-size:]) for stop in stops)), 0
    )
