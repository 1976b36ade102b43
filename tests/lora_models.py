"""Small CLIPs for the tests of `lora`: a Hugging Face one, and one with fused attention as in open_clip."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from models.vqa import FederatedVQAModel

NUM_BLOCKS = 2
BACKENDS = ("huggingface", "fused")
INSTALLED_BACKENDS = BACKENDS if find_spec("open_clip") is None else (*BACKENDS, "open_clip")
"""open_clip itself too, where this optional extra is installed; "fused" stands for it elsewhere."""
VQA = "vqa"
"""The second model family: a vision tower in front of a text encoder."""


class FusedBlock(nn.Module):
    """A residual block around nn.MultiheadAttention, named as open_clip names its parts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, num_heads=2, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 2 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class FusedTransformer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(FusedBlock(width) for _ in range(NUM_BLOCKS))

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, attn_mask=attn_mask)
        return x


class FusedVision(nn.Module):
    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=8, stride=8, bias=False)
        self.transformer = FusedTransformer(width)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, dim) / width**0.5)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        tokens = self.conv1(pixel_values).flatten(2).transpose(1, 2)  # (B, T, width)
        return self.ln_post(self.transformer(tokens).mean(dim=1)) @ self.proj


class FusedCLIP(nn.Module):
    """The parts of open_clip's CLIP that matter here, under its names."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = FusedVision(width=16, dim=12)
        self.token_embedding = nn.Embedding(23, 20)
        self.transformer = FusedTransformer(20)
        self.ln_final = nn.LayerNorm(20)
        self.text_projection = nn.Parameter(torch.randn(20, 12) / 20**0.5)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        for module in self.modules():  # zero biases would hide mistakes
            if isinstance(module, nn.MultiheadAttention):
                nn.init.normal_(module.in_proj_bias, std=0.1)

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.visual(pixel_values)

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
        return (
            self.ln_final(self.transformer(self.token_embedding(ids), attn_mask=mask))[:, -1]
            @ self.text_projection
        )


def small_config(**changes: Any) -> CLIPConfig:
    tower = {"num_hidden_layers": NUM_BLOCKS, "num_attention_heads": 2, "projection_dim": 12}
    text = {
        **tower,
        "hidden_size": 20,
        "intermediate_size": 24,
        "vocab_size": 23,
        "max_position_embeddings": 8,
    }
    vision = {**tower, "hidden_size": 16, "intermediate_size": 32, "image_size": 16, "patch_size": 8}
    return CLIPConfig(
        text_config={**text, "bos_token_id": 21, "eos_token_id": 22, "pad_token_id": 22, **changes},
        vision_config=vision,
        projection_dim=12,
    )


def open_clip() -> nn.Module:
    from open_clip import CLIP

    vision = {"image_size": 16, "layers": NUM_BLOCKS, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 4, "vocab_size": 23, "width": 20, "heads": 2, "layers": NUM_BLOCKS}
    return CLIP(12, vision, text, quick_gelu=True)


def small_clip(backend: str = "huggingface", seed: int = 0) -> nn.Module:
    """A random CLIP in eval mode, frozen; equal seeds give equal weights.

    Frozen because torch chooses other matrix kernels for weights that require a gradient, even under no_grad:
    results of a frozen and an unfrozen model differ in the last bit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = {
            "huggingface": lambda: CLIPModel(small_config()),
            "fused": FusedCLIP,
            "open_clip": open_clip,
            VQA: lambda: FederatedVQAModel(decoder="frozen", train_head=False),
        }[backend]()
        with torch.no_grad():  # freshly made models have zero biases, which would hide mistakes
            for name, parameter in clip.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
    return clip.eval().requires_grad_(False)


def features(clip: nn.Module, tower: str = "both") -> torch.Tensor:
    """Image and text features of fixed inputs, one row each, (B, D)."""
    generator = torch.Generator().manual_seed(7)
    if isinstance(clip, FederatedVQAModel):
        ids = torch.tensor([[0, 30, 50, 2], [0, 90, 90, 2]])
        pixels = torch.randn(2, 3, 32, 32, generator=generator)
        batch = {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return clip.encode(batch)[0].flatten(1)
    pixels = torch.randn(3, 3, 16, 16, generator=generator)
    ids = torch.tensor([[21, 3, 5, 22], [21, 9, 9, 22]])
    if isinstance(clip, CLIPModel):
        image = clip.get_image_features(pixel_values=pixels).pooler_output
        text = clip.get_text_features(input_ids=ids).pooler_output
    else:
        image, text = clip.encode_image(pixels), clip.encode_text(ids)
    return {"vision": image, "text": text, "both": torch.cat([image, text])}[tower]


@torch.no_grad()
def outputs(clip: nn.Module, tower: str = "both") -> torch.Tensor:
    """The features without a graph.

    To compare bit for bit: nn.MultiheadAttention takes another kernel where no gradient is wanted.
    """
    return features(clip, tower)


@torch.no_grad()
def disturb(model: nn.Module, seed: int = 1) -> None:
    """Pretend to have trained: noise on everything that requires a gradient."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
