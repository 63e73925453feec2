"""`--data` finds the files of paths, folders, archives, patterns and pipes, and reads their bytes."""

import bz2
import datetime
import gzip
import importlib
import io
import json
import lzma
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from conftest import PROJECT
from dialogues import arrow, inputs
from dialogues.inputs import Input, find_inputs
from dialogues.kinds import MEDIA
from dialogues.opening import open_paths
from dialogues.reading import open_source
from hub.find import find_model_folder
from settings import ReadSettings
from support.errors import UserError
from support.files import check_output_path

TALK = "Ann: Tea?\nBo: Yes, é.\n"


def fill(folder: Path, *names: str, content: str = TALK) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


def names_in(folder: Path, pattern: str = "") -> list[str]:
    return [str(Path(each.name).relative_to(folder)) for each in find_inputs([folder / pattern]).inputs]


def refusal(*paths: Path | str) -> str:
    """The error for paths that can't be found or opened."""
    with pytest.raises(UserError) as caught:
        for each in find_inputs(map(Path, paths)).inputs:
            each.open().close()
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestOpen:
    @pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress, bz2.compress])
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
    def test_every_compression_and_encoding_gives_the_same_text(self, tmp_path, pack, encoding):
        mark = "\ufeff" if encoding.endswith(("le", "be")) else ""
        text = TALK * 40_000  # more than one piece to recode
        (tmp_path / "talk").write_bytes(pack((mark + text).encode(encoding)))
        one = Input.of(tmp_path / "talk")
        plain = pack is bytes and encoding in ("utf-8", "utf-8-sig")
        assert one.size == ((tmp_path / "talk").stat().st_size if plain else None)
        for _ in range(2):
            assert one.read() == text.encode()
        assert b"".join(line for _, line in one.lines()) == text.encode()
        assert pickle.loads(pickle.dumps(one)).read() == text.encode()

    def test_a_member_of_an_archive_is_read(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("chats/talk.txt.gz", gzip.compress(TALK.encode("utf-16")))
        one = Input.of(tmp_path / "a.zip")
        assert (one.name, one.found) == (f"{tmp_path}/a.zip/chats/talk.txt.gz", False)
        assert pickle.loads(pickle.dumps(one)).read().decode() == TALK

    def test_lines_end_at_line_feeds_only(self, tmp_path):
        text = "a\u2028b\x85c\r\nd\n\ne"
        (tmp_path / "talk").write_bytes(text.encode("utf-16"))
        expected = list(enumerate(io.BytesIO(text.encode()), 1))
        assert list(Input.of(tmp_path / "talk").lines()) == expected

    def test_a_file_too_large_for_memory_is_refused(self, tmp_path, monkeypatch):
        (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(20_000_000)))
        one = Input.of(tmp_path / "bomb.gz")
        assert len(one.read(20_000_000)) == 20_000_000
        with pytest.raises(UserError, match=r"bomb.gz: it exceeds 0.01 GB unpacked, .*; save it as JSON Lines"):
            one.read(10_000_000)
        monkeypatch.setattr(inputs, "LIMIT", 1_000_000)
        with pytest.raises(UserError, match="it exceeds 0.001 GB"):
            next(one.lines())
        (tmp_path / "many").write_bytes(b"x\n" * 100)
        many = Input.of(tmp_path / "many")
        assert len(list(many.lines(200))) == len(list(many.lines())) == 100
        with pytest.raises(UserError, match="it exceeds 1.98e-07 GB, too much to read at once"):
            list(many.lines(198))

    def test_damage_is_reported_anywhere_in_a_file(self, tmp_path):
        packed = gzip.compress(os.urandom(1_000_000))
        (tmp_path / "cut.gz").write_bytes(packed[:500_000])
        cut = Input.of(tmp_path / "cut.gz")
        for read in (cut.read, lambda: list(cut.lines())):
            with pytest.raises(UserError, match=r"cut.gz is damaged or cut short"):
                read()
        (tmp_path / "half").write_bytes(TALK.encode("utf-16")[:-1])
        with pytest.raises(UserError, match="starts like UTF-16 but is not; save the file as UTF-8"):
            Input.of(tmp_path / "half").read()


