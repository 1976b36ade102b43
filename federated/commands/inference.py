"""The commands that use what runs left behind: predict, encode, search, compare.

``federated.cli`` registers them; each reads its arguments, calls one function of the package and prints.
Results go to standard output, progress and remarks to standard error.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from federated.commands.importing import PluginsOption, Precision, modules_that_stay
from federated.commands.json_output import JsonOption, print_json
from federated.config.plugins import load_plugins
from federated.data.names import listed, names_in
from models.errors import UserError, printable
from models.progress import progress_bar

if TYPE_CHECKING:
    from federated.results.tables import TextTable
    from federated.tools.trained_models import OpenedModel


class Format(StrEnum):
    """How results are written."""

    table = "table"
    csv = "csv"
    json = "json"
    text = "text"


InputsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="[RUN|ADAPTER|MODEL] INPUT",
        help="What to use, then what to use it on. With --model the first may be left out.",
        show_default=False,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Base model: tiny, a hub name, a folder, or open_clip:<architecture>."),
]
AdapterOption = Annotated[
    str | None, typer.Option("--adapter", metavar="FOLDER", help="Adapter to put on a model given by name.")
]
AnyBaseOption = Annotated[
    bool,
    typer.Option("--any-base", help="Use an adapter on a base model that is not known to be its own."),
]
DeviceOption = Annotated[str, typer.Option("--device", help="Where the model runs: cpu, cuda, cuda:1 …")]
BatchSizeOption = Annotated[
    int, typer.Option("--batch-size", min=1, help="Images or texts that pass through the model at once.")
]
PrecisionOption = Annotated[
    Precision, typer.Option("--precision", help="Of the forward passes: bf16 and fp16 are half (autocast).")
]
SkipCorruptOption = Annotated[
    bool, typer.Option("--skip-corrupt", help="Leave out images that cannot be decoded, and name them.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace a file of the same name.")]
FormatOption = Annotated[
    Format | None,
    typer.Option("--format", help="By default csv, json or text by --output's suffix, otherwise a table."),
]


def predict(  # noqa: PLR0913 - the command's options
    inputs: InputsArgument,
    *,
    question: Annotated[
        str | None, typer.Option("--question", help="Ask a run of vqa about the image.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option("--image", help="The image that --question asks about.")
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Classes to show for each image.")] = 5,
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes",
            metavar="A,B,C",
            help="Classify by prompts for these classes instead; quote a comma: '\"a, b\",c'.",
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option("--template", help="Prompt with {} for the class; repeat for several."),
    ] = None,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    any_base: AnyBaseOption = False,
    output: Annotated[Path | None, typer.Option("--output", help="Write a .csv, .json or .txt file.")] = None,
    output_format: FormatOption = None,
    as_json: JsonOption = False,
    overwrite: OverwriteOption = False,
    skip_corrupt: SkipCorruptOption = False,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "cpu",
    precision: PrecisionOption = Precision.fp32,
    plugin: PluginsOption = None,
) -> None:
    """Classify an image, or all images of a folder, with a run's model or class prompts; or ask a question.

    Example: fedlora predict runs/quickstart photos --top-k 3

    Example: fedlora predict runs/easy_vqa --image photos/1.png --question "what color is the shape?"

    Example: fedlora predict --model tiny --classes "boots,a bag" photos/1.png
    """
    with modules_that_stay():
        from federated.tools.embeddings import InputOptions
        from federated.tools.output_files import check_output
        from federated.tools.prediction import make_classifier
        from federated.tools.prediction import predict as predict_images
        from federated.tools.result_tables import prediction_records, prediction_table

        load_plugins(plugin or ())
    if question is not None or image is not None:
        given = {"--output": output, "--format": output_format, "--classes": classes, "--template": template}
        given |= {"--model": model, "--adapter": adapter}
        if unread := [name for name, value in given.items() if value is not None]:
            raise UserError(f"a question takes no {listed(unread)}: leave it out")
        _ask(inputs, image, question, device, any_base=any_base, as_json=as_json)
        return
    chosen = _format(Format.json if as_json else output_format, output)
    if output is not None:
        check_output(output, overwrite=overwrite)
    source, path = _source_and_input(inputs, model)
    names = None if classes is None else names_in(classes)
    opened = _open(source, adapter, model, device, any_base=any_base)
    opened.model.precision = precision.value
    classifier = make_classifier(opened, names, template)
    with progress_bar("images") as report:
        options = InputOptions(batch_size, skip_corrupt, report)
        found = predict_images(opened, path, classifier, top_k=top_k, options=options)
    _name_corrupt([str(file) for file, _ in found.corrupt])
    title = f"Predictions by {found.method}"
    _deliver(chosen, prediction_records(found), prediction_table(found), title, output)


def _ask(
    inputs: Sequence[str],
    image: Path | None,
    question: str | None,
    device: str,
    *,
    any_base: bool,
    as_json: bool,
) -> None:
    from federated.tools.prediction import answer_question

    given = [*inputs[1:], *([] if image is None else [str(image)])]
    if question is None or len(given) != 1:
        raise UserError('give a run, one image and a question: RUN --image FILE --question "..."')
    answer = answer_question(inputs[0], given[0], question, device=device, any_base=any_base)
    if as_json:
        print_json({"image": given[0], "question": question, "answer": answer})
    else:
        typer.echo(answer)


def encode(  # noqa: PLR0913 - the command's options
    inputs: InputsArgument,
    *,
    output: Annotated[
        Path | None, typer.Option("--output", help="File ending in .safetensors or .npy.", show_default=False)
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="INPUT is a text file, one text a line.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Keep the rows' lengths instead of making them 1.")
    ] = False,
    patches: Annotated[
        bool,
        typer.Option("--patches", help="Write features of image patches (N, T, D), as language models read."),
    ] = False,
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="Print the mean cosine with the base model's embeddings.")
    ] = False,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    any_base: AnyBaseOption = False,
    overwrite: OverwriteOption = False,
    skip_corrupt: SkipCorruptOption = False,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "cpu",
    precision: PrecisionOption = Precision.fp32,
    plugin: PluginsOption = None,
) -> None:
    """Write the embeddings of a folder of images, or of the lines of a text file, and a manifest beside them.

    Example: fedlora encode runs/quickstart photos --output photos.safetensors

    Example: fedlora encode tiny captions.txt --text --output captions.npy
    """
    with modules_that_stay():
        from federated.tools.embedding_files import check_array_output, encode_to_file
        from federated.tools.embeddings import InputOptions, check_no_texts
        from federated.tools.prediction import compare_with_base

        load_plugins(plugin or ())
    if output is None and not compare_base:
        raise UserError("name the file to write with --output FILE.safetensors (or .npy)")
    if text and patches:
        raise UserError("--patches goes with images, not with --text")
    if output is not None:
        check_array_output(output, overwrite=overwrite)
    source, path = _source_and_input(inputs, model)
    if not text:
        check_no_texts(path)
    opened = _open(source, adapter, model, device, any_base=any_base)
    opened.model.precision = precision.value
    kind = "texts" if text else "images"
    if output is not None:
        with progress_bar(kind) as report:
            options = InputOptions(batch_size, skip_corrupt, report, patches)
            manifest = encode_to_file(
                opened, path, output, texts=text, normalised=not raw, overwrite=overwrite, options=options
            )
        _name_corrupt(manifest.corrupt)
        typer.echo(f"{len(manifest.rows)} {kind}, {manifest.dimension} dimensions: {output}")
    if compare_base:
        with progress_bar("both models") as report:
            options = InputOptions(batch_size, skip_corrupt, report)
            moved = compare_with_base(opened, path, texts=text, options=options)
        typer.echo(
            f"cosine with the base model over {moved.num_rows} {kind}: "
            f"mean {moved.mean:.6f}, least {moved.least:.6f}"
        )


def search(  # noqa: PLR0913 - the command's options
    index: Annotated[str, typer.Argument(metavar="INDEX", help="A file that `fedlora encode` wrote.")],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="A text, or with --image an image file.")],
    *,
    image: Annotated[bool, typer.Option("--image", help="QUERY is an image file.")] = False,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Rows to show.")] = 10,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Run or model that made INDEX, if it is not where it was then."),
    ] = None,
    adapter: AdapterOption = None,
    output: Annotated[Path | None, typer.Option("--output", help="Write a .csv or .json file.")] = None,
    output_format: FormatOption = None,
    as_json: JsonOption = False,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "cpu",
    plugin: PluginsOption = None,
) -> None:
    """Find the images (or texts) of an encoded folder that are most like a text or an image.

    Example: fedlora search photos.safetensors "a red bag" --top-k 3

    Example: fedlora search photos.safetensors photos/1.png --image --output hits.csv
    """
    with modules_that_stay():
        from federated.tools.embedding_files import read_index
        from federated.tools.output_files import check_output
        from federated.tools.result_tables import hit_records, hit_table
        from federated.tools.search import open_query_model
        from federated.tools.search import search as search_index

        load_plugins(plugin or ())
    chosen = _format(Format.json if as_json else output_format, output)
    if output is not None:
        check_output(output, overwrite=overwrite)
    found = read_index(index)
    opened = open_query_model(found, model, adapter=adapter, device=device)
    hits = search_index(found, opened, query, image=image, top_k=top_k)
    title = f"Most like {query}"
    _deliver(chosen, hit_records(found, hits), hit_table(found, hits), title, output)


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.", show_default=False)],
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FOLDER", help="Write comparison.md, .json, .csv and .png there."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", help="Value of the metric that the rounds and MB to reach refer to: 0.65, or 65%."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Put runs side by side: what each reached, and the bytes it sent for it.

    A folder that is no run is left out and named; the command then ends with exit code 1.

    Example: fedlora compare runs/quickstart runs/full_finetune --output comparison

    Example: fedlora compare runs/quickstart runs/head_only --target 65%
    """
    from federated.results.compare import compare_runs, terminal_tables, write_comparison
    from federated.results.console import print_note, print_table
    from federated.results.run_place import check_place

    if output is not None:
        check_place(output, "name another folder with --output")
    if output is not None and output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; --output takes a folder")
    comparison = compare_runs(runs, target=target)
    written = None if output is None else write_comparison(comparison, output)
    if as_json:
        rows = [row.record for row in comparison.rows]
        print_json({"runs": rows, "notes": comparison.notes, "left_out": comparison.left_out})
    else:
        console = Console()
        for title, table in terminal_tables(comparison.rows).items():
            print_table(console, table, title)
        for note in comparison.notes:
            print_note(console, note)
        if written is not None:
            typer.echo(f"written: {written}")
    for reason in comparison.left_out:
        typer.echo(f"left out: {printable(reason)}", err=True)
    if comparison.left_out:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add the commands of this file to the application."""
    for command in (predict, encode, search, compare):
        app.command()(command)


def _source_and_input(inputs: Sequence[str], model: str | None) -> tuple[str, str]:
    """What to open and what to use it on; ``--model`` alone stands for the first."""
    if len(inputs) > 2:
        raise UserError(f"{len(inputs)} arguments given; give one model and one image, folder or file")
    if len(inputs) == 2:
        return inputs[0], inputs[1]
    if model is None:
        raise UserError(
            f"only {inputs[0]} is given; give what to use and what to use it on: RUN INPUT, "
            "ADAPTER INPUT, or --model NAME INPUT"
        )
    return model, inputs[0]


def _open(source: str, adapter: str | None, model: str | None, device: str, *, any_base: bool) -> OpenedModel:
    from federated.tools.trained_models import open_model

    base_model = None if source == model else model
    return open_model(source, adapter=adapter, base_model=base_model, device=device, any_base=any_base)


def _format(chosen: Format | None, output: Path | None) -> Format:
    """The format asked for, or the one that the output's suffix says; a table is for the terminal."""
    by_suffix = {".csv": Format.csv, ".json": Format.json, ".txt": Format.text}
    if output is None:
        return chosen or Format.table
    if chosen is None and output.suffix not in by_suffix:
        raise UserError(
            f"{output}: say --format csv, json or text, or give a name that ends in .csv, .json or .txt"
        )
    if chosen is Format.table:
        raise UserError("a table goes to the terminal; write a file with --format csv or json")
    return chosen or by_suffix[output.suffix]


def _deliver(
    chosen: Format, records: Sequence[dict[str, Any]], table: TextTable, title: str, output: Path | None
) -> None:
    """Print the results, or write them to a file."""
    from federated.results.console import print_table
    from federated.tools.result_tables import records_to_csv, records_to_json, records_to_text
    from models.files import write_text

    if chosen is Format.table:
        print_table(Console(), table, title)
        return
    writers = {Format.json: records_to_json, Format.csv: records_to_csv, Format.text: records_to_text}
    text = writers[chosen](records)
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_text(output, text)
        typer.echo(f"written: {output}")


def _name_corrupt(files: Sequence[str]) -> None:
    if files:
        typer.echo(f"left out {len(files)} that cannot be decoded: {', '.join(files)}", err=True)
