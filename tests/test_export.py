"""A GGUF file holds the weights, the vocabulary and the chat format of a model, and llama.cpp generates the same."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import refused, save_conversation, tiny_reference, write_layout
from dialogues.chat_template import chat_template
from dialogues.dialogue import ALPACA, Dialogue, Turn
from dialogues.ollama import go_literal, go_template, modelfile
from dialogues.template import Renderer
from dialogues.tokenizer import END_OF_TEXT, load_tokenizer, read_vocabulary
from hub.find import BUNDLED
from load_gpt2_weights import load_model, read_config
from pipeline.export import REQUIREMENT, export_model
from pipeline.finished_model import FinishedModel, find_finished_model
from settings import GenerationSettings
from support.errors import UserError
from talking.decoder import Decoder
from talking.generation import Bounds, generate

gguf = pytest.importorskip("gguf", reason="in the group dev of pyproject.toml")

TALK = Dialogue((Turn("Zoë", "Did you sleep well?"), Turn("Bob", "Like a log."), Turn("Zoë", "Me too.")))
ALPACA_TALK = Dialogue((Turn("Instruction", "Add 1 and 2."), Turn("Response", "3")), ALPACA)
ENDS = {"prompt": "###", "labels": "\n", "tokens": "<|endofturn|>", "alpaca": "###"}
FORMAT = {"template": "prompt", "instruction": "", "speakers": ["Zoë", "Bob"], "learn": "all"}


@pytest.fixture(params=ENDS)
def model(request, vocabulary, tmp_path) -> FinishedModel:
    """A saved model, in the layout of a run."""
    base = write_layout(tiny_reference(), vocabulary, tmp_path / "base", "bare")
    dialogue = ALPACA_TALK if request.param == "alpaca" else TALK
    folder = tmp_path / "run" / "model"
    save_conversation(base, folder, dialogue, request.param)
    return find_finished_model(str(folder), tmp_path)


def read(path: Path) -> SimpleNamespace:
    """The metadata of a GGUF file, and its tensors as f32, with the names of their formats."""
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    return SimpleNamespace(
        values=values, tensors=tensors, formats={tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    )


@pytest.mark.parametrize(("kind", "error"), [("f32", 0.0), ("f16", 2**-11), ("q8_0", 0.004)])
def test_the_file_holds_the_weights_of_the_model(model, kind, error, tmp_path):
    export_model(model, kind, tmp_path / "a.gguf")
    written = read(tmp_path / "a.gguf")
    loaded, _ = load_model(model.folder)
    names = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "attn.c_attn": "attn_qkv"}
    names |= {"attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    names |= {"h.": "blk.", "ln_1": "attn_norm", "ln_2": "ffn_norm"}
    expected = {}
    for name, parameter in loaded.named_parameters():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        expected[name] = parameter.detach().numpy()
    assert written.tensors.keys() == expected.keys()
    for name, values in expected.items():
        assert written.tensors[name].shape == values.shape
        matrix = values.ndim == 2 and "position" not in name
        limit = error * np.abs(values).max() * matrix
        assert np.abs(written.tensors[name] - values).max() <= limit, name
        # The rows of q8_0 consist of blocks of 32: those of width 48 are stored in f16.
        blocks = kind != "q8_0" or values.shape[-1] % 32 == 0
        assert written.formats[name] == ((kind.upper() if blocks else "F16") if matrix else "F32")


def test_the_file_describes_the_model_and_its_vocabulary(model, tmp_path):
    export_model(model, "f16", tmp_path / "a.gguf")
    values = read(tmp_path / "a.gguf").values
    config, tokenizer = read_config(model.folder / "config.json"), load_tokenizer(model.folder)
    sizes = {"context_length": 128, "embedding_length": 48, "feed_forward_length": 192, "block_count": 3}
    assert {f"gpt2.{name}": size for name, size in sizes.items()}.items() <= values.items()
    assert values["gpt2.attention.head_count"] == 4
    assert values["gpt2.attention.layer_norm_epsilon"] == pytest.approx(config.layer_norm_epsilon)
    assert values["general.architecture"] == values["tokenizer.ggml.model"] == "gpt2"
    assert values["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    assert values["general.sampling.temp"] == pytest.approx(0.7)

    vocabulary, merges = read_vocabulary(model.folder)
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    specials = tokenizer._special_tokens
    assert {token: number for number, token in enumerate(tokens)} == vocabulary | specials
    assert len(tokens) == len(kinds) == config.vocab_size
    assert values["tokenizer.ggml.merges"] == merges
    assert values["tokenizer.ggml.pre"] == "gpt-2"
    end = values["tokenizer.ggml.eos_token_id"]
    assert end == values["tokenizer.ggml.eot_token_id"]
    assert tokenizer.decode([end]) == ENDS[model.dialogue["template"]]
    assert tokens[values["tokenizer.ggml.bos_token_id"]] == END_OF_TEXT
    assert not values["tokenizer.ggml.add_bos_token"]
    control = {number for number, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL}
    assert control == set(specials.values())
    unused = {number for number, kind in enumerate(kinds) if kind == gguf.TokenType.UNUSED}
    assert unused == {end} - control
    assert values["tokenizer.chat_template"] == chat_template(model.dialogue, marked=False)


def test_the_modelfile_names_the_file_and_the_end_of_a_turn(model, tmp_path):
    export_model(model, "f16", tmp_path / "my bob.gguf")
    text = (tmp_path / "my bob.Modelfile").read_text(encoding="utf-8")
    assert "\nFROM ./my bob.gguf\n" in text
    stop = Renderer(load_tokenizer(model.folder), model.dialogue["template"]).template.stop
    assert f'\nPARAMETER stop """{stop}"""\n' in text
    assert "\nPARAMETER num_ctx 128\n" in text
    assert "\nPARAMETER temperature 0.7\n" in text
    assert text.count('"""') == 4


