"""A Hugging Face CLIP's tokenizer, checked against its text tower.

Read at first use, before the first round. Where its files are missing, transformers makes a tokenizer of two
words without a word, to which all texts are equal: so files, size and end token are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from models.errors import UserError
from models.towers import Tokens

_WHOLE, _PARTS = "tokenizer.json", ("vocab.json", "merges.txt")
_PADDED_TO = 64
"""Text towers may have rows without a word, up to the next multiple of this."""
_POOLS_AT_LARGEST = 2
"""The end token of old configurations, which means: pool at the largest id."""


class TokenizerMissingError(UserError):
    """Text is given to a model whose tokenizer is neither on disk nor reachable."""


class HubTokenizer:
    """Tokenizer read at first use, so that a model without text needs none."""

    def __init__(
        self,
        model_name: str,
        source: str,
        text_config: Any,
        *,
        local_only: Callable[[str], bool],
        cache_dir: str | None = None,
    ) -> None:
        """Remember what to read.

        Args:
            model_name: As the user wrote it, for messages.
            source: Folder or hub name.
            text_config: The text tower's configuration: size, end token and context length.
            local_only: Whether a source is to be looked for on this machine only.
            cache_dir: Where downloads are kept; the hub's own folder if left out.
        """
        self.model_name, self.source = model_name, source
        self.text_config, self.local_only, self.cache_dir = text_config, local_only, cache_dir
        self.context_length = int(text_config.max_position_embeddings)
        self.tokenizer: Any = None

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Tokens padded to the longest text, cut to the context length.

        Raises:
            UserError: The tokenizer is missing, or is another model's.
        """
        self._make_ready()
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.context_length, return_tensors="pt"
        )
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}

    def num_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has before it is cut, (N,)."""
        self._make_ready()
        return [len(ids) for ids in self.tokenizer(list(texts), verbose=False)["input_ids"]]

    def _make_ready(self) -> None:
        if self.tokenizer is None:
            tokenizer = self._read()
            self._check(tokenizer)
            self.tokenizer = tokenizer

    def _read(self) -> Any:
        folder = Path(self.source)
        if folder.is_dir() and not (folder / _WHOLE).is_file():
            missing = [name for name in _PARTS if not (folder / name).is_file()]
            if missing:
                file = _WHOLE if len(missing) == len(_PARTS) else missing[0]
                raise TokenizerMissingError(
                    f"model_name={self.model_name!r}: {folder / file} is missing, so there is no tokenizer; "
                    "copy it from where the model comes from, or leave out class names and texts"
                )
        try:
            return AutoTokenizer.from_pretrained(
                self.source, local_files_only=self.local_only(self.source), cache_dir=self.cache_dir
            )
        except (OSError, ValueError) as error:
            if folder.is_dir():
                raise UserError(
                    f"model_name={self.model_name!r}: the tokenizer in {folder} cannot be read "
                    f"({str(error).splitlines()[0]}); copy its files again"
                ) from error
            raise TokenizerMissingError(
                f"model_name={self.model_name!r}: its tokenizer is not on this machine and cannot be fetched "
                "from the Hugging Face hub. Check the network, give a local folder that has tokenizer.json, "
                "use model_name=tiny, or leave out class names and texts"
            ) from error

    def _check(self, tokenizer: Any) -> None:
        """Refuse a tokenizer of another text tower."""
        rows, size = int(self.text_config.vocab_size), len(tokenizer)
        if not size <= rows <= -(-size // _PADDED_TO) * _PADDED_TO:
            raise self._refusal(f"has {size} entries, the text tower {rows}")
        ids = tokenizer([""])["input_ids"][0]
        end = int(self.text_config.eos_token_id)
        wanted = size - 1 if end == _POOLS_AT_LARGEST else end
        if wanted not in ids:
            raise self._refusal(f"does not end texts with token {wanted}, at which the text tower reads them")

    def _refusal(self, reason: str) -> UserError:
        return UserError(
            f"model_name={self.model_name!r}: the tokenizer in {self.source} is not this model's: it "
            f"{reason}; copy {_WHOLE} (or {' and '.join(_PARTS)}) from where the weights come from"
        )
