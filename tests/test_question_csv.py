"""Claims about the vqa_csv source, and about the check of such a file before a run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage

from federated.data.dataset import load_data
from federated.data.partition import partition
from federated.data.splits import column_values
from federated.data.table_check import check_table
from models.errors import UserError
from tests.command import fedlora

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


# ---- the check before a run


def checked(tmp_path, lines: list[str], header: str = f"{HEADER},split", **options):
    path = write_csv(tmp_path / "all.csv", header, lines)
    return check_table(Path(path), options={"image_dir": str(tmp_path / "images"), **options})


def test_the_check_counts_types_answers_lengths_and_what_is_unseen(tmp_path):
    write_images(tmp_path / "images", 4)
    report = checked(
        tmp_path,
        [
            "0.png,what is it?,a black cat,object,train",
            "0.png,how many?,two,number,train",
            "1.png,how many cats are there?,Two,number,train",
            "2.png,what?,a dog,object,test",
        ],
        val_split=0,
    )
    assert report.counts["rows"] == {"train": 3, "test": 1}
    assert report.counts["pictures"] == {"train": 2, "test": 1}
    assert report.counts["answers"] == {"train": 2, "test": 1}
    assert report.counts["type number"] == {"train": 2, "test": 0}
    found = report.questions
    assert found.frequent == (("two", 2), ("a black cat", 1), ("a dog", 1))
    assert found.words == {"question": (1, 2, 5), "answer": (1, 1, 3)}
    assert (found.num_answers, found.unseen, found.num_test) == (3, 1, 1)
    assert found.repeated == found.contradicted == ()
    assert found.without_picture == {"majority": 0.0, "question_only": 0.0}


def test_the_check_names_doubles_contradictions_and_pictures_in_two_splits(tmp_path):
    write_images(tmp_path / "images", 3)
    (tmp_path / "images" / "copy.png").write_bytes((tmp_path / "images" / "1.png").read_bytes())
    report = checked(
        tmp_path,
        [
            "0.png,what?,cat,object,train",
            "0.png,What?,CAT,object,train",
            "1.png,what?,cow,object,train",
            "copy.png,what?,cow,object,test",
            "2.png,where?,left,object,train",
            "2.png,where?,right,object,train",
        ],
        val_split=0,
    )
    assert [text.rsplit("/", 1)[1] for text in report.questions.repeated] == ["0.png: what?"]
    assert [text.rsplit("/", 1)[1] for text in report.questions.contradicted] == ["2.png: where?"]
    assert [{file.name for file in group} for group in report.leaks] == [{"1.png", "copy.png"}]


def test_data_check_reads_questions_with_options(tmp_path, capsys, table):
    code, output, _ = fedlora(capsys, "data", "check", table["path"], f"image_dir={table['image_dir']}")
    assert code == 0
    assert "3 answers, the most frequent: con mèo 33.3 %" in output
    assert "an answer chosen by the question's words in 100.0 %" in output
    code, _, error = fedlora(capsys, "data", "check", table["path"])
    assert code == 2
    assert "120 images do not exist" in error
    code, _, error = fedlora(capsys, "data", "check", table["path"], "image_dir")
    assert code == 2
    assert "is no option: write data.options.KEY=VALUE" in error
    code, _, error = fedlora(capsys, "data", "check", tmp_path, "image_dir=x")
    assert code == 2
    assert "which has no option data.options.image_dir" in error
