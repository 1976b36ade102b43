"""The conditions that a run is under: faults on purpose, a simulated clock, an end before its last round.

Each is off by default. The server asks here, at the places of a round where they act.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from federated.communication.ledger import Ledger
from federated.communication.metered_grid import MeteredGrid, delivery_by
from federated.communication.simulated_clock import SimulatedClock
from federated.methods import ServerState
from federated.results.round_record import failure_counts
from federated.rounds.checkpoint import Part
from federated.rounds.client_devices import is_reachable, simulated_clock
from federated.rounds.early_stopping import EarlyStopping, early_stopping
from federated.rounds.faults import FaultPlan, fault_plan, faulty_delivery
from federated.rounds.run import Run


class EarlyEnd(Exception):  # noqa: N818 - no error
    """Leaves Flower's loop of rounds before the last one."""


@dataclass(eq=False)
class Conditions:
    """What befalls a run.

    Attributes:
        seed: Of the run.
        faults: Which client fails how.
        clock: Times the messages; None: nobody does.
        stopping: Ends the run early; None: nothing does.
    """

    seed: int
    faults: FaultPlan
    clock: SimulatedClock | None
    stopping: EarlyStopping | None

    def parts(self) -> dict[str, Part]:
        """Return what goes into every commit."""
        parts = {"clock": self.clock, "early_stopping": self.stopping}
        return {name: part for name, part in parts.items() if part is not None}

    def metered(
        self,
        grid: Grid,
        ledger: Ledger,
        client_of: Callable[[int], int],
        num_values: Callable[[Message], int],
    ) -> MeteredGrid:
        """Return the grid that the server sends by: counted, timed, and with messages lost as planned.

        Args:
            grid: The engine's.
            ledger: Where the messages are counted.
            client_of: Client id of a node id.
            num_values: How many values a reply carries.
        """
        ledger.timed = self.clock is not None
        deliver = faulty_delivery(delivery_by(grid), self.faults, client_of)
        return MeteredGrid(grid, ledger, client_of, num_values, deliver=deliver, clock=self.clock)

    def is_reachable(self, server_round: int, client_id: int) -> bool:
        """Whether a client can be reached in a round."""
        return self.clock is None or is_reachable(self.clock, self.seed, server_round, client_id)

    def end_round(self, server_state: ServerState, server_round: int) -> dict[str, float]:
        """Return their part of a round's line of ``metrics.jsonl``: validation metrics, simulated time."""
        line = {} if self.stopping is None else self.stopping.evaluate(server_state, server_round)
        return line if self.clock is None else line | self.clock.end_round(server_round)

    def reason_to_end(self, server_state: ServerState, server_round: int) -> str | None:
        """Return why a run ends after a round that is not its last; None where it goes on."""
        if self.stopping is None:
            return None
        self.stopping.evaluate(server_state, server_round)
        return self.stopping.reason(server_round)

    def summary(self, server_state: ServerState, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return what ``summary.json`` says of them; nothing of what did not happen."""
        said: dict[str, Any] = {
            "stopped": self.reason_to_end(server_state, lines[-1]["server_round"]),
            "simulated_seconds": None if self.clock is None else self.clock.total_seconds,
            "failures": failure_counts(lines) or None,
        }
        return {key: value for key, value in said.items() if value is not None}


def conditions_of(run: Run) -> Conditions:
    """Return the conditions that a run's configuration asks for."""
    config = run.config
    return Conditions(config.seed, fault_plan(config), simulated_clock(config), early_stopping(run))
