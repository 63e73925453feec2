"""The blind test: its rounds, its score, guesses.json, the terminal, the page and the report."""

import contextlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_conversation import TURNS, talk

from chat import make_game, rewrite_report
from conftest import PROJECT, launch_browser, needs_browser
from dialogues.dialogue import ALPACA, INSTRUCTION, Dialogue, Turn
from dialogues.template import TEMPLATES, Renderer, render
from dialogues.tokenizer import load_tokenizer
from evaluation.guesses import describe_guesses
from evaluation.run_files import RunFiles
from hub.find import BUNDLED
from pipeline.finished_model import FinishedModel
from pipeline.job import RunFacts
from pipeline.prepare import read_held_out
from pipeline.run_settings import Record, write_settings
from settings import AnswerSettings, ChatSettings, FinetuneSettings
from support.errors import UserError
from support.files import Json, write_json, write_text
from talking.conversation import Conversation, People
from talking.guess_page import GuessDesk
from talking.guess_terminal import play
from talking.guesses import GUESSES, Score, add_guess, read_guesses
from talking.guessing import Game, HeldOut, Place, choose_speakers, cut_alike, find_places, people_at
from talking.page import Desk, lay_out, open_page

HELD_OUT = [Dialogue(tuple(Turn(who, f"Text {number} by {who}.") for who in "ABAB")) for number in range(1, 6)]
WRITTEN = "Words by the model."
TRAINED = Dialogue((Turn("A", "Trained question?"), Turn("B", "Trained answer.")))
DESCRIBED = {"template": "prompt", "instruction": INSTRUCTION, "speakers": ["A", "B"], "learn": "all"}
NO_CHAT = ChatSettings(guess=True)


def scripted(monkeypatch, *replies: str) -> Conversation:
    """A conversation that gives these replies in turn, and starts over after the last."""
    conversation, texts = talk(people=People("A", "B")), itertools.cycle(replies or [WRITTEN])
    monkeypatch.setattr(conversation, "answer", lambda settings: (text for text in [next(texts)]))
    return conversation


def make(conversation: Conversation, folder: Path, seed: int = 1, speakers: str = "AB") -> Game:
    return Game(HeldOut("val", HELD_OUT, list(speakers)), conversation, AnswerSettings(), folder, seed)


