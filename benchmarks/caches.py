"""What the exact caches save where a tower is frozen: ``python -m benchmarks.caches``.

Both workloads train adapters on the text tower of a CLIP of ViT-B/32's shape, with random weights and the
bundled tokenizer: none of the figures depends on the weights' values. The engine runs each with its caches
off and on, in turn; a round in which every image has been seen before is what a long run consists of, and the
first round, which fills the cache, is reported beside it. Training is by SGD, so that results can be compared
(``docs/speed.md`` says why not by AdamW): how far what the two ways have learnt is apart, relative to it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from benchmarks.limit import CACHES_OFF, Engine, Workload
from benchmarks.machine import Row, write_results
from models.clip_loading import TINY_FOLDER
from models.state import State, subtract_

SGD = ("client.optimizer=sgd", "client.learning_rate=0.01", "federation.rounds=50")
ONE_CLIENT = ("partition.name=iid", "partition.num_clients=1", "partition.options={}")


@dataclass(frozen=True)
class Case:
    """A workload and how often it is run.

    Attributes:
        workload: The workload; ``{folder}`` in an override is the model's.
        goal: The ratio that the project set itself.
    """

    workload: Workload
    goal: float


CASES = (
    Case(
        Workload(
            "ViT-B/32 shape, text adapters, retrieval, 1 client x 1 step of 32",
            "retrieval_vi",
            (
                *ONE_CLIENT,
                *SGD,
                "model.model_name={folder}",
                "lora.target_modules=[q_proj, v_proj]",
                "data.max_train_samples=32",
                "data.max_test_samples=32",
                "client.local_steps=1",
                "client.batch_size=32",
            ),
            3,
        ),
        5.0,
    ),
    Case(
        Workload(
            "ViT-B/32 shape, text adapters, 10 class prompts, 1 client x 1 step of 128",
            "quickstart",
            (
                *ONE_CLIENT,
                *SGD,
                "model.model_name={folder}",
                "task.name=zero_shot",
                "task.train_head=false",
                "lora.target_components=[text]",
                "lora.target_modules=[q_proj, v_proj]",
                "partition.local_test_fraction=0",
                "data.max_train_samples=128",
                "data.max_test_samples=20",
                "client.local_steps=1",
                "client.batch_size=128",
            ),
            2,
        ),
        15.0,
    ),
)


def save_random_clip(folder: Path) -> None:
    """Write a CLIP of ViT-B/32's shape with random weights and the bundled tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER, local_files_only=True)
    config = CLIPConfig()
    config.text_config.eos_token_id = tokenizer.eos_token_id
    config.text_config.bos_token_id = tokenizer.bos_token_id
    config.text_config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)


def measure(case: Case, folder: Path) -> list[Row]:
    """Run rounds without and with caches in turn."""
    overrides = [override.replace("{folder}", str(folder)) for override in case.workload.overrides]
    workload = Workload(case.workload.name, case.workload.config, tuple(overrides), case.workload.num_turns)
    ways = {"caches off": Engine(workload, CACHES_OFF), "caches on": Engine(workload)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(workload.num_turns + 1):  # the first round fills the caches
        for name, one_round in ways.items():
            started = time.perf_counter()
            one_round()
            seconds[name].append(time.perf_counter() - started)
    experiments = [engine.experiment for engine in ways.values()]
    start = experiments[0].initial_state
    off, on = (subtract_(e.model.get_state(), start, tuple(start)) for e in experiments)
    apart = distance(off, on)
    steady = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["caches off"][1:], seconds["caches on"][1:], strict=True)]
    return [
        row(workload.name, "caches off", f"{steady['caches off']:.2f} s a round"),
        row(workload.name, "caches on, first round", f"{seconds['caches on'][0]:.2f} s"),
        row(
            workload.name,
            "caches on",
            f"{steady['caches on']:.3f} s a round",
            f"{statistics.median(ratios):.1f} x faster (goal {case.goal:.0f} x); updates {apart:.0e} apart",
        ),
    ]


def row(workload: str, contender: str, seconds: str, ratio: str = "") -> Row:
    """Return a line of the table."""
    against = "caches off" if ratio else ""
    return {"workload": workload, "contender": contender, "time": seconds, "ratio": ratio, "against": against}


def distance(first: State, second: State) -> float:
    """Return the L2 distance of two states relative to the size of the second."""
    a, b = (torch.cat([state[name].flatten() for name in sorted(state)]) for state in (first, second))
    return float((a - b).norm() / b.norm())


def main(cases: Sequence[Case] = CASES) -> None:
    """Measure every case and write the table."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        save_random_clip(Path(folder))
        for case in cases:
            rows += measure(case, Path(folder))
            print(rows[-1], flush=True)
    print(write_results("caches", "python -m benchmarks.caches", rows))


if __name__ == "__main__":
    main()
