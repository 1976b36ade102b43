"""Claims about ``fedlora data check`` and ``fedlora data prepare``, made through the command line."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.command import fedlora

CLASSES = ("cat", "dog")


def make_images(folder: Path, counts: dict[str, int]) -> Path:
    for position, (name, number_of_images) in enumerate(counts.items()):
        for number in range(number_of_images):
            (folder / name).mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng([position, number, len(str(folder))])
            Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(
                folder / name / f"{number}.png"
            )
    return folder


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    return make_images(tmp_path / "flat", {"cat": 20, "dog": 10})


@pytest.fixture
def prepared(flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert fedlora(capsys, "data", "prepare", tmp_path / "made", "--from", flat)[0] == 0
    return tmp_path / "made"


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def numbers_of(output: str, name: str) -> list[int]:
    line = next(line for line in output.splitlines() if line.split()[:1] == [name])
    return [int(word) for word in line.split()[1:]]


def test_what_prepare_makes_the_check_accepts_and_counts(prepared, capsys):
    code, output, error = fedlora(capsys, "data", "check", prepared)
    assert (code, error) == (0, "")
    assert numbers_of(output, "cat") == [16, 2, 2]
    assert numbers_of(output, "dog") == [8, 1, 1]
    assert numbers_of(output, "all") == [24, 3, 3]
    assert "can be used" in output


def test_every_image_lands_in_one_split_and_the_seed_decides_in_which(flat, prepared, tmp_path, capsys):
    assert len(files_in(prepared)) == len(files_in(flat)) == 30
    for seed, name in ((0, "again"), (1, "other")):
        fedlora(capsys, "data", "prepare", tmp_path / name, "--from", flat, "--seed", seed)
    assert files_in(tmp_path / "again") == files_in(prepared)
    assert files_in(tmp_path / "other") != files_in(prepared)


def test_shares_can_be_chosen_and_val_left_out(flat, tmp_path, capsys):
    options = ("--train", 0.5, "--val", 0, "--test", 0.5)
    code, output, _ = fedlora(capsys, "data", "prepare", tmp_path / "made", "--from", flat, *options)
    assert code == 0
    assert numbers_of(output, "all") == [15, 15]
    assert not (tmp_path / "made" / "val").exists()


def test_link_makes_hard_links(flat, tmp_path, capsys):
    assert fedlora(capsys, "data", "prepare", tmp_path / "made", "--from", flat, "--link")[0] == 0
    assert all(os.stat(tmp_path / "made" / name).st_nlink == 2 for name in files_in(tmp_path / "made"))


def test_classes_give_empty_folders_that_the_check_finds_wanting(tmp_path, capsys):
    code, output, _ = fedlora(capsys, "data", "prepare", tmp_path / "made", "--classes", "cat, dog")
    assert code == 0
    assert numbers_of(output, "dog") == [0, 0, 0]
    for split in ("train", "val", "test"):
        assert [path.name for path in sorted((tmp_path / "made" / split).iterdir())] == list(CLASSES)
    code, _, error = fedlora(capsys, "data", "check", tmp_path / "made")
    assert code == 2
    assert "train/cat has no images" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give either --classes"),
        (("--classes", "a,b", "--from", "{flat}"), "give either --classes"),
        (("--classes", "a,../b"), "plain folder names"),
        (("--from", "{flat}", "--train", 0.9, "--val", 0.2), "sum to 1"),
        (("--from", "{flat}/none"), "no folder"),
        (("--from", "{flat}/cat"), "no class folders"),
    ],
)
def test_prepare_refuses_bad_input_and_makes_nothing(options, message, flat, tmp_path, capsys):
    target = tmp_path / "made"
    filled = [str(option).format(flat=flat) for option in options]
    code, _, error = fedlora(capsys, "data", "prepare", target, *filled)
    assert code == 2
    assert message in error
    assert not target.exists()


def test_prepare_never_overwrites(flat, prepared, capsys):
    before = {name: (prepared / name).read_bytes() for name in files_in(prepared)}
    code, _, error = fedlora(capsys, "data", "prepare", prepared, "--from", flat)
    assert code == 2
    assert "not overwritten" in error
    assert {name: (prepared / name).read_bytes() for name in files_in(prepared)} == before


def test_check_names_every_problem_at_once(prepared, capsys):
    shutil.rmtree(prepared / "test" / "dog")
    (prepared / "validation").mkdir()
    broken = sorted((prepared / "train" / "cat").iterdir())[0]
    broken.write_bytes(b"no image")
    code, output, error = fedlora(capsys, "data", "check", prepared)
    assert code == 2
    assert "class 'dog'" in error
    assert "validation is not read" in error
    assert f"{broken} cannot be decoded" in error
    assert numbers_of(output, "cat") == [16, 2, 2]


def test_doubles_across_splits_are_shown_and_do_not_make_the_folder_unusable(prepared, capsys):
    image = sorted((prepared / "train" / "cat").iterdir())[0]
    shutil.copy(image, prepared / "test" / "cat" / "copy.png")
    Image.open(image).save(prepared / "test" / "dog" / "resaved.bmp")
    code, output, _ = fedlora(capsys, "data", "check", prepared)
    assert code == 0
    assert "In more than one split" in output
    assert f"train/cat/{image.name} = test/cat/copy.png" in output
    assert "equal pixels" in output


def test_files_that_are_no_images_are_named(prepared, capsys):
    for number in range(7):
        (prepared / "train" / "cat" / f"notes{number}.txt").write_text("x", encoding="utf-8")
    code, output, _ = fedlora(capsys, "data", "check", prepared)
    assert code == 0
    assert f"ignored: {prepared / 'train' / 'cat' / 'notes0.txt'}" in output
    assert "and 2 more" in output
    assert "notes5" not in output


def test_the_check_says_how_unlike_the_classes_sizes_are(prepared, tmp_path, capsys):
    assert "the largest class has 2 times" in fedlora(capsys, "data", "check", prepared)[1]
    even = make_images(tmp_path / "even", {"cat": 10, "dog": 10})
    assert fedlora(capsys, "data", "prepare", tmp_path / "equal", "--from", even)[0] == 0
    assert "the same number" in fedlora(capsys, "data", "check", tmp_path / "equal")[1]


@pytest.mark.parametrize("place", ["", "run"])
def test_a_folder_of_runs_is_named_as_such(place, tmp_path, capsys):
    (tmp_path / "run" / "plots").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    status, _, error = fedlora(capsys, "data", "check", tmp_path / place)
    assert status == 2
    assert "holds runs and no data" in error


def test_a_folder_of_another_kind_is_refused(flat, tmp_path, capsys):
    code, _, error = fedlora(capsys, "data", "check", flat)
    assert code == 2
    assert "test are missing" in error
    code, _, error = fedlora(capsys, "data", "check", tmp_path / "none")
    assert code == 2
    assert "is no folder" in error


@pytest.mark.parametrize("command", ["check", "prepare"])
def test_help_shows_an_example(command, capsys):
    code, output, _ = fedlora(capsys, "data", command, "--help")
    assert code == 0
    assert f"Example: fedlora data {command}" in output
