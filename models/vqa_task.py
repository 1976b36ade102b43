"""The task "vqa": learn to answer questions about images, judged by exact match and token F1.

Metrics of an evaluation are given for each type of question as well (`exact_match_colour`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from models.errors import UserError
from models.finite import or_not_a_number
from models.image_modes import WHITE, rgb_image
from models.training import Batch, Rows, num_examples
from models.vqa_metrics import EXACT_MATCH, mean_scores, normalised, row_scores, scores_by

if TYPE_CHECKING:
    from models.vqa import FederatedVQAModel

logger = logging.getLogger(__name__)

COLUMNS = ("image", "question", "answer", "label", "picture")
NO_LABEL = -100


def read_questions(model: FederatedVQAModel, rows: Rows) -> Batch:
    """Make tensors of rows.

    Returns:
        "input_ids" and "attention_mask" (B, Q), "labels" (B, A) with -100 at pads, or (B,) for a closed set,
        "type" and "picture" (B,), and "pixel_values" (B, 3, H, W) where the rows have images.

    Raises:
        UserError: An answer is empty.
    """
    batch = _question_tokens(model, rows["question"])
    batch["labels"] = _labels(model, rows)
    batch["type"] = torch.tensor([int(number) for number in rows["label"]])
    numbers: dict[object, int] = {}
    batch["picture"] = torch.tensor([numbers.setdefault(name, len(numbers)) for name in rows["picture"]])
    if "image" in rows:
        batch["pixel_values"] = _pixel_values(model, rows["image"])
    return batch


def ask(model: FederatedVQAModel, images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
    """Answer a question about each image, (B,)."""
    batch = {**_question_tokens(model, questions), "pixel_values": _pixel_values(model, images)}
    return predict_answers(model, {key: value.to(model.device) for key, value in batch.items()})


def _pixel_values(model: FederatedVQAModel, images: Sequence[Image.Image]) -> Tensor:
    background = getattr(model.preprocess, "background", WHITE)
    return torch.stack([model.preprocess(rgb_image(image, background)) for image in images])


def _question_tokens(model: FederatedVQAModel, questions: Sequence[str]) -> Batch:
    cut = model.tokenizer.num_cut
    tokens = dict(model.tokenizer.tokens(questions, model.most_question_tokens))
    if model.tokenizer.num_cut > cut == 0:
        logger.warning(
            "questions of more than %d tokens are cut: raise model.options.most_question_tokens",
            model.most_question_tokens,
        )
    return tokens


def _labels(model: FederatedVQAModel, rows: Rows) -> Tensor:
    answers = list(rows["answer"])
    if empty := [row for row, answer in enumerate(answers) if not str(answer or "").strip()]:
        raise UserError(
            f"the question {rows['question'][empty[0]]!r} has no answer; leave the row out, or answer it"
        )
    if model.answers:
        known = {normalised(answer, "vi"): number for number, answer in enumerate(model.answers)}
        return torch.tensor([known.get(normalised(answer, "vi"), NO_LABEL) for answer in answers])
    tokens = model.tokenizer.tokens(answers, model.most_answer_tokens)
    return tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, NO_LABEL)


def vqa_loss(model: FederatedVQAModel, batch: Batch) -> Tensor:
    """Cross-entropy of the answer's tokens, or of the answer in the closed set."""
    if bool((batch["labels"] == NO_LABEL).all()):
        raise UserError("no answer of a batch is in model.options.answers: list the answers of the data")
    return model.answer_loss(batch, model.answer_logits(batch, *model.encode(batch)))


def right_answers(model: FederatedVQAModel, batch: Batch) -> list[str]:
    """Return the answers of a batch as texts; one outside the closed set is empty."""
    labels = batch["labels"]
    if model.answers:
        return ["" if number == NO_LABEL else model.answers[number] for number in labels.tolist()]
    pad = model.text.config.pad_token_id
    return model.tokenizer.texts(labels.masked_fill(labels == NO_LABEL, pad))


@torch.no_grad()
def predict_answers(model: FederatedVQAModel, batch: Batch) -> list[str]:
    """Answer each question of a batch, (B,)."""
    return model.write_answers(*model.encode(batch), batch)


@torch.no_grad()
def evaluate_vqa(model: FederatedVQAModel, batches: Iterable[Batch]) -> dict[str, float]:
    """Loss, exact match and token F1, and exact match of each type of question.

    Exact match is NaN where a state is not finite.
    """
    loss_sum, total, finite = 0.0, 0, True
    said: list[str] = []
    right: list[str] = []
    types: list[int] = []
    for batch in batches:
        states, mask = model.encode(batch)
        finite = bool(states.isfinite().all()) and finite
        size = num_examples(batch)
        if bool((batch["labels"] != NO_LABEL).any()):
            loss_sum += float(model.answer_loss(batch, model.answer_logits(batch, states, mask))) * size
        said += model.write_answers(states, mask, batch)
        right += right_answers(model, batch)
        types += batch["type"].tolist()
        total += size
    if total == 0:
        raise UserError("there is nothing to evaluate: no batch was given")
    loss = loss_sum / total
    scores = row_scores(said, right, language=model.language)
    metrics = mean_scores(scores)
    named = [_type_name(model, number) for number in types]
    for name, found in scores_by(scores, named).items():
        metrics[f"{EXACT_MATCH}_{name}"] = found[EXACT_MATCH]
    metrics = {name: or_not_a_number(value, loss, finite) for name, value in metrics.items()}
    return {"loss": loss, "num_examples": float(total), **metrics}


def _type_name(model: FederatedVQAModel, number: int) -> str:
    names = model.class_names
    name = names[number] if names and 0 <= number < len(names) else f"type {number}"
    return re.sub(r"\W+", "_", name).strip("_")
