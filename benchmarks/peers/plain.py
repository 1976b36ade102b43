"""The model as one would write it without a framework: transformers, PEFT, a linear head, AdamW.

Used by every contender that is not this project.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel

from benchmarks.peers.prepared import CLIP, Prepared, Rows


class PlainClassifier(nn.Module):
    """CLIP's vision tower with PEFT adapters, and a head on the normalised image features.

    Attributes:
        live: What trains, by wire name.
    """

    def __init__(self, prepared: Prepared) -> None:
        super().__init__()
        settings = prepared.settings
        self.clip = CLIPModel.from_pretrained(prepared.folder / CLIP, local_files_only=True).eval()
        self.clip.requires_grad_(False)
        inject_adapter_in_model(
            LoraConfig(r=settings["rank"], lora_alpha=settings["alpha"], target_modules=settings["targets"]),
            self.clip,
        )
        self.head = nn.Linear(self.clip.config.projection_dim, settings["num_classes"])
        self.live = {n.replace(".default", ""): p for n, p in self.named_parameters() if p.requires_grad}
        self.put(prepared.start)

    @torch.no_grad()
    def put(self, state: dict[str, Tensor]) -> None:
        """Overwrite what trains."""
        for name, parameter in self.live.items():
            parameter.copy_(state[name])

    def get(self) -> dict[str, Tensor]:
        """Copy what trains."""
        return {name: parameter.detach().clone() for name, parameter in self.live.items()}

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of a batch."""
        features = self.clip.get_image_features(pixel_values=images).pooler_output
        logits = self.head(self.clip.logit_scale.exp() * F.normalize(features, dim=-1))
        return F.cross_entropy(logits, labels)


def train(model: PlainClassifier, prepared: Prepared, steps: list[Rows]) -> float:
    """Take a client's local steps with a new optimizer; return their mean loss."""
    rate = prepared.settings["learning_rate"]
    optimizer = torch.optim.AdamW(list(model.live.values()), lr=rate, weight_decay=0.0, fused=True)
    losses = []
    for rows in steps:
        loss = model.loss(prepared.pixel_values[rows], prepared.labels[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses) / len(losses)
