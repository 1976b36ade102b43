"""What kind of run it was, and the words that follow from it: federated, personal or central.

A personal run's method has no global model: clients score their own models on their own rows. A central run
has epochs, no clients and no messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from federated.results.round_record import CLIENTS, SCORED_BY


@dataclass(frozen=True)
class RunKind:
    """The words of a kind of run.

    Attributes:
        name: federated, personal or central.
        step: what a line of ``metrics.jsonl`` is.
        model: what the curve of the headline metric is of.
        before: what was evaluated before training.
        model_loss: what the curve of the evaluation's loss is of.
        train_loss: what the curve of the training loss is of.
        caption: below that picture.
        client_caption: below the picture of each client's metric.
        table_note: below the table of rounds: what its lines are of.
        has_clients: whether there are clients, and messages between them and a server.
    """

    name: str
    step: str
    model: str
    before: str
    model_loss: str
    train_loss: str
    caption: str
    client_caption: str
    table_note: str
    has_clients: bool = True


FEDERATED = RunKind(
    name="federated",
    step="round",
    model="global model",
    before="before training",
    model_loss="on the test set",
    train_loss="in local training",
    caption="The global model on the server's test set; local training losses are means over the cohort.",
    client_caption="The global model on each client's own held-out data.",
    table_note="Round 0 is before training.",
)
PERSONAL = RunKind(
    name="personal",
    step="round",
    model="personal models, clients' rows",
    before="pre-trained model, server's rows",
    model_loss="personal models, clients' rows",
    train_loss="in local training",
    caption="There is no global model. The curve is the mean of the clients' personal models, each on its "
    "client's held-out rows; the dashed line is the pre-trained model on other rows, the server's test set.",
    client_caption="Each client's personal model on its own held-out data.",
    table_note="There is no global model. Round 0 is the pre-trained model on the server's test set; later "
    "rounds are the mean of personal models, each on its own client's held-out rows.",
)
CENTRAL = RunKind(
    name="central",
    step="epoch",
    model="on the test set",
    before="before training",
    model_loss="on the test set",
    train_loss="in training",
    caption="The one model, trained on all the data, on the test set; training losses are means of an epoch.",
    client_caption="",
    table_note="Epoch 0 is before training.",
    has_clients=False,
)


def kind_of(metrics: Sequence[Mapping[str, Any]]) -> RunKind:
    """Return the kind of the run that wrote these lines of ``metrics.jsonl``."""
    if any("steps" in line for line in metrics):  # optimizer steps, which only central training counts
        return CENTRAL
    return PERSONAL if any(line.get(SCORED_BY) == CLIENTS for line in metrics) else FEDERATED


def count_steps(kind: RunKind, number: int) -> str:
    """Write a number of rounds or epochs: ``1 round``, ``5 epochs``."""
    return f"{number} {kind.step}{'' if number == 1 else 's'}"
