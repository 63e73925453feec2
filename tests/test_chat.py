"""chat.py from a pipe and in a terminal, and its errors."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_conversation import PEOPLE, talk

from conftest import PROJECT, refused
from dialogues.reading import open_source
from settings import AnswerSettings
from support.errors import UserError
from talking.conversation import Conversation, People
from talking.terminal import Terminal

AS = ("tiny", "--me", "Ann", "--you", "Bo")


def piped(work: Path, lines: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROJECT / "chat.py"), *arguments],
        cwd=work,
        env={**os.environ, "PYTHONUTF8": "1"},
        input=lines,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )


def test_a_pipe_gets_an_answer_for_each_line(work):
    lines = "Hi, how are you?\n\n   \n/again\nDo you like tea? <|endoftext|>\n### Bo:\n/save talks/talk.json\nBye!"
    first, second = (piped(work, lines, *AS, "--seed", "7", "--max-new-tokens", "20") for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    answers = first.stdout.splitlines()
    assert len(answers) == 5
    assert all(answer.startswith("Bo: ") for answer in answers)
    assert "you are Ann, the model is Bo" in first.stderr
    saved = json.loads((work / "talks" / "talk.json").read_text(encoding="utf-8"))
    assert [turn["speaker"] for turn in saved["turns"]] == ["Ann", "Bo"] * 3
    assert [turn["text"] for turn in saved["turns"]][2::2] == ["Do you like tea? <|endoftext|>", "### Bo:"]
    assert [f"Bo: {turn['text']}" for turn in saved["turns"]][1::2] == answers[1:4]
    assert "the file already exists" in second.stderr
    assert open_source(work / "talks" / "talk.json").format == "turns"


def test_a_model_without_known_names_is_called_bot_by_default(work):
    options = ("tiny", "--max-new-tokens", "3", "--seed", "1")
    done = piped(work, "Hi!", *options)
    assert (done.returncode, done.stdout[:5]) == (0, "Bot: ")
    line = "the model knows no names: you are You, and it is Bot; choose other names with --me and --you"
    assert line in done.stderr.splitlines()
    assert piped(work, "Hi!", *options, "--you", "Bo").stdout[:4] == "Bo: "


def test_invalid_utf8_is_replaced_and_a_closed_input_ends_the_chat(work):
    command = [sys.executable, str(PROJECT / "chat.py"), *AS, "--max-new-tokens", "5"]
    done = subprocess.run(command, cwd=work, input=b"Caf\xe9?\n/save t.json\n", capture_output=True, check=True)
    assert done.stdout.count(b"Bo: ") == 1
    assert json.loads((work / "t.json").read_text(encoding="utf-8"))["turns"][0]["text"] == "Caf\ufffd?"
    if os.name == "posix":
        closed = subprocess.run(["sh", "-c", f"{shlex.join(command)} <&-"], cwd=work, capture_output=True, check=True)
        assert closed.stdout == b""


class Typed:
    """A terminal in this process; calling it returns what it shows for the typed lines."""

    def __init__(self, monkeypatch, capsys, settings: AnswerSettings = AnswerSettings(max_new_tokens=12)) -> None:  # noqa: B008
        self.capsys, self.monkeypatch = capsys, monkeypatch
        self.conversation: Conversation = talk(people=PEOPLE)
        self.terminal = Terminal(self.conversation, settings)

    def __call__(self, *lines: str) -> tuple[str, str]:
        self.monkeypatch.setattr("talking.terminal.read_lines", lambda prompt: iter(lines))
        self.terminal.run()
        return tuple(self.capsys.readouterr())


@pytest.fixture
def typed(monkeypatch, capsys) -> Typed:
    return Typed(monkeypatch, capsys)


def test_each_chat_command_works_as_documented(typed):
    said = typed("/undo", "/again", "/save x.json")[1]
    assert said.count("there is no message yet") == 2
    assert said.count("there is no answer yet") == 1
    assert typed("Hi!", "/again", "/again")[0].count("Bo: ") == 3
    assert len(typed.conversation.turns) == 2
    typed("What now?")
    assert "the last message is now Bo: " in typed("/undo")[1]
    assert "the conversation is empty" in typed("/undo")[1]
    typed("Hi!", "/new")
    assert typed.conversation.turns == []
    assert "/undo " in typed("/help")[1]
    assert "/what is not a command" in typed("/what is this")[1]
    assert typed.conversation.turns == []
    typed(" /what is this?")
    assert typed.conversation.turns[0].text == "/what is this?"
    assert "give a file name" in typed("/save")[1]
    assert "/save ~nobody-of-that-name/x: " in typed("/save ~nobody-of-that-name/x")[1]
    assert "cannot write" in typed(f"/save {PROJECT / 'chat.py' / 'talk.json'}")[1]


def test_set_changes_known_settings_and_rejects_others(typed):
    assert "temperature 0.7" in typed("/set")[1]
    assert "temperature 0.0, top_k 5" in typed("/set temperature 0", "/set top-k 5")[1]
    assert (typed.terminal.settings.temperature, typed.terminal.settings.top_k) == (0, 5)
    for line, words in {
        "/set temperature hot": "must be a number",
        "/set temperature": "must be a number",
        "/set temperature -1": "must be 0, or between 0.01 and 100",
        "/set top_p 0": "--top-p 0.0: must be above 0",
        "/set top_k 1.5": "must be a whole number",
        "/set colour red": "/set colour: no such setting; choose from max_new_tokens",
    }.items():
        assert words in typed(line)[1]
    assert "the answer is always the same" in typed("Hi!", "/again")[1]
    assert "Bo: " in typed("/set temperature 1", "/set top_p 1e-300", "Hi!")[0]


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(typed, monkeypatch):
    shown: list[str] = []

    def show(text: str) -> None:
        shown.append(text)
        if len(shown) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("talking.terminal.show", show)
        patch.setattr(typed.terminal, "tell", lambda text, end="\n": shown.append(text))
        typed("Tell me a long story about your holidays.")
    assert " (stopped)" in shown
    assert [turn.speaker for turn in typed.conversation.turns] == ["Ann", "Bo"]
    assert typed.conversation.turns[1].text == "".join(shown[1:4]).strip()
    assert "Bo: " in typed("Go on.")[0]


def test_an_empty_answer_adds_no_turn(typed, monkeypatch):
    monkeypatch.setattr(typed.conversation, "draw_tokens", lambda settings: iter([4095]))
    said, told = typed("Hi!")
    assert said == "Bo: \n"
    assert "Bo gave an empty answer" in told
    assert len(typed.conversation.turns) == 1


@pytest.mark.parametrize("settings", [AnswerSettings(), AnswerSettings(temperature=0)])
def test_nan_logits_end_the_chat(typed, monkeypatch, settings):
    def no_numbers(ids):
        return torch.full((1, 4096), torch.nan)

    typed.terminal.settings = settings
    monkeypatch.setattr(typed.conversation.decoding, "next_logits", no_numbers)
    with pytest.raises(UserError, match="its weights are damaged"):
        typed("Hi!")
    assert typed.capsys.readouterr().out == "Bo: \n"


def test_names_are_escaped_in_the_terminal(typed):
    typed.conversation.people = People("Ann", "Bo\x1b[31m\x07\r\u202e")
    said = typed("Hi!")[0]
    assert said.startswith("Bo\\x1b[31m\\x07\\x0d\\u202e: ")
    assert "Bo\\x1b[31m\\x07\\x0d\\u202e: " in typed("/again", "/new", "Hi!", "/undo")[0]


def test_control_characters_are_escaped_in_the_terminal(typed, monkeypatch):
    tokens = typed.conversation.renderer.tokenizer.encode_ordinary("A \x1b[31mred\x07 word")
    monkeypatch.setattr(typed.conversation, "draw_tokens", lambda settings: iter(tokens))
    assert typed("Hi!")[0] == "Bo: A \\x1b[31mred\\x07 word\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "there is no finished run in runs/"),
        (("tiny", "--me", "Bo", "--you", "Bo"), "both Bo"),
        (("tinny",), "did you mean tiny?"),
        ((*AS, "--temperature", "-1", "--port", "0"), "--temperature -1.0"),
        (("unfinished",), "finetune.py --resume unfinished"),
    ],
)
def test_an_error_is_one_line(command, work, arguments, words):
    (work / "unfinished").mkdir()
    (work / "unfinished" / "settings.json").write_text("{}")
    assert words in refused(command("chat.py", *arguments))


def test_help_lists_the_options(command):
    done = command("chat.py", "--help")
    assert done.returncode == 0
    assert "--repetition-penalty" in done.stdout


class Tmux:
    """A real terminal: type into it and read its screen."""

    def __init__(self, work: Path) -> None:
        self.socket = str(work / "tmux")
        command = shlex.join([sys.executable, str(PROJECT / "chat.py"), *AS, "--seed", "3", "--max-new-tokens", "60"])
        self("new-session", "-d", "-x", "100", "-y", "40", "-c", str(work), f"{command}; echo rc=$?; sleep 60")

    def __call__(self, *words: str) -> str:
        done = subprocess.run(
            ["tmux", "-S", self.socket, *words], capture_output=True, text=True, timeout=30, check=True
        )
        return done.stdout

    def type(self, text: str, key: str = "Enter") -> None:
        self("send-keys", "-l", text)
        self("send-keys", key)

    def screen(self) -> str:
        return self("capture-pane", "-p")

    def wait(self, words: str, times: int = 1, seconds: float = 60) -> str:
        """The screen, as soon as `words` occur on it `times` times."""
        until = time.monotonic() + seconds
        while (screen := self.screen()).count(words) < times:
            assert time.monotonic() < until, screen
            time.sleep(0.02)
        return screen


@pytest.fixture
def tmux(work):
    if not shutil.which("tmux"):
        pytest.skip("tmux is not installed")
    terminal = Tmux(work)
    yield terminal
    subprocess.run(["tmux", "-S", terminal.socket, "kill-server"], check=False, capture_output=True)


def test_answers_stream_and_lines_can_be_edited_in_a_terminal(tmux, work):
    """The screen shows an answer as it grows. One line is edited, and one is recalled from the history."""
    tmux.wait("Ann:")
    tmux.type("Hi, how are yo")
    tmux("send-keys", "BSpace")  # the line above was sent; this one is edited
    grown = set()
    until = time.monotonic() + 60
    while (screen := tmux.screen()).count("Ann:") < 2:
        grown.update(line for line in screen.splitlines() if line.startswith("Bo: "))
        assert time.monotonic() < until, screen
    assert len(grown) > 2
    assert all(longer.startswith(shorter) for shorter, longer in zip(sorted(grown), sorted(grown)[1:], strict=False))
    tmux.type("What did you do yesterdax")
    tmux.wait("Ann:", 3)
    tmux("send-keys", "Up")  # the history
    tmux("send-keys", "BSpace")
    tmux.type("y?")
    screen = tmux.wait("Ann:", 4)
    assert "What did you do yesterday?" in screen
    tmux.type("/save talk.json")
    tmux.wait("(saved to talk.json)")
    tmux("send-keys", "C-d")
    tmux.wait("rc=0")
    turns = json.loads((work / "talk.json").read_text(encoding="utf-8"))["turns"]
    assert [turn["text"] for turn in turns][::2] == [
        "Hi, how are yo",
        "What did you do yesterdax",
        "What did you do yesterday?",
    ]


def test_ctrl_c_stops_an_answer_and_a_closed_terminal_ends_the_chat(tmux):
    tmux.wait("Ann:")
    tmux.type("Tell me a long story.")
    tmux.wait("Bo: ")
    tmux("send-keys", "C-c")
    tmux.wait("Ann:", 2)
    tmux("send-keys", "C-c")
    tmux.wait("(Ctrl-D quits)")
    tmux.type("And another one.")
    tmux.wait("Bo: ", 2)
    pane = int(tmux("display-message", "-p", "#{pane_pid}"))
    (chat,) = map(
        int, subprocess.run(["pgrep", "-P", str(pane)], capture_output=True, text=True, check=True).stdout.split()
    )
    tmux("kill-server")  # during an answer
    until = time.monotonic() + 20
    while Path(f"/proc/{chat}").exists():
        assert time.monotonic() < until, "the program outlives its terminal"
        time.sleep(0.1)


@pytest.mark.skipif(os.name == "nt", reason="no such signal")
def test_sigterm_during_an_answer_ends_the_chat(work):
    process = subprocess.Popen(
        [sys.executable, str(PROJECT / "chat.py"), *AS, "--temperature", "1.5", "--top-p", "1"],
        cwd=work,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin
    assert process.stdout
    assert process.stderr
    process.stdin.write(b"Tell me a long story.\n" * 50)
    process.stdin.flush()
    process.stdout.read(5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 130
    assert b"Traceback" not in process.stderr.read()
    for stream in (process.stdin, process.stdout, process.stderr):
        stream.close()


def test_a_page_needs_gradio_and_a_free_port(monkeypatch):
    import socket

    from settings import ChatSettings
    from talking.page import check_page

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port} can't be used: .*; choose another"):
            check_page(ChatSettings(port=port))
    check_page(ChatSettings(port=port))
    with pytest.raises(UserError, match="--host nowhere.invalid"):
        check_page(ChatSettings(host="nowhere.invalid"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match='--web: the package gradio is not installed; .*pip install .*"gradio>='):
        check_page(ChatSettings())
