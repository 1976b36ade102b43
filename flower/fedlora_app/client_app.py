"""The ClientApp of fedlora."""

from federated.client import app

__all__ = ["app"]
