"""A name becomes an MBart encoder-decoder with its tokenizer: for answers to questions.

Before the first round. The names accepted are

- "tiny": the model bundled in models/tiny_mbart (no network);
- a local folder in the hub's format;
- a hub name such as "vinai/bartpho-syllable".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, MBartConfig, MBartForConditionalGeneration

from models.clip_loading import _local_only as local_only
from models.clip_loading import without_progress_bar
from models.construction import seeded_construction
from models.errors import UserError
from models.hub_tokenizer import TokenizerMissingError
from models.towers import Tokens
from models.untrusted import read_json

TINY_FOLDER = Path(__file__).parent / "tiny_mbart"
BARTPHO = "vinai/bartpho-syllable"
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    BARTPHO: {
        "vocab_size": 40_031,
        "d_model": 1024,
        "encoder_layers": 12,
        "decoder_layers": 12,
        "encoder_ffn_dim": 4096,
        "decoder_ffn_dim": 4096,
        "encoder_attention_heads": 16,
        "decoder_attention_heads": 16,
        "max_position_embeddings": 1024,
        "scale_embedding": False,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    }
}
"""What is known without network: BARTpho (Tran et al. 2021, arXiv:2109.09701)."""


def load_mbart(
    name: str,
    *,
    pretrained: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    cache_dir: str | None = None,
) -> MBartForConditionalGeneration:
    """Load or construct an MBart.

    Args:
        name: "tiny", a local folder or a hub name.
        pretrained: Load the weights; otherwise draw them from `seed`.
        device: Where it goes; "meta" with pretrained=False allocates nothing.
        dtype: Of the weights.
        seed: Of random weights.
        cache_dir: Where downloads are kept; the hub's own folder if left out.

    Returns:
        The model, in eval mode.

    Raises:
        UserError: It is not where its name says, cannot be reached, or is no MBart.
    """
    source = source_of(name)
    found: Any
    try:
        if not pretrained:
            config = _config(source, cache_dir)
            found = seeded_construction(
                lambda: MBartForConditionalGeneration(config), seed=seed, device=device
            )
        else:
            local = local_only(source)
            kind = AutoConfig.from_pretrained(source, local_files_only=local, cache_dir=cache_dir).model_type
            if kind != "mbart":
                raise UserError(f"text_model={name!r} is of model_type {kind!r}: an MBart is needed")
            with without_progress_bar() if local else nullcontext():
                found = MBartForConditionalGeneration.from_pretrained(
                    source, local_files_only=local, cache_dir=cache_dir, dtype=torch.float32
                )
    except (SafetensorError, RuntimeError) as error:
        raise UserError(
            f"text_model={name!r}: the weights are damaged ({error}); fetch them again"
        ) from error
    except OSError as error:
        raise UserError(
            f"text_model={name!r}: not on this machine, and the Hugging Face hub cannot be reached or has no "
            "such model. Use a local folder (model.options.text_model=path/to/folder) or the bundled model "
            "(model.options.text_model=tiny)"
        ) from error
    return found.to(device=device, dtype=dtype).eval()


def source_of(name: str) -> str:
    """Return the folder or hub name to hand to transformers.

    Raises:
        UserError: There is no such folder, or it holds no MBart.
    """
    if name == "tiny":
        return str(TINY_FOLDER)
    folder = Path(name).expanduser()
    if folder.is_dir():
        config = folder / "config.json"
        found = read_json(config) if config.is_file() else {}
        model_type = found.get("model_type") if isinstance(found, dict) else None
        if model_type != "mbart":
            raise UserError(
                f"text_model={name!r}: {config} says model_type={model_type!r}, and an MBart (model_type "
                "'mbart'), such as vinai/bartpho-syllable, is needed"
            )
        return str(folder)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or not name:
        raise UserError(f"text_model={name!r}: there is no such folder; give one, a hub name, or tiny")
    return name


def _config(source: str, cache_dir: str | None) -> MBartConfig:
    if source in ARCHITECTURES:
        return MBartConfig(**ARCHITECTURES[source])
    return MBartConfig.from_pretrained(source, local_files_only=local_only(source), cache_dir=cache_dir)


class TextTokenizer:
    """Texts to numbers, cut at a stated length, and back; the tokenizer is read at its first use.

    Args:
        name: Of the text model.
        cache_dir: Where downloads are kept.

    Attributes:
        num_cut: Texts that were longer than their limit, so far.
    """

    def __init__(self, name: str, cache_dir: str | None = None) -> None:
        self._name, self._cache_dir = name, cache_dir
        self._tokenizer: Any = None
        self.num_cut = 0

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers.

        Raises:
            TokenizerMissingError: It is not beside the model.
        """
        if self._tokenizer is None:
            source = source_of(self._name)
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(
                    source, local_files_only=local_only(source), cache_dir=self._cache_dir
                )
            except (OSError, ValueError, ImportError) as error:
                raise TokenizerMissingError(
                    f"text_model={self._name!r}: its tokenizer cannot be read ({error}); put the tokenizer's "
                    "files beside the weights"
                ) from error
        return self._tokenizer

    def tokens(self, texts: Sequence[str], most: int) -> Tokens:
        """Return tokens padded to the longest text, each ending as the checkpoint ends a text.

        Args:
            texts: (N,).
            most: Longest row of tokens; what is longer is cut, and counted in `num_cut`.
        """
        rows = [list(map(int, row)) for row in self.tokenizer(list(texts))["input_ids"]]
        ending, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        self.num_cut += sum(len(row) > most for row in rows)
        rows = [row if len(row) <= most else [*row[: most - 1], ending] for row in rows]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    def texts(self, ids: Tensor) -> list[str]:
        """Return the texts of rows of numbers, special tokens left out."""
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
