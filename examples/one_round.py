"""One round of federated averaging of LoRA factors, in plain loops.

    python examples/one_round.py

No caches, no codec, no messages, no workers: what `fedlora run quickstart` computes, without what makes it
fast. A test holds the fast path to the adapters that this file computes.

    1. the server samples a cohort and sends its adapter and head
    2. each client of the cohort takes local steps from them, on its own shard
    3. each client sends what changed, and the number of its samples
    4. the server adds the mean of the changes, weighted by samples (McMahan et al. 2017, arXiv:1602.05629)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from federated.config.seeding import generator
from federated.data.batch_order import local_index_batches
from federated.data.dataset import FederatedData, load_data
from federated.data.partition import partition
from lora import LoRAConfig
from lora.clip_wrapper import CLIPLoRAWrapper
from models.clip import FederatedCLIPModel

State = dict[str, Tensor]


@dataclass(frozen=True)
class LocalSteps:
    """How a client trains."""

    num_steps: int = 12
    batch_size: int = 32
    learning_rate: float = 2e-3


def load_pixels(data: FederatedData, split: str, model: CLIPLoRAWrapper) -> tuple[Tensor, Tensor]:
    """Return the images of a split, (N, 3, H, W), and their labels, (N,)."""
    rows = data.split(split)
    pixels = torch.stack([model.preprocess(image.convert("RGB")) for image in rows["image"]])
    return pixels, torch.tensor(rows[data.label_column])


def build_model(class_names: Sequence[str], *, seed: int) -> CLIPLoRAWrapper:
    """Return the bundled CLIP with vision adapters and a head that starts as the class prompts."""
    clip = FederatedCLIPModel(
        "tiny", len(class_names), class_names=class_names, templates=("{}",), strategy="lora", seed=seed
    )
    config = LoRAConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        target_components=["vision"],
        target_modules=["q_proj", "k_proj", "v_proj", "out_proj"],
    )
    return CLIPLoRAWrapper(clip, config, seed=seed).apply_lora_to_federated_model()


def train_client(
    model: CLIPLoRAWrapper,
    pixels: Tensor,
    labels: Tensor,
    shard: np.ndarray,
    how: LocalSteps,
    rng: np.random.Generator,
) -> None:
    """Take one client's local steps; the model holds the result."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=how.learning_rate, weight_decay=0.0)
    torch.manual_seed(int(rng.integers(2**63)))  # of dropout, which takes no generator
    for rows in local_index_batches(shard, how.batch_size, how.num_steps, rng):
        loss = F.cross_entropy(model.logits({"pixel_values": pixels[rows]}), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def one_round(  # noqa: PLR0913 - all that a round needs, by name
    model: CLIPLoRAWrapper,
    server: State,
    shards: Sequence[np.ndarray],
    pixels: Tensor,
    labels: Tensor,
    *,
    how: LocalSteps,
    seed: int,
    server_round: int,
) -> State:
    """Return the server's adapter and head after a round in which every client takes part."""
    changes: list[State] = []
    for client_id, shard in enumerate(shards):
        model.set_state(server)
        train_client(model, pixels, labels, shard, how, generator(seed, "client", server_round, client_id))
        changes.append({name: trained - server[name] for name, trained in model.get_state().items()})
    weights = [len(shard) / sum(map(len, shards)) for shard in shards]
    mean = {
        name: sum(weight * change[name].double() for weight, change in zip(weights, changes, strict=True))
        for name in server
    }
    return {name: (server[name] + mean[name]).float() for name in server}


def main() -> None:
    """Play two rounds with five clients and print the accuracy on the test split."""
    seed = 0
    data = load_data("fashion_mnist", seed=seed, max_train_samples=1000, max_test_samples=300)
    split = partition(data.train, name="iid", num_clients=5, seed=seed, label_column=data.label_column)
    model = build_model(data.class_names or (), seed=seed)
    pixels, labels = load_pixels(data, "train", model)
    test_pixels, test_labels = load_pixels(data, "test", model)
    server = dict(model.get_state())
    for server_round in range(3):
        if server_round:
            server = one_round(
                model,
                server,
                split.indices,
                pixels,
                labels,
                how=LocalSteps(),
                seed=seed,
                server_round=server_round,
            )
        model.set_state(server)
        accuracy = model.evaluate(test_pixels, test_labels)["accuracy"]
        print(f"round {server_round}: {100 * accuracy:.1f} % of {len(test_labels)} test images")


if __name__ == "__main__":
    main()
