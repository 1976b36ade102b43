"""A second model family, `examples/own_model.py`: it runs, is evaluated, saved and loaded as CLIP is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

from federated import load_plugins, open_run
from federated.cli import main
from federated.config.config_files import load_config
from federated.config.schema import ADAPTED, MODEL_FAMILIES, ExperimentConfig
from federated.engines.simulation import run_experiment
from federated.methods import AGGREGATORS
from federated.results.records import read_run
from federated.results.report_cards import subtitle
from federated.rounds.batches import evaluate_server, local_batches
from federated.rounds.families import FAMILIES, ModelFamily, register_model_family
from federated.rounds.learnable import check_can_score
from federated.rounds.run import build_run
from lora.loading import load_lora_adapters
from models.errors import UserError
from models.tasks import TASKS, Task, classification_task, register_task
from tests.command import fedlora, forget_plugins

EXAMPLES = Path(__file__).parents[1] / "examples"
PLUGIN, CONFIG = EXAMPLES / "own_model.py", str(EXAMPLES / "own_model.yaml")
SHORT = (
    *("federation.rounds=2", "partition.num_clients=3", "client.local_steps=2", "client.batch_size=8"),
    *(
        "partition.name=iid",
        "partition.options={}",
        "partition.local_test_fraction=0.2",
        "output.report=false",
    ),
)
SMALL_CLIP = ("data.max_train_samples=60", "data.max_test_samples=10", "lora.r=4")
METHODS = sorted(AGGREGATORS)
CODECS = ("fp32", "int8", "topk:0.25:ef+int8")
VARIANTS = {
    "plain": [],
    "scaffold": ["client.scaffold=true"],
    "fedprox": ["client.proximal_mu=0.1"],
    "mixed ranks": ["client.ranks=[1,2,4]"],
    "fedadam": ["aggregation.server_optimizer={name: fedadam}"],
}


@pytest.fixture(autouse=True)
def with_plugin() -> Iterator[None]:
    load_plugins([PLUGIN])
    yield
    forget_plugins()


def run_short(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Run two short rounds; return the lines of metrics, without times."""
    config = load_config(CONFIG, [*SHORT, f"output.root={folder}", "output.name=run", *overrides])
    path = run_experiment(config, overwrite=True)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds")
    return lines


def assert_learnt(lines: list[dict[str, Any]]) -> None:
    """Every client trained in every round, and the model of the last is another than before."""
    assert [len(line["clients"]) for line in lines[1:]] == [3, 3]
    assert not [line for line in lines if line["failed"] or line.get("skipped")]
    last = lines[-1]["loss"] if "loss" in lines[-1] else lines[-1]["clients"]["0"]["eval_loss"]
    assert np.isfinite(last)
    assert last != lines[0]["loss"]


# ---- every method


@pytest.mark.parametrize("method", METHODS)
def test_every_aggregation_method_trains_it(method: str, tmp_path: Path) -> None:
    assert_learnt(run_short(tmp_path, f"aggregation.name={method}"))


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("codec", CODECS)
def test_codecs_and_additions_train_it(codec: str, variant: str, tmp_path: Path) -> None:
    method = "fedavg"
    if variant == "mixed ranks":
        method, codec = "hetlora", codec.replace(":ef", "")  # whose factors change their meaning
    overrides = [f"aggregation.name={method}", f"communication.uplink={codec}", *VARIANTS[variant]]
    assert_learnt(run_short(tmp_path, *overrides))


@pytest.mark.slow
@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_it_or_refuses_by_name_what_does_not_go_with_it(
    method: str, codec: str, variant: str, tmp_path: Path
) -> None:
    overrides = [f"aggregation.name={method}", f"communication.uplink={codec}", *VARIANTS[variant]]
    try:
        build_run(load_config(CONFIG, [*SHORT, *overrides]))
    except UserError as error:
        refused = str(error)
    else:
        assert_learnt(run_short(tmp_path, *overrides))
        return
    assert variant != "plain" or codec != "fp32"
    with pytest.raises(UserError) as of_clip:
        build_run(load_config("quickstart", [*SHORT, *SMALL_CLIP, *overrides]))
    assert str(of_clip.value) == refused


@pytest.mark.parametrize("method", ["fedavg", "fedex"])
def test_two_workers_compute_what_one_process_computes(method: str, tmp_path: Path) -> None:
    here, shared = (
        run_short(tmp_path, f"aggregation.name={method}", f"engine.workers={number}") for number in (1, 2)
    )
    assert here == shared


def test_without_adapters_every_parameter_travels(tmp_path: Path) -> None:
    run = build_run(load_config(CONFIG, [*SHORT, "model.type=words"]))
    assert run.model.exchanged_names == tuple(sorted(name for name, _ in run.model.named_parameters()))
    assert_learnt(run_short(tmp_path, "model.type=words"))
    model = open_run(tmp_path / "run").model
    assert not torch.equal(model.embedding.weight, run.model.embedding.weight)