@pytest.mark.parametrize("name", ['"""', "B{{o}}b %}", "a\u200db\x7f", "Zoë 🙂"])
def test_names_are_literals_in_the_modelfile(name):
    template = go_template(FORMAT | {"speakers": [name, "Bob"]}, "###")
    assert '"""' not in template
    assert template.replace("\n", "").isprintable()
    assert go_literal(f" {name}:\n") in template


def test_the_command_in_the_modelfile_quotes_its_name():
    assert "-f 'my model.Modelfile'\nFROM ./my model.gguf\n" in modelfile(
        FORMAT, "###", 64, "my model.gguf", "my model.Modelfile"
    )


def test_the_template_of_the_modelfile():
    """The lines of the template; Ollama's own functions are those of Go's text/template."""
    assert go_template(FORMAT | {"template": "labels", "instruction": "A talk."}, "\n").splitlines()[1:] == [
        r'{{- if .System }}{{ .System }}{{ "\n" }}{{ else }}{{ "A talk.\n" }}{{ end }}',
        "{{- range .Messages }}",
        '{{- if or (eq .Role "user") (eq .Role "assistant") }}',
        "{{- $text := .Content }}",
        '{{- if $text }}{{ if eq (slice $text 0 1) " " }}{{ $text = slice $text 1 }}{{ end }}{{ end }}',
        '{{- if eq .Role "user" }}{{ "Zoë:" }}{{ else }}{{ "Bob:" }}{{ end }}',
        r'{{- " " }}{{ $text }}{{ "\n" }}',
        "{{- end }}",
        "{{- end }}",
        '{{- "Bob:" }}',
    ]
    assert r'{{- if eq (slice $text $rest) "\n\n" }}' in go_template(FORMAT, "###")
    assert "slice" not in go_template(FORMAT | {"template": "tokens"}, "<|endofturn|>")


