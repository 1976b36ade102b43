"""models.tasks and models.metrics: contrastive loss and retrieval metrics against naive oracles."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn import functional as F

from models.clip import FederatedCLIPModel
from models.errors import UserError
from models.metrics import RetrievalSet, nearest_neighbours
from models.tasks import TASKS, contrastive_loss, positives, tasks_of

ENGINES = [
    "torch",
    pytest.param("faiss", marks=pytest.mark.skipif(not find_spec("faiss"), reason="no faiss")),
]


def _embeddings(rows: int, seed: int, width: int = 8) -> Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def recall_at(
    queries: Tensor,
    gallery: Tensor,
    left: Tensor,
    right: Tensor,
    ks: tuple[int, ...] = (1, 5, 10),
    engine: str = "auto",
) -> dict[int, float]:
    """The recall of queries in a gallery, where equal numbers are right answers."""
    belongs = csr_array((left[:, None] == right[None, :]).long().numpy())
    return RetrievalSet(queries, gallery, belongs, len(queries)).recall(ks, engine=engine)["image_to_text"]


def _naive_recall(queries: Tensor, gallery: Tensor, left: Tensor, right: Tensor, k: int) -> float:
    """Full similarity matrix, full sort, one query at a time."""
    hits = 0
    for query, concept in zip(queries, left, strict=True):
        order = sorted(range(len(gallery)), key=lambda j: -float(query @ gallery[j]))
        hits += any(int(right[j]) == int(concept) for j in order[:k])
    return hits / len(queries)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("concepts", [1000, 7])  # single and many positives
def test_recall_equals_the_naive_full_matrix_oracle(engine: str, concepts: int) -> None:
    queries, gallery = _embeddings(37, 0), _embeddings(53, 1)
    random = np.random.default_rng(2)
    left = torch.from_numpy(random.permutation(concepts * 53)[:37] % concepts)
    right = torch.from_numpy(random.permutation(concepts * 53)[:53] % concepts)
    recalls = recall_at(queries, gallery, left, right, (1, 5, 10), engine=engine)
    for k, recall in recalls.items():
        assert recall == pytest.approx(_naive_recall(queries, gallery, left, right, k))


def test_chunked_search_equals_search_at_once() -> None:
    queries, gallery = _embeddings(50, 0), _embeddings(60, 1)
    at_once = nearest_neighbours(queries, gallery, 10, engine="torch")
    assert torch.equal(nearest_neighbours(queries, gallery, 10, engine="torch", chunk_size=7), at_once)


def test_recall_of_identical_pairs_is_one_and_grows_with_k() -> None:
    rows, ids = _embeddings(40, 0), torch.arange(40)
    assert recall_at(rows, rows, ids, ids) == {1: 1.0, 5: 1.0, 10: 1.0}
    shuffled = recall_at(rows, _embeddings(40, 1), ids, ids)
    assert shuffled[1] <= shuffled[5] <= shuffled[10]


def test_a_cutoff_above_the_gallery_counts_all_of_it() -> None:
    rows, ids = _embeddings(3, 0), torch.arange(3)
    assert recall_at(rows, rows.flip(0), ids, ids.flip(0), (10,)) == {10: 1.0}
    assert recall_at(rows, rows.flip(0), ids, ids + 100, (10,)) == {10: 0.0}


def test_asking_for_an_engine_that_is_not_installed_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setattr("models.metrics.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'\.\[faiss\]' in the clone.*engine='torch'"):
        nearest_neighbours(_embeddings(2, 0), _embeddings(2, 1), 1, engine="faiss")


# Contrastive loss


def _naive_contrastive(logits: Tensor, concept: list[int]) -> float:
    """Written out: mean over rows of -sum over positives of log softmax / number of positives, both ways."""
    size, total = len(concept), 0.0
    for matrix in (logits.tolist(), logits.T.tolist()):
        for i in range(size):
            log_sum = math.log(sum(math.exp(value) for value in matrix[i]))
            positives = [j for j in range(size) if concept[j] == concept[i]]
            total -= sum(matrix[i][j] - log_sum for j in positives) / len(positives) / (2 * size)
    return total


@pytest.mark.parametrize("concept", [[0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 2, 2], [3, 3, 3, 3, 3, 3]])
def test_the_multi_positive_loss_equals_one_written_out(concept: list[int]) -> None:
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    ours = contrastive_loss(logits, positives({"concept": torch.tensor(concept)}))
    assert float(ours) == pytest.approx(_naive_contrastive(logits, concept), rel=1e-12)


def test_without_concepts_each_pair_is_its_own() -> None:
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        contrastive_loss(logits), contrastive_loss(logits, torch.eye(6, dtype=torch.bool))
    )


def test_same_concept_pairs_are_not_pushed_apart() -> None:
    logits = torch.zeros(4, 4, requires_grad=True)
    contrastive_loss(logits, positives({"concept": torch.tensor([0, 0, 1, 1])})).backward()
    same = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    assert (logits.grad[same] < 0).all()  # descending raises them
    assert (logits.grad[~same] > 0).all()


# Tasks on a model


@pytest.fixture
def retrieval_model(small_clip_folder: Path) -> FederatedCLIPModel:
    return FederatedCLIPModel(str(small_clip_folder), task="retrieval", strategy="full")


def _pairs(model: FederatedCLIPModel, size: int = 14, seed: int = 0) -> dict[str, Tensor]:
    words = ["cat", "dog", "red", "car", "blue", "tree", "one"]
    captions = [f"a photo of a {words[i % 7]}" + " ." * (i // 7) for i in range(size)]
    pixels = torch.randn(
        size, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(seed)
    )
    return {"pixel_values": pixels, "concept": torch.arange(size) % 7, **model.tokenize(captions)}


def test_retrieval_evaluation_equals_the_oracle_over_all_batches(retrieval_model) -> None:
    batch = _pairs(retrieval_model)
    parts = [{key: value[a:b] for key, value in batch.items()} for a, b in ((0, 6), (6, 14))]
    metrics = retrieval_model.evaluate(parts)
    with torch.no_grad():
        images = F.normalize(retrieval_model.encode_image(batch["pixel_values"]), dim=-1)
        texts = F.normalize(
            retrieval_model.encode_text({k: batch[k] for k in ("input_ids", "attention_mask")}), dim=-1
        )
        losses = [float(TASKS["retrieval"].loss(retrieval_model, part)) for part in parts]
    ids = batch["concept"]
    for k in (1, 5, 10):
        assert metrics[f"image_to_text_recall_at_{k}"] == pytest.approx(
            _naive_recall(images, texts, ids, ids, k)
        )
        assert metrics[f"text_to_image_recall_at_{k}"] == pytest.approx(
            _naive_recall(texts, images, ids, ids, k)
        )
    assert metrics["loss"] == pytest.approx((6 * losses[0] + 8 * losses[1]) / 14)
    assert metrics["num_examples"] == 14
    assert all(type(value) is float for value in metrics.values())


def test_retrieval_without_concepts_counts_only_the_own_pair_across_batches(retrieval_model) -> None:
    batch = {key: value for key, value in _pairs(retrieval_model).items() if key != "concept"}
    numbered = {**batch, "concept": torch.arange(14)}
    parts = [{key: value[a:b] for key, value in batch.items()} for a, b in ((0, 6), (6, 14))]
    recalls = {k: v for k, v in retrieval_model.evaluate(parts).items() if "recall" in k}
    expected = retrieval_model.evaluate(numbered)
    assert recalls == {key: expected[key] for key in recalls}


def test_retrieval_learns_pairs(retrieval_model) -> None:
    batch = _pairs(retrieval_model)
    before = retrieval_model.evaluate(batch)["image_to_text_recall_at_1"]
    for _ in range(30):
        retrieval_model.train_step(batch)
    assert retrieval_model.evaluate(batch)["image_to_text_recall_at_1"] > max(before, 0.9)


def test_zero_shot_loss_is_cross_entropy_against_the_class_prompts(small_clip_folder, pixel_batch) -> None:
    names = ("cat", "dog", "red car")
    model = FederatedCLIPModel(
        str(small_clip_folder), 3, class_names=names, task="zero_shot", strategy="full"
    )
    assert model.head is None
    loss = TASKS["zero_shot"].loss(model, pixel_batch)
    probabilities = model.zero_shot_logits(pixel_batch).softmax(dim=1)
    picked = probabilities[torch.arange(12), pixel_batch["labels"]]
    torch.testing.assert_close(loss, -picked.log().mean())
    metrics = model.evaluate(pixel_batch)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert set(metrics) == {"loss", "accuracy", "num_examples"}


def test_zero_shot_training_moves_the_text_tower_and_learns(small_clip_folder, pixel_batch) -> None:
    names = ("cat", "dog", "red car")
    model = FederatedCLIPModel(
        str(small_clip_folder), 3, class_names=names, task="zero_shot", strategy="text_and_projection"
    )
    losses = [model.train_step(pixel_batch) for _ in range(20)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("task", sorted(tasks_of("clip")))
def test_each_tasks_headline_metric_is_among_its_metrics(small_clip_folder, pixel_batch, task: str) -> None:
    names = ("cat", "dog", "red car")
    model = FederatedCLIPModel(str(small_clip_folder), 3, class_names=names, task=task, strategy="full")
    assert TASKS[task].headline_metric in model.evaluate({**pixel_batch, **model.tokenize(list(names) * 4)})


@pytest.mark.parametrize(
    ("task", "key"), [("classification", "labels"), ("retrieval", "input_ids"), ("zero_shot", "pixel_values")]
)
def test_a_batch_that_lacks_what_the_task_needs_is_refused_by_key(
    small_clip_folder, pixel_batch, task: str, key: str
) -> None:
    names = ("cat", "dog", "red car")
    model = FederatedCLIPModel(str(small_clip_folder), 3, class_names=names, task=task, strategy="full")
    batch = {k: v for k, v in pixel_batch.items() if k != key}
    with pytest.raises(UserError, match=key):
        model.train_step(batch)
