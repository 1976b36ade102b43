"""How far a run is, from its files alone: whoever can read the folder can ask, from any terminal or machine.

A run holds a lock on its folder, which the system frees when its process ends. The lock says nothing of a run
on another machine, so that the time of the last writing is told as well.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.text import Text

from federated.communication.run_files import Summary, read_run_file
from federated.results.records import check_is_run, read_lines
from federated.results.round_record import wire_bytes
from federated.results.run_kind import kind_of
from federated.results.run_place import LOCK_FILE, can_be_resumed
from federated.results.wording import (
    format_bytes,
    format_metric,
    format_seconds,
    is_share,
    metric_label,
)
from models.files import json_text
from models.untrusted import MOST_YAML_BYTES, parse_yaml, read_text

State = Literal["running", "ended", "interrupted"]

_SHOWN_FAILURES = 5


@dataclass(frozen=True)
class RunStatus:
    """How far a run is. What the files do not say is None.

    Attributes:
        run: The folder.
        state: ``running`` on this machine, ``ended``, or neither.
        process: Id of the process that runs it.
        server_round: The last round that is done; None before round 0 is.
        rounds: The last round of the run; None for central training.
        metric: Key of the headline metric.
        value: Its last value.
        wire_bytes: Sent so far, both ways.
        seconds: Spent on the rounds so far.
        simulated_seconds: By the simulated clock.
        failed: The last round's clients that failed, each with its reason.
        num_failed: Failures in all rounds.
        stopped: Why the run ended before its last round.
        can_be_resumed: Whether it did not end and left a commit.
        last_written_seconds: Since a round was last written.
    """

    run: str
    state: State
    process: int | None
    server_round: int | None
    rounds: int | None
    metric: str | None
    value: float | None
    wire_bytes: int
    seconds: float
    simulated_seconds: float | None
    failed: tuple[Mapping[str, Any], ...]
    num_failed: int
    stopped: str | None
    can_be_resumed: bool
    last_written_seconds: float

    def to_json(self) -> str:
        """Return one line of JSON."""
        return json_text(asdict(self), sort_keys=True)


def read_status(run: Path) -> RunStatus:
    """Read how far a run is.

    Raises:
        UserError: The folder is no run's, or one of its files cannot be read.
    """
    path = check_is_run(run)
    holder, lines = _holder(run / LOCK_FILE), read_lines(path)
    summary = read_run_file(run / "summary.json", Summary) if (run / "summary.json").is_file() else {}
    last = lines[-1] if lines else {}
    metric = summary.get("headline_metric") or _headline(lines)
    values = [line[metric] for line in lines if metric in line]
    ended = bool(summary) and holder is None
    return RunStatus(
        run=str(run),
        state="running" if holder is not None else "ended" if ended else "interrupted",
        process=holder,
        server_round=last.get("server_round"),
        rounds=summary.get("rounds") if ended else _rounds(run / "config.yaml", lines),
        metric=metric,
        value=values[-1] if values else None,
        wire_bytes=sum(map(wire_bytes, lines)),
        seconds=round(sum(line.get("seconds") or 0.0 for line in lines), 3),
        simulated_seconds=last.get("simulated_seconds_total"),
        failed=tuple(last.get("failed") or ()),
        num_failed=sum(len(line.get("failed") or ()) for line in lines),
        stopped=summary.get("stopped"),
        can_be_resumed=not ended and holder is None and can_be_resumed(run),
        last_written_seconds=round(max(0.0, time.time() - path.stat().st_mtime), 1),
    )


def follow(run: Path, every_seconds: float = 1.0) -> Iterator[RunStatus]:
    """Yield how far a run is: now, after each round, and when it no longer runs.

    Args:
        run: The folder.
        every_seconds: How often the files are looked at.

    Raises:
        UserError: As ``read_status``.
    """
    before = None
    while True:
        status = read_status(run)
        seen = status.state, status.server_round
        if seen != before:
            yield status
        if status.state != "running":
            return
        before = seen
        time.sleep(every_seconds)


def in_words(status: RunStatus) -> list[Text]:
    """Return what people read, a line each."""
    lines = [Text(f"{status.run}: ").append(_state_words(status), style="bold"), Text(_progress(status))]
    for failure in status.failed[:_SHOWN_FAILURES]:
        reason = str(failure.get("reason", "")).partition("\n")[0]
        lines.append(Text(f"  client {failure['client_id']}: {reason}", style="red"))
    if len(status.failed) > _SHOWN_FAILURES:
        lines.append(Text(f"  and {len(status.failed) - _SHOWN_FAILURES} more", style="red"))
    if status.stopped:
        lines.append(Text(status.stopped))
    if status.can_be_resumed:
        lines.append(Text(f"continue it with: fedlora resume {shlex.quote(status.run)}"))
    return lines


def _state_words(status: RunStatus) -> str:
    ago = f"last written {format_seconds(status.last_written_seconds)} ago"
    if status.state == "running":
        return f"running (process {status.process}), {ago}"
    if status.state == "ended":
        return "ended"
    return f"does not run on this machine and has not ended, {ago}"


def _progress(status: RunStatus) -> str:
    """Return round, metric, bytes, seconds and failures in a line."""
    if status.server_round is None:
        return "no round is done"
    of = "" if status.rounds is None else f" of {status.rounds}"
    step = "epoch" if status.rounds is None else "round"
    parts = [f"{step} {status.server_round}{of}"]
    if status.metric is not None:
        parts.append(f"{metric_label(status.metric)} {format_metric(status.metric, status.value)}")
    parts += [f"{format_bytes(status.wire_bytes)} sent", format_seconds(status.seconds)]
    if status.simulated_seconds is not None:
        parts.append(f"{format_seconds(status.simulated_seconds)} of simulated time")
    if status.num_failed:
        failures = "failure" if status.num_failed == 1 else "failures"
        parts.append(f"{status.num_failed} {failures}, {len(status.failed)} in this {step}")
    return ", ".join(parts)


def _holder(lock: Path) -> int | None:
    """Return the process that holds the lock of a run's folder on this machine; None where none does."""
    try:
        file = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(file, 32).decode("ascii", "replace").strip()
        return int(holder) if holder.isdecimal() else 0
    finally:
        os.close(file)
    return None


def _rounds(config: Path, lines: list[dict[str, Any]]) -> int | None:
    """Return how many rounds a run is to have; None for central training, or where nobody says."""
    if not config.is_file() or not kind_of(lines).has_clients:
        return None
    tree = parse_yaml(read_text(config, MOST_YAML_BYTES), config)
    section = tree.get("federation") if isinstance(tree, dict) else None
    rounds = section.get("rounds") if isinstance(section, dict) else None
    return rounds if isinstance(rounds, int) else None


def _headline(lines: list[dict[str, Any]]) -> str | None:
    """Return the metric that a run without a summary is most likely judged by."""
    last: dict[str, Any] = next((line for line in reversed(lines) if any(map(is_share, line))), {})
    return next((key for key in ("accuracy", *sorted(last)) if key in last and is_share(key)), None)
