"""What ``predict``, ``search`` and ``data`` show: tables of text, and records for CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from federated.data.sources.folder_scan import SPLITS
from federated.results.tables import TextTable
from federated.results.wording import MISSING, format_count, format_percent
from models.files import json_text

if TYPE_CHECKING:  # a folder's check needs no model, so none is imported for it
    from federated.data.folders import FolderReport
    from federated.tools.embedding_files import EmbeddingIndex
    from federated.tools.prediction import Predictions
    from federated.tools.search import Hit

MAX_LISTED = 20
"""Doubles listed in a folder's check."""

Record = dict[str, Any]


def prediction_table(predictions: Predictions) -> TextTable:
    """Return one row an image: its class, the probability, and the next classes."""
    rows = []
    for row in predictions.rows:
        shown = [format_percent(value) for value in row.probabilities]
        others = [f"{name} {share}" for name, share in zip(row.class_names, shown, strict=True)]
        rows.append((str(row.path), row.class_names[0], shown[0], ", ".join(others[1:])))
    return TextTable(("image", "class", "probability", "then"), tuple(rows), words=frozenset({0, 1, 3}))


def prediction_records(predictions: Predictions) -> list[Record]:
    """Return one record an image and class, the best class of each image first."""
    return [
        {"image": str(row.path), "rank": rank, "class": name, "probability": round(value, 6)}
        for row in predictions.rows
        for rank, (name, value) in enumerate(zip(row.class_names, row.probabilities, strict=True), start=1)
    ]


def hit_records(index: EmbeddingIndex, hits: Sequence[Hit]) -> list[Record]:
    """Return one record a hit: rank, cosine, and the image's path or the text."""
    kind = index.manifest.kind
    folder = Path(index.manifest.folder)
    return [
        {
            "rank": rank,
            "score": round(hit.score, 6),
            kind: str(folder / hit.item) if kind == "image" else hit.item,
        }
        for rank, hit in enumerate(hits, start=1)
    ]


def hit_table(index: EmbeddingIndex, hits: Sequence[Hit]) -> TextTable:
    """Return one row a hit; images by their path below the index's folder."""
    rows = tuple((str(rank), f"{hit.score:.4f}", hit.item) for rank, hit in enumerate(hits, start=1))
    return TextTable(("rank", "cosine", index.manifest.kind), rows, words=frozenset({2}))


def class_table(counts: Mapping[str, Mapping[str, int]]) -> TextTable:
    """Return one row a class with its number of images in each split, and their sum."""
    splits = [split for split in SPLITS if split in counts]
    names = sorted({name for classes in counts.values() for name in classes})
    rows = [
        (name, *(format_count(counts[split][name]) if name in counts[split] else MISSING for split in splits))
        for name in names
    ]
    rows.append(("all", *(format_count(sum(counts[split].values())) for split in splits)))
    return TextTable(("class", *splits), tuple(rows), words=frozenset({0}))


def count_table(counts: Mapping[str, Mapping[str, int]]) -> TextTable:
    """Return one row for each thing that is counted with its number in each split."""
    splits = list(next(iter(counts.values())))
    rows = tuple(
        (name, *(format_count(by_split[split]) for split in splits)) for name, by_split in counts.items()
    )
    return TextTable(("", *splits), rows, words=frozenset({0}))


def double_table(report: FolderReport) -> TextTable:
    """Return one row for each image that lies in more than one split of a folder."""
    rows = [(_group(report.path, group), "equal files") for group in report.same_content]
    rows += [(_group(report.path, group), "equal pixels") for group in report.same_pixels]
    if len(rows) > MAX_LISTED:
        rows[MAX_LISTED:] = [(f"and {len(rows) - MAX_LISTED} more", "")]
    return TextTable(("images", "why"), tuple(rows), words=frozenset({0, 1}))


def records_to_csv(records: Sequence[Record]) -> str:
    """Return records of equal keys as CSV with a header line; "" for none."""
    if not records:
        return ""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def records_to_text(records: Sequence[Record]) -> str:
    """Return one line a record, its values apart by tabs, without a header."""
    return "".join("\t".join(str(value) for value in record.values()) + "\n" for record in records)


def records_to_json(records: Sequence[Record]) -> str:
    """Return records as a JSON list of objects."""
    return json_text(list(records), indent=1, ensure_ascii=False) + "\n"


def _group(root: Path, paths: Sequence[Path]) -> str:
    return " = ".join(path.relative_to(root).as_posix() for path in paths)
