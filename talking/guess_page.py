"""The blind test on the chat page: the second tab. Every visitor has a separate round; all share `guesses.json`."""

import html
from collections.abc import Callable
from functools import partial
from typing import Any

from support.errors import UserError, printable
from talking.guesses import Score
from talking.guessing import Game, Round

FORGOTTEN = 3600  # seconds before an idle visitor's round or conversation is dropped
GUESS_STYLE = """
.guess-history, .guess-reply { max-width: 46rem; overflow-wrap: anywhere }
.guess-history { display: flex; flex-direction: column; gap: 0.6rem }
.guess-history small { opacity: 0.75 }
.guess-history p { margin: 0; white-space: pre-wrap }
.guess-reply { white-space: pre-wrap; text-align: start; justify-content: flex-start; font-weight: 400;
  min-height: 4rem }
"""
START = "One of the two replies is real, the other is generated. Click the real one."
NOTHING = "The model's replies are empty, or equal to the true ones. Restart chat.py with a higher --temperature."
Shown = tuple[Any, ...]


class Player:
    """A visitor's round, the text below it, and the score of the visit."""

    def __init__(self) -> None:
        self.round: Round | None = None
        self.answered = True
        self.verdict = ""
        self.score = Score(0, 0)


class GuessDesk:
    """The event handlers of the tab: each returns the visitor's `Player` and the next content of the tab."""

    def __init__(self, game: Game, rewrite_report: Callable[[], None]) -> None:
        self.game, self.rewrite_report = game, rewrite_report

    def next(self, player: Player | None) -> Shown:
        """Show the next round, once the current one is answered."""
        import gradio

        player = player or Player()
        if player.answered:
            try:
                player.round = self.game.next_round()
            except UserError as error:
                gradio.Warning(str(error))
                return shown(player)
            player.answered, player.verdict = player.round is None, "" if player.round else NOTHING
        return shown(player)

    def guess(self, choice: int, player: Player | None) -> Shown:
        """Take a guess, 1 or 2. Later clicks in the same round change nothing."""
        import gradio

        player = player or Player()
        if player.round and not player.answered:
            try:
                self.judge(player, player.round, choice)
                self.rewrite_report()
            except UserError as error:
                gradio.Warning(str(error))
        return shown(player)

    def judge(self, player: Player, made: Round, choice: int) -> None:
        """Keep a guess, and say whether it is right.

        Raises:
            UserError: the guess can't be saved.
        """
        correct = self.game.take(made, choice)
        player.answered = True
        place = "first" if made.real == 1 else "second"
        player.score = Score(player.score.right + correct, player.score.guesses + 1)
        player.verdict = f"{'Right' if correct else 'Wrong'}: the {place} one is real. Your score: {player.score}."
        if self.game.score != player.score:
            player.verdict += f" With earlier guesses and other visitors: {self.game.score}."

    def lay_out(self) -> None:
        """Build the tab and connect its events."""
        import gradio

        history = gradio.HTML(as_text(START))
        first, second = (gradio.Button(visible=False, size="lg", elem_classes="guess-reply") for _ in range(2))
        verdict = gradio.HTML()
        more = gradio.Button("Start", variant="primary")
        player = gradio.State(time_to_live=FORGOTTEN)
        content = [player, history, first, second, verdict, more]
        turns = {"concurrency_id": "guesses", "concurrency_limit": 1}  # the game makes one round at a time
        more.click(self.next, player, content, **turns)
        for number, button in enumerate((first, second), start=1):
            button.click(partial(self.guess, number), player, content, **turns)


def shown(player: Player) -> Shown:
    """The content of the tab: history, two replies, verdict, and the button for the next round."""
    import gradio

    made = player.round
    if made is None:
        hidden = gradio.update(visible=False)
        return player, as_text(START), hidden, hidden, as_text(player.verdict), gradio.update(value="Start")
    replies = [
        gradio.update(
            value=printable(text),
            visible=True,
            variant="primary" if player.answered and number == made.real else "secondary",
        )
        for number, text in enumerate(made.texts, start=1)
    ]
    more = gradio.update(value="Next", visible=player.answered)
    return player, as_history(made), *replies, as_text(player.verdict), more


def as_history(made: Round) -> str:
    """The history as HTML, with the name of the speaker whose reply is to be guessed."""
    again = "Every reply has been shown; this one is repeated. " * made.repeated
    turns = "".join(as_turn(turn.speaker, turn.text) for turn in made.history)
    return f'<div class="guess-history"><small>{again}{START}</small>{turns}{as_turn(made.speaker, "?")}</div>'


def as_turn(speaker: str, text: str) -> str:
    return f'<div><small>{escaped(speaker)}</small><p dir="auto">{escaped(text)}</p></div>'


def as_text(text: str) -> str:
    return f"<p>{escaped(text)}</p>" if text else ""


def escaped(text: str) -> str:
    return html.escape(printable(text))
