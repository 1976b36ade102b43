"""CLIP's temperature: what its parameter is called, and the bound that it never passes.

A value enters at three places: a step of the optimizer, a state that is put into a model, and the server's
state after a round. All three ask here.
"""

from __future__ import annotations

import math

from models.state import State

MAX_LOG_TEMPERATURE = math.log(100.0)
"""CLIP keeps exp(logit_scale) at 100 or below (Radford et al. 2021, 2.5)."""

_LEAF = "logit_scale"


def is_temperature(name: str) -> bool:
    """Whether a parameter name is that of a CLIP's log-temperature."""
    return name.rsplit(".", 1)[-1] == _LEAF


def within_bound(state: State) -> State:
    """Return a state whose temperature is at its bound or below; the same one where it is."""
    above = {
        name: state[name].clamp(max=MAX_LOG_TEMPERATURE)
        for name in state
        if is_temperature(name) and bool((state[name] > MAX_LOG_TEMPERATURE).any())
    }
    return {**state, **above} if above else state
