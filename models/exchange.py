"""What travels: reading it from and writing it into a model, by wire name.

Used at both ends of every transfer of a round. The parameters are looked up once, when what
travels is named; after that reading and writing walk a short dictionary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from models.errors import UserError
from models.state import FlatState, State, flat, layout_of


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


@torch.no_grad()
def read_state(parameters: Mapping[str, nn.Parameter]) -> State:
    """Copy parameters to the CPU as detached float32 tensors, end to end in one vector."""
    layout = layout_of(parameters)
    if not layout:
        return flat({})
    vector = parameters_to_vector(parameters[name] for name, _ in layout)
    return FlatState(vector.detach().to(device="cpu", dtype=torch.float32), layout)


@torch.no_grad()
def write_state(parameters: Mapping[str, nn.Parameter], state: State, *, partial: bool = False) -> None:
    """Overwrite parameters in place, all or none.

    Args:
        parameters: Wire name -> parameter.
        state: Wire name -> tensor of any float dtype and device.
        partial: Accept a subset of the names.

    Raises:
        UserError: A name is unknown or missing, or a shape differs; nothing is written then.
    """
    unknown = state.keys() - parameters.keys()
    missing = set() if partial else parameters.keys() - state.keys()
    if unknown or missing:
        what, key = ("unknown", min(unknown)) if unknown else ("missing", min(missing))
        raise UserError(
            f"the state does not fit the model: {len(unknown)} names unknown, {len(missing)} missing; "
            f"first {what}: {key}. Both sides must use the same model and LoRA settings"
        )
    for name, value in state.items():
        if value.shape != parameters[name].shape:
            raise UserError(
                f"the state does not fit the model: {name} has shape {tuple(value.shape)}, "
                f"the model wants {tuple(parameters[name].shape)}. Both sides must use the same model and "
                "LoRA settings"
            )
    if state:
        torch._foreach_copy_([parameters[name] for name in state], list(state.values()))
