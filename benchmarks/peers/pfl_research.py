"""pfl-research's simulator (``pfl`` from PyPI) on the same model, rows and optimizer."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor

from benchmarks.peers.plain import PlainClassifier
from benchmarks.peers.prepared import Prepared
from benchmarks.peers.timing import Timings


class Noting(PlainClassifier):
    """The plain model, with pfl's two methods; notes the losses of its steps."""

    def __init__(self, prepared: Prepared) -> None:
        super().__init__(prepared)
        self.noted: list[float] = []

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """As the plain model's."""
        loss = super().loss(images, labels)
        self.noted.append(loss.item())
        return loss

    def metrics(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """Nothing is evaluated."""
        return {}


class Watch(TrainingProcessCallback):
    """Notes when each round ends."""

    def __init__(self, model: Noting, timings: Timings) -> None:
        self._model, self._timings, self._started = model, timings, time.perf_counter()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Enter the round."""
        losses = self._model.noted
        self._timings.add(self._started, sum(losses) / len(losses))
        losses.clear()
        self._started = time.perf_counter()
        return False, Metrics()


def pfl_simulation(prepared: Prepared) -> Timings:
    """Run all rounds in one process."""
    rate = prepared.settings["learning_rate"]
    module, timings = Noting(prepared), Timings()
    trained = list(module.live.values())
    model = PyTorchModel(
        module,
        lambda _, lr: torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True),
        torch.optim.SGD(trained, lr=1.0),
    )
    turns = [(r, c) for r, of_client in enumerate(prepared.rounds) for c in of_client]
    batch_size = max(len(step) for of_client in prepared.rounds for s in of_client.values() for step in s)

    def dataset_of(turn: tuple[int, int]) -> Dataset:
        steps = prepared.rounds[turn[0]][turn[1]]
        rows = list(itertools.chain.from_iterable(steps))
        return Dataset([prepared.pixel_values[rows], prepared.labels[rows]], user_id=str(turn))

    iterator = itertools.cycle(turns)
    data = FederatedDataset(dataset_of, lambda: next(iterator))
    backend = SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByUser()])
    num_rounds = len(prepared.rounds)
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=num_rounds,
            evaluation_frequency=10 * num_rounds,
            train_cohort_size=len(prepared.rounds[0]),
            val_cohort_size=0,
        ),
        backend,
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=rate, local_batch_size=batch_size),
        callbacks=[Watch(module, timings)],
    )
    return timings
