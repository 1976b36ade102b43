"""Plugins: what a file or an installed package adds by name, and how a run is opened again with it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from federated import load_plugins, run
from federated.communication.codec import codec_from_name
from federated.config import plugins
from federated.config.config_files import dump_config, load_config
from federated.config.schema import TASK_NAMES
from federated.data.sources.source_registry import SOURCES
from federated.engines.batched_clients import one_by_one_because
from federated.engines.flower_apps import CONFIG_KEY, OVERRIDES_KEY, PLUGINS_KEY, run_of
from federated.methods import AGGREGATORS, aggregator_from_name
from federated.rounds.run import build_run
from models.errors import UserError
from models.registration import added
from models.tasks import TASKS
from tests.command import fedlora, forget_plugins
from tests.small_run import SMALL, small_config

EXAMPLES = Path(__file__).parents[1] / "examples"
RULE = """
from dataclasses import replace
from federated import register_aggregator
from federated.methods import fedavg

@register_aggregator("{name}")
def rule(*, boost: int = 1):
    return replace(fedavg(), name="{name}{boost}")
"""


@pytest.fixture(autouse=True)
def nothing_added() -> Iterator[None]:
    """Forget plugins before and after, as another process would not know them."""
    forget_plugins()
    yield
    forget_plugins()


def plugin(
    folder: Path, text: str = RULE, *, file: str = "own.py", name: str = "own", boost: int = 0
) -> Path:
    path = folder / file
    path.write_text(text.replace("{name}", name).replace("{boost}", str(boost)), encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    known = (dict(AGGREGATORS), dict(SOURCES), dict(TASKS))
    with pytest.raises(UserError) as error:
        load_plugins([path])
    assert known == (AGGREGATORS, SOURCES, TASKS)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- loading


def test_the_names_of_tasks_in_the_schema_are_those_that_the_package_has() -> None:
    assert set(TASK_NAMES) == set(TASKS)


def test_a_file_adds_a_rule_with_options(tmp_path: Path) -> None:
    load_plugins([plugin(tmp_path)])
    assert aggregator_from_name("own", {"boost": "3"}).name == "own0"
    with pytest.raises(UserError, match=r"aggregation.options.bost: .* did you mean 'boost'"):
        aggregator_from_name("own", {"bost": 3})


def test_a_file_is_run_once_and_again_only_when_it_has_changed(tmp_path: Path) -> None:
    path = plugin(tmp_path)
    load_plugins([path])
    first = AGGREGATORS["own"]
    load_plugins([path, str(path)])
    assert AGGREGATORS["own"] is first
    load_plugins([plugin(tmp_path, boost=7)])
    assert aggregator_from_name("own", {}).name == "own7"
    load_plugins([plugin(tmp_path, name="other")])
    assert "own" not in AGGREGATORS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", ["registers nothing"]),
        (RULE.replace("{name}", "fedavg"), ["aggregator 'fedavg' is there already, from fedlora itself"]),
        (RULE + "\nimport not_there", ["line 10", "ModuleNotFoundError", "not_there"]),
        ("def f(:\n", ["line 1", "SyntaxError"]),
        (RULE + "\nraise Exception('no\\nway')", ["line 10", "Exception: no"]),
        (RULE + "\nraise SystemExit(3)", ["SystemExit"]),
        (RULE.replace('("{name}")', ""), ["a name is needed before the aggregator"]),
        (RULE.replace("{name}", "a+b"), ["'a+b' cannot be the name of a new aggregator"]),
        (RULE.replace("*, boost", "boost"), ["aggregator 'own'", "options stand behind a '*'"]),
        ("from federated import register_source\nregister_source('s')(3)", ["must be a function", "s(rng"]),
        (RULE.replace("boost: int", "boost: 'Missing'"), ["NameError", "Missing"]),
        ("from models.tasks import register_task\nregister_task('t')", ["takes a Task, not a str"]),
    ],
)
def test_what_cannot_be_loaded_is_one_message_and_adds_nothing(
    text: str, words: list[str], tmp_path: Path
) -> None:
    path = plugin(tmp_path, text)
    message = refusal(path)
    assert all(word in message for word in [str(path), *words]), message


def test_two_plugins_cannot_add_one_name(tmp_path: Path) -> None:
    first = plugin(tmp_path, file="first.py")
    load_plugins([first])
    assert f"'own' is there already, from {first}" in refusal(plugin(tmp_path, file="second.py"))


def test_a_missing_file_is_named() -> None:
    assert "nowhere/own.py" in refusal(Path("nowhere/own.py"))


def test_a_coding_serves_dense_and_sparse_codecs_and_an_edited_one_takes_its_place(tmp_path: Path) -> None:
    text = """
