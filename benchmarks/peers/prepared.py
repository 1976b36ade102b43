"""What every contender gets: the same weights, images, and rows of each local step, in one folder.

Written once a workload by ``prepare``, outside all timings. Images are files in a Hugging Face data set,
which each contender decodes once, with this project's processor (several times as fast as transformers'
own). Only the contender that is this project reads the configuration and draws the same rows from its seed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from models.images import ImageProcessor
from models.state import save_state

Rows = list[int]

CONFIG, PLAN, START, DATA, CLIP = "config.json", "plan.json", "start.safetensors", "data", "clip"
"""Names of the files, and of the folders with the images and with the frozen CLIP."""


@dataclass(frozen=True)
class Prepared:
    """A workload's files, read.

    Attributes:
        folder: Where they are; contenders write their results there.
        settings: "num_clients", "learning_rate", "rank", "alpha", "targets" (a pattern of module names) and
            "num_classes".
        rounds: For each round, client id -> the rows of each of its local steps.
        pixel_values: Preprocessed images, (N, 3, H, W).
        labels: (N,).
        start: Initial adapters and head by wire name.
    """

    folder: Path
    settings: dict[str, Any]
    rounds: list[dict[int, list[Rows]]]
    pixel_values: Tensor
    labels: Tensor
    start: dict[str, Tensor]


def prepare(name: str, overrides: Sequence[str], folder: Path) -> None:
    """Write a workload's files.

    Args:
        name: A shipped configuration: classification with adapters on the vision tower.
        overrides: Its changes; all clients must get equally many rows.
        folder: Where to.
    """
    from federated.config.config_files import load_config
    from federated.config.seeding import generator, scoped_torch_rng
    from federated.data.batch_order import local_index_batches
    from federated.rounds.cohort import sample_cohort
    from federated.rounds.run import build_run
    from models.clip_loading import load_clip

    config = load_config(name, list(overrides))
    experiment = build_run(config)
    client, clients = config.client, experiment.num_clients
    rounds = []
    for server_round in range(1, config.federation.rounds + 1):
        of_client = {}
        for client_id in sample_cohort(config.seed, server_round, clients, config.cohort_size):
            rng = generator(config.seed, "client", server_round, client_id)
            with scoped_torch_rng(rng):
                rows = experiment.shards[client_id].train
                steps = local_index_batches(rows, client.batch_size, client.local_steps, rng)
                of_client[client_id] = [[int(row) for row in step] for step in steps]
        rounds.append(of_client)
    folder.mkdir(parents=True, exist_ok=True)
    data = experiment.data
    data.train.select_columns(["image"]).add_column("class", data.labels().tolist()).save_to_disk(
        folder / DATA
    )
    save_state(experiment.initial_state, folder / START)
    clip = load_clip(config.model.model_name, pretrained=config.model.pretrained, seed=config.seed).clip
    clip.save_pretrained(folder / CLIP)
    (folder / CONFIG).write_text(config.model_dump_json(exclude_none=True), encoding="utf-8")
    settings = {
        "num_clients": clients,
        "learning_rate": client.learning_rate,
        "rank": config.lora.r,
        "alpha": config.lora.lora_alpha,
        "targets": rf"vision_model\..*\.({'|'.join(config.lora.target_modules)})",
        "num_classes": experiment.model.num_classes,
        "processor": _values_of(experiment.model.preprocess),
    }
    (folder / PLAN).write_text(json.dumps({"settings": settings, "rounds": rounds}), encoding="utf-8")


def read_prepared(folder: Path) -> Prepared:
    """Read what ``prepare`` wrote."""
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    rounds = [{int(client): steps for client, steps in of_client.items()} for of_client in plan["rounds"]]
    data = load_from_disk(str(folder / DATA))
    values = plan["settings"]["processor"]
    process = ImageProcessor(
        size=values["size"] if isinstance(values["size"], int | None) else tuple(values["size"]),
        crop=values["crop"] and tuple(values["crop"]),
        resample=Image.Resampling(values["resample"]),
        scale=torch.tensor(values["scale"]),
        shift=torch.tensor(values["shift"]),
    )
    return Prepared(
        folder,
        plan["settings"],
        rounds,
        torch.stack([process(image) for image in data["image"]]),
        torch.tensor(data["class"]),
        load_file(folder / START),
    )


def _values_of(process: ImageProcessor) -> dict[str, Any]:
    return {
        "size": process.size,
        "crop": process.crop,
        "resample": int(process.resample),
        "scale": process.scale.tolist(),
        "shift": process.shift.tolist(),
    }
