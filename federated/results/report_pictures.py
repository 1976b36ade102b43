"""The pictures of a run's report: what each is called, what it shows, and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from federated.results import client_plots, plots
from federated.results.records import RunRecord
from federated.results.time_plot import TIME, metric_by_time
from federated.results.wording import format_bytes, metric_label

_OF_CENTRAL_RUNS = frozenset({"metric_by_epoch", "class_accuracy"})  # the others are of clients and messages
ERROR_MEANING = (
    "How far the round's global model is from the weighted average of the models that its clients trained: "
    "||held − ideal|| ÷ ||ideal|| over all adapted layers. 0 % is the exact average; averaging A and B apart "
    "and cutting to a rank make it larger, and so do lossy codecs."
)


@dataclass(frozen=True)
class Drawing:
    """A picture that can be drawn.

    Attributes:
        name: of its files.
        heading: above it.
        caption: below it.
        make: draws it; raises ``plots.MissingData`` where the run did not record what it shows.
    """

    name: str
    heading: str
    caption: str
    make: Callable[[], Figure]

    @property
    def title(self) -> str:
        """The heading with a capital."""
        return self.heading[0].upper() + self.heading[1:]


def drawings(run: RunRecord) -> list[Drawing]:
    """Return the pictures of a run's kind, in the order of the report."""
    label = metric_label(run.metric)
    zero_shot = run.headline["zero_shot"]
    makers = (
        Drawing(
            f"metric_by_{run.kind.step}",
            f"{label} and loss by {run.kind.step}",
            run.kind.caption,
            lambda: plots.metric_by_round(run.metrics, run.metric, zero_shot),
        ),
        Drawing(
            "metric_by_bytes",
            f"{label} against bytes sent",
            f"Every point is a round: the {run.kind.model} and what was sent until then, without the base. "
            "What clients were sent to evaluate the last model comes after it.",
            lambda: plots.metric_by_bytes(run.metrics, run.metric, run.ledger),
        ),
        *_by_time(run),
        Drawing(
            "bytes_by_round",
            "Bytes by round",
            "All clients together, failed transfers included. The bars add up to "
            f"{format_bytes(run.ledger.total().wire_bytes)}.",
            lambda: plots.bytes_by_round(run.ledger),
        ),
        Drawing(
            "bytes_by_method",
            "What other ways would send",
            "The same clients and rounds; totals without and with the base model.",
            lambda: plots.bytes_by_method(run.summary.get("communication", {}).get("comparison") or []),
        ),
        Drawing(
            "client_metric",
            f"{label} of each client",
            run.kind.client_caption,
            lambda: client_plots.client_metric(run.metrics, run.metric),
        ),
        Drawing(
            "class_accuracy",
            "Accuracy of each class",
            "The final model on the server's test set; in brackets the test rows of the class.",
            lambda: plots.class_accuracy(run.summary.get("per_class") or []),
        ),
        Drawing(
            "aggregation_error",
            "Aggregation error by round",
            ERROR_MEANING,
            lambda: plots.aggregation_error(run.metrics),
        ),
        Drawing(
            "client_split",
            "How the data is split",
            "Training examples of each client, and what share of them each class has.",
            lambda: client_plots.client_split(run.partition),
        ),
    )
    return [drawing for drawing in makers if run.kind.has_clients or drawing.name in _OF_CENTRAL_RUNS]


def _by_time(run: RunRecord) -> list[Drawing]:
    """Return the picture of a run with a simulated clock; none without."""
    if not any(TIME in line for line in run.metrics):
        return []
    caption = "Every point is a round, when it would have ended on the clients' own links and devices."
    heading = f"{metric_label(run.metric)} against simulated time"
    return [
        Drawing("metric_by_time", heading, caption, lambda: metric_by_time({"": run.metrics}, run.metric))
    ]
