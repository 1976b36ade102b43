"""The ServerApp of fedlora."""

from federated.rounds.server import app

__all__ = ["app"]
