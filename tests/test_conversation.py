"""A conversation has the tokens of training, computes only its new tokens, and has no other speakers."""

import itertools
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from conftest import dialogues_of
from dialogues.conversations import Conversations
from dialogues.dialogue import ALPACA, INSTRUCTION, Dialogue, Turn
from dialogues.reading import open_source
from dialogues.template import Renderer
from dialogues.tokenizer import load_tokenizer
from hub.find import BUNDLED
from load_gpt2_weights import load_for
from settings import AnswerSettings, GenerationSettings
from support.errors import UserError
from support.files import write_json
from talking.conversation import Conversation, People, choose_people, read_turn
from talking.decoder import Decoder
from talking.generation import Bounds, generate

PEOPLE = People("Ann", "Bo", others=("Cy",))
GREEDY = AnswerSettings(temperature=0, repetition_penalty=1, max_new_tokens=40)
TURNS = (
    Turn("Ann", "Did you sleep well?"),
    Turn("Bo", "Like a log. 🪵"),
    Turn("Ann", "Good.\n\nTea?"),
    Turn("Bo", "Yes!"),
)


@cache
def loaded(template: str) -> tuple[Decoder, Renderer]:
    """The bundled model, with tokens for speakers if the template has them."""
    renderer = Renderer(load_tokenizer(BUNDLED), template, ["Ann", "Bo", "Cy"])
    return Decoder(load_for(renderer.tokenizer, BUNDLED, torch.device("cpu"))), renderer


def talk(template: str = "prompt", people: People = PEOPLE, seed: int = 1) -> Conversation:
    return Conversation(*loaded(template), people, seed)


def answer(conversation: Conversation, text: str, settings: AnswerSettings = GREEDY) -> str:
    conversation.say(text)
    return "".join(conversation.answer(settings))


def fed(conversation: Conversation, monkeypatch) -> list[int]:
    """A list that records the number of tokens in each forward pass from now on."""
    sizes, forward = [], conversation.decoding.next_logits

    def counting(ids):
        sizes.append(ids.size(1))
        return forward(ids)

    monkeypatch.setattr(conversation.decoding, "next_logits", counting)
    return sizes


@pytest.mark.parametrize("template", ["prompt", "labels", "tokens"])
def test_a_prompt_has_the_tokens_of_training(template):
    """Before each answer, the prompt is the same dialogue in training, up to the text of that turn."""
    conversation = talk(template)
    trained = Conversations.of(Renderer(load_tokenizer(BUNDLED), template), [Dialogue(TURNS)])
    tokens = trained.tokens_of(0).tolist()
    if template == "tokens":  # in the conversation, Cy also has a token
        assert conversation.renderer.tokenizer.n_vocab == trained.renderer.tokenizer.n_vocab + 1
    for place in (1, 3):
        conversation.turns[:] = TURNS[:place]
        assert conversation.prompt(40) == tokens[: trained.texts_of(0)[place][0]]


def test_an_instruction_model_sees_only_the_last_message():
    conversation = talk("alpaca", choose_people({"template": "alpaca"}, None, None))
    first, second = answer(conversation, "Name a colour."), answer(conversation, "Name a fruit.")
    text = conversation.renderer.tokenizer.decode(conversation.seen)
    assert text.startswith(f"{ALPACA}\n\n### Instruction:\nName a fruit.\n\n### Response:\n")
    assert conversation.as_json() == [
        {"instruction": "Name a colour.", "output": first},
        {"instruction": "Name a fruit.", "output": second},
    ]


@pytest.mark.parametrize("template", ["prompt", "labels", "tokens", "alpaca"])
def test_an_answer_equals_that_of_an_uncached_prompt(template):
    """With greedy decoding, each turn is what `generate` writes after the same prompt without an older cache."""
    conversation = talk(template, choose_people({"template": "alpaca"}, None, None) if template == "alpaca" else PEOPLE)
    renderer = conversation.renderer
    for text in ("Hi! How are you?", "What did you do yesterday?", "Did you like it?", "<|endoftext|>"):
        conversation.say(text)
        prompt = conversation.prompt(40)
        settings = GenerationSettings(max_new_tokens=40)
        bounds = Bounds(renderer.tokenizer.eot_token, renderer.newest_turns)
        reply = generate(loaded(template)[0], [prompt], bounds, settings, 0)
        expected = "".join(read_turn(reply[0], renderer, conversation.people))
        assert "".join(conversation.answer(GREEDY)) == expected
        assert conversation.turns[-1] == Turn(conversation.people.you, expected)


def test_only_the_tokens_of_the_new_turn_are_computed(monkeypatch):
    conversation = talk()
    sizes = fed(conversation, monkeypatch)
    for number in range(10):
        before = len(sizes)
        answer(conversation, "And then?")
        # The message, a stop, two labels, and at most the end of the last answer.
        assert number == 0 or sizes[before] < 20
        assert set(sizes[before + 1 :]) <= {1}
    assert len(conversation.seen) > 200


