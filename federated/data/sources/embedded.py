"""Readers of the data that ships with the package: Fashion-MNIST subset and emoji of four vendors.

`federated.data.sources.source_registry` takes these datasets, the partitioner splits them into shards.
Nothing is downloaded and nothing is written to a cache folder. The files are made by `scripts/build_data.py`;
licences lie beside them.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features

DATA_FOLDER = Path(__file__).resolve().parents[1] / "embedded_data"
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package `dataset-fashion-mnist` puts the full set."""

FASHION_MNIST_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
VENDORS = ("noto", "twemoji", "fluent", "openmoji")
"""Emoji vendors; the bundled tiny CLIP has seen the first three, never "openmoji"."""
LANGUAGES = ("en", "vi", "zh")
TILE_PIXELS = 32


@dataclass(frozen=True)
class Concept:
    """One emoji, whoever drew it.

    Attributes:
        code_points: hexadecimal code points joined by "-", e.g. "1F9D1-200D-1F52C".
        group: Unicode group key, e.g. "animals-nature" (8 of them).
        subgroup: Unicode subgroup key, e.g. "animal-mammal".
        held_out: whether the concept belongs to the test split (by hash, shared by gender variants).
        missing: vendors that have no picture of it.
        names: language -> name.
        tags: language -> keywords.
    """

    code_points: str
    group: str
    subgroup: str
    held_out: bool
    missing: tuple[str, ...]
    names: dict[str, str]
    tags: dict[str, tuple[str, ...]]


@cache
def _concept_table() -> tuple[list[dict[str, str]], tuple[Concept, ...]]:
    path = DATA_FOLDER / "emoji" / "captions" / "concepts.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    concepts = tuple(
        Concept(
            code_points=row["code_points"],
            group=row["group"],
            subgroup=row["subgroup"],
            held_out=row["held_out"],
            missing=tuple(row["missing"]),
            names={language: row[language]["name"] for language in LANGUAGES},
            tags={language: tuple(row[language]["tags"]) for language in LANGUAGES},
        )
        for row in table["concepts"]
    )
    return table["groups"], concepts


def concepts() -> tuple[Concept, ...]:
    """All emoji concepts; the position of a concept is its number in the `concept` column."""
    return _concept_table()[1]


def group_names(language: str = "en") -> tuple[str, ...]:
    """Names of the groups in label order, e.g. "smileys & emotion".

    Raises:
        UserError: for a language that is not embedded.
    """
    check_choices("language", [language], LANGUAGES)
    return tuple(group[language] for group in _concept_table()[0])


def subgroup_names() -> tuple[str, ...]:
    """Unicode subgroup keys in label order (Unicode's order), e.g. "animal-mammal"."""
    return tuple(dict.fromkeys(concept.subgroup for concept in concepts()))


def captions(language: str = "en") -> list[str]:
    """The name of every concept in one language, in the order of `concepts()`.

    Raises:
        UserError: for a language that is not embedded.
    """
    check_choices("language", [language], LANGUAGES)
    return [concept.names[language] for concept in concepts()]


def emoji_tiles(vendor: str) -> np.ndarray:
    """All pictures of one vendor with transparency.

    Args:
        vendor: one of `VENDORS`.

    Returns:
        (number of concepts, 32, 32, 4) unsigned bytes, RGBA; fully transparent where the vendor has none.

    Raises:
        UserError: for an unknown vendor.
    """
    from PIL import Image

    check_choices("vendor", [vendor], VENDORS)
    with Image.open(DATA_FOLDER / "emoji" / vendor / "tiles.webp") as sheet:
        pixels = np.asarray(sheet.convert("RGBA"))
    rows, columns = pixels.shape[0] // TILE_PIXELS, pixels.shape[1] // TILE_PIXELS
    tiles = pixels.reshape(rows, TILE_PIXELS, columns, TILE_PIXELS, 4).swapaxes(1, 2)
    return tiles.reshape(-1, TILE_PIXELS, TILE_PIXELS, 4)[: len(concepts())]


