"""The model card describes a run in the hub's format, and keeps private what the run knows."""

import json

import pytest
from huggingface_hub import ModelCard

from evaluation.run_files import RunFiles
from pipeline.model_card import CARD, base_model, write_card


def test_a_run_describes_its_model_without_names_texts_and_paths(command, work, model_folder):
    data = work / "secret-chat.json"
    data.write_text(json.dumps([{"Zoltan": f"Where is number {n}?", "Quentin": f"Under {n} mats."} for n in range(20)]))
    done = command("finetune.py", "--model", model_folder, "--data", data, "--epochs", 1, "--learn", "Quentin")
    assert done.returncode == 0, done.stderr
    run = work / "runs" / "tiny-random-1"
    card = ModelCard.load(run / "model" / CARD)
    assert (card.data.pipeline_tag, card.data.library_name) == ("text-generation", "transformers")
    loss = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["metrics"]["model"]["loss"]
    (result,) = (each for each in card.data.eval_results if each.metric_type == "loss")
    assert result.metric_value == pytest.approx(loss, abs=1e-3)
    assert "- train: 14 dialogues, 28 turns" in card.content
    assert "Learned: one speaker's turns. Template: `prompt`." in card.content
    assert "| learning_rate |" in card.content
    for private in ("Zoltan", "Quentin", "mats", "secret-chat", str(work), "tiny-random"):
        assert private not in card.content
    before = card.content
    write_card(run)
    assert ModelCard.load(run / "model" / CARD).content == before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2-medium", "openai-community/gpt2-medium"),
        ("microsoft/DialoGPT-medium", "microsoft/DialoGPT-medium"),
        ("/home/me/models/mine", ""),
        ("tiny", ""),
    ],
)
def test_the_base_model_is_named_only_if_it_is_on_the_hub(tmp_path, name, expected):
    assert base_model(RunFiles(tmp_path, settings={"model": {"name": name}})) == expected
