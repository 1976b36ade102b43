"""Sections for runs under conditions that are not those of a laboratory: faults on purpose."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from federated.config.section import Section

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

    @model_validator(mode="after")
    def _shares_of_one_whole(self) -> FaultsSection:
        if (total := sum(self.shares.values())) > 1 + 1e-9:
            raise ValueError(f"the shares of faults add up to {total:g}, and 1 is all messages: lower them")
        return self

    @property
    def shares(self) -> dict[str, float]:
        """Fault -> its share of the training messages."""
        return {name: getattr(self, name) for name in FaultsSection.model_fields}
