"""The blind test in a terminal, or line by line from a pipe."""

import sys
from collections.abc import Iterator

from support.errors import UserError, display
from talking.guessing import Game, Round
from talking.terminal import read_lines

KEYS = ("1", "2", "q")
HELP = "one of two replies is real, the other is generated; press 1 or 2 for the real one, q to quit"


def play(game: Game) -> bool:
    """Show rounds and take guesses until q, Ctrl-D, Ctrl-C or the end of the input; return whether there were any.

    Rounds and results go to standard output, everything else to standard error.

    Raises:
        UserError: the model can't generate, or a guess can't be saved.
    """
    display(HELP, file=sys.stderr)
    if game.score.guesses:
        display(f"earlier guesses: {game.score}", file=sys.stderr)
    earlier = game.score.guesses
    try:
        answer_rounds(game)
    except KeyboardInterrupt:
        display("", file=sys.stderr)
    if game.score.guesses == earlier:
        return False
    display("", f"your score: {game.score}", f"saved: {game.path}")
    return True


def answer_rounds(game: Game) -> None:
    choices = read_choices()
    while made := game.next_round():
        display(*describe(made))
        choice = next(choices, None)
        if choice is None:
            return
        verdict = "right" if game.take(made, choice) else "wrong"
        display(f"{verdict}: {made.real} is real; your score: {game.score}")
    raise UserError("the model's replies are empty, or equal to the true ones; try a higher --temperature")


def describe(made: Round) -> list[str]:
    """The lines of a round: the history, and the two replies."""
    replies = [f"  {number}  {indented(text)}" for number, text in enumerate(made.texts, start=1)]
    again = ["(every reply has been shown; this one is repeated)"] * made.repeated
    return ["", *again, *(indented(str(turn)) for turn in made.history), f"{made.speaker}:", *replies]


def indented(text: str) -> str:
    return text.replace("\n", "\n     ")


def read_choices() -> Iterator[int]:
    """Yield 1 or 2 for each guess: a key in a terminal, a line from a pipe."""
    for line in read_keys() if sys.stdin.isatty() and sys.stdout.isatty() else read_lines(""):
        key = line.strip().lower()
        if key == "q":
            return
        if key in KEYS:
            yield int(key)
        else:
            display("press 1, 2 or q", file=sys.stderr)


def read_keys() -> Iterator[str]:
    """Yield the pressed keys, without Enter, until Ctrl-D."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    def press(event: KeyPressEvent) -> None:
        event.current_buffer.text = event.data
        event.current_buffer.validate_and_handle()

    for key in KEYS:
        bindings.add(key)(press)
    bindings.add("<any>")(lambda event: None)  # ignore all other characters
    session = PromptSession("1 or 2? ", key_bindings=bindings)
    while True:
        try:
            yield session.prompt()
        except EOFError:
            return
