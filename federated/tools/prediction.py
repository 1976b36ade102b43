"""Using a trained model: classify images, and see how far an adapter moved the embeddings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from federated.data.sources.folder_scan import DECODE_ERRORS
from federated.rounds.build import usable_device
from federated.tools.embeddings import (
    DEFAULT_OPTIONS,
    ImageEmbeddings,
    InputOptions,
    embed_images,
    find_images,
    image_batches,
    read_texts,
)
from federated.tools.trained_models import OpenedModel, model_of_run, run_of
from lora.adapters import adapter_layers
from lora.base_delta_file import BASE_DELTA_FILE
from lora.named import compare_embeddings
from models.errors import UserError
from models.finite import check_finite
from models.image_modes import load_image
from models.prompts import (
    average_templates,
    check_classes,
    check_unicode,
    class_prompts,
    encode_in_chunks,
    warn_of_cut,
)
from models.vqa import FederatedVQAModel
from models.vqa_task import ask

_SCORED_AT_ONCE = 4096

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Classifier:
    """Names and scores of classes.

    Attributes:
        class_names: (C,).
        method: "head" or "class prompts".
        logits: Image features (B, D), not normalised -> (B, C).
    """

    class_names: tuple[str, ...]
    method: str
    logits: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, the best first.

    Attributes:
        path: The image's file; empty for one in memory.
        class_names: (K,).
        probabilities: (K,), softmax over all classes.
    """

    path: Path
    class_names: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Predictions:
    """What ``predict`` gives.

    Attributes:
        rows: One an image.
        method: As in ``Classifier``.
        corrupt: (file, why it cannot be decoded) of those left out.
    """

    rows: tuple[Prediction, ...]
    method: str
    corrupt: tuple[tuple[Path, str], ...]


@dataclass(frozen=True)
class BaseComparison:
    """How far an adapter moved the embeddings: cosine with those of the base model.

    Attributes:
        num_rows: Images or texts compared.
        mean: Mean cosine; 1 where the adapter changes nothing.
        least: Cosine of the input that moved most.
    """

    num_rows: int
    mean: float
    least: float


def make_classifier(
    opened: OpenedModel, class_names: Sequence[str] | None = None, templates: Sequence[str] | None = None
) -> Classifier:
    """Choose how images are classified: the run's head, or class prompts.

    Args:
        opened: The model.
        class_names: Classes for zero-shot prediction with prompts, or those of a head that does not name its
            own; by default those of the run.
        templates: Prompts with one {} each; by default those of the run, or "a photo of a {}.".

    Raises:
        UserError: the classes are not known, or classes and templates cannot be used.
    """
    model = opened.model
    names = tuple(class_names) if class_names is not None else model.class_names
    if names is None:
        raise UserError(
            f"{opened} does not say which classes there are; give a run folder, or --classes a,b,c"
        )
    unnamed = model.head is not None and model.class_names is None and len(names) == model.num_classes
    if templates is None and (unnamed or opened.uses_head and class_names is None):
        return Classifier(names, "head", lambda features: model.logits({"image_features": features}))
    if len(set(names)) < max(2, len(names)) or not all(name.strip() for name in names):
        raise UserError(f"classes {', '.join(names)}: give at least two, all different and none empty")
    if class_names is None and model.task.reads_captions:
        logger.warning(
            "%s learned captions: these are the classes of its data, by prompts; others by --classes", opened
        )
    wording = model.templates if templates is None else tuple(templates)
    check_classes(len(names), names, wording)
    texts = class_prompts(names, wording)
    check_unicode(texts, "the class prompt")
    warn_of_cut(model.tokenize, texts, "class prompts")
    with torch.no_grad():
        prompts = encode_in_chunks(model.encode_text, model.tokenize(texts))
        classes = check_finite(average_templates(prompts, len(names)))  # (C, D)

    def logits(features: Tensor) -> Tensor:
        return model.temperature_scale() * functional.normalize(features, dim=-1) @ classes.T

    return Classifier(names, "class prompts", logits)


