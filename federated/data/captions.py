"""Captions as tokens: each distinct caption is tokenized once and has a number.

A batch is padded to its longest caption only, as the tokenizer itself would; the numbers let the model encode
a caption that occurs twice in a batch once, and let caches keep rows of captions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from federated.data.splits import IntArray
from models.features import CAPTION_ID
from models.training import Batch

Tokenize = Callable[[Sequence[str]], dict[str, Tensor]]

MAX_KEPT = 500_000
"""Captions whose tokens are remembered; augmented captions could otherwise grow without bound."""


class Captions:
    """The tokens of captions.

    Args:
        tokenize: Texts -> "input_ids" and "attention_mask", (N, T), padded on the right.
        known: Captions that get the numbers from 0 on, the same in every process.
    """

    def __init__(self, tokenize: Tokenize, known: Iterable[str] = ()) -> None:
        self._tokenize = tokenize
        self.known = tuple(dict.fromkeys(known))
        self._numbers = {caption: number for number, caption in enumerate(self.known)}
        self._tokens: dict[str, Tensor] = {}  # (T,) without padding
        self._padding: int | None = None

    def batch(self, captions: Sequence[str]) -> Batch:
        """Return "input_ids" and "attention_mask" (B, T), and the captions' numbers as "caption_id" (B,)."""
        numbers = [self._numbers.setdefault(caption, len(self._numbers)) for caption in captions]
        return {**self._padded(captions), CAPTION_ID: torch.tensor(numbers)}

    def known_batch(self, numbers: IntArray, length: int) -> Batch:
        """Return the tokens of known captions, padded to a fixed length, (B, length)."""
        return self._padded([self.known[number] for number in numbers], length)

    def read_known(self) -> None:
        """Tokenize the known captions now."""
        self._read(self.known)

    @property
    def longest(self) -> int:
        """Tokens of the longest known caption."""
        self.read_known()
        return max(len(self._tokens[caption]) for caption in self.known)

    def _padded(self, captions: Sequence[str], length: int | None = None) -> Batch:
        self._read(captions)
        rows = [self._tokens[caption] for caption in captions]
        lengths = np.array([len(row) for row in rows])
        length = length or int(lengths.max())
        ids = torch.full((len(rows), length), self._padding_id())
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
        mask = torch.arange(length) < torch.from_numpy(lengths).unsqueeze(1)
        return {"input_ids": ids, "attention_mask": mask.long()}

    def _read(self, captions: Sequence[str]) -> None:
        """Tokenize what is new."""
        if len(self._tokens) > MAX_KEPT:
            self._tokens.clear()
        new = list(dict.fromkeys(caption for caption in captions if caption not in self._tokens))
        if new:
            tokens = self._tokenize(new)
            for caption, ids, mask in zip(new, tokens["input_ids"], tokens["attention_mask"], strict=True):
                self._tokens[caption] = ids[: int(mask.sum())].clone()

    def _padding_id(self) -> int:
        if self._padding is None:
            self._padding = int(self._tokenize(["a", "a a a a"])["input_ids"][0, -1])
        return self._padding
