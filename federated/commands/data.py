"""The commands for image folders, before a run: data check and data prepare.

``federated.cli`` registers them; the work is done by ``federated.data.folders``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from federated.progress import progress_bar
from models.errors import UserError

app = typer.Typer(
    help="Check and prepare folders of images, train/ val/ test/<class>/*.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


MAX_IGNORED_SHOWN = 5
"""Files named that are no images."""


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Holds train/, test/ and maybe val/.")],
) -> None:
    """Look at every image of a folder: structure, corrupt files, class balance, doubles across splits.

    Ends with exit code 0 if a run can use the folder, and with 2 if not.

    Example: fedlora data check my_images
    """
    from federated.data.folders import check_folder
    from federated.reporting.console import print_table
    from federated.standalone.result_tables import class_table, double_table

    with progress_bar("images") as report_progress:
        report = check_folder(folder, report=report_progress)
    console = Console()
    if report.counts:
        print_table(console, class_table(report.counts), f"Images in {folder}")
    if report.leaks:
        print_table(console, double_table(report), "In more than one split: test results would be too good")
    if report.ignored:
        shown = [str(path) for path in report.ignored[:MAX_IGNORED_SHOWN]]
        more = len(report.ignored) - len(shown)
        shown += [f"and {more} more"] if more else []
        typer.echo(f"not images by their suffix, and ignored: {', '.join(shown)}")
    if not report.usable:
        corrupt = [f"{path} cannot be decoded ({error})" for path, error in report.corrupt]
        raise UserError(f"{folder} cannot be used:\n  " + "\n  ".join([*report.problems, *corrupt]))
    typer.echo(f"{folder} can be used; {_balance(report.imbalance())}")


@app.command()
def prepare(
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The folder to make.")],
    *,
    classes: Annotated[
        str | None, typer.Option("--classes", metavar="A,B", help="Make empty folders for these classes.")
    ] = None,
    flat: Annotated[
        Path | None, typer.Option("--from", metavar="FLAT", help="Split a folder that holds <class>/*.")
    ] = None,
    train: Annotated[float, typer.Option("--train", help="Share of the training images.")] = 0.8,
    val: Annotated[float, typer.Option("--val", help="Share of the validation images; 0 for none.")] = 0.1,
    test: Annotated[float, typer.Option("--test", help="Share of the test images.")] = 0.1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Equal seeds give equal splits.")] = 0,
    link: Annotated[bool, typer.Option("--link", help="Make hard links instead of copies.")] = False,
) -> None:
    """Make train/ val/ test/<class>/: empty, or from a folder that has one folder of images per class.

    Example: fedlora data prepare my_images --classes "cat,dog"

    Example: fedlora data prepare my_images --from downloads --train 0.7 --val 0.1 --test 0.2
    """
    from federated.data.folders import prepare_folder
    from federated.reporting.console import print_table
    from federated.run_place import check_place
    from federated.standalone.result_tables import class_table

    check_place(target, "name another TARGET")
    if (classes is None) == (flat is None):
        raise UserError(
            "give either --classes A,B (empty folders to fill) or --from FLAT (a folder to split)"
        )
    names = None if classes is None else [name.strip() for name in classes.split(",")]
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
            report=report,
        )
    print_table(Console(), class_table(counts), f"Images in {target}")


def _balance(imbalance: float) -> str:
    if imbalance == 1:
        return "all classes have the same number of training images"
    return f"the largest class has {imbalance:.3g} times the training images of the smallest"
