"""Configuration: loading, overriding, and errors that help."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from federated.config.config_files import (
    config_folder,
    dump_config,
    load_config,
    parse_config,
    shipped_descriptions,
    shipped_names,
)
from federated.rounds.build import training_settings
from models.errors import UserError


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_configuration_loads_and_survives_a_round_trip(name: str) -> None:
    config = load_config(name)
    assert config.output.name == name
    assert parse_config(yaml.safe_load(dump_config(config)), source="dump") == config


@pytest.mark.parametrize("name", shipped_names())
def test_the_first_line_of_every_shipped_configuration_is_the_command_that_runs_it(name: str) -> None:
    first_line = (config_folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first_line in {f"# fedlora run {name}", f"# fedlora train {name}"}


def test_every_shipped_configuration_says_what_it_is_in_a_sentence() -> None:
    descriptions = shipped_descriptions()
    assert list(descriptions) == shipped_names()
    for description in descriptions.values():
        assert description.endswith(".")
        assert "fedlora run" not in description


def test_the_documented_configurations_ship() -> None:
    required = {"quickstart", "clip_lora", "head_only", "full_finetune", "domain_shift"}
    assert required <= set(shipped_names())


def test_the_documented_clip_lora_sections_are_there() -> None:
    tree = yaml.safe_load((config_folder() / "clip_lora.yaml").read_text(encoding="utf-8"))
    assert tree["model"]["type"] == "clip_lora"
    assert {"model_name", "num_classes"} <= set(tree["model"])
    assert {"enabled", "r", "lora_alpha", "target_components", "save_only_trainable"} <= set(tree["lora"])


def test_an_override_changes_one_value_and_nothing_else() -> None:
    before = load_config("quickstart").model_dump()
    after = load_config("quickstart", ["client.learning_rate=1e-4", "lora.r=4"]).model_dump()
    assert after["client"].pop("learning_rate") == 1e-4
    assert after["lora"].pop("r") == 4
    before["client"].pop("learning_rate")
    before["lora"].pop("r")
    assert after == before


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("client.learning_rte=1", ["client.learning_rte", "did you mean client.learning_rate"]),
        ("lora.rank_r=4", ["lora.rank_r"]),
        ("rounds=3", ["unknown key rounds", "federation.rounds"]),
        ("federation.rounds=many", ["federation.rounds", "many"]),
        ("federation.rounds=0", ["federation.rounds", "greater than or equal to 1"]),
        ("federation.cohort_size=11", ["cohort_size is 11", "num_clients is 10"]),
        ("model.fine_tuning=full", ["model.fine_tuning"]),
        ("seed", ["key=value"]),
        ("seed.x=1", ["seed"]),
    ],
)
def test_a_wrong_override_names_the_key_and_the_remedy(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_config("quickstart", [override, "model.type=clip_lora"])
    for word in words:
        assert word in str(error.value)


def message_of(config: Path | str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(config, overrides)
    return str(error.value)


def test_plain_sgd_can_be_chosen_and_the_default_momentum_is_kept() -> None:
    settings = training_settings(load_config("quickstart", ["client.optimizer=sgd", "client.momentum=0"]))
    assert (settings.optimizer, settings.momentum) == ("sgd", 0.0)
    assert training_settings(load_config("quickstart", ["client.optimizer=sgd"])).momentum == 0.9
    with pytest.raises(UserError, match=r"client\.momentum=0\.5 goes with client\.optimizer=sgd"):
        load_config("quickstart", ["client.momentum=0.5"])


def test_an_error_stands_under_the_place_where_its_value_was_written(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("lora: {r: abc}\nclient: {local_steps: 0}\n", encoding="utf-8")
    of_line, of_file = message_of(path, "seed=-1", "client={batch_size: none}").split(f"\n{path}:\n")
    assert of_line.startswith("on the command line:\n")
    assert "  seed: " in of_line
    assert "  client.batch_size: " in of_line
    assert of_file.startswith("  lora.r: ")
    assert "local_steps" not in of_file  # the override took the place of the section


def test_an_override_alone_is_not_blamed_on_the_shipped_file() -> None:
    assert message_of("quickstart", "lora.r=abc").startswith("on the command line:\n  lora.r: ")
    assert "quickstart.yaml" not in message_of("quickstart", "client.learning_rte=1")
    of_both = message_of("quickstart", "federation.cohort_size=11").splitlines()[0]
    assert "quickstart.yaml" in of_both
    assert "command line" in of_both


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "engine.batched_clients=x",
            "engine.batched_clients: give auto, off or a whole number of at least 2 (got 'x')",
        ),
        ("lora.lora_alpha=x", "lora.lora_alpha: give a number (got 'x')"),
        ("lora.vision={lora_alpha: x}", "lora.vision.lora_alpha: give a number (got 'x')"),
    ],
)
def test_a_key_of_several_types_has_one_line_that_says_what_is_allowed(override: str, line: str) -> None:
    assert message_of("quickstart", override).splitlines()[1:] == [f"  {line}"]


def test_an_override_fills_a_section_that_is_null(tmp_path: Path) -> None:
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_config(load_config("quickstart")), encoding="utf-8")
    config = load_config(path, ["aggregation.server_optimizer.name=fedadam"])
    assert config.aggregation.server_optimizer == {"name": "fedadam"}


def test_an_unknown_key_of_an_optional_section_has_its_nearest_one_named() -> None:
    assert "did you mean lora.vision.lora_alpha?" in message_of("quickstart", "lora.vision.lora_alfa=2")


def test_a_missing_file_lists_the_shipped_names() -> None:
    with pytest.raises(UserError, match="quickstart"):
        load_config("no_such_configuration")


def test_broken_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("model: [unclosed", encoding="utf-8")
    with pytest.raises(UserError, match=r"broken\.yaml is not valid YAML"):
        load_config(path)


def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n- 2\n", encoding="utf-8")
    with pytest.raises(UserError, match="mapping"):
        load_config(path)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("client.lr", "client.learning_rate"),
        ("train.lr", "client.learning_rate"),
        ("client.bs", "client.batch_size"),
    ],
)
def test_an_abbreviated_key_is_answered_with_the_whole_one(key: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf"did you mean {meant}\?"):
        load_config("quickstart", [f"{key}=1"])


def test_a_key_that_goes_on_after_a_short_one_suggests_it() -> None:
    assert "did you mean lora.r?" in message_of("quickstart", "lora.rank=4")
