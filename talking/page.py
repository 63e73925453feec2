"""The chat page in the browser (gradio). Every visitor has a separate conversation."""

import contextlib
import html
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from settings import AnswerSettings, ChatSettings
from support.errors import UserError, check_extra, display, reason
from talking.conversation import Conversation
from talking.generation import UnusableModelError
from talking.guess_page import FORGOTTEN, GUESS_STYLE, GuessDesk

if TYPE_CHECKING:
    import gradio

REQUIREMENT = "gradio>=6.31,<7"  # as in requirements-extra.txt
STYLE = "[aria-label='chatbot conversation'] .message-content { white-space: pre-wrap }"  # preserve whitespace
AT_ONCE = 4  # maximum number of simultaneous answers; others wait
LOCAL = ("localhost", "127.0.0.1", "[::1]")
EVERYWHERE = ("", "0.0.0.0", "::")  # addresses for listening on every interface; any host name may then be valid
# gradio's routes that accept files or store conversations; the page needs none of them
CLOSED = ("upload", "upload_progress", "process_recording", "component_server", "component_server/", "deep_link")
RANGES = {  # minimum, maximum and step of each slider
    "temperature": (0, 2, 0.05),
    "top_p": (0.05, 1, 0.05),
    "top_k": (0, 200, 1),
    "repetition_penalty": (0.5, 2, 0.05),
    "max_new_tokens": (1, 1000, 1),
}
Messages = list[dict[str, str]]
Shown = tuple["Visit", Messages, Messages]


def check_page(settings: ChatSettings) -> None:
    """Check that the page can be served, before a model is loaded for it.

    Raises:
        UserError: gradio is not installed, or the host or port is not available.
    """
    check_extra("gradio", "--web", REQUIREMENT)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":  # on other systems, this would let two programs share the port
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(
            f"--host {settings.host} --port {settings.port} can't be used: {reason(error)}; choose another"
        ) from None


class Visit:
    """One visitor's conversation with the model and, on request, with the base model."""

    def __init__(self, model: Conversation, make_beside: Callable[[], Conversation] | None, again: bool) -> None:
        self.model, self.make_beside = model, make_beside
        self.again = again  # whether to tell the visitor that an earlier conversation was dropped
        self.beside: Conversation | None = None
        self.stopped = False
        self.lock = threading.Lock()
        self.messages: deque[str] = deque()  # sent, but not yet added to a conversation

    def talks(self) -> list[Conversation]:
        return [self.model, self.beside] if self.beside else [self.model]

    def shown(self, answering: Conversation | None = None, said: str = "") -> Shown:
        """The content of the page: both conversations, and the partial answer of one model."""
        columns = [as_messages(talk) if talk else [] for talk in (self.model, self.beside)]
        if said:
            columns[answering is self.beside].append(as_message(True, said))
        return self, columns[0], columns[1]

    def answers(self, settings: AnswerSettings, talks: Sequence[Conversation]) -> Iterator[Shown]:
        """Yield the content of the page while the models of `talks` answer, one after the other."""
        import gradio

        self.stopped = False
        for talk in talks:
            if self.stopped:
                break
            said = ""
            yield self.shown()
            try:
                with contextlib.closing(talk.answer(settings)) as pieces:
                    for piece in pieces:
                        said += piece
                        yield self.shown(talk, said)
                        if self.stopped:
                            break
            except UnusableModelError as error:
                gradio.Warning(str(error))
            if notes := talk.notes + [f"{talk.people.you} gave an empty answer"] * (not said):
                gradio.Info("; ".join(notes))

    def set_beside(self, wanted: bool) -> None:
        """Add the base model, or remove it."""
        if not wanted:
            self.beside = None
        elif self.beside is None and self.make_beside:
            self.beside = self.make_beside()

    def catch_up(self, settings: AnswerSettings) -> Iterator[Shown]:
        """Let the base model answer all earlier messages of the visitor, starting with the first."""
        if not self.beside or self.beside.turns:
            return
        for turn in [turn for turn in self.model.turns if turn.speaker == self.model.people.me]:
            self.beside.say(turn.text)
            yield from self.answers(settings, [self.beside])
            if self.stopped:
                break


def as_messages(talk: Conversation) -> Messages:
    """The turns in gradio's format."""
    return [as_message(talk.people.you == turn.speaker, turn.text) for turn in talk.turns]


