"""The ServerApp of fedlora."""

from federated.engines.flower_apps import server as app

__all__ = ["app"]
