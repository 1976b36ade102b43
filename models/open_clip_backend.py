"""open_clip models behind the same door as Hugging Face ones (optional extra).

Before the first one; `models.clip_loading.load_clip` hands names of the form "open_clip:<architecture>" or
"open_clip:<architecture>?pretrained=<tag or file>" to `load_open_clip`. After that nothing knows the backend:
the functions that encode are on the `LoadedCLIP`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from models.construction import seeded_construction
from models.errors import UserError, install_command
from models.images import ImageProcessor
from models.towers import LoadedCLIP, Tokens, Towers

OPEN_CLIP_PREFIX = "open_clip:"
"""Begins the names of this backend's models."""

_DEFAULT_TARGETS = ("attn",)


def load_open_clip(
    model_name: str,
    *,
    pretrained: bool,
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int,
    cache_dir: str | None = None,
) -> LoadedCLIP:
    """Load or construct an open_clip model; see `models.clip_loading.load_clip` for the arguments.

    Raises:
        UserError: open_clip is not installed, the architecture or tag is unknown, the weights
            cannot be fetched, or pretrained is set and the name says no tag.
    """
    if find_spec("open_clip") is None:
        raise UserError(
            f"model_name={model_name!r} needs the open_clip package: {install_command('open-clip')}"
        )
    import open_clip

    architecture, weights = _parse(model_name)
    _check_architecture(architecture, open_clip.list_models())
    clip: Any
    if pretrained:
        clip = _pretrained(open_clip, architecture, weights, cache_dir)
    else:
        clip = seeded_construction(lambda: _create(open_clip, architecture, None), seed=seed, device=device)
    clip = clip.to(device=device, dtype=dtype).eval()
    is_native = isinstance(clip, open_clip.CLIP) and clip.text_pool_type == "argmax"
    settings = open_clip.get_model_preprocess_cfg(clip)
    size = clip.visual.image_size
    return LoadedCLIP(
        clip=clip,
        tokenize=_OpenCLIPTokenizer(open_clip.get_tokenizer(architecture), trims=is_native),
        preprocess=_image_processor(settings),
        encode_image=_encode_image,
        encode_text=_encode_text_trimmed if is_native else _encode_text,
        towers=_towers(clip, is_native=isinstance(clip, open_clip.CLIP)),
        name=model_name,
        image_size=int(size[0] if isinstance(size, tuple | list) else size),
        embedding_dim=int(open_clip.get_model_config(architecture)["embed_dim"]),
    )


def _parse(model_name: str) -> tuple[str, str | None]:
    architecture, _, query = model_name.removeprefix(OPEN_CLIP_PREFIX).partition("?")
    if not query:
        return architecture, None
    key, _, value = query.partition("=")
    if key != "pretrained" or not value:
        raise UserError(f"model_name={model_name!r}: write open_clip:<architecture>?pretrained=<tag or file>")
    return architecture, value


def _check_architecture(architecture: str, known: Sequence[str]) -> None:
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=3, cutoff=0.3)
        raise UserError(
            f"open_clip has no architecture {architecture!r}; nearest: {', '.join(near) or 'none'}"
        )


def _create(
    open_clip: Any, architecture: str, weights: str | None, cache_dir: str | None = None
) -> nn.Module:
    return open_clip.create_model(
        architecture,
        pretrained=weights,
        device=torch.get_default_device(),
        pretrained_image=False,
        pretrained_text=False,
        cache_dir=cache_dir,
    )


def _pretrained(open_clip: Any, architecture: str, weights: str | None, cache_dir: str | None) -> nn.Module:
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if weights is None:
        raise UserError(
            f"open_clip:{architecture} does not say which weights: add ?pretrained=<tag or file> "
            f"(tags: {', '.join(tags) or 'none'}), or set pretrained=false for random weights"
        )
    if weights not in tags and not Path(weights).is_file():
        raise UserError(
            f"open_clip:{architecture}: {weights!r} is no file and no tag (tags: {', '.join(tags)})"
        )
    try:
        return _create(open_clip, architecture, weights, cache_dir)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"open_clip:{architecture}?pretrained={weights}: the weights cannot be fetched or do not fit "
            f"({error}). Check the network, give a file, or set pretrained=false"
        ) from error


def _towers(clip: nn.Module, *, is_native: bool) -> Towers:
    """Prefixes of the towers; the native class keeps the text tower's parts at its top level."""
    native = ("transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection")
    return Towers(
        backend="open_clip",
        vision=("visual",),
        text=native if is_native else ("text",),
        default_targets=_DEFAULT_TARGETS,
    )


def _image_processor(settings: dict[str, Any]) -> ImageProcessor:
    """Image processing of a preprocess_cfg; a margin of odd width is cut as Hugging Face cuts it."""
    size = settings["size"]
    height, width = (int(size[0]), int(size[1])) if isinstance(size, tuple | list) else (int(size), int(size))
    squash = settings.get("resize_mode") == "squash" or height != width
    return ImageProcessor.from_values(
        size=(height, width) if squash else height,
        crop=(height, width),
        resample=Image.Resampling[str(settings.get("interpolation", "bicubic")).upper()],
        factor=1.0 / 255.0,
        mean=settings["mean"],
        std=settings["std"],
    )


class _OpenCLIPTokenizer:
    """open_clip's tokenizer with the interface of `LoadedCLIP.tokenize`."""

    def __init__(self, tokenizer: Any, *, trims: bool) -> None:
        self.tokenizer = tokenizer
        self.trims = trims
        self.context_length = int(tokenizer.context_length)

    def __call__(self, texts: Sequence[str]) -> Tokens:
        ids = self.tokenizer(list(texts))  # (N, context length), padded with 0
        if not self.trims:
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        lengths = ids.argmax(dim=1) + 1  # the end-of-text token has the largest id
        ids = ids[:, : int(lengths.max())].contiguous()
        return {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long(),
        }

    def num_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has before it is cut, (N,)."""
        if hasattr(self.tokenizer, "encode"):  # open_clip's own; one token before and one behind
            return [len(self.tokenizer.encode(text)) + 2 for text in texts]
        return [len(ids) for ids in self.tokenizer.tokenizer(list(texts), verbose=False)["input_ids"]]


def _encode_image(clip: Any, pixel_values: Tensor) -> Tensor:
    return clip.encode_image(pixel_values)


def _encode_text(clip: Any, tokens: Tokens) -> Tensor:
    return clip.encode_text(tokens["input_ids"])


def _encode_text_trimmed(clip: Any, tokens: Tokens) -> Tensor:
    """open_clip's encode_text for any length T: its own wants the full context of 77 tokens.

    Exact, since the tower is causal and pools at the end-of-text token.
    """
    ids = tokens["input_ids"]  # (N, T)
    length = ids.shape[1]
    hidden = clip.token_embedding(ids) + clip.positional_embedding[:length]  # (N, T, width)
    hidden = clip.transformer(hidden, attn_mask=clip.attn_mask[:length, :length])
    pooled = clip.ln_final(hidden)[torch.arange(ids.shape[0], device=ids.device), ids.argmax(dim=1)]
    projection = clip.text_projection
    return projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection
