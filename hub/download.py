"""Download the files of a model folder from the Hugging Face hub, and resume interrupted downloads."""

import os
import tempfile
import time
import zlib
from pathlib import Path

from filelock import FileLock

from support.errors import UserError, display, reason
from support.files import check_free_space

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
OPTIONAL = ("dialogue.json", "added_tokens.json")  # a model that this program trained may have these
SHA256_LENGTH = 64  # hex digits; an ETag of this length is the content's sha256, as the hub sends for large files
RETRY_SECONDS = (1, 2, 4, 8)  # waiting times between five attempts


def missing_files(folder: Path, weights: bool = True) -> list[str]:
    """The files of a model folder that `folder` lacks. A vocabulary inside `tokenizer.json` counts."""
    names = ["config.json", "vocab.json", "merges.txt"]
    if (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists():
        names = ["config.json"]
    missing = [name for name in names if not (folder / name).exists()]
    if weights and not any((folder / name).exists() for name in WEIGHT_FILES):
        missing.append(WEIGHT_FILES[0])
    return missing


def download_model(hub_id: str, folder: Path, weights: bool = True) -> Path:
    """Download the files that `folder` lacks from `hub_id`, weights last, and return `folder`.

    A complete folder needs no request. Without `weights`, download only the configuration and the tokenizer's files.

    `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` are honoured.

    Raises:
        UserError: no network, no such model, a full disk, or a damaged transfer; partial downloads are kept.
    """
    missing = missing_files(folder, weights)
    if not missing:
        return folder
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    by_hand = f"or put {', '.join(missing)} into {folder} yourself"
    try:
        with lock_for(folder):
            if missing := missing_files(folder, weights):  # another process may have downloaded them in the meantime
                fetch_missing(hub_id, missing, folder)
    except UserError as error:
        raise UserError(f"{error}; {by_hand}") from error
    except (ValueError, ImportError) as error:  # a malformed HF_ENDPOINT, HF_TOKEN or proxy, or no library for it
        raise UserError(
            f"cannot reach the hub for {hub_id}: {error}; check the HF_* and *_PROXY variables, {by_hand}"
        ) from error
    return folder


def lock_for(folder: Path) -> FileLock:
    """A lock for `folder`: if several processes need it, as under torchrun, one downloads and the others wait."""
    name = f"{getattr(os, 'getuid', int)()}-{zlib.crc32(os.fsencode(folder.resolve())):08x}"
    return FileLock(Path(tempfile.gettempdir()) / f"gpt2-download-{name}.lock")


def fetch_missing(hub_id: str, missing: list[str], folder: Path) -> None:
    """Download the `missing` files; turn every failure of the hub or the network into a `UserError`."""
    from httpx2 import HTTPError  # huggingface_hub raises this when there is no network
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    display(f"download: {hub_id} from {constants.ENDPOINT} to {folder} ({', '.join(missing)})")
    try:
        for name in [*(name for name in OPTIONAL if not (folder / name).exists()), *missing]:
            try:
                fetch_with_retries(hub_id, name, folder)
            except HfHubHTTPError as error:
                if name == WEIGHT_FILES[0] and isinstance(error, EntryNotFoundError):
                    fetch_with_retries(hub_id, WEIGHT_FILES[1], folder)  # older models only have this file
                elif name not in OPTIONAL or error.response.status_code != 404:
                    raise
    except OfflineModeIsEnabled:
        raise UserError(f"{hub_id} is not in {folder}, and HF_HUB_OFFLINE forbids downloads; unset it") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"the hub {constants.ENDPOINT} has no model {hub_id}, or you have no access (set HF_TOKEN if it is gated)"
        ) from None
    except EntryNotFoundError as error:
        raise UserError(f"{hub_id} does not have the files of a GPT-2 model: {str(error).splitlines()[0]}") from None
    except HFValidationError as error:
        raise UserError(f"{hub_id} is not a Hugging Face id: {error}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = "check HF_TOKEN" if status in (401, 403) else "try again later"
        raise UserError(f"{constants.ENDPOINT} answered {status} for {hub_id}; {advice}") from None
    except HTTPError as error:
        raise UserError(
            f"cannot download {hub_id} from {constants.ENDPOINT} ({str(error) or type(error).__name__});"
            " check the network and start again to resume the download"
        ) from None
    except OSError as error:
        if "Consistency check failed" in str(error):
            raise UserError(f"the download of {hub_id} ended early; start again to resume it") from None
        raise UserError(f"cannot download {hub_id} to {folder}: {reason(error)}") from error


def fetch_with_retries(hub_id: str, name: str, folder: Path) -> None:
    """Call `fetch`, and retry while the server is busy or failing (5xx)."""
    from huggingface_hub.errors import HfHubHTTPError

    for seconds in RETRY_SECONDS:
        try:
            fetch(hub_id, name, folder)
            return
        except HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise
            display(f"the hub answered {error.response.status_code}; retrying in {seconds} s")
            time.sleep(seconds)
    fetch(hub_id, name, folder)


def fetch(hub_id: str, name: str, folder: Path) -> None:
    """Download one file to `<name>.part`, resuming an earlier attempt, then check it and rename it.

    huggingface_hub's own download restarts at 0 after a kill and checks no hash, so use only its building blocks.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers
    from huggingface_hub.utils.sha import sha_fileobj

    url = hf_hub_url(hub_id, name)
    metadata = get_hf_file_metadata(url)
    if metadata.commit_hash is None or metadata.etag is None:
        raise UserError(f"{url} is not a Hugging Face hub (perhaps a captive portal)")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{name}.part"
    with open(part, "ab") as file:
        done = file.tell()
        # Resume only a file with a sha256: without one, the complete file can't be checked.
        if done and (len(metadata.etag) != SHA256_LENGTH or (metadata.size is not None and done > metadata.size)):
            file.truncate(0)
            done = 0
        if metadata.size is not None:
            check_free_space(folder, metadata.size - done, name)
        if done:
            display(f"{name}: resuming after {done / 1e6:,.1f} MB")
        http_get(
            url,
            file,
            resume_size=done,
            headers=build_hf_headers(),
            expected_size=metadata.size,
            displayed_filename=name,
        )
        file.flush()
        os.fsync(file.fileno())
    if len(metadata.etag) == SHA256_LENGTH:
        with open(part, "rb") as file:
            intact = sha_fileobj(file).hex() == metadata.etag
        if not intact:
            part.unlink()
            raise UserError(f"{name} of {hub_id} was damaged in transfer (its sha256 is wrong); start again")
    part.replace(folder / name)
