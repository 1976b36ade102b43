"""One check for whoever uses logits or embeddings: what is not a number is no answer.

A comparison with NaN is false, so that ``argmax`` names class 0 and a search any row, in silence. Commands
refuse such values; an evaluation inside a run goes on and reports metrics that are no numbers.
"""

from __future__ import annotations

import math

from torch import Tensor

from models.errors import UserError


def check_finite(values: Tensor, what: str = "embeddings") -> Tensor:
    """Return the values as they are.

    Raises:
        UserError: One is infinite or no number.
    """
    if not bool(values.isfinite().all()):
        raise UserError(f"the model's {what} are not finite; its weights or adapter are damaged")
    return values


def or_not_a_number(metric: float, loss: float, is_finite: Tensor | bool) -> float:
    """Return a metric; NaN where its loss, or what it was counted from, is not finite."""
    return metric if math.isfinite(loss) and bool(is_finite) else math.nan
