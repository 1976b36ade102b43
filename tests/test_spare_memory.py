"""Weights that a run never reads lie in a file: the same values, the same results, no room in memory."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import nn

from federated.config.config_files import load_config
from federated.rounds.run import Run, build_run
from models.errors import UserError
from models.spare_memory import return_freed_memory

SMALL = (
    "partition.num_clients=2",
    "partition.name=iid",
    "partition.options={}",
    "data.max_train_samples=60",
    "data.max_test_samples=20",
)


def build(name: str, *overrides: str) -> Run:
    return build_run(load_config(name, [*SMALL, *overrides]))


def tower(experiment: Run, which: str) -> dict[str, nn.Parameter]:
    model = experiment.model
    clip, towers = model.clip, model.towers
    return {name: p for name, p in clip.named_parameters() if towers.tower_of(name) == which}


def resident_bytes(parameter: nn.Parameter) -> int:
    """What of the mapping that holds a parameter is in this process's memory."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, end = (int(address, 16) for address in first.split("-"))
            found = start <= parameter.data_ptr() < end
        elif found and first == "Rss:":
            return 1024 * int(rest[0])
    raise AssertionError("no such mapping")


def test_the_text_tower_of_a_classification_run_lies_in_the_file_with_its_values(tmp_path: Path):
    parked, plain = build("quickstart", f"cache.folder={tmp_path}"), build("quickstart")
    there, here = tower(parked, "text"), tower(plain, "text")
    total = sum(p.nbytes for p in here.values())
    first = next(iter(there.values()))
    assert resident_bytes(first) < total / 4  # nothing has been read yet, save what the system reads ahead
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in here)
    assert resident_bytes(first) >= total
    assert f"text tower: {total / 1e6:.1f} MB in a file" in " ".join(parked.reader.caches.notes)
    assert list(tmp_path.iterdir()) == []
    before = here[next(iter(there))].clone()
    with torch.no_grad():
        first.add_(1.0)  # a copy in memory from then on
    assert torch.equal(first, before + 1.0)


def test_local_steps_are_the_same_bit_by_bit(tmp_path: Path):
    states = []
    for overrides in ((), (f"cache.folder={tmp_path}",)):
        experiment = build("quickstart", *overrides)
        model = experiment.model
        model.start_training(experiment.training_settings, 1)
        model.train_step(next(iter(experiment.reader.train_images.batches(range(8), 8, rng=None))))
        states.append(model.get_state())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("name", ["retrieval_vi", "quickstart"])
def test_a_tower_that_is_read_stays_in_memory(tmp_path: Path, name: str):
    overrides = ("task.name=zero_shot",) if name == "quickstart" else ()
    experiment = build(name, f"cache.folder={tmp_path}", *overrides)
    assert not any(note.startswith("text tower") for note in experiment.reader.caches.notes)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"cache\.folder=.*missing has no room"):
        build("quickstart", f"cache.folder={tmp_path / 'missing'}")


class TrimmingLibrary:
    def __init__(self) -> None:
        self.calls: list[int] = []

    def malloc_trim(self, pad: int) -> int:
        self.calls.append(pad)
        return 1


def test_what_building_a_run_freed_goes_back_to_the_system(monkeypatch: pytest.MonkeyPatch):
    library = TrimmingLibrary()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    build("quickstart")
    assert library.calls == [0]


def test_a_c_library_that_cannot_trim_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    return_freed_memory()
