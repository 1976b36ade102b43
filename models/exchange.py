"""What travels: reading it from and writing it into a model, by wire name.

Used at both ends of every transfer of a round. The parameters are looked up once, when what
travels is named; after that reading and writing walk a short dictionary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from models.errors import UserError
from models.state import FlatState, State, layout_of, num_values
from models.temperature import MAX_LOG_TEMPERATURE, is_temperature

_MAX_KEPT_VALUES = 4_000_000
"""States up to this size pass through memory of their own, 16 MB."""


def wire_name(parameter_name: str) -> str:
    """Name under which a parameter travels: its own, less PEFT's adapter name "default"."""
    return ".".join(part for part in parameter_name.split(".") if part != "default")


def find_parameters(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Look up parameters by wire name.

    Returns:
        Wire name -> parameter, sorted by name.

    Raises:
        UserError: A name fits no parameter.
    """
    by_wire_name = {wire_name(name): parameter for name, parameter in model.named_parameters()}
    found: dict[str, nn.Parameter] = {}
    for name in sorted(set(names)):
        if name not in by_wire_name:
            raise UserError(f"cannot exchange {name!r}: the model has no such parameter")
        found[name] = by_wire_name[name]
    return found


class Exchanged:
    """The parameters that travel, and how their values come out of the model and into it.

    Attributes:
        parameters: Wire name -> live parameter, sorted by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = {name: parameters[name] for name in sorted(parameters)}
        self._layout = layout_of(self.parameters)
        self._temperatures = [p for name, p in self.parameters.items() if is_temperature(name)]
        self._kept: FlatState | None = None

    @torch.no_grad()
    def read(self) -> FlatState:
        """Copy the values to the CPU as float32."""
        values = self._buffer()
        if self.parameters:
            torch._foreach_copy_(list(values.values()), list(self.parameters.values()))
        return values if values is not self._kept else FlatState(values.vector.clone(), self._layout)

    def _buffer(self) -> FlatState:
        """Return memory for the values; small ones have it for good, so that it is cut once."""
        if self._kept is not None:
            return self._kept
        size = num_values(self._layout)
        values = FlatState(torch.empty(size, dtype=torch.float32), self._layout)
        if size <= _MAX_KEPT_VALUES:
            self._kept = values
        return values

    @torch.no_grad()
    def write(self, state: State, *, partial: bool = False) -> None:
        """Overwrite the values in place, all or none; the federated model's `set_state`."""
        if not isinstance(state, FlatState) or state.layout != self._layout:
            self._check(state, partial=partial)
        elif self._kept is not None:
            self._kept.vector.copy_(state.vector)
            state = self._kept
        if state:
            torch._foreach_copy_([self.parameters[name] for name in state], list(state.values()))
            for temperature in self._temperatures:
                temperature.clamp_(max=MAX_LOG_TEMPERATURE)

    def _check(self, state: State, *, partial: bool) -> None:
        unknown = state.keys() - self.parameters.keys()
        missing = set() if partial else self.parameters.keys() - state.keys()
        if unknown or missing:
            what, key = ("unknown", min(unknown)) if unknown else ("missing", min(missing))
            raise UserError(
                f"the state does not fit the model: {len(unknown)} names unknown, {len(missing)} missing; "
                f"first {what}: {key}. Both sides must use the same model and LoRA settings"
            )
        for name, value in state.items():
            wanted = tuple(self.parameters[name].shape)
            if value.shape != wanted:
                raise UserError(
                    f"the state does not fit the model: {name} has shape {tuple(value.shape)}, the model "
                    f"wants {wanted}. Both sides must use the same model and LoRA settings"
                )
