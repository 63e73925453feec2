"""Chat in a terminal, or line by line from a pipe."""

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
/again           get another answer
/undo            remove your last message and the answer
/new             start a new conversation
/set NAME VALUE  change a setting, as in /set temperature 0.7; /set alone shows them all
/save FILE       save the conversation as JSON, in a format for training
/help            show this help
Ctrl-C stops an answer, Ctrl-D quits. To send a message that starts with /, put a space before it."""


class Terminal:
    """Read the user's messages and print the model's answers. A line that starts with / is a command.

    Answers go to standard output, everything else to standard error.
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
        """Chat until the end of the input.

        Raises:
            UnusableModelError: the model can't generate.
        """
        for line in read_lines(f"{self.conversation.people.me}: "):
            command, _, rest = line.rstrip().partition(" ")
            try:
                if command in self.commands:
                    self.commands[command](rest.strip())
                elif command.startswith("/"):
                    self.tell(f"{command} is not a command; /help lists them")
                elif line.strip():
                    self.conversation.say(line)
                    self.answer()
            except UnusableModelError:
                raise
            except UserError as error:
                self.tell(str(error))
            except KeyboardInterrupt:  # a second Ctrl-C, or one outside of an answer
                self.tell("")

    def answer(self) -> None:
        """Print the model's answer as it is generated. Ctrl-C stops it and keeps the text so far."""
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
            self.tell(f"({you} gave an empty answer; try /again, or say something else)")

    def again(self, _: str) -> None:
        if not self.conversation.take_back_answer():
            raise UserError("there is no message yet")
        if self.settings.temperature == 0:
            self.tell("(at temperature 0 the answer is always the same; try /set temperature 0.7)")
        self.answer()

    def undo(self, _: str) -> None:
        if not self.conversation.undo():
            raise UserError("there is no message yet")
        last = self.conversation.turns[-1:]
        self.tell(f"(removed; the last message is now {last[0]})" if last else "(removed; the conversation is empty)")

    def start_over(self, _: str) -> None:
        self.conversation.start_over()
        self.tell("(new conversation)")

    def set(self, words: str) -> None:
        """Show the settings, or change one, as in `/set temperature 0.7`."""
        kinds = {field.name: type(field.default) for field in fields(self.settings)}
        name, _, value = words.partition(" ")
        name = name.strip("-").replace("-", "_")
        if words and name not in kinds:
            raise UserError(f"/set {name}: no such setting; choose from {', '.join(kinds)}")
        if words:
            try:
                changed = replace(self.settings, **{name: kinds[name](value)})
            except ValueError:
                whole = "whole " * (kinds[name] is int)
                raise UserError(f"/set {name} {value}: must be a {whole}number") from None
            if problems := changed.problems():
                raise UserError("; ".join(problems))
            self.settings = changed
        self.tell(", ".join(f"{name} {getattr(self.settings, name)}" for name in kinds))

    def save(self, name: str) -> None:
        if not name:
            raise UserError("/save: give a file name, as in /save talk.json")
        try:
            path = Path(name).expanduser()
        except RuntimeError as error:
            raise UserError(f"/save {name}: {error}") from None
        conversation = self.conversation.as_json()
        with writing(path):
            if path.exists():
                raise UserError(f"/save {name}: the file already exists; choose another name")
            path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, conversation)
        self.tell(f"(saved to {path})")

    def tell(self, text: str, end: str = "\n") -> None:
        display(text, end=end, file=sys.stderr)


def show(text: str) -> None:
    display(text, end="")


def read_lines(prompt: str) -> Iterator[str]:
    """Yield typed lines until Ctrl-D, with line editing and a history; or the lines of a pipe.

    Ctrl-C discards the current line.
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
            display("(Ctrl-D quits)", file=sys.stderr)
            continue
        except EOFError:
            return
        yield line