class TestFolders:
    def test_files_are_found_and_sorted_in_natural_order(self, tmp_path):
        fill(tmp_path, "b/message_10.json", "b/message_2.json", "B/a.txt.gz", "A.csv", "b/c/1.jsonl", "9.md", "10.log")
        expected = ["9.md", "10.log", "A.csv", "B/a.txt.gz", "b/c/1.jsonl", "b/message_2.json", "b/message_10.json"]
        assert names_in(tmp_path) == expected

    def test_files_that_are_not_read_are_counted(self, tmp_path):
        fill(tmp_path, "talk.txt", "photo.JPG", "voice/1.opus", ".hidden.txt", ".git/a.txt", "__MACOSX/._talk.txt")
        fill(tmp_path, "README.md", "dataset_info.json", "notes.docx", "runs/x/metrics.jsonl", "runs/x/train_data.txt")
        found = find_inputs([tmp_path])
        assert [each.name for each in found.inputs] == [f"{tmp_path}/talk.txt"]
        assert found.ignored == {
            "hidden folders": 2,
            "folders of models and runs": 1,
            "hidden files": 1,
            "images, audio and video": 2,
            "other files": 3,
        }

    def test_a_folder_without_conversations_is_refused(self, tmp_path):
        assert "has no conversation file (.arrow, .csv, .json" in refusal(tmp_path)
        fill(tmp_path, "messages.html", content="<!DOCTYPE html><html>")
        assert refusal(tmp_path).startswith(f"{tmp_path}/messages.html is a web page; export the chat as JSON")

    def test_a_model_is_not_mistaken_for_conversations(self):
        assert "is a run or model folder" in refusal(PROJECT / "models" / "tiny")

    def test_a_folder_of_archives_is_read(self, tmp_path):
        for name in ("b", "a"):
            with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
                archive.writestr("_chat.txt", TALK)
        assert names_in(tmp_path) == ["a.zip/_chat.txt", "b.zip/_chat.txt"]


class TestArchives:
    def archive(self, path: Path, *names: str) -> Path:
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, TALK)
        return path

    def test_an_archive_of_several_conversations_is_read(self, tmp_path):
        path = self.archive(tmp_path / "a.zip", "2.txt", "10.txt", "1/x.json", "p.jpg", "__MACOSX/2.txt", "r.bin")
        found = find_inputs([path])
        assert [each.member for each in found.inputs] == ["1/x.json", "2.txt", "10.txt"]
        assert all(each.found and each.read().decode() == TALK for each in found.inputs)
        assert found.ignored == {"images, audio and video": 1, "hidden files": 1, "other files": 1}

    def test_attachments_of_a_chat_are_not_read_as_chats(self, tmp_path):
        path = self.archive(tmp_path / "a.zip", "00000012-notes.txt", "_chat.txt", "00000013-PHOTO.jpg")
        found = find_inputs([path])
        assert [each.member for each in found.inputs] == ["_chat.txt"]
        assert found.ignored == {"images, audio and video": 1, "other files": 1}

    def test_archives_without_conversations_are_refused(self, tmp_path):
        assert "has no conversation file" in refusal(self.archive(tmp_path / "a.zip"))
        assert "has no conversation file" in refusal(self.archive(tmp_path / "a.zip", "p.jpg"))
        assert "is a spreadsheet; save it as CSV" in refusal(self.archive(tmp_path / "a.xlsx", "xl/workbook.xml"))
        assert "is a Word document; save" in refusal(self.archive(tmp_path / "a.docx", "word/document.xml"))
        assert "OpenDocument" in refusal(self.archive(tmp_path / "a.ods", "mimetype", "content.xml"))

    def test_an_encrypted_archive_is_refused(self, tmp_path):
        path = self.archive(tmp_path / "a.zip", "a.txt")
        content = bytearray(path.read_bytes())
        for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            content[content.index(mark) + place] |= 1
        path.write_bytes(content)
        assert refusal(path) == f"{path}/a.txt: the archive is encrypted; unpack it"

    def test_control_characters_in_file_names_are_escaped(self, tmp_path):
        path = self.archive(tmp_path / "a.zip", "\x1b[2J.txt")
        assert Input.of(path).name == f"{path}/\\x1b[2J.txt"


