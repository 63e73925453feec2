"""A stand-in for the Hugging Face hub on loopback that can inject download faults."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LARGE = 100_000


class StandInHub(ThreadingHTTPServer):
    """Serve the files of `folder` as the repository `repo`, and record the requests.

    Faults: `busy` sends that many 503 responses first; `cut_after` breaks the connection once, after that many bytes of
    a large file; `stall_after` stops sending after that many bytes; `flip` damages each large file; `refuse_ranges`
    always sends the whole file; `login_page` answers every request with a login page, like a captive portal.
    """

    daemon_threads = True

    def __init__(self, repo: str, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repo, self.folder = repo, folder
        self.busy = 0
        self.cut_after = self.stall_after = 0
        self.stopped = threading.Event()
        self.flip = self.refuse_ranges = self.login_page = False
        self.requests: list[tuple[str, str, str]] = []  # method, file, range

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def running(self) -> Iterator["StandInHub"]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.stopped.set()
            self.shutdown()
            thread.join()
            self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: StandInHub  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        hub = self.server
        prefix = f"/{hub.repo}/resolve/main/"
        name = self.path.removeprefix(prefix)
        hub.requests.append((self.command, name, self.headers.get("Range", "")))
        if hub.login_page:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>Please log in</html>")
        elif hub.busy:
            hub.busy -= 1
            self.refuse(503)
        elif not self.path.startswith(prefix):
            self.refuse(404, "RepoNotFound")
        elif not (hub.folder / name).is_file():
            self.refuse(404, "EntryNotFound")
        else:
            self.send_file((hub.folder / name).read_bytes(), with_body)

    def refuse(self, status: int, code: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_file(self, content: bytes, with_body: bool) -> None:
        hub = self.server
        # Like the hub: sha256 for large files, git's blob hash for small ones.
        git_blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        etag = hashlib.sha256(content).hexdigest() if len(content) > LARGE else git_blob
        if hub.flip and len(content) > LARGE:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = 0
        if (wanted := self.headers.get("Range")) and not hub.refuse_ranges:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not with_body:
            return
        limit = hub.cut_after or hub.stall_after
        if limit and len(content) > limit:
            self.wfile.write(content[start : start + limit])
            if hub.stall_after:
                hub.stopped.wait()
            hub.cut_after = 0
            self.close_connection = True
        else:
            self.wfile.write(content[start:])

    def log_message(self, format: str, *args: object) -> None:
        pass
