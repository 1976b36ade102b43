"""States: differences and sums in place, and tensors that lie end to end in one vector."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from models.state import FlatState, add_, end_to_end, flat, layout_of, subtract_, vector_of

SHAPES = ((3, 5), (7,), (), (0, 2), (2, 3, 4))
LAYOUT = tuple(zip("abcde", SHAPES, strict=True))
NUM_VALUES = 15 + 7 + 1 + 0 + 24


def tensors(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def cut(vector: torch.Tensor, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[torch.Tensor]:
    return list(FlatState(vector, tuple(zip("abcde", shapes, strict=False))).values())


def test_cut_tensors_share_the_vector_in_order():
    vector = torch.arange(NUM_VALUES, dtype=torch.float32)
    pieces = cut(vector)
    assert [tuple(piece.shape) for piece in pieces] == list(SHAPES)
    assert torch.equal(torch.cat([piece.reshape(-1) for piece in pieces]), vector)
    pieces[1].fill_(-1.0)
    assert (vector == -1.0).sum() == 7


def test_a_part_of_a_vector_is_cut_from_its_own_start():
    vector = torch.arange(NUM_VALUES + 4, dtype=torch.float32)
    pieces = cut(vector[4:])
    assert torch.equal(end_to_end(pieces), vector[4:])


@pytest.mark.parametrize("chosen", [slice(None), slice(1, 4), slice(4, 5)])
def test_cut_tensors_are_joined_without_a_copy(chosen):
    pieces = cut(torch.randn(NUM_VALUES))[chosen]
    joined = end_to_end(pieces)
    assert joined.data_ptr() == pieces[0].data_ptr()
    assert torch.equal(joined, torch.cat([piece.reshape(-1) for piece in pieces]))


@pytest.mark.parametrize("order", [[1, 0], [0, 2], [0, 0], [0, 1, 4]])
def test_what_does_not_lie_end_to_end_is_copied(order):
    pieces = cut(torch.randn(NUM_VALUES))
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
def test_a_vector_that_does_not_fit_the_layout_is_refused(vector):
    with pytest.raises(ValueError, match=f"layout of {NUM_VALUES} values"):
        FlatState(vector, LAYOUT)


def test_a_flat_state_is_a_mapping_of_tensors_in_its_vector():
    state = flat(dict(zip("ecadb", [tensors()["abcde".index(name)] for name in "ecadb"], strict=True)))
    assert state.layout == LAYOUT == layout_of(state) == layout_of(dict(state))
    assert list(state) == list(state.names) == list("abcde")
    assert len(state) == 5
    assert all(torch.equal(state[name], value) for name, value in zip("abcde", tensors(), strict=True))
    assert torch.equal(state.vector, torch.cat([value.reshape(-1) for value in tensors()]))
    state.vector.zero_()
    assert not state["e"].any()
    assert {**state, "z": state["b"]}.keys() == set("abcdez")
    with pytest.raises(KeyError):
        state["z"]
    assert flat(state) is state


def test_a_flat_state_of_nothing_has_no_values():
    assert len(flat({})) == 0
    assert flat({}).vector.shape == (0,)


def test_copies_of_a_flat_state_share_nothing():
    state = flat(dict(zip("abcde", tensors(), strict=True)))
    for twin in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        twin.vector.zero_()
        assert twin.layout == state.layout
        assert not twin["a"].any()
    assert state["a"].any()


def test_flat_states_of_other_shapes_are_not_added():
    one, other = flat({"x": torch.zeros(2, 3)}), flat({"x": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match="other shapes"):
        add_(one, other)
    with pytest.raises(ValueError, match="other shapes"):
        subtract_(one, other, ("x",))


def test_the_vector_of_all_names_is_not_copied_and_others_are_right():
    state = flat(dict(zip("abcde", tensors(), strict=True)))
    assert vector_of(state, tuple("abcde")).data_ptr() == state.vector.data_ptr()
    assert vector_of(state, ("b", "c", "d", "e")).data_ptr() == state["b"].data_ptr()
    assert torch.equal(vector_of(state, ("b", "c")), torch.cat([state["b"], state["c"].reshape(-1)]))
    assert torch.equal(vector_of(state, ("c", "b")), torch.cat([state["c"].reshape(-1), state["b"]]))


def test_flat_states_and_others_give_the_same_differences_and_sums():
    after, before = (dict(zip("abcde", tensors(seed), strict=True)) for seed in (1, 2))
    names = tuple("abcde")
    plain = subtract_(copy.deepcopy(after), before, names)
    for start in (before, flat(before)):
        change = subtract_(flat(after), start, names)
        assert all(torch.equal(change[name], plain[name]) for name in names)
        back = add_(change, start)
        assert back is change
        assert all(torch.equal(back[name], plain[name] + before[name]) for name in names)
    part = subtract_(flat(after), flat(before), ("b", "e"))
    assert list(part) == ["b", "e"]
    assert torch.equal(part["e"], plain["e"])


def test_a_difference_and_its_sum_are_written_over_what_changes():
    names = ("b", "a", "d", "e")
    before = dict(zip("abcde", tensors(), strict=True))
    after = dict(zip("abcde", tensors(seed=1), strict=True))
    expected = {name: after[name] - before[name] for name in names}
    untouched = after["c"].clone()
    change = subtract_(after, before, names)
    assert tuple(change) == names
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