# ---- the commands, and what a run leaves


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example as its first line runs it."""
    root = tmp_path_factory.mktemp("runs")
    command = Path(CONFIG).read_text().splitlines()[0].removeprefix("# fedlora ")
    arguments = command.replace("examples/", f"{EXAMPLES}/").split()
    with pytest.raises(SystemExit) as ended:
        main([*arguments, f"output.root={root}", "output.report=false"])
    assert not ended.value.code
    forget_plugins()
    return root / "own_model"


def test_it_learns_and_is_evaluated_with_its_predictions(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["zero_shot"] < 0.5
    assert summary["final"] > 0.9
    assert subtitle(read_run(whole)).startswith("words · LoRA r=4 · kinds · sentences")
    forget_plugins()  # the run folder names the plugin
    status, _, error = fedlora(capsys, "evaluate", whole)
    assert status == 0, error
    results = json.loads((whole / "evaluation_test" / "evaluation_results.json").read_text())
    assert results["accuracy"] == pytest.approx(summary["final"])
    assert [row["name"] for row in results["per_class"]] == ["animal", "food", "tool"]
    run = build_run(load_config(whole / "config.yaml"))
    lines = (whole / "evaluation_test" / "predictions.csv").read_text().splitlines()
    assert lines[0] == "row,prediction"
    right = [run.data.class_names[label] for label in run.data.labels("test")]  # type: ignore[index]
    predicted = [line.split(",")[1] for line in lines[1:]]
    assert np.mean([a == b for a, b in zip(right, predicted, strict=True)]) == pytest.approx(summary["final"])
    assert fedlora(capsys, "run", whole / "config.yaml", f"output.root={whole.parent}", "--overwrite")[0] == 0


def test_its_adapter_is_loaded_by_plain_peft_and_by_fedlora(whole: Path) -> None:
    run = build_run(load_config(whole / "config.yaml"))
    untrained = evaluate_server(run)["loss"]
    load_lora_adapters(run.model, whole / "adapter")
    trained = evaluate_server(run)
    batch = run.reader.batch("test", np.arange(20))
    opened = open_run(whole).model
    plain = build_run(load_config(whole / "config.yaml", ["model.type=words"])).model
    adapted = peft.PeftModel.from_pretrained(plain, str(whole / "adapter"))
    features = plain.embedding(batch["words"]).mean(1)
    with torch.no_grad():
        theirs = adapted.base_model.model.second(adapted.base_model.model.first(features).relu())
        assert torch.equal(theirs, opened.second(opened.first(features).relu()))
    assert trained["loss"] < untrained
    assert opened.task.predict(opened, batch) == run.model.task.predict(run.model, batch)


def test_an_adapter_of_other_base_weights_is_refused(whole: Path) -> None:
    other = build_run(load_config(whole / "config.yaml", ["seed=5"]))
    with pytest.raises(UserError, match="other weights"):
        load_lora_adapters(other.model, whole / "adapter")


def test_it_is_trained_in_one_place_and_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, printed, error = fedlora(capsys, "info", CONFIG, "--plugin", PLUGIN)
    assert status == 0, error
    assert "adapter, text" in printed
    values = 2 * 4 * (32 + 32) + 3 * 32 + 3  # two layers at rank 4, and the head
    assert f"{values}" in printed
    overrides = ["train.epochs=2", "output.report=false", f"output.root={tmp_path}"]
    assert fedlora(capsys, "train", CONFIG, *overrides)[0] == 0
    status, printed, error = fedlora(capsys, "evaluate", tmp_path / "own_model-central")
    assert status == 0, error
    assert "accuracy" in printed


def test_predict_names_the_command_that_reads_its_rows(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, error = fedlora(capsys, "predict", whole, EXAMPLES)
    assert status == 2
    assert "words_lora" in error
    assert "fedlora evaluate" in error


# ---- what is refused


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.type=word_lora"], ["model.type", "did you mean 'words_lora'"]),
        (["task.name=retrieval"], ["model.type=words_lora takes kinds", "model.type=clip_lora"]),
        (["model.type=clip_lora"], ["task.name=kinds goes with model.type=words"]),
        (["model.options={widht: 3}"], ["model.options.widht", "did you mean 'width'"]),
        (["model.options={width: wide}"], ["model.options.width", "valid integer"]),
        (["data.source=digits"], ["reads the column 'text'", "'digits' has none"]),
        (["lora.target_components=[vision]"], ["no vision tower", "lora.target_components=[text]"]),
        (["lora.target_components=[text, classifier]"], ["'classifier'", "CLIP"]),
        (["client.augmentation={flip_probability: 0.5}"], ["client.augmentation", "task.name=kinds"]),
        (["model.type=words", "model.fine_tuning=full", "client.ranks=[1]"], ["model.type=words_lora"]),
        (["model.fine_tuning=full"], ["goes with model.type=words"]),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_name(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        build_run(load_config(CONFIG, [*SHORT, *overrides]))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_clip_has_no_options_and_reads_no_rows_without_images() -> None:
    with pytest.raises(UserError, match=r"model\.options\.width: .*'clip' has no option"):
        build_run(load_config("quickstart", ["model.options={width: 3}"]))
    with pytest.raises(UserError, match="needs images"):
        build_run(load_config("quickstart", ["data.source=sentences"]))


def test_clients_that_should_train_together_train_one_by_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    together = run_short(tmp_path, "engine.batched_clients=2")
    assert "clients train one by one" in caplog.text
    assert together == run_short(tmp_path)


def test_caches_are_without_effect(tmp_path: Path) -> None:
    off = [f"cache.{name}=false" for name in ("image_features", "text_features", "activations")]
    assert run_short(tmp_path) == run_short(tmp_path, *off)


# ---- questions about images: two towers, tied weights, a reader of its own, labels that are not learnt


def vqa_config(folder: Path, *overrides: str) -> ExperimentConfig:
    load_plugins([Path(__file__).parent / "small_vqa.py"])
    about = ["model={type: small_vqa_lora, num_classes: null}", "task.name=answers", "data.source=easy_vqa"]
    rows = ["data.max_train_samples=90", "data.max_test_samples=30", "lora={r: 2, lora_alpha: 4}"]
    return load_config(
        CONFIG, [*SHORT, *about, *rows, f"output.root={folder}", "output.name=vqa", *overrides]
    )


def test_questions_about_images_are_learnt_and_answered_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = vqa_config(tmp_path, "aggregation.name=fedex", "client.micro_batch_size=4", "engine.workers=2")
    folder = run_experiment(config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert_learnt(lines)
    assert {"token_f1", "exact_match"} <= lines[-1].keys()
    names = load_file(folder / "adapter" / "adapter_model.safetensors").keys()
    assert {name.split(".")[2] for name in names} == {"vision", "text"}
    status, printed, error = fedlora(capsys, "evaluate", folder)
    assert status == 0, error
    assert "token f1" in printed
    predicted = (folder / "evaluation_test" / "predictions.csv").read_text().splitlines()[1:]
    assert len(predicted) == 30
    right = build_run(config).data.test["answer"][:]
    share = np.mean([a == b.split(",")[1] for a, b in zip(right, predicted, strict=True)])
    assert share == pytest.approx(lines[-1]["exact_match"])


def test_one_type_of_question_is_no_single_class(tmp_path: Path) -> None:
    run = build_run(vqa_config(tmp_path))
    one = dataclasses.replace(run.data, class_names=("colour",))
    check_can_score(dataclasses.replace(run, data=one))


def test_tied_weights_travel_once_and_are_saved_whole(tmp_path: Path) -> None:
    config = vqa_config(tmp_path, "model.type=small_vqa")
    run = build_run(config)
    assert sum("weight" in name and "decoder" in name for name in run.model.exchanged_names) == 0
    folder = run_experiment(config)
    model = open_run(folder).model
    assert model.decoder.weight is model.words.weight
    saved = load_file(folder / "adapter" / "model.safetensors")
    assert torch.equal(saved["decoder.weight"], saved["words.weight"])
    assert torch.equal(model.words.weight, saved["words.weight"])
    assert not torch.equal(model.words.weight, run.model.words.weight)


# ---- registration


def test_the_families_in_the_schema_are_those_that_the_package_has() -> None:
    forget_plugins()
    assert set(MODEL_FAMILIES) == set(FAMILIES)
    assert {task.family for task in TASKS.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        (ModelFamily("clip", lambda setup: setup), "'clip' is there already"),
        (ModelFamily(f"own{ADAPTED}", lambda setup: setup), "leave _lora out"),
        (ModelFamily("own", lambda: None), r"must be called as own\(setup"),
        (ModelFamily("a b", lambda setup: setup), "cannot be the name of a new model family"),
        ("own", "takes a ModelFamily, not a str"),
    ],
)
def test_a_family_that_cannot_be_added_is_refused(family: Any, words: str) -> None:
    before = dict(FAMILIES)
    with pytest.raises(UserError, match=words):
        register_model_family(family)
    assert before == FAMILIES


def test_a_task_names_its_columns_with_its_batch() -> None:
    with pytest.raises(UserError, match="batch and reads"):
        register_task(Task("own", lambda m, b: b["x"], lambda m, b: {}, "accuracy", reads=("text",)))


def test_a_task_of_clip_may_make_batches_of_its_own_from_any_column() -> None:
    def read(model: Any, rows: Any) -> dict[str, torch.Tensor]:
        assert sorted(rows) == ["image", "label"]
        pixels = torch.stack([model.preprocess(image.convert("RGB")) for image in rows["image"]])
        return {"pixel_values": pixels, "labels": torch.tensor(rows["label"])}

    def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model.logits(batch)

    register_task(
        classification_task("own_rows", logits, family="clip", reads=("image", "label"), batch=read)
    )
    overrides = ["partition.num_clients=2", "data.max_train_samples=60", "data.max_test_samples=20"]
    own, usual = (
        build_run(load_config("quickstart", [*overrides, f"task.name={name}"]))
        for name in ("own_rows", "classification")
    )
    first, second = (
        next(local_batches(run, 0, 1, np.random.default_rng(0), server_round=1)) for run in (own, usual)
    )
    assert torch.equal(first["labels"], second["labels"])
    assert torch.equal(first["pixel_values"], second["pixel_values"])
    assert evaluate_server(own) == evaluate_server(usual)