def predict(
    opened: OpenedModel,
    path: str | Path,
    classifier: Classifier,
    *,
    top_k: int = 5,
    options: InputOptions = DEFAULT_OPTIONS,
) -> Predictions:
    """Classify an image, or all images below a folder.

    Args:
        opened: The model.
        path: An image or a folder.
        classifier: Made from the same model.
        top_k: Classes an image, at most.
        options: How images pass through the model.

    Raises:
        UserError: as ``find_images`` and ``embed_images``.
    """
    found = embed_images(opened.model, find_images(path), options)
    return Predictions(classify(opened, found, classifier, top_k), classifier.method, found.corrupt)


def answer_question(
    source: str | Path, image: str | Path, question: str, *, device: str = "cpu", any_base: bool = False
) -> str:
    """Ask the model of a run about an image.

    Args:
        source: The run, or its ``adapter_best``.
        image: A file.
        question: A text.
        device: Where the model runs.
        any_base: Take the trained part although the base model is not known to be its own.

    Raises:
        UserError: It is no run of questions, there is no such image, or the question is empty.
    """
    path, run = Path(source), run_of(Path(source))
    if not question.strip():
        raise UserError("the question is empty: say what to answer with --question")
    if run is None:
        raise UserError(f"{source} is no run folder: --question goes with a run of task.name=vqa")
    folder = run / (path.name if path != run else "adapter")
    model = model_of_run(run, folder, usable_device(device, "--device cpu"), any_base=any_base)
    if not isinstance(model, FederatedVQAModel):
        raise UserError(f"{source} answers no questions: --question goes with a run of task.name=vqa")
    if not Path(image).is_file():
        raise UserError(f"{image} is no file: give --image an image")
    try:
        picture = load_image(image)
    except DECODE_ERRORS as error:
        raise UserError(f"{image} cannot be decoded ({error}); replace it") from error
    return ask(model, [picture], [question])[0]


def compare_with_base(
    opened: OpenedModel,
    path: str | Path,
    *,
    texts: bool = False,
    options: InputOptions = DEFAULT_OPTIONS,
) -> BaseComparison:
    """Compare adapted and base embeddings over a folder of images, or the lines of a text file.

    Args:
        opened: A model with an adapter.
        path: Folder or image; with ``texts`` a text file.
        texts: Compare texts.
        options: How inputs pass through both models.

    Raises:
        UserError: the model has no adapter or changed base weights, or an input is missing or corrupt.
    """
    if not adapter_layers(opened.model):
        raise UserError(f"{opened} has no adapter, so there is nothing to compare with the base model")
    if opened.adapter is not None and (Path(opened.adapter) / BASE_DELTA_FILE).is_file():
        raise UserError(
            f"{opened} changed its base weights too: without the adapter it is not the base model; encode "
            "with the plain model, and compare the two files"
        )
    cosines: list[Tensor] = []
    if texts:
        lines = read_texts(path)
        for start in range(0, len(lines), options.batch_size):
            batch = lines[start : start + options.batch_size]
            cosines.append(compare_embeddings(opened.model, texts=batch)["text"].cpu())
            options.report(start + len(batch), len(lines))
    else:
        for _, pixel_values in image_batches(opened.model, find_images(path), options, []):
            cosines.append(compare_embeddings(opened.model, pixel_values=pixel_values)["image"].cpu())
    rows = check_finite(torch.cat(cosines)).double()  # (N,)
    return BaseComparison(len(rows), float(rows.mean()), float(rows.min()))


def classify(
    opened: OpenedModel, found: ImageEmbeddings, classifier: Classifier, top_k: int
) -> tuple[Prediction, ...]:
    """Return the most probable classes of embedded images, at most ``top_k`` each."""
    rows: list[Prediction] = []
    with torch.no_grad():
        for features in found.features.split(_SCORED_AT_ONCE):
            logits = classifier.logits(features.to(opened.model.device)).float()  # (B, C)
            scores = check_finite(logits, "logits").softmax(dim=-1)
            best = scores.topk(min(top_k, scores.shape[1]), dim=-1)
            for values, classes in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                names = tuple(classifier.class_names[number] for number in classes)
                rows.append(Prediction(found.paths[len(rows)], names, tuple(values)))
    return tuple(rows)
