"""Sections for runs as they are outside a laboratory: clients that fail, slow links and devices."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from federated.config.section import Section
from models.untrusted import PathText

Share = Annotated[float, Field(ge=0, le=1)]


class FaultsSection(Section):
    """Faults on purpose: the share of the training messages that each strikes, at most one a message. Who is
    struck follows from the seed, the round and the client alone."""

    dropout: Share = 0.0
    """The client never replies."""
    crash_before_training: Share = 0.0
    """The client fails when it has received the message."""
    crash_after_training: Share = 0.0
    """The client fails when it has trained; what it has learnt is lost to it, too."""
    not_finite: Share = 0.0
    """The reply's values are NaN."""
    wrong_shape: Share = 0.0
    """The reply holds a state of other shapes."""
    lying_examples: Share = 0.0
    """The client claims a thousand times the examples that it trained on."""
    torn_payload: Share = 0.0
    """Half of the reply's values are missing."""
    duplicate: Share = 0.0
    """The reply comes twice; it counts once, and both are paid."""
    late: Share = 0.0
    """The reply comes after ``clock.deadline_seconds``, which must be given."""

    @model_validator(mode="after")
    def _shares_of_one_whole(self) -> FaultsSection:
        if (total := sum(self.shares.values())) > 1 + 1e-9:
            raise ValueError(f"the shares of faults add up to {total:g}, and 1 is all messages: lower them")
        return self

    @property
    def shares(self) -> dict[str, float]:
        """Fault -> its share of the training messages."""
        return {name: getattr(self, name) for name in FaultsSection.model_fields}


Spread = float | dict[str, Any]
"""One value for all clients, or the ``name`` and options of a distribution that each draws its own from."""


class ClockSection(Section):
    """Simulated time, off when not given: the clients' links and devices, and how long the server waits."""

    uplink_mbps: Spread | None = None
    """A client's uplink in megabits a second; ``communication.uplink_mbps`` when not given."""
    downlink_mbps: Spread | None = None
    """A client's downlink likewise; ``communication.downlink_mbps`` when not given."""
    latency_seconds: Spread = 0.05
    """Added to every transfer."""
    seconds_per_step: float = Field(0.1, ge=0)
    """Seconds of a local step on a client whose compute factor is 1."""
    compute_factor: Spread = 1.0
    """How many times as long a client's local steps take."""
    availability: Spread = 1.0
    """Share of the rounds in which a client can be reached; in the others nothing is sent to it."""
    path: PathText | None = None
    """CSV file with ``client_id`` and any of the quantities above but seconds_per_step: it goes first."""
    deadline_seconds: float | None = Field(None, gt=0)
    """Simulated seconds that the server waits for the replies of a broadcast; a later one is refused."""
