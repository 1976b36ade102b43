"""A federation of least-squares clients in plain tensors, for the tests of the aggregators.

Each client holds base weights, a wire state and a version, exactly as a real one; nothing here is Flower's or
CLIP's. Every module is a linear map of its own, none of them square, with a target that differs by client.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from federated.methods import (
    NEVER,
    Aggregator,
    BaseDelta,
    ClientProfile,
    ServerState,
    Update,
    pack_downlink,
    receive,
    unpack_downlink,
)
from models.state import State

SHAPES = {"tower.first": (7, 12), "tower.second": (13, 6)}
"""Module -> (d_out, d_in)."""

NUM_EXAMPLES = (5, 40, 11, 23, 2)
RANK = 4
MIXED_RANKS = (4, 1, 2, 4, 3)
ALPHA = 6.0


def a_name(module: str) -> str:
    return f"{module}.lora_A.weight"


def b_name(module: str) -> str:
    return f"{module}.lora_B.weight"


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scaling_of(rank: int, *, rank_stabilised: bool = False) -> dict[str, float]:
    """alpha / r, or alpha / sqrt(r); the second module has twice the alpha."""
    scale = ALPHA / (math.sqrt(rank) if rank_stabilised else rank)
    return {module: scale * (1 + index) for index, module in enumerate(SHAPES)}


def adapter(
    rank: int = RANK, *, seed: int = 0, trained: bool = False, dtype: torch.dtype = torch.float64
) -> State:
    """A first global state: A random, B zero (random when ``trained``), and a head."""
    state = {"head.bias": normal(seed + 90, 3, dtype=dtype)}
    for index, (module, (d_out, d_in)) in enumerate(SHAPES.items()):
        state[a_name(module)] = normal(seed + index, rank, d_in, dtype=dtype) / math.sqrt(d_in)
        b = normal(seed + index + 10, d_out, rank, dtype=dtype) / 3
        state[b_name(module)] = b if trained else torch.zeros_like(b)
    return dict(sorted(state.items()))


@dataclass
class Client:
    """One client with everything it keeps between rounds."""

    client_id: int
    num_examples: int
    rank: int
    scaling: dict[str, float]
    base: State
    held: State
    merged: dict[str, BaseDelta] = field(default_factory=dict)
    version: int = NEVER
    start: State = field(default_factory=dict)
    profile_rank: int | None = None

    def profile(self) -> ClientProfile:
        return ClientProfile(self.profile_rank, self.scaling, self.version)


@dataclass
class Federation:
    """A server, its clients and the weights that they all started from."""

    aggregator: Aggregator
    server: ServerState
    clients: list[Client]
    pretrained: State

    def global_weights(self) -> State:
        """W0 + base delta + s B A, densely."""
        model = self.aggregator.client.to_model(self.server.state)
        weights = {}
        for module in SHAPES:
            product = model[b_name(module)] @ model[a_name(module)]
            weights[module] = self.pretrained[module] + self.server.scaling[module] * product
            if module in self.server.base_delta:
                weights[module] = weights[module] + self.server.base_delta[module].total()
        return weights

    def client_weights(self, client: Client) -> State:
        """The complete weights that a client computes with."""
        model = self.aggregator.client.to_model(client.held)
        return {
            module: client.base[module]
            + client.scaling[module] * model[b_name(module)] @ model[a_name(module)]
            for module in SHAPES
        }


def federation(
    aggregator: Aggregator,
    *,
    dtype: torch.dtype = torch.float64,
    ranks: Sequence[int] = (RANK,) * len(NUM_EXAMPLES),
    trained: bool = False,
    rank_stabilised: bool = False,
    extra: State | None = None,
) -> Federation:
    """Start a federation; a client's rank goes into its profile only where ranks are mixed."""
    pretrained = {m: normal(50 + i, *shape, dtype=dtype) for i, (m, shape) in enumerate(SHAPES.items())}
    state = {**adapter(RANK, trained=trained, dtype=dtype), **(extra or {})}
    server = aggregator.init(state, scaling_of(RANK, rank_stabilised=rank_stabilised))
    mixed = len(set(ranks)) > 1
    clients = [
        Client(
            client_id=client_id,
            num_examples=num_examples,
            rank=rank,
            scaling=scaling_of(rank, rank_stabilised=rank_stabilised),
            base=dict(pretrained),
            held={**adapter(rank, seed=1000 + client_id, dtype=dtype), **(extra or {})},
            profile_rank=rank if mixed else None,
        )
        for client_id, (num_examples, rank) in enumerate(zip(NUM_EXAMPLES, ranks, strict=True))
    ]
    return Federation(aggregator, server, clients, pretrained)


