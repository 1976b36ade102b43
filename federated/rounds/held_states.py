"""What each client holds, as the server can know it: what it sent, decoded as the client decodes it.

Elsewhere clients hold what the server has.
"""

from __future__ import annotations

from collections.abc import Mapping

from federated.methods import Downlink, receive
from models.state import State


class HeldStates:
    """The wire states of clients under a lossy downlink.

    Args:
        remembers: Whether clients keep what they receive from round to round.
    """

    def __init__(self, *, remembers: bool) -> None:
        self._remembers = remembers
        self._kept: dict[int, State] = {}
        self._sent: dict[int, State] = {}

    def kept(self, client_id: int) -> State:
        """Return what a client keeps; empty where that is nothing, or not known."""
        return self._kept.get(client_id, {})

    def restore(self, kept: Mapping[int, State]) -> None:
        """Go on from what clients keep."""
        self._kept = dict(kept)

    def begin_broadcast(self) -> None:
        """Forget what was sent before and has not been answered."""
        self._sent.clear()

    def sent(self, client_id: int, downlink: Downlink) -> None:
        """Note a downlink, decoded, that is on its way."""
        self._sent[client_id] = receive(downlink, self._kept.get(client_id, {}))

    def answered(self, client_id: int) -> None:
        """Note that the client has received what was sent last."""
        if self._remembers:
            self._kept[client_id] = self._sent[client_id]

    def failed(self, client_id: int) -> None:
        """Note that the client may have lost what it held; it will be sent everything."""
        self._kept.pop(client_id, None)

    def started_from(self, client_id: int) -> State:
        """Return the wire state that a client of the present round started from."""
        return self._sent[client_id]
