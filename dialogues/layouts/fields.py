"""One message of a structured export: its speaker and its text, or the reason to skip it."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dialogues.layouts.records import is_list, is_object, make_turn, once, pairs_of
from dialogues.layouts.words import (
    ROLES,
    SPEAKER_KEYS,
    SYSTEM,
    SYSTEM_PROMPTS,
    TOOLS,
    Columns,
    TurnKeys,
    find_key,
    is_nothing,
    plain,
    turn_keys,
)

NO_TEXT = object()  # content with images, audio or files
TOOL_TEXT = object()  # content that is a tool call or its result
# Keys under which `human`, `user` and `assistant` are roles; elsewhere they are names.
ROLE_KEYS = frozenset(("role", "from", "type", "sender", "author", "creator", "usertype", "chatrole"))
THOUGHTS = frozenset(("thinking", "reasoning", "thought", "thoughts", "redactedthinking", "reasoningrecap"))
TOOL_PARTS = frozenset(("tooluse", "toolresult", "toolcall", "toolresponse", "functioncall", "servertooluse"))
SPANS = frozenset(  # formatted words inside a line
    (
        *("plain", "link", "bold", "italic", "underline", "strikethrough", "spoiler", "code", "pre", "blockquote"),
        *("mention", "mentionname", "email", "phone", "hashtag", "cashtag", "texturl", "textlink", "botcommand"),
        *("bankcard", "customemoji"),
    )
)
MEDIA_PARTS = re.compile(r"image|picture|photo|audio|video|file|media|document|sticker")
NAME_KEYS = ("nickname", "displayname", "realname", "globalname", "name", "username", "login", "email", "n", "id")
NOTICE_TYPES = re.compile(
    r"service|channel(?:join|leave|topic|purpose|name|namechange|iconchange|pinnedmessage)|group(?:join|leave)|call"
    r"|recipient(?:add|remove)|guildmemberjoin|userjoin|userpremium\w*|threadcreated|threadactivity\w*|event\w*|system\w*"
    r"|notification|notice|missed\w*|botadd|pinneditem"
)
MEDIA_KEYS = frozenset(
    (
        *("photo", "photos", "file", "files", "mediatype", "attachments", "attachment", "sticker", "stickers"),
        *("audiofiles", "gifs", "videos", "share", "image", "images"),
    )
)
DIRECTIONS = ("type", "direction", "folder", "box", "messagetype", "isfromme", "fromme", "issent", "outgoing", "event")
OUTGOING = frozenset(("outgoing", "sent", "out", "outbound", "senditem", "sentitem"))
SKYPE_TAG = re.compile(r"</?(?:a|at|b|i|s|u|pre|ss|e_m|quote|legacyquote|font|span)(?:\s[^<>]{0,500})?/?>")
PROGRAM = re.compile(r"(?:com|org|net)\.\w+(?:\.\w+)+")  # an Android app as the creator of a message
ME, UNKNOWN = "Me", "Unknown"
NOBODY = "nobody"  # role of a nameless sender, which is the program


def read_speaker(values: Mapping[str, Any], keys: TurnKeys) -> tuple[str, str]:
    """Return the speaker's name and role; both are empty if the message names nobody."""
    if keys.role and isinstance(values[keys.role], str):
        word = plain(values[keys.role])
        if word in ROLES or word in SYSTEM or word in TOOLS:
            return ROLES.get(word, word), word
    for key in keys.speaker:
        word = plain(key)
        name, role = name_of(word, values[key])
        if role or (name and not PROGRAM.fullmatch(name)):
            return (ME, "") if word.endswith("id") and is_outgoing(values) else (name, role)
    return (ME if is_outgoing(values) else ""), ""


def name_of(word: str, value: Any) -> tuple[str, str]:
    """Return the name and the role in the value of a speaker key; `word` is the key normalised by `plain`."""
    if isinstance(value, str):
        name = value.strip()
        role = plain(name) if word in ROLE_KEYS else ""
        if role in ROLES:
            return ROLES[role], role
        return name, role if role in SYSTEM or role in TOOLS else ""
    if isinstance(value, bool):
        return (ME if value else UNKNOWN) if word in ("isuser", "fromme", "isfromme") else (
            "User" if value else "Agent"
        ), ""
    if isinstance(value, int):
        return str(value), ""
    if is_list(value):
        return " & ".join(name for each in value if (name := name_of(word, each)[0])), ""
    if is_object(value):
        held = reversed(once(value).items())
        found = {plain(key): text for key, text in held if isinstance(text, str) and text.strip()}
        if "role" in found:
            return name_of("role", found["role"])
        name = next((found[key].strip() for key in (*NAME_KEYS, *SPEAKER_KEYS) if key in found), "")
        if not name:
            inner = (name_of(word, each)[0] for _, each in pairs_of(value) if is_object(each))
            name = next(filter(None, inner), "")  # Teams: {"user": {"displayName": ...}}
        return name, "" if name else NOBODY
    return "", ""


def is_outgoing(values: Mapping[str, Any]) -> bool:
    """Whether a field says, with a word or Android's number 2, that the phone's owner wrote the message."""
    if "address" in values and str(values.get("type")) == "2":
        return True
    return any(
        isinstance(value, str) and plain(value) in OUTGOING and plain(key) in DIRECTIONS
        for key, value in values.items()
    )