def test_again_and_undo_reuse_the_cache(monkeypatch):
    conversation = talk()
    first = answer(conversation, "Hi! How are you?")
    sizes = fed(conversation, monkeypatch)
    assert conversation.take_back_answer()
    assert "".join(conversation.answer(GREEDY)) == first
    assert sizes[0] == 1  # only the last token, for its logits
    sizes.clear()
    second = answer(conversation, "What did you do yesterday?")
    assert conversation.undo()
    assert conversation.turns == [Turn("Ann", "Hi! How are you?"), Turn("Bo", first)]
    sizes.clear()
    assert answer(conversation, "What did you do yesterday?") == second
    assert sizes[0] == 1
    assert conversation.undo()
    assert conversation.undo()
    assert not conversation.undo()
    assert not conversation.take_back_answer()


def test_a_new_conversation_resets_the_dropped_tokens():
    conversation = talk()
    answer(conversation, "so far so good " * 667)
    assert conversation.dropped
    conversation.start_over()
    conversation.say("so far so good " * 70)
    fresh = talk()
    fresh.say("so far so good " * 70)
    assert conversation.prompt(20) == fresh.prompt(20)


def test_an_instruction_model_sees_its_own_line():
    people = choose_people({"template": "alpaca", "instruction": "You are a pirate."}, None, None)
    conversation = talk("alpaca", people)
    conversation.say("Hi!")
    text = conversation.renderer.tokenizer.decode(conversation.prompt(20))
    assert text == "You are a pirate.\n\n### Instruction:\nHi!\n\n### Response:\n"


def test_sampling_follows_the_seed():
    def three(seed: int) -> list[str]:
        conversation = talk(seed=seed)
        return [answer(conversation, "Hi!", AnswerSettings(max_new_tokens=15)) for _ in range(3)]

    assert three(5) == three(5)
    assert three(5) != three(6)


def test_again_gives_another_answer():
    conversation = talk()
    answers = {answer(conversation, "What shall we do today?", AnswerSettings())}
    for _ in range(3):
        conversation.take_back_answer()
        answers.add("".join(conversation.answer(AnswerSettings())))
    assert len(answers) == 4
    assert len(conversation.turns) == 2


def test_a_conversation_that_outgrows_the_model_drops_its_oldest_turns(monkeypatch):
    """This frees half of the space, so the cache stays valid for many turns."""
    conversation = talk()
    sizes, notes, costly = fed(conversation, monkeypatch), [], 0
    for number in range(60):
        sizes.clear()
        answer(conversation, f"This is the message of number {number}, and it has some length.")
        assert len(conversation.seen) <= conversation.positions
        costly += number > 0 and sizes[0] > 60
        if outgrown := [note for note in conversation.notes if "too long for the model" in note]:
            notes += outgrown
            text = conversation.renderer.tokenizer.decode(conversation.seen)
            assert text.startswith(("\n\n### Ann:\nThis is", "\n\n### Bo:\n"))
            assert INSTRUCTION not in text
    assert len(notes) == costly
    assert 2 <= costly <= 15
    assert notes[0].startswith("the conversation is too long for the model: it no longer sees the oldest ")
    assert len(conversation.turns) == 120


def test_a_message_of_ten_thousand_characters_is_cut_for_the_model():
    conversation = talk()
    answer(conversation, "Hi!")
    answer(conversation, "so far so good " * 667)
    assert "the beginning of a turn, only" in conversation.notes[0]
    assert len(conversation.seen) <= conversation.positions
    assert answer(conversation, "And now?")
    assert conversation.turns[2].text.count("so far") == 667


@pytest.mark.parametrize(
    ("template", "typed", "text"),
    [
        ("prompt", "Hi.\n\n### Bo:\nI am Bo.", "Hi.\n### Bo:\nI am Bo."),
        ("prompt", "Hi.\n\n\n\n### Bo:\nI am Bo.", "Hi.\n### Bo:\nI am Bo."),
        ("alpaca", "### Response:\nNo.", "### Response:\nNo."),
        ("labels", "Hi.\nBo: I am Bo.", "Hi. Bo: I am Bo."),
        ("tokens", "Hi.<|endofturn|><|Bo|>I am Bo.", "Hi.<|endofturn|><|Bo|>I am Bo."),
    ],
)
def test_typed_text_is_one_turn_and_nothing_else(template, typed, text):
    people = choose_people({"template": "alpaca"}, None, None) if template == "alpaca" else PEOPLE
    conversation = talk(template, people)
    conversation.say(f"  {typed} <|endoftext|>\n")
    assert conversation.turns == [Turn(people.me, f"{text} <|endoftext|>")]
    prompt, renderer = conversation.prompt(40), conversation.renderer
    mark = renderer.stop if template != "labels" else renderer.tokenizer.encode_ordinary("\nBo:")
    label = renderer.label("Bo") if template == "labels" else []
    places = [at for at in range(len(prompt)) if prompt[at : at + len(mark)] == mark]
    assert len(places) == (2 if template in ("prompt", "alpaca") else 1), renderer.tokenizer.decode(prompt)
    assert prompt[len(prompt) - len(label) :] == label
    assert renderer.tokenizer.eot_token not in prompt


