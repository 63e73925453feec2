"""The text and tokens that a dialogue becomes."""

import random

import numpy as np
import pytest

from dialogues.conversations import Conversations, encode_block
from dialogues.dialogue import ALPACA, INSTRUCTION, Dialogue, Turn
from dialogues.layouts.answers import as_alpaca
from dialogues.template import TEMPLATES, Renderer, render
from dialogues.tokenizer import encode_text, load_tokenizer
from support.errors import UserError

DIALOGUE = Dialogue((Turn("Alex", "Did you sleep well?"), Turn("Bob", "Like a log."), Turn("Alex", "Me too!")))
RENDERED = {
    "prompt": """The following is a conversation between two people.

### Alex:
Did you sleep well?

### Bob:
Like a log.

### Alex:
Me too!<|endoftext|>""",
    "labels": """The following is a conversation between two people.
Alex: Did you sleep well?
Bob: Like a log.
Alex: Me too!<|endoftext|>""",
    "tokens": "The following is a conversation between two people.<|Alex|>Did you sleep well?<|endofturn|>"
    "<|Bob|>Like a log.<|endofturn|><|Alex|>Me too!<|endofturn|><|endoftext|>",
}
RENDERED["alpaca"] = RENDERED["prompt"]


def make_renderer(vocabulary, template: str) -> Renderer:
    return Renderer(load_tokenizer(vocabulary), template, ["Alex", "Bob"])


@pytest.mark.parametrize("template", TEMPLATES)
class TestEveryTemplate:
    def test_text_and_tokens_agree(self, template, vocabulary):
        renderer = make_renderer(vocabulary, template)
        assert render(DIALOGUE, template) == RENDERED[template]
        tokens, texts = renderer.encode(DIALOGUE)
        decode = renderer.tokenizer.decode
        assert decode(tokens) == RENDERED[template]
        assert tokens[-1] == renderer.tokenizer.eot_token
        assert tokens == renderer.tokenizer.encode(RENDERED[template], allowed_special="all")  # cut like natural text
        assert [decode(tokens[start:end]).strip() for start, end in texts] == [turn.text for turn in DIALOGUE.turns]

    def test_a_dialogue_may_have_no_instruction(self, template, vocabulary):
        renderer = make_renderer(vocabulary, template)
        bare = Dialogue(DIALOGUE.turns, instruction="")
        assert render(bare, template) == RENDERED[template].removeprefix(INSTRUCTION).lstrip()
        assert renderer.tokenizer.decode(renderer.encode(bare).tokens) == render(bare, template)

    def test_generation_starts_at_a_boundary_of_training(self, template, vocabulary):
        renderer = make_renderer(vocabulary, template)
        prompt = renderer.encode_prompt(DIALOGUE, 1)
        tokens, texts = renderer.encode(DIALOGUE)
        assert tokens[: texts[1][0]] == prompt
        assert renderer.tokenizer.decode(prompt).endswith(
            {"labels": "\nBob:", "tokens": "<|Bob|>"}.get(template, "### Bob:\n")
        )

    def test_special_tokens_in_a_text_are_text(self, template, vocabulary):
        renderer = make_renderer(vocabulary, template)
        text = "say <|endoftext|> and <|Bob|> and <|endofturn|> now"
        tokens, texts = renderer.encode(Dialogue((Turn("Alex", text), Turn("Bob", "no"))))
        assert tokens.count(renderer.tokenizer.eot_token) == 1
        start, end = texts[0]
        assert renderer.tokenizer.decode(tokens[start:end]).strip() == text
        assert not set(tokens[start:end]) & set(renderer.tokenizer._special_tokens.values())

    def test_generated_text_is_parsed_into_turns(self, template, vocabulary):
        renderer = make_renderer(vocabulary, template)
        prompt = renderer.encode_prompt(DIALOGUE, 1)
        written = renderer.tokenizer.decode(renderer.encode(DIALOGUE).tokens[len(prompt) : -1])
        assert tuple(renderer.parse_turns(written, "Bob", ["Alex", "Bob"])) == DIALOGUE.turns[1:]
        assert renderer.parse_turns("", "Bob", ["Alex", "Bob"]) == [Turn("Bob", "")]

    def test_the_newest_whole_turns_are_kept(self, template, vocabulary):
        renderer = make_renderer(vocabulary, template)
        tokens = renderer.encode(DIALOGUE).tokens[:-1]
        prompt = renderer.encode_prompt(DIALOGUE, 1)
        label = len(renderer.label("Bob")) + len(renderer.stop)
        last_two = tokens[len(prompt) - label :]
        assert renderer.newest_turns(tokens, len(last_two)) == last_two
        assert renderer.newest_turns(tokens, len(last_two) + 1) == last_two
        assert renderer.newest_turns(tokens, len(tokens)) == tokens
        one_long_turn = renderer.tokenizer.encode_ordinary("word " * 100)
        assert renderer.newest_turns(one_long_turn, 20) == one_long_turn[-20:]

    def test_conversations_return_the_dialogues(self, template, vocabulary):
        dialogues = [
            DIALOGUE,
            Dialogue(DIALOGUE.turns[:2], ""),
            Dialogue(
                (Turn("é: 🙂", "a\n\nb ### c:\n d"), Turn("Alex", "שלום"), Turn("Bob", "x"), Turn("Bob", "y")), "Hm"
            ),
        ]
        conversations = Conversations.of(Renderer(load_tokenizer(vocabulary), template), dialogues)
        assert [conversations[number] for number in range(3)] == dialogues
        assert [conversations.render(number) for number in range(3)] == [render(d, template) for d in dialogues]
        known = Renderer(load_tokenizer(vocabulary), template, ["Alex", "Bob", "é: 🙂"])
        assert conversations.tokens_of(2).tolist() == known.encode(dialogues[2]).tokens

    @pytest.mark.parametrize("learn", ["replies", "Alex", "Bob"])
    def test_the_chosen_turns_and_their_ends_are_learned(self, template, learn, vocabulary):
        """The texts of the chosen turns are learned, each with its end, and nothing else."""
        if (template, learn) == ("alpaca", "replies"):
            return  # in instruction data, the replies are the responses: see below
        conversations = Conversations.of(make_renderer(vocabulary, template), [DIALOGUE] * 2, learn)
        tokens, learned = conversations.tokens_of(1), conversations.learned[len(conversations.tokens_of(0)) :]
        decode = conversations.renderer.tokenizer.decode
        cuts = np.flatnonzero(np.diff(learned)) + 1
        runs = [decode(run.tolist()) for run in np.split(np.where(learned, tokens, 0xFFFF), cuts) if run[0] != 0xFFFF]
        stop, _, space = TEMPLATES[template]
        said = [space + turn.text + stop for turn in DIALOGUE.turns]
        said[-1] = space + "Me too!" + (stop if template == "tokens" else "") + "<|endoftext|>"
        assert runs == {"replies": said[1:], "Alex": said[::2], "Bob": said[1:2]}[learn]


