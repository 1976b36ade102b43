"""Reading image folders: which files lie below ``train/ val/ test/<class>/`` and whether they decode.

The ``imagefolder`` source and ``federated.data.folders`` see a folder through these functions, so that what
the check calls a problem is what the source refuses.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from federated.data.names import listed, read_alike, shortened, unusable, visible
from models.errors import UserError
from models.image_modes import load_image, num_frames, rgb_image
from models.progress import Report

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
SPLIT_WORDS = {
    "training": "train", "validation": "val", "valid": "val", "dev": "val", "testing": "test",
    "train": "train", "val": "val", "test": "test",
}  # fmt: skip
"""What folders of a split are called, and what their name must be; longer words first."""

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
        ignored: files that are not images by their suffix, and folders of no split.
        problems: what keeps the folder from being used, each naming the folder at fault and the remedy.
    """

    files: Mapping[str, ClassFiles]
    ignored: tuple[Path, ...]
    problems: tuple[str, ...]


def scan_folder(path: Path | str, *, allow_outside: bool = False) -> FolderScan:
    """List the images of a folder by split and class, and what is wrong with its structure.

    Args:
        path: the folder.
        allow_outside: follow links that leave the folder.

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
            f"{root}/{{train,val,test}}/<class>/*, {_where_images_are(root)}"
        )
    for split in there:
        folder = root / split
        scan = scan_classes(folder, None if allow_outside else root)
        ignored.extend(scan.ignored)
        problems.extend(scan.problems)
        files[split] = scan.classes
        if not scan.classes:
            problems.append(f"{folder} has no class folders; put the images into {folder}/<class>/")
        problems.extend(
            f"class folder {folder / name} has no images; fill it, or remove the class from every split"
            for name, images in scan.classes.items()
            if not images
        )
    for entry in sorted(root.iterdir()):
        right = _split_meant(entry.name)
        if entry.name in there or not (entry.is_dir() or _has_image_suffix(entry)):
            continue
        if entry.is_dir() and right is not None:
            problems.append(f"{entry} is not read; rename it to {root / right}, or move its images there")
        elif _is_visible(entry):
            ignored.append(entry)
    problems.extend(_class_differences(root, files))
    return FolderScan(files, tuple(ignored), tuple(problems))


def _where_images_are(root: Path) -> str:
    """Say what to do with the images that lie elsewhere below a folder."""
    folders = sorted((path for path in root.rglob("*") if path.is_dir()), key=lambda path: len(path.parts))
    if inner := next((f for f in folders if (f / "train").is_dir() and (f / "test").is_dir()), None):
        return f"or give {inner}, which has train/ and test/"
    parents = [file.parent.parent for folder in folders for file in folder.iterdir() if _is_image(file)]
    flat = max(sorted(set(parents)), key=parents.count, default=Path("FLAT"))
    return f"or split a <class>/* folder with: fedlora data prepare TARGET --from {flat}"


@dataclass(frozen=True)
class ClassScan:
    """What lies in a folder that holds a folder for each class; ``ignored`` and ``problems`` as above."""

    classes: dict[str, tuple[Path, ...]]
    ignored: tuple[Path, ...]
    problems: tuple[str, ...]


def scan_classes(folder: Path, inside: Path | None) -> ClassScan:
    """List the class folders with their image files, what is not read, and what is wrong.

    Args:
        folder: holds <class>/*.
        inside: links must not leave this folder; None: they may.
    """
    classes: dict[str, tuple[Path, ...]] = {}
    ignored: list[Path] = []
    problems: list[str] = [_link_problem(folder, inside)]
    loose: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir():
            problems.append(_link_problem(entry, inside))
            (loose if _is_image(entry) and _is_visible(entry) else ignored).append(entry)
        elif _is_visible(entry):
            if (reason := unusable(entry.name)) is not None:
                problems.append(f"the name of class folder {shortened(str(entry))} {reason}; rename it")
                continue
            problems.append(_link_problem(entry, inside))
            images, others, faults = _scan_class(entry, inside)
            classes[entry.name] = images
            ignored.extend(others)
            problems.extend(faults)
    if loose:
        problems.append(
            f"{len(loose)} images in {folder} are in no class folder ({listed(p.name for p in loose)}); move "
            f"them into {folder}/<class>/"
        )
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(visible(name), []).append(name)
    problems.extend(
        f"class folders {listed(map(shortened, names))} in {folder} differ in blanks, in invisible "
        "characters or in the form of their letters alone; put their images into one"
        for names in alike.values()
        if len(names) > 1
    )
    read = [path for path in ignored if _is_visible(path) or _has_image_suffix(path)]
    return ClassScan(classes, tuple(read), tuple(problem for problem in problems if problem))


def _scan_class(folder: Path, inside: Path | None) -> tuple[tuple[Path, ...], list[Path], list[str]]:
    """Images of one class folder, at any depth, what is not read, and what is wrong."""
    images: list[Path] = []
    ignored: list[Path] = []
    problems: list[str] = []
    pending = [folder]
    while pending:
        for entry in sorted(pending.pop().iterdir()):
            is_folder = entry.is_dir()
            if is_folder and not _is_visible(entry):
                continue
            if problem := _link_problem(entry, inside):
                problems.append(problem)
            elif is_folder and entry.is_symlink():
                problems.append(f"{entry} is a link to a folder; put the images themselves into {folder}")
            elif not is_folder and not (_is_image(entry) and _is_visible(entry)):
                ignored.append(entry)
            elif (reason := unusable(entry.name)) is not None:
                kind = "folder" if is_folder else "file"
                problems.append(f"the {kind} name of {shortened(str(entry))} {reason}; rename the {kind}")
            else:
                (pending if is_folder else images).append(entry)
    return tuple(sorted(images)), ignored, problems


def _link_problem(path: Path, inside: Path | None) -> str:
    """What is wrong with a link; "" with anything else."""
    if not path.is_symlink():
        return ""
    if not path.exists():
        return (
            f"{path} is a link to {path.readlink()}, which does not exist; remove it, or bring the file back"
        )
    if inside is not None and leaves(path, inside):
        return (
            f"{path} is a link that leaves {inside}, to {path.resolve()}; put the files themselves there, or "
            "set allow_outside=true to follow such links"
        )
    return ""


def leaves(path: Path, folder: Path) -> bool:
    """Say whether a path ends outside a folder once its links are followed."""
    return not path.resolve().is_relative_to(folder.resolve())


def image_error(file: Path | str | BinaryIO) -> str | None:
    """Say why an image file cannot be decoded and shown; None when it can."""
    try:
        rgb_image(load_image(file))
    except DECODE_ERRORS as error:
        return str(error) or type(error).__name__
    return None


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Look:
    """What an image file shows.

    Attributes:
        pixels: Hash of size and values as the file holds them, transparency included: equal for one picture
            saved twice without loss.
        shown: Hash of size and RGB pixels, as a model is shown them.
        is_one_colour: Whether all of these are equal.
        has_more_frames: Whether the file has frames or pages after the one that is shown.
    """

    pixels: str
    shown: str
    is_one_colour: bool
    has_more_frames: bool


def look_at(path: Path | BinaryIO) -> Look:
    """Decode an image file.

    Raises:
        What is in ``DECODE_ERRORS``: it cannot be decoded, or not be shown.
    """
    image = load_image(path)
    rgb = rgb_image(image)
    is_deep = image.mode == "F" or image.mode.startswith("I")
    raw = image if is_deep else image.convert("LA" if image.mode == "La" else "RGBA")
    return Look(
        pixels=hashlib.sha256(f"{is_deep and image.mode} {raw.size}".encode() + raw.tobytes()).hexdigest(),
        shown=hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest(),
        is_one_colour=rgb.getcolors(maxcolors=1) is not None,
        has_more_frames=num_frames(path) > 1,
    )


def look_at_all(
    images: Sequence[Path],
    corrupt: list[tuple[Path, str]],
    report: Report,
    content_of: Callable[[Path], Path | BinaryIO] = lambda image: image,
) -> dict[Path, Look]:
    """Decode image files.

    Args:
        images: the files.
        corrupt: gets (file, why it cannot be decoded).
        report: told about the progress, after each image.
        content_of: image -> what to read, for images that are no files of their own.

    Returns:
        Image -> what it shows, without the corrupt ones.
    """
    looks = {}
    for number, image in enumerate(images, start=1):
        try:
            looks[image] = look_at(content_of(image))
        except DECODE_ERRORS as error:
            corrupt.append((image, str(error) or type(error).__name__))
        report(number, len(images))
    return looks


def of_one_colour(looks: Mapping[Path, Look]) -> tuple[Path, ...]:
    """Return the images whose pixels are all of one colour."""
    return tuple(image for image, look in looks.items() if look.is_one_colour)


def of_several_frames(looks: Mapping[Path, Look]) -> tuple[Path, ...]:
    """Return the images of which all frames but the first are not read."""
    return tuple(image for image, look in looks.items() if look.has_more_frames)


def look_alike(looks: Mapping[Path, Look]) -> tuple[tuple[Path, ...], ...]:
    """Return groups of images that differ as files hold them and are equal as a model is shown them."""
    groups: dict[str, list[Path]] = {}
    for image, look in looks.items():
        groups.setdefault(look.shown, []).append(image)
    return tuple(
        tuple(group) for group in groups.values() if len({looks[image].pixels for image in group}) > 1
    )


def _is_visible(path: Path) -> bool:
    return not path.name.startswith(".")


def _has_image_suffix(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _is_image(path: Path) -> bool:
    return _has_image_suffix(path) and path.is_file()


def _split_meant(name: str) -> str | None:
    """The split that a folder's name seems to mean: "Train", "training" or "train-2", not "trainable"."""
    for word, split in SPLIT_WORDS.items():
        rest = name.strip().lower().removeprefix(word)
        if len(rest) < len(name.strip()) and not rest[:1].isalpha():
            return split
    return None


def _class_differences(root: Path, files: Mapping[str, ClassFiles]) -> Iterator[str]:
    """Classes that one split has and another lacks; an unseen class has no number and no meaning."""
    train = set(files.get("train", {}))
    for split in ("val", "test"):
        if not train or split not in files:
            continue
        classes = set(files[split])
        twins = {read_alike(name): name for name in train - classes}
        for name in sorted(classes - train):
            if twin := twins.pop(read_alike(name), None):
                classes = classes - {name} | {twin}
                yield (
                    f"class {twin!a} of {root / 'train'} is written {name!a} in {root / split}: they differ "
                    "in case, blanks, invisible characters or the form of letters alone; give it one name"
                )
        for name in sorted(train - classes):
            yield f"class {name!r} is in {root / 'train'} but not in {root / split}; add it or remove it"
        for name in sorted(classes - train):
            yield f"class {name!r} is in {root / split} but not in {root / 'train'}; add it or remove it"
