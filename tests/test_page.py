"""The page of chat.py --web in a browser: streaming, retry, undo, and separate visitors."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from test_conversation import PEOPLE, talk

from conftest import PROJECT, launch_browser, needs_browser
from dialogues.dialogue import Turn
from dialogues.tokenizer import load_tokenizer
from hub.find import BUNDLED
from load_gpt2_weights import load_for
from settings import AnswerSettings
from talking.conversation import Conversation
from talking.decoder import Decoder
from talking.page import RANGES, Desk, lay_out

pytestmark = needs_browser
WATCH = """() => {
    window.grown = [];
    const texts = () => [...document.querySelectorAll('[data-testid=bot]')].map(each => each.innerText);
    const look = () => window.grown.push(...texts());
    new MutationObserver(look).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""
OUTSIDE = "<img src=x onerror='window.ran = 1'> <b>bold</b>    $$x^2$$ \\(y\\) <|endoftext|>"


@pytest.fixture(scope="module")
def page_address(tmp_path_factory):
    """The address of a page that the command serves on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ("tiny", "--me", "Ann", "--you", "Bo", "--seed", "3", "--base", "tiny", "--port", str(port))
    process = subprocess.Popen(
        [sys.executable, str(PROJECT / "chat.py"), "--web", *options],
        cwd=tmp_path_factory.mktemp("web"),
        env={**os.environ, "PYTHONUTF8": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == f"open http://127.0.0.1:{port}/ in a browser; Ctrl-C stops the server\n"
    yield f"http://127.0.0.1:{port}/"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 130
    process.stdout.close()


class Visitor:
    """A visitor of the page, with a separate browser profile."""

    def __init__(self, browser, address: str) -> None:
        self.page = browser.new_context(viewport={"width": 1200, "height": 900}).new_page()
        self.asked: list[str] = []
        self.loud: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.loud.append(str(error)))
        self.page.goto(address)
        self.page.get_by_placeholder("Type a message as Ann").wait_for()

    def say(self, text: str) -> None:
        box = self.page.get_by_placeholder("Type a message as Ann")
        box.fill(text)
        box.press("Enter")

    def set_slider(self, name: str, value: str) -> None:
        """Type the value into the slider's number field, again if the slider resets it while it appears."""
        number = self.page.get_by_label(f"number input for {name}")

        def stays() -> bool:
            number.fill(value)
            self.page.wait_for_timeout(500)
            return number.input_value() == value

        self.wait(stays)

    def said(self, who: str = "bot", column: int = 0) -> list[str]:
        """The texts on the page: of the model (bot), or of the visitor (user)."""
        return self.page.get_by_label("chatbot conversation").nth(column).get_by_test_id(who).all_inner_texts()

    def wait(self, condition, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, (self.said("user"), self.said())
            time.sleep(0.02)

    def wait_for_answer(self, number: int, column: int = 0) -> str:
        """The text of the model's turn `number`, once it has not grown for a second."""
        self.wait(lambda: len(self.said(column=column)) == number)
        before: list[str] = []
        while (said := self.said(column=column)) != before or not said[-1]:
            before = said
            time.sleep(1)
        return said[-1]


@pytest.fixture
def visitor(page_address):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = launch_browser(playwright)
        yield lambda: Visitor(browser, page_address)
        browser.close()


def test_answers_stream_and_two_visitors_are_separate(visitor):
    ann, other = visitor(), visitor()
    ann.page.evaluate(WATCH)
    ann.say(f"Hi, how are you? {OUTSIDE}")
    first = ann.wait_for_answer(1)
    grown = set(ann.page.evaluate("window.grown")) - {""}  # it streams
    assert len(grown) > 2
    assert all(first.startswith(text) for text in grown)
    assert ann.said("user") == [f"Hi, how are you? {OUTSIDE}"]  # as typed, not as HTML
    assert other.said() == other.said("user") == []

    other.say("What is your name?")
    ann.say("What did you do yesterday?")
    ann.wait_for_answer(2)
    other.wait_for_answer(1)
    ann.say("Did you like it?")
    ann.wait_for_answer(3)
    assert ann.said("user")[1:] == ["What did you do yesterday?", "Did you like it?"]
    assert ann.said()[0] == first
    assert other.said("user") == ["What is your name?"]
    assert len(other.said()) == 1
    assert ann.page.evaluate("window.ran") is None
    assert ann.loud == other.loud == []
    assert all(address.startswith(("http://127.0.0.1", "data:", "blob:")) for address in ann.asked)


def test_retry_undo_new_chat_and_the_sliders_work(visitor):
    ann = visitor()
    ann.page.get_by_role("button", name="Settings").click()
    ann.set_slider("max new tokens", "12")
    ann.say("What shall we do today?")
    first = ann.wait_for_answer(1)
    assert 0 < len(first.split()) <= 12
    ann.page.get_by_role("button", name="Retry").click()
    ann.wait(lambda: ann.said() not in ([], [first]))
    ann.wait_for_answer(1)
    ann.say("And tomorrow?")
    ann.wait_for_answer(2)
    ann.page.get_by_role("button", name="Undo").click()
    ann.wait(lambda: ann.said("user") == ["What shall we do today?"])
    assert len(ann.said()) == 1
    ann.page.get_by_role("button", name="New chat").click()
    ann.wait(lambda: ann.said() == ann.said("user") == [])
    ann.say("")
    ann.page.wait_for_timeout(1000)
    assert ann.said() == ann.said("user") == []
    ann.say("Hi!")
    ann.wait_for_answer(1)
    assert ann.said("user") == ["Hi!"]


def test_the_base_model_answers_next_to_the_model(visitor):
    ann = visitor()
    ann.say("Hi!")
    first = ann.wait_for_answer(1)
    ann.page.get_by_label("Compare with the base model").check()
    ann.wait_for_answer(1, column=1)  # the answer to the earlier message
    assert ann.said() == [first]
    ann.say("What did you do yesterday?")
    ann.wait(lambda: len(ann.said(column=1)) == 2)
    ann.wait_for_answer(2, column=1)
    assert ann.said("user", 1) == ann.said("user") == ["Hi!", "What did you do yesterday?"]
    ann.page.get_by_label("Compare with the base model").uncheck()
    ann.say("Did you like it?")
    ann.wait_for_answer(3)


def test_a_damaged_base_model_is_reported(tmp_path, monkeypatch):
    """The page keeps working, with the box unticked."""
    import gradio

    warned: list[str] = []
    monkeypatch.setattr(gradio, "Warning", warned.append)
    folder = tmp_path / "damaged"
    shutil.copytree(BUNDLED, folder)
    (folder / "model.safetensors").write_bytes(b"no weights")

    def start_beside() -> Conversation:
        return Conversation(
            Decoder(load_for(load_tokenizer(BUNDLED), folder, torch.device("cpu"))), talk().renderer, PEOPLE, 1
        )

    desk = Desk(talk, start_beside, AnswerSettings())
    *_, (visit, mine, beside, there) = desk.set_beside(desk.arrive(), True, *slider_values(desk))
    assert (visit.beside, mine, beside["visible"], there) == (None, [], False, False)
    assert "damaged or cut short" in warned[0]


def slider_values(desk: Desk) -> list[float]:
    return [getattr(desk.settings, name) for name in RANGES]


def test_the_base_model_answers_earlier_messages_when_it_is_added():
    """It must not be shown with the answers of the fine-tuned model."""
    desk = Desk(talk, talk, AnswerSettings(max_new_tokens=3))
    visit = desk.arrive()
    for text in ("Hi!", "How are you?"):
        visit.model.say(text)
        visit.model.turns.append(Turn(PEOPLE.you, "An answer that the base model does not give."))
    *_, (_, mine, beside, there) = desk.set_beside(visit, True, *slider_values(desk))
    assert there
    assert [message["role"] for message in beside["value"]] == ["user", "assistant"] * 2
    assert [message["content"] for message in beside["value"][::2]] == ["Hi!", "How are you?"]
    assert not any("does not give" in message["content"] for message in beside["value"])
    assert len(mine) == 4
    *_, (_, _, beside, there) = desk.set_beside(visit, False, *slider_values(desk))
    assert not there
    assert beside["value"] == []


def test_nan_logits_are_reported(monkeypatch):
    import gradio

    warned: list[str] = []
    monkeypatch.setattr(gradio, "Warning", warned.append)
    desk = Desk(talk, None, AnswerSettings())
    visit = desk.take(desk.arrive(), "Hi!")
    monkeypatch.setattr(visit.model.decoding, "next_logits", lambda ids: torch.full((1, 4096), torch.nan))
    shown = list(desk.say(visit, *(getattr(desk.settings, name) for name in RANGES)))
    assert "its weights are damaged" in warned[0]
    assert [message["content"] for message in shown[-1][1]] == ["Hi!"]


def test_a_visitor_is_told_once_that_a_conversation_was_dropped(monkeypatch):
    import gradio

    warned: list[str] = []
    monkeypatch.setattr(gradio, "Warning", warned.append)
    desk = Desk(talk, None, AnswerSettings(max_new_tokens=3))
    visit = desk.take(None, "Hi!")
    assert len(list(desk.say(visit, *(getattr(desk.settings, name) for name in RANGES)))) > 1
    assert len(warned) == 1
    desk.undo(visit)
    assert len(warned) == 1


def test_a_new_chat_drops_the_messages_that_wait():
    desk = Desk(talk, None, AnswerSettings(max_new_tokens=3))
    visit = desk.take(desk.arrive(), "Hi!")
    desk.take(visit, "How are you?")
    desk.start_over(visit)
    *_, (_, mine, _) = desk.say(visit, *slider_values(desk))
    assert mine == []


def test_stop_ends_an_answer_and_keeps_its_text(visitor):
    ann = visitor()
    ann.page.get_by_role("button", name="Settings").click()
    ann.page.get_by_label("number input for max new tokens").fill("1000")
    ann.page.get_by_label("number input for temperature").fill("2")
    ann.page.get_by_label("number input for top p").fill("1")
    ann.say("Tell me a very long story.")
    ann.wait(lambda: len(ann.said()) == 1 and len(ann.said()[0]) > 10)
    ann.page.get_by_role("button", name="Stop").click()
    stopped = ann.wait_for_answer(1)
    ann.say("Hi!")
    ann.wait(lambda: len(ann.said("user")) == 2)
    assert ann.said()[0] == stopped


def test_messages_sent_quickly_are_all_answered(visitor):
    ann = visitor()
    texts = ["Hi!", "How are you?", "What did you do?", "Did you like it?"]
    for text in texts:  # as soon as the box is empty again
        ann.say(text)
        ann.wait(lambda: ann.page.get_by_placeholder("Type a message as Ann").input_value() == "")
    ann.wait_for_answer(len(texts))
    assert ann.said("user") == texts
    assert all(ann.said())


def test_the_sliders_start_at_the_given_settings():
    import gradio

    asked = AnswerSettings(max_new_tokens=2000, temperature=3, top_k=500, top_p=0.01, repetition_penalty=4)
    page = lay_out(Desk(talk, None, asked), "A page")
    sliders = [block for block in page.blocks.values() if isinstance(block, gradio.Slider)]
    assert [slider.value for slider in sliders] == [getattr(asked, name) for name in RANGES]
    assert all(slider.minimum <= slider.value <= slider.maximum for slider in sliders)
