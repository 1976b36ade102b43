"""Every file, row, label and caption of a data set is used, or reported with file and row."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PilImage

from federated.data.dataset import image_tensors, load_data
from federated.data.folders import prepare_folder
from federated.data.sources.folder_scan import scan_folder
from federated.data.sources.form import row_groups
from models.errors import UserError
from tests.command import fedlora
from tests.test_data_tables import pictures, write_csv, write_hub_folder, write_images


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub_cache")


def write_folder(root: Path, classes=("cat", "dog")) -> Path:
    for split in ("train", "test"):
        for name in classes:
            write_images(root / split / name, 2)
    return root


# csv: rows and files


def test_blanks_and_forms_of_letters_do_not_make_a_class(tmp_path):
    write_images(tmp_path, 6)
    labels = ["cat", "cat ", " cat", "caf\u00e9", "cafe\u0301", "caf\u00e9\u00a0"]
    lines = [f"{number}.png,{label},train" for number, label in enumerate(labels)]
    path = write_csv(tmp_path / "all.csv", "image,label ,split", [*lines, "0.png,cat,test"])
    data = load_data("csv", path=path)
    assert data.class_names == ("caf\u00e9", "cat")
    assert data.labels().tolist() == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(("column", "line"), [("label", "1.png,,a dog"), ("caption", '1.png,dog,"  "')])
def test_an_empty_field_is_named_by_line_or_its_row_left_out(column, line, tmp_path, caplog):
    write_images(tmp_path, 3)
    for split in ("train", "test"):
        write_csv(tmp_path / f"{split}.csv", "image,label,caption", ["0.png,cat,a cat", "2.png,dog,a dog"])
    path = tmp_path / "train.csv"
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"train\.csv line 4 has no {column}.*skip_incomplete=true"):
        load_data("csv", path=str(tmp_path))
    data = load_data("csv", path=str(tmp_path), skip_incomplete=True)
    assert (len(data.train), data.num_skipped) == (2, 1)
    assert "line 4" in caplog.text
    assert len(load_data("csv", path=str(tmp_path), **{f"{column}_column": None}).train) == 3


@pytest.mark.parametrize(
    "extra",
    [
        "training.csv",
        "train-00001.csv",
        "TRAIN.CSV",
        "train.tsv",
        "test_2.csv",
        "val.part.csv",
        "train.csv.gz",
    ],
)
def test_a_second_file_of_a_split_is_an_error_that_names_it(extra, tmp_path):
    write_images(tmp_path, 3)
    for name in ("train.csv", "test.csv", extra):
        write_csv(tmp_path / name, "image,label", ["0.png,cat", "1.png,dog"])
    with pytest.raises(UserError, match=extra):
        load_data("csv", path=str(tmp_path))


def test_a_table_of_no_split_is_named_and_left_alone(tmp_path, caplog):
    write_images(tmp_path, 3)
    for name in ("train", "test", "licences"):
        write_csv(tmp_path / f"{name}.csv", "image,label", ["0.png,cat", "1.png,dog"])
    (tmp_path / "site b").mkdir()
    write_csv(tmp_path / "site b" / "train.csv", "image,label", ["../0.png,cat"])
    assert len(load_data("csv", path=str(tmp_path)).train) == 2
    assert "licences.csv" in caplog.text
    assert "site b/train.csv" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,label,label\n0.png,cat,a\n", "two columns 'label'"),
        (
            "image,Label,caption\n0.png,cat,a cat\n",
            "has 'Label', not 'label': set data.options.label_column=Label",
        ),
        ('image,label\n0.png,"cat\n1.png,dog\n', "line 3: no csv"),
        ("", "no header"),
        ("image,label\n0.png,cat\x00\n", "line 2: holds a NUL"),
        ("image,label\n0.png,c\x1bat\n", "control characters"),
        (f"image,label\n{'x' * 300}.png,cat\n", "line 2"),
        ("image,label\n,cat\n", "line 2 has no image"),
        ("image,label,split\n0.png,cat,\n", "line 2: no split ''"),
        (
            "image,label,Split\n0.png,cat,train\n1.png,cat,test\n",
            "has 'Split', not 'split': set data.options.split_column=Split.* null does without",
        ),
        ("image,label\n0.png,cat\n1.png,cat\u200b\n", "differ in blanks, in invisible characters"),
    ],
)
def test_a_table_that_would_be_misread_is_refused_with_its_line(content, message, tmp_path):
    write_images(tmp_path, 2)
    path = tmp_path / "all.csv"
    path.write_bytes(content.encode())
    with pytest.raises(UserError, match=message) as refusal:
        load_data("csv", path=str(path))
    assert "all.csv" in str(refusal.value)


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    path = tmp_path / "all.csv"
    path.write_bytes(b"image,label\n0.png,cat\n1.png,\xed\xa0\x80\n")
    with pytest.raises(UserError, match=r"all\.csv is no UTF-8 csv file .*in line 3"):
        load_data("csv", path=str(path))


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_of_a_csv_is_found_out_and_the_one_asked_for_is_taken(separator, tmp_path):
    write_images(tmp_path, 2)
    name = '"a, b; c"'
    rows = [separator.join(row) for row in (["0.png", name, "train"], ["1.png", name, "test"])]
    path = write_csv(tmp_path / "all.csv", separator.join(["image", "label", "split"]), rows)
    assert load_data("csv", path=path).class_names == ("a, b; c",)
    assert load_data("csv", path=path, separator=separator).class_names == ("a, b; c",)


def test_a_separator_inside_the_fields_is_not_taken_for_the_one_of_the_file(tmp_path):
    write_images(tmp_path, 2)
    path = write_csv(
        tmp_path / "all.csv", "image;caption;a,b", ["0.png;red, green, blue;1", "1.png;no comma;2"]
    )
    assert set(load_data("csv", path=path, test_fraction=0.5).train.column_names) >= {"image", "caption"}


def test_a_quote_that_is_not_closed_in_a_long_file_is_an_error_that_names_the_file(tmp_path):
    path = write_csv(tmp_path / "all.csv", "image,label", ['a.png,"open', *30_000 * ["b.png,c"]])
    with pytest.raises(UserError, match=r"all\.csv: no csv"):
        load_data("csv", path=path)


def test_missing_images_are_left_out_under_skip_corrupt_and_counted(tmp_path, caplog):
    write_images(tmp_path, 2)
    rows = ["0.png,a,train", "7.png,a,train", "1.png,a,test"]
    path = write_csv(tmp_path / "all.csv", "image,label,split", rows)
    with pytest.raises(UserError, match=r"line 3: .*7\.png.*skip_corrupt=true"):
        load_data("csv", path=path)
    data = load_data("csv", path=path, skip_corrupt=True)
    assert (len(data.train), len(data.test), data.num_skipped) == (1, 1, 1)
    assert "7.png" in caplog.text


def test_images_that_are_all_missing_are_an_error_whatever_may_be_skipped(tmp_path):
    path = write_csv(tmp_path / "all.csv", "image,label", ["0.png,a", "1.png,a"])
    with pytest.raises(UserError, match="2 images do not exist.*set image_root"):
        load_data("csv", path=path, skip_corrupt=True)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("Image,Label", "set data.options.image_column=Image data.options.label_column=Label, or rename"),
        ("file,label", r"has no column 'image'; it has file, label: set data\.options\.image_column=file"),
        ("image,kind", r"set data\.options\.label_column to the column of class names"),
    ],
)
def test_the_message_about_a_column_is_the_option_to_set(header, said, tmp_path):
    write_images(tmp_path, 1)
    path = write_csv(tmp_path / "all.csv", header, ["0.png,a"])
    with pytest.raises(UserError, match=said):
        load_data("csv", path=path)


@pytest.mark.parametrize(
    ("header", "lines", "message"),
    [
        ("image,caption", ["0.png,a"], r"test\.csv has no column 'label'"),
        ("image,label,caption", [], "test split has a header and no rows"),
        ("image,label,caption,split", ["0.png,a,b,train"], r"test\.csv line 2: .*says train"),
    ],
)
def test_a_test_table_that_does_not_go_with_the_training_table_is_named(header, lines, message, tmp_path):
    write_images(tmp_path, 2)
    write_csv(tmp_path / "train.csv", "image,label,caption", ["0.png,a,one", "1.png,b,two"])
    write_csv(tmp_path / "test.csv", header, lines)
    with pytest.raises(UserError, match=message):
        load_data("csv", path=str(tmp_path))


# csv: images outside the folder


@pytest.mark.parametrize("way", ["up", "absolute", "link", "folder link"])
def test_rows_that_leave_their_folder_are_refused_unless_asked_for(way, tmp_path):
    write_images(tmp_path / "elsewhere", 2)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    (folder / "inner").symlink_to(tmp_path / "elsewhere")
    image = {
        "up": "../elsewhere/0.png",
        "absolute": str(tmp_path / "elsewhere" / "0.png"),
        "link": "link.png",
        "folder link": "inner/0.png",
    }[way]
    path = write_csv(folder / "all.csv", "image,label,split", [f"{image},a,train", f"{image},a,test"])
    with pytest.raises(UserError, match="line 2.*allow_outside=true"):
        load_data("csv", path=path)
    assert len(load_data("csv", path=path, allow_outside=True).train) == 1
    (tmp_path / "way").symlink_to(folder)
    write_images(folder, 1)
    write_csv(folder / "all.csv", "image,label,split", ["0.png,a,train", "0.png,a,test"])
    assert len(load_data("csv", path=str(tmp_path / "way" / "all.csv")).train) == 1  # a link on the way to it


# image folders


def spoil_nested(root: Path) -> None:
    (root / "train" / "cat" / "more").symlink_to(root / "train" / "cat")


def spoil_loose(root: Path) -> None:
    write_images(root / "train", 1)


def spoil_dangling(root: Path) -> None:
    (root / "train" / "cat" / "gone.png").symlink_to(root / "nowhere.png")


def spoil_outside(root: Path) -> None:
    write_images(root.parent / "elsewhere", 1)
    (root / "train" / "cat" / "far.png").symlink_to(root.parent / "elsewhere" / "0.png")


def spoil_outside_class(root: Path) -> None:
    write_images(root.parent / "elsewhere", 1)
    for split in ("train", "test"):
        (root / split / "far").symlink_to(root.parent / "elsewhere")


def spoil_alike(root: Path) -> None:
    for split in ("train", "test"):
        write_images(root / split / "cat ", 1)


def spoil_form(root: Path) -> None:
    write_images(root / "train" / "caf\u00e9", 1)
    write_images(root / "test" / "cafe\u0301", 1)


def spoil_case(root: Path) -> None:
    write_images(root / "Train" / "cat", 1)


def spoil_part(root: Path) -> None:
    write_images(root / "train-2" / "cat", 1)


def spoil_bytes(root: Path) -> None:
    target = os.fsencode(root / "train" / "cat") + b"/caf\xe9.png"
    Path(os.fsdecode(target)).write_bytes((root / "train" / "cat" / "0.png").read_bytes())


def spoil_class_bytes(root: Path) -> None:
    for split in ("train", "test"):
        write_images(Path(os.fsdecode(os.fsencode(root / split) + b"/caf\xe9")), 1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_nested, "more is a link to a folder; put the images themselves into .*cat"),
        (spoil_loose, r"1 images in .*train are in no class folder \(0\.png\)"),
        (spoil_dangling, r"gone\.png is a link to .*nowhere\.png, which does not exist"),
        (spoil_outside, r"far\.png is a link that leaves .*allow_outside=true"),
        (spoil_outside_class, "far is a link that leaves .*allow_outside=true"),
        (
            spoil_form,
            r"class 'caf\\xe9' of .*train is written .*u0301. in .*test: they differ .*; give it one name",
        ),
        (spoil_alike, "class folders 'cat', 'cat ' in .* differ in blanks"),
        (spoil_case, "Train is not read; rename it to .*train"),
        (spoil_part, "train-2 is not read"),
        (spoil_bytes, r"caf\\udce9\.png' is not UTF-8; rename the file"),
        (spoil_class_bytes, r"caf\\udce9' is not UTF-8; rename it"),
    ],
)
def test_images_that_would_not_be_read_are_a_problem_of_check_and_source(spoil, message, tmp_path):
    root = write_folder(tmp_path / "set")
    assert scan_folder(root).problems == ()
    spoil(root)
    with pytest.raises(UserError, match=message) as refusal:
        load_data("imagefolder", path=str(root))
    assert str(refusal.value).encode()  # printable anywhere
    assert any(problem in str(refusal.value) for problem in scan_folder(root).problems)


@pytest.mark.parametrize("spoil", [spoil_outside, spoil_outside_class])
def test_links_that_leave_an_image_folder_are_followed_when_asked_for(spoil, tmp_path):
    root = write_folder(tmp_path / "set")
    spoil(root)
    assert len(load_data("imagefolder", path=str(root), allow_outside=True).train) == 5


def test_files_that_are_not_read_are_named(tmp_path, caplog):
    root = write_folder(tmp_path / "set")
    (root / "train" / "cat" / "notes.txt").write_text("x", encoding="utf-8")
    write_images(root / "originals" / "cat", 1)
    load_data("imagefolder", path=str(root))
    assert "notes.txt" in caplog.text
    assert "originals" in caplog.text


# data prepare


@pytest.mark.parametrize("place", ["made", "made/train", "made/test/cat"])
def test_preparation_does_not_write_through_links(place, tmp_path):
    for name in ("cat", "dog"):
        write_images(tmp_path / "flat" / name, 4)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).symlink_to(tmp_path / "elsewhere")
    for arguments in ({"source": tmp_path / "flat"}, {"class_names": ["cat", "dog"]}):
        with pytest.raises(UserError, match="is a link to .*elsewhere.*--allow-outside"):
            prepare_folder(tmp_path / "made", ratios=(0.5, 0.0, 0.5), **arguments)
    assert not any((tmp_path / "elsewhere").iterdir())
    prepare_folder(tmp_path / "made", source=tmp_path / "flat", ratios=(0.5, 0.0, 0.5), allow_outside=True)
    assert any((tmp_path / "elsewhere").iterdir())


def test_preparation_refuses_a_source_with_images_it_would_not_take(tmp_path):
    write_images(tmp_path / "flat", 3)
    write_images(tmp_path / "flat" / "cat", 4)
    with pytest.raises(UserError, match="3 images in .*flat are in no class folder"):
        prepare_folder(tmp_path / "made", source=tmp_path / "flat", ratios=(0.5, 0.0, 0.5))


@pytest.mark.parametrize("name", ["x" * 300, "c\x00t", "\udce9", "c\x1bt"])
def test_class_names_that_make_no_folder_are_refused_and_leave_nothing(name, tmp_path):
    with pytest.raises(UserError, match="class name"):
        prepare_folder(tmp_path / "made", class_names=["cat", name])
    assert not (tmp_path / "made").exists()


def test_hard_links_of_links_hold_the_picture(tmp_path):
    write_images(tmp_path / "flat" / "cat", 4)
    os.symlink("0.png", tmp_path / "flat" / "cat" / "9.png")
    prepare_folder(tmp_path / "made", source=tmp_path / "flat", ratios=(0.5, 0.0, 0.5), link=True)
    assert all(file.exists() for file in (tmp_path / "made").rglob("*.png"))


# hub


def test_splits_that_number_the_classes_differently_are_mapped_by_name(tmp_path):
    for split, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        features = Features({"image": Image(), "label": ClassLabel(names=names)})
        labels = [names.index(name) for name in ("cat", "cat", "dog")]
        rows = Dataset.from_dict({"image": pictures(3), "label": labels}, features=features)
        (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet")
    data = load_data("hub", path=str(tmp_path / "set"))
    assert data.labels("train").tolist() == data.labels("test").tolist() == [0, 0, 1]
    assert data.class_names == ("cat", "dog")


def test_corrupt_images_of_a_hub_set_are_left_out_when_asked_for_and_named(tmp_path, caplog):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    good = pictures(3)
    columns = {"image": [*good, {"bytes": b"no image", "path": None}], "label": [0, 1, 0, 1]}
    whole = {"image": good, "label": [0, 1, 0]}
    path = write_hub_folder(tmp_path / "set", features, {"train": columns, "test": whole})
    data = load_data("hub", path=path, skip_corrupt=True)
    assert (len(data.train), len(data.test), data.num_skipped) == (3, 3, 1)
    assert "split train: left out row 3" in caplog.text
    with pytest.raises(UserError, match=r"\(row 3\) cannot be decoded.*data\.options\.skip_corrupt=true"):
        image_tensors(load_data("hub", path=path), "train", lambda image: torch.zeros(3, 8, 8)).pixel_values(
            [3]
        )


@pytest.mark.parametrize(
    ("column", "kind", "values"),
    [
        ("label", Value("string"), ["a", "b", None]),
        ("label", Value("string"), ["a", "b", " "]),
        ("label", Value("int64"), [3, 10, None]),
        ("label", ClassLabel(names=["a", "b"]), [0, 1, None]),
        ("text", Value("string"), ["a", "b", ""]),
        ("image", Image(), [*pictures(2), None]),
    ],
)
def test_a_missing_value_of_a_hub_set_is_named_by_row_or_left_out(column, kind, values, tmp_path):
    features = {"image": Image(), "label": ClassLabel(names=["a", "b"]), "text": Value("string")}
    columns = {"image": pictures(3), "label": [0, 1, 0], "text": ["x", "y", "z"]}
    features[column], columns[column] = kind, values
    whole = {name: values[:2] for name, values in columns.items()}
    path = write_hub_folder(tmp_path / "set", Features(features), {"train": columns, "test": whole})
    options = {"label_column": "label", "caption_column": "text"}
    with pytest.raises(UserError, match=f"split train: 1 rows are not complete .row 2 has no {column}"):
        load_data("hub", path=path, **options)
    data = load_data("hub", path=path, skip_incomplete=True, **options)
    assert (len(data.train), len(data.class_names or ()), data.num_skipped) == (2, 2, 1)


def test_a_column_of_lists_is_refused(tmp_path):
    features = Features({"image": Image(), "text": [Value("string")]})
    columns = {"image": pictures(2), "text": [["a", "b"], ["c"]]}
    path = write_hub_folder(tmp_path / "set", features, {"train": columns, "test": columns})
    with pytest.raises(UserError, match="'text' holds a list"):
        load_data("hub", path=path, caption_column="text")


@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_that_save_to_disk_wrote_is_read(whole, tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    rows = Dataset.from_dict({"image": pictures(6), "label": [0, 1] * 3}, features=features)
    (DatasetDict(train=rows, test=rows) if whole else rows).save_to_disk(tmp_path / "saved")
    data = load_data("hub", path=str(tmp_path / "saved"))
    assert data.class_names == ("a", "b")
    assert len(data.train) == (6 if whole else 5)


def test_splits_of_a_hub_set_that_are_not_read_are_named(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    columns = {"image": pictures(4), "label": [0, 1, 0, 1]}
    path = write_hub_folder(tmp_path / "set", features, dict.fromkeys(("train", "test", "extra"), columns))
    load_data("hub", path=path)
    assert "not read: extra" in caplog.text
    both = dict.fromkeys(("train", "val", "valid"), columns)
    with pytest.raises(UserError, match="are both the validation split"):
        load_data("hub", path=write_hub_folder(tmp_path / "two", features, both))


# groups


def test_rows_that_a_concept_or_a_picture_links_are_one_group():
    random = np.random.default_rng(0)
    for _ in range(20):
        concepts, numbers = random.integers(0, 12, 20), random.integers(0, 12, 20)
        rows = Dataset.from_dict({"concept": concepts, "picture": [f"p{n}" for n in numbers]})
        groups = row_groups(rows, "concept", "picture")
        naive = list(range(20))  # merge pair by pair until nothing changes
        for _ in range(20):
            for i in range(20):
                for j in range(20):
                    if concepts[i] == concepts[j] or numbers[i] == numbers[j]:
                        naive[i] = naive[j] = min(naive[i], naive[j])
        assert all((groups[i] == groups[j]) == (naive[i] == naive[j]) for i in range(20) for j in range(20))


def test_copies_of_a_picture_file_are_one_picture(tmp_path):
    write_images(tmp_path, 3)
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    lines = ["0.png,a,train", "./0.png,b,train", "copy.png,c,train", "1.png,d,train", "2.png,e,test"]
    data = load_data("csv", path=write_csv(tmp_path / "all.csv", "image,caption,split", lines))
    first, again, copy, other = data.train["picture"][:]
    assert first == again == copy != other


def test_images_of_equal_bytes_are_one_picture():
    with PilImage.new("L", (1, 1)) as one, PilImage.new("L", (1, 1)) as two:
        from federated.data.pictures import with_pictures

        rows = Dataset.from_dict({"image": [one, two]}, features=Features({"image": Image()}))
        assert with_pictures(rows, "image")["picture"][:] == [0, 0]


# captions that are cut, and the check of a table

LONG = "a picture taken on a plain table in a bright room on an early morning of may with a new camera " * 2


def test_captions_that_are_cut_are_counted_and_named(caplog):
    from models.clip_loading import load_clip
    from models.prompts import warn_of_cut

    tokenize = load_clip("tiny").tokenize
    limit = tokenize.context_length
    fits = " ".join(["dog"] * (limit - 2))  # with the tokens before and behind: exactly what the tower reads
    warn_of_cut(tokenize, ["short", fits], "captions")
    assert caplog.text == ""
    warn_of_cut(
        tokenize, ["short", fits, f"{fits} cat", f"{fits} dog", f"{fits} cat", f"cat {fits}"], "captions"
    )
    assert f"3 of 5 captions are longer than the {limit} tokens" in caplog.text
    assert "1 of them become equal to another" in caplog.text


@pytest.mark.parametrize("folder", [True, False])
def test_the_check_reads_tables_and_names_captions_that_are_cut(folder, tmp_path, capsys, caplog):
    write_images(tmp_path, 3)
    PilImage.new("RGB", (4, 4), "red").save(tmp_path / "blank.png")
    lines = [f"{n}.png,{LONG} and it shows {n}" for n in (0, 1)] + ["blank.png,nothing", "blank.png,no more"]
    if folder:
        write_csv(tmp_path / "train.csv", "image,caption", lines)
        write_csv(tmp_path / "test.csv", "image,caption", ["2.png,two"])
    else:
        rows = [*(f"{line},train" for line in lines), "2.png,two,test"]
        write_csv(tmp_path / "all.csv", "image,caption,split", rows)
    path = tmp_path if folder else tmp_path / "all.csv"
    code, out, _ = fedlora(capsys, "data", "check", path)
    assert code == 0
    assert [line.split() for line in out.splitlines() if line.startswith(("rows", "pictures"))] == [
        ["rows", "4", "1"],
        ["pictures", "3", "1"],
    ]
    assert "1 images are of one colour" in out
    assert "2 of 5 captions are longer" in caplog.text
    (tmp_path / "0.png").write_bytes(b"no image")
    code, _, error = fedlora(capsys, "data", "check", path)
    assert code == 2
    assert "0.png" in error