class TestPaths:
    def test_patterns_are_expanded(self, tmp_path):
        fill(tmp_path, "chat2.txt", "chat10.txt", "x/chat1.txt", "[a].txt")
        assert names_in(tmp_path, "*.txt") == ["[a].txt", "chat2.txt", "chat10.txt"]
        assert names_in(tmp_path, "**/chat*.txt") == ["chat2.txt", "chat10.txt", "x/chat1.txt"]
        assert Input.of(tmp_path / "[a].txt").read().decode() == TALK
        assert "no file matches this pattern" in refusal(tmp_path / "*.json")

    def test_paths_accumulate_and_each_file_is_read_once(self, tmp_path):
        fill(tmp_path, "b.txt", "a/1.txt")
        found = find_inputs([tmp_path / "b.txt", tmp_path / "a", tmp_path / "a" / ".." / "b.txt", tmp_path])
        assert [Path(each.name).name for each in found.inputs] == ["b.txt", "1.txt"]
        assert found.ignored == {"files given twice": 3}

    def test_a_missing_path_gets_advice(self, tmp_path):
        missing = tmp_path / "no.txt"
        assert refusal(missing) == f"--data {missing} does not exist; give the path of your conversation file"
        for name in ("open/talks", "https://huggingface.co/datasets/open/talks"):
            assert "hf download open/talks --repo-type dataset --local-dir FOLDER, then --data FOLDER" in refusal(name)
        assert "it is a web address: download it" in refusal("https://example.org/talk.json")
        assert "hf download" not in refusal("chats/talk.json")

    def test_a_path_below_a_file_is_reported_as_missing(self, tmp_path):
        fill(tmp_path, "talk.txt")
        assert "does not exist" in refusal(tmp_path / "talk.txt" / "x.txt")