def flatten_tiles(tiles: np.ndarray, background: int = 255) -> np.ndarray:
    """Lay RGBA tiles (N, 32, 32, 4) over a gray background of 0 to 255; returns RGB (N, 32, 32, 3)."""
    alpha = tiles[..., 3:].astype(np.uint16)
    blended = tiles[..., :3] * alpha + np.uint16(background) * (255 - alpha)
    return ((blended + 127) // 255).astype(np.uint8)


def emoji(vendors: Sequence[str] = VENDORS, language: str = "en") -> DatasetDict:
    """Emoji with their group and caption; the splits share no concept.

    Args:
        vendors: which drawings to include.
        language: language of the captions, "en", "vi" or "zh".

    Returns:
        Splits `train` and `test` (held-out concepts) with the columns image (32 x 32 RGB on white), label
        (group), subgroup, vendor (string), concept (number of the concept, equal across vendors), caption.

    Raises:
        UserError: for an unknown vendor or language.
    """
    from datasets import DatasetDict

    check_choices("vendor", vendors, VENDORS)
    check_choices("language", [language], LANGUAGES)
    tiles = {vendor: flatten_tiles(emoji_tiles(vendor)) for vendor in vendors}
    return DatasetDict(
        {
            "train": _emoji_split(tiles, language, held_out=False),
            "test": _emoji_split(tiles, language, held_out=True),
        }
    )


def _emoji_split(tiles: dict[str, np.ndarray], language: str, *, held_out: bool) -> Dataset:
    from datasets import ClassLabel, Features, Image, Value

    group_keys = [group["key"] for group in _concept_table()[0]]
    subgroups = subgroup_names()
    rows = [
        (vendor, number, concept)
        for vendor in tiles
        for number, concept in enumerate(concepts())
        if concept.held_out == held_out and vendor not in concept.missing
    ]
    columns: dict[str, list[Any]] = {
        "image": [
            {"bytes": _encode_netpbm(tiles[vendor][number]), "path": f"{vendor}-{concept.code_points}.ppm"}
            for vendor, number, concept in rows
        ],
        "label": [group_keys.index(concept.group) for _, _, concept in rows],
        "subgroup": [subgroups.index(concept.subgroup) for _, _, concept in rows],
        "vendor": [vendor for vendor, _, _ in rows],
        "concept": [number for _, number, _ in rows],
        "caption": [concept.names[language] for _, _, concept in rows],
    }
    features = Features(
        {
            "image": Image(),
            "label": ClassLabel(names=list(group_names())),
            "subgroup": ClassLabel(names=list(subgroups)),
            "vendor": Value("string"),
            "concept": Value("int64"),
            "caption": Value("string"),
        }
    )
    return _in_memory(columns, features, "test" if held_out else "train")


def _in_memory(columns: dict[str, list[Any]], features: Features, split: str) -> Dataset:
    """A dataset that lives in memory only; image cells are already {bytes, path}."""
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    return Dataset(InMemoryTable(pa.table(columns, schema=features.arrow_schema)), split=split)


def fashion_mnist(*, full: bool = False) -> DatasetDict:
    """Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747), 28 x 28 gray, ten classes of clothing.

    Args:
        full: read all 70,000 images from the Debian package instead of the embedded stratified subset.

    Returns:
        Splits `train` (4,000), `validation` (500) and `test` (1,000) with the columns image and label.
        With `full`: 59,500, the same 500 and 10,000.

    Raises:
        UserError: when `full` is asked for and the Debian package is not installed.
    """
    from datasets import DatasetDict

    splits = {name: _read_parquet(name) for name in ("train", "validation", "test")}
    if not full:
        return DatasetDict(splits)
    validation = splits["validation"]
    paths = validation.data.column("image").combine_chunks().field("path").to_pylist()
    validation_indices = [int(Path(path).stem.removeprefix("train-")) for path in paths]
    return DatasetDict(
        {
            "train": _read_full("train", validation_indices, validation.features),
            "validation": validation,
            "test": _read_full("t10k", [], validation.features),
        }
    )


def _read_parquet(split: str) -> Dataset:
    import pyarrow.parquet as pq
    from datasets import ClassLabel, Dataset, Features, Image
    from datasets.table import InMemoryTable

    features = Features({"image": Image(), "label": ClassLabel(names=list(FASHION_MNIST_NAMES))})
    table = pq.read_table(DATA_FOLDER / "fashion_mnist" / f"{split}.parquet", use_threads=False)
    table = table.cast(features.arrow_schema)
    return Dataset(InMemoryTable(table), split=split)


def _read_full(official: str, left_out: list[int], features: Features) -> Dataset:
    """The official split from the Debian package's IDX files, without the rows in `left_out`."""
    images, labels = (
        _read_idx(FASHION_MNIST_FOLDER / f"{official}-{kind}-ubyte.gz")
        for kind in ("images-idx3", "labels-idx1")
    )
    kept = np.setdiff1d(np.arange(len(labels)), left_out)
    rows = {
        "image": [{"bytes": _encode_netpbm(images[i]), "path": f"{official}-{i:05d}.pgm"} for i in kept],
        "label": labels[kept].tolist(),
    }
    return _in_memory(rows, features, "train" if official == "train" else "test")


def _read_idx(path: Path) -> np.ndarray:
    if not path.exists():
        raise UserError(
            f"{path} is missing: the full Fashion-MNIST comes with `apt install dataset-fashion-mnist`; "
            "or use the embedded subset (full=False)",
            options=("full",),
        )
    raw = gzip.decompress(path.read_bytes())
    num_dimensions = raw[3]  # IDX header: two zero bytes, type (8 = unsigned byte), number of dimensions
    shape = np.frombuffer(raw, dtype=">i4", count=num_dimensions, offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * num_dimensions).reshape(shape)


def _encode_netpbm(pixels: np.ndarray) -> bytes:
    """Image file of (H, W) gray or (H, W, 3) RGB bytes: a header and the pixels, far faster than PNG."""
    magic = b"P5" if pixels.ndim == 2 else b"P6"  # noqa: PLR2004
    height, width = pixels.shape[:2]
    return magic + f" {width} {height} 255\n".encode() + pixels.tobytes()


def check_choices(what: str, given: Sequence[Any], available: tuple[str, ...]) -> None:
    """Make sure that what is chosen is there.

    Raises:
        UserError: It is not, or nothing is chosen.
    """
    if isinstance(given, str):
        raise UserError(f"{what}s must be a list, not the string {given!r}; write ({given!r},)")
    unknown = [value for value in given if value not in available]
    if unknown or not given:
        options = ("language",) if what == "language" else ()  # vendors may be those to test on
        raise UserError(
            f"unknown {what} {unknown}: the embedded data has {', '.join(available)}", options=options
        )