def saved(folder: Path, *corrects: bool, **changes: object) -> list[Json]:
    guesses = [{"part": "val", "dialogue": 1, "turn": 2, "correct": correct, **changes} for correct in corrects]
    write_json(folder / GUESSES, guesses)
    return guesses


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run of the bundled model, as the commands find it."""
    folder = tmp_path / "run"
    shutil.copytree(BUNDLED, folder / "model")
    write_json(folder / "model" / "dialogue.json", DESCRIBED)
    write_settings(folder, FinetuneSettings(), BUNDLED, Record(RunFacts(), {}, {}))
    write_json(folder / "generated_conversations.json", [])
    write_text(folder / "train_data.txt", render(TRAINED) + "\n")
    write_text(folder / "val_data.txt", "".join(render(dialogue) + "\n" for dialogue in HELD_OUT))
    return folder


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("instruction", [INSTRUCTION, "", "Two friends\ntalk: about tea."])
def test_a_rendered_dialogue_can_be_read_back(template, instruction):
    renderer = Renderer(load_tokenizer(BUNDLED), template, ["Ann", "Bo"])
    dialogue = Dialogue(TURNS, instruction)
    assert renderer.parse(render(dialogue, template), ["Ann", "Bo"]) == dialogue


def test_the_test_part_comes_first_and_the_training_part_is_never_read(run):
    renderer = talk().renderer
    assert read_held_out(run, renderer, ["A", "B"]) == ("val", HELD_OUT)
    write_text(run / "test_data.txt", render(HELD_OUT[2]) + "\n")
    assert read_held_out(run, renderer, ["A", "B"]) == ("test", [HELD_OUT[2]])


def test_a_round_shows_a_true_and_a_generated_reply_after_the_history(tmp_path, monkeypatch):
    game = make(scripted(monkeypatch), tmp_path)
    seen = set()
    for _ in range(15):
        made = game.next_round()
        assert made
        turns = HELD_OUT[made.place.dialogue - 1].turns
        assert list(made.history) == list(turns[: made.place.turn - 1])
        assert (made.speaker, made.texts[made.real - 1]) == turns[made.place.turn - 1]
        assert made.texts[2 - made.real] == WRITTEN
        assert list(game.conversation.turns) == list(made.history)
        assert game.conversation.people.you == made.speaker
        assert not made.repeated
        seen.add(made.place)
    assert seen == {Place(dialogue, turn) for dialogue in range(1, 6) for turn in (2, 3, 4)}
    again = game.next_round()
    assert again
    assert again.repeated


def test_a_seed_makes_the_order_repeatable(tmp_path, monkeypatch):
    conversation = scripted(monkeypatch)
    rounds = [[make(conversation, tmp_path, seed).next_round() for seed in range(20)] for _ in range(2)]
    assert rounds[0] == rounds[1]
    assert {made.real for made in rounds[0] if made} == {1, 2}
    assert len({made.place for made in rounds[0] if made}) > 5


def test_a_generated_reply_is_sampled_as_in_a_chat(tmp_path):
    """The model sees the dialogue with its own instruction, and stops soon after the length of the true reply."""
    settings = AnswerSettings(temperature=0)
    dialogue = Dialogue((Turn("Ann", "Did you sleep well?"), Turn("Bo", "Like a log, thanks.")), "Friends talk.")
    game = Game(HeldOut("val", [dialogue], ["Bo"]), talk(), settings, tmp_path, 1)
    made = game.next_round()
    chat = talk(people=People("Ann", "Bo", "Friends talk.", ("Cy",)))
    chat.say("Did you sleep well?")
    whole = "".join(chat.answer(settings))
    assert made
    assert made.texts == cut_alike("Like a log, thanks.", whole, False)[:: 1 if made.real == 1 else -1]


def test_places_have_text_and_a_speaker_that_the_model_learned():
    turns = (Turn("A", "Hi"), Turn("B", ""), Turn("A", "Hello?"), Turn("B", "Yes?"), Turn("C", "Who?"))
    held_out = HeldOut("val", [Dialogue(turns)], choose_speakers("all", ["A", "B"], None))
    assert find_places(held_out, alpaca=False) == [(1, 3), (1, 4)]
    assert choose_speakers("replies", ["A", "B"], None) == ["A", "B"]
    assert choose_speakers("B", ["A", "B"], None) == ["B"]
    assert choose_speakers("all", ["A", "B"], "A") == ["A"]
    assert choose_speakers("all", ["all", "B"], None) == ["all", "B"]
    people = people_at(Dialogue(turns, "Talk."), 3, People("A", "D"))
    assert people == People("A", "B", "Talk.", ("C", "D"))


def test_an_instruction_model_is_asked_for_responses_to_an_instruction_alone():
    asked, given, answer = Turn("Instruction", "Add."), Turn("Input", "1 and 1"), Turn("Response", "2")
    dialogues = [Dialogue((asked, answer), ALPACA), Dialogue((asked, given, answer), ALPACA)]
    assert find_places(HeldOut("val", dialogues, ["Instruction", "Input", "Response"]), alpaca=True) == [(1, 2)]


@pytest.mark.parametrize(
    ("true", "generated", "unfinished", "texts"),
    [
        ("a b c d e f g h", "1 2 3 4 5 6 7", False, ("a b c d e f\xa0…", "1 2 3 4 5 6\xa0…")),
        ("a b c d e f", "1 2 3 4 5 6", False, ("a b c d e f", "1 2 3 4 5 6")),
        ("a b c d e f g", "1 2 3 4 5 6 7", True, ("a b c d e f\xa0…", "1 2 3 4 5 6\xa0…")),
        ("a b", "1 2 3 4 5 6 7", False, ("a b", "1 2 3 4 5\xa0…")),
        ("a\n\nb c d e f g h", "1 2 3 4 5 6 7", False, ("a\n\nb c d e f\xa0…", "1 2 3 4 5 6\xa0…")),
    ],
)
def test_replies_are_cut_to_the_same_length(true, generated, unfinished, texts):
    """Both end in the middle, so that the cut does not tell which one is real."""
    assert cut_alike(true, generated, unfinished) == texts


def test_empty_and_equal_replies_are_generated_again_or_skipped(tmp_path, monkeypatch):
    first = HELD_OUT[0].turns[1].text
    game = make(scripted(monkeypatch, "", first, WRITTEN), tmp_path)
    assert game.make_texts(Place(1, 2)) == (first, WRITTEN)
    assert make(scripted(monkeypatch, ""), tmp_path).next_round() is None
    with pytest.raises(UserError, match="try a higher --temperature"):
        play(make(scripted(monkeypatch, ""), tmp_path))


def test_guesses_are_kept_over_sessions(tmp_path, monkeypatch):
    saved(tmp_path, True, False)
    game = make(scripted(monkeypatch), tmp_path)
    assert game.score == (1, 2)
    for _ in range(14):  # all places but the known one
        made = game.next_round()
        assert made
        assert made.place != (1, 2)
        assert game.take(made, made.real)
    last = game.next_round()
    assert last
    assert last.place != (1, 2)  # shown twice
    assert last.repeated
    assert not game.take(last, 3 - last.real)
    assert game.score == make(scripted(monkeypatch), tmp_path).score == (15, 17)
    kept = read_guesses(tmp_path / GUESSES)[-1]
    assert kept["sampling"]["temperature"] == AnswerSettings().temperature
    assert {name: kept[name] for name in kept if name != "sampling"} == {
        "part": "val",
        **last.place._asdict(),
        "correct": False,
    }
    assert "Text" not in (tmp_path / GUESSES).read_text()


@pytest.mark.parametrize(
    "content", ["[", "{}", "[1]", '[{"correct": 1}]', '[{"part": "val", "dialogue": 1, "turn": 2}]']
)
def test_a_damaged_file_is_one_line_that_names_it(content, tmp_path, monkeypatch):
    write_text(tmp_path / GUESSES, content)
    with pytest.raises(UserError, match=r"guesses\.json.*; restore or delete it"):
        make(scripted(monkeypatch), tmp_path)
    with pytest.raises(UserError, match=r"guesses\.json"):
        add_guess(tmp_path / GUESSES, {})
    assert (tmp_path / GUESSES).read_text() == content
    run = RunFiles(tmp_path)
    assert describe_guesses(run) == ""
    assert "guesses.json" in run.notes[0]


def test_the_interval_is_wilsons():
    assert Score(12, 20).interval() == pytest.approx((0.3866, 0.7812), abs=5e-5)
    for right, guesses in ((0, 10), (10, 10), (1, 1), (700, 1000)):
        low, high = Score(right, guesses).interval()
        for end in (low, high):  # the ends solve (share - p)² = z² p (1 - p) / n
            assert (right / guesses - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / guesses, abs=1e-7)
        assert low <= right / guesses <= high
    assert str(Score(12, 20)) == "12 of 20 (95% interval: 39% to 78%; chance is 50%)"
    assert str(Score(5, 9)) == "5 of 9"


def errors_of(found: FinishedModel, settings: ChatSettings = NO_CHAT) -> str:
    with pytest.raises(UserError) as caught:
        make_game(found, talk().renderer, settings, talk)
    return str(caught.value)


def test_a_model_without_held_out_conversations_is_an_error(run):
    found = FinishedModel(run / "model", DESCRIBED, run, None)
    assert "is not part of one" in errors_of(found._replace(run=None))
    assert "have no reply by Cy" in errors_of(found, ChatSettings(guess=True, you="Cy"))
    write_text(run / "val_data.txt", "")
    assert "val_data.txt is missing or empty" in errors_of(found)
    (run / "val_data.txt").unlink()
    assert "val_data.txt is missing or empty" in errors_of(found)
    assert ChatSettings(guess=True, me="A").problems() == ["--guess: --me has no effect; use --you NAME"]


def test_the_page_shows_real_conversations_to_other_computers_only_on_request(run, capsys):
    found, renderer = FinishedModel(run / "model", DESCRIBED, run, None), talk().renderer

    def has_game(**options) -> bool:
        return make_game(found, renderer, ChatSettings(**options), talk) is not None

    assert [has_game(), has_game(web=True), has_game(web=True, host="0.0.0.0")] == [False, True, False]
    assert has_game(web=True, host="0.0.0.0", guess=True)
    (run / "val_data.txt").unlink()
    assert not has_game(web=True)
    assert "the page has no blind test: " in capsys.readouterr().err


def test_it_can_be_played_from_a_pipe(run):
    write_text(run / "report.html", "old")
    done = subprocess.run(
        [sys.executable, str(PROJECT / "chat.py"), str(run), "--guess", "--seed", "1", "--max-new-tokens", "8"],
        env={**os.environ, "PYTHONUTF8": "1"},
        input="1\nwhat?\n2\nq\n1\n",
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("press 1, 2 or q") == 1
    verdicts = [line for line in done.stdout.splitlines() if " is real; your score: " in line]
    assert len(verdicts) == 2
    score = Score(sum(line.startswith("right: ") for line in verdicts), 2)
    assert done.stdout.endswith(f"\nyour score: {score}\nsaved: {run / GUESSES}\n")
    assert [guess["correct"] for guess in read_guesses(run / GUESSES)] == [line[0] == "r" for line in verdicts]
    assert done.stdout.count("\n  1  ") == done.stdout.count("\n  2  ") == 3
    assert "Trained" not in done.stdout
    assert f"recognised in {score.right} of 2 guesses" in (run / "report.html").read_text(encoding="utf-8")


def test_texts_are_escaped_in_the_terminal_and_ctrl_c_ends_the_game(tmp_path, monkeypatch, capsys):
    game = make(scripted(monkeypatch, "\x1b[31mred\x07"), tmp_path)
    monkeypatch.setattr("talking.guess_terminal.read_choices", lambda: iter([1]))
    assert play(game)
    told = capsys.readouterr().out
    assert "\\x1b[31mred\\x07" in told
    assert "\x1b" not in told

    def stopped():
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("talking.guess_terminal.read_choices", stopped)
    assert not play(game)
    assert "earlier guesses: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("corrects", "words"),
    [
        ([True] * 3 + [False], "in 3 of 4 guesses, on 1 reply. Chance is 50%. 10 guesses are needed for an interval."),
        ([True] * 12 + [False] * 8, "60%, with a 95% interval of 39% to 78%. That is not distinguishable from chance"),
        ([True] * 20, "100%, with a 95% interval of 84% to 100%. That is above chance (50%)."),
        ([False] * 20, "That is below chance (50%)."),
    ],
)
def test_the_report_shows_the_score(corrects, words, run):
    rewrite_report(run)
    assert not (run / "report.html").exists()
    write_text(run / "report.html", "old")
    rewrite_report(run)
    assert "Which one is real?" not in (run / "report.html").read_text(encoding="utf-8")
    saved(run, *corrects)
    rewrite_report(run)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert words in page
    assert page.index("<h2>Metrics</h2>") < page.index("Which one is real?") < page.index("<h2>Turn by turn</h2>")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A page with the blind test, its address, and a list of the times that the report was rewritten."""
    rewritten: list[int] = []
    hostile = "<img src=x onerror='window.ran = 1'> ${1 + 1} {{ 2 }} <b>bold</b>"
    dialogue = Dialogue((Turn("A", hostile), Turn("<i>B", "Yes, sure.")))
    held_out = HeldOut("val", [dialogue], ["<i>B"])
    game = Game(held_out, scripted(monkeypatch, hostile), AnswerSettings(), tmp_path, 1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    guessing = GuessDesk(game, lambda: rewritten.append(1))
    page = lay_out(Desk(talk, None, AnswerSettings()), "A page", guessing, guess_first=True)
    open_page(page, "127.0.0.1", port)
    yield f"http://127.0.0.1:{port}/", tmp_path / GUESSES, rewritten
    page.close(verbose=False)


@needs_browser
def test_it_can_be_played_on_the_page(served):
    from playwright.sync_api import sync_playwright

    address, path, rewritten = served
    with sync_playwright() as playwright, contextlib.closing(launch_browser(playwright)) as browser:
        for visitor in (1, 2):
            page = browser.new_context(viewport={"width": 390, "height": 844}).new_page()
            page.goto(address)
            page.get_by_role("button", name="Start").click()
            replies = page.locator(".guess-reply")
            replies.first.wait_for()
            texts = replies.all_inner_texts()
            assert sorted(texts)[1] == "Yes, sure."
            assert sorted(texts)[0] == "<img src=x onerror='window.ran = 1'>\xa0…"
            assert "${1 + 1} {{ 2 }} <b>bold</b>" in page.locator(".guess-history").inner_text()
            assert page.evaluate("document.documentElement.scrollWidth") == 390
            replies.nth(texts.index("Yes, sure.")).click()
            page.get_by_text(f"{'first' if texts[0] == 'Yes, sure.' else 'second'} one is real").wait_for()
            assert page.get_by_text("Your score: 1 of 1.").count() == 1
            assert page.get_by_text("and other visitors: 2 of 2.").count() == visitor - 1
            replies.first.click()  # a later click changes nothing
            page.get_by_role("button", name="Next").click()
            page.get_by_text("Your score").wait_for(state="detached")
            assert len(read_guesses(path)) == len(rewritten) == visitor
            assert page.evaluate("window.ran") is None
            page.get_by_role("tab", name="Chat").click()
            page.get_by_role("button", name="Send").wait_for()


def test_an_error_on_the_page_is_a_warning(tmp_path, monkeypatch):
    import gradio

    warned: list[str] = []
    monkeypatch.setattr(gradio, "Warning", warned.append)
    desk = GuessDesk(make(scripted(monkeypatch), tmp_path), lambda: None)
    player, *_ = desk.next(None)
    write_text(tmp_path / GUESSES, "[")
    desk.guess(1, player)
    assert "guesses.json is not valid JSON" in warned[0]
    assert not player.answered
    (tmp_path / GUESSES).unlink()
    desk.guess(1, player)
    desk.guess(2, player)
    assert len(json.loads((tmp_path / GUESSES).read_text())) == 1
    assert len(warned) == 1
