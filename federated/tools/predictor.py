"""Predictor: a trained model that classifies images, from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from federated.data.sources.folder_scan import DECODE_ERRORS
from federated.tools.embeddings import ImageEmbeddings, InputOptions
from federated.tools.prediction import Prediction, classify, make_classifier, predict
from federated.tools.trained_models import open_model
from models.errors import UserError
from models.finite import check_finite
from models.image_modes import load_image


class Predictor:
    """A model and its classes, opened once.

    Attributes:
        class_names: What images are classified as.
    """

    def __init__(
        self,
        source: str | Path,
        classes: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
        *,
        adapter: str | Path | None = None,
        device: str = "cpu",
        precision: str = "fp32",
        batch_size: int = 64,
    ) -> None:
        """Open the model.

        Args:
            source: A run folder, an adapter folder or `.pt` file, or a model's name.
            classes: Classify by prompts for these classes; by default the classes of the run.
            templates: Prompts with one {} each; by default those of the run.
            adapter: An adapter to put on a model given by name.
            device: Where the model runs.
            precision: Of the forward passes: "fp32", "bf16" or "fp16".
            batch_size: Images that pass through the model at once.

        Raises:
            UserError: It cannot be opened, or does not say which classes there are.
        """
        self._opened = open_model(source, adapter=adapter, device=device)
        self._opened.model.precision = precision
        self._classifier = make_classifier(self._opened, classes, templates)
        self._options = InputOptions(batch_size)
        self.class_names = self._classifier.class_names

    def predict(self, image: str | Path | Image.Image, top_k: int = 5) -> Prediction:
        """Classify one image, a file or one in memory."""
        return self.predict_batch([image], top_k)[0]

    @torch.no_grad()
    def predict_batch(
        self, images: Sequence[str | Path | Image.Image], top_k: int = 5
    ) -> tuple[Prediction, ...]:
        """Classify images in order, files or ones in memory.

        Raises:
            UserError: There is none, a file cannot be decoded, or the model's output is not finite.
        """
        if not images:
            raise UserError("there are no images to classify")
        model, rows = self._opened.model, []
        for start in range(0, len(images), self._options.batch_size):
            chunk = images[start : start + self._options.batch_size]
            opened = [each if isinstance(each, Image.Image) else _read(Path(each)) for each in chunk]
            pixel_values = torch.stack([model.preprocess(image) for image in opened])  # (B, 3, H, W)
            rows.append(model.encode_image(pixel_values).cpu())
        paths = tuple(Path("" if isinstance(each, Image.Image) else each) for each in images)
        found = ImageEmbeddings(check_finite(torch.cat(rows)), paths)
        return classify(self._opened, found, self._classifier, top_k)

    def predict_folder(self, folder: str | Path, top_k: int = 5) -> tuple[Prediction, ...]:
        """Classify every image below a folder, sorted by path.

        Raises:
            UserError: There is no such folder, no image in it, or one that cannot be decoded.
        """
        return predict(self._opened, folder, self._classifier, top_k=top_k, options=self._options).rows


def _read(path: Path) -> Image.Image:
    try:
        return load_image(path)
    except DECODE_ERRORS as error:
        raise UserError(f"{path} cannot be decoded ({error}): give another image") from error
