"""The adapters of several clients in one forward pass: grouped matrix products beside one frozen base.

Used in a round by ``federated.engines.batched_training``: the rows of a batch are K equal blocks, block k
belongs to client k, and every adapted layer adds to block k the product of client k's own factors. Rows of
different clients never meet (LayerNorm and attention act within a sample), so each slice of a stack's
gradient is what that client would have computed alone.

Sources: Chen et al., Punica, arXiv:2310.18547, and Sheng et al., S-LoRA, arXiv:2311.03285, group adapters in
this way for inference; here gradients flow as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoRALinear
from torch import Tensor, nn

from lora.adapters import (
    DEFAULT_ADAPTER,
    adapter_layers,
    adapter_parameters,
    find_towers,
    head_trains,
    unwrap,
    wire_name,
)
from lora.biases import trained_temperature
from models.state import State


class StackedAdapter(nn.Module):
    """A frozen Linear with one adapter a client.

    Args:
        base: The frozen layer, d_in -> d_out.
        a: Every client's lora_A, (K, r, d_in).
        b: Every client's lora_B, (K, d_out, r).
        scaling: The factor in front of B @ A.
    """

    def __init__(self, base: nn.Module, a: nn.Parameter, b: nn.Parameter, scaling: float) -> None:
        super().__init__()
        self.base, self.a, self.b, self.scaling = base, a, b, scaling

    def forward(self, rows: Tensor) -> Tensor:
        """Map (K * n, ..., d_in) to (K * n, ..., d_out): base(x) + scaling * x A_k^T B_k^T in block k."""
        out = self.base(rows)
        blocks = rows.reshape(self.a.shape[0], -1, rows.shape[-1])  # (K, N, d_in)
        if not torch.is_autocast_enabled(rows.device.type):
            blocks = blocks.to(self.a.dtype)
        inner = torch.bmm(blocks, self.a.transpose(1, 2))  # (K, N, r)
        own = out.view(self.a.shape[0], -1, out.shape[-1])  # (K, N, d_out)
        if own.dtype == inner.dtype:
            return torch.baddbmm(own, inner, self.b.transpose(1, 2), alpha=self.scaling).view_as(out)
        product = self.scaling * torch.bmm(inner, self.b.transpose(1, 2))
        return (own + product).to(own.dtype).view_as(out)


class StackedHead(nn.Module):
    """One trained Linear a client.

    Args:
        weight: (K, C, D).
        bias: (K * C,).
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, rows: Tensor) -> Tensor:
        """Map (K * n, D) to (K * n, C), block k by head k."""
        num_clients, num_classes, _ = self.weight.shape
        blocks = rows.view(num_clients, -1, rows.shape[-1])  # (K, n, D)
        bias = self.bias.view(num_clients, 1, num_classes)
        return torch.baddbmm(bias, blocks, self.weight.transpose(1, 2)).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class Place:
    """A layer of the model, or its temperature, and what stands in its place while several clients train."""

    parent: nn.Module
    leaf: str
    own: nn.Module | nn.Parameter
    stacked: nn.Module | nn.Parameter