from dataclasses import replace
from numpy import append
from federated import register_coding, register_selection
from federated.communication.codings import fp32
from federated.communication.sparsifiers import top_k

@register_coding("tail")
def tail():
    whole = fp32()
    return replace(
        whole,
        num_bytes=lambda n, num_groups: 4 * n + {boost},
        encode=lambda values, sizes, rng: append(values, [0] * ({boost} // 4)).astype("f4"),
        decode=lambda data, sizes: data.view("f4")[: len(data) // 4 - {boost} // 4].copy(),
    )

@register_selection("largest")
def largest(values, k):
    return top_k(values, k)
"""
    state = {"x": torch.arange(8.0)}
    for boost in (4, 8):
        load_plugins([plugin(tmp_path, text, boost=boost)])
        codec = codec_from_name("tail")
        assert codec.encode(state, np.random.default_rng()).nbytes == 32 + boost
        sparse = codec_from_name("largest:0.25:ef+tail")
        back = sparse.decode(sparse.encode(state, None), (("x", (8,)),))
        assert back["x"].tolist() == [0, 0, 0, 0, 0, 0, 6, 7]


def test_an_installed_package_adds_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    plugin(tmp_path, "def add():\n" + "\n".join("    " + line for line in RULE.splitlines()), file="their.py")
    dist = tmp_path / "their_rules-1.2.dist-info"
    dist.mkdir()
    (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: their-rules\nVersion: 1.2\n")
    (dist / "entry_points.txt").write_text("[fedlora.plugins]\ntheirs = their:add\n")
    folder = small_run(tmp_path, aggregation={"name": "own"})
    (kept,) = json.loads((folder / "plugins.json").read_text())
    assert kept == {
        "entry_point": "theirs",
        "distribution": "their-rules",
        "version": "1.2",
        "registers": {"aggregator": ["own"]},
    }
    forget_plugins()
    (dist / "entry_points.txt").unlink()
    with pytest.raises(UserError, match=r"'theirs' of their-rules 1.2, which is not installed .*--plugin"):
        load_config(folder / "config.yaml")


# ---- runs


def small_run(root: Path, *plugins_: Path, **sections: object) -> Path:
    config = small_config(root, overrides=["output.report=false"])
    return run(config, plugins=plugins_, show_progress=False, **sections).folder


def test_a_run_keeps_its_plugin_and_is_evaluated_with_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = plugin(tmp_path)
    unused = plugin(tmp_path, file="unused.py", name="unused")
    folder = small_run(tmp_path, path, unused, aggregation={"name": "own"})
    (kept,) = json.loads((folder / "plugins.json").read_text())
    assert kept["path"] == str(path.resolve())
    assert kept["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    forget_plugins()
    assert fedlora(capsys, "evaluate", folder)[0] == 0
    assert aggregator_from_name("own", {}).name == "own0"
    again = ["run", folder / "config.yaml", f"output.root={tmp_path}", f"output.name={folder.name}"]
    assert fedlora(capsys, *again, "--overwrite")[0] == 0
    assert json.loads((folder / "plugins.json").read_text()) == [kept]


@pytest.fixture
def run_of_a_plugin(tmp_path: Path) -> tuple[Path, Path]:
    """A folder that opens as a run of ``own.py`` does, and that file."""
    path = plugin(tmp_path)
    load_plugins([path])
    config = small_config(tmp_path, overrides=["aggregation.name=own"])
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "plugins.json").write_text(json.dumps(plugins.used_plugins(config)))
    (folder / "config.yaml").write_text("aggregation: {name: own}")
    (folder / "metrics.jsonl").write_text("")
    forget_plugins()
    return folder, path


def test_a_changed_plugin_is_not_run_and_the_message_says_what_to_pass(
    run_of_a_plugin: tuple[Path, Path], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder, path = run_of_a_plugin
    plugin(path.parent, boost=5)
    status, _, error = fedlora(capsys, "show-config", folder / "config.yaml")
    assert status == 2
    assert str(path) in error
    assert "has changed" in error
    assert "pass --plugin FILE.py with one that registers aggregator 'own'" in error
    assert not added()
    assert fedlora(capsys, "show-config", folder / "config.yaml", "--plugin", path)[0] == 0
    assert "another version" in caplog.text


def test_a_plugin_that_is_gone_is_asked_for(run_of_a_plugin: tuple[Path, Path]) -> None:
    folder, path = run_of_a_plugin
    moved = path.rename(path.with_name("moved.py"))
    with pytest.raises(UserError, match="is not there any more: pass --plugin"):
        load_config(folder / "config.yaml")
    load_plugins([moved])
    assert load_config(folder / "config.yaml").aggregation.name == "own"


@pytest.mark.parametrize("inside", ["own.py", "deeper/own.py"])
def test_code_inside_a_run_folder_is_never_run(run_of_a_plugin: tuple[Path, Path], inside: str) -> None:
    folder, path = run_of_a_plugin
    (folder / inside).parent.mkdir(exist_ok=True)
    within = path.rename(folder / inside)
    assert "whose code is never run" in refusal(within)
    (folder / "metrics.jsonl").unlink()  # a folder that does not look like a run's, sent by somebody
    (kept,) = json.loads((folder / "plugins.json").read_text())
    link = folder.parent / "link.py"
    link.symlink_to(within)
    for place in (within, link):
        (folder / "plugins.json").write_text(json.dumps([{**kept, "path": str(place)}]))
        with pytest.raises(UserError, match="whose code is never run"):
            load_config(folder / "config.yaml")
    assert not added()


@pytest.mark.parametrize("text", ["{", "{}", '[{"path": 3, "registers": {}}]', '[{"path": "x"}]'])
def test_a_damaged_record_is_named(run_of_a_plugin: tuple[Path, Path], text: str) -> None:
    folder, _ = run_of_a_plugin
    (folder / "plugins.json").write_text(text)
    with pytest.raises(UserError, match=r"plugins\.json"):
        load_config(folder / "config.yaml")


def test_an_edited_rule_counts_in_the_next_run_of_the_same_process(tmp_path: Path) -> None:
    names = []
    for boost in (1, 2):
        load_plugins([plugin(tmp_path, RULE.replace("boost: int = 1", "boost: int = {boost}"), boost=boost)])
        config = small_config(tmp_path, overrides=["aggregation.name=own"])
        names.append(run_of({CONFIG_KEY: dump_config(config)}).aggregator.name)
    assert names == ["own1", "own2"]


def test_engines_of_flower_load_the_files_that_their_run_config_names(tmp_path: Path) -> None:
    overrides = " ".join([*SMALL, "aggregation.name=own"])
    run_config = {CONFIG_KEY: "quickstart", OVERRIDES_KEY: overrides, PLUGINS_KEY: str(plugin(tmp_path))}
    experiment = run_of(run_config)
    assert experiment.aggregator.name == "own0"
    assert run_of(run_config) is experiment


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_know_a_plugin_too(tmp_path: Path, workers: int) -> None:
    folder = small_run(
        tmp_path,
        EXAMPLES / "own_task.py",
        task={"name": "smoothed"},
        engine={"workers": workers},
        federation={"rounds": 1},
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["failed"] == []


def test_a_task_from_outside_is_never_trained_with_a_loss_of_the_package(tmp_path: Path) -> None:
    load_plugins([EXAMPLES / "own_task.py"])
    experiment = build_run(small_config(tmp_path, overrides=["task.name=smoothed"]))
    assert one_by_one_because(experiment) == "task.name=smoothed has a loss of its own"


def test_a_wrong_task_has_the_nearest_registered_one_named(capsys: pytest.CaptureFixture[str]) -> None:
    command = ("show-config", "quickstart", "task.name=smoothd")
    error = fedlora(capsys, *command)[2]
    assert "task.name: no task 'smoothd'" in error
    assert "classification, retrieval, vqa, zero_shot" in error
    assert "did you mean 'smoothed'?" in fedlora(capsys, *command, "--plugin", EXAMPLES / "own_task.py")[2]


@pytest.mark.parametrize(
    "command",
    [
        ("run", "quickstart"),
        ("train", "quickstart"),
        ("evaluate", "quickstart"),
        ("predict", "tiny", "x.png"),
        ("encode", "tiny", "x", "--output", "x.npy"),
        ("info", "quickstart"),
        ("show-config", "quickstart"),
    ],
)
def test_every_command_that_reads_names_takes_plugins(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, error = fedlora(capsys, *command, "--plugin", plugin(tmp_path, "1 / 0"))
    assert status == 2
    assert "ZeroDivisionError" in error
    assert "Traceback" not in error


def test_what_a_plugin_raises_in_a_run_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails = plugin(tmp_path, RULE.replace("fedavg()", "fedavg(), apply=lambda *state: 1 / 0"))
    command = ("run", "quickstart", *SMALL, "aggregation.name=own", f"output.root={tmp_path}")
    status, _, error = fedlora(capsys, *command, "--plugin", fails)
    assert status == 2
    assert f"plugin {fails} failed (line 8), ZeroDivisionError" in error.replace("\n", " ")
    assert "Traceback" not in error


def test_looking_for_plugins_does_not_import_torch() -> None:
    code = "import sys, federated; federated.load_plugins(); federated.load_config('quickstart'); "
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, check=True
    )
    assert done.stdout.strip() == b"False"