def send(fed: Federation, client: Client) -> None:
    """Bring one client up to date, by way of the wire form."""
    downlink = unpack_downlink(*pack_downlink(fed.aggregator.downlink(fed.server, client.profile())))
    for module, update in downlink.base_updates.items():
        merged = client.merged.get(module, BaseDelta()).received(update, client.version)
        client.merged = {**client.merged, module: merged}
        client.base[module] = fed.pretrained[module] + merged.total()
    client.held = receive(downlink, client.held)
    client.version = downlink.version
    client.start = fed.client_weights(client)


def train(fed: Federation, client: Client, steps: int) -> Update:
    """Take gradient steps on this client's own least-squares problem; return what travels up."""
    rules, server_round = fed.aggregator.client, fed.server.server_round + 1
    values = {name: tensor.clone() for name, tensor in rules.to_model(client.held).items()}
    bases = rules.bases(client.held)
    trains = fed.aggregator.trains(values, server_round)
    leaves = {n: (bases[n].T @ values[n] if n in bases else values[n]).requires_grad_() for n in trains}
    for _ in range(steps):
        live = {**values, **{n: bases[n] @ leaf if n in bases else leaf for n, leaf in leaves.items()}}
        gradients = torch.autograd.grad(_loss(client, live), list(leaves.values()))
        for leaf, gradient in zip(leaves.values(), gradients, strict=True):
            leaf.data -= 0.05 * gradient
    trained = {**values, **{n: (bases[n] @ x if n in bases else x).detach() for n, x in leaves.items()}}
    before, client.held = client.held, rules.to_wire(trained, client.held)
    names = fed.aggregator.uplink(client.held, server_round)
    state = {name: client.held[name] for name in names}
    first = {name: before[name] for name in names}
    return Update(client.client_id, client.num_examples, state, client.scaling, client.profile_rank, first)


def _loss(client: Client, live: State) -> Tensor:
    loss = (live["head.bias"] - client.client_id).square().mean()
    for index, module in enumerate(SHAPES):
        d_out, d_in = SHAPES[module]
        dtype = client.base[module].dtype
        inputs = normal(300 + 7 * client.client_id + index, 30, d_in, dtype=dtype)
        target = normal(400 + 7 * client.client_id + index, d_out, d_in, dtype=dtype) / 2
        delta = client.scaling[module] * live[b_name(module)] @ live[a_name(module)]
        if f"{module}.lora_B.private.weight" in live:
            delta = delta + live[f"{module}.lora_B.private.weight"] @ live[f"{module}.lora_A.private.weight"]
        loss = loss + (inputs @ (client.base[module] + delta - target).T).square().mean()
    return loss


def play_round(fed: Federation, cohort: Iterable[int], steps: int = 5) -> list[Update]:
    """One round with the given clients; returns the updates that were applied."""
    chosen = [fed.clients[client_id] for client_id in cohort]
    for client in chosen:
        send(fed, client)
    updates = [train(fed, client, steps) for client in chosen]
    fed.server = fed.aggregator.apply(fed.server, updates)
    return updates


def weights(updates: Sequence[Update]) -> list[float]:
    total = sum(update.num_examples for update in updates)
    return [update.num_examples / total for update in updates]


def naive_average(fed: Federation, cohort: Sequence[int], before: State) -> State:
    """The ideal: the old global weights plus the weighted change of every client's complete weights."""
    total = sum(fed.clients[client_id].num_examples for client_id in cohort)
    result = {module: weight.clone() for module, weight in before.items()}
    for client_id in cohort:
        client = fed.clients[client_id]
        end = fed.client_weights(client)
        for module in SHAPES:
            result[module] += client.num_examples / total * (end[module] - client.start[module])
    return result


def relative_distance(found: State, wanted: State, origin: State) -> float:
    """||found - wanted|| / ||wanted - origin|| over all modules."""
    distance = sum(float((found[m] - wanted[m]).double().square().sum()) for m in wanted)
    size = sum(float((wanted[m] - origin[m]).double().square().sum()) for m in wanted)
    return math.sqrt(distance / size)