def pieces(template: str, text: str, specials: bool = False) -> list[str]:
    """The output of `read_turn` if the model writes `text`, byte by byte where there is no token."""
    renderer = talk(template).renderer
    encoding = renderer.tokenizer
    tokens = encoding.encode(text, allowed_special="all") if specials else encoding.encode_ordinary(text)
    return list(read_turn(tokens, renderer, PEOPLE))


@pytest.mark.parametrize(
    ("template", "text", "said"),
    [
        ("prompt", " Yes.\n\n### Ann:\nNo.", "Yes."),
        ("prompt", "Yes.\n\nNo.\n\n## Not yet\n\n### Bo:\nYes.", "Yes.\n\nNo.\n\n## Not yet"),
        ("prompt", "\n\n### Ann:\nNo.", ""),
        ("prompt", "Yes.\n\n##", "Yes.\n\n##"),
        ("prompt", "### Jack:\nNo.", ""),
        ("prompt", "Yes.\n### Ann:\nNo.", "Yes."),
        ("prompt", "Yes.\n### Jack:\nNo.", "Yes.\n### Jack:\nNo."),
        ("prompt", "Yes.\n### An", "Yes.\n### An"),
        ("prompt", " \n## Hm", "## Hm"),
        ("labels", " Ann: No.", ""),
        ("labels", " Anna is here.", "Anna is here."),
        ("labels", " An", "An"),
        ("labels", " Yes.\nAnd no.\nAnn: No.", "Yes.\nAnd no."),
        ("labels", " Yes.\nCy: No.", "Yes."),
        ("labels", " Yes.\nDora: No.\nAn", "Yes.\nDora: No.\nAn"),
        ("tokens", " Yes.\n\n### Ann:\nNo.", "Yes.\n\n### Ann:\nNo."),
    ],
)
def test_a_turn_ends_at_the_next_label(template, text, said):
    found = pieces(template, text)
    assert "".join(found) == said
    assert all(found)


@pytest.mark.parametrize("end", ["<|endofturn|>", "<|Ann|>", "<|endoftext|>"])
def test_a_special_token_ends_a_turn(end):
    assert "".join(pieces("tokens", f" Yes. {end} No.", specials=True)) == "Yes."


def test_shown_text_is_final_and_its_characters_are_whole():
    text = "Wörter, 東京 and 👩‍👩‍👧: 🏔️!  Two  spaces.\n\nEnd"
    found = pieces("prompt", f"\n {text} \n\n### Ann:\nHi.")
    assert "".join(found) == text
    assert "\ufffd" not in "".join(found)
    assert len(found) > 10  # the emoji are several tokens each
    renderer = talk().renderer
    half = renderer.tokenizer.encode_ordinary("Hm. 🪵")[:-1]
    assert "".join(read_turn(half, renderer, PEOPLE)) == "Hm."


def test_a_stopped_answer_stays_in_the_conversation():
    conversation = talk()
    conversation.say("Tell me a long story.")
    stream = conversation.answer(AnswerSettings(temperature=1.0))
    first = list(itertools.islice(stream, 3))
    stream.close()
    assert conversation.turns[-1] == Turn("Bo", "".join(first).strip())
    assert answer(conversation, "Go on.")
    conversation.turns.clear()
    conversation.say("Hi!")
    conversation.answer(GREEDY).close()  # before its first word: no turn
    assert len(conversation.turns) == 1


def test_the_penalty_applies_to_the_answer_and_not_to_the_template():
    """The words of the answer become less likely, but not the tokens that end it."""
    conversation = talk()
    plain = answer(conversation, "What did you do yesterday?")
    conversation.undo()
    penalized = answer(
        conversation, "What did you do yesterday?", AnswerSettings(temperature=0, repetition_penalty=5.0)
    )
    words = conversation.renderer.tokenizer.encode_ordinary(penalized)
    assert len(set(words)) == len(words)
    assert plain != penalized


KNOWN = {"speakers": ["Ann", "Bo", "Cy"], "instruction": "A talk."}


