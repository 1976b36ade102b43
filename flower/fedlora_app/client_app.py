"""The ClientApp of fedlora."""

from federated.rounds.client import app

__all__ = ["app"]
