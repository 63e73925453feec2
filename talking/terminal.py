"""The conversation in a terminal, or line by line from a pipe."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

from settings import AnswerSettings
from support.errors import UserError, display, printable
from support.files import write_json, writing
from talking.conversation import Conversation
from talking.generation import UnusableModelError

HELP = """\
/again           another answer
/undo            take back your last message and the answer
/new             start over
/set NAME VALUE  as in /set temperature 0.7; /set alone shows the values
/save FILE       write the conversation, in a form that can be trained on
/help            this
Ctrl-C stops an answer, Ctrl-D leaves. A message that begins with / is written with a space before it."""


class Terminal:
    """Reads what I say and shows what the model says. A line that begins with / is a command.

    Answers go to the standard output; everything else, to the standard error.
    """

    def __init__(self, conversation: Conversation, settings: AnswerSettings) -> None:
        self.conversation, self.settings = conversation, settings
        self.commands: dict[str, Callable[[str], None]] = {
            "/again": self.again,
            "/undo": self.undo,
            "/new": self.start_over,
            "/set": self.set,
            "/save": self.save,
            "/help": lambda _: self.tell(HELP),
        }

    def run(self) -> None:
        """Talk until the end of the input.

        Raises:
            UnusableModelError: it can't answer, and never will.
        """
        for line in read_lines(f"{self.conversation.people.me}: "):
            command, _, rest = line.rstrip().partition(" ")
            try:
                if command in self.commands:
                    self.commands[command](rest.strip())
                elif command.startswith("/"):
                    self.tell(f"{command} is no command; /help lists them")
                elif line.strip():
                    self.conversation.say(line)
                    self.answer()
            except UnusableModelError:
                raise
            except UserError as error:
                self.tell(str(error))
            except KeyboardInterrupt:  # a second one, or in what is no answer
                self.tell("")

    def answer(self) -> None:
        """Show the model's turn as it is written. Ctrl-C ends it; what was said until then stays said."""
        conversation = self.conversation
        you = conversation.people.you
        said = False
        show(f"{you}: ")
        try:
            with contextlib.closing(conversation.answer(self.settings)) as pieces:
                for piece in pieces:
                    show(piece)
                    said = True
        except KeyboardInterrupt:
            self.tell(" (stopped)", end="")
        finally:
            show("\n")
        for note in conversation.notes:
            self.tell(f"({note})")
        if not said:
            self.tell(f"({you} says nothing; /again, or go on)")

    def again(self, _: str) -> None:
        if not self.conversation.take_back_answer():
            raise UserError("nothing was said yet")
        if self.settings.temperature == 0:
            self.tell("(at temperature 0 the answer is always the same: /set temperature 0.7)")
        self.answer()

    def undo(self, _: str) -> None:
        if not self.conversation.undo():
            raise UserError("nothing was said yet")
        last = self.conversation.turns[-1:]
        self.tell(f"(taken back; the last was {last[0]})" if last else "(taken back; nothing is left)")

    def start_over(self, _: str) -> None:
        self.conversation.start_over()
        self.tell("(a new conversation)")

    def set(self, words: str) -> None:
        """/set temperature 0.7"""
        kinds = {field.name: type(field.default) for field in fields(self.settings)}
        name, _, value = words.partition(" ")
        name = name.strip("-").replace("-", "_")
        if words and name not in kinds:
            raise UserError(f"/set {name}: there are {', '.join(kinds)}")
        if words:
            try:
                changed = replace(self.settings, **{name: kinds[name](value)})
            except ValueError:
                whole = "whole " * (kinds[name] is int)
                raise UserError(f"/set {name} {value}: a {whole}number is needed") from None
            if problems := changed.problems():
                raise UserError("; ".join(problems))
            self.settings = changed
        self.tell(", ".join(f"{name} {getattr(self.settings, name)}" for name in kinds))

    def save(self, name: str) -> None:
        if not name:
            raise UserError("/save: into which file? as in /save talk.json")
        try:
            path = Path(name).expanduser()
        except RuntimeError as error:
            raise UserError(f"/save {name}: {error}") from None
        conversation = self.conversation.as_json()
        with writing(path):
            if path.exists():
                raise UserError(f"/save {name}: it exists already; name a new file")
            path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, conversation)
        self.tell(f"(written: {path})")

    def tell(self, text: str, end: str = "\n") -> None:
        display(text, end=end, file=sys.stderr)


def show(text: str) -> None:
    display(text, end="")


def read_lines(prompt: str) -> Iterator[str]:
    """What is typed, with line editing and a history, until Ctrl-D; or the lines of a pipe.

    Ctrl-C leaves the line that was begun.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
        yield from sys.stdin
        return
    from prompt_toolkit import PromptSession

    session = PromptSession(printable(prompt))
    while True:
        try:
            line = session.prompt()
        except KeyboardInterrupt:
            display("(Ctrl-D leaves)", file=sys.stderr)
            continue
        except EOFError:
            return
        yield line
