"""Claims about the data that ships with the package."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import numpy as np
import pytest
from datasets import DatasetDict
from PIL import Image

from federated.data.sources import embedded
from models.errors import UserError


@pytest.fixture(scope="module")
def fashion() -> DatasetDict:
    return embedded.fashion_mnist()


@pytest.fixture(scope="module")
def emoji() -> DatasetDict:
    return embedded.emoji()


def _image_bytes(split) -> list[bytes]:
    return split.data.column("image").combine_chunks().field("bytes").to_pylist()


def test_fashion_mnist_has_the_stated_sizes_and_official_names(fashion: DatasetDict) -> None:
    assert {name: len(split) for name, split in fashion.items()} == {
        "train": 4000,
        "validation": 500,
        "test": 1000,
    }
    for split in fashion.values():
        assert tuple(split.features["label"].names) == embedded.FASHION_MNIST_NAMES
        example = split[0]["image"]
        assert (example.size, example.mode) == ((28, 28), "L")


def test_every_fashion_mnist_split_is_stratified(fashion: DatasetDict) -> None:
    for split in fashion.values():
        counts = np.bincount(split["label"][:], minlength=10)
        assert (counts == len(split) // 10).all()


def test_fashion_mnist_rows_are_not_sorted_by_class(fashion: DatasetDict) -> None:
    for split in fashion.values():
        assert len(set(split["label"][:50])) > 5


def test_fashion_mnist_splits_share_no_source_image(fashion: DatasetDict) -> None:
    paths = {
        name: split.data.column("image").combine_chunks().field("path").to_pylist()
        for name, split in fashion.items()
    }
    every = [path for column in paths.values() for path in column]
    assert len(set(every)) == len(every) == 5500
    assert all(path.startswith("train-") for path in paths["train"] + paths["validation"])
    assert all(path.startswith("t10k-") for path in paths["test"])


def test_reading_leaves_no_cache_file(fashion: DatasetDict, emoji: DatasetDict) -> None:
    for data in (fashion, emoji):
        assert all(split.cache_files == [] for split in data.values())


def test_the_full_set_names_its_debian_package_when_absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(embedded, "FASHION_MNIST_FOLDER", tmp_path)
    with pytest.raises(UserError, match="apt install dataset-fashion-mnist"):
        embedded.fashion_mnist(full=True)


@pytest.mark.slow
@pytest.mark.skipif(
    not embedded.FASHION_MNIST_FOLDER.exists(), reason="needs the Debian package dataset-fashion-mnist"
)
def test_the_full_set_contains_the_subset_and_keeps_its_validation_split_apart(fashion: DatasetDict) -> None:
    full = embedded.fashion_mnist(full=True)
    assert [len(full[name]) for name in ("train", "validation", "test")] == [59500, 500, 10000]
    numbers = {Path(name).stem: row for row, name in enumerate(_paths(full["train"]))}
    assert not {Path(name).stem for name in _paths(full["validation"])} & numbers.keys()
    for row in range(0, 4000, 400):
        same = full["train"][numbers[Path(_paths(fashion["train"])[row]).stem]]
        assert same["label"] == fashion["train"][row]["label"]
        assert np.array_equal(np.asarray(same["image"]), np.asarray(fashion["train"][row]["image"]))


def _paths(split) -> list[str]:
    return split.data.column("image").combine_chunks().field("path").to_pylist()


def test_held_out_concepts_never_occur_in_training(emoji: DatasetDict) -> None:
    train, test = set(emoji["train"]["concept"][:]), set(emoji["test"]["concept"][:])
    assert not train & test
    assert len(train) + len(test) == len(embedded.concepts()) == 1636


def test_held_out_concepts_are_about_18_percent_and_cover_every_group(emoji: DatasetDict) -> None:
    share = np.mean([concept.held_out for concept in embedded.concepts()])
    assert 0.15 < share < 0.21
    assert set(emoji["test"]["label"][:]) == set(range(8)) == set(emoji["train"]["label"][:])


def test_gender_variants_of_a_concept_are_held_out_together() -> None:
    ignored = {"1F469", "1F468", "1F9D1", "2640", "2642", "200D", "FE0F", "27A1"}
    marks: dict[str, set[bool]] = {}
    for concept in embedded.concepts():
        key = "-".join(part for part in concept.code_points.split("-") if part not in ignored)
        marks.setdefault(key, set()).add(concept.held_out)
    assert len(marks) < len(embedded.concepts())
    assert all(len(values) == 1 for values in marks.values())


def test_each_vendor_draws_every_concept_but_those_marked_missing(emoji: DatasetDict) -> None:
    for vendor in embedded.VENDORS:
        tiles = embedded.emoji_tiles(vendor)
        assert tiles.shape == (1636, 32, 32, 4)
        drawn = (tiles[..., 3] > 0).any(axis=(1, 2))
        missing = np.array([vendor in concept.missing for concept in embedded.concepts()])
        assert (drawn == ~missing).all()
    rows = sum(len(split) for split in emoji.values())
    assert rows == sum(4 - len(concept.missing) for concept in embedded.concepts())


def test_vendors_draw_the_same_concept_alike() -> None:
    """A shuffled or shifted sheet would pair pictures of different things."""
    small = {}
    for vendor in ("noto", "twemoji", "fluent"):
        rgb = embedded.flatten_tiles(embedded.emoji_tiles(vendor)).astype(np.float64)
        features = rgb.reshape(-1, 8, 4, 8, 4, 3).mean(axis=(2, 4)).reshape(len(rgb), -1)
        features -= features.mean(axis=0)
        small[vendor] = features / np.linalg.norm(features, axis=1, keepdims=True)
    for vendor in ("twemoji", "fluent"):
        similarity = small["noto"] @ small[vendor].T
        own = np.diag(similarity).mean()
        assert own > 0.5 > similarity.mean() + 0.4


def test_flattening_agrees_with_pillow() -> None:
    tiles = embedded.emoji_tiles("noto")[200:210]
    for tile, flat in zip(tiles, embedded.flatten_tiles(tiles, background=40), strict=True):
        canvas = Image.new("RGBA", (32, 32), (40, 40, 40, 255))
        canvas.alpha_composite(Image.fromarray(tile))
        assert np.abs(np.asarray(canvas.convert("RGB")).astype(int) - flat).max() <= 1


def test_captions_exist_in_three_languages_and_differ() -> None:
    per_language = {language: embedded.captions(language) for language in embedded.LANGUAGES}
    assert set(per_language) == {"en", "vi", "zh"}
    for names in per_language.values():
        assert len(names) == 1636
        assert all(name.strip() for name in names)
    different = np.mean(np.array(per_language["en"]) != np.array(per_language["vi"]))
    assert different > 0.9
    assert np.mean([any("\u4e00" <= c <= "\u9fff" for c in name) for name in per_language["zh"]]) > 0.9
    assert all(len(embedded.group_names(language)) == 8 for language in embedded.LANGUAGES)


def test_the_language_changes_captions_and_nothing_else() -> None:
    english, vietnamese = embedded.emoji(["noto"]), embedded.emoji(["noto"], language="vi")
    for split in ("train", "test"):
        assert english[split]["caption"][:] != vietnamese[split]["caption"][:]
        for column in ("label", "subgroup", "vendor", "concept"):
            assert english[split][column][:] == vietnamese[split][column][:]
        assert _image_bytes(english[split]) == _image_bytes(vietnamese[split])


def test_emoji_rows_match_the_concept_table(emoji: DatasetDict) -> None:
    features = emoji["test"].features
    for row in range(0, len(emoji["test"]), 97):
        example = emoji["test"][row]
        concept = embedded.concepts()[example["concept"]]
        assert example["caption"] == concept.names["en"]
        assert features["subgroup"].int2str(example["subgroup"]) == concept.subgroup
        assert features["label"].int2str(example["label"]).split(" ")[0] == concept.group.split("-")[0]
        assert (example["image"].size, example["image"].mode) == ((32, 32), "RGB")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"vendors": ["apple"]}, "noto, twemoji, fluent, openmoji"),
        ({"vendors": "noto"}, "must be a list"),
        ({"vendors": []}, "noto, twemoji"),
        ({"language": "de"}, "en, vi, zh"),
    ],
)
def test_an_unknown_choice_is_answered_with_the_available_ones(arguments: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        embedded.emoji(**arguments)


def test_every_data_folder_has_its_licence() -> None:
    folders = {
        path.parent
        for path in embedded.DATA_FOLDER.rglob("*")
        if path.suffix in {".webp", ".parquet", ".json"}
    }
    assert len(folders) == 7
    expected = {
        "fashion_mnist": "Zalando",
        "noto": "Apache License",
        "twemoji": "CC BY 4.0",
        "fluent": "Microsoft",
        "openmoji": "ShareAlike 4.0",
        "captions": "Miles Johnson",
        "easy_vqa": "Victor Zhou",
    }
    for folder in folders:
        assert expected[folder.name] in (folder / "LICENSE").read_text(encoding="utf-8")
    assert "UNICODE LICENSE V3" in (embedded.DATA_FOLDER / "emoji/captions/LICENSE-UNICODE").read_text()


def test_the_embedded_data_stays_below_9_megabytes() -> None:
    total = sum(path.stat().st_size for path in embedded.DATA_FOLDER.rglob("*") if path.is_file())
    assert total < 9_000_000


def test_importing_the_reader_loads_no_heavy_library() -> None:
    tree = ast.parse(Path(embedded.__file__).read_text(encoding="utf-8"))
    imported = {node.names[0].name for node in tree.body if isinstance(node, ast.Import)}
    imported |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not imported & {"datasets", "torch", "PIL", "pyarrow"}


def test_parquet_files_carry_the_hugging_face_layout(fashion: DatasetDict) -> None:
    import pyarrow.parquet as pq

    schema = pq.read_schema(embedded.DATA_FOLDER / "fashion_mnist" / "test.parquet")
    assert schema.field("image").type == fashion["test"].features.arrow_schema.field("image").type
    assert b"ClassLabel" in schema.metadata[b"huggingface"]
    first = Image.open(io.BytesIO(_image_bytes(fashion["test"])[0]))
    assert first.format == "PNG"
