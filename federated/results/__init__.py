"""What a run leaves behind, and how it is looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.lazy_names import at_first_use

if TYPE_CHECKING:
    from federated.results.run_frames import load_runs

__all__ = ["load_runs"]

__getattr__ = at_first_use(__name__, {"federated.results.run_frames": __all__})
