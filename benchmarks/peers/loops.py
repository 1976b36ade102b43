"""Two loops without a framework: one model for all clients, and a copy of the model a client."""

from __future__ import annotations

import copy
import time

from torch import Tensor

from benchmarks.peers.plain import PlainClassifier, train
from benchmarks.peers.prepared import Prepared
from benchmarks.peers.timing import Timings


def plain_loop(prepared: Prepared) -> Timings:
    """One model; a client's values are copied in and out."""
    model = PlainClassifier(prepared)
    state, timings = model.get(), Timings()
    for of_client in prepared.rounds:
        started, states, losses = time.perf_counter(), [], []
        for steps in of_client.values():
            model.put(state)
            losses.append(train(model, prepared, steps))
            states.append(model.get())
        state = mean(states)
        timings.add(started, sum(losses) / len(losses))
    return timings


def model_per_client(prepared: Prepared) -> Timings:
    """A deep copy of the whole model for each client and round, as research code does."""
    model, timings = PlainClassifier(prepared), Timings()
    for of_client in prepared.rounds:
        started, states, losses = time.perf_counter(), [], []
        for steps in of_client.values():
            own = copy.deepcopy(model)
            own.live = {n.replace(".default", ""): p for n, p in own.named_parameters() if p.requires_grad}
            losses.append(train(own, prepared, steps))
            states.append(own.get())
        model.put(mean(states))
        timings.add(started, sum(losses) / len(losses))
    return timings


def mean(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Average states; the workloads' clients have equally many rows."""
    return {name: sum(state[name] for state in states) / len(states) for name in states[0]}
