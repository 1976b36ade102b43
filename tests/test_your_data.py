"""The page "Your data" as it stands, and the check of every kind of data."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as Picture

from federated.data.dataset import load_data
from federated.data.folders import completed_shares, prepare_folder
from federated.data.names import names_in
from models.errors import UserError
from tests.command import fedlora

PAGE = Path(__file__).parents[1] / "docs" / "your_data.md"
SECTIONS = re.split(r"(?m)^## ", PAGE.read_text(encoding="utf-8"))
FEATURES = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})


def rows(number: int, start: int = 0) -> Dataset:
    pixels = np.random.default_rng(start).integers(0, 256, (number, 8, 8, 3), "uint8")
    return Dataset.from_dict({"image": list(pixels), "label": np.arange(number) % 2}, features=FEATURES)


@pytest.mark.parametrize("section", SECTIONS[1:], ids=lambda section: section.partition("\n")[0])
def test_every_example_of_the_page_runs_as_it_stands(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = []
    for language, code in re.findall(r"```(python|bash)\n(.*?)```", SECTIONS[0] + section, re.DOTALL):
        if language == "python":
            exec(code, {})
        elif not code.startswith("fedlora"):
            subprocess.run(["bash", "-euc", code], check=True)
        else:
            for line in code.splitlines():
                status, _, errors = fedlora(capsys, *shlex.split(line)[1:])
                assert status == 0, errors
                ran.append(line.split()[1])
    assert ran == ["data", "run"]
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["final"] > 0


@pytest.mark.parametrize("form", ["parquet", "saved rows", "saved splits"])
def test_a_data_set_in_the_hub_s_format_is_checked_row_by_row(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    if form == "parquet":
        folder.mkdir()
        rows(10).to_parquet(folder / "train-00000-of-00001.parquet")
    elif form == "saved rows":
        rows(10).save_to_disk(folder)
    else:
        DatasetDict(train=rows(8), test=rows(2, start=1)).save_to_disk(folder)
    status, output, _ = fedlora(capsys, "data", "check", folder)
    assert status == 0
    counts = {line.split("  ")[0]: [int(n) for n in re.findall(r"\d+", line)] for line in output.splitlines()}
    assert counts["rows"] == [8, 2]
    assert sum(counts["class a"] + counts["class b"]) == 10
    assert "can be used" in output


def test_the_check_names_the_rows_of_a_hub_set_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set").mkdir()
    columns = {"image": [Picture.new("RGB", (8, 8)), {"bytes": b"none", "path": None}], "label": [0, 1]}
    broken = Dataset.from_dict(columns, features=FEATURES)
    broken.to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    rows(4).to_parquet(tmp_path / "set" / "test-00000-of-00001.parquet")
    status, _, errors = fedlora(capsys, "data", "check", tmp_path / "set")
    assert status == 2
    assert "train row 1 (" in errors


def test_an_image_that_is_in_two_splits_of_a_hub_set_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DatasetDict(train=rows(6), test=rows(2)).save_to_disk(tmp_path / "set")
    _, output, _ = fedlora(capsys, "data", "check", tmp_path / "set")
    assert "in more than one split" in output
    with_same = [f"train row {n} = test row {n}" for n in (0, 1) if (rows(6)[n] == rows(2)[n])]
    assert all(named in output for named in with_same)


def test_options_of_a_table_are_given_as_a_run_takes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(10):
        Picture.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    table = tmp_path / "all.tsv"
    table.write_text("File\tKind\n" + "".join(f"{n}.png\t{n % 2}\n" for n in range(10)), encoding="utf-8")
    status, _, errors = fedlora(capsys, "data", "check", table)
    assert status == 2
    assert "data.options.image_column=File" in errors
    given = ("data.options.image_column=File", "data.options.label_column=Kind")
    assert fedlora(capsys, "data", "check", table, *given)[0] == 0
    status, _, errors = fedlora(capsys, "data", "check", table, "image_column")
    assert status == 2
    assert "write data.options.KEY=VALUE" in errors


def images(folder: Path, *places: str) -> None:
    for number, place in enumerate(places):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        Picture.new("RGB", (8, 8), (number, 0, 0)).save(folder / place)


def test_a_folder_above_the_splits_is_answered_with_the_one_that_has_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images(tmp_path, *(f"zip/data/{split}/{name}/0.png" for split in ("train", "test") for name in "ab"))
    status, _, errors = fedlora(capsys, "data", "check", tmp_path)
    assert status == 2
    assert f"or give {tmp_path / 'zip' / 'data'}, which has train/ and test/" in errors
    assert fedlora(capsys, "data", "check", tmp_path / "zip" / "data")[0] == 0


def test_class_folders_further_down_are_named_with_the_command_that_splits_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images(tmp_path, *(f"zip/all/{name}/{number}.png" for name in "ab" for number in range(6)))
    status, _, errors = fedlora(capsys, "data", "check", tmp_path)
    assert status == 2
    assert f"data prepare TARGET --from {tmp_path / 'zip' / 'all'}" in errors


def test_images_below_a_class_folder_are_read_at_any_depth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images(tmp_path, *(f"{split}/{name}/0.png" for split in ("train", "test") for name in "ab"))
    images(tmp_path, "train/a/2021/may/1.png", "train/a/2021/2.png", "train/a/.thumbs/3.png")
    status, printed, _ = fedlora(capsys, "data", "check", tmp_path, "--json")
    assert status == 0
    assert json.loads(printed)["counts"]["train"] == {"a": 3, "b": 1}
    data = load_data("imagefolder", path=str(tmp_path))
    assert data.train["label"] == [0, 0, 0, 1]


def test_a_corrupt_image_is_refused_with_the_option_that_leaves_it_out_and_is_left_out_by_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images(tmp_path, *(f"{split}/{name}/0.png" for split in ("train", "test") for name in "ab"))
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"no image")
    status, _, errors = fedlora(capsys, "data", "check", tmp_path)
    assert status == 2
    assert "1.png cannot be decoded" in errors
    assert "data.options.skip_corrupt=true" in errors
    skipping = ("data", "check", tmp_path, "data.options.skip_corrupt=true")
    status, printed, _ = fedlora(capsys, *skipping, "--json")
    assert status == 0
    assert json.loads(printed)["counts"]["train"] == {"a": 1, "b": 1}
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"no image")
    status, _, errors = fedlora(capsys, *skipping)
    assert status == 2
    assert f"class folder {tmp_path / 'train' / 'a'} has no image that can be decoded" in errors


def test_preparation_keeps_the_folders_below_a_class(tmp_path: Path) -> None:
    images(tmp_path / "flat", *(f"{name}/{year}/0.png" for name in "ab" for year in (2020, 2021)))
    prepare_folder(tmp_path / "made", source=tmp_path / "flat", ratios=(0.5, 0.0, 0.5))
    made = sorted(path.relative_to(tmp_path / "made") for path in (tmp_path / "made").rglob("*.png"))
    assert sorted(str(Path(*path.parts[1:])) for path in made) == [
        "a/2020/0.png", "a/2021/0.png", "b/2020/0.png", "b/2021/0.png",
    ]  # fmt: skip


def test_shares_that_are_not_given_divide_the_rest() -> None:
    assert completed_shares(None, None, None) == pytest.approx((0.8, 0.1, 0.1))
    assert completed_shares(0.7, None, None) == pytest.approx((0.7, 0.15, 0.15))
    assert completed_shares(None, 0.0, None) == pytest.approx((8 / 9, 0, 1 / 9))
    assert completed_shares(None, 0.2, 0.2) == pytest.approx((0.6, 0.2, 0.2))
    assert completed_shares(0.5, 0.3, 0.2) == (0.5, 0.3, 0.2)


def test_one_share_is_enough_for_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(tmp_path / "flat", *(f"{name}/{number}.png" for name in "ab" for number in range(10)))
    made = tmp_path / "made"
    assert fedlora(capsys, "data", "prepare", made, "--from", tmp_path / "flat", "--train", 0.6)[0] == 0
    assert [len(list((made / split / "a").iterdir())) for split in ("train", "val", "test")] == [6, 2, 2]


def test_names_may_hold_commas_in_quotes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert names_in('cat, "boots, black" ,dog') == ["cat", "boots, black", "dog"]
    assert names_in("a,b") == ["a", "b"]
    with pytest.raises(UserError, match="no list of names"):
        names_in('"a,b')
    status, output, _ = fedlora(
        capsys, "data", "prepare", tmp_path / "made", "--classes", '"boots, black",bag'
    )
    assert status == 0
    assert {path.name for path in (tmp_path / "made" / "train").iterdir()} == {"boots, black", "bag"}


def test_predict_takes_class_names_with_commas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(tmp_path, "0.png")
    classes = '"boots, black",bag'
    arguments = ("predict", "tiny", tmp_path / "0.png", "--classes", classes, "--format", "json")
    status, output, _ = fedlora(capsys, *arguments)
    assert status == 0
    assert "boots, black" in output
