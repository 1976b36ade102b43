"""What follows a run from outside: callbacks in Python, told round by round beside the display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

TRAINING = "train"
"""Phase of a round in which its cohort trains."""


class Callback(Protocol):
    """Follows a run: any object with these three methods. What one of them raises ends the run."""

    def round_started(self, server_round: int, num_clients: int) -> None:
        """A round's cohort, of so many clients, is about to train; rounds count from 1."""

    def round_done(self, metrics: Mapping[str, Any]) -> None:
        """A round is over; these are its line of ``metrics.jsonl``. Round 0 is before training."""

    def run_done(self, summary: Mapping[str, Any]) -> None:
        """The run came to its end; this is the content of ``summary.json``."""


class Display(Protocol):
    """Shows a run; ``federated.results.console.RunDisplay`` is one."""

    def run_started(self, num_rounds: int, *, headline_metric: str, notes: Sequence[str]) -> None:
        """The run begins; the notes say what is cached and what is not."""

    def rounds_before(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """The run goes on after these lines of ``metrics.jsonl``."""

    def round_started(self, server_round: int, cohort_size: int, phase: str) -> None:
        """Messages of a round are about to be sent."""

    def round_done(self, metrics: Mapping[str, Any]) -> None:
        """A round is over."""


class Followers:
    """Tells a display and callbacks, in that order, what happens; to the server it is one display.

    Args:
        display: None: nobody watches.
        callbacks: Told after it, in their order.
    """

    def __init__(self, display: Display | None, callbacks: Sequence[Callback]) -> None:
        self._display = display
        self._callbacks = tuple(callbacks)

    def run_started(self, num_rounds: int, *, headline_metric: str, notes: Sequence[str]) -> None:
        """Tell the display; callbacks know the run that they were made for."""
        if self._display is not None:
            self._display.run_started(num_rounds, headline_metric=headline_metric, notes=notes)

    def rounds_before(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Tell the display; callbacks were told in the attempt that made them."""
        if self._display is not None:
            self._display.rounds_before(lines)

    def round_started(self, server_round: int, cohort_size: int, phase: str) -> None:
        """Tell the display of every broadcast, callbacks of those that train."""
        if self._display is not None:
            self._display.round_started(server_round, cohort_size, phase)
        if phase == TRAINING:
            for callback in self._callbacks:
                callback.round_started(server_round, cohort_size)

    def round_done(self, metrics: Mapping[str, Any]) -> None:
        """Tell all."""
        if self._display is not None:
            self._display.round_done(metrics)
        for callback in self._callbacks:
            callback.round_done(metrics)

    def run_done(self, summary: Mapping[str, Any]) -> None:
        """Tell the callbacks."""
        for callback in self._callbacks:
            callback.run_done(summary)
