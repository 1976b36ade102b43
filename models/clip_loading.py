"""A model name becomes two towers, a tokenizer and an image processor.

Before the first one. Every simulated client and the server share the one `LoadedCLIP` made here; the names
accepted are

- "tiny": the CLIP bundled in models/tiny_clip (Hugging Face format, no network);
- a local folder in the hub's format;
- a hub name such as "openai/clip-vit-base-patch32" (downloaded, or taken from the local cache);
- "open_clip:<architecture>" (optional extra, see models/open_clip_backend.py).

With pretrained=False the same architecture gets seeded random weights; the architectures of
OpenAI's CLIP are tabulated below, so that this needs no network.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPConfig, CLIPModel
from transformers.utils import logging as transformers_logging

from models.construction import seeded_construction
from models.errors import UserError
from models.hub_tokenizer import HubTokenizer
from models.image_settings import read_image_settings
from models.images import ImageProcessor
from models.open_clip_backend import OPEN_CLIP_PREFIX, load_open_clip
from models.towers import LoadedCLIP, Tokens, Towers
from models.untrusted import read_json

logger = logging.getLogger(__name__)

TINY_FOLDER = Path(__file__).parent / "tiny_clip"
HUB_TIMEOUT_SECONDS = 1.5
"""How long the hub may take to be found, and to answer the one request that asks whether it is there."""

_LARGE = {
    "projection_dim": 768,
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 768,
    },
}
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "openai/clip-vit-base-patch32": {"vision_config": {"patch_size": 32}},
    "openai/clip-vit-base-patch16": {"vision_config": {"patch_size": 16}},
    "openai/clip-vit-large-patch14": _LARGE,
    "openai/clip-vit-large-patch14-336": {
        **_LARGE,
        "vision_config": {**_LARGE["vision_config"], "image_size": 336},  # type: ignore[dict-item]
    },
}
"""What differs from CLIPConfig's defaults, which are ViT-B/32's (Radford et al. 2021, table 20)."""


HUGGINGFACE_TOWERS = Towers(
    backend="huggingface",
    vision=("vision_model", "visual_projection"),
    text=("text_model", "text_projection"),
    default_targets=("q_proj", "v_proj"),
)


def load_clip(
    model_name: str,
    *,
    pretrained: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    cache_dir: str | None = None,
) -> LoadedCLIP:
    """Load or construct a CLIP model.

    Args:
        model_name: "tiny", a local folder, a hub name, or "open_clip:<architecture>".
        pretrained: Load the weights; otherwise draw them from `seed`.
        device: Where the module goes. "meta" with pretrained=False allocates nothing.
        dtype: Of the weights.
        seed: Of the random weights; the global generator is left as it was.
        cache_dir: Where downloads are kept and looked for; the hub's own folder if left out.

    Returns:
        The model, in eval mode, with its tokenizer and image processor.

    Raises:
        UserError: The model is not where its name says, cannot be reached, or is no CLIP.
    """
    if model_name.startswith(OPEN_CLIP_PREFIX):
        return load_open_clip(
            model_name, pretrained=pretrained, device=device, dtype=dtype, seed=seed, cache_dir=cache_dir
        )
    source = _source(model_name)
    clip: Any
    if pretrained:
        clip = _pretrained(model_name, source, cache_dir)
    else:
        config = _config(model_name, source, cache_dir)
        clip = seeded_construction(lambda: CLIPModel(config), seed=seed, device=device)
    clip = clip.to(device=device, dtype=dtype).eval()
    image_size = int(clip.config.vision_config.image_size)
    settings = read_image_settings(
        model_name,
        source,
        image_size,
        pretrained=pretrained,
        local_only=pretrained and _local_only(source),
        cache_dir=cache_dir,
    )
    return LoadedCLIP(
        clip=clip,
        tokenize=HubTokenizer(
            model_name, source, clip.config.text_config, local_only=_local_only, cache_dir=cache_dir
        ),
        preprocess=ImageProcessor.from_settings(settings),
        encode_image=_encode_image,
        encode_text=_encode_text,
        towers=HUGGINGFACE_TOWERS,
        name=model_name,
        image_size=image_size,
        embedding_dim=int(clip.config.projection_dim),
    )


def _encode_image(clip: CLIPModel, pixel_values: Tensor) -> Tensor:
    return clip.get_image_features(pixel_values=pixel_values).pooler_output


def _encode_text(clip: CLIPModel, tokens: Tokens) -> Tensor:
    return clip.get_text_features(**tokens).pooler_output


def _source(model_name: str) -> str:
    """Folder or hub name to hand to transformers."""
    if model_name == "tiny":
        if not (TINY_FOLDER / "config.json").is_file():
            raise UserError(
                f"model_name=tiny: the bundled checkpoint is missing from {TINY_FOLDER}; reinstall fedlora"
            )
        return str(TINY_FOLDER)
    folder = Path(model_name).expanduser()
    if folder.is_dir():
        _check_is_clip(folder)
        return str(folder)
    if model_name.startswith(("/", ".", "~")) or model_name.count("/") > 1 or not model_name:
        raise UserError(
            f"model_name={model_name!r}: there is no such folder. Give a folder written by save_pretrained, "
            "a hub name like openai/clip-vit-base-patch32, or model_name=tiny"
        )
    return model_name


def stored_folder(model_name: str) -> Path | None:
    """The folder on this machine that holds a Hugging Face model: bundled, local, or in the hub's cache."""
    if model_name == "tiny":
        return TINY_FOLDER
    if Path(model_name).expanduser().is_dir():
        return Path(model_name).expanduser()
    try:
        cached = try_to_load_from_cache(model_name, "config.json")
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _check_is_clip(folder: Path) -> None:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UserError(f"{folder} has no config.json: it is no model folder in the hub's format")
    found = read_json(config_file)
    model_type = found.get("model_type") if isinstance(found, dict) else None
    if model_type != "clip":
        raise UserError(
            f"{config_file} says model_type={model_type!r}: a CLIP model (model_type 'clip') is needed"
        )
    if found.get("quantization_config"):
        raise UserError(f"{config_file}: the weights are quantised; take the model they were made from")
    if (folder / "adapter_config.json").is_file():  # transformers would load the base that this file names
        raise UserError(
            f"{folder} holds a model and an adapter (adapter_config.json): move the adapter to another folder"
        )


