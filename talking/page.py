"""The conversation on a page in the browser (gradio). Every visitor has a conversation of their own."""

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

if TYPE_CHECKING:
    import gradio

REQUIREMENT = "gradio>=6.31,<7"  # as in requirements-extra.txt
FORGOTTEN = 3600  # seconds after which a conversation that nobody goes on with is let go
STYLE = "[aria-label='chatbot conversation'] .message-content { white-space: pre-wrap }"  # as it was typed
AT_ONCE = 4  # answers; others wait
LOCAL = ("localhost", "127.0.0.1", "[::1]")
EVERYWHERE = ("", "0.0.0.0", "::")  # hosts that listen on every interface, so any name may be valid
# gradio's routes that accept files or store conversations; the page needs none of them
CLOSED = ("upload", "upload_progress", "process_recording", "component_server", "component_server/", "deep_link")
RANGES = {  # of the sliders: least, most, step
    "temperature": (0, 2, 0.05),
    "top_p": (0.05, 1, 0.05),
    "top_k": (0, 200, 1),
    "repetition_penalty": (0.5, 2, 0.05),
    "max_new_tokens": (1, 1000, 1),
}
Messages = list[dict[str, str]]
Shown = tuple["Visit", Messages, Messages]


def check_page(settings: ChatSettings) -> None:
    """Find out whether a page can be served, before a model is loaded for it.

    Raises:
        UserError: gradio is not installed, or the port can't be had.
    """
    check_extra("gradio", "--web", REQUIREMENT)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":  # elsewhere the option would let two programs have the same port
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(
            f"--host {settings.host} --port {settings.port} can't be served at: {reason(error)}; choose another"
        ) from None


class Visit:
    """What one visitor has said to the model and, where that was asked for, to the one beside it."""

    def __init__(self, model: Conversation, make_beside: Callable[[], Conversation] | None, again: bool) -> None:
        self.model, self.make_beside = model, make_beside
        self.again = again  # a conversation before it has been let go, which is to be said
        self.beside: Conversation | None = None
        self.stopped = False
        self.lock = threading.Lock()
        self.messages: deque[str] = deque()  # sent, and not yet said

    def talks(self) -> list[Conversation]:
        return [self.model, self.beside] if self.beside else [self.model]

    def shown(self, answering: Conversation | None = None, said: str = "") -> Shown:
        """What the page shows: what was said to both, and what one of them is saying now."""
        columns = [as_messages(talk) if talk else [] for talk in (self.model, self.beside)]
        if said:
            columns[answering is self.beside].append(as_message(True, said))
        return self, columns[0], columns[1]

    def answers(self, settings: AnswerSettings) -> Iterator[Shown]:
        """What is shown while the models answer, one after the other."""
        import gradio

        self.stopped = False
        for talk in self.talks():
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
            if notes := talk.notes + [f"{talk.people.you} says nothing"] * (not said):
                gradio.Info("; ".join(notes))

    def set_beside(self, wanted: bool) -> None:
        """With the other model too, which begins with what was said so far, or without it."""
        if not wanted:
            self.beside = None
        elif self.beside is None and self.make_beside:
            self.beside = self.make_beside()
            self.beside.turns[:] = self.model.turns


def as_messages(talk: Conversation) -> Messages:
    """The turns as gradio wants them."""
    return [as_message(talk.people.you == turn.speaker, turn.text) for turn in talk.turns]


def as_message(answer: bool, text: str) -> dict[str, str]:
    """A turn as gradio wants it, which would take a tag in it for HTML."""
    return {"role": "assistant" if answer else "user", "content": html.escape(text, quote=False)}


class Desk:
    """What happens when somebody types or clicks: each method returns, or yields again and again, what is shown then.

    Each gets the `Visit` of whoever has clicked, None the first time.
    """

    def __init__(
        self, start: Callable[[], Conversation], start_beside: Callable[[], Conversation] | None, answer: AnswerSettings
    ) -> None:
        self.start, self.start_beside, self.settings = start, start_beside, answer
        self.people = start().people  # the model is loaded before anybody comes

    def arrive(self, again: bool = False) -> Visit:
        return Visit(self.start(), self.start_beside, again)

    @contextlib.contextmanager
    def serving(self, visit: Visit | None) -> Iterator[Visit]:
        """The visit, alone: one thing after the other, however fast somebody clicks."""
        import gradio

        visit = visit or self.arrive(again=True)
        with visit.lock:
            if visit.again:
                gradio.Warning("the conversation before was idle for an hour and has been let go; a new one begins")
                visit.again = False
            yield visit

    def take(self, visit: Visit | None, text: str | None) -> Visit:
        """Queue a message; a request that does not come from the page may hold none."""
        visit = visit or self.arrive(again=True)
        if text and text.strip():
            visit.messages.append(text.encode(errors="replace").decode())  # no half surrogates
        return visit

    def say(self, visit: Visit | None, *values: float) -> Iterator[Shown]:
        """Say and answer what is in line, one message after the other."""
        with self.serving(visit) as visit:
            while visit.messages:
                text = visit.messages.popleft()
                for talk in visit.talks():
                    talk.say(text)
                yield from visit.answers(self.with_values(values))
            yield visit.shown()

    def again(self, visit: Visit | None, *values: float) -> Iterator[Shown]:
        with self.serving(visit) as visit:
            for talk in visit.talks():
                talk.take_back_answer()
            if visit.model.turns:
                yield from visit.answers(self.with_values(values))
            yield visit.shown()

    def undo(self, visit: Visit | None) -> Shown:
        with self.serving(visit) as visit:
            for talk in visit.talks():
                talk.undo()
            return visit.shown()

    def start_over(self, visit: Visit | None) -> Shown:
        if visit:
            visit.stopped = True
        with self.serving(visit) as visit:
            for talk in visit.talks():
                talk.start_over()
            return visit.shown()

    def set_beside(self, visit: Visit | None, wanted: bool) -> tuple[Any, ...]:
        """What is shown, and whether the model beside it is there now: its folder may turn out to be damaged."""
        import gradio

        with self.serving(visit) as visit:
            try:
                visit.set_beside(wanted)
            except UserError as error:
                gradio.Warning(f"no model beside it: {error}")
            there = visit.beside is not None
            visit, mine, beside = visit.shown()
            return visit, mine, gradio.update(value=beside, visible=there), there

    def stop(self, visit: Visit | None) -> None:
        if visit:
            visit.stopped = True

    def with_values(self, values: Sequence[float]) -> AnswerSettings:
        """The settings with the values of the sliders."""
        named = zip(RANGES, values, strict=True)
        return replace(self.settings, **{name: type(getattr(self.settings, name))(value) for name, value in named})


def serve(
    start: Callable[[], Conversation],
    start_beside: Callable[[], Conversation] | None,
    title: str,
    settings: ChatSettings,
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        start: makes a new conversation with the model.
        start_beside: makes one with the model beside it, which it may load for that; none: there is no such model.
        settings: where the page is served, and how the model answers until somebody moves the sliders.
    """
    # Before gradio is imported: nothing leaves this computer.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    page = lay_out(Desk(start, start_beside, settings.answer), title)
    open_page(page, settings.host, settings.port)
    display(f"open {page.local_url} in a browser; Ctrl-C ends it")
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def open_page(page: "gradio.Blocks", host: str, port: int) -> None:
    """Serve the page from now on, until it is closed."""
    page.launch(
        server_name=in_address(host),
        server_port=port,
        app_kwargs=guards(host),
        prevent_thread_lock=True,
        share=False,
        quiet=True,
        ssr_mode=False,
        css=STYLE,
        footer_links=[],
        run_history=False,  # conversations are not kept in the browser either
    )


def in_address(host: str) -> str:
    """`host` as part of a URL: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def guards(host: str) -> dict[str, Any]:
    """What gradio's application is to be made with, so that it answers only what the page needs, and at its own names.

    Otherwise a foreign web page could read what the model says by pointing its host name here (DNS rebinding). When the
    page listens on every interface, its names are unknown and none is refused.
    """
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import Response
    from starlette.routing import Route

    names = ["*"] if host in EVERYWHERE else [in_address(host), *LOCAL]
    return {
        "middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)],
        "routes": [Route(f"/gradio_api/{path}", Response(status_code=404)) for path in CLOSED],  # before gradio's own
    }


def lay_out(desk: Desk, title: str) -> "gradio.Blocks":
    """The page, and what its parts do."""
    import gradio

    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Markdown(f"### {title}")
        with gradio.Row():
            chat, beside = (
                gradio.Chatbot(
                    label=name, visible=there, render_markdown=False, latex_delimiters=[], buttons=[], height="60vh"
                )
                for name, there in ((desk.people.you, True), (f"{desk.people.you}, before fine-tuning", False))
            )
        box = gradio.Textbox(placeholder=f"You are {desk.people.me}", show_label=False, interactive=False)
        with gradio.Row():
            send, stop, new = gradio.Button("Send", variant="primary"), gradio.Button("Stop"), gradio.Button("New")
        wanted = gradio.Checkbox(label="Beside it, the model before fine-tuning", visible=desk.start_beside is not None)
        with gradio.Accordion("How it answers", open=False):
            sliders = [
                gradio.Slider(min(least, value), max(most, value), value, step=step, label=name.replace("_", " "))
                for name, (least, most, step) in RANGES.items()
                for value in [getattr(desk.settings, name)]
            ]
        visit = gradio.State(time_to_live=FORGOTTEN)
        shown = [visit, chat, beside]
        turns = {"concurrency_id": "turns", "concurrency_limit": AT_ONCE}  # of all kinds together

        # Nothing can be typed before there is a visit to put it into.
        page.load(lambda: (desk.arrive(), gradio.update(interactive=True)), None, [visit, box])
        # Taken at once, and said when those before it are answered: one that is sent meanwhile is not lost.
        sent = [box.submit, send.click]
        taken = gradio.on(sent, desk.take, [visit, box], visit, queue=False, trigger_mode="multiple")
        gradio.on(sent, None, None, box, js="() => ''")  # in the browser, or what is typed next would be emptied too
        taken.then(desk.say, [visit, *sliders], shown, trigger_mode="multiple", **turns)
        chat.retry(desk.again, [visit, *sliders], shown, **turns)
        chat.undo(desk.undo, visit, shown, **turns)
        gradio.on([new.click, chat.clear, beside.clear], desk.start_over, visit, shown, **turns)
        stop.click(desk.stop, visit, queue=False)
        wanted.input(desk.set_beside, [visit, wanted], [*shown, wanted], **turns)
    for function in page.fns.values():  # they are the page's own, and no interface for programs
        function.api_visibility = "private"
    return page
