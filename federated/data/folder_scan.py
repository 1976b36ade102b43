"""Reading image folders: which files lie in ``train/ val/ test/<class>/*`` and whether they decode.

Stands before round 0. The ``imagefolder`` source and ``federated.data.folders`` see a folder through these
functions, so that what the check calls a problem is what the source refuses.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from models.errors import UserError

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = frozenset(
    {
        ".png",
        ".jpg",
        ".jpeg",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".jp2",
        ".avif",
    }
)
MISSPELT_SPLITS = {"training": "train", "validation": "val", "valid": "val", "dev": "val", "testing": "test"}
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    RuntimeError,
    Image.DecompressionBombError,
)
"""What Pillow raises on a file that is no image, damaged (RuntimeError for AVIF), or absurdly large."""

ClassFiles = Mapping[str, tuple[Path, ...]]
"""Class name -> its image files, both sorted."""


@dataclass(frozen=True)
class FolderScan:
    """What lies in an image folder, by file names alone.

    Attributes:
        files: split ("train", "val", "test"; only those there are) -> class -> image files.
        ignored: files that are not images by their suffix.
        problems: what keeps the folder from being used, each naming the folder at fault and the remedy.
    """

    files: Mapping[str, ClassFiles]
    ignored: tuple[Path, ...]
    problems: tuple[str, ...]


def scan_folder(path: Path | str) -> FolderScan:
    """List the images of a folder by split and class, and what is wrong with its structure.

    Raises:
        UserError: the path is no folder.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(
            f"{root} is no folder; give one with train/<class>/*, test/<class>/* and, if wanted, "
            "val/<class>/*, or make one with: fedlora data prepare TARGET --from FLAT"
        )
    files: dict[str, ClassFiles] = {}
    ignored: list[Path] = []
    problems: list[str] = []
    there = [split for split in SPLITS if (root / split).is_dir()]
    if missing := [str(root / split) for split in SPLITS if split not in {*there, "val"}]:
        problems.append(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; lay images out as "
            f"{root}/{{train,val,test}}/<class>/*, or split a <class>/* folder with: "
            "fedlora data prepare TARGET --from FLAT"
        )
    for split in there:
        folder = root / split
        classes, others = scan_classes(folder)
        ignored.extend(others)
        files[split] = classes
        if not classes:
            problems.append(f"{folder} has no class folders; put the images into {folder}/<class>/")
        problems.extend(
            f"class folder {folder / name} has no images; fill it, or remove the class from every split"
            for name, images in classes.items()
            if not images
        )
    problems.extend(
        f"{root / wrong} is not read; rename it to {root / right}"
        for wrong, right in MISSPELT_SPLITS.items()
        if (root / wrong).is_dir()
    )
    problems.extend(_class_differences(root, files))
    return FolderScan(files, tuple(ignored), tuple(problems))


def scan_classes(folder: Path) -> tuple[dict[str, tuple[Path, ...]], list[Path]]:
    """List the class folders with their image files, and the files that are not images."""
    classes: dict[str, tuple[Path, ...]] = {}
    ignored: list[Path] = []
    for class_folder in sorted(entry for entry in folder.iterdir() if entry.is_dir() and _is_visible(entry)):
        entries = sorted(entry for entry in class_folder.iterdir() if _is_visible(entry))
        images = tuple(entry for entry in entries if _is_image(entry))
        classes[class_folder.name] = images
        ignored.extend(entry for entry in entries if entry.is_file() and not _is_image(entry))
    return classes, ignored


def image_error(path: Path | str) -> str | None:
    """Say why an image file cannot be decoded; None when it can."""
    try:
        with Image.open(path) as image:
            image.load()
    except DECODE_ERRORS as error:
        return str(error) or type(error).__name__
    return None


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pixel_hash(path: Path) -> str:
    """Hash of size and RGBA pixels: equal for one picture saved twice without loss."""
    with Image.open(path) as image:
        pixels = image.convert("RGBA")
    return hashlib.sha256(f"{pixels.size}".encode() + pixels.tobytes()).hexdigest()


def _is_visible(path: Path) -> bool:
    return not path.name.startswith(".")


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _class_differences(root: Path, files: Mapping[str, ClassFiles]) -> Iterator[str]:
    """Classes that one split has and another lacks; an unseen class has no number and no meaning."""
    train = set(files.get("train", {}))
    for split in ("val", "test"):
        if not train or split not in files:
            continue
        classes = set(files[split])
        for name in sorted(train - classes):
            yield f"class {name!r} is in {root / 'train'} but not in {root / split}; add it or remove it"
        for name in sorted(classes - train):
            yield f"class {name!r} is in {root / split} but not in {root / 'train'}; add it or remove it"
