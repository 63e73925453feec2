"""With our chat templates, transformers gives exactly the ids that we train on, and the same learned tokens."""

import json

import pytest
from transformers import AutoTokenizer

from conftest import dialogues_of, save_conversation, tiny_reference, write_layout
from dialogues.chat_template import user_and_assistant
from dialogues.dialogue import ALPACA, ALPACA_WITH_INPUT, INSTRUCTION, Dialogue, Turn
from dialogues.reading import open_source
from dialogues.tokenizer import load_tokenizer
from load_gpt2_weights import load_model

TALK = (
    Turn("Zoë 🙂", 'Did you "sleep" well?\nI\'ve not.'),
    Turn("B{{o}}b %}", "Like a log.  Really!"),
    Turn("Zoë 🙂", "(Me too: 100%.)"),
    Turn("Cem", "ça va — 你好"),
    Turn("B{{o}}b %}", "'s fine."),
)
ALPACA_TALK = (Turn("Instruction", "Add the numbers."), Turn("Input", "1 and 2"), Turn("Response", "3"))
CASES = [
    (template, learn, Dialogue(TALK, instruction))
    for template in ("prompt", "labels", "tokens")
    for learn in ("all", "replies", "Cem", "Zoë 🙂")
    for instruction in (INSTRUCTION, "")
] + [
    ("alpaca", learn, dialogue)
    for learn in ("all", "replies", "Response")
    for dialogue in (Dialogue(ALPACA_TALK, ALPACA_WITH_INPUT), Dialogue(ALPACA_TALK[::2], ALPACA))
]


def as_messages(dialogue: Dialogue, template: str, learn: str = "all") -> list[dict[str, str]]:
    """The dialogue as chat messages: user for the first speaker, assistant for the second or the learned one."""
    speakers = list(dict.fromkeys(turn.speaker for turn in dialogue.turns))
    if learn in speakers:
        speakers = [next(name for name in speakers if name != learn), learn]
    if template == "alpaca":
        speakers = ["Instruction", "Response"]
    roles = dict(zip(speakers, ("user", "assistant"), strict=False))
    turns = [{"role": roles.get(turn.speaker, turn.speaker), "content": f" {turn.text}\n"} for turn in dialogue.turns]
    return turns if template == "alpaca" else [{"role": "system", "content": dialogue.instruction}, *turns]


@pytest.fixture(scope="module")
def saved(vocabulary, tmp_path_factory):
    """`saved(template, learn, dialogue)` returns a model folder in the layout of a run, and its conversations."""
    base = write_layout(tiny_reference(), vocabulary, tmp_path_factory.mktemp("base"), "bare")

    def save(template: str, learn: str, dialogue: Dialogue):
        folder = tmp_path_factory.mktemp("model")
        return folder, save_conversation(base, folder, dialogue, template, learn)

    return save


@pytest.mark.parametrize(("template", "learn", "dialogue"), CASES)
def test_ids_and_learned_mask_equal_those_of_training(saved, template, learn, dialogue):
    folder, conversations = saved(template, learn, dialogue)
    theirs = AutoTokenizer.from_pretrained(folder)
    encoded = theirs.apply_chat_template(
        as_messages(dialogue, template, learn), return_assistant_tokens_mask=True, return_dict=True
    )
    assert encoded["input_ids"] == conversations.tokens_of(0).tolist()
    assert encoded["assistant_masks"] == conversations.learned.astype(int).tolist()
    assert 0 < conversations.learned.sum() <= len(conversations.tokens)
    # Without a system message, the template adds the line that the model was trained with.
    if dialogue.instruction:
        assert (
            theirs.apply_chat_template(as_messages(dialogue, template, learn)[template != "alpaca" :])["input_ids"]
            == (encoded["input_ids"])
        )


@pytest.mark.parametrize(
    ("learn", "people"),
    [("all", ("all", "Bob")), ("replies", ("all", "Bob")), ("Bob", ("all", "Bob")), ("Cem", ("all", "Cem"))],
)
def test_the_assistant_is_the_learned_speaker(learn, people):
    described = {"template": "prompt", "speakers": ["all", "Bob", "Cem"], "learn": learn}
    assert user_and_assistant(described) == people


def test_the_first_speaker_can_be_the_assistant():
    assert user_and_assistant({"template": "prompt", "speakers": ["Ann", "Bob"], "learn": "Ann"}) == ("Bob", "Ann")


def test_the_template_and_the_reader_agree_on_messages(saved, tmp_path):
    """The template and the reader leave out the same system messages, tools, parts and empty texts."""
    messages = [
        {"role": "System", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "developer", "content": " Be brief. "},
        {"role": "user", "content": [{"type": "text", "text": "Tea?"}, {"type": "text", "text": "Now?"}]},
        {"role": "tool", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": []},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [{"name": "kettle"}]},
        {"role": "assistant", "content": "  "},
        {"role": "system", "content": "Hm."},
        {"role": "assistant", "content": "Please."},
    ]
    (tmp_path / "data.json").write_text(json.dumps({"messages": messages}))
    (dialogue,) = dialogues_of(open_source(tmp_path / "data.json"))
    folder, conversations = saved("prompt", "replies", dialogue)
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages)["input_ids"]
    assert theirs == conversations.tokens_of(0).tolist()
    assert conversations.render(0).startswith(
        "Be kind.\nBe brief.\n\n### User:\nTea?\nNow?\n\n### Assistant:\nLet me see.\n\n"
    )


@pytest.mark.parametrize("template", ["prompt", "labels", "tokens"])
def test_the_generation_prompt_equals_ours(saved, template):
    dialogue = Dialogue(TALK[:2])
    folder, conversations = saved(template, "all", dialogue)
    messages = as_messages(dialogue, template)
    prompt = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages[:2], add_generation_prompt=True)
    assert prompt["input_ids"] == conversations.renderer.encode_prompt(dialogue, 1)


def test_the_alpaca_prompt_has_the_published_wording(saved):
    folder, conversations = saved("alpaca", "all", Dialogue(ALPACA_TALK, ALPACA_WITH_INPUT))
    theirs = AutoTokenizer.from_pretrained(folder)
    prompt = theirs.apply_chat_template(
        as_messages(conversations[0], "alpaca")[:2], add_generation_prompt=True, tokenize=False
    )
    assert prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a"
        " response that appropriately completes the request.\n\n### Instruction:\nAdd the numbers.\n\n### Input:\n1 and"
        " 2\n\n### Response:\n"
    )


def test_speaker_tokens_have_the_same_ids_everywhere(saved, tmp_path):
    """Our tokenizer and that of transformers agree, even after transformers has saved its tokenizer again."""
    folder, conversations = saved("tokens", "all", Dialogue(TALK))
    ours = conversations.renderer.tokenizer
    added = {token: number for token, number in ours._special_tokens.items() if token != "<|endoftext|>"}
    assert sorted(added.values()) == [400, 401, 402, 403]
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "vocab.json").exists()
    for token, number in added.items():
        assert theirs.convert_tokens_to_ids(token) == number
        assert load_tokenizer(folder)._special_tokens[token] == number
        assert load_tokenizer(tmp_path / "again")._special_tokens[token] == number


def test_new_embeddings_start_as_the_mean(saved):
    folder, _ = saved("tokens", "all", Dialogue(TALK))
    model, tokenizer = load_model(folder)
    weight = model.wte.weight
    assert len(weight) == tokenizer.n_vocab == model.config.vocab_size == 404
    for row in weight[400:]:
        assert (row - weight[:400].mean(dim=0)).abs().max() < 1e-6
