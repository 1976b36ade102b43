"""Names of the hub without a network: one request, one message."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import datasets
import huggingface_hub
import pytest

from federated.data.dataset import load_data
from models.clip_loading import _local_only, load_clip
from models.errors import UserError

MOST = 2
"""Ours, and one that huggingface_hub makes about itself before its first."""


@pytest.fixture
def look_ups(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The hosts that were asked for; none is found, and waiting for another try is a failure."""
    asked: list[Any] = []

    def not_found(host: Any, *_: Any, **__: Any) -> Any:
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    def no_wait(seconds: float) -> None:
        raise AssertionError(f"waited for {seconds} s")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", not_found)
    monkeypatch.setattr(time, "sleep", no_wait)
    huggingface_hub.close_session()
    _local_only.cache_clear()
    yield asked
    huggingface_hub.close_session()
    _local_only.cache_clear()


def test_a_data_set_is_asked_for_once_and_the_libraries_are_as_before(look_ups: list[Any]) -> None:
    with pytest.raises(UserError, match="cannot get the data set 'nobody/nothing'.*network"):
        load_data("hub", path="nobody/nothing")
    assert len(look_ups) <= MOST
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_model_is_asked_for_once(look_ups: list[Any]) -> None:
    with pytest.raises(UserError, match="not in the local cache, and the Hugging Face hub cannot be reached"):
        load_clip("nobody/nothing")
    assert len(look_ups) <= MOST
