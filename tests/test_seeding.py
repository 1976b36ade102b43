"""Random streams: no two of a run are one, and those of earlier releases keep their numbers."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from federated.config.seeding import STREAMS, entropy, generator

ROOT = Path(__file__).parents[1]
NUMBERS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 2**32 - 1)
SEEDS = (0, 1, 2, 2**32 - 1, 2**32, 2 * 2**32, 2**32 + 1, 2**64 + 1)


def all_keys() -> list[tuple[int, str, tuple[int, ...]]]:
    return [
        (seed, stream, key)
        for seed in SEEDS
        for stream, kind in STREAMS.items()
        for key in itertools.product([n for n in NUMBERS if n >= kind.least], repeat=len(kind.key))
    ]


def padded(words: list[int]) -> tuple[int, ...]:
    """What numpy makes of entropy: trailing zeros up to four words do not count."""
    return tuple(words + [0] * (4 - len(words)))


def test_no_two_streams_start_from_the_same_numbers() -> None:
    keys = all_keys()
    assert len({padded(entropy(seed, stream, *key)) for seed, stream, key in keys}) == len(keys)
    states = {
        np.random.SeedSequence(entropy(seed, stream, *key)).generate_state(4).tobytes()
        for seed, stream, key in keys
    }
    assert len(states) == len(keys)


def test_any_two_streams_differ_in_a_word_that_no_key_can_change() -> None:
    for one, other in itertools.combinations(STREAMS.values(), 2):
        spans = []
        for stream in (one, other):
            words = [(word, word) for word in stream.words] + [(stream.least, 2**32 - 1) for _ in stream.key]
            assert len(words) <= 3  # numpy fills up to four, with the seed
            spans.append(words + [(0, 0)] * (3 - len(words)))
        assert any(a[1] < b[0] or b[1] < a[0] for a, b in zip(*spans, strict=True)), (one, other)


@pytest.mark.parametrize(
    ("stream", "key", "before"),
    [
        ("cohort", (3,), [5, 0, 3]),
        ("client", (3, 0), [5, 1, 3, 0]),
        ("codec", (3, 7), [5, 2, 3, 7]),
        ("partition", (), [5, 4]),
        ("test split", (), [5, 4, 1]),
        ("hold-out", (9,), [5, 4, 2, 9]),
        ("augment", (3, 7), [5, 5, 3, 7]),
        ("test rows", (), [5, 6, 0]),
        ("evaluation", (3,), [5, 6, 3]),
    ],
)
def test_streams_that_never_collided_keep_their_numbers(
    stream: str, key: tuple[int, ...], before: list[int]
) -> None:
    drawn = np.random.default_rng(np.random.SeedSequence(before)).random(4)
    np.testing.assert_array_equal(generator(5, stream, *key).random(4), drawn)


def test_a_downlink_and_the_first_clients_uplink_round_by_streams_of_their_own() -> None:
    assert not np.array_equal(generator(0, "downlink", 3).random(4), generator(0, "codec", 3, 0).random(4))


@pytest.mark.parametrize(
    ("stream", "key"), [("codec", (3,)), ("cohort", ()), ("evaluation", (0,)), ("client", (1, -1))]
)
def test_a_key_of_another_length_or_range_is_refused(stream: str, key: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"stream '{stream}'"):
        generator(0, stream, *key)


def test_every_stream_is_drawn_from_somewhere() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "federated").rglob("*.py"))
    assert [s for s in STREAMS if f', "{s}"' not in source] == []
