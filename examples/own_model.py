"""A model family of your own, with its task and data.

    fedlora run examples/own_model.yaml --plugin examples/own_model.py

Short texts as bags of words, in three classes.
"""

import torch
from datasets import Dataset

from federated import register_model_family, register_source
from federated.data.sources.form import FederatedData, split_off
from federated.rounds.families import ModelFamily, ModelSetup
from models.construction import seeded_construction
from models.federated_model import FederatedModel
from models.tasks import Batch, Rows, classification_task, register_task
from models.towers import Towers


@register_source("sentences")
def sentences(rng, *, num_rows: int = 300) -> FederatedData:
    """Four words in any order, one of which says the kind of thing that the text is about."""
    words = ["cat dog horse bird", "bread soup rice cake", "saw hammer drill file"]
    labels = [row % 3 for row in range(num_rows)]
    texts = [" ".join(rng.permutation(["my", "big", "old", rng.choice(words[k].split())])) for k in labels]
    rows = Dataset.from_dict({"text": texts, "label": labels})
    train, test = split_off(rows, 0.2, rng, label_column="label")
    return FederatedData(train, None, test, ("animal", "food", "tool"), "label", drawn=("test",))


class BagOfWords(FederatedModel):
    """The mean embedding of the words, two layers that adapters go on, and a head."""

    def __init__(self, setup: ModelSetup, width: int) -> None:
        super().__init__()
        self.task, self.class_names, self.train_head = setup.task, setup.class_names, setup.train_head
        self.embedding, self.head = torch.nn.Embedding(997, width), torch.nn.Linear(width, setup.num_classes)
        self.first, self.second = torch.nn.Linear(width, width), torch.nn.Linear(width, width)
        self.towers = Towers("own", text=("first", "second"), default_targets=("first", "second"))
        self.ready(name for name, _ in self.named_parameters())


def logits(model: BagOfWords, batch: Batch) -> torch.Tensor:
    """Words (B, T) -> class logits (B, C)."""
    return model.head(model.second(model.first(model.embedding(batch["words"]).mean(1)).relu()).relu())


def read(model: BagOfWords, rows: Rows) -> Batch:
    """Number the words, each the same in every process."""
    words = [[int.from_bytes(word.encode()) % 997 for word in text.split()] for text in rows["text"]]
    return {"words": torch.tensor(words), "labels": torch.tensor(rows["label"])}


def build(setup: ModelSetup, *, width: int = 32) -> FederatedModel:
    """Start from random weights, as there are no others; ``width`` is set by model.options."""
    return seeded_construction(lambda: BagOfWords(setup, width), seed=setup.seed, device=setup.device)


register_model_family(ModelFamily("words", build))
register_task(classification_task("kinds", logits, family="words", reads=("text", "label"), batch=read))
