"""Claims about image folders: the source, the check, the preparation."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from federated.data.dataset import load_data
from federated.data.folders import check_folder, prepare_folder
from models.errors import UserError

CLASSES = ("cat", "dog", "owl")


def write_image(path, number: int, mode: str = "RGB") -> None:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


def make_folder(root, counts=(("train", 4), ("val", 2), ("test", 3)), classes=CLASSES):
    number = 0
    for split, per_class in counts:
        for name in classes:
            for position in range(per_class):
                write_image(root / split / name / f"{position}.png", number)
                number += 1
    return root


def make_flat(root, counts=(("cat", 20), ("dog", 10), ("owl", 5))):
    for number, (name, per_class) in enumerate(counts):
        for position in range(per_class):
            write_image(root / name / f"{position}.png", 100 * number + position)
    return root


def files_in(root) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_imagefolder_loads_every_image_with_its_folder_as_class(tmp_path):
    make_folder(tmp_path)
    data = load_data("imagefolder", path=str(tmp_path))
    assert data.class_names == CLASSES
    assert [len(data.split(split)) for split in ("train", "validation", "test")] == [12, 6, 9]
    for row in data.test:
        folder = os.path.basename(os.path.dirname(row["image"].filename))
        assert data.class_names[row["label"]] == folder


def test_val_is_optional_and_can_be_taken_out_of_train(tmp_path):
    make_folder(tmp_path, (("train", 10), ("test", 3)))
    assert load_data("imagefolder", path=str(tmp_path)).validation is None
    data = load_data("imagefolder", path=str(tmp_path), validation_fraction=0.2)
    assert (len(data.train), len(data.validation), len(data.test)) == (24, 6, 9)


def test_a_corrupt_image_is_named(tmp_path):
    make_folder(tmp_path)
    bad = tmp_path / "train" / "dog" / "1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(UserError, match=r"train/dog/1\.png cannot be decoded.*skip_corrupt"):
        load_data("imagefolder", path=str(tmp_path))


def test_skip_corrupt_leaves_out_logs_and_counts(tmp_path, caplog):
    make_folder(tmp_path)
    for name in ("train/dog/1.png", "test/cat/0.png"):
        (tmp_path / name).write_bytes(b"no image")
    data = load_data("imagefolder", path=str(tmp_path), skip_corrupt=True)
    assert data.num_skipped == 2
    assert (len(data.train), len(data.test)) == (11, 8)
    assert np.bincount(data.labels()).tolist() == [4, 3, 4]
    assert "train/dog/1.png" in caplog.text
    assert "test/cat/0.png" in caplog.text


def test_a_class_with_nothing_but_corrupt_images_is_an_error_even_when_skipping(tmp_path):
    make_folder(tmp_path)
    for image in (tmp_path / "val" / "owl").iterdir():
        image.write_bytes(b"")
    with pytest.raises(UserError, match="val/owl has no image that can be decoded"):
        load_data("imagefolder", path=str(tmp_path), skip_corrupt=True)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_split_is_named(tmp_path, split):
    make_folder(tmp_path)
    (tmp_path / split).rename(tmp_path.parent / f"{tmp_path.name}-{split}")
    with pytest.raises(UserError, match=f"{split} is missing"):
        load_data("imagefolder", path=str(tmp_path))


def test_the_remedy_for_a_folder_of_another_kind_is_said_once(tmp_path):
    for folder, words in ((tmp_path / "nowhere", "is no folder"), (tmp_path, "test are missing")):
        with pytest.raises(UserError, match=words) as error:
            load_data("imagefolder", path=str(folder))
        assert str(error.value).startswith("data.path: ")
        assert str(error.value).count("fedlora data prepare") == 1


def test_an_empty_class_folder_is_named(tmp_path):
    make_folder(tmp_path)
    for split in ("train", "val", "test"):
        (tmp_path / split / "bee").mkdir()
    with pytest.raises(UserError, match="train/bee has no images"):
        load_data("imagefolder", path=str(tmp_path))


def test_classes_that_differ_between_splits_are_named(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "test" / "owl").rename(tmp_path / "test" / "bee")
    with pytest.raises(UserError, match="'owl' is in .*train but not in .*test.*'bee' is in .*test"):
        load_data("imagefolder", path=str(tmp_path))


def test_a_split_folder_with_another_name_is_not_passed_over(tmp_path):
    make_folder(tmp_path, (("train", 2), ("validation", 2), ("test", 2)))
    with pytest.raises(UserError, match="validation is not read; rename it to .*val"):
        load_data("imagefolder", path=str(tmp_path))


def test_the_check_of_a_sound_folder_finds_nothing(tmp_path):
    report = check_folder(make_folder(tmp_path))
    assert report.usable
    assert not report.leaks
    assert report.counts == {
        "train": dict.fromkeys(CLASSES, 4),
        "val": dict.fromkeys(CLASSES, 2),
        "test": dict.fromkeys(CLASSES, 3),
    }
    assert report.imbalance() == 1.0


def test_the_check_lists_corrupt_files_and_other_files(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"no image")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("notes")
    (tmp_path / "train" / "cat" / ".DS_Store").write_text("")
    report = check_folder(tmp_path)
    assert [path.name for path, _ in report.corrupt] == ["0.png"]
    assert [path.name for path in report.ignored] == ["notes.txt"]
    assert not report.usable


def test_the_check_finds_leaks_by_bytes_and_by_pixels(tmp_path):
    make_folder(tmp_path)
    train = tmp_path / "train" / "cat"
    (tmp_path / "test" / "cat" / "copy.png").write_bytes((train / "0.png").read_bytes())
    with Image.open(train / "1.png") as image:
        image.save(tmp_path / "val" / "cat" / "same_pixels.bmp")
    (train / "within_train.png").write_bytes((train / "2.png").read_bytes())  # no leak
    report = check_folder(tmp_path)
    assert report.leaks
    assert [{path.name for path in group} for group in report.same_content] == [{"0.png", "copy.png"}]
    assert [{path.name for path in group} for group in report.same_pixels] == [{"1.png", "same_pixels.bmp"}]


def test_the_check_reports_what_the_source_refuses(tmp_path):
    make_folder(tmp_path, (("train", 2),))
    (tmp_path / "train" / "bee").mkdir()
    report = check_folder(tmp_path)
    with pytest.raises(UserError) as refusal:
        load_data("imagefolder", path=str(tmp_path))
    assert str(refusal.value) == "data.path: " + "; ".join(report.problems)
    assert report.imbalance() == float("inf")
    with pytest.raises(UserError, match="is no folder"):
        check_folder(tmp_path / "nowhere")


def test_a_skeleton_has_every_class_in_every_split(tmp_path):
    counts = prepare_folder(tmp_path / "new", class_names=CLASSES)
    assert sorted(path.name for path in (tmp_path / "new" / "val").iterdir()) == list(CLASSES)
    assert sum(sum(classes.values()) for classes in counts.values()) == 0
    for bad in (["a/b"], [".."], [""], ["cat", "cat"], [".hidden"], []):
        with pytest.raises(UserError, match="distinct plain folder names"):
            prepare_folder(tmp_path / "other", class_names=bad)


@pytest.mark.parametrize("link", [False, True])
def test_a_flat_folder_is_split_completely_by_the_ratios(tmp_path, link):
    source = make_flat(tmp_path / "flat")
    before = files_in(source)
    counts = prepare_folder(tmp_path / "out", source=source, ratios=(0.6, 0.2, 0.2), link=link)
    assert counts == {
        "train": {"cat": 12, "dog": 6, "owl": 3},
        "val": {"cat": 4, "dog": 2, "owl": 1},
        "test": {"cat": 4, "dog": 2, "owl": 1},
    }
    placed = [path.split(os.sep, 1)[1] for path in files_in(tmp_path / "out")]
    assert sorted(placed) == before == files_in(source)
    one = next((tmp_path / "out").rglob("*.png"))
    assert one.samefile(source / one.parent.name / one.name) == link
    assert check_folder(tmp_path / "out").usable


def test_the_seed_decides_the_split_of_a_folder(tmp_path):
    source = make_flat(tmp_path / "flat")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare_folder(tmp_path / name, source=source, seed=seed)
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b") != files_in(tmp_path / "c")


def test_copies_of_one_file_stay_in_one_split(tmp_path):
    source = make_flat(tmp_path / "flat")
    for position in range(15):
        (source / "dog" / f"copy{position}.png").write_bytes(
            (source / "dog" / f"{position % 5}.png").read_bytes()
        )
    counts = prepare_folder(tmp_path / "out", source=source, ratios=(0.5, 0.25, 0.25))
    assert sum(classes["dog"] for classes in counts.values()) == 25
    assert not check_folder(tmp_path / "out").leaks


def test_every_split_gets_an_image_of_every_class_and_val_may_be_left_out(tmp_path):
    source = make_flat(tmp_path / "flat", (("cat", 3), ("dog", 40)))
    assert prepare_folder(tmp_path / "a", source=source)["train"] == {"cat": 1, "dog": 32}
    without = prepare_folder(tmp_path / "b", source=source, ratios=(0.9, 0.0, 0.1))
    assert set(without) == {"train", "test"}
    rare = make_flat(tmp_path / "rare", (("cat", 2), ("dog", 40)))
    with pytest.raises(UserError, match="'cat' has 2 distinct images, too few for 3 splits"):
        prepare_folder(tmp_path / "c", source=rare)
    assert not (tmp_path / "c").exists()


def test_nothing_is_overwritten(tmp_path):
    source = make_flat(tmp_path / "flat")
    prepare_folder(tmp_path / "out", source=source)
    before = files_in(tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        prepare_folder(tmp_path / "out", source=source)
    assert files_in(tmp_path / "out") == before


@pytest.mark.parametrize("link", [False, True])
def test_a_full_disk_leaves_nothing_behind(tmp_path, link, monkeypatch):
    make_flat(tmp_path / "flat")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine.txt").write_text("x", encoding="utf-8")
    module, name = (os, "link") if link else (shutil, "copy2")
    place, calls = getattr(module, name), []

    def full(source, target):
        calls.append(target)
        if len(calls) == 4:
            Path(target).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return place(source, target)

    monkeypatch.setattr(module, name, full)
    for target in (tmp_path / "made", tmp_path / "new" / "deep"):
        calls.clear()
        with pytest.raises(UserError, match="No space left.*nothing is left behind"):
            prepare_folder(target, source=tmp_path / "flat", ratios=(0.5, 0.0, 0.5), link=link)
    assert [path.name for path in (tmp_path / "made").rglob("*")] == ["mine.txt"]
    assert not (tmp_path / "new").exists()


def test_wrong_arguments_of_preparation_are_named(tmp_path):
    with pytest.raises(UserError, match="either class_names"):
        prepare_folder(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        prepare_folder(tmp_path, source=tmp_path / "nowhere")
    with pytest.raises(UserError, match="no class folders"):
        prepare_folder(tmp_path / "out", source=tmp_path)
    for ratios in ((0.5, 0.1, 0.1), (1.0, 0.0, 0.0), (1.2, -0.1, -0.1)):
        with pytest.raises(UserError, match="sum to 1"):
            prepare_folder(tmp_path / "out", source=make_flat(tmp_path / "flat"), ratios=ratios)
