"""Claims about the vqa_csv source, and about the check of such a file before a run."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image as PilImage

from federated.data.dataset import load_data
from federated.data.partition import partition
from federated.data.splits import column_values
from models.errors import UserError

HEADER = "image,question,answer,type"


def write_images(folder, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        PilImage.fromarray(pixels).save(folder / f"{number}.png")


def write_csv(path, header: str, lines: list[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def table(tmp_path) -> dict[str, str]:
    """Forty pictures with three questions each, of three types."""
    write_images(tmp_path / "images", 40)
    asked = (
        ("cái gì đây?", "con mèo", "object"),
        ("có mấy con?", "hai", "number"),
        ("màu gì?", "Đỏ", "color"),
    )
    lines = [f"{picture}.png,{','.join(row)}" for picture in range(40) for row in asked]
    path = write_csv(tmp_path / "train.csv.txt", HEADER, lines)
    return {"path": path, "image_dir": str(tmp_path / "images")}


def test_rows_hold_picture_question_answer_and_type(table):
    data = load_data("vqa_csv", val_split=0, test_fraction=0.1, **table)
    assert data.class_names == ("color", "number", "object")
    row = data.train[0]
    assert (row["question"], row["answer"]) == ("cái gì đây?", "con mèo")
    assert data.class_names[row["label"]] == "object"
    with PilImage.open(f"{table['image_dir']}/{row['picture'].rsplit('/', 1)[1]}") as expected:
        assert np.array_equal(np.asarray(row["image"]), np.asarray(expected))
    assert data.validation is None


def test_splits_are_drawn_by_picture_and_of_the_stated_sizes(table):
    data = load_data("vqa_csv", **table)
    held = [set(column_values(data.split(split), "picture")) for split in ("train", "validation", "test")]
    assert [len(pictures) for pictures in held] == [32, 4, 4]
    assert len(set.union(*held)) == 40
    assert [len(data.split(split)) for split in ("train", "validation", "test")] == [96, 12, 12]
    assert data.drawn == ("test", "validation")


def test_a_seed_draws_the_same_splits_and_another_seed_others(table):
    first, again, other = (load_data("vqa_csv", seed=seed, **table).test["picture"][:] for seed in (1, 1, 2))
    assert first == again != other


def test_a_folder_of_files_and_other_column_names_and_delimiters_are_read(tmp_path):
    write_images(tmp_path / "img", 3)
    header = "img_id;question;answer;kind;who"
    for number, split in enumerate(("train", "val", "test")):
        write_csv(
            tmp_path / "csv" / f"{split}.csv", header, [f"{number}.png;what is it?;cat, black;object;anna"]
        )
    data = load_data(
        "vqa_csv", path=str(tmp_path / "csv"), image_dir=str(tmp_path / "img"), image_column="img_id",
        type_column="kind", domain_column="who", separator=";",
    )  # fmt: skip
    assert [len(data.split(split)) for split in ("train", "validation", "test")] == [1, 1, 1]
    assert data.train["answer"][:] == ["cat, black"]
    assert data.train[data.domain_column][:] == ["anna"]
    assert data.drawn == ()


def test_a_row_without_a_type_has_the_type_of_its_answer(tmp_path):
    write_images(tmp_path, 2)
    lines = ["0.png,is it?,yes,train", "0.png,how many?,2,train", "1.png,what?,a cat,test"]
    path = write_csv(tmp_path / "all.csv", "image,question,answer,split", lines)
    data = load_data("vqa_csv", path=path, val_split=0)
    assert data.class_names == ("number", "other", "yes/no")
    assert [data.class_names[label] for label in data.labels()] == ["yes/no", "number"]
    assert [data.class_names[label] for label in data.labels("test")] == ["other"]


def test_answers_of_several_people_are_kept_and_the_most_frequent_is_the_answer(tmp_path):
    write_images(tmp_path, 2)
    lines = [f"0.png,what?,{'|'.join(['cat'] * 4 + ['kitten'] * 6)},train", "1.png,what?,dog|dog|pup,test"]
    path = write_csv(tmp_path / "all.csv", "image,question,said,split", lines)
    data = load_data("vqa_csv", path=path, answers_column="said", val_split=0)
    assert data.train[0]["answer"] == "kitten"
    assert Counter(data.train[0]["answers"]) == {"cat": 4, "kitten": 6}
    assert data.test[0]["answers"] == ["dog", "dog", "pup"]


def test_natural_clients_are_the_domains_of_the_file(tmp_path):
    write_images(tmp_path, 8)
    lines = [f"{n}.png,what?,cat,object,{'train' if n < 6 else 'test'},site{n % 2}" for n in range(8)]
    path = write_csv(tmp_path / "all.csv", f"{HEADER},split,site", lines)
    data = load_data("vqa_csv", path=path, domain_column="site", val_split=0)
    split = partition(
        data.train, name="natural", num_clients=2, seed=0, label_column="label", domain_column="client"
    )
    assert [rows.tolist() for rows in split.indices] == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize(
    ("header", "line", "message"),
    [
        ("img,question,answer,type", "0.png,what?,cat,object", "no column 'image'; it has 'img', 'question'"),
        ("image,q,answer,type", "0.png,what?,cat,object", "data.options.question_column"),
        (HEADER, "9.png,what?,cat,object", "1 images do not exist .*9.png.*image_dir"),
        (HEADER, "0.png,what?, ,object", "line 3 has an empty answer.*skip_incomplete"),
        (HEADER, "0.png,,cat,object", "line 3 has an empty question"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, header, line, message):
    write_images(tmp_path, 2)
    good = "1.png,what?,cat,object"
    path = write_csv(tmp_path / "all.csv", header, [good, line])
    with pytest.raises(UserError, match=message):
        load_data("vqa_csv", path=path)


def test_an_unknown_type_is_named_with_its_line(tmp_path):
    write_images(tmp_path, 2)
    path = write_csv(
        tmp_path / "all.csv",
        f"{HEADER},split",
        ["0.png,what?,cat,object,train", "1.png,where?,left,place,test"],
    )
    with pytest.raises(
        UserError, match="all.csv line 3: type 'place' occurs in no training row; there are object"
    ):
        load_data("vqa_csv", path=path)
    with pytest.raises(UserError, match="is not among types"):
        load_data("vqa_csv", path=path, types=["object"])
    data = load_data("vqa_csv", path=path, types=["object", "place"], val_split=0)
    assert data.labels("test").tolist() == [1]


def test_rows_with_gaps_can_be_left_out_and_are_counted(tmp_path):
    write_images(tmp_path, 20)
    lines = [f"{number}.png,what?,{'' if number == 3 else 'cat'},object" for number in range(20)]
    path = write_csv(tmp_path / "all.csv", HEADER, lines)
    data = load_data("vqa_csv", path=path, skip_incomplete=True)
    assert data.num_skipped == 1
    assert sum(len(data.split(split)) for split in ("train", "validation", "test")) == 19


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_an_impossible_validation_share_is_refused(table, share):
    with pytest.raises(UserError, match="data.options.val_split"):
        load_data("vqa_csv", val_split=share, **table)
