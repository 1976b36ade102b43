"""Whether an adapter belongs on the base model that is here.

Asked whenever an adapter is loaded. Hashes of all base weights decide where the file has them, a sample of
them in files of older versions. Files of plain PEFT have a name alone: it must be the model's, or that of a
model on this machine with the same weights.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from torch import nn

from lora.adapter_files import AdapterFile
from lora.adapters import unwrap
from lora.base_identity import agreeing_precision, base_digests, base_model_name, base_sample
from lora.input_identity import differing_settings, input_settings
from models.clip_loading import load_clip, stored_folder
from models.errors import UserError

logger = logging.getLogger(__name__)

_REMEDY = (
    "load that base model, or pass --any-base (check_base=False) to use the adapter on this one all the same"
)


def check_base_model(model: nn.Module, found: AdapterFile) -> None:
    """Refuse an adapter that was trained on another base model.

    Raises:
        UserError: The base weights or the preparation of inputs differ, or only another name is known.
    """
    name, theirs = base_model_name(model), found.base_model
    hashes = found.metadata.get("base_sha256")
    if not _sample_agrees(found.metadata.get("base_sample"), base_sample(model)) or (
        isinstance(hashes, dict) and not _hashes_agree(model, hashes, str(found.folder))
    ):
        raise UserError(
            f"{found.folder}: this adapter was trained on base model {theirs!r}, the model here is {name!r} "
            f"with other weights; {_REMEDY}"
        )
    if others := differing_settings(input_settings(model), found.metadata.get("inputs")):
        raise UserError(
            f"{found.folder}: this adapter was trained on inputs prepared in another way "
            f"({', '.join(others)}); copy the base model's processor and tokenizer "
            f"files again; {_REMEDY}"
        )
    if isinstance(hashes, dict) or found.metadata.get("base_sample"):
        return
    if not theirs or not name:
        logger.warning(
            "%s: nothing says which base model it was made on; it is taken for this one", found.folder
        )
    elif not _same_by_name(model, found):
        raise UserError(
            f"{found.folder}: this adapter was made on base model {_described(found)}, the model here is "
            f"{name!r}{'' if _is_pretrained(model) else ' with random weights'}, and the file holds nothing "
            f"but that name to compare; {_REMEDY}"
        )


def _sample_agrees(theirs: Any, mine: list[float]) -> bool:
    """Whether a few values are equal up to half precision; true where one side has none."""
    if not isinstance(theirs, list) or not theirs or not mine:
        return True
    return len(theirs) == len(mine) and all(
        math.isclose(a, b, rel_tol=2e-2, abs_tol=1e-3) for a, b in zip(theirs, mine, strict=True)
    )


def _hashes_agree(model: nn.Module, theirs: dict[str, Any], source: str) -> bool:
    mine = base_digests(model)
    precision = agreeing_precision(mine, theirs)
    if precision is not None and (precision != "float32" or "float32" not in theirs):
        logger.warning(
            "%s: its base and this one have the same weights in %s only; results differ by its rounding",
            source, precision,
        )  # fmt: skip
    return precision is not None or not mine


def _same_by_name(model: nn.Module, found: AdapterFile) -> bool:
    """Whether the two names stand for the same weights: the same name, or a stored model that is equal."""
    if _revision(found) is None and found.base_model == base_model_name(model) and _is_pretrained(model):
        return True
    folder = stored_folder(found.base_model)
    if _revision(found) is not None or folder is None:
        return False
    try:
        stored = load_clip(str(folder)).clip
    except UserError as error:
        logger.info("%s cannot be compared: %s", folder, error)
        return False
    return agreeing_precision(base_digests(model), base_digests(stored)) is not None


def _is_pretrained(model: nn.Module) -> bool:
    return bool(getattr(unwrap(model), "pretrained", True))


def _revision(found: AdapterFile) -> str | None:
    """The revision of the base model's repository, where it is not the usual one."""
    revision = None if found.peft_config is None else found.peft_config.revision
    return None if revision in (None, "main") else str(revision)


def _described(found: AdapterFile) -> str:
    revision = _revision(found)
    return repr(found.base_model) + ("" if revision is None else f", revision {revision!r}")
