"""Keep the weights with the lowest validation loss on disk, so that memory holds only one copy of the model."""

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from support.files import writing


def save_best(path: Path, tensors: Iterable[Tensor], spares: Sequence[Path]) -> int:
    """Write tensors to `path`, one after another without a header, and return the CRC-32 of the file.

    One of the `spares`, unused files of the same size, is overwritten and renamed; the others are
    removed. Overwriting is several times faster than writing a new file, which needs free pages.

    Raises:
        UserError: the file can't be written (a full disk).
    """
    crc, temporary = 0, path.with_suffix(".tmp")
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        for spare in spares[1:]:
            spare.unlink()
        if spares:
            spares[0].replace(temporary)
        try:
            with open(temporary, "r+b" if spares else "wb") as file:
                for tensor in tensors:
                    content = as_bytes(tensor.detach().cpu().contiguous())
                    crc = zlib.crc32(content, crc)
                    file.write(content)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    return crc


def load_best(path: Path, tensors: Iterable[Tensor]) -> None:
    """Copy the tensors written by `save_best` into tensors of the same shapes, one at a time."""
    with open(path, "rb") as file, torch.no_grad():
        for tensor in tensors:
            stored = tensor.detach() if tensor.is_cpu else torch.empty(tensor.shape, dtype=tensor.dtype)
            file.readinto(as_bytes(stored))
            if not tensor.is_cpu:
                tensor.copy_(stored)


def as_bytes(tensor: Tensor) -> memoryview:
    """A byte view of a contiguous CPU tensor, without a copy."""
    return tensor.view(-1).view(torch.uint8).numpy().data
