"""A display that shows nothing, for benchmarks that want to know when rounds end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self


class SilentDisplay:
    """What a run tells its display, ignored; override what is of interest."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Nothing to close."""

    def run_started(self, num_rounds: int, *, headline_metric: str, notes: Sequence[str]) -> None:
        """Ignored."""

    def round_started(self, server_round: int, cohort_size: int, phase: str) -> None:
        """Ignored."""

    def client_done(self, client_id: int, status: str) -> None:
        """Ignored."""

    def round_done(self, metrics: Mapping[str, Any]) -> None:
        """Ignored."""