@dataclass(frozen=True, eq=False)
class Stacks:
    """What K clients train, stacked.

    Attributes:
        num_clients: K.
        values: Wire name -> (K, *shape); a vector's stack is flat, (K * n,), so that a weight decay that
            spares vectors spares it. The temperature's is (K,).
        shapes: Wire name -> shape for one client.
        places: Where the stacks act in the model.
    """

    num_clients: int
    values: dict[str, nn.Parameter]
    shapes: dict[str, tuple[int, ...]]
    places: tuple[Place, ...]

    @torch.no_grad()
    def load(self, states: Sequence[State]) -> None:
        """Give client k the values of ``states[k]``."""
        alike = all(state is states[0] for state in states)
        for name, stack in self.values.items():
            rows = by_client(stack, self.num_clients)
            values = states[0][name].unsqueeze(0) if alike else torch.stack([s[name] for s in states])
            rows.copy_(values.reshape(-1, *rows.shape[1:]))

    def read(self) -> list[State]:
        """Copy every client's values: wire name -> detached float32 CPU tensor, sorted by name."""
        copies = {
            name: by_client(self.values[name], self.num_clients)
            .detach()
            .to(device="cpu", dtype=torch.float32, copy=True)
            for name in sorted(self.values)
        }
        return [
            {name: copy[k].view(self.shapes[name]) for name, copy in copies.items()}
            for k in range(self.num_clients)
        ]

    def let_train(self, names: Collection[str]) -> list[nn.Parameter]:
        """Let these names get gradients and no others; return their stacks."""
        for name, stack in self.values.items():
            stack.requires_grad_(name in names)
        return [stack for stack in self.values.values() if stack.requires_grad]

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Let the model run with the stacks inside the block; its own adapters and head are not touched."""
        for place in self.places:
            setattr(place.parent, place.leaf, place.stacked)
        try:
            yield
        finally:
            for place in self.places:
                setattr(place.parent, place.leaf, place.own)


def by_client(stack: Tensor, num_clients: int) -> Tensor:
    """View a stack (or its gradient) as (K, ...), flat ones included."""
    return stack.view(num_clients, -1) if stack.ndim == 1 else stack


def build_stacks(model: nn.Module, num_clients: int) -> Stacks:
    """Make stacks of zeros for what travels of a model without an ``obstacle``."""
    root = unwrap(model)
    values: dict[str, nn.Parameter] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def stack(name: str, like: Tensor) -> nn.Parameter:
        shapes[name] = tuple(like.shape)
        shape = (num_clients * like.numel(),) if like.ndim == 1 else (num_clients, *like.shape)
        values[name] = nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))
        return values[name]

    places: list[Place] = []
    for name, layer in adapter_layers(root, DEFAULT_ADAPTER):
        a = stack(f"{name}.lora_A.weight", layer.lora_A[DEFAULT_ADAPTER].weight)
        b = stack(f"{name}.lora_B.weight", layer.lora_B[DEFAULT_ADAPTER].weight)
        stacked = StackedAdapter(layer.get_base_layer(), a, b, float(layer.scaling[DEFAULT_ADAPTER]))
        parent, _, leaf = name.rpartition(".")
        places.append(Place(root.get_submodule(parent), leaf, layer, stacked))
    if head_trains(root):
        head = StackedHead(stack("head.weight", root.head.weight), stack("head.bias", root.head.bias))
        places.append(Place(root, "head", root.head, head))
    for name, own in trained_temperature(root).items():
        parent, _, leaf = name.rpartition(".")
        places.append(Place(root.get_submodule(parent), leaf, own, stack(name, own)))
    return Stacks(num_clients, values, shapes, tuple(places))


def obstacle(model: nn.Module) -> str | None:
    """Say why a model's clients cannot be trained in one pass; None if they can."""
    root = unwrap(model)
    if find_towers(root).backend != "huggingface":
        return "open_clip models run their attention fused"
    for name, layer in adapter_layers(root):
        if reason := _layer_obstacle(layer):
            return f"{name} {reason}"
    known = {f"head.{name}" for name, _ in root.head.named_parameters()} if head_trains(root) else set()
    known |= {*adapter_parameters(root), *trained_temperature(root)}
    moving = {wire_name(name) for name, parameter in root.named_parameters() if parameter.requires_grad}
    if others := sorted((moving | set(root.exchanged_names)) - known):
        return f"{others[0]} trains or travels, and only adapters and a linear head can be stacked"
    return None


def _layer_obstacle(layer: Any) -> str | None:
    if not isinstance(layer, LoRALinear) or not isinstance(layer.get_base_layer(), nn.Linear):
        return "is adapted and no Linear"
    if set(layer.lora_A) != {DEFAULT_ADAPTER} or layer.active_adapters != [DEFAULT_ADAPTER]:
        return "has several adapters"
    if layer.disable_adapters or layer.merged:
        return "has its adapter switched off or merged"
    if getattr(layer.lora_dropout[DEFAULT_ADAPTER], "p", 0.0) > 0:
        return "has dropout, whose masks would be drawn in another order (set lora.lora_dropout=0)"
    if layer.use_dora[DEFAULT_ADAPTER] or layer.lora_bias[DEFAULT_ADAPTER]:
        return "has DoRA or a bias in its adapter"
    return None


def gradient_norms(stacks: Sequence[nn.Parameter], num_clients: int) -> Tensor:
    """Each client's gradient norm over all its values, (K,)."""
    grads = [by_client(p.grad, num_clients) for p in stacks if p.grad is not None]
    norms = [torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in grads]  # (K,) each
    return torch.linalg.vector_norm(torch.stack(norms), dim=0)


@torch.no_grad()
def clip_gradients(stacks: Sequence[nn.Parameter], num_clients: int, clip_norm: float) -> None:
    """Scale each client's gradients so that their norm is at most ``clip_norm``.

    The arithmetic is that of ``torch.nn.utils.clip_grad_norm_`` for each client.
    """
    factors = (clip_norm / (gradient_norms(stacks, num_clients) + 1e-6)).clamp(max=1.0)  # (K,)
    for parameter in stacks:
        if parameter.grad is not None:
            rows = by_client(parameter.grad, num_clients)
            rows.mul_(factors.view(num_clients, *([1] * (rows.ndim - 1))))
