"""A run from Python: what a notebook asks of it."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

import federated
from federated.results.byte_reasons import byte_reasons
from federated.results.report_cards import cards
from federated.results.report_pictures import drawings
from federated.results.tables import round_table
from federated.tools.front_door import config_from
from models.errors import UserError

SHORT = {
    "data": {"max_train_samples": 60, "max_test_samples": 20},
    "partition": {"name": "iid", "options": {}, "num_clients": 2},
    "federation": {"rounds": 1},
    "client": {"local_steps": 1, "learning_rate": 1e-3},
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> federated.RunResult:
    output = {"root": str(tmp_path_factory.mktemp("runs")), "report": False}
    return federated.run("quickstart", show_progress=False, output=output, **SHORT)


def test_importing_the_package_imports_neither_torch_nor_pandas() -> None:
    check = "import federated, sys; sys.exit(bool({'torch', 'pandas', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_a_run_gives_its_metrics_and_its_ledger_as_frames(result: federated.RunResult) -> None:
    assert list(result.metrics.index) == [0, 1]
    assert set(result.clients["client_id"]) == {0, 1}
    assert result.ledger["wire_bytes"].sum() == result.record.ledger.total().wire_bytes > 0
    assert result.summary["final"] == result.metrics["accuracy"].iloc[-1]


def test_a_notebook_shows_the_reports_figures_pictures_and_tables(result: federated.RunResult) -> None:
    page = ET.fromstring(result._repr_html_())
    text = " ".join("".join(page.itertext()).split())
    record = result.record
    for card in cards(record):
        assert all(words in text for words in (card.label, card.value, *card.notes))
    cells = ["".join(cell.itertext()) for cell in page.iter("td")]
    table = round_table(record.metrics, record.metric, record.ledger)
    assert all(cell in cells for row in table.rows for cell in row)
    names = {drawing.title for drawing in drawings(record)}
    shown = {image.get("alt") for image in page.iter("img")}
    assert names - shown == {"Accuracy of each class"}  # the run made no report
    assert all(reason in text for reason in byte_reasons(record.ledger))
    assert all(image.get("src", "").startswith("data:image/svg+xml") for image in page.iter("img"))
    assert " in 1 round, " in repr(result)
    assert len(repr(result)) < 300


def test_a_run_gives_its_model_and_an_adapter_folder(result: federated.RunResult) -> None:
    assert (result.adapter / "adapter_config.json").is_file()
    assert result.model.evaluate(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))["num_examples"] == 2


def test_an_earlier_run_is_opened_by_its_folder(result: federated.RunResult, tmp_path: Path) -> None:
    assert federated.open_run(result.folder).metrics.equals(result.metrics)
    with pytest.raises(UserError, match="is not a run folder"):
        federated.open_run(tmp_path)


def test_sections_replace_single_keys_of_whatever_a_configuration_is_given_as(tmp_path: Path) -> None:
    changes = {"client": {"learning_rate": 1e-5}, "partition": {"options": {}, "name": "iid"}, "seed": 3}
    file = tmp_path / "own.yaml"
    file.write_text("client: {local_steps: 2}")
    named = config_from("quickstart", **changes)
    assert (named.seed, named.client.learning_rate, named.client.local_steps) == (3, 1e-5, 12)
    assert named.partition.options == {}
    for given in (file, {"client": {"local_steps": 2}}, config_from(file)):
        loaded = config_from(given, **changes)
        assert (loaded.client.learning_rate, loaded.client.local_steps) == (1e-5, 2)
    with pytest.raises(UserError, match=r"client\.learningrate"):
        config_from({}, client={"learningrate": 1})


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    code = readme.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["result"].metrics) == 3


def test_the_readme_is_short_enough_to_be_read() -> None:
    assert len((Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")) <= 9000
