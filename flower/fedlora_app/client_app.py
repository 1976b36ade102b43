"""The ClientApp of fedlora."""

from federated.engines.flower_apps import client as app

__all__ = ["app"]
