"""MultiTaskCLIP: one base model, an adapter a task, and embeddings by the task that is current."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora.factory import DEFAULT_MODEL
from lora.named import active_adapter, list_adapters, load_named_adapter, set_active_adapter
from models.clip import FederatedCLIPModel


class MultiTaskCLIP:
    """Several tasks on one CLIP, for inference; memory is the base model plus the adapters.

    Attributes:
        model: The federated model or wrapper.
    """

    model: Any

    def __init__(self, model: str | nn.Module = DEFAULT_MODEL, **model_options: Any) -> None:
        """Load the base model.

        Args:
            model: Its name, or a model that is there.
            **model_options: Further arguments of FederatedCLIPModel, such as device.
        """
        if isinstance(model, str):
            model = FederatedCLIPModel(model, **{"task": "zero_shot", "strategy": "lora", **model_options})
        self.model = model

    @property
    def tasks(self) -> list[str]:
        """Names of the loaded tasks, sorted."""
        return list_adapters(self.model)

    @property
    def current_task(self) -> str | None:
        """The task whose adapter is in force; None: the base model."""
        return active_adapter(self.model)

    def load_task(
        self, name: str | None, source: str | Path | None = None, *, check_base: bool = True
    ) -> None:
        """Make a task the current one.

        Args:
            name: The task; None for the base model.
            source: Its adapter, as in `load_lora_adapters`; left out for a task that is loaded.
            check_base: Refuse an adapter that was trained on another base model.

        Raises:
            UserError: There is no such task, its name is taken, or the adapter does not fit.
        """
        if name is not None and source is not None:
            load_named_adapter(self.model, source, name, check_base=check_base)
        set_active_adapter(self.model, name)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Project images: (B, 3, H, W) -> (B, D), not normalised."""
        return self.model.encode_image(pixel_values)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Project texts: N of them -> (N, D), not normalised."""
        return self.model.encode_text(texts)
