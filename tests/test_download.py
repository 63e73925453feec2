"""Downloads from a stand-in hub on loopback; some tests use the real command line."""

import os
import subprocess
import sys
import time

import pytest

from conftest import PROJECT, tiny_reference, write_layout
from stand_in_hub import StandInHub

MEGABYTE = 1 << 20
OWNER = "openai-community/gpt2"
QUICK = ("--epochs", 1, "--max-new-tokens", 2, "--precision", "fp32")
FETCH = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from support.errors import run_command
from hub.find import find_model_folder

run_command(lambda: print(find_model_folder(sys.argv[2], Path("models"))))
"""


@pytest.fixture
def hub(vocabulary, tmp_path):
    folder = write_layout(tiny_reference(n_embd=64), vocabulary, tmp_path / "published", "bare")
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")
    with StandInHub(OWNER, folder).running() as running:
        yield running


@pytest.fixture
def fetch(tmp_path):
    """Return a function that resolves `--model` in a separate process; it returns (exit code, output)."""

    def run(hub: StandInHub, model: str = "gpt2", **environment: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-c", FETCH, str(PROJECT), model],
            cwd=tmp_path,
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def weights(hub: StandInHub) -> bytes:
    return (hub.folder / "model.safetensors").read_bytes()


def publish_large_file(hub: StandInHub) -> None:
    """Publish 25 MB, because huggingface_hub writes in pieces of 10 MB."""
    (hub.folder / "model.safetensors").write_bytes(os.urandom(25 * MEGABYTE))


def ranges_asked(hub: StandInHub) -> list[str]:
    return [wanted for method, name, wanted in hub.requests if (method, name) == ("GET", "model.safetensors")]


def test_the_first_run_downloads_and_the_second_needs_no_network(hub, command, tmp_path):
    done = command("finetune.py", "--model", "gpt2", *QUICK, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "work" / "models" / "gpt2"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "merges.txt",
        "model.safetensors",
        "vocab.json",
    ]
    assert (folder / "model.safetensors").read_bytes() == weights(hub)
    asked = len(hub.requests)
    done = command("finetune.py", "--model", "gpt2", *QUICK, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
    assert done.returncode == 0, done.stderr
    assert len(hub.requests) == asked
    assert (tmp_path / "work" / "runs" / "gpt2-2" / "model" / "model.safetensors").exists()


def test_a_killed_download_resumes_where_it_stopped(hub, fetch, tmp_path):
    publish_large_file(hub)
    hub.stall_after = 22 * MEGABYTE
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH, str(PROJECT), "gpt2"],
        cwd=tmp_path,
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    part = tmp_path / "models" / "gpt2" / "model.safetensors.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size >= 20 * MEGABYTE) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    size = part.stat().st_size
    assert size >= 20 * MEGABYTE
    hub.stall_after = 0
    hub.requests.clear()
    code, output = fetch(hub)
    assert code == 0, output
    assert f"resuming after {size / 1e6:.1f} MB" in output
    assert ranges_asked(hub) == [f"bytes={size}-"]
    assert (tmp_path / "models" / "gpt2" / "model.safetensors").read_bytes() == weights(hub)
    assert not part.exists()


def test_a_download_resumes_after_a_broken_connection(hub, fetch, tmp_path):
    publish_large_file(hub)
    hub.cut_after = 22 * MEGABYTE
    code, output = fetch(hub)
    assert code == 0, output
    first, second = ranges_asked(hub)
    assert first == ""
    assert int(second.removeprefix("bytes=").removesuffix("-")) >= 20 * MEGABYTE
    assert (tmp_path / "models" / "gpt2" / "model.safetensors").read_bytes() == weights(hub)


def test_a_download_starts_over_if_the_server_ignores_ranges(hub, fetch, tmp_path):
    part = tmp_path / "models" / "gpt2" / "model.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(weights(hub)[:200_000])
    hub.refuse_ranges = True
    code, output = fetch(hub)
    assert code == 0, output
    assert part.with_suffix("").read_bytes() == weights(hub)


def test_a_part_longer_than_the_file_is_discarded(hub, fetch, tmp_path):
    part = tmp_path / "models" / "gpt2" / "model.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(weights(hub) + b"more")
    code, output = fetch(hub)
    assert code == 0, output
    assert part.with_suffix("").read_bytes() == weights(hub)


def test_a_damaged_transfer_is_rejected_and_not_kept(hub, fetch, tmp_path):
    hub.flip = True
    code, output = fetch(hub)
    assert code == 2
    assert "error: model.safetensors of openai-community/gpt2 was damaged in transfer" in output
    assert not list((tmp_path / "models" / "gpt2").glob("model.safetensors*"))
    hub.flip = False
    assert fetch(hub)[0] == 0


def test_a_busy_server_is_retried(hub, fetch):
    hub.busy = 2
    code, output = fetch(hub)
    assert code == 0, output
    assert output.count("the hub answered 503") == 2


def test_a_model_with_only_a_bin_file_is_downloaded(hub, fetch, tmp_path):
    (hub.folder / "model.safetensors").unlink()
    code, output = fetch(hub)
    assert code == 0, output
    assert (tmp_path / "models" / "gpt2" / "pytorch_model.bin").exists()


def test_a_published_model_of_this_program_keeps_its_template(hub, fetch, tmp_path):
    names = ("dialogue.json", "added_tokens.json")
    for name in names:
        (hub.folder / name).write_text("{}")
    assert fetch(hub)[0] == 0
    folder = tmp_path / "models" / "gpt2"
    assert all((folder / name).exists() for name in names)
    (folder / "dialogue.json").write_text('{"learn": "all"}')
    (folder / "config.json").unlink()
    assert fetch(hub)[0] == 0
    assert (folder / "dialogue.json").read_text() == '{"learn": "all"}'  # an existing file is not replaced


def test_a_model_or_file_missing_from_the_hub_is_an_error(hub, fetch, tmp_path):
    code, output = fetch(hub, model="someone/no-such-model")
    assert code == 2
    assert f"error: the hub {hub.url} has no model someone/no-such-model" in output
    (hub.folder / "vocab.json").unlink()
    code, output = fetch(hub)
    assert code == 2
    assert "error: openai-community/gpt2 does not have the files of a GPT-2 model" in output


def test_a_missing_network_is_an_error(hub, fetch, tmp_path):
    hub.shutdown()
    hub.server_close()
    code, output = fetch(hub)
    assert code == 2
    assert "error: cannot download openai-community/gpt2" in output
    assert "check the network and start again" in output
    assert not (tmp_path / "models").exists()


def test_a_login_page_is_not_taken_for_a_model(hub, fetch, tmp_path):
    hub.login_page = True
    code, output = fetch(hub)
    assert code == 2
    assert "is not a Hugging Face hub (perhaps a captive portal)" in output
    assert not (tmp_path / "models").exists()
    hub.login_page = False
    assert fetch(hub)[0] == 0


def test_a_part_that_cannot_be_checked_is_downloaded_again(hub, fetch, tmp_path):
    part = tmp_path / "models" / "gpt2" / "vocab.json.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"an old piece")
    assert fetch(hub)[0] == 0
    assert part.with_suffix("").read_bytes() == (hub.folder / "vocab.json").read_bytes()


@pytest.mark.parametrize(("name", "value"), [("HF_ENDPOINT", "http://[::1"), ("HTTP_PROXY", "socks5://127.0.0.1:1")])
def test_malformed_network_settings_are_an_error(hub, fetch, name, value):
    code, output = fetch(hub, **{name: value, "NO_PROXY": ""})
    assert code == 2
    assert output.splitlines()[-1].startswith("error: cannot")
    assert "Traceback" not in output


def test_offline_mode_is_honoured(hub, fetch):
    code, output = fetch(hub, HF_HUB_OFFLINE="1")
    assert code == 2
    assert "HF_HUB_OFFLINE forbids downloads" in output
    assert hub.requests == []


def test_processes_that_start_together_download_once(hub, tmp_path):
    """As under torchrun: one downloads, and the others wait for it."""
    publish_large_file(hub)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", FETCH, str(PROJECT), "gpt2"]
    processes = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(3)
    ]
    outputs = [process.communicate()[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert sum("download: " in output for output in outputs) == 1
    assert (tmp_path / "models" / "gpt2" / "model.safetensors").read_bytes() == weights(hub)
