"""Retrieval counts images and texts, not the rows they are in."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from torch import Tensor
from torch.nn import functional as F

from federated.config.config_files import load_config
from federated.engines.batched_losses import gather, group_losses
from federated.engines.simulation import run_experiment
from federated.rounds.batches import evaluate_server
from federated.rounds.run import build_run
from federated.tools.detailed_metrics import chance_recall, describe_retrieval
from models.clip import FederatedCLIPModel
from models.metrics import retrieval_set
from models.tasks import TASKS, positives
from tests.test_data_tables import write_csv, write_images

KEYS = ("concept", "picture", "text")


def random_rows(seed: int, *, with_concepts: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """30 rows of 12 pictures and 20 texts: equal ids have equal embeddings."""
    random = np.random.default_rng(seed)
    picture, text = random.integers(0, 12, 30), random.integers(0, 20, 30)
    images = F.normalize(torch.from_numpy(random.normal(size=(12, 6))), dim=-1).float()[picture]
    texts = F.normalize(torch.from_numpy(random.normal(size=(20, 6))), dim=-1).float()[text]
    ids = {"picture": torch.from_numpy(picture), "text": torch.from_numpy(text)}
    if with_concepts:
        ids["concept"] = torch.from_numpy(random.integers(0, 15, 30))
    return images, texts, ids


def naive_right(ids: dict[str, Tensor], picture: int, text: int) -> bool:
    rows = range(len(ids["picture"]))
    return any(
        ids["picture"][i] == picture
        and ids["text"][j] == text
        and any(ids[key][i] == ids[key][j] for key in ids)
        for i, j in itertools.product(rows, rows)
    )


def naive_recall(images: Tensor, texts: Tensor, ids: dict[str, Tensor], k: int) -> dict[str, float]:
    """Each distinct picture and text once, every pair looked at, one query at a time."""
    by_picture = {int(p): images[i] for i, p in enumerate(ids["picture"])}
    by_text = {int(t): texts[i] for i, t in enumerate(ids["text"])}
    found = {}
    for direction, queries, gallery in (
        ("image_to_text", by_picture, by_text),
        ("text_to_image", by_text, by_picture),
    ):
        hits = 0
        for query, vector in queries.items():
            nearest = sorted(gallery, key=lambda name: -float(vector @ gallery[name]))[:k]
            pairs = [(query, n) if direction == "image_to_text" else (n, query) for n in nearest]
            hits += any(naive_right(ids, *pair) for pair in pairs)
        found[direction] = hits / len(queries)
    return found


@pytest.mark.parametrize("with_concepts", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_recall_over_images_and_texts_equals_a_naive_search(seed: int, with_concepts: bool) -> None:
    images, texts, ids = random_rows(seed, with_concepts=with_concepts)
    found = retrieval_set(images, texts, ids).recall((1, 3, 5))
    for k in (1, 3, 5):
        expected = naive_recall(images, texts, ids, k)
        assert {direction: curve[k] for direction, curve in found.items()} == pytest.approx(expected)


def test_recall_with_one_right_answer_is_top_k_accuracy() -> None:
    images, texts = F.normalize(torch.randn(2, 30, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    ids = {"picture": torch.arange(30) // 5, "text": torch.arange(30)}  # five captions a picture
    images = images[ids["picture"] * 5]
    found = retrieval_set(images, texts, ids)
    scores = (texts @ images[::5].T).numpy()
    for k, recall in found.recall((1, 2, 4))["text_to_image"].items():
        assert recall == pytest.approx(top_k_accuracy_score(ids["picture"].numpy(), scores, k=k))


def test_guessing_is_the_mean_recall_over_galleries_in_random_order() -> None:
    images, texts, ids = random_rows(0, with_concepts=True)
    found = retrieval_set(images, texts, ids)
    right = found.right.toarray() > 0
    generator = np.random.default_rng(0)
    draws = [right[:, generator.permutation(right.shape[1])[:3]].any(axis=1).mean() for _ in range(4000)]
    chance = chance_recall(found.num_right("image_to_text"), found.num_gallery("image_to_text"), [3])
    assert chance[3] == pytest.approx(np.mean(draws), abs=0.01)
    described = describe_retrieval(found, headline_metric="image_to_text_recall_at_5").results
    assert (described["num_examples"], described["num_images"], described["num_texts"]) == (
        30, len(set(ids["picture"].tolist())), len(set(ids["text"].tolist())),
    )  # fmt: skip
    assert described["chance_recall"]["image_to_text"]["3"] == chance[3]


def test_rows_of_one_concept_picture_or_text_are_positives_of_each_other() -> None:
    ids = {"concept": [0, 1, 2, 3], "picture": [7, 7, 8, 9], "text": [4, 5, 5, 6]}
    batch = {key: torch.tensor(values) for key, values in ids.items()}
    expected = torch.eye(4, dtype=torch.bool)
    expected[0, 1] = expected[1, 0] = expected[1, 2] = expected[2, 1] = True  # not 0 and 2: no step further
    assert torch.equal(positives(batch), expected)
    assert positives({}) is None


def test_batched_clients_have_the_same_positives(small_clip_folder: Path) -> None:
    model = FederatedCLIPModel(str(small_clip_folder), task="retrieval", strategy="full")
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "pixel_values": torch.randn(4, 3, 16, 16, generator=generator),
            "picture": torch.tensor([0, 0, 1, 2]),
            "text": torch.tensor([0, 1, 1, client]),
            **model.tokenize(["cat", "dog", "dog", "red car" if client == 2 else "cat"]),
        }
        for client in (0, 2)
    ]
    with torch.no_grad():
        alone = torch.stack([TASKS["retrieval"].loss(model, batch) for batch in batches])
        together = group_losses(model, gather(batches, model.device), None)
    torch.testing.assert_close(together, alone)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures with three captions each, as Flickr30k and COCO have; some captions are of several."""
    root = tmp_path_factory.mktemp("captioned")
    write_images(root, 24)
    for split, numbers in (("train", range(12)), ("test", range(12, 24))):
        lines = [
            f"{number}.png,{caption},{number % 4}"
            for number in numbers
            for caption in (f"picture {number}", f"kind {number % 4}", f"number {number} of many")
        ]
        write_csv(root / f"{split}.csv", "image,caption,kind", lines)
    return root


