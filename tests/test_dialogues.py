"""Files to dialogues, the split, and the text and tokens that a dialogue becomes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import PROJECT
from dialogues.dialogue import Dialogue, Turn, split_dialogues
from dialogues.formats import read_dialogues
from dialogues.template import describe, encode, encode_prompt, newest_turns, parse_turns, render
from dialogues.tokenizer import load_tokenizer
from files import UserError

DIALOGUE = Dialogue((Turn("Alex", "Did you sleep well?"), Turn("Bob", "Like a log."), Turn("Alex", "Me too!")))
RENDERED = """The following is a conversation between two people.

### Alex:
Did you sleep well?

### Bob:
Like a log.

### Alex:
Me too!<|endoftext|>"""


def test_a_speaker_who_talks_twice_is_kept(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"Alex": " Hi! ", "Bob": "Hello.\\n", "Alex": "Bye."}]', encoding="utf-8-sig")
    assert read_dialogues(path) == [Dialogue((Turn("Alex", "Hi!"), Turn("Bob", "Hello."), Turn("Alex", "Bye.")))]


def test_the_bundled_conversations():
    dialogues = read_dialogues(PROJECT / "llm_train_text.json")
    assert len(dialogues) == 10
    for dialogue in dialogues:
        assert [turn.speaker for turn in dialogue.turns] == ["Alex", "Bob", "Alex"]
    train, val = split_dialogues(dialogues, [70, 30])
    assert [*train, *val] == dialogues
    assert (len(train), len(val)) == (7, 3)


@given(size=st.integers(2, 2000), percent=st.integers(1, 99))
def test_the_split_is_exact_whatever_the_size(size, percent):
    dialogues = [Dialogue((Turn("A", str(number)), Turn("B", "."))) for number in range(size)]
    expected = size * percent // 100  # in whole numbers; int(100 * 0.57) is 56
    if expected == 0:
        with pytest.raises(UserError, match="too few"):
            split_dialogues(dialogues, [percent, 100 - percent])
    else:
        train, val = split_dialogues(dialogues, [percent, 100 - percent])
        assert len(train) == expected
        assert [*train, *val] == dialogues


def test_three_parts():
    assert [len(part) for part in split_dialogues([DIALOGUE] * 1100, [85, 5, 10])] == [935, 55, 110]


def test_render():
    assert render(DIALOGUE) == RENDERED


def test_tokens_are_those_of_the_rendered_text(vocabulary):
    tokenizer = load_tokenizer(vocabulary)
    tokens, turn_ends = encode(DIALOGUE, tokenizer)
    assert tokenizer.decode(tokens) == RENDERED
    assert tokens[-1] == tokenizer.eot_token
    assert tokens[:-1] == tokenizer.encode_ordinary(RENDERED.removesuffix("<|endoftext|>"))  # as natural text is cut
    assert tokenizer.decode(tokens[turn_ends[0] : turn_ends[1]]) == "\n\n### Bob:\nLike a log."
    assert turn_ends[-1] == len(tokens)


def test_without_an_instruction(vocabulary):
    tokenizer = load_tokenizer(vocabulary)
    bare = Dialogue(DIALOGUE.turns, instruction="")
    assert render(bare) == RENDERED.split("people.\n\n")[1]
    tokens, turn_ends = encode(bare, tokenizer)
    assert tokenizer.decode(tokens) == render(bare)
    assert tokenizer.decode(tokens[: turn_ends[0]]) == "### Alex:\nDid you sleep well?"
    assert len(turn_ends) == 3


def test_generation_starts_at_a_boundary_of_training(vocabulary):
    tokenizer = load_tokenizer(vocabulary)
    prompt = encode_prompt(DIALOGUE, 1, tokenizer)
    assert encode(DIALOGUE, tokenizer).tokens[: len(prompt)] == prompt
    assert tokenizer.decode(prompt).endswith("### Bob:\n")


def test_special_tokens_in_a_text_are_text(vocabulary):
    tokenizer = load_tokenizer(vocabulary)
    tokens = encode(Dialogue((Turn("A", "say <|endoftext|> now"), Turn("B", "no"))), tokenizer).tokens
    assert tokens.count(tokenizer.eot_token) == 1
    assert "say <|endoftext|> now" in tokenizer.decode(tokens)


def test_generated_text_becomes_turns_again():
    after_prompt = RENDERED.split("### Bob:\n")[1].removesuffix("<|endoftext|>")
    assert tuple(parse_turns(after_prompt, "Bob")) == DIALOGUE.turns[1:]
    assert parse_turns("", "Bob") == [Turn("Bob", "")]
    assert parse_turns("a\n\nb ### c:\n\n### ", "Bob") == [Turn("Bob", "a\n\nb ### c:\n\n###")]


def test_newest_turns(vocabulary):
    tokenizer = load_tokenizer(vocabulary)
    tokens = encode(DIALOGUE, tokenizer).tokens[:-1]
    last_two = tokenizer.encode_ordinary("\n\n### Bob:\nLike a log.\n\n### Alex:\nMe too!")
    assert newest_turns(tokens, len(last_two), tokenizer) == last_two
    assert newest_turns(tokens, len(last_two) + 5, tokenizer) == last_two
    assert newest_turns(tokens, len(tokens), tokenizer) == tokens
    one_long_turn = tokenizer.encode_ordinary("word " * 100)
    assert newest_turns(one_long_turn, 20, tokenizer) == one_long_turn[-20:]


def test_description():
    assert describe([DIALOGUE, DIALOGUE])["speakers"] == ["Alex", "Bob"]
    assert json.dumps(describe([DIALOGUE]))
