"""Recognise unsupported files by their first bytes, and give advice on converting them."""

import codecs
from collections.abc import Iterable
from pathlib import PurePath

HEAD = 512  # number of bytes to look at

AS_TEXT = "save it as plain text with lines such as `Alex: Hello!`"
AS_TABLE = "save it as CSV with the columns speaker and text"
UNPACK = "unpack it and give the file or the folder"
MEDIA = "an image, audio or video file; make a transcript of it, as text with lines such as `Alex: Hello!`"
DATABASE = (
    "a database; export the conversations from it as CSV (WhatsApp: in the chat, More > Export chat;"
    " Messages: imessage-exporter -f txt)"
)
SMS = "an SMS backup in XML; open it in a spreadsheet and save sender and text as CSV columns speaker and text"
HTML = (
    'a web page; export the chat as JSON (Telegram Desktop: format "Machine-readable JSON"; Messenger and Instagram:'
    " format JSON), or save its text with lines such as `Alex: Hello!`"
)
XML = f"XML; {AS_TABLE}"
YAML = f"YAML; convert it to JSON, or {AS_TEXT}"

# (offset, signature, kind of file and advice)
MARKS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"%PDF", f"a PDF; {AS_TEXT}"),
    (0, b"{\\rtf", f"an RTF document; {AS_TEXT}"),
    (0, b"\xd0\xcf\x11\xe0", f"an old Office document; {AS_TEXT}, or a spreadsheet as CSV"),
    (0, b"SQLite format 3\0", DATABASE),
    (0, b"7z\xbc\xaf\x27\x1c", f"a 7z archive; {UNPACK}"),
    (0, b"Rar!", f"a RAR archive; {UNPACK}"),
    (0, b"\x28\xb5\x2f\xfd", f"compressed with zstd; {UNPACK}"),
    (257, b"ustar", f"a tar archive; {UNPACK}"),
)
# Images, audio and video: (offset, signature). Some signatures are also words, so require a NUL byte as well.
MEDIA_MARKS: tuple[tuple[int, bytes], ...] = (
    *((0, mark) for mark in (b"\x89PNG", b"\xff\xd8\xff", b"GIF8")),
    *((0, mark) for mark in (b"ID3", b"\xff\xfb", b"OggS", b"fLaC", b"\x1a\x45\xdf\xa3")),
    *((8, mark) for mark in (b"WEBP", b"WAVE", b"AVI ")),
    (4, b"ftyp"),
)
# Member of a zip archive → the kind of document that contains it, and advice.
PARTS = {
    "xl/workbook.xml": f"a spreadsheet; {AS_TABLE}",
    "xl/workbook.bin": f"a spreadsheet; {AS_TABLE}",
    "word/document.xml": f"a Word document; {AS_TEXT}",
    "ppt/presentation.xml": f"a presentation; {AS_TEXT}",
    "META-INF/container.xml": f"an e-book; {AS_TEXT}",
    "content.xml": f"an OpenDocument file; {AS_TEXT}, or a spreadsheet as CSV with the columns speaker and text",
}
PICTURES = (
    *(".jpg", ".jpeg", ".png", ".gif", ".webp", ".heic", ".heif", ".bmp", ".tif", ".tiff", ".svg", ".ico", ".thumb"),
)
FILMS = (".mp4", ".mov", ".m4v", ".3gp", ".avi", ".mkv", ".webm", ".tgs", ".was")
SOUNDS = (".opus", ".ogg", ".oga", ".mp3", ".m4a", ".aac", ".amr", ".wav", ".flac", ".caf")
MEDIA_NAMES = frozenset((*PICTURES, *FILMS, *SOUNDS))


def unreadable_kind(head: bytes, name: str) -> str | None:
    """Return the kind of an unsupported file that begins with `head`, with advice; None for other files."""
    for at, mark, kind in MARKS:
        if head.startswith(mark, at):
            return kind
    if b"\0" in head and any(head.startswith(mark, at) for at, mark in MEDIA_MARKS):
        return MEDIA
    text = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return HTML
    if text.startswith((b"<?xml", b"<smses")):
        return SMS if b"<smses" in text else HTML if b"<html" in text else XML
    return YAML if PurePath(name).suffix.lower() in (".yml", ".yaml") else None


def packed_document(members: Iterable[str]) -> str | None:
    """Return the kind of document that consists of these members, with advice; None for other zip archives."""
    return next((PARTS[name] for name in members if name in PARTS), None)
