"""Image folders on disk, ``train/ val/ test/<class>/*``: check them and prepare them."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from federated.config.seeding import generator
from federated.data.names import check_names, listed, shortened
from federated.data.sources.folder_scan import (
    SPLITS,
    content_hash,
    look_alike,
    look_at_all,
    of_one_colour,
    of_several_frames,
    scan_classes,
    scan_folder,
)
from models.errors import UserError
from models.progress import Report, quiet

logger = logging.getLogger(__name__)

MAX_NAME_BYTES = 255
"""Of a file or folder on the usual file systems."""


USUAL_SHARES = (0.8, 0.1, 0.1)
"""Of train, val and test in a folder that is split."""


@dataclass(frozen=True)
class FolderReport:
    """All that is known about an image folder before it is used.

    Attributes:
        path: the folder.
        counts: split -> class -> number of image files.
        problems: as in ``FolderScan``.
        corrupt: (file, why it cannot be decoded).
        same_content: groups of byte-identical files that lie in more than one split.
        same_pixels: groups of files in more than one split that decode to the same pixels, the
            byte-identical ones aside.
        ignored: files that are not images by their suffix or place.
        one_colour: images whose pixels are all of one colour.
        several_frames: images of which all frames but the first are not read.
        look_alike: groups of images that differ as files hold them and are equal as a model is shown them.
        skips_corrupt: whether corrupt images are left out; ``counts`` is then of the others.
    """

    path: Path
    counts: Mapping[str, Mapping[str, int]]
    problems: tuple[str, ...]
    corrupt: tuple[tuple[Path, str], ...]
    same_content: tuple[tuple[Path, ...], ...]
    same_pixels: tuple[tuple[Path, ...], ...]
    ignored: tuple[Path, ...]
    one_colour: tuple[Path, ...] = ()
    look_alike: tuple[tuple[Path, ...], ...] = ()
    several_frames: tuple[Path, ...] = ()
    skips_corrupt: bool = False

    @property
    def usable(self) -> bool:
        """Whether the ``imagefolder`` source takes the folder as it is."""
        return not self.problems and (self.skips_corrupt or not self.corrupt)

    @property
    def leaks(self) -> bool:
        """Whether an image lies in more than one split, so that test results would be too good."""
        return bool(self.same_content or self.same_pixels)

    def imbalance(self, split: str = "train") -> float:
        """Size of the largest class over that of the smallest; infinite with an empty class."""
        counts = list(self.counts.get(split, {}).values())
        if not counts or min(counts) == 0:
            return float("inf")
        return max(counts) / min(counts)


def check_folder(
    path: Path | str, *, skip_corrupt: bool = False, allow_outside: bool = False, report: Report = quiet
) -> FolderReport:
    """Look at every file of an image folder: structure, corrupt images, balance, leaks between splits.

    Args:
        path: a folder with ``train/<class>/*``, ``test/<class>/*`` and, if wanted, ``val/<class>/*``.
        skip_corrupt: take a folder with corrupt images, without them, as the source's option does.
        allow_outside: follow links that leave the folder, as the source's option of that name does.
        report: told about the progress, after each image.

    Returns:
        The report; nothing is changed and nothing raised about what is in the folder.

    Raises:
        UserError: the path is no folder.
    """
    root = Path(path)
    scan = scan_folder(root, allow_outside=allow_outside)
    corrupt: list[tuple[Path, str]] = []
    by_content: dict[str, list[Path]] = defaultdict(list)
    images = [file for classes in scan.files.values() for files in classes.values() for file in files]
    for image in images:
        by_content[content_hash(image)].append(image)
    looks = look_at_all(images, corrupt, report)
    by_pixels: dict[str, list[Path]] = defaultdict(list)
    for image, look in looks.items():
        by_pixels[look.shown].append(image)
    same_content = _across_splits(by_content, root)
    known = set(same_content)
    left_out = {file for file, _ in corrupt} if skip_corrupt else set()
    emptied = [
        f"class folder {root / split / name} has no image that can be decoded"
        for split, classes in scan.files.items()
        for name, files in classes.items()
        if files and left_out.issuperset(files)
    ]
    return FolderReport(
        path=root,
        counts={
            split: {name: sum(file not in left_out for file in files) for name, files in classes.items()}
            for split, classes in scan.files.items()
        },
        problems=(*scan.problems, *emptied),
        corrupt=tuple(corrupt),
        same_content=same_content,
        same_pixels=tuple(group for group in _across_splits(by_pixels, root) if group not in known),
        ignored=scan.ignored,
        one_colour=of_one_colour(looks),
        look_alike=look_alike(looks),
        several_frames=of_several_frames(looks),
        skips_corrupt=skip_corrupt,
    )


def prepare_folder(
    target: Path | str,
    *,
    class_names: Sequence[str] | None = None,
    source: Path | str | None = None,
    ratios: tuple[float, float, float] = USUAL_SHARES,
    seed: int = 0,
    link: bool = False,
    allow_outside: bool = False,
    report: Report = quiet,
) -> dict[str, dict[str, int]]:
    """Make an image folder: empty class folders to fill, or a split of a flat ``<class>/*`` folder.

    The split is drawn class by class with the seed; byte-identical files stay in one split, so the result
    has no leaks of that kind. Nothing is ever overwritten or moved.

    Args:
        target: the folder to make ``train/``, ``val/`` and ``test/`` in.
        class_names: for a skeleton: the classes.
        source: for a split: a folder with one folder of images per class.
        ratios: shares of train, val and test; a share of 0 leaves that split out.
        seed: the same seed gives the same split.
        link: make hard links instead of copies (same file system only).
        allow_outside: write through links in ``target``, and follow those that leave ``source``.
        report: told about the progress, after each file.

    Returns:
        split -> class -> number of files placed.

    Raises:
        UserError: neither or both of ``class_names`` and ``source``; bad names or ratios; a class with too
            few images for the splits; images of ``source`` that would not be read; a target folder that is a
            link; a file that exists already or cannot be linked.
    """
    if (class_names is None) == (source is None):
        raise UserError("give either class_names (an empty skeleton) or source (a flat folder to split)")
    root = Path(target)
    if source is None:
        return _make_skeleton(root, tuple(class_names or ()), allow_outside=allow_outside)
    shares = dict(zip(SPLITS, ratios, strict=True))
    if min(ratios) < 0 or abs(sum(ratios) - 1) > 1e-6 or shares["train"] == 0 or shares["test"] == 0:
        raise UserError(
            f"the shares {', '.join(f'{share:g}' for share in ratios)} of train, val and test must sum to 1, "
            "and only that of val may be 0"
        )
    plan: list[tuple[Path, Path]] = []
    counts: dict[str, dict[str, int]] = {split: {} for split in SPLITS if shares[split] > 0}
    flat = _existing_folder(Path(source)).resolve()
    scan = scan_classes(flat, None if allow_outside else flat)
    if not scan.classes:
        raise UserError(f"{source} has no class folders; it must hold <class>/*")
    if scan.problems:
        raise UserError("; ".join(scan.problems))
    if scan.ignored:
        logger.warning("%d files in %s are not taken: %s", len(scan.ignored), source, listed(scan.ignored))
    for number, (name, images) in enumerate(scan.classes.items()):
        for split, chosen in _split_class(
            images, shares, generator(seed, "folder split", number), name
        ).items():
            counts[split][name] = len(chosen)
            plan.extend((image, root / split / image.relative_to(flat)) for image in chosen)
    if not allow_outside:
        _refuse_links(root, {place.parent for _, place in plan})
    _place(plan, link=link, report=report)
    return counts


def completed_shares(
    train: float | None, val: float | None, test: float | None
) -> tuple[float, float, float]:
    """Return the shares of train, val and test: what is not given divides the rest as ``USUAL_SHARES`` do."""
    given = (train, val, test)
    rest = 1 - sum(share for share in given if share is not None)
    usual = sum(share for share, said in zip(USUAL_SHARES, given, strict=True) if said is None)
    first, second, third = (
        rest * share / usual if said is None else said
        for share, said in zip(USUAL_SHARES, given, strict=True)
    )
    return first, second, third


def _across_splits(groups: Mapping[str, list[Path]], root: Path) -> tuple[tuple[Path, ...], ...]:
    return tuple(
        tuple(files)
        for files in groups.values()
        if len({file.relative_to(root).parts[0] for file in files}) > 1
    )


def _existing_folder(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"{path} is no folder; give one that holds <class>/*")
    return path


def _refuse_links(root: Path, places: Iterable[Path]) -> None:
    """Files go into the folders that were named, not to where a link in one of them leads."""
    folders = {root} | {
        folder for place in places for folder in (place, *place.parents) if root in folder.parents
    }
    for folder in sorted(folders):
        if folder.is_symlink():
            raise UserError(
                f"{folder} is a link to {folder.resolve()}; name that folder itself as the target, or pass "
                "--allow-outside to write through links"
            )


def _make_skeleton(
    root: Path, class_names: tuple[str, ...], *, allow_outside: bool
) -> dict[str, dict[str, int]]:
    bad = [name for name in class_names if not name or name.startswith(".") or Path(name).name != name]
    if not class_names or bad or len(set(class_names)) != len(class_names):
        raise UserError(f"class names must be distinct plain folder names; got {list(class_names)}")
    check_names(class_names, "--classes")
    long = [name for name in class_names if len(os.fsencode(name)) > MAX_NAME_BYTES]
    if long:
        raise UserError(f"class name {shortened(long[0])} is longer than a folder's name may be; shorten it")
    if not allow_outside:
        _refuse_links(root, (root / split / name for split in SPLITS for name in class_names))
    made: list[Path] = []
    try:
        for split in SPLITS:
            for name in class_names:
                _make_folders(root / split / name, made)
    except OSError as error:
        _take_away(made)
        raise UserError(f"cannot make {root} ({error}); choose another target folder") from error
    return {split: dict.fromkeys(class_names, 0) for split in SPLITS}


def _split_class(
    images: tuple[Path, ...], shares: Mapping[str, float], rng: np.random.Generator, name: str
) -> dict[str, list[Path]]:
    """Divide one class's files; every split gets at least one distinct image."""
    hashes = [content_hash(image) for image in images]
    wanted = [split for split, share in shares.items() if share > 0]
    if len(set(hashes)) < len(wanted):
        raise UserError(
            f"class {name!r} has {len(set(hashes))} distinct images, too few for {len(wanted)} splits; "
            "add images, remove the class, or set the share of val to 0"
        )
    _, first, group_of = np.unique(hashes, return_index=True, return_inverse=True)
    order = rng.permutation(len(first))
    sizes = {split: max(1, round(shares[split] * len(first))) for split in wanted if split != "train"}
    while sum(sizes.values()) >= len(first):  # rounding up small shares must leave training one image
        sizes[max(sizes, key=lambda split: sizes[split])] -= 1
    chosen: dict[str, list[Path]] = {}
    start = 0
    for split in wanted:
        stop = start + sizes.get(split, len(first) - sum(sizes.values()))
        rows = np.flatnonzero(np.isin(group_of, order[start:stop]))
        chosen[split] = [images[row] for row in rows]
        start = stop
    return chosen


def _place(plan: Sequence[tuple[Path, Path]], *, link: bool, report: Report) -> None:
    """Copy or link every file, or none: what was made before a failure is taken away again."""
    for _, target in plan:
        if os.path.lexists(target):
            raise UserError(f"{target} exists already and is not overwritten; choose another target folder")
    made: list[Path] = []
    try:
        for number, (source, target) in enumerate(plan, start=1):
            _make_folders(target.parent, made)
            made.append(target)
            # A hard link to a link would lead astray from its new place.
            os.link(source.resolve(), target) if link else shutil.copy2(source, target)
            report(number, len(plan))
    except OSError as error:
        _take_away(made)
        remedy = "copy instead (link off)" if link else "make room, or choose another target folder"
        raise UserError(
            f"cannot {'link' if link else 'copy'} {source} to {target} ({error}); nothing is left behind: "
            f"{remedy}"
        ) from error
    except BaseException:  # Ctrl-C: half a folder would look like a whole one
        _take_away(made)
        raise


def _make_folders(folder: Path, made: list[Path]) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    made.extend(reversed(missing))
    folder.mkdir(parents=True, exist_ok=True)


def _take_away(made: Sequence[Path]) -> None:
    """Remove files and folders in the reverse order of their making."""
    for path in reversed(made):
        with contextlib.suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