def is_other(rows: Sequence[Mapping[str, Any]], columns: Columns) -> bool:
    """Whether every message, sent or received, carries the name of the other person."""
    if not is_directed(rows[0]):
        return False
    names = {read_speaker(row, turn_keys(tuple(row), columns))[0] for row in rows} - {ME, ""}
    return len(names) == 1 and len({is_outgoing(row) for row in rows}) == 2


def is_directed(values: Mapping[str, Any]) -> bool:
    return "address" in values or any(plain(key) in DIRECTIONS for key in values)


def read_content(values: Mapping[str, Any], keys: TurnKeys) -> Any:
    """Return the text of a message, stripped, from the first text key that is not empty.

    The result is `NO_TEXT` for media, `TOOL_TEXT` for tool calls, and None if there is no content; other values are
    returned unchanged.
    """
    found: Any = None
    for key in keys.text:
        text = read_text(values[key])
        if not is_nothing(text):
            return text
        found = text if found is None else found
    return found


def read_text(content: Any) -> Any:
    """Return a message's content as stripped text. Parts in a list are joined, without thoughts and tool calls."""
    if isinstance(content, str):
        return content.strip()
    if is_object(content):
        found = {plain(key): value for key, value in reversed(once(content).items())}
        if plain(str(found.get("contenttype") or "")) in (*THOUGHTS, "code", "executionoutput"):
            return TOOL_TEXT
        inside = next((found[word] for word in ("parts", "text", "content", "value", "body") if word in found), NO_TEXT)
        return inside if inside is NO_TEXT else read_text(inside)
    return join_parts(content) if is_list(content) else content


def system_prompt(values: Mapping[str, Any]) -> str | None:
    """Return the system prompt in the fields of a record; None without one.

    Raises:
        FormatError: the prompt is not text.
    """
    key = find_key(dict(values), SYSTEM_PROMPTS)
    if key is None or values[key] is None:
        return None
    text = read_text(values[key])
    return make_turn("system", text, "the system prompt").text if text else ""


def join_parts(parts: list[Any]) -> Any:
    """Return the joined text of a list of parts, or `NO_TEXT` if any part is an image, audio or a file."""
    texts: list[str] = []
    tools = media = False
    spans = False
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        values = once(part)
        kind = plain(str(values.get("type") or ""))
        spans |= kind in SPANS
        if kind in THOUGHTS or "thought" in values:
            continue
        text = next((values[key] for key in ("text", "value", "content") if isinstance(values.get(key), str)), None)
        if kind in TOOL_PARTS or (not kind and "functionCall" in values):
            tools = True
        elif text is None:
            media |= not kind or bool(MEDIA_PARTS.search(kind))
        else:
            texts.append(text)
    joined = ("" if spans else "\n").join(texts).strip()
    if media:
        return NO_TEXT
    return joined or (TOOL_TEXT if tools else "")


def why_skipped(values: Mapping[str, Any], name: str, role: str, text: Any) -> str:
    """Return the reason to skip a message; empty if it is a turn."""
    if role in TOOLS or text is TOOL_TEXT:
        return "tool calls"
    if values.get("isThought") is True:
        return "thoughts"
    if text is NO_TEXT:
        return "multimodal messages"
    if role == NOBODY or is_notice_type(values):
        return "system lines"
    if plain(name) in ("scenedirections", "stagedirections", "narration"):
        return "stage directions"
    if text is not None and text != "":
        recipient = values.get("recipient")
        return "tool calls" if isinstance(recipient, str) and recipient != "all" and role else ""
    if values.get("tool_calls") or values.get("function_call") or values.get("toolCalls"):
        return "tool calls"
    if any(plain(key) in MEDIA_KEYS and not is_nothing(value) for key, value in values.items()):
        return "media and notices"
    return "messages without text"


def is_notice_type(values: Mapping[str, Any]) -> bool:
    """Whether a field says that the program, not a person, wrote the message."""
    for key, value in values.items():
        if isinstance(value, str) and plain(key) in ("type", "subtype", "messagetype"):
            if NOTICE_TYPES.fullmatch(plain(value)):
                return True
        elif value is True and plain(key) in ("issystem", "meta", "issystemmessage"):
            return True
    return False


def mend_encoding(text: str) -> str:
    """Decode text that was encoded twice, as Messenger and Instagram write it."""
    if text.isascii():
        return text
    try:
        return text.encode("latin-1").decode()
    except UnicodeError:
        return text


def unescape(values: Mapping[str, Any], text: str) -> str:
    """Return the text of a message that Skype or Slack wrote as HTML: `Tom &amp; <b>Ann</b>` → Tom & Ann."""
    if "originalarrivaltime" in values:
        return html.unescape(SKYPE_TAG.sub("", text)).strip()
    return html.unescape(text) if "ts" in values and "user" in values else text


def find_profiles(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Map ids of people to their names, from messages that have both (Slack)."""
    names = {}
    for row in rows:
        profile = dict(pairs_of(row.get("user_profile")))
        name = next((profile[key] for key in ("real_name", "display_name", "name") if profile.get(key)), None)
        if isinstance(name, str) and isinstance(row.get("user"), str):
            names[row["user"]] = name
    return names


def is_unlearned(values: Mapping[str, Any], keys: TurnKeys) -> bool:
    """Whether a message is only context, as `"weight": 0` says."""
    weight = values.get(keys.weight) if keys.weight else None
    if isinstance(weight, str):  # in a table
        return weight.strip().lower() in ("0", "0.0", "false")
    return weight is False or (isinstance(weight, int | float) and weight == 0)
