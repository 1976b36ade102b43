"""A plugin of the tests: questions about images, answered by words, with two towers and tied weights.

What a family for visual question answering asks of the seam, in small: adapters in both towers, a bridge
that trains beside them, a reader that keeps the pictures, answers as text, and rows whose label is not what
is learnt.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from federated import register_model_family
from federated.data.dataset import image_tensors
from federated.data.row_reader import ReadingSettings, task_reader
from federated.data.sources.form import FederatedData
from federated.data.splits import IntArray
from federated.rounds.families import ModelFamily, ModelSetup
from models.construction import seeded_construction
from models.federated_model import FederatedModel
from models.tasks import Task, register_task
from models.towers import Towers
from models.training import Batch, Rows
from models.vqa_metrics import mean_scores, row_scores

SHAPES_AND_COLOURS = "circle rectangle triangle black gray blue brown teal green red yellow yes no"
ANSWERS = tuple(SHAPES_AND_COLOURS.split())
NUM_WORDS, LONGEST = 300, 10


class SmallVQA(FederatedModel):
    """Patches and words, a bridge, and a decoder of one step that has the weights of the embedding."""

    def __init__(self, setup: ModelSetup, width: int) -> None:
        super().__init__()
        self.task, self.train_head = setup.task, setup.train_head
        self.vision = nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.Flatten(), nn.Linear(128, width))
        self.words = nn.Embedding(NUM_WORDS, width)
        self.text = nn.ModuleDict({"q_proj": nn.Linear(width, width), "out": nn.Linear(width, width)})
        self.head = nn.Linear(2 * width, width)
        self.decoder = nn.Linear(width, NUM_WORDS, bias=False)
        self.decoder.weight = self.words.weight
        self.towers = Towers(
            "own", vision=("vision",), text=("text",), default_targets=("2", "q_proj", "out")
        )
        self.ready(name for name, _ in self.named_parameters())


def preprocess(image) -> Tensor:
    return torch.from_numpy(np.asarray(image.resize((64, 64)), dtype=np.float32) / 255).permute(2, 0, 1)


def numbers(text: str) -> list[int]:
    words = text.lower().strip("?").split()[:LONGEST]
    known = [ANSWERS.index(w) if w in ANSWERS else 20 + int.from_bytes(w.encode()) % 280 for w in words]
    return known + [NUM_WORDS - 1] * (LONGEST - len(words))


def read_words(model: SmallVQA, rows: Rows) -> Batch:
    questions = torch.tensor([numbers(text) for text in rows["question"]])
    return {"questions": questions, "answers": torch.tensor([ANSWERS.index(a) for a in rows["answer"]])}


class PictureReader:
    """Pictures decoded once, whatever asks for them; words as the task makes them."""

    def __init__(self, model: SmallVQA, data: FederatedData, settings: ReadingSettings) -> None:
        self._words, self._data = task_reader(model, data, settings), data
        self._images = {s: image_tensors(data, s, preprocess) for s in ("train", "test")}
        self.notes = ["pictures: decoded once"]

    def batch(self, split: str, rows: IntArray) -> Batch:
        return {**self._words.batch(split, rows), "pixel_values": self._images[split].pixel_values(rows)}

    def training_batch(self, rows: IntArray, rng: np.random.Generator) -> Batch:
        return self.batch("train", rows)

    def read_before_forking(self) -> None:
        self._images["train"].pixel_values([0])


def logits(model: SmallVQA, batch: Batch) -> Tensor:
    question = model.text["out"](model.text["q_proj"](model.words(batch["questions"]).mean(1)).relu())
    return model.decoder(model.head(torch.cat([model.vision(batch["pixel_values"]), question], dim=1)))


def generate(model: SmallVQA, batch: Batch) -> list[str]:
    return [ANSWERS[k] for k in logits(model, batch)[:, : len(ANSWERS)].argmax(dim=1)]


def evaluate(model: SmallVQA, batches) -> dict[str, float]:
    loss, said, right = 0.0, [], []
    for batch in batches:
        loss += float(F.cross_entropy(logits(model, batch), batch["answers"], reduction="sum"))
        said += generate(model, batch)
        right += [ANSWERS[k] for k in batch["answers"]]
    scores = mean_scores(row_scores(said, right))
    return {"loss": loss / len(said), "num_examples": float(len(said)), **scores}


def build(setup: ModelSetup, *, width: int = 16) -> FederatedModel:
    """Start from random weights."""
    return seeded_construction(lambda: SmallVQA(setup, width), seed=setup.seed, device=setup.device)


register_model_family(ModelFamily("small_vqa", build, read=PictureReader))
register_task(
    Task(
        name="answers",
        loss=lambda model, batch: F.cross_entropy(logits(model, batch), batch["answers"]),
        evaluate=evaluate,
        headline_metric="token_f1",
        splits_into_micro_batches=True,
        family="small_vqa",
        reads=("question", "answer"),
        batch=read_words,
        predict=generate,
    )
)
