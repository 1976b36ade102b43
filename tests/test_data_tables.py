"""Claims about the csv and hub sources."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PilImage

from federated.data.dataset import load_data
from federated.data.splits import column_values
from models.errors import UserError


def write_images(folder, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        PilImage.fromarray(pixels).save(folder / f"{number}.png")


def write_csv(path, header: str, lines: list[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return str(path)


def test_csv_with_a_split_column_gives_labels_captions_and_domains(tmp_path):
    write_images(tmp_path / "img", 6)
    lines = [
        'img/0.png,cat,"a cat, asleep",train,paris',
        "img/1.png,dog,chó,train,hanoi",
        "img/2.png,cat,một con mèo,val,hanoi",
        "img/3.png,dog,a dog,test,paris",
    ]
    path = write_csv(tmp_path / "all.csv", "image,label,caption,split,city", lines)
    data = load_data("csv", path=path, domain_column="city")
    assert data.class_names == ("cat", "dog")
    assert data.labels().tolist() == [0, 1]
    assert data.train["caption"][:] == ["a cat, asleep", "chó"]
    assert data.validation["caption"][:] == ["một con mèo"]
    assert data.train[data.domain_column][:] == ["paris", "hanoi"]
    with PilImage.open(tmp_path / "img" / "3.png") as expected:
        assert np.array_equal(np.asarray(data.test[0]["image"]), np.asarray(expected))


def test_a_folder_of_csv_files_is_read_by_split(tmp_path):
    write_images(tmp_path / "img", 4)
    write_csv(tmp_path / "train.csv", "file,text", ["0.png,zero", "1.png,one"])
    write_csv(tmp_path / "val.csv", "file,text", ["2.png,two"])
    write_csv(tmp_path / "test.csv", "file,text", ["3.png,three"])
    options = {"image_column": "file", "caption_column": "text", "image_root": str(tmp_path / "img")}
    data = load_data("csv", path=str(tmp_path), **options)
    assert (data.label_column, data.class_names, data.caption_column) == (None, None, "caption")
    assert data.test["caption"][:] == ["three"]
    with pytest.raises(UserError, match="no labels"):
        data.labels()


def test_captions_of_one_image_stay_in_one_split(tmp_path):
    write_images(tmp_path, 30)
    lines = [f"{number}.png,caption {caption} of {number}" for number in range(30) for caption in range(5)]
    path = write_csv(tmp_path / "all.csv", "image,caption", lines)
    data = load_data("csv", path=path, validation_fraction=0.2)
    images = [set(column_values(data.split(split), "picture")) for split in ("train", "validation", "test")]
    assert sum(map(len, images)) == len(set.union(*images)) == 30
    assert sum(len(data.split(split)) for split in ("train", "validation", "test")) == 150
    assert len(data.test) == 30


def test_numbers_as_class_names_are_in_numerical_order(tmp_path):
    write_images(tmp_path, 3)
    path = write_csv(
        tmp_path / "all.csv", "image,label,split", ["0.png,10,train", "1.png,9,train", "2.png,9,test"]
    )
    data = load_data("csv", path=path)
    assert data.class_names == ("9", "10")
    assert data.labels().tolist() == [1, 0]


@pytest.mark.parametrize(
    ("header", "lines", "message"),
    [
        ("file,label", ["0.png,a"], r"all\.csv has no column 'image'; it has file, label"),
        ("image,name", ["0.png,a"], "neither 'label' nor 'caption'.*set data.options.label_column"),
        ("image,label", ["0.png,a", "9.png,b", "8.png,b"], r"2 images do not exist .*line 3: .*9\.png"),
        (
            "image,label,split",
            ["0.png,a,train", "1.png,b,test"],
            "line 3: class 'b' occurs in no training row",
        ),
        ("image,label,split", ["0.png,a,training", "1.png,a,exam"], "line 3: no split 'exam'"),
        ("image,label,split", ["0.png,a,test"], "no training rows"),
        ("image,caption", ["0.png,one, two"], "line 2: the number of fields"),
        ("image,caption", ["0.png"], "line 2: the number of fields"),
        ("image,caption", [], "no training rows"),
    ],
)
def test_what_is_wrong_with_a_csv_is_named_with_its_line(tmp_path, header, lines, message):
    write_images(tmp_path, 3)
    path = write_csv(tmp_path / "all.csv", header, lines)
    with pytest.raises(UserError, match=message):
        load_data("csv", path=path)


def test_files_that_are_no_csv_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv does not exist"):
        load_data("csv", path=str(tmp_path / "none.csv"))
    (tmp_path / "latin.csv").write_bytes("image,caption\n0.png,caf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.csv is no UTF-8"):
        load_data("csv", path=str(tmp_path / "latin.csv"))


def test_corrupt_images_of_a_csv_are_named_or_skipped(tmp_path):
    write_images(tmp_path, 10)
    (tmp_path / "4.png").write_bytes(b"no image")
    path = write_csv(
        tmp_path / "all.csv", "image,label", [f"{number}.png,{number % 2}" for number in range(10)]
    )
    with pytest.raises(UserError, match=r"4\.png cannot be decoded"):
        load_data("csv", path=path)
    data = load_data("csv", path=path, skip_corrupt=True)
    assert data.num_skipped == 1
    assert len(data.train) + len(data.test) == 9


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub_cache")


def write_hub_folder(root, features: Features, splits: dict[str, dict]) -> str:
    """A folder in the hub's format: data/<split>-00000-of-00001.parquet."""
    (root / "data").mkdir(parents=True)
    for name, columns in splits.items():
        rows = Dataset.from_dict(columns, features=features)
        rows.to_parquet(root / "data" / f"{name}-00000-of-00001.parquet")
    return str(root)


