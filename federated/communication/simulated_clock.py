"""Simulated time: how long a round would take on clients' own links and devices; nothing is slowed down.

Seconds follow from the bytes of the ledger and the local steps that clients take, client by client and all at
once. The server waits for the slowest client, or until its deadline: a reply that comes later is paid, and
refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import Error, Message

from federated.communication.ledger import Transfer
from models.errors import UserError

_BITS_PER_BYTE, _MEGA = 8, 1e6
_DECIMALS = 6
_NO_REASON_CODE = 0
"""Flower's code of an error of no kind of its own."""


@dataclass(frozen=True)
class DeviceProfile:
    """A client's link and device.

    Attributes:
        uplink_mbps: Megabits a second to the server.
        downlink_mbps: Megabits a second from the server.
        latency_seconds: Added to each transfer.
        seconds_per_step: Of one local step.
        availability: Share of the rounds in which the client can be reached.
    """

    uplink_mbps: float
    downlink_mbps: float
    latency_seconds: float = 0.0
    seconds_per_step: float = 0.0
    availability: float = 1.0


def transfer_seconds(num_bytes: int, mbps: float, latency_seconds: float) -> float:
    """Return how long a message takes on a link."""
    return latency_seconds + num_bytes * _BITS_PER_BYTE / (mbps * _MEGA)


def arrivals(
    profile: DeviceProfile, downlink_bytes: int, busy_seconds: float, uplink_bytes: Iterable[int]
) -> list[float]:
    """Return when a client's messages arrive, in seconds after the broadcast.

    Args:
        profile: The client's.
        downlink_bytes: Of the message to it.
        busy_seconds: Between receiving and replying.
        uplink_bytes: Of each of its replies, which follow one another.

    Returns:
        The downlink's arrival, and each reply's.
    """
    now = transfer_seconds(downlink_bytes, profile.downlink_mbps, profile.latency_seconds)
    times = [now]
    now += busy_seconds
    for num_bytes in uplink_bytes:
        now += transfer_seconds(num_bytes, profile.uplink_mbps, profile.latency_seconds)
        times.append(now)
    return times


def broadcast_seconds(
    rows: Iterable[Sequence[Transfer]], deadline_seconds: float | None, timeout_seconds: float
) -> float:
    """Return how long the server waits for the replies to a broadcast.

    Args:
        rows: For each client its downlink and its replies, with their times.
        deadline_seconds: The server waits no longer; None: as long as it takes.
        timeout_seconds: It waits so long for a client that never replies, where there is no deadline.
    """
    silent = timeout_seconds if deadline_seconds is None else deadline_seconds
    ends = [of_client[-1].simulated_seconds or 0.0 if len(of_client) > 1 else silent for of_client in rows]
    slowest = max(ends, default=0.0)
    return slowest if deadline_seconds is None else min(slowest, deadline_seconds)


@dataclass(eq=False)
class SimulatedClock:
    """Times a run's messages; what it adds up over the rounds is in every commit.

    Attributes:
        profile_of: A client's link and device.
        num_steps: (round, client) -> local steps that it takes in its training.
        delay_seconds: (round, client) -> what delays its training besides.
        deadline_seconds: How long the server waits for the replies to a broadcast; None: until all are there.
        timeout_seconds: How long it waits for a client that never replies, where there is no deadline.
        total_seconds: Since the start of round 1.
    """

    profile_of: Callable[[int], DeviceProfile]
    num_steps: Callable[[int, int], int]
    delay_seconds: Callable[[int, int], float]
    deadline_seconds: float | None
    timeout_seconds: float
    total_seconds: float = 0.0
    _of_round: dict[int, float] = field(default_factory=dict)

    def timed(self, rows: Sequence[Transfer]) -> list[Transfer]:
        """Return one client's downlink and its replies with their times."""
        first, *replies = rows
        profile, busy_seconds = self.profile_of(first.client_id), 0.0
        if first.phase == "train":
            key = first.server_round, first.client_id
            busy_seconds = self.num_steps(*key) * profile.seconds_per_step + self.delay_seconds(*key)
        times = arrivals(profile, first.wire_bytes, busy_seconds, [row.wire_bytes for row in replies])
        return [
            replace(row, simulated_seconds=round(seconds, _DECIMALS))
            for row, seconds in zip(rows, times, strict=True)
        ]

    def on_time(
        self, requests: Sequence[Message], entered: Mapping[int, Sequence[tuple[Transfer, Message | None]]]
    ) -> list[Message]:
        """Let the time of a broadcast pass; return the replies, an error in place of each that came late.

        Args:
            requests: One a client.
            entered: Node id -> its rows, each with its reply; the downlink's has none.
        """
        self._pass([[row for row, _ in pairs] for pairs in entered.values()])
        kept = []
        for request in requests:
            for row, reply in entered[request.metadata.dst_node_id]:
                if reply is not None:
                    kept.append(self._late(request, row) if self._is_late(row) else reply)
        return kept

    def _pass(self, rows: Sequence[Sequence[Transfer]]) -> None:
        server_round = rows[0][0].server_round
        seconds = broadcast_seconds(rows, self.deadline_seconds, self.timeout_seconds)
        self._of_round[server_round] = self._of_round.get(server_round, 0.0) + seconds

    def _is_late(self, row: Transfer) -> bool:
        seconds = row.simulated_seconds or 0.0
        return self.deadline_seconds is not None and seconds > self.deadline_seconds

    def _late(self, request: Message, row: Transfer) -> Message:
        reason = (
            f"its reply came late, after {row.simulated_seconds:.3g} s of simulated time: "
            f"clock.deadline_seconds is {self.deadline_seconds:g}"
        )
        return Message(Error(_NO_REASON_CODE, reason), reply_to=request)

    def end_round(self, server_round: int) -> dict[str, float]:
        """Return what a round's line of ``metrics.jsonl`` says of simulated time."""
        seconds = round(self._of_round.pop(server_round, 0.0), _DECIMALS)
        self.total_seconds = round(self.total_seconds + seconds, _DECIMALS)
        return {"simulated_seconds": seconds, "simulated_seconds_total": self.total_seconds}

    def state(self) -> Any:
        """Return what the rounds to come need of those that were."""
        return self.total_seconds

    def restore(self, state: Any) -> None:
        """Go on from what ``state`` returned.

        Raises:
            UserError: It is no number of seconds.
        """
        if not isinstance(state, int | float) or not 0 <= state < float("inf"):
            raise UserError(f"the simulated time of a commit is {state!r}, not a number of seconds")
        self.total_seconds = float(state)
