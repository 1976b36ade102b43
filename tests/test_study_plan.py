"""The combinations of a study: which there are, what they are compared with, what is refused beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from federated.config.config_files import config_folder, load_config
from federated.config.study_file import key_and_values
from federated.tools.study_plan import Study, fingerprint, plan_study
from models.errors import UserError

METHODS = {"aggregation.name": ["fedavg", "ffa"]}


def plan(folder: Path, **given: Any) -> Study:
    return plan_study("quickstart", [f"output.root={folder}"], **given)


def write(folder: Path, **keys: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"config": "quickstart", **keys}, sort_keys=False))
    return path


def test_a_grid_is_every_combination_and_every_seed(tmp_path: Path) -> None:
    study = plan(tmp_path, grid={**METHODS, "partition.options.alpha": [0.1, 0.5]}, seeds=2)
    assert [v.name for v in study.variants] == [
        "fedavg, alpha=0.1", "fedavg, alpha=0.5", "ffa, alpha=0.1", "ffa, alpha=0.5"
    ]  # fmt: skip
    runs = list(study.candidates())
    assert len({run.folder for run in runs}) == len(runs) == 8
    config = next(run.config for run in runs if run.name == "ffa-alpha=0.1-seed1")
    assert (config.aggregation.name, config.partition.options["alpha"], config.seed) == ("ffa", 0.1, 1)
    assert config.partition.options["min_samples"] == 20  # what the configuration has stays


def test_a_zip_goes_side_by_side_and_variants_cross_it(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        variants={"plain": {}, "coded": {"communication": {"uplink": "int8"}}},
        zip={"lora.r": [4, 8], "lora.lora_alpha": [8, 16]},
        seeds=[3, 7],
    )
    study = plan_study(str(path), [f"output.root={tmp_path}"])
    assert [v.name for v in study.variants] == [
        "plain, r=4, lora_alpha=8", "plain, r=8, lora_alpha=16",
        "coded, r=4, lora_alpha=8", "coded, r=8, lora_alpha=16",
    ]  # fmt: skip
    assert study.variants[-1].settings == {"communication.uplink": "int8", "lora.r": 8, "lora.lora_alpha": 16}
    assert [v.baseline for v in study.variants] == [study.variants[i].name for i in (0, 1, 0, 1)]
    assert study.file.seed_numbers == (3, 7)
    assert study.folder == tmp_path / "mine"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, ["fedavg, alpha=0.1", "fedavg, alpha=0.5"] * 2),
        ("ffa", ["ffa, alpha=0.1", "ffa, alpha=0.5"] * 2),
        ("alpha=0.5", ["fedavg, alpha=0.5"] * 2 + ["ffa, alpha=0.5"] * 2),
        ("ffa, alpha=0.1", ["ffa, alpha=0.1"] * 4),
    ],
)
def test_a_baseline_is_a_value_the_rest_being_equal_or_one_combination(
    asked: str | None, expected: list[str], tmp_path: Path
) -> None:
    study = plan(tmp_path, grid={**METHODS, "partition.options.alpha": [0.1, 0.5]}, baseline=asked)
    assert [variant.baseline for variant in study.variants] == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"grid": {"aggregation.nam": ["ffa"]}}, r"combination nam=ffa.*unknown key.*aggregation\.name"),
        ({"grid": {"aggregation.name": ["fedavg", "ffaa"]}}, r"combination ffaa: aggregation\.name: no aggr"),
        ({"grid": {"partition.options.alhpa": [1]}}, r"combination alhpa=1: partition\.options\.alhpa"),
        ({"grid": {"partition.name": ["irid"]}}, r"combination irid: partition\.name: no partitioner"),
        ({"grid": {"data.source": ["faces"]}}, r"combination source=faces: data\.source: no data source"),
        ({"grid": {"communication.uplink": ["int9"]}}, r"combination uplink=int9: communication\.uplink"),
        ({"grid": {"client.learning_rate": [-1]}}, r"combination learning_rate=-1.*greater than 0"),
        ({"grid": {"seed.x": [1]}}, "combination x=1: seed is a value"),
        ({"grid": {"lora.r": [4, 4]}}, "two combinations are called r=4"),
        ({"zip": {"lora.r": [4, 8], "seed": [1]}}, r"zip: give as many values.*lora\.r has 2"),
        ({"baseline": "best"}, "no variant 'best'"),
        ({"seeds": 0}, "seeds"),
        ({"target": "high"}, "no value to reach"),
        ({"budget": "5 MiB"}, "no number of bytes"),
        ({"grid": {"task.name": ["classification", "retrieval"]}}, "different headline metrics"),
        ({"grid": {"aggregation.name": ["fedsa"]}, "tune": {"key": "lora.r", "values": [1, 2]}}, "has no"),
        ({"tune": {"key": "client.lr", "values": [1, 2]}}, r"client\.lr=1.*unknown key client\.lr"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_with_its_combination(
    given: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"(?s){words}"):
        plan(tmp_path, **given)
    assert not list(tmp_path.iterdir())


def test_all_faulty_combinations_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        plan(tmp_path, grid={"aggregation.name": ["fedavg", "one", "two"]})
    assert [
        word in str(caught.value) for word in ("combination one", "combination two", "combination fedavg")
    ] == [
        True,
        True,
        False,
    ]


def test_tuning_needs_a_validation_split(tmp_path: Path) -> None:
    tune = {"key": "client.learning_rate", "values": [1e-3, 2e-3]}
    few = [f"output.root={tmp_path}", "data={source: digits}", "model.num_classes=null"]
    with pytest.raises(UserError, match=r"set data\.validation_fraction=0\.1"):
        plan_study("quickstart", few, tune=tune)
    assert plan_study("quickstart", [*few, "data.validation_fraction=0.1"], tune=tune).variants


def test_the_file_that_a_study_keeps_gives_the_same_runs(tmp_path: Path) -> None:
    study = plan(tmp_path, grid=METHODS, seeds=2)
    (study.folder / "runs").mkdir(parents=True)
    kept = study.folder / "study.yaml"
    kept.write_text(yaml.safe_dump(study.file.model_dump(mode="json", exclude_unset=True)))
    again = plan_study(str(kept))
    assert [(r.folder, r.config) for r in again.candidates()] == [
        (r.folder, r.config) for r in study.candidates()
    ]


def test_a_fingerprint_is_of_what_makes_results(tmp_path: Path) -> None:
    base = fingerprint(load_config("quickstart"))
    for same in ("output.name=other", "engine.threads=2", "engine.workers=2", "output.report=false"):
        assert fingerprint(load_config("quickstart", [same])) == base
    for other in ("seed=1", "lora.r=4", "engine.batched_clients=2", "aggregation.options={x: 1}"):
        assert fingerprint(load_config("quickstart", [other])) != base


def test_a_file_without_config_or_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, grids={"lora.r": [4]})
    with pytest.raises(UserError, match="unknown key grids; did you mean grid"):
        plan_study(str(path.rename(tmp_path / "b.yaml")), ["output.root=x"], seeds=1)
    (tmp_path / "a.yaml").write_text("seeds: 2\n")
    with pytest.raises(UserError, match="without config"):
        plan_study(str(tmp_path / "a.yaml"))
    with pytest.raises(UserError, match="no configuration nowhere: .*shipped studies: .*methods"):
        plan_study("nowhere")


@pytest.mark.parametrize("text", ["lora.r", "lora.r=4", "lora.r=[]", "=[1]"])
def test_values_on_the_command_line_are_a_list_under_a_key(text: str) -> None:
    assert key_and_values("lora.r=[4, 8]", "--grid") == ("lora.r", [4, 8])
    with pytest.raises(UserError, match="--grid"):
        key_and_values(text, "--grid")


@pytest.mark.parametrize(
    "path", sorted((config_folder() / "studies").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_shipped_study_can_be_run_by_the_command_in_its_first_line(path: Path, tmp_path: Path) -> None:
    _, command, _, name, *_ = path.read_text().splitlines()[0].split()
    assert (command, name) == ("fedlora", path.stem)
    study = plan_study(name, [f"output.root={tmp_path}"])
    assert study.folder == tmp_path / name
    assert len(study.variants) > 1