def as_message(answer: bool, text: str) -> dict[str, str]:
    """A turn in gradio's format, with HTML escaped, because gradio would interpret it."""
    return {"role": "assistant" if answer else "user", "content": html.escape(text, quote=False)}


class Desk:
    """The page's event handlers: each method returns the next content of the page, or yields it repeatedly.

    Each gets the visitor's `Visit`, or None before the first message.
    """

    def __init__(
        self, start: Callable[[], Conversation], start_beside: Callable[[], Conversation] | None, answer: AnswerSettings
    ) -> None:
        self.start, self.start_beside, self.settings = start, start_beside, answer
        self.people = start().people  # load the model before the first visit

    def arrive(self, again: bool = False) -> Visit:
        return Visit(self.start(), self.start_beside, again)

    @contextlib.contextmanager
    def serving(self, visit: Visit | None) -> Iterator[Visit]:
        """Lock the visit, so that only one event is handled at a time, however fast somebody clicks."""
        import gradio

        visit = visit or self.arrive(again=True)
        with visit.lock:
            if visit.again:
                gradio.Warning("Your conversation was idle for an hour and has been closed. This is a new one.")
                visit.again = False
            yield visit

    def take(self, visit: Visit | None, text: str | None) -> Visit:
        """Queue a message; a request from outside the page may have none."""
        visit = visit or self.arrive(again=True)
        if text and text.strip():
            visit.messages.append(text.encode(errors="replace").decode())  # replaces lone surrogates
        return visit

    def say(self, visit: Visit | None, *values: float) -> Iterator[Shown]:
        """Let the models answer the queued messages, one after the other."""
        with self.serving(visit) as visit:
            while visit.messages:
                text = visit.messages.popleft()
                for talk in visit.talks():
                    talk.say(text)
                yield from visit.answers(self.with_values(values), visit.talks())
            yield visit.shown()

    def again(self, visit: Visit | None, *values: float) -> Iterator[Shown]:
        with self.serving(visit) as visit:
            for talk in visit.talks():
                talk.take_back_answer()
            if visit.model.turns:
                yield from visit.answers(self.with_values(values), visit.talks())
            yield visit.shown()

    def undo(self, visit: Visit | None) -> Shown:
        with self.serving(visit) as visit:
            for talk in visit.talks():
                talk.undo()
            return visit.shown()

    def start_over(self, visit: Visit | None) -> Shown:
        if visit:
            visit.stopped = True
            visit.messages.clear()
        with self.serving(visit) as visit:
            for talk in visit.talks():
                talk.start_over()
            return visit.shown()

    def set_beside(self, visit: Visit | None, wanted: bool, *values: float) -> Iterator[tuple[Any, ...]]:
        """Add or remove the base model; also yield whether it is shown, because its folder may be damaged."""
        import gradio

        with self.serving(visit) as visit:
            try:
                visit.set_beside(wanted)
            except UserError as error:
                gradio.Warning(f"The base model can't be loaded: {error}")
            there = visit.beside is not None

            def with_box(shown: Shown) -> tuple[Any, ...]:
                visit, mine, beside = shown
                return visit, mine, gradio.update(value=beside, visible=there), there

            yield with_box(visit.shown())
            yield from map(with_box, visit.catch_up(self.with_values(values)))
            yield with_box(visit.shown())

    def stop(self, visit: Visit | None) -> None:
        if visit:
            visit.stopped = True

    def with_values(self, values: Sequence[float]) -> AnswerSettings:
        """The settings with the sliders' values."""
        named = zip(RANGES, values, strict=True)
        return replace(self.settings, **{name: type(getattr(self.settings, name))(value) for name, value in named})


