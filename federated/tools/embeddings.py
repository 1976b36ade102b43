"""Embeddings of image files and of texts, in batches: what prediction, encoding and search have in common.

They are read as training reads them: turned upright, made RGB, then the model's own image processing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from federated.data.sources.folder_scan import DECODE_ERRORS, IMAGE_SUFFIXES, image_error
from models.clip import FederatedCLIPModel
from models.errors import CONTROL, UserError, printable
from models.finite import check_finite
from models.image_modes import load_image
from models.progress import Report, quiet
from models.prompts import check_unicode, warn_of_cut

MAX_NAMED = 10
"""Corrupt files listed in one message."""


@dataclass(frozen=True)
class InputOptions:
    """How inputs pass through a model.

    Attributes:
        batch_size: Images or texts that pass through at once.
        skip_corrupt: Leave images out that cannot be decoded; otherwise they are an error that names them.
        report: Told about the progress, after each batch.
        patches: Give what the vision tower says of each patch instead of an image's embedding.
    """

    batch_size: int = 64
    skip_corrupt: bool = False
    report: Report = quiet
    patches: bool = False


DEFAULT_OPTIONS = InputOptions()


@dataclass(frozen=True, eq=False)
class ImageEmbeddings:
    """What embedding a list of files gave.

    Attributes:
        features: Projected features, not normalised, (N, D) float32 on the CPU; (N, T, width) of patches.
        paths: The N files, in the order given.
        corrupt: (file, why it cannot be decoded) of those left out.
    """

    features: Tensor
    paths: tuple[Path, ...]
    corrupt: tuple[tuple[Path, str], ...] = ()


def find_images(path: Path | str) -> list[Path]:
    """Return the image itself, or all images below a folder, sorted; hidden files and folders are left out.

    Raises:
        UserError: there is no such file or folder, no image in it, or one whose name cannot be written down.
    """
    root = Path(path)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UserError(f"{root}: no such file or folder; give an image or a folder with images")
    found = [
        file
        for file in root.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file() and not _is_hidden(file.relative_to(root))
    ]
    if unnameable := [file for file in found if CONTROL.search(str(file.relative_to(root)))]:
        raise UserError(
            f"{printable(str(unnameable[0]))}: its name is not UTF-8, or holds a control character; rename it"
        )
    if not found:
        raise UserError(f"{root} holds no images; they are known by suffixes such as .png, .jpg or .webp")
    return sorted(found)


def is_image_file(path: Path | str) -> bool:
    """Say whether there is a file of that path, with the suffix of an image."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES and Path(path).is_file()


def check_no_texts(path: Path | str) -> None:
    """Make sure that a path is not a file of texts.

    Raises:
        UserError: it is a file, but no image, neither by its suffix nor by what it holds.
    """
    if Path(path).is_file() and not is_image_file(path) and image_error(path) is not None:
        raise UserError(f"{path} is no image: pass --text if it is a text file with one text a line")


@torch.no_grad()
def embed_images(
    model: FederatedCLIPModel, paths: Sequence[Path], options: InputOptions = DEFAULT_OPTIONS
) -> ImageEmbeddings:
    """Embed image files.

    Args:
        model: With its adapters, if any.
        paths: The files, (N,).
        options: How.

    Raises:
        UserError: a corrupt image unless ``skip_corrupt``, no image that can be decoded, or embeddings that
            are not finite.
    """
    rows: list[Tensor] = []
    kept: list[Path] = []
    corrupt: list[tuple[Path, str]] = []
    for files, pixel_values in image_batches(model, paths, options, corrupt):
        rows.append(model.encode_image(pixel_values, patches=options.patches).cpu())
        kept.extend(files)
    return ImageEmbeddings(check_finite(torch.cat(rows)), tuple(kept), tuple(corrupt))


def image_batches(
    model: FederatedCLIPModel, paths: Sequence[Path], options: InputOptions, corrupt: list[tuple[Path, str]]
) -> Iterator[tuple[list[Path], Tensor]]:
    """Yield files with their pixel values (B, 3, H, W).

    Unless corrupt images are to be skipped, nothing is yielded past the first, but the others are still
    decoded, so that one error names them all.

    Args:
        model: Whose image processing is used.
        paths: The files, (N,).
        options: How.
        corrupt: Gets (file, why it cannot be decoded) of those left out.

    Raises:
        UserError: at the end: a corrupt image unless skipped, or no image that can be decoded.
    """
    any_good = False
    for start in range(0, len(paths), options.batch_size):
        chunk = paths[start : start + options.batch_size]
        read = list(_readable(model, chunk, corrupt))
        any_good = any_good or bool(read)
        if read and (options.skip_corrupt or not corrupt):
            yield [path for path, _ in read], torch.stack([pixels for _, pixels in read])
        options.report(start + len(chunk), len(paths))
    if corrupt and not (options.skip_corrupt and any_good):
        raise UserError(_corrupt_message(corrupt, all_of_them=not any_good))


@torch.no_grad()
def embed_texts(
    model: FederatedCLIPModel, texts: Sequence[str], options: InputOptions = DEFAULT_OPTIONS
) -> Tensor:
    """Embed texts, (N, D) float32 on the CPU, not normalised.

    Raises:
        UserError: a text is empty or not Unicode, there is none, or embeddings are not finite.
    """
    empty = [number for number, text in enumerate(texts, start=1) if not text.strip()]
    if empty or not texts:
        raise UserError(
            f"text {empty[0]} of {len(texts)} is empty; remove it" if empty else "there is no text"
        )
    check_unicode(texts, "the text")
    warn_of_cut(model.tokenize, texts, "texts")
    rows: list[Tensor] = []
    for start in range(0, len(texts), options.batch_size):
        chunk = list(texts[start : start + options.batch_size])
        rows.append(model.encode_text(chunk).cpu())
        options.report(start + len(chunk), len(texts))
    return check_finite(torch.cat(rows))


def read_texts(path: Path | str) -> list[str]:
    """Read a text file, one text a line, so that row i of the embeddings is line i + 1 of the file.

    Raises:
        UserError: no such file, not UTF-8, or an empty line.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{file}: no such file; give a text file with one text a line")
    try:
        text = file.read_text(encoding="utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error}); save it as UTF-8") from error
    if not text:
        raise UserError(f"{file} is empty; give one text a line")
    lines = [line.strip() for line in text.split("\n")]
    if "" in lines:
        raise UserError(f"{file}, line {lines.index('') + 1}: empty; every line must hold a text")
    return lines


def _readable(
    model: FederatedCLIPModel, paths: Sequence[Path], corrupt: list[tuple[Path, str]]
) -> Iterator[tuple[Path, Tensor]]:
    for path in paths:
        try:
            pixels = model.preprocess(load_image(path))
        except DECODE_ERRORS as error:
            corrupt.append((path, str(error) or type(error).__name__))
            continue
        yield path, pixels


def _corrupt_message(corrupt: Sequence[tuple[Path, str]], *, all_of_them: bool) -> str:
    listed = "; ".join(f"{path} ({error})" for path, error in corrupt[:MAX_NAMED])
    more = f"; and {len(corrupt) - MAX_NAMED} more" if len(corrupt) > MAX_NAMED else ""
    plural, them = ("image", "it") if len(corrupt) == 1 else ("images", "them")
    remedy = f"replace {them}" if all_of_them else f"replace or remove {them}, or pass --skip-corrupt"
    return f"{len(corrupt)} {plural} cannot be decoded: {listed}{more}; {remedy}"


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
