"""Take the pictures of README.md and docs/: python tests/take_pictures.py

It fine-tunes the bundled model in a temporary folder, talks to it on the chat page with greedy decoding, and opens the
report. It needs Chromium or Google Chrome, and `requirements-dev.txt`.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "benchmarks")]  # as pytest does

from PIL import Image  # noqa: E402
from playwright.sync_api import Browser, Page, sync_playwright  # noqa: E402

from conftest import launch_browser  # noqa: E402

DOCS = PROJECT / "docs"
MESSAGES = ("How is the new job going so far?", "Are you still learning to cook?")
WIDTH = 860  # CSS pixels
MARGIN = 8  # CSS pixels around the two conversations
COLOURS = 128  # enough for flat pages, and a fifth of the bytes
ANSWERED = 8000  # milliseconds to wait until both models have answered a message


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        start("finetune.py", folder=folder).wait()
        browser = launch_browser(playwright)
        chat = start("chat.py", "--web", "--temperature", "0", folder=folder)
        try:
            assert chat.stdout
            picture_chat(browser, chat.stdout.readline().split()[1])
        finally:
            chat.send_signal(signal.SIGTERM)
            chat.wait()
        picture_report(browser, Path(folder) / "runs" / "tiny-1" / "report.html")
        browser.close()


def start(script: str, *options: str, folder: str) -> "subprocess.Popen[str]":
    output = subprocess.PIPE if options else subprocess.DEVNULL
    command = [sys.executable, str(PROJECT / script), *options]
    return subprocess.Popen(command, cwd=folder, stdout=output, text=True, env={**os.environ, "PYTHONUTF8": "1"})


def picture_chat(browser: Browser, address: str) -> None:
    page = browser.new_page(viewport={"width": WIDTH, "height": 590}, device_scale_factor=2)
    page.goto(address)
    box = page.get_by_role("textbox")
    box.wait_for()
    page.get_by_role("checkbox").first.check()
    page.wait_for_timeout(1500)
    for message in MESSAGES:
        box.fill(message)
        box.press("Enter")
        page.wait_for_timeout(ANSWERED)
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    page.wait_for_timeout(500)
    shot(page, "chat.png", 0, page.evaluate("document.documentElement.scrollHeight"))
    frames = page.locator("[aria-label='chatbot conversation']")
    left, right = frames.first.bounding_box(), frames.last.bounding_box()
    assert left
    assert right
    across = (left["x"] - MARGIN, right["x"] + right["width"] + MARGIN)
    shot(page, "before-after.png", left["y"] - MARGIN, left["y"] + left["height"] + MARGIN, across)


def picture_report(browser: Browser, path: Path) -> None:
    page = browser.new_page(viewport={"width": WIDTH, "height": 1000}, device_scale_factor=1.5)
    page.goto(path.as_uri())
    page.wait_for_timeout(500)
    shot(page, "report.png", 40, top_of(page, "Metrics") - 20)
    shot(page, "conversation.png", top_of(page, "Case 2") - 20, top_of(page, "Case 3") - 20)


def top_of(page: Page, heading: str) -> float:
    box = page.get_by_role("heading", name=heading).first.bounding_box()
    assert box
    return box["y"]


def shot(page: Page, name: str, top: float, bottom: float, across: tuple[float, float] = (0, WIDTH)) -> None:
    """Write docs/`name`: the page from `top` to `bottom`, in few colours."""
    path, (left, right) = DOCS / name, across
    area = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    page.screenshot(path=path, full_page=True, clip=area)  # pyright: ignore[reportArgumentType]
    Image.open(path).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"written: {path.relative_to(PROJECT)}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
