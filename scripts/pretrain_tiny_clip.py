"""Pre-train the bundled tiny CLIP from scratch on emoji pictures and their names.

Runs once, before any round, by whoever maintains `models/tiny_clip`. The recipe has step limits and a fixed
seed and looks at no test data. With `--evaluate FOLDER` it prints the numbers of the model card instead.

    python scripts/pretrain_tiny_clip.py --output models/tiny_clip
    python scripts/pretrain_tiny_clip.py --evaluate models/tiny_clip
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from emoji_batches import (  # noqa: E402
    PIXEL_MEAN,
    PIXEL_STD,
    TEMPLATES,
    CaptionSampler,
    PictureSampler,
    class_levels,
    readable,
)
from evaluate_tiny_clip import print_evaluation  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    get_cosine_schedule_with_warmup,
)

from federated.data.sources import embedded  # noqa: E402

logger = logging.getLogger("pretrain_tiny_clip")

BUNDLED = ROOT / "models" / "tiny_clip"
SEED = 20240517
VOCABULARY_SIZE = 4200
CONTEXT_TOKENS = 32
BATCH_SIZE = 64
MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True)
class Stage:
    """One stage of the recipe: its steps, peak learning rate and how often classes are trained.

    `class_step_every` = 2 makes every second step a class step, 0 none.
    """

    num_steps: int
    learning_rate: float
    class_step_every: int


STAGES = (Stage(3841, 1e-3, 0), Stage(1152, 6e-4, 2))


def tokenizer_corpus() -> list[str]:
    """Names and tags of the training concepts in all languages, class names and templates."""
    texts = [template.format("") for template in TEMPLATES]
    texts += [name for language in embedded.LANGUAGES for name in embedded.group_names(language)]
    texts += [readable(name) for name in embedded.subgroup_names()]
    for concept in embedded.concepts():
        if not concept.held_out:
            for language in embedded.LANGUAGES:
                texts += [concept.names[language], *concept.tags[language]]
    return texts


def build_tokenizer() -> CLIPTokenizer:
    """Train a byte-level BPE with `</w>`; every byte is in the vocabulary, so no text is unknown.

    The trainer breaks ties between equally frequent pairs in hash order, so two calls differ in a few merges.
    """
    template = CLIPTokenizer().backend_tokenizer
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = template.normalizer, template.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE + 400,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trained.train_from_iterator(tokenizer_corpus(), trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*alphabet, *(byte + "</w>" for byte in alphabet)])
    kept: list[tuple[str, str]] = []
    for left, right in merges:
        if len(tokens) == VOCABULARY_SIZE - 2:
            break
        tokens[left.removesuffix("</w>") + right] = None
        kept.append((left, right))
    ids = {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=ids, merges=kept, model_max_length=CONTEXT_TOKENS)


def build_model(tokenizer: CLIPTokenizer, seed: int) -> CLIPModel:
    """The untrained model: 32 px pictures, patches of 8, width 128, 4 vision and 2 text layers."""
    config = CLIPConfig(
        projection_dim=128,
        text_config={
            "projection_dim": 128,
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT_TOKENS,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "projection_dim": 128,
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(config)


class Proxies(nn.Module):
    """Learned directions of emoji and subgroups; they steady the training and are dropped afterwards."""

    def __init__(self, num_concepts: int, num_subgroups: int, generator: torch.Generator) -> None:
        """Draw random directions."""
        super().__init__()
        self.concepts = nn.Parameter(torch.randn(num_concepts, 128, generator=generator))
        self.subgroups = nn.Parameter(torch.randn(num_subgroups, 128, generator=generator))

    def loss(
        self, features: torch.Tensor, scale: torch.Tensor, concept: torch.Tensor, subgroup: torch.Tensor
    ) -> torch.Tensor:
        """Cross-entropy of features (B, D) with the concepts, plus half of it with the subgroups."""
        concept_logits = scale * features @ F.normalize(self.concepts, dim=-1).T
        subgroup_logits = scale * features @ F.normalize(self.subgroups, dim=-1).T
        return F.cross_entropy(concept_logits, concept) + 0.5 * F.cross_entropy(subgroup_logits, subgroup)


class Trainer:
    """What lives across steps: model, proxies, samplers and the random stream."""

    def __init__(self, tokenizer: CLIPTokenizer, seed: int) -> None:
        """Build the untrained model and the samplers from one seed."""
        self.tokenizer = tokenizer
        self.model = build_model(self.tokenizer, seed)
        self.levels = class_levels()
        self.captions, self.pictures = CaptionSampler(), PictureSampler()
        self.generator = np.random.default_rng(seed)
        concepts = embedded.concepts()
        self.train_numbers = np.array([n for n, concept in enumerate(concepts) if not concept.held_out])
        self.proxies = Proxies(len(concepts), len(self.levels[0].names), torch.Generator().manual_seed(seed))

    def batches(self, num_steps: int) -> Iterator[np.ndarray]:
        """Concept numbers (64,), distinct within a batch; every concept comes once an epoch."""
        produced = 0
        while True:
            order = self.generator.permutation(self.train_numbers)
            for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
                if produced == num_steps:
                    return
                produced += 1
                yield order[start : start + BATCH_SIZE]

    def image_features(self, numbers: np.ndarray) -> torch.Tensor:
        """Normalised features (B, D) of random pictures of the concepts."""
        pixels = self.pictures.draw(numbers, self.generator)
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Normalised features (N, D)."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=CONTEXT_TOKENS, return_tensors="pt"
        )
        return F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)

    def contrastive_loss(self, numbers: np.ndarray) -> torch.Tensor:
        """CLIP's loss with label smoothing 0.05, plus half the proxy losses."""
        image = self.image_features(numbers)
        text = self.text_features([self.captions.draw(n, self.generator) for n in numbers])
        scale = self.model.logit_scale.exp()
        logits = scale * image @ text.T  # (B, B)
        target = torch.arange(len(numbers))
        clip_loss = 0.5 * sum(F.cross_entropy(m, target, label_smoothing=0.05) for m in (logits, logits.T))
        concept = torch.from_numpy(numbers)
        subgroup = self.levels[0].labels[concept]
        proxy_loss = sum(self.proxies.loss(side, scale, concept, subgroup) for side in (image, text))
        return clip_loss + 0.5 * proxy_loss

    def class_loss(self, numbers: np.ndarray) -> torch.Tensor:
        """Mean cross-entropy of pictures against the texts of subgroup, coarse class and group names."""
        image = self.image_features(numbers)
        template = str(self.generator.choice(("{}", "{}", *TEMPLATES)))
        texts = [template.format(name) for level in self.levels for name in level.names]
        logits = self.model.logit_scale.exp() * image @ self.text_features(texts).T
        parts = logits.split([len(level.names) for level in self.levels], dim=1)
        return sum(
            F.cross_entropy(part, level.labels[torch.from_numpy(numbers)])
            for part, level in zip(parts, self.levels, strict=True)
        ) / len(self.levels)

    def run(self, stage: Stage, label: str) -> None:
        """Train one stage with a fresh optimizer."""
        optimizer = make_optimizer([self.model, self.proxies], stage.learning_rate)
        schedule = get_cosine_schedule_with_warmup(
            optimizer, min(200, stage.num_steps // 10), stage.num_steps
        )
        progress = tqdm(self.batches(stage.num_steps), total=stage.num_steps, desc=label, mininterval=5)
        for step, numbers in enumerate(progress):
            is_class_step = stage.class_step_every > 0 and step % stage.class_step_every == 1
            loss = self.class_loss(numbers) if is_class_step else self.contrastive_loss(numbers)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                self.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
            if step % 50 == 0:
                progress.set_postfix(loss=f"{loss.item():.3f}", scale=f"{self.model.logit_scale.exp():.1f}")


def make_optimizer(modules: Sequence[nn.Module], learning_rate: float) -> torch.optim.AdamW:
    """AdamW (0.9, 0.98) with weight decay 0.1 on matrices and none on vectors."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))


def save(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a Hugging Face folder with fp16 weights; the config asks readers to compute in fp32."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    for tower in ("text_config", "vision_config"):
        config[tower]["dtype"] = "float32"
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=list(PIXEL_MEAN),
        image_std=list(PIXEL_STD),
    )
    processor.save_pretrained(folder)


def pretrain(output: Path, tokenizer: CLIPTokenizer, seed: int, steps_scale: float) -> None:
    """Run both stages and save."""
    trainer = Trainer(tokenizer, seed)
    num_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    logger.info("%d parameters, %d tokens", num_parameters, len(trainer.tokenizer))
    for number, stage in enumerate(STAGES, start=1):
        num_steps = max(1, round(stage.num_steps * steps_scale))
        trainer.run(Stage(num_steps, stage.learning_rate, stage.class_step_every), f"stage {number}")
    save(trainer.model, trainer.tokenizer, output)
    logger.info("saved to %s", output)


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder to write the model to")
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER", help="print a model's numbers and stop")
    parser.add_argument(
        "--new-tokenizer",
        action="store_true",
        help=f"train a tokenizer instead of taking the one in {BUNDLED}",
    )
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument(
        "--threads", type=int, default=1, help="PyTorch threads; the numbers were made with 1"
    )
    parser.add_argument("--steps-scale", type=float, default=1.0, help="0.1 trains a tenth of the steps")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    if arguments.evaluate is not None:
        print_evaluation(arguments.evaluate)
    elif arguments.output is not None:
        tokenizer = build_tokenizer() if arguments.new_tokenizer else CLIPTokenizer.from_pretrained(BUNDLED)
        pretrain(arguments.output, tokenizer, arguments.seed, arguments.steps_scale)
    else:
        parser.error("give --output FOLDER to train or --evaluate FOLDER to measure")


if __name__ == "__main__":
    main()
