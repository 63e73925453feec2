"""Generated conversation files are read completely, or refused in one line."""

import json
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_formats import read

from dialogues.dialogue import Dialogue
from dialogues.layouts.records import LONGEST_NAME
from support.errors import UserError


def read_or_refused(path: Path, format: str = "auto") -> list[Dialogue] | None:
    """The dialogues of a file; None if it is refused, which must take one line."""
    try:
        return read(path, format)
    except UserError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    return None


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
texts = st.one_of(st.text(max_size=20), st.none(), st.integers(), st.just(""))
roles = st.sampled_from(["system", "user", "assistant", "tool", "Ann", "human", "gpt", ""])
contents = st.one_of(
    texts,
    st.lists(st.one_of(st.text(max_size=5), st.just({"type": "text", "text": "x"}), st.just({"image": 1})), max_size=3),
)
messages = st.fixed_dictionaries(
    {"role": roles, "content": contents}, optional={"tool_calls": st.just([1]), "name": texts}
)
shares = st.fixed_dictionaries({"from": roles, "value": texts})
spoken = st.fixed_dictionaries({"speaker": names, "text": texts})
alpaca = st.fixed_dictionaries({"instruction": texts, "output": texts}, optional={"input": texts})
records = st.one_of(
    st.dictionaries(names, texts, max_size=5),
    st.fixed_dictionaries({"messages": st.lists(messages, max_size=6)}),
    st.fixed_dictionaries({"conversations": st.lists(shares, max_size=6)}),
    st.fixed_dictionaries({"turns": st.lists(spoken, max_size=6)}),
    alpaca,
    st.fixed_dictionaries({"prompt": texts, "completion": texts}),
    st.recursive(
        texts,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3)),
        max_leaves=8,
    ),
)


def count_turns(record: dict) -> int:
    """The number of turns in a record of any format; a system message at the beginning does not count."""
    for key in ("messages", "conversations", "turns"):
        if key in record and isinstance(record[key], list):
            spoken = [is_kept(turn, record[key][:place]) for place, turn in enumerate(record[key])]
            before = record[key][: spoken.index(True)] if any(spoken) else record[key]
            instructions = [turn for turn in before if role_of(turn) == "system" and not is_skipped(turn, empty=False)]
            return len(record[key]) - len(instructions)
    if "instruction" in record:
        return 2 + (record.get("input") is not None and str(record["input"]).strip() != "")
    return len(record)


def is_kept(turn: dict, earlier: list[dict]) -> bool:
    """Whether a message becomes a turn; the assistant's answer to an image does not."""
    if is_skipped(turn) or role_of(turn) == "system":
        return False
    if role_of(turn) not in ("assistant", "gpt"):
        return True
    asked = (one for one in reversed(earlier) if not is_tool_call(one))
    question = next((one for one in asked if role_of(one) != "system" or has_image(one)), None)
    return question is None or not has_image(question)


def has_image(turn: dict) -> bool:
    content = turn.get("content")
    parts = content if isinstance(content, list) else []
    role = role_of(turn) in ("system", "user", "assistant", "human", "gpt")
    return role and any(isinstance(part, dict) and "image" in part for part in parts)


def is_tool_call(turn: dict) -> bool:
    """Whether a message is to or from a tool: it comes from one, or it calls one and has no text."""
    return role_of(turn) == "tool" or (is_skipped(turn) and bool(turn.get("tool_calls")) and not has_image(turn))


def role_of(turn: dict) -> str | None:
    return turn.get("role", turn.get("from"))


def is_skipped(turn: dict, empty: bool = True) -> bool:
    """Whether a message is not a turn: it comes from a tool, is an image, or (if `empty`) has no text."""
    content = turn.get("content", turn.get("value", turn.get("text")))
    parts = (
        [part.get("text") if isinstance(part, dict) else part for part in content] if isinstance(content, list) else []
    )
    texts = [part for part in parts if isinstance(part, str)]
    if role_of(turn) == "tool" or len(texts) < len(parts):
        return True
    nothing = not "".join(texts).strip() if isinstance(content, list) else not str(content or "").strip()
    return nothing and (empty or bool(turn.get("tool_calls")))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.one_of(records, st.lists(records, max_size=4)), lines=st.booleans())
def test_generated_json_is_read_completely_or_refused_in_one_line(value, lines, tmp_path):
    path = tmp_path / "data"
    listed = value if isinstance(value, list) else [value]
    content = "\n".join(map(json.dumps, listed)) if lines else json.dumps(value)
    path.write_text(content, encoding="utf-8")
    dialogues = read_or_refused(path)
    if dialogues is not None and all(isinstance(record, dict) for record in listed):
        counted = sum(len(dialogue.turns) + len(dialogue.skipped) for dialogue in dialogues)
        assert counted == sum(map(count_turns, listed))


stamps = st.sampled_from(["[1/2/23, 10:00] ", "1/2/23, 9:00 AM - ", "31.12.23, 10:00 - "])
lines = st.lists(
    st.one_of(
        st.text(max_size=15),
        st.tuples(names, st.text(max_size=10)).map(": ".join),
        st.tuples(stamps, names, st.just(": "), st.text(max_size=9)).map("".join),
        st.sampled_from(["", "---", "speaker,text", "a,b", "Q: x", "A: y", "[", "{"]),
    ),
    max_size=8,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=lines, format=st.sampled_from(["auto", "text", "chat-export", "csv", "names", "messages"]))
def test_generated_text_is_read_or_refused_in_one_line(lines, format, tmp_path):
    path = tmp_path / "data"
    path.write_bytes("\n".join(lines).encode("utf-8", errors="surrogatepass"))
    for dialogue in read_or_refused(path, format) or []:
        for turn in dialogue.turns:
            assert turn.text == turn.text.strip() != ""
            assert 0 < len(turn.speaker) <= LONGEST_NAME


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_generated_bytes_are_read_or_refused_in_one_line(content, tmp_path):
    path = tmp_path / "data"
    path.write_bytes(content)
    read_or_refused(path)