def pictures(count: int) -> list[PilImage.Image]:
    return [PilImage.new("RGB", (4, 4), (number, 0, 0)) for number in range(count)]


def test_hub_folder_of_parquet_files_is_read_with_columns_found_by_type(tmp_path):
    features = Features({"img": Image(), "fine": ClassLabel(names=["cat", "dog"]), "text": Value("string")})
    splits = {
        "train": {"img": pictures(6), "fine": [0, 1] * 3, "text": list("abcdef")},
        "test": {"img": pictures(2), "fine": [1, 0], "text": list("gh")},
    }
    path = write_hub_folder(tmp_path / "set", features, splits)
    data = load_data("hub", path=path, caption_column="text")
    assert (data.image_column, data.label_column, data.caption_column) == ("img", "fine", "text")
    assert data.class_names == ("cat", "dog")
    assert data.labels("test").tolist() == [1, 0]
    assert data.train[5]["img"].getpixel((0, 0)) == (5, 0, 0)


@pytest.mark.parametrize(
    ("kind", "labels", "names"),
    [
        ("string", ["b", "a", "b", "a", "c", "c"], ("a", "b", "c")),
        ("int64", [10, 9, 10, 9, 7, 7], ("7", "9", "10")),
    ],
)
def test_hub_labels_without_names_become_class_numbers(tmp_path, kind, labels, names):
    features = Features({"image": Image(), "kind": Value(kind)})
    splits = {
        "train": {"image": pictures(6), "kind": labels},
        "validation": {"image": pictures(6), "kind": labels[::-1]},
    }
    path = write_hub_folder(tmp_path / "set", features, splits)
    data = load_data("hub", path=path, label_column="kind", splits={"test": "validation"})
    assert data.class_names == names
    assert data.validation is None
    assert [names[number] for number in data.labels("test")] == [str(label) for label in labels[::-1]]


def test_hub_without_a_test_split_takes_it_out_of_train_and_says_so(tmp_path, caplog):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    path = write_hub_folder(
        tmp_path / "set", features, {"train": {"image": pictures(20), "label": [0, 1] * 10}}
    )
    data = load_data("hub", path=path)
    assert (len(data.train), len(data.test)) == (16, 4)
    assert np.bincount(data.labels("test")).tolist() == [2, 2]
    assert "no test split" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "picture"}, "no column 'picture'; it has image, label"),
        ({"label_column": "klass"}, "no column 'klass'"),
        ({"splits": {"test": "nowhere"}}, "do not fit"),
        ({"splits": {"exam": "train"}}, "do not fit"),
        ({"configuration": "nowhere"}, "cannot read the data set"),
    ],
)
def test_what_a_hub_set_lacks_is_named(tmp_path, options, message):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    columns = {"image": pictures(4), "label": [0, 1, 0, 1]}
    path = write_hub_folder(tmp_path / "set", features, {"train": columns, "test": columns})
    with pytest.raises(UserError, match=message):
        load_data("hub", path=path, **options)


def test_hidden_test_labels_are_refused(tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    train = {"image": pictures(4), "label": [0, 1, 0, 1]}
    path = write_hub_folder(
        tmp_path / "set", features, {"train": train, "test": {"image": pictures(2), "label": [-1, -1]}}
    )
    with pytest.raises(UserError, match="hidden test labels"):
        load_data("hub", path=path)


def test_without_a_network_a_hub_name_gives_the_remedy(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="check the name and the network"):
        load_data("hub", path="nobody/nothing")