def serve(
    start: Callable[[], Conversation],
    start_beside: Callable[[], Conversation] | None,
    title: str,
    settings: ChatSettings,
    guessing: GuessDesk | None = None,
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        start: starts a conversation with the model.
        start_beside: starts a conversation with the base model, which is loaded first if needed; None: no base model.
        settings: the page's address, the initial values of the sliders, and whether to open the blind test first.
        guessing: the blind test, in a second tab; None: no second tab.
    """
    # Set this before gradio is imported, so that nothing leaves this computer.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    page = lay_out(Desk(start, start_beside, settings.answer), title, guessing, settings.guess)
    open_page(page, settings.host, settings.port)
    display(f"open {page.local_url} in a browser; Ctrl-C stops the server")
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def open_page(page: "gradio.Blocks", host: str, port: int) -> None:
    """Start serving the page; it is served until it is closed."""
    page.launch(
        server_name=in_address(host),
        server_port=port,
        app_kwargs=guards(host),
        prevent_thread_lock=True,
        share=False,
        quiet=True,
        ssr_mode=False,
        css=STYLE + GUESS_STYLE,
        footer_links=[],
        run_history=False,  # do not store conversations in the browser
    )


def in_address(host: str) -> str:
    """`host` as part of a URL: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def guards(host: str) -> dict[str, Any]:
    """Arguments that restrict gradio's application to the routes that the page needs, and to the page's host names.

    Otherwise other web pages could read the conversation by pointing their host name here (DNS rebinding). If the page
    listens on every interface, its names are unknown, so every name is accepted.
    """
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import Response
    from starlette.routing import Route

    names = ["*"] if host in EVERYWHERE else [in_address(host), *LOCAL]
    return {
        "middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)],
        "routes": [Route(f"/gradio_api/{path}", Response(status_code=404)) for path in CLOSED],  # override gradio's own
    }


def lay_out(desk: Desk, title: str, guessing: GuessDesk | None = None, guess_first: bool = False) -> "gradio.Blocks":
    """Build the page: the chat, and the blind test in a second tab if there is one."""
    import gradio

    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Markdown(f"### {title}")
        if guessing:
            with gradio.Tabs(selected="guess" if guess_first else "chat"):
                with gradio.Tab("Chat", id="chat"):
                    lay_out_chat(desk, page)
                with gradio.Tab("Which one is real?", id="guess"):
                    guessing.lay_out()
        else:
            lay_out_chat(desk, page)
    for function in page.fns.values():  # only for the page, not an API for programs
        function.api_visibility = "private"
    return page


def lay_out_chat(desk: Desk, page: "gradio.Blocks") -> None:
    """Build the chat and connect its events."""
    import gradio

    with gradio.Row():
        chat, beside = (
            gradio.Chatbot(
                label=name, visible=there, render_markdown=False, latex_delimiters=[], buttons=[], height="60vh"
            )
            for name, there in ((desk.people.you, True), (f"{desk.people.you} (base model)", False))
        )
    box = gradio.Textbox(placeholder=f"Type a message as {desk.people.me}", show_label=False, interactive=False)
    with gradio.Row():
        send, stop, new = gradio.Button("Send", variant="primary"), gradio.Button("Stop"), gradio.Button("New chat")
    wanted = gradio.Checkbox(label="Compare with the base model", visible=desk.start_beside is not None)
    with gradio.Accordion("Settings", open=False):
        sliders = [
            gradio.Slider(min(least, value), max(most, value), value, step=step, label=name.replace("_", " "))
            for name, (least, most, step) in RANGES.items()
            for value in [getattr(desk.settings, name)]
        ]
    visit = gradio.State(time_to_live=FORGOTTEN)
    shown = [visit, chat, beside]
    turns = {"concurrency_id": "turns", "concurrency_limit": AT_ONCE}  # one limit for all events

    # The text box is enabled once a visit exists that can hold its messages.
    page.load(lambda: (desk.arrive(), gradio.update(interactive=True)), None, [visit, box])
    # A message is queued immediately and answered after earlier ones, so that none is lost.
    sent = [box.submit, send.click]
    taken = gradio.on(sent, desk.take, [visit, box], visit, queue=False, trigger_mode="multiple")
    gradio.on(sent, None, None, box, js="() => ''")  # clear in the browser, to keep text typed meanwhile
    taken.then(desk.say, [visit, *sliders], shown, trigger_mode="multiple", **turns)
    chat.retry(desk.again, [visit, *sliders], shown, **turns)
    chat.undo(desk.undo, visit, shown, **turns)
    gradio.on([new.click, chat.clear, beside.clear], desk.start_over, visit, shown, **turns)
    stop.click(desk.stop, visit, queue=False)
    wanted.input(desk.set_beside, [visit, wanted, *sliders], [*shown, wanted], **turns)
