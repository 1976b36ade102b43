"""Class prompts: class names and templates become one embedding a class.

Used when the head is started (before round 1) and by the zero-shot task, where each step with a
trained text tower encodes each class prompt once, however often the class occurs in the batch.
Source: Radford et al. 2021, section 3.1.4 (prompt ensembling in embedding space).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.errors import UserError

logger = logging.getLogger(__name__)

SHOWN_LETTERS = 60
"""Letters of a text that a message shows."""

MAX_PROMPTS = 1024
"""Prompts encoded at a time; a thousand classes times eighty templates would not fit at once."""


def class_prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """All prompts, class by class: C * T of them."""
    return [template.replace("{}", name) for name in class_names for template in templates]


def encode_in_chunks(encode: Callable[[dict[str, Tensor]], Tensor], tokens: dict[str, Tensor]) -> Tensor:
    """Encode N prompts, at most MAX_PROMPTS at a time, into (N, D)."""
    starts = range(0, tokens["input_ids"].shape[0], MAX_PROMPTS)
    return torch.cat(
        [
            encode({key: value[start : start + MAX_PROMPTS] for key, value in tokens.items()})
            for start in starts
        ]
    )


def average_templates(features: Tensor, num_classes: int) -> Tensor:
    """Average the prompts of each class.

    Args:
        features: Text features in the order of `class_prompts`, (C * T, D).
        num_classes: C.

    Returns:
        Mean of the normalised features of each class, normalised again, (C, D).
    """
    normalised = F.normalize(features, dim=-1)
    return F.normalize(normalised.view(num_classes, -1, features.shape[-1]).mean(dim=1), dim=-1)


def names_that_read_alike(tokens: dict[str, Tensor], class_names: Sequence[str]) -> list[tuple[str, ...]]:
    """Group the classes whose prompts are all the same tokens: what differs was cut off, or is not read.

    Args:
        tokens: Of ``class_prompts``, "input_ids" (C * T, length).
        class_names: C names.

    Returns:
        The groups of two names and more, in the order of the classes.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    prompts = tokens["input_ids"].reshape(len(class_names), -1).tolist()  # (C, T * length)
    for name, ids in zip(class_names, prompts, strict=True):
        groups.setdefault(tuple(ids), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def pad_tokens(tokens: dict[str, Tensor], clip: nn.Module) -> dict[str, Tensor]:
    """Fill tokens (N, T) up to the text tower's context length by repeating their last column.

    The longest text's last token is its end-of-text token, all others' the padding: neither is the first
    end-of-text token of its row, at which the tower pools.
    """
    module: Any = clip
    config = getattr(getattr(clip, "config", None), "text_config", None)
    length = int(module.context_length if config is None else config.max_position_embeddings)
    ids = tokens["input_ids"]
    missing = length - ids.shape[1]
    padded = {"input_ids": torch.cat([ids, ids[:, -1:].expand(-1, missing)], dim=1)}
    if "attention_mask" in tokens:
        padded["attention_mask"] = F.pad(tokens["attention_mask"], (0, missing))
    return padded


def first_places(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where each distinct id stands, and which of them each place has.

    Args:
        ids: (B,), integers.

    Returns:
        A place of each distinct id (U,), and for each place the number of its id among them (B,).
    """
    distinct, numbers = ids.unique(return_inverse=True)
    places = torch.arange(len(ids), device=ids.device)
    return torch.empty_like(distinct).scatter_(0, numbers, places), numbers


def check_unicode(texts: Sequence[str], what: str) -> None:
    """Refuse texts that no tokenizer reads: bytes of a command line or a name that are not UTF-8.

    Raises:
        UserError: One is none.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{what} {text[:SHOWN_LETTERS]!r} is not UTF-8: give it in UTF-8, in a terminal or locale "
                "that is (PYTHONUTF8=1 overrules the locale)"
            ) from error


def warn_of_cut(
    tokenize: Callable[[Sequence[str]], dict[str, Tensor]], texts: Sequence[str], what: str
) -> None:
    """Log how many texts are longer than the text tower reads, and which of them become equal to another.

    Args:
        tokenize: Of a loaded model, which cuts; one that cannot count tokens says nothing.
        texts: What it is given.
        what: What they are, for the message: "captions".
    """
    count: Callable[[Sequence[str]], list[int]] | None = getattr(tokenize, "num_tokens", None)
    different = list(dict.fromkeys(texts))
    if count is None or not different:
        return
    limit: int = tokenize.context_length  # type: ignore[attr-defined]
    cut = [text for text, length in zip(different, count(different), strict=True) if length > limit]
    if not cut:
        return
    first_of: dict[tuple[int, ...], str] = {}
    equal = [
        (first, text)
        for text, ids in zip(cut, tokenize(cut)["input_ids"].tolist(), strict=True)
        if (first := first_of.setdefault(tuple(ids), text)) != text
    ]
    same = "".join(
        f"; {len(equal)} of them become equal to another, such as {_end_of(first)} and {_end_of(text)}"
        for first, text in equal[:1]
    )
    logger.warning(
        "%d of %d %s are longer than the %d tokens that the text tower reads, and are cut, such as %r%s",
        len(cut), len(different), what, limit, cut[0][:SHOWN_LETTERS], same,
    )  # fmt: skip


def _end_of(text: str) -> str:
    return repr(f"… {text[-SHOWN_LETTERS:]}")


def check_classes(num_classes: int, class_names: Sequence[str] | None, templates: Sequence[str]) -> None:
    """Refuse class names and templates that cannot be used together.

    Raises:
        UserError: The numbers disagree, or a template has no place for a name.
    """
    if num_classes < 1:
        raise UserError(f"num_classes={num_classes}: must be 1 or more")
    if class_names is not None and len(class_names) != num_classes:
        raise UserError(
            f"num_classes={num_classes} but {len(class_names)} class names are given "
            f"({', '.join(list(class_names)[:5])}, ...): make them equal"
        )
    if not templates or any("{}" not in template for template in templates):
        raise UserError(
            f"templates={list(templates)}: give at least one, each with {{}} where the class name goes"
        )
