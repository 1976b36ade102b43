"""Every random stream of a run, derived from its seed.

Streams are keyed by what they are for, so that no result depends on the order in which clients run, on how
many there are, or on which engine carries the messages. No two streams share their numbers: numpy fills a key
with zeros, so that (2, t) and (2, t, 0) are one, and therefore each stream here has keys of one length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

_WORD_BITS = 32
_NUM_WORDS = 4
"""Of numpy's seed sequence: shorter entropy is filled up with zeros to this."""


@dataclass(frozen=True)
class Stream:
    """How the numbers of a stream are keyed.

    Attributes:
        words: Begin the key.
        key: What follows them: the name of each number.
        least: The smallest number in the key.
    """

    words: tuple[int, ...]
    key: tuple[str, ...] = ()
    least: int = 0


STREAMS = {
    "cohort": Stream((0,), ("round",)),
    "client": Stream((1,), ("round", "client")),
    "codec": Stream((2,), ("round", "client")),
    "partition": Stream((4,)),
    "test split": Stream((4, 1)),
    "hold-out": Stream((4, 2), ("client",)),
    "augment": Stream((5,), ("round", "client")),
    "test rows": Stream((6, 0)),
    "evaluation": Stream((6,), ("round",), least=1),
    "downlink": Stream((7,), ("round",)),
    "folder split": Stream((8,), ("class",)),
    "faults": Stream((9,), ("round", "client")),
    "devices": Stream((10,), ("client",)),
    "availability": Stream((11,), ("round", "client")),
}
"""Stream by name: whose cohort is drawn; local training; rounding of an uplink; which client has which rows;
the test rows of data that have none; a client's own test rows; augmentation; the rows that the server tests
on; the clients that evaluate; rounding of a downlink; the splits of ``data prepare``, a class at a time;
who fails on purpose; links and devices of the clients; who can be reached."""


def entropy(seed: int, stream: str, *key: int) -> list[int]:
    """Return the 32-bit words that a stream starts from; no two of a seed, a stream and a key share them.

    Raises:
        ValueError: The key is not of that stream.
    """
    kind = STREAMS[stream]
    if len(key) != len(kind.key) or not all(kind.least <= number < 1 << _WORD_BITS for number in key):
        raise ValueError(f"the key of stream '{stream}' is {kind.key} from {kind.least}, not {key}")
    low, high = seed % (1 << _WORD_BITS), seed >> _WORD_BITS
    words = [low, *kind.words, *key]
    words += [0] * (_NUM_WORDS - len(words))
    while high:  # of a large seed, behind the key: before it, it would read as a stream's number
        words.append(high % (1 << _WORD_BITS))
        high >>= _WORD_BITS
    return words


def generator(seed: int, stream: str, *key: int) -> np.random.Generator:
    """Return the random stream named ``stream`` of a run, for the round, client … given in ``key``."""
    return np.random.default_rng(np.random.SeedSequence(entropy(seed, stream, *key)))


@contextlib.contextmanager
def scoped_torch_rng(rng: np.random.Generator) -> Iterator[None]:
    """Seed torch's global generator inside the block and put it back after.

    Dropout layers accept no generator, so this is the one way to give a client's dropout its own stream.
    """
    seed = int(rng.integers(2**63))
    if torch.cuda.is_available():
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
        return
    before = torch.get_rng_state()  # without the bookkeeping of fork_rng: 3 microseconds instead of 160
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)
