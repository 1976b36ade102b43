"""The ServerApp of fedlora."""

from federated.server import app

__all__ = ["app"]