def test_a_file_is_named_after_its_run(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    export_model(model._replace(run=tmp_path / "run"), "f16", None)
    assert (tmp_path / "run" / "run-f16.gguf").exists()
    assert (tmp_path / "run" / "run-f16.Modelfile").exists()
    for word in ("written", "replaced"):
        capsys.readouterr()
        export_model(model, "q8_0", None)
        assert capsys.readouterr().out.startswith(f"{word}: model-q8_0.gguf (")


def test_the_command_exports_the_bundled_model(command, work):
    done = command("export.py", "tiny", "--type", "q8_0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "written: tiny-q8_0.gguf (9 MB); for Ollama: tiny-q8_0.Modelfile\n"
    assert read(work / "tiny-q8_0.gguf").values["tokenizer.ggml.pre"] == "gpt-2"


def test_mistakes_are_errors_of_one_line(command, work):
    assert "--output bob: the name must end in .gguf" in refused(command("export.py", "tiny", "--output", "bob"))
    assert "--type q4" in refused(command("export.py", "tiny", "--type", "q4"))
    assert "there is no finished run" in refused(command("export.py"))
    missing = refused(command("export.py", "tiny", "--output", "no/bob.gguf"))
    assert "--output no/bob.gguf: the folder no does not exist" in missing.replace("\\", "/")


def test_without_the_package_the_error_says_how_to_install_it(model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="the package gguf is not installed") as error:
        export_model(model, "f16", None)
    assert REQUIREMENT in str(error.value)


@pytest.mark.parametrize("kind", ["f16", "f32"])
def test_only_f32_holds_weights_beyond_the_range_of_f16(model, kind, tmp_path):
    weights = model.folder / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("h.0.mlp.c_fc.weight"))
    tensors[name][0, 0] = 1e5
    save_file(tensors, weights)
    path = tmp_path / "a.gguf"
    if kind == "f32":
        export_model(model, kind, path)
    else:
        with pytest.raises(UserError, match=r"h\.0\.mlp\.c_fc\.weight is too large for f16; use --type f32"):
            export_model(model, kind, path)
    assert path.exists() == (kind == "f32")


def test_a_failed_export_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "a.gguf"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(UserError, match=r"too full for a\.gguf"):
            export_model(model, "f16", path)
    weights = model.folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4:] = np.array([np.inf], np.float32).tobytes()
    weights.write_bytes(content)
    with pytest.raises(UserError, match="NaN or infinity"):
        export_model(model, "f16", path)
    assert path.read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.gguf", "base", "run"]


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_llama_cpp_generates_the_same_tokens(kind, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    export_model(find_finished_model("tiny", tmp_path), kind, tmp_path / "tiny.gguf")
    theirs = llama_cpp.Llama(str(tmp_path / "tiny.gguf"), n_ctx=512, n_threads=1, logits_all=True, verbose=False)
    ours, tokenizer = load_model(BUNDLED)
    renderer = Renderer(tokenizer)
    question = "How is the new job going so far?"
    prompt = renderer.encode_prompt(Dialogue((Turn("User", question), Turn("Assistant", ""))), 1)
    settings = GenerationSettings(max_new_tokens=60)
    bounds = Bounds(tokenizer.eot_token, renderer.newest_turns, renderer.stop)
    (said,) = generate(Decoder(ours), [prompt], bounds, settings, 0)
    with torch.inference_mode():
        expected = ours(torch.tensor([prompt]))[0, -1].numpy()
    theirs.eval(prompt)
    assert np.abs(theirs.scores[len(prompt) - 1] - expected).max() < 0.05

    answer = theirs.create_chat_completion(
        [{"role": "user", "content": question}], temperature=0.0, repeat_penalty=1.0, max_tokens=60
    )["choices"][0]
    (turn,) = renderer.parse_turns(tokenizer.decode(said), "Assistant", [])
    assert answer["message"]["content"].strip() == turn.text
    assert answer["finish_reason"] == "stop"