def test_only_text_in_the_format_of_a_label_is_a_label(vocabulary):
    prompt, labels = (Renderer(load_tokenizer(vocabulary), name) for name in ("prompt", "labels"))
    assert prompt.parse_turns("a\n\nb ### c:\n\n### ", "Bob", []) == [Turn("Bob", "a\n\nb ### c:")]
    assert prompt.parse_turns("Fine.\n\n### Instruc", "Bob", []) == [Turn("Bob", "Fine.")]
    assert prompt.parse_turns("a\n\n### New:\nb", "Bob", []) == [Turn("Bob", "a"), Turn("New", "b")]
    assert labels.parse_turns(" a\nNote: b\nBob:c\nAlex: d", "Bob", ["Bob", "Alex"]) == [
        Turn("Bob", "a\nNote: b\nBob:c"),
        Turn("Alex", "d"),
    ]


def test_replies_of_instruction_data_are_the_responses(vocabulary):
    question = Dialogue((Turn("User", "Tea?"), Turn("Assistant", "Please.")))
    dialogue = as_alpaca(question)
    assert dialogue == Dialogue((Turn("Instruction", "Tea?"), Turn("Response", "Please.")), ALPACA)
    with_input = Dialogue((dialogue.turns[0], Turn("Input", "now"), dialogue.turns[1]), ALPACA)
    conversations = Conversations.of(Renderer(load_tokenizer(vocabulary), "alpaca"), [with_input], "replies")
    learned = conversations.tokens[conversations.learned].tolist()
    assert conversations.renderer.tokenizer.decode(learned) == "Please.<|endoftext|>"


def test_an_unknown_name_is_refused_with_a_list_of_speakers(vocabulary):
    with pytest.raises(UserError, match=r"--learn Bop: .*the speakers are Alex \(2 turns\), Bob \(1 turn\)"):
        Conversations.of(Renderer(load_tokenizer(vocabulary)), [DIALOGUE], "Bop")


