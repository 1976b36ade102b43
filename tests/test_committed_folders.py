"""Claims about folders that are committed whole: a writer killed anywhere leaves the old or the new state."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.committed_folders import MANIFEST_FILE, check_committed, committed_folder, current_folder
from models.errors import UserError
from models.files import write_json, write_text
from models.state import save_state

NAMES = ("a.txt", "b.txt", "old.txt")
STEPS = ("open", "fsync", "replace", "unlink", "rmdir", "mkdir")
KILLED = 77


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Do some work in a process that dies at its n-th call to the file system; whether it got that far."""
    child = os.fork()
    if child == 0:
        calls = 0

        def counted(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > step:
                    os._exit(KILLED)
                return original(*arguments, **options)

            return call

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == KILLED


def commit(folder: Path, number: int) -> None:
    with committed_folder(folder, NAMES, notes={"number": number}) as fresh:
        for name in ("a.txt", "b.txt") if number else ("a.txt", "old.txt"):
            write_text(fresh / name, f"{number}")


def read(folder: Path) -> tuple[int, set[str]]:
    """The one number that all files of a folder agree on, and their names."""
    found = current_folder(folder)
    notes = check_committed(found, NAMES)
    texts = {name: (found / name).read_text() for name in NAMES if (found / name).is_file()}
    assert set(texts.values()) == {str(notes["number"])}
    return notes["number"], set(texts)


@pytest.mark.parametrize("first", [True, False], ids=["first", "again"])
def test_a_writer_killed_at_any_step_leaves_the_old_whole_or_the_new_whole(
    first: bool, tmp_path: Path
) -> None:
    seen = set()
    for step in range(200):
        folder = tmp_path / f"{step}" / "weights"
        folder.parent.mkdir()
        if not first:
            commit(folder, 0)
        was_killed = killed_at(step, lambda folder=folder: commit(folder, 1))
        if not current_folder(folder).exists():
            assert first
            seen.add(None)
        else:
            number, names = read(folder)
            assert names == ({"a.txt", "b.txt"} if number else {"a.txt", "old.txt"})
            seen.add(number)
        commit(folder, 2)  # the next writer finds its way
        assert read(folder) == (2, {"a.txt", "b.txt"})
        assert os.listdir(folder.parent) == ["weights"]
        if not was_killed:
            break
    else:
        pytest.fail("the writer never came to its end")
    assert step > 10
    assert seen == ({None, 1} if first else {0, 1})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "b.txt").unlink(), "b.txt is missing"),
        (lambda folder: (folder / "b.txt").write_text("2"), "b.txt is not the file"),
        (lambda folder: (folder / "b.txt").write_text(""), "b.txt is not the file"),
        (lambda folder: (folder / "old.txt").write_text("0"), "old.txt is not in"),
        (lambda folder: (folder / MANIFEST_FILE).write_text("{"), "manifest.json.*damaged"),
        (lambda folder: (folder / MANIFEST_FILE).write_text('{"files": 3, "notes": {}}'), "damaged"),
        (lambda folder: (folder / MANIFEST_FILE).write_bytes(b"\xff\xfe"), "manifest.json.*damaged"),
        (lambda folder: write_json(folder / MANIFEST_FILE, {"files": {"../x": ""}, "notes": {}}), "damaged"),
    ],
)
def test_what_changed_since_the_commit_is_named(
    change: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    commit(tmp_path / "weights", 1)
    change(tmp_path / "weights")
    with pytest.raises(UserError, match=words):
        check_committed(tmp_path / "weights", NAMES)


def test_a_folder_without_a_manifest_is_somebody_elses_and_passes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("anything")
    assert check_committed(tmp_path, NAMES) == {}


def test_files_of_somebody_else_survive_a_commit_and_those_of_an_older_one_do_not(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    (folder / "b.txt").write_text("of an older version, without a manifest")
    commit(folder, 0)
    commit(folder, 1)
    assert (folder / "README.md").read_text() == "mine"
    assert read(folder) == (1, {"a.txt", "b.txt"})


def test_a_block_that_fails_changes_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    commit(folder, 1)

    def fail() -> None:
        with committed_folder(folder, NAMES) as fresh:
            write_text(fresh / "a.txt", "half")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        fail()
    assert read(folder)[0] == 1
    assert os.listdir(tmp_path) == ["weights"]


def test_a_file_is_on_the_disk_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, _n=name, _o=original: (calls.append(_n), _o(*a))[1])
    write_text(tmp_path / "text", "text")
    save_state({"x": torch.ones(1)}, tmp_path / "state.safetensors")
    assert calls == ["fsync", "replace"] * 2


def test_a_copy_of_a_folder_is_as_good_as_the_folder(tmp_path: Path) -> None:
    commit(tmp_path / "weights", 1)
    shutil.copytree(tmp_path / "weights", tmp_path / "copy")
    assert read(tmp_path / "copy")[0] == 1


def test_text_that_utf8_has_no_form_for_is_written_and_json_reads_it_back(tmp_path: Path) -> None:
    write_json(tmp_path / "names.json", ["caf\udce9", "é"])
    assert json.loads((tmp_path / "names.json").read_text(encoding="utf-8")) == ["caf\udce9", "é"]