KINDS = {
    "a.pdf": (b"%PDF-1.4", "a PDF; save it as plain text"),
    "a.rtf": (b"{\\rtf1 hi}", "an RTF document; save it as plain text"),
    "a.doc": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document"),
    "msgstore.db": (b"SQLite format 3\0", "a database; export the conversations"),
    "sms.xml": (b'<?xml version="1.0"?>\n<smses count="1">', "an SMS backup in XML"),
    "a.xml": (b'<?xml version="1.0"?>\n<log>', "XML; save it as CSV"),
    "a.html": (b"\n<!doctype html>", "a web page; export the chat as JSON"),
    "b.html": (b'<?xml version="1.0"?>\n<html>', "a web page; export the chat as JSON"),
    "a.yml": (b"- - Hello\n  - Hi\n", "YAML; convert it to JSON"),
    "a.jpg": (b"\xff\xd8\xff\xe0\0\x10JFIF", MEDIA),
    "a.webp": (b"RIFF\0\0\0\0WEBP", MEDIA),
    "a.m4a": (b"\0\0\0 ftypM4A ", MEDIA),
    "a.7z": (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    "a.tar": (bytes(257) + b"ustar", "a tar archive; unpack it"),
    "a.zst": (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it"),
}


@pytest.mark.parametrize("name", KINDS)
def test_unsupported_files_get_advice(name, tmp_path):
    content, message = KINDS[name]
    (tmp_path / name).write_bytes(content)
    assert f"{name} is {message}" in refusal(tmp_path / name)
    (tmp_path / name).write_bytes(gzip.compress(content))
    assert f"{name} is {message}" in refusal(tmp_path / name)


@pytest.mark.parametrize(
    "start", ["RIFF: hello", "GIF8: hi", "ID3: hi", "OggS: hi", "Not ftyp: hi", "7z: hi", "PK: hi"]
)
def test_a_chat_that_begins_like_a_different_kind_of_file_is_read(start, tmp_path):
    fill(tmp_path, "talk.txt", content=f"{start}\n{TALK}")
    assert Input.of(tmp_path / "talk.txt").read().decode() == f"{start}\n{TALK}"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
class TestPipes:
    CODE = f"""
import sys
sys.path.insert(0, {str(PROJECT)!r})
from pathlib import Path
from dialogues.inputs import find_inputs, spool_folder
for _ in range(2):
    for one in find_inputs(map(Path, sys.argv[1:])).inputs:
        print(one.name, one.read() == one.read(), one.read())
print(spool_folder().name)
"""

    def run(self, command: str, **options) -> list[str]:
        done = subprocess.run(
            ["bash", "-c", command.replace("PY", f'"{sys.executable}" -c "$CODE"')],
            env={**os.environ, "CODE": self.CODE},
            capture_output=True,
            text=True,
            check=True,
            **options,
        )
        *lines, folder = done.stdout.splitlines()
        assert not Path(folder).exists()
        return lines

    @pytest.mark.parametrize("name", ["-", "/dev/stdin"])
    @pytest.mark.parametrize("feed", ["cat talk.txt | PY {}", "PY {} < talk.txt"])
    def test_standard_input_is_read(self, tmp_path, name, feed):
        fill(tmp_path, "talk.txt")
        expected = f"standard input True {TALK.encode()!r}"
        assert self.run(feed.format(name), cwd=tmp_path) == [expected] * 2

    def test_an_archive_in_a_pipe_and_a_process_substitution_are_read(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("talk.txt", TALK)
        first, second, *_ = self.run("cat a.zip | PY - <(echo A: b)", cwd=tmp_path)
        assert first == f"standard input/talk.txt True {TALK.encode()!r}"
        assert second.startswith("/dev/fd/")
        assert second.endswith(" True b'A: b\\n'")

    def test_several_processes_cannot_share_standard_input(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert "--data -, a pipe, needs a single process" in refusal("-")


class TestTables:
    ROWS = ({"messages": [{"role": "user", "content": "é\n"}], "n": None, "when": "2024-01-01 00:00:00"},) * 2500

    def table(self):
        pyarrow = pytest.importorskip("pyarrow")
        rows = [{**row, "when": datetime.datetime(2024, 1, 1)} for row in self.ROWS]
        return pyarrow.Table.from_pylist(rows)

    def check(self, path: Path) -> None:
        one = Input.of(path)
        assert one.size is None
        lines = list(one.lines())
        assert [number for number, _ in lines] == list(range(1, 2501))
        assert [json.loads(line) for _, line in lines] == list(self.ROWS)

    def test_parquet_files_are_read(self, tmp_path):
        table = self.table()
        parquet = importlib.import_module("pyarrow.parquet")
        parquet.write_table(table, tmp_path / "a.parquet")
        self.check(tmp_path / "a.parquet")
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.write(tmp_path / "a.parquet", "data/a.parquet")
        self.check(tmp_path / "a.zip")
        content = (tmp_path / "a.parquet").read_bytes()
        (tmp_path / "a.parquet").write_bytes(content[:-100])
        with pytest.raises(UserError, match="a.parquet: the table is damaged"):
            Input.of(tmp_path / "a.parquet").read()

    @pytest.mark.parametrize("kind", ["new_file", "new_stream"])
    def test_arrow_files_are_read(self, tmp_path, kind):
        table = self.table()
        ipc = importlib.import_module("pyarrow.ipc")
        fill(tmp_path, "dataset_dict.json", "train/state.json", "train/dataset_info.json", content="{}")
        with getattr(ipc, kind)(tmp_path / "train" / "data-00000-of-00001.arrow", table.schema) as writer:
            writer.write_table(table)
        self.check(tmp_path)

    def test_without_pyarrow_the_error_says_how_to_install_it(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "path", [])
        (tmp_path / "a.parquet").write_bytes(b"PAR1")
        monkeypatch.delitem(sys.modules, "pyarrow", raising=False)
        with pytest.raises(UserError) as caught:
            Input.of(tmp_path / "a.parquet").read()
        assert "the package pyarrow is not installed; " in str(caught.value)
        assert str(caught.value).endswith(f' "{arrow.REQUIREMENT}"')


def test_a_text_without_conversations_is_left_out_of_a_folder(tmp_path):
    fill(tmp_path, "talk.txt")
    fill(tmp_path, "notes.txt", content="Buy milk\nand bread\n")
    opened = open_paths([tmp_path], ReadSettings())
    assert [source.input.name for source in opened.sources] == [str(tmp_path / "talk.txt")]
    assert len(opened.notes) == 1
    assert opened.notes[0].startswith(f"not read: {tmp_path / 'notes.txt'}: no conversation found (")
    with pytest.raises(UserError, match="text starts with 'Buy milk'"):
        open_paths([tmp_path / "notes.txt"], ReadSettings())


def test_an_archive_with_a_damaged_member_name_is_refused(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("café.json", "[]")
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xfe"))
    with pytest.raises(UserError, match=r"a\.zip is damaged or cut short: 'utf-8' codec"):
        find_inputs([path])


def test_the_error_about_too_little_memory_names_the_file(tmp_path, monkeypatch):
    def fail(*arguments):
        raise MemoryError

    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b"[]"))
    monkeypatch.setattr(gzip.GzipFile, "read", fail)
    with pytest.raises(UserError, match=r"a\.json\.gz: not enough memory to read it; split it into several"):
        open_source(path)


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_a_link_that_points_to_itself_is_not_a_file(tmp_path):
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop)
    for data in (loop, tmp_path):
        with pytest.raises(UserError, match="loop.json"):
            find_inputs([data])
    check_output_path(tmp_path / "out.json", [loop])
    with pytest.raises(UserError, match="it is not a folder, a Hugging Face id"):
        find_model_folder(str(loop), tmp_path)
