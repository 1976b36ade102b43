"""The commands for image folders, before a run: data check and data prepare.

``federated.cli`` registers them; the work is done by ``federated.data.folders``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from federated.commands.json_output import JsonOption, print_json
from federated.data.names import MAX_NAMED, listed, names_in
from models.errors import UserError
from models.progress import progress_bar
from models.untrusted import parse_yaml

if TYPE_CHECKING:
    from federated.data.folders import FolderReport
    from federated.data.question_check import QuestionReport
    from federated.data.table_check import TableReport

app = typer.Typer(
    help="Check and prepare folders of images, train/ val/ test/<class>/*.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def check(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="A folder of images, a csv file, or a data set in the hub's format."
        ),
    ],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Of the data source: data.options.skip_corrupt=true, data.options.label_column=kind …",
        ),
    ] = None,
    *,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Follow links and paths that leave the folder.")
    ] = False,
    model: Annotated[
        str,
        typer.Option("--model", help="For captions of a table: the model that reads them."),
    ] = "tiny",
    as_json: JsonOption = False,
) -> None:
    """Look at every image of a folder: structure, corrupt files, class balance, doubles across splits.

    Also of csv files, parquet files and what save_to_disk wrote: rows, images, captions or questions.

    The exit code is 0 if a run can use the data, and 2 if not.

    Example: fedlora data check my_images

    Example: fedlora data check my_images/all.csv data.options.caption_column=text

    Example: fedlora data check questions.csv data.options.image_dir=pictures
    """
    source = _kind_of(folder)
    if source != "imagefolder":
        given = _options_of(options or [], allow_outside=allow_outside and source == "csv")
        _check_table(folder, source, given, model, as_json=as_json)
        return
    from federated.data.folders import check_folder

    given = _options_of(options or [], allow_outside=allow_outside)
    skip_corrupt, allow_outside = (bool(given.pop(key, False)) for key in ("skip_corrupt", "allow_outside"))
    if given:
        raise UserError(
            f"{folder} is a folder of images, which has no option data.options.{next(iter(given))}; "
            "leave it out"
        )
    from federated.results.console import print_table
    from federated.tools.result_tables import class_table, double_table

    with progress_bar("images") as report_progress:
        report = check_folder(
            folder, skip_corrupt=skip_corrupt, allow_outside=allow_outside, report=report_progress
        )
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
    corrupt = [f"{path} cannot be decoded ({error})" for path, error in report.corrupt]
    if not report.usable:
        if corrupt and not skip_corrupt:
            corrupt[-1] += (
                "; replace or remove it, or pass data.options.skip_corrupt=true, here and to the run"
            )
        raise UserError(f"{folder} cannot be used:\n  " + "\n  ".join([*report.problems, *corrupt]))
    if corrupt and not as_json:
        typer.echo(f"left out: {listed(corrupt)}")
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
    train: Annotated[
        float | None, typer.Option("--train", help="Share of the training images; 0.8 if no share is given.")
    ] = None,
    val: Annotated[
        float | None, typer.Option("--val", help="Share of the validation images, 0 for none; else 0.1.")
    ] = None,
    test: Annotated[float | None, typer.Option("--test", help="Share of the test images; else 0.1.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Equal seeds give equal splits.")] = 0,
    link: Annotated[bool, typer.Option("--link", help="Make hard links instead of copies.")] = False,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Write through links, and follow those that leave FLAT.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make train/ val/ test/<class>/: empty, or from a folder that has one folder of images per class.

    Shares that are not given divide what is left in the proportion of their usual values.

    Example: fedlora data prepare my_images --classes "cat,dog"

    Example: fedlora data prepare my_images --from downloads --train 0.7
    """
    from federated.data.folders import completed_shares, prepare_folder
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
            ratios=completed_shares(train, val, test),
            seed=seed,
            link=link,
            allow_outside=allow_outside,
            report=report,
        )
    if as_json:
        print_json({"path": str(target), "counts": counts})
        return
    print_table(Console(), class_table(counts), f"Images in {target}")


def _kind_of(path: Path) -> str:
    """Return the data source that reads a path."""
    if path.is_file():
        return "csv"
    if any(any(path.glob(pattern)) for pattern in ("metrics.jsonl", "*/metrics.jsonl")):
        raise UserError(f"{path} holds runs and no data: give the folder or file that data.path names")
    if not path.is_dir() or any((path / "train").glob("*/")):
        return "imagefolder"
    if any(file.suffix.lower() in (".csv", ".tsv") for file in path.iterdir()):
        return "csv"
    from federated.data.table_check import is_hub_folder

    return "hub" if is_hub_folder(path) else "imagefolder"


def _options_of(given: Sequence[str], *, allow_outside: bool) -> dict[str, Any]:
    """Read ``data.options.KEY=VALUE`` arguments, with or without the first two words."""
    options: dict[str, Any] = {"allow_outside": True} if allow_outside else {}
    for argument in given:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"{argument!r} is no option: write data.options.KEY=VALUE")
        options[key.removeprefix("data.").removeprefix("options.")] = parse_yaml(value, argument)
    return options


def _check_table(path: Path, source: str, options: Mapping[str, Any], model: str, *, as_json: bool) -> None:
    """The check of rows: of csv files, or of a data set in the hub's format."""
    from federated.data.table_check import check_table
    from federated.results.console import print_table
    from federated.tools.result_tables import count_table
    from models.clip_loading import load_clip
    from models.prompts import warn_of_cut

    with progress_bar("images") as report_progress:
        report = check_table(path, source=source, options=options, report=report_progress)
    if as_json:
        print_json({"usable": True, "path": str(path), **asdict(report)})
        return
    print_table(Console(), count_table(report.counts), f"Rows in {path}")
    if report.leaks:
        groups = [" = ".join(map(str, group[:MAX_NAMED])) for group in report.leaks]
        typer.echo(f"in more than one split, so that test results would be too good: {listed(groups)}")
    _name_suspects(report)
    if report.questions is not None:
        _show_questions(report.questions)
    if report.captions:
        warn_of_cut(load_clip(model).tokenize, report.captions, "captions")
    typer.echo(f"{path} can be used")


def _show_questions(report: QuestionReport) -> None:
    """Frequent answers, lengths, doubles, and what answering without the picture reaches."""
    from federated.results.wording import format_percent

    shares = [f"{answer} {format_percent(count / report.num_rows)}" for answer, count in report.frequent]
    typer.echo(f"{report.num_answers} answers, the most frequent: {', '.join(shares)}")
    for what, (fewest, median, most) in report.words.items():
        typer.echo(f"words of a{'n' * (what == 'answer')} {what}: {fewest} to {most}, median {median}")
    if report.repeated:
        typer.echo(f"{len(report.repeated)} questions are there more than once: {listed(report.repeated)}")
    if report.contradicted:
        typer.echo(
            f"{len(report.contradicted)} questions are there more than once with other answers: "
            f"{listed(report.contradicted)}"
        )
    if report.unseen:
        typer.echo(f"{report.unseen} of {report.num_test} test answers are in no training row")
    shown = {name: format_percent(share) for name, share in report.without_picture.items()}
    typer.echo(
        f"without the picture, the most frequent answer is right in {shown['majority']} of the test rows, "
        f"and an answer chosen by the question's words in {shown['question_only']}"
    )


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