@cache
def _local_only(source: str) -> bool:
    """Whether transformers should look for `source` on this machine only.

    One short request tells, once per process; transformers itself retries an unreachable hub for
    most of a minute, for each file.
    """
    if Path(source).is_dir():
        return True
    try:
        HfApi().model_info(source, timeout=HUB_TIMEOUT_SECONDS)
    except (httpx.HTTPError, OSError) as error:
        logger.info("%s: looking in the local cache only, the hub says: %s", source, error)
        return True
    return False


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar for reading or writing a local file."""
    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()


def _pretrained(model_name: str, source: str, cache_dir: str | None) -> CLIPModel:
    try:
        local_only = _local_only(source)
        with without_progress_bar() if local_only else nullcontext():
            loaded: Any = CLIPModel.from_pretrained(
                source, output_loading_info=True, local_files_only=local_only, cache_dir=cache_dir
            )
    except (SafetensorError, RuntimeError) as error:
        raise UserError(
            f"model_name={model_name!r}: the weights are damaged or do not fit config.json ({error}); "
            "fetch them again"
        ) from error
    except OSError as error:
        if Path(source).is_dir():
            raise UserError(
                f"model_name={model_name!r}: cannot read the weights in {source}: {error}"
            ) from error
        raise UserError(_unreachable(model_name)) from error
    clip, report = loaded
    for kind, verb in (("missing_keys", "lacks"), ("unexpected_keys", "has, beyond config.json,")):
        names = sorted(name for name in report[kind] if not name.endswith(".position_ids"))
        if names:
            raise UserError(
                f"model_name={model_name!r}: the weights file {verb} {len(names)} parameters, first "
                f"{names[0]}; write or fetch the folder again"
            )
    return clip


def _unreachable(model_name: str) -> str:
    return (
        f"model_name={model_name!r}: not in the local cache, and the Hugging Face hub cannot be reached or "
        "has no such model. Check the name and the network, or use a local folder "
        "(model_name=path/to/folder), the bundled model (model_name=tiny), or random weights "
        "(pretrained=false)"
    )


def _config(model_name: str, source: str, cache_dir: str | None) -> CLIPConfig:
    if source in ARCHITECTURES:
        return CLIPConfig(**ARCHITECTURES[source])
    try:
        return CLIPConfig.from_pretrained(source, local_files_only=_local_only(source), cache_dir=cache_dir)
    except OSError as error:
        raise UserError(
            f"model_name={model_name!r}, pretrained=false: its configuration is not on this machine and the "
            f"Hugging Face hub cannot be reached. Known without network: tiny, {', '.join(ARCHITECTURES)}"
        ) from error
