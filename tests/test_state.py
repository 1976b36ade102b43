"""States: differences and sums in place, and tensors that lie end to end in one vector."""

from __future__ import annotations

import pytest
import torch

from models.state import add_, cut, end_to_end, subtract_

SHAPES = ((3, 5), (7,), (), (0, 2), (2, 3, 4))
NUM_VALUES = 15 + 7 + 1 + 0 + 24


def tensors(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def test_cut_tensors_share_the_vector_in_order():
    vector = torch.arange(NUM_VALUES, dtype=torch.float32)
    pieces = cut(vector, SHAPES)
    assert [tuple(piece.shape) for piece in pieces] == list(SHAPES)
    assert torch.equal(torch.cat([piece.reshape(-1) for piece in pieces]), vector)
    pieces[1].fill_(-1.0)
    assert (vector == -1.0).sum() == 7


def test_a_part_of_a_vector_is_cut_from_its_own_start():
    vector = torch.arange(NUM_VALUES + 4, dtype=torch.float32)
    pieces = cut(vector[4:], SHAPES)
    assert torch.equal(end_to_end(pieces), vector[4:])


@pytest.mark.parametrize("chosen", [slice(None), slice(1, 4), slice(4, 5)])
def test_cut_tensors_are_joined_without_a_copy(chosen):
    pieces = cut(torch.randn(NUM_VALUES), SHAPES)[chosen]
    joined = end_to_end(pieces)
    assert joined.data_ptr() == pieces[0].data_ptr()
    assert torch.equal(joined, torch.cat([piece.reshape(-1) for piece in pieces]))


@pytest.mark.parametrize("order", [[1, 0], [0, 2], [0, 0], [0, 1, 4]])
def test_what_does_not_lie_end_to_end_is_copied(order):
    pieces = cut(torch.randn(NUM_VALUES), SHAPES)
    picked = [pieces[index] for index in order]
    joined = end_to_end(picked)
    assert torch.equal(joined, torch.cat([piece.reshape(-1) for piece in picked]))
    assert joined.untyped_storage().data_ptr() != pieces[0].untyped_storage().data_ptr()


def test_transposed_and_foreign_tensors_are_copied_in_the_order_of_their_values():
    vector = torch.randn(12)
    across = cut(vector, ((3, 4),))[0].t()
    joined = end_to_end([across])
    assert torch.equal(joined, across.reshape(-1))
    assert joined.data_ptr() != vector.data_ptr()
    first, second = cut(vector, ((6,), (6,)))
    foreign = torch.randn(6)
    assert torch.equal(end_to_end([first, foreign]), torch.cat([first, foreign]))
    assert torch.equal(
        end_to_end([first.view(torch.int32), second.view(torch.int32)]).view(torch.float32), vector
    )


@pytest.mark.parametrize(
    "vector", [torch.zeros(NUM_VALUES - 1), torch.zeros(NUM_VALUES + 1), torch.zeros(2 * NUM_VALUES)[::2]]
)
def test_a_vector_that_does_not_fit_the_shapes_is_refused(vector):
    with pytest.raises(ValueError, match=f"shapes of {NUM_VALUES} values"):
        cut(vector, SHAPES)


def test_a_difference_and_its_sum_are_written_over_what_changes():
    names = ["b", "a", "d", "e"]
    before = dict(zip("abcde", tensors(), strict=True))
    after = dict(zip("abcde", tensors(seed=1), strict=True))
    expected = {name: after[name] - before[name] for name in names}
    untouched = after["c"].clone()
    change = subtract_(after, before, names)
    assert list(change) == names
    assert all(torch.equal(change[name], expected[name]) for name in names)
    assert all(change[name] is after[name] for name in names)
    assert torch.equal(after["c"], untouched)
    back = add_(change, before)
    assert back is change
    assert all(torch.equal(back[name], expected[name] + before[name]) for name in names)


def test_no_names_change_nothing():
    state = {"a": torch.ones(2)}
    assert subtract_(state, {}, ()) == {}
    assert add_({}, state) == {}
