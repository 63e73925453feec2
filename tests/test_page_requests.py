"""How the page of chat.py --web answers requests that do not come from the page itself."""

import contextlib
import socket

import httpx
import pytest
from test_conversation import talk

from settings import AnswerSettings
from talking.page import Desk, guards, lay_out, open_page

pytest.importorskip("gradio")
STREAM = "/gradio_api/queue/data?session_hash=a"
FILE = {"files": ("talk.txt", b"Hi!")}


def ask_at(host: str):
    """A page served at `host`, and a client for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    page = lay_out(Desk(talk, None, AnswerSettings(max_new_tokens=3)), "A page")
    open_page(page, host, port)
    return page, httpx.Client(base_url=f"http://127.0.0.1:{port}")


@pytest.fixture(scope="module")
def client():
    page, client = ask_at("127.0.0.1")
    with contextlib.closing(client):
        yield client
    page.close(verbose=False)


def status(client: httpx.Client, method: str, path: str, host: str) -> int:
    """The status code, without the body: some responses never end."""
    with client.stream(method, path, headers={"Host": host}) as answer:
        return answer.status_code


@pytest.mark.parametrize("host", ["elsewhere.example", "elsewhere.example:7860", "127.0.0.1.elsewhere.example", ""])
def test_the_page_rejects_other_host_names(client, host):
    for method, path in (
        ("GET", "/"),
        ("GET", "/config"),
        ("GET", STREAM),
        ("GET", "/gradio_api/heartbeat/a"),
        ("POST", "/gradio_api/queue/join"),
        ("POST", "/gradio_api/run/take"),
        ("POST", "/gradio_api/call/take"),
    ):
        assert status(client, method, path, host) == 400, path


@pytest.mark.parametrize("host", ["localhost:7860", "LOCALHOST", "127.0.0.1:7860", "[::1]:7860"])
def test_the_page_accepts_the_names_of_this_computer(client, host):
    assert status(client, "GET", "/", host) == 200
    assert status(client, "GET", STREAM, host) == 200


@pytest.mark.parametrize(
    ("host", "names"),
    [
        ("fd00::5", ["[fd00::5]", "localhost", "127.0.0.1", "[::1]"]),
        ("chat.example", ["chat.example", "localhost", "127.0.0.1", "[::1]"]),
        ("0.0.0.0", ["*"]),
    ],
)
def test_the_page_accepts_the_host_at_which_it_is_served(host, names):
    (middleware,) = guards(host)["middleware"]
    assert middleware.kwargs["allowed_hosts"] == names


def test_a_page_on_all_interfaces_accepts_every_host_name():
    page, client = ask_at("0.0.0.0")
    with contextlib.closing(client):
        assert status(client, "GET", "/", "my-computer:7860") == 200
    page.close(verbose=False)


def test_uploads_are_rejected(client):
    for path in ("upload", "upload?upload_id=a", "process_recording", "component_server", "component_server/"):
        assert client.post(f"/gradio_api/{path}", files=FILE).status_code == 404, path
    assert client.post("/gradio_api/upload/", files=FILE, follow_redirects=True).status_code == 404


def test_conversations_are_not_written_to_files(client):
    client.post("/gradio_api/run/take", json={"data": [None, "Hi!"], "session_hash": "a"})
    assert client.get("/gradio_api/deep_link?session_hash=a").status_code == 404


def test_the_page_has_no_public_api(client):
    for path in ("/gradio_api/info", "/gradio_api/info?all_endpoints=true"):
        assert client.get(path).json() == {"named_endpoints": {}, "unnamed_endpoints": {}}
    assert {each["api_visibility"] for each in client.get("/config").json()["dependencies"]} == {"private"}


@pytest.mark.parametrize("text", [None, "", "  "])
def test_a_message_without_text_is_ignored(client, text):
    answer = client.post("/gradio_api/run/take", json={"data": [None, text], "session_hash": "b"})
    assert (answer.status_code, answer.json()["data"]) == (200, [None])
    desk = Desk(talk, None, AnswerSettings())
    assert not desk.take(None, text).messages


def test_a_lone_surrogate_in_a_message_is_replaced():
    visit = Desk(talk, None, AnswerSettings()).take(None, "\ud800 hello")
    assert list(visit.messages) == ["? hello"]