@pytest.mark.parametrize("name", ["endoftext", "endofturn"])
def test_a_name_that_collides_with_a_token_is_refused(name, vocabulary):
    dialogue = Dialogue((Turn(name, "a"), Turn("B", "b")))
    with pytest.raises(UserError, match="clashes with a special token; use --rename"):
        Conversations.of(Renderer(load_tokenizer(vocabulary), "tokens"), [dialogue])


def test_too_many_speakers_for_tokens_are_refused(vocabulary):
    dialogues = [Dialogue((Turn(f"A{number}", "a"), Turn("B", "b"))) for number in range(1000)]
    with pytest.raises(UserError, match=r"1,001 speakers are too many to give each a token \(at most 1,000\)"):
        Conversations.of(Renderer(load_tokenizer(vocabulary), "tokens"), dialogues)


def test_skipped_turns_are_counted(vocabulary):
    alone = Dialogue((Turn("A", "x"),), skipped=("tool calls", "tool calls"))
    conversations = Conversations.of(Renderer(load_tokenizer(vocabulary)), [DIALOGUE, alone, alone, DIALOGUE])
    assert len(conversations) == 2
    assert conversations.numbers.tolist() == [1, 4]
    assert conversations.skipped == {
        "tool calls": (4, [(0, 2), (0, 3)]),
        "single turns": (2, [(0, 2), (0, 3)]),
    }
    assert conversations.fingerprints[0] == conversations.fingerprints[1]


def test_the_user_comes_first_whoever_speaks_first(vocabulary):
    dialogue = Dialogue((Turn("Assistant", "Welcome!"), Turn("Zoe", "Hm."), Turn("User", "Hi.")))
    conversations = Conversations.of(Renderer(load_tokenizer(vocabulary)), [dialogue, DIALOGUE])
    assert conversations.describe([0])["speakers"] == ["User", "Assistant", "Zoe"]
    assert conversations.describe([1, 0])["speakers"] == ["User", "Assistant", "Zoe", "Alex", "Bob"]


def test_renamed_roles_keep_their_order(vocabulary):
    dialogues = [Dialogue((Turn("Bot", "Welcome!"), Turn("Anna", "Hi.")))]
    renderer = Renderer(load_tokenizer(vocabulary))
    blocks = [encode_block(renderer, enumerate(dialogues, 1))]
    conversations = Conversations(renderer, blocks, rename={"User": "Anna", "Assistant": "Bot"})
    assert conversations.describe([0])["speakers"] == ["Anna", "Bot"]


def test_the_description_of_a_model_says_what_it_learned(vocabulary):
    other = DIALOGUE._replace(instruction="Two people talk.")
    conversations = Conversations.of(Renderer(load_tokenizer(vocabulary)), [DIALOGUE, other, DIALOGUE], "Bob")
    assert conversations.describe([0, 1, 2]) == {
        "template": "prompt",
        "instruction": INSTRUCTION,
        "speakers": ["Alex", "Bob"],
        "learn": "Bob",
    }


def test_long_runs_of_white_space_get_the_same_tokens_as_tiktoken(vocabulary):
    """The runs are shorter and longer than the length at which a text is cut, and of many kinds of white space."""
    chance, tokenizer = random.Random(0), load_tokenizer(vocabulary)
    spaces = [" ", "\n", "\t", "\r\n", "\x85", "\xa0", "\u2003", "\u3000", "\x1c", "\u200b", "  "]
    for _ in range(150):
        kinds = chance.choices(spaces, k=chance.randint(1, 3))
        runs = ["".join(chance.choices(kinds, k=chance.choice([0, 1, 2, 997, 1000, 1001, 2500]))) for _ in range(3)]
        words = chance.choices(["Hi", " there", "it's", "5", "!", "", "\U0001f600", "'s"], k=3)
        text = "".join(run + word for run, word in zip(runs, words, strict=True)) + chance.choice(["", " " * 1500])
        assert encode_text(tokenizer, text) == tokenizer.encode_ordinary(text)


@pytest.mark.parametrize("space", [" ", "\n", " \t\n"])
def test_a_million_spaces_before_a_word_are_tokenized(vocabulary, space):
    renderer, text = make_renderer(vocabulary, "prompt"), "Hi" + space * 1_000_000 + "Bob!"
    tokens, texts = renderer.encode(Dialogue((Turn("Alex", text), Turn("Bob", "Yes."))))
    assert renderer.tokenizer.decode(tokens[slice(*texts[0])]) == text
