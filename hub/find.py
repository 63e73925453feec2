"""Find a model's folder by its name. This does not import PyTorch, so errors in names and files appear at once."""

import difflib
import hashlib
import re
import shlex
from pathlib import Path

from hub.download import WEIGHT_FILES, download_model, missing_files
from support.errors import UserError
from support.files import PROJECT, crc_of, resolved

BUNDLED = PROJECT / "models" / "tiny"
CHECKSUMS = "SHA256SUMS"  # checksums of the bundled files, in the format of `sha256sum --check`
HUB_IDS = {
    "distilgpt2": "distilbert/distilgpt2",
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
}


def find_model_folder(model: str, model_path: Path, weights: bool = True) -> Path:
    """The folder of `model`: tiny, a published name, a Hugging Face id, a model folder or a run folder.

    Published models are stored in `<model_path>/<name>/`, and missing files are downloaded there; a complete folder
    needs no network. Without `weights`, the configuration and the vocabulary are enough.

    Raises:
        UserError: no such model, an incomplete folder, or a failed download.
    """
    folder = Path(model)
    if model == BUNDLED.name or resolved(folder) == BUNDLED:
        check_bundled_files()
        return BUNDLED.relative_to(Path.cwd()) if BUNDLED.is_relative_to(Path.cwd()) else BUNDLED
    if model in HUB_IDS:
        return download_model(HUB_IDS[model], model_path / model, weights)
    if (folder / "model" / "config.json").exists():  # a run folder
        folder = folder / "model"
    if folder.is_dir():
        if missing := missing_files(folder, weights):
            raise UserError(f"the model folder {folder} {explain_incomplete(folder, missing)}")
        return folder
    owner, slash, name = model.partition("/")
    if slash and re.fullmatch(r"\w[\w.-]*", owner) and re.fullmatch(r"\w[\w.-]*", name) and not Path(owner).is_dir():
        return download_model(model, model_path / owner / name, weights)
    names = [BUNDLED.name, *HUB_IDS]
    nearest = difflib.get_close_matches(model, names, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise UserError(f"no model {model}: it is not a folder, a Hugging Face id, or one of {', '.join(names)}{hint}")


def check_bundled_files() -> None:
    """Compare the bundled files with their checksums, so that an edited or truncated file is reported, not trained.

    Raises:
        UserError: files are damaged; the message names them and the command that restores them.
    """
    try:
        words = (BUNDLED / CHECKSUMS).read_text(encoding="ascii").split()
        checksums = dict(zip(words[1::2], words[::2], strict=True))
        damaged = [
            name
            for name, expected in checksums.items()
            if not (BUNDLED / name).is_file() or checksum(BUNDLED / name) != expected
        ]
    except (OSError, ValueError):
        checksums, damaged = {}, []
    if not {"config.json", "vocab.json", "merges.txt", WEIGHT_FILES[0]} <= checksums.keys():
        damaged = [CHECKSUMS]
    if damaged:
        # Restore only these files and the checksums: somebody may be editing other files in the folder.
        restored = " ".join(f"models/tiny/{name}" for name in dict.fromkeys([*damaged, CHECKSUMS]))
        raise UserError(
            f"the bundled model is damaged: {', '.join(str(BUNDLED / name) for name in damaged)};"
            f" restore it with: git -C {shlex.quote(str(PROJECT))} checkout -- {restored}"
        )


def weights_checksum(folder: Path) -> str:
    """Return the CRC-32 (hex) of the configuration and the weight file."""
    weights = next(folder / name for name in WEIGHT_FILES if (folder / name).exists())
    return f"{crc_of(weights, crc_of(folder / 'config.json')):08x}"


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def explain_incomplete(folder: Path, missing: list[str]) -> str:
    """The reason why `folder` is not a model folder, as the end of a sentence."""
    if (folder / "checkpoint").exists() or any(folder.glob("*.ckpt*")) or (folder / "tf_model.h5").exists():
        return "holds a TensorFlow checkpoint; use the Hugging Face files (config.json, model.safetensors) instead"
    if any(folder.glob("*.index.json")):
        return "has its weights in several files; save the model with a single model.safetensors"
    return f"is incomplete: {', '.join(missing)} missing"
