"""Memory that a run does not need: weights that it never reads, and what building it has freed.

Used once, when a run is set up. A linear head on image features leaves a
CLIP's text tower idle, two fifths of ViT-B/32. The parameters stay what they are; whoever reads one brings
its pages back from the file.
"""

from __future__ import annotations

import ctypes
import mmap
import tempfile

import torch
from torch import nn

from models.clip import FederatedCLIPModel
from models.errors import UserError

_ALIGNMENT = 64


def park_idle_tower(model: FederatedCLIPModel, folder: str) -> int:
    """Move the text tower into a memory-mapped temporary file, where nothing of it trains or is read.

    Args:
        model: The federated model, on the CPU, with its head started.
        folder: Where the file is; it has no name there and is gone with the process.

    Returns:
        The bytes that were moved; 0 where the task reads the text tower, or the model is on another device.

    Raises:
        UserError: The folder cannot be written, or there is no room.
    """
    if model.task.uses_text or not model.text_is_frozen or model.device.type != "cpu":
        return 0
    idle = [p for name, p in model.clip.named_parameters() if model.towers.tower_of(name) == "text"]
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            places = []
            for parameter in idle:
                places.append(file.tell())
                values = parameter.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
                file.write(values.data)
                file.write(bytes(-values.nbytes % _ALIGNMENT))
            file.flush()
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if places else b""
    except OSError as error:
        raise UserError(
            f"cache.folder={folder} has no room for the weights that this run does not read ({error}): name "
            "another folder, or none"
        ) from error
    for parameter, place in zip(idle, places, strict=True):
        _read_from(parameter, buffer, place)
    return sum(parameter.nbytes for parameter in idle)


def return_freed_memory() -> None:
    """Give the system back what is free inside the C heap, where its C library can (glibc).

    Loading a model frees hundreds of megabytes between blocks that stay, which otherwise count as used.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _read_from(parameter: nn.Parameter, buffer: mmap.mmap | bytes, place: int) -> None:
    values = torch.frombuffer(buffer, dtype=parameter.dtype, count=parameter.numel(), offset=place)
    parameter.data = values.view_as(parameter)
