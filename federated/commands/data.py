"""The commands for image folders, before a run: data check and data prepare.

``federated.cli`` registers them; the work is done by ``federated.data.folders``.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from federated.commands.json_output import JsonOption, print_json
from federated.data.names import MAX_NAMED, listed, names_in
from models.errors import UserError
from models.progress import progress_bar

if TYPE_CHECKING:
    from federated.data.folders import FolderReport
    from federated.data.table_check import TableReport

app = typer.Typer(
    help="Check and prepare folders of images, train/ val/ test/<class>/*.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def check(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Holds train/, test/ and maybe val/; or a csv file.")
    ],
    *,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Follow links and paths that leave the folder.")
    ] = False,
    model: Annotated[
        str,
        typer.Option("--model", help="For captions of a csv file: the model that reads them."),
    ] = "tiny",
    as_json: JsonOption = False,
) -> None:
    """Look at every image of a folder: structure, corrupt files, class balance, doubles across splits.

    A csv file, or a folder of them, is looked at likewise: rows, images, captions.
    Ends with exit code 0 if a run can use the folder, and with 2 if not.

    Example: fedlora data check my_images

    Example: fedlora data check my_images/all.csv --model openai/clip-vit-base-patch32
    """
    is_table = folder.is_dir() and not (folder / "train").is_dir() and any(folder.glob("*.csv"))
    if folder.is_file() or is_table:
        _check_table(folder, model, allow_outside=allow_outside, as_json=as_json)
        return
    from federated.data.folders import check_folder
    from federated.results.console import print_table
    from federated.tools.result_tables import class_table, double_table

    with progress_bar("images") as report_progress:
        report = check_folder(folder, allow_outside=allow_outside, report=report_progress)
    if as_json:
        print_json({"usable": report.usable, **asdict(report)})
    else:
        console = Console()
        if report.counts:
            print_table(console, class_table(report.counts), f"Images in {folder}")
        if report.leaks:
            title = "In more than one split: test results would be too good"
            print_table(console, double_table(report), title)
        if report.ignored:
            shown = listed(report.ignored)
            typer.echo(f"not images by their suffix or place, and ignored: {shown}")
        _name_suspects(report)
    if not report.usable:
        corrupt = [f"{path} cannot be decoded ({error})" for path, error in report.corrupt]
        raise UserError(f"{folder} cannot be used:\n  " + "\n  ".join([*report.problems, *corrupt]))
    if not as_json:
        typer.echo(f"{folder} can be used; {_balance(report.imbalance())}")


@app.command()
def prepare(  # noqa: PLR0913 - the command's options
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The folder to make.")],
    *,
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes",
            metavar="A,B",
            help="Make empty folders for these classes; quote a comma: '\"a, b\",c'.",
        ),
    ] = None,
    flat: Annotated[
        Path | None, typer.Option("--from", metavar="FLAT", help="Split a folder that holds <class>/*.")
    ] = None,
    train: Annotated[float, typer.Option("--train", help="Share of the training images.")] = 0.8,
    val: Annotated[float, typer.Option("--val", help="Share of the validation images; 0 for none.")] = 0.1,
    test: Annotated[float, typer.Option("--test", help="Share of the test images.")] = 0.1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Equal seeds give equal splits.")] = 0,
    link: Annotated[bool, typer.Option("--link", help="Make hard links instead of copies.")] = False,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Write through links, and follow those that leave FLAT.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make train/ val/ test/<class>/: empty, or from a folder that has one folder of images per class.

    Example: fedlora data prepare my_images --classes "cat,dog"

    Example: fedlora data prepare my_images --from downloads --train 0.7 --val 0.1 --test 0.2
    """
    from federated.data.folders import prepare_folder
    from federated.results.console import print_table
    from federated.results.run_place import check_place
    from federated.tools.result_tables import class_table

    check_place(target, "name another TARGET")
    if (classes is None) == (flat is None):
        raise UserError(
            "give either --classes A,B (empty folders to fill) or --from FLAT (a folder to split)"
        )
    names = None if classes is None else names_in(classes)
    for name in names or ():
        check_place(target / name, "give --classes other names")
    with progress_bar("images") as report:
        counts = prepare_folder(
            target,
            class_names=names,
            source=flat,
            ratios=(train, val, test),
            seed=seed,
            link=link,
            allow_outside=allow_outside,
            report=report,
        )
    if as_json:
        print_json({"path": str(target), "counts": counts})
        return
    print_table(Console(), class_table(counts), f"Images in {target}")


def _check_table(path: Path, model: str, *, allow_outside: bool, as_json: bool) -> None:
    """The check of a csv file, or of a folder of them."""
    from federated.data.table_check import check_table
    from federated.results.console import print_table
    from federated.tools.result_tables import count_table
    from models.clip_loading import load_clip
    from models.prompts import warn_of_cut

    with progress_bar("images") as report_progress:
        report = check_table(path, allow_outside=allow_outside, report=report_progress)
    if as_json:
        print_json({"usable": True, "path": str(path), **asdict(report)})
        return
    print_table(Console(), count_table(report.counts), f"Rows in {path}")
    if report.leaks:
        groups = [" = ".join(map(str, group[:MAX_NAMED])) for group in report.leaks]
        typer.echo(f"in more than one split, so that test results would be too good: {listed(groups)}")
    _name_suspects(report)
    if report.captions:
        warn_of_cut(load_clip(model).tokenize, report.captions, "captions")
    typer.echo(f"{path} can be used")


def _name_suspects(report: FolderReport | TableReport) -> None:
    """Name images that say little, the same as others, or more than is read."""
    if report.one_colour:
        typer.echo(f"{len(report.one_colour)} images are of one colour: {listed(report.one_colour)}")
    if frames := report.several_frames:
        typer.echo(f"{len(frames)} images have several frames, of which the first is read: {listed(frames)}")
    if report.look_alike:
        groups = [" = ".join(map(str, group[:MAX_NAMED])) for group in report.look_alike]
        typer.echo(f"images that differ as files and are equal as a model is shown them: {listed(groups)}")


def _balance(imbalance: float) -> str:
    if imbalance == 1:
        return "all classes have the same number of training images"
    return f"the largest class has {imbalance:.3g} times the training images of the smallest"
