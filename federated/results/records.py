"""Reading a run folder back: what the report, the comparison of runs and the terminal tables start from."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from federated.communication.ledger import Ledger
from federated.communication.run_files import (
    ConfigFile,
    PartitionFile,
    Summary,
    check_series,
    checked,
    checked_line,
    read_run_file,
)
from federated.results.round_record import curve_lines
from federated.results.run_kind import RunKind, kind_of
from models.errors import UserError
from models.untrusted import MOST_YAML_BYTES, parse_yaml, read_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says.

    Attributes:
        directory: the folder.
        metrics: one mapping a round, as in ``metrics.jsonl``.
        ledger: the transfers; empty when the run recorded none.
        partition: ``partition.json``; empty when there is none.
        summary: ``summary.json``; empty when the run did not finish.
        environment: ``environment.json``; empty when there is none.
        config_text: ``config.yaml``; empty when there is none.
    """

    directory: Path
    metrics: list[dict[str, Any]]
    ledger: Ledger
    partition: dict[str, Any]
    summary: dict[str, Any]
    environment: dict[str, Any]
    config_text: str

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.directory.resolve().name

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration as a tree.

        Raises:
            UserError: ``config.yaml`` is not YAML, or a section of it is none.
        """
        source = self.directory / "config.yaml"
        tree = parse_yaml(self.config_text, source)
        return checked(tree, source, ConfigFile) if isinstance(tree, dict) else {}

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.summary)

    @cached_property
    def kind(self) -> RunKind:
        """Federated, personal or central, and the words for it."""
        return kind_of(self.metrics)

    @property
    def metric(self) -> str:
        """Key of the headline metric."""
        return str(self.summary.get("headline_metric", "accuracy"))

    @cached_property
    def headline(self) -> dict[str, Any]:
        """``zero_shot``, ``final``, ``best``, ``rounds``, ``seconds``: from the summary, or the rounds.

        A value that neither has, or that was not a number, is None.
        """
        values = [line[self.metric] for line in curve_lines(self.metrics) if self.metric in line]
        first = self.metrics[0] if self.metrics and self.metrics[0]["server_round"] == 0 else {}
        derived = {
            "zero_shot": first.get(self.metric),
            "final": values[-1] if values else None,
            "best": max((value for value in values if value is not None), default=None),
            "rounds": self.metrics[-1]["server_round"] if self.metrics else 0,
            "seconds": sum(line.get("seconds") or 0.0 for line in self.metrics),
        }
        return derived | {key: self.summary[key] for key in derived if key in self.summary}


def check_is_run(folder: Path) -> Path:
    """Return the file of a run's lines.

    Raises:
        UserError: The folder is no run folder.
    """
    path = folder / "metrics.jsonl"
    if not os.path.isfile(path):
        raise UserError(
            f"{folder} is not a run folder (it has no metrics.jsonl): give the folder that a run wrote"
        )
    return path


def read_run(run_dir: str | Path) -> RunRecord:
    """Read a run folder.

    Raises:
        UserError: it is no run folder, or one of its files cannot be read.
    """
    directory = Path(run_dir)
    metrics_path = check_is_run(directory)
    ledger_path, config_path = directory / "communication.csv", directory / "config.yaml"
    metrics, summary = read_lines(metrics_path), _read_json(directory / "summary.json", Summary)
    check_series(metrics, str(summary.get("headline_metric", "accuracy")), metrics_path)
    return RunRecord(
        directory=directory,
        metrics=metrics,
        ledger=Ledger.read_csv(ledger_path) if ledger_path.is_file() else Ledger(),
        partition=_read_json(directory / "partition.json", PartitionFile),
        summary=summary,
        environment=_read_json(directory / "environment.json"),
        config_text=read_text(config_path, MOST_YAML_BYTES) if config_path.is_file() else "",
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``: one mapping a line, sorted by round; of two lines of one round, the later.

    Raises:
        UserError: A line is no round's metrics.
    """
    lines = read_text(path).splitlines(keepends=True)
    by_round: dict[int, dict[str, Any]] = {}
    for number, text in enumerate(lines, start=1):
        try:
            line = checked_line(text, f"{path}, line {number}")
            by_round[line["server_round"]] = line
        except UserError as error:
            if number == len(lines) and not text.endswith("\n"):
                logger.warning("%s ends in the middle of a line; that line is left out", path)
                break
            raise UserError(f"{error}; it is not a round's metrics") from error
    return [by_round[server_round] for server_round in sorted(by_round)]


def _read_json(path: Path, kind: type[Summary | PartitionFile] | None = None) -> dict[str, Any]:
    return read_run_file(path, kind) if path.is_file() else {}
