"""Find a finished model to evaluate or chat with, and its base model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dialogues.template import TEMPLATES
from dialogues.tokenizer import load_tokenizer
from hub.find import find_model_folder, weights_checksum
from pipeline.run_folder import find_run
from pipeline.run_settings import read_fingerprints, read_settings
from settings import FinetuneSettings
from support.errors import UserError
from support.files import read_json_object


class FinishedModel(NamedTuple):
    """A model's folder, the content of its `dialogue.json`, and the run that made it, if any."""

    folder: Path
    dialogue: dict[str, Any]
    run: Path | None
    recorded: FinetuneSettings | None  # the run's settings


def find_finished_model(name: str | None, model_path: Path) -> FinishedModel:
    """Find the model that the command line names, or by default the model of the newest finished run.

    Raises:
        UserError: there is no such model, its run has not finished, or its `dialogue.json` is damaged.
    """
    run = find_run(name)
    folder = find_model_folder(str(run or name), model_path)
    described = folder / "dialogue.json"
    dialogue = read_json_object(described, "restore or delete it") if described.exists() else {}
    names = dialogue.get("speakers", [])
    texts = [dialogue.get(key, "") for key in ("template", "learn", "instruction")]
    if not isinstance(names, list) or not all(isinstance(text, str) for text in [*names, *texts]):
        raise UserError(f"{described} is damaged; restore or delete it")
    if dialogue.get("template", "prompt") not in TEMPLATES:
        raise UserError(f"{described} names an unknown template, {dialogue['template']}; restore or delete it")
    return FinishedModel(folder, dialogue, run, read_settings(run) if run else None)


def find_base(model: FinishedModel, asked: str | None, model_path: Path, say: Callable[[str], None]) -> Path | None:
    """Return the folder of the model to compare with, or None.

    Args:
        asked: the value of `--base`: a model, "none", or None for the model from which the run started.
        say: prints the reason why an expected base model is left out.

    Raises:
        UserError: the requested model can't be found, or has a different vocabulary.
    """
    if asked == "none" or not (asked or model.run):
        return None
    if asked:
        base = find_model_folder(asked, model_path)
        theirs, ours = load_tokenizer(base), load_tokenizer(model.folder)
        specials = theirs._special_tokens.items() <= ours._special_tokens.items()
        if not specials or theirs._mergeable_ranks != ours._mergeable_ranks:
            raise UserError(
                f"--base {asked}: its vocabulary differs from that of {model.folder}; evaluate it separately, and"
                " compare bits per byte"
            )
        return base
    assert model.run
    assert model.recorded
    try:
        base = find_model_folder(model.recorded.model.name, model.recorded.model.model_path)
    except UserError as error:
        say(f"base model: left out ({error}); choose one with --base")
        return None
    changed = weights_checksum(base) != read_fingerprints(model.run).get("model")
    if changed:
        say(f"base model: left out ({base} has changed since); choose one with --base")
    return None if changed else base
