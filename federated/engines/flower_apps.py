"""The apps that Flower's own engines load; each process builds the run that the run config describes once."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from federated.config.config_files import load_config, parse_config
from federated.config.plugins import load_plugins
from federated.rounds.client import client_app
from federated.rounds.run import Run, build_run
from federated.rounds.server import server_app
from models.registration import added
from models.untrusted import parse_yaml

CONFIG_KEY, OVERRIDES_KEY, PLUGINS_KEY = "config", "overrides", "plugins"
"""Keys of Flower's run config: a configuration (name, path or YAML text), ``key=value`` overrides, and plugin
files, with blanks between."""

client, server = ClientApp(), ServerApp()


@client.train()
@client.evaluate()
@client.query()
def answer(message: Message, context: Context) -> Message:
    """Let the client of this process's run reply to a message."""
    return client_app(run_of(context.run_config))(message, context)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Serve the run."""
    server_app(run_of(context.run_config))(grid, context)


def run_of(run_config: Mapping[str, Any]) -> Run:
    """Return the run that a Flower run config describes; the same object each time in one process.

    Torch's threads follow the configuration here, because Flower's engines call the apps in processes of
    their own, and the number of threads decides the last bits of a result.
    """
    load_plugins(str(run_config.get(PLUGINS_KEY, "")).split())
    config, overrides = str(run_config[CONFIG_KEY]), str(run_config.get(OVERRIDES_KEY, ""))
    run = _built(config, overrides, tuple(added().items()))
    if torch.get_num_threads() != run.config.engine.threads:
        torch.set_num_threads(run.config.engine.threads)
    return run


@functools.lru_cache(maxsize=1)
def _built(config: str, overrides: str, plugins: tuple[object, ...]) -> Run:
    if "\n" in config:
        return build_run(parse_config(parse_yaml(config, "the run config") or {}, source="the run config"))
    return build_run(load_config(config, overrides.split()))
