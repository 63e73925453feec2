"""Chat with a model in the terminal or on a web page: find → load → talk."""

if __name__ == "__main__":  # before the slow imports, so that Ctrl-C during them also prints just one line
    from support.errors import run_script

    run_script("chat")

import secrets
import signal
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from dialogues.template import Renderer
from dialogues.tokenizer import load_tokenizer
from pipeline.finished_model import FinishedModel, find_base, find_finished_model
from pipeline.prepare import read_held_out
from settings import ChatSettings
from support.command_line import parse_command_line
from support.errors import UserError, check_one_process, display, ending_signals

if TYPE_CHECKING:
    from talking.conversation import Conversation
    from talking.guessing import Game


def main() -> None:
    """Run the chat.

    Raises:
        UserError: a problem that the user can fix.
    """
    settings = parse_command_line(ChatSettings)
    check_one_process("a chat")
    found = find_finished_model(settings.model, settings.model_path)

    # Importing PyTorch takes a second, so check the options first.
    from load_gpt2_weights import load_for
    from talking.conversation import Conversation, choose_people
    from talking.decoder import Decoder
    from talking.guess_page import GuessDesk
    from talking.guess_terminal import play
    from talking.page import check_page, serve
    from talking.terminal import Terminal
    from training.device import choose_machine, keep_freed_memory

    keep_freed_memory()
    people = choose_people(found.dialogue, settings.me, settings.you)
    if settings.web:
        check_page(settings)
    template, speakers = found.dialogue.get("template", "prompt"), found.dialogue.get("speakers", [])
    renderer = Renderer(load_tokenizer(found.folder), template, speakers)
    machine = choose_machine(settings.device, settings.precision)
    display(f"model: {found.folder}", machine.explanation, file=sys.stderr)
    if (learned := found.dialogue.get("learn")) in speakers and learned != people.you:
        display(f"the model was trained only on what {learned} says, but speaks as {people.you}", file=sys.stderr)

    if not speakers and template != "alpaca" and not (settings.me and settings.you):
        known = f"the model knows no names: you are {people.me}, and it is {people.you}"
        display(f"{known}; choose other names with --me and --you", file=sys.stderr)

    @cache  # load each model on first use
    def load(folder: Path) -> Decoder:
        model = load_for(renderer.tokenizer, folder, machine.device, machine.inference_dtype)
        return Decoder(model, machine.inference_dtype)

    def start(folder: Path) -> Conversation:
        seed = secrets.randbits(63) if settings.seed is None else settings.seed
        return Conversation(load(folder), renderer, people, seed)

    game = make_game(found, renderer, settings, partial(start, found.folder))
    if settings.web:
        base = find_base(found, settings.base, settings.model_path, partial(display, file=sys.stderr))
        title, beside = f"Chat with {people.you} ({found.folder})", partial(start, base) if base else None
        guessing = GuessDesk(game, partial(rewrite_report, game.path.parent)) if game else None
        serve(partial(start, found.folder), beside, title, settings, guessing)
        return
    for number in ending_signals():
        signal.signal(number, lambda *_: sys.exit(130))  # Ctrl-C only stops an answer
    if game:
        if play(game):
            rewrite_report(game.path.parent)
    else:
        conversation = start(found.folder)
        display(f"you are {people.me}, the model is {people.you}; type /help for commands", file=sys.stderr)
        Terminal(conversation, settings.answer).run()


def make_game(
    found: FinishedModel, renderer: Renderer, settings: ChatSettings, start: "Callable[[], Conversation]"
) -> "Game | None":
    """Make the blind test of --guess, which is also the second tab of the page; None if there is none.

    A page that other computers can open has this tab only with --guess, because it shows real conversations.

    Raises:
        UserError: with --guess, if the model has no held-out conversations, or `guesses.json` is damaged.
    """
    from talking.guessing import Game, HeldOut, choose_speakers
    from talking.page import LOCAL

    if not settings.guess and not (found.run and settings.web and settings.host in LOCAL):
        return None
    try:
        if not found.run:
            raise UserError(f"--guess needs the held-out conversations of a run; {found.folder} is not part of one")
        names = found.dialogue.get("speakers", [])
        part, dialogues = read_held_out(found.run, renderer, names)
        shown = choose_speakers(found.dialogue.get("learn", "all"), names, settings.you)
        return Game(HeldOut(part, dialogues, shown), start(), settings.answer, found.run, settings.seed)
    except UserError as error:
        if settings.guess:
            raise
        display(f"the page has no blind test: {error}", file=sys.stderr)
        return None


def rewrite_report(run: Path) -> None:
    """Show new guesses in the report of a run, if it has one."""
    from evaluation.report import REPORT, write_report

    if (run / REPORT).exists():
        write_report(run)
