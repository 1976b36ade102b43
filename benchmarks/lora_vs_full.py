"""LoRA against full fine-tuning, the claims people quote, measured on this machine.

``python -m benchmarks.lora_vs_full`` prints a table and writes ``docs/results/lora_vs_full.{json,md}``. Every
variant runs in a process of its own, because peak memory is a property of a process. Two models: ViT-B/32
with random weights for time, memory and checkpoint size (none of them depends on the weights' values), and
the bundled CLIP for accuracy after one pass over Fashion-MNIST by one client that holds all of it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import write_results
from lora.adapter_saving import save_full_checkpoint, save_lora_adapters
from lora.clip_wrapper import CLIPLoRAWrapper
from lora.config import LoRAConfig
from lora.verify import count_parameters
from models.clip import FederatedCLIPModel
from models.training import TrainingSettings

RANKS = (4, 8, 16, 32, 64)
VARIANTS = ("full", "vision_and_projection", *(f"r{rank}" for rank in RANKS))
TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
BATCH_SIZE = 8
TIMED_STEPS = 7
LEARNING_RATES = {"full": 5e-4, "vision_and_projection": 5e-4}
ADAPTER_LEARNING_RATE = 2e-3


def build(variant: str, model_name: str, class_names: list[str], *, pretrained: bool) -> Any:
    """Return the federated model of a variant: full fine-tuning or LoRA on the vision tower."""
    strategy = variant if variant in LEARNING_RATES else "lora"
    model = FederatedCLIPModel(
        model_name,
        len(class_names),
        class_names=class_names if pretrained else None,
        strategy=strategy,
        pretrained=pretrained,
    )
    if strategy != "lora":
        return model
    rank = int(variant.removeprefix("r"))
    config = LoRAConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=TARGETS)
    return CLIPLoRAWrapper(model, config, target_components=["vision"]).apply_lora_to_federated_model()


def measure_cost(variant: str) -> dict[str, Any]:
    """Time steps of the ViT-B/32 shape in this process; seconds are medians."""
    model = build(variant, "openai/clip-vit-base-patch32", [str(i) for i in range(10)], pretrained=False)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH_SIZE, 3, 224, 224, generator=generator)
    labels = torch.randint(10, (BATCH_SIZE,), generator=generator)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    backward_seconds, step_seconds = [], []
    model.start_training(TrainingSettings(), TIMED_STEPS + 1)
    for _ in range(TIMED_STEPS + 1):  # the first one warms up
        loss = model.task.loss(model, {"pixel_values": images, "labels": labels})
        start = time.perf_counter()
        loss.backward()
        backward_seconds.append(time.perf_counter() - start)
        for parameter in trained:
            parameter.grad = None
        start = time.perf_counter()
        model.train_step(images, labels)
        step_seconds.append(time.perf_counter() - start)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with tempfile.TemporaryDirectory() as folder:
        save = save_full_checkpoint if variant in LEARNING_RATES else save_lora_adapters
        save(model, folder)
        checkpoint_bytes = sum(path.stat().st_size for path in Path(folder).iterdir())
    return {
        "trainable": count_parameters(model)["trainable"],
        "backward_seconds": sorted(backward_seconds[1:])[TIMED_STEPS // 2],
        "step_seconds": sorted(step_seconds[1:])[TIMED_STEPS // 2],
        "peak_bytes": peak_bytes,
        "checkpoint_bytes": checkpoint_bytes,
    }


def measure_accuracy(variant: str) -> dict[str, Any]:
    """Train the bundled CLIP for one pass over the training images; test accuracy in per cent."""
    from federated.config.seeding import generator
    from federated.data.dataset import image_tensors, load_data

    data = load_data("fashion_mnist")
    model = build(variant, "tiny", list(data.class_names or ()), pretrained=True)
    images = {split: image_tensors(data, split, model.preprocess) for split in ("train", "test")}

    def accuracy() -> float:
        batches = images["test"].batches(None, 250, rng=None)
        return (
            100 * model.evaluate({k: b[k] for k in ("pixel_values", "labels")} for b in batches)["accuracy"]
        )

    before = accuracy()
    images["train"].pixel_values(range(len(images["train"])))  # decoding is not what is timed
    rate = LEARNING_RATES.get(variant, ADAPTER_LEARNING_RATE)
    num_steps = len(images["train"]) // 32
    model.start_training(TrainingSettings(learning_rate=rate), num_steps)
    start = time.perf_counter()
    for batch in images["train"].batches(None, 32, rng=generator(0, "client", 1, 0), drop_last=True):
        model.train_step(batch["pixel_values"], batch["labels"])
    epoch_seconds = time.perf_counter() - start
    return {"zero_shot": before, "accuracy": accuracy(), "epoch_seconds": epoch_seconds}


def table(measured: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Return the rows to print; ratios are to full fine-tuning in the same run."""
    full = measured["full"]
    return [
        {
            "variant": variant,
            "trainable (ViT-B/32)": f"{row['trainable']:,}",
            "backward": f"{full['backward_seconds'] / row['backward_seconds']:.2f} x",
            "step": f"{full['step_seconds'] / row['step_seconds']:.2f} x",
            "peak memory": f"{row['peak_bytes'] / 1e9:.2f} GB",
            "full / this": f"{full['peak_bytes'] / row['peak_bytes']:.2f} x",
            "checkpoint": f"{row['checkpoint_bytes'] / 1e6:.2f} MB",
            "epoch (tiny)": f"{row['epoch_seconds']:.1f} s",
            "accuracy (tiny)": f"{row['zero_shot']:.1f} -> {row['accuracy']:.1f} %",
        }
        for variant, row in measured.items()
    ]


def main() -> None:
    """Measure every variant and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=VARIANTS, help="measure one variant in this process and print JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only:
        print(json.dumps(measure_cost(arguments.only) | measure_accuracy(arguments.only)))
        return
    measured = {}
    for variant in VARIANTS:
        command = [sys.executable, "-m", "benchmarks.lora_vs_full", "--only", variant]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        measured[variant] = json.loads(output.splitlines()[-1])
        print(variant, measured[variant], flush=True)
    print(write_results("lora_vs_full", "python -m benchmarks.lora_vs_full", table(measured)))


if __name__ == "__main__":
    main()
