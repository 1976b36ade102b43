"""A command of ``fedlora`` as a test calls it."""

from __future__ import annotations

import pytest

from federated.cli import main
from federated.config import plugins
from models.registration import added, remove


def fedlora(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def forget_plugins() -> None:
    """Take what plugins added out of the registries, and the plugins themselves for not loaded."""
    remove(list(added()))
    plugins._loaded.clear()
    plugins.installed.cache_clear()