def captioned_config(root: Path, *overrides: str):
    return load_config(
        "retrieval_vi",
        [
            "data.source=csv", f"data.path={root}", "data.options={}", "partition.num_clients=2",
            "federation.rounds=1", "client.local_steps=2", "client.batch_size=12", "output.report=false",
            f"output.root={root / 'runs'}", *overrides,
        ],
    )  # fmt: skip


def test_a_run_reports_recall_over_images_and_texts_with_and_without_caches(captioned: Path) -> None:
    experiment = build_run(captioned_config(captioned))
    images, texts = experiment.reader.test_images, experiment.model
    batch = experiment.reader.model_batch(images.batch(range(36)))
    with torch.no_grad():
        features = F.normalize(texts.image_features(batch), dim=-1).float()
        captions = F.normalize(texts.text_features(batch), dim=-1).float()
    ids = {
        "picture": torch.arange(36) // 3,
        "text": torch.tensor([images.captions.index(caption) for caption in images.captions]),
    }
    for overrides in ([], ["cache.image_features=false", "cache.text_features=false"]):
        metrics = evaluate_server(build_run(captioned_config(captioned, *overrides)))
        for k in (1, 5):
            expected = naive_recall(features, captions, ids, k)
            for direction, recall in expected.items():
                assert metrics[f"{direction}_recall_at_{k}"] == pytest.approx(recall)


def test_captions_that_read_alike_are_one_text(tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    captions = ["a red  car", "A Red Car", "a\u200b red car", "a dog"]
    lines = [f"{number}.png,{caption}" for number, caption in enumerate(captions)]
    for split in ("train", "test"):
        write_csv(tmp_path / f"{split}.csv", "image,caption", lines)
    overrides = ["partition.num_clients=1", "partition.local_test_fraction=0"]
    batch = build_run(captioned_config(tmp_path, *overrides)).reader.test_images.batch(range(4))
    assert len(batch["text"][:3].unique()) == 1
    assert len(batch["text"].unique()) == 2


def test_the_csv_source_knows_concepts_of_a_column(captioned: Path) -> None:
    options = "data.options={concept_column: kind}"
    batch = build_run(captioned_config(captioned, options)).reader.train_images.batch(range(36))
    assert set(KEYS) <= set(batch)
    assert torch.equal(batch["concept"], torch.arange(36) // 3 % 4)
    run = run_experiment(captioned_config(captioned, options, "output.name=kinds"))
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["text_to_image_recall_at_10"] > 0.9  # 3 right of 12 pictures for each kind
