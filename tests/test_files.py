"""Files are written completely or not at all."""

import math
import os
import stat
import zlib

import pytest

from pipeline.run_folder import create_run_folder
from support.errors import UserError, run_command
from support.files import atomic_path, crc_of, write_json, write_text


def test_a_failed_write_keeps_the_last_good_copy(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "good\n")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "good\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_system_error_becomes_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot write .*No such file or directory"):
        write_text(tmp_path / "no" / "file", "x")


def test_json_is_readable_text_with_plain_newlines(tmp_path):
    write_json(tmp_path / "a.json", {"text": "café 🐕", "path": tmp_path.parent / "x"})
    content = (tmp_path / "a.json").read_bytes()
    assert "café 🐕".encode() in content
    assert b"\r" not in content
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) & 0o600 == 0o600


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_nan_and_infinity_are_not_written_as_json(tmp_path, number):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": [number]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 5, 1 << 20, (1 << 20) + 1])
def test_the_checksum_of_a_file_is_that_of_its_content(tmp_path, size):
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert crc_of(tmp_path / "file") == zlib.crc32(content)
    assert crc_of(tmp_path / "file", zlib.crc32(b"before")) == zlib.crc32(b"before" + content)


def test_run_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [create_run_folder(None, "m", 0).name for _ in range(3)] == ["m-1", "m-2", "m-3"]
    with pytest.raises(UserError, match="too full"):
        create_run_folder(None, "m", 10**18)
    assert create_run_folder(None, "m", 0).name == "m-4"


def test_out_of_memory_is_a_one_line_error(capsys):
    def command():
        raise MemoryError

    with pytest.raises(SystemExit) as stopped:
        run_command(command)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: out of memory; ")