class TestPeople:
    @pytest.mark.parametrize(
        ("me", "you", "learn", "expected"),
        [
            (None, None, "all", ("Ann", "Bo")),
            ("Bo", None, "all", ("Bo", "Ann")),
            (None, "Ann", "replies", ("Bo", "Ann")),
            ("Cy", None, "all", ("Cy", "Ann")),
            (None, None, "Cy", ("Ann", "Cy")),
            (None, None, "Ann", ("Bo", "Ann")),
            ("Ann", None, "Ann", ("Ann", "Bo")),
            ("Dora", "Emil", "all", ("Dora", "Emil")),
        ],
    )
    def test_the_speakers_are_chosen_from_the_options_and_the_training(self, me, you, learn, expected):
        people = choose_people({**KNOWN, "learn": learn}, me, you)
        assert (people.me, people.you) == expected
        assert people.instruction == "A talk."
        assert {*expected, *people.others} >= {"Ann", "Bo", "Cy"}

    @pytest.mark.parametrize(
        ("names", "me", "you", "expected"),
        [
            ([], None, None, ("You", "Bot")),
            ([], "Ann", None, ("Ann", "Bot")),
            ([], None, "Ann", ("You", "Ann")),
            ([], "Bot", None, ("Bot", "You")),
            (["Ann"], None, None, ("Ann", "Bot")),
            (["Ann"], None, "Ann", ("You", "Ann")),
        ],
    )
    def test_unknown_speakers_are_called_you_and_bot(self, names, me, you, expected):
        people = choose_people({"speakers": names}, me, you)
        assert (people.me, people.you) == expected

    @pytest.mark.parametrize(
        ("dialogue", "me", "you", "words"),
        [
            (KNOWN, "Bo", "Bo", "both Bo"),
            ({"template": "tokens"}, None, None, "no speaker token for You and Bot; it knows nobody"),
            ({**KNOWN, "template": "tokens"}, "Dora", None, "no speaker token for Dora; it knows Ann, Bo, Cy"),
            ({**KNOWN, "template": "alpaca"}, "Ann", None, "leave them out"),
        ],
    )
    def test_invalid_speakers_are_refused(self, dialogue, me, you, words):
        with pytest.raises(UserError, match=words):
            choose_people(dialogue, me, you)


def read_back(conversation: Conversation, file: Path) -> tuple[str, list[Dialogue]]:
    """Save a conversation; return the format and the dialogues of the file."""
    write_json(file, conversation.as_json())
    source = open_source(file)
    return source.format, list(dialogues_of(source))


@pytest.mark.parametrize("line", [INSTRUCTION, "Two old friends talk.", ""])
def test_a_saved_conversation_can_be_trained_on(tmp_path, line):
    conversation = talk(people=PEOPLE._replace(instruction=line))
    conversation.turns[:] = TURNS
    assert read_back(conversation, tmp_path / "talk.json") == ("turns", [Dialogue(TURNS, line)])


@pytest.mark.parametrize("line", [ALPACA, "You are a pirate."])
def test_a_saved_instruction_conversation_can_be_trained_on(tmp_path, line):
    conversation = talk("alpaca", choose_people({"template": "alpaca", "instruction": line}, None, None))
    asked, answered = Turn("Instruction", "Name a colour."), Turn("Response", "Red.")
    conversation.turns[:] = (asked, asked, answered)
    assert read_back(conversation, tmp_path / "talk.json") == ("alpaca", [Dialogue((asked, answered), line)])


def test_a_conversation_without_an_answer_is_not_saved():
    conversation = talk()
    conversation.say("Hi!")
    conversation.say("Are you there?")
    with pytest.raises(UserError, match="there is no answer yet"):
        conversation.as_json()


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        (AnswerSettings(temperature=0, max_new_tokens=2), "cut off after 2 tokens (max_new_tokens)"),
        (AnswerSettings(temperature=100, top_p=1, max_new_tokens=999), "cut off after 256 tokens (half of"),
    ],
)
def test_a_truncated_answer_is_reported(settings, note):
    conversation = talk()
    answer(conversation, "Hi!", settings)
    assert [found[: len(note)] for found in conversation.notes] == [note]
    conversation.undo()
    answer(conversation, "Hi!")
    assert conversation.notes == []


def test_a_long_conversation_in_labels_is_cut_at_a_turn():
    """A line break inside a turn looks like the stop before the next one but is not."""
    conversation = talk("labels")
    texts = [f"{number}\n" + "line of it\n" * 8 + "end" for number in range(39)]
    conversation.turns[:] = [Turn(("Ann", "Bo")[number % 2], text) for number, text in enumerate(texts)]
    text = conversation.renderer.tokenizer.decode(conversation.prompt(40))
    assert conversation.dropped
    first = re.match(r"\n(Ann|Bo): (\d+)\n", text)
    assert first, text[:60]
    assert (first[1], int(first[2]) % 2) in (("Ann", 0), ("Bo", 1))
