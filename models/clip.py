"""FederatedCLIPModel: a CLIP, a head, and the four verbs of a federated model.

The server and every simulated client hold the same object. A client calls `set_parameters` with what the
downlink carried, `train_step` for its local steps, and `get_parameters` for the uplink; the server calls
`set_parameters` and `evaluate`. What travels is named once (`set_exchanged`): by the fine-tuning strategy at
construction, or by LoRA injection.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.adapter_verbs import AdapterVerbs
from models.clip_loading import Tokens, load_clip
from models.errors import UserError
from models.features import check_given, image_features, patch_features, text_features
from models.federated_model import FederatedModel
from models.finetuning import STRATEGIES, check_choice, check_strategy, trains
from models.frozen import moving_parts
from models.head import class_head
from models.hub_tokenizer import TokenizerMissingError
from models.lean_blocks import lean, lean_modules
from models.partial_towers import count_blocks
from models.prompts import (
    average_templates,
    check_classes,
    class_prompts,
    encode_in_chunks,
    names_that_read_alike,
    pad_tokens,
    warn_of_cut,
)
from models.tasks import TASKS
from models.temperature import MAX_LOG_TEMPERATURE
from models.training import Batch, autocast

logger = logging.getLogger(__name__)


class FederatedCLIPModel(AdapterVerbs, FederatedModel):
    """A CLIP to be fine-tuned by clients who exchange only part of it.

    Attributes:
        clip: The CLIP module.
        head: Linear (D -> C) on the normalised image features, or None where the task has none.
            logits = exp(logit_scale) * W f + b, with W started as the class-prompt embeddings and
            b as 0, so that the untrained model is the zero-shot classifier.
        towers: Where the towers are inside `clip`.
        tokenize: Texts -> tokens.
        preprocess: PIL image -> (3, H, W).
        class_names: Names of the classes, or None.
        moving: What changes over a run, and what is frozen.
        num_blocks: Tower -> number of its transformer blocks; 0 where they cannot be told apart.
        keeps_class_embeddings: Compute the class prompts once while the text tower is frozen.
        trims_prompts: Tokens end with the longest text; False: with the tower's context length. Padding
            after the end-of-text token cannot change the output of a causal tower, only its cost.
        precision: Of forward passes outside training: "fp32", "bf16" or "fp16" (autocast).
    """

    input_name = "pixel_values"

    def __init__(  # noqa: PLR0913 - the public signature; all but two are keyword-only
        self,
        model_name: str = "openai/clip-vit-base-patch32",
        num_classes: int = 10,
        *,
        class_names: Sequence[str] | None = None,
        templates: Sequence[str] = ("a photo of a {}.",),
        task: str = "classification",
        strategy: str = "full",
        train_head: bool = True,
        pretrained: bool = True,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        """Load the CLIP, start the head from the class names, and freeze what does not train.

        Args:
            model_name: See `models.clip_loading.load_clip`.
            num_classes: C; must equal len(class_names) where both are given.
            class_names: Needed for zero-shot use; without them the head starts random.
            templates: Prompts with one {} each, averaged per class.
            task: "classification", "zero_shot" or "retrieval".
            strategy: A key of STRATEGIES.
            train_head: Whether the head trains and travels under strategies that allow it.
            pretrained: Load weights, or draw them from `seed`.
            device: Where the model runs.
            dtype: Of the CLIP's weights; the head stays float32.
            seed: Of whatever starts random.
            cache_dir: Where downloads are kept; the hub's own folder if left out.

        Raises:
            UserError: An argument is unknown or contradicts another.
        """
        super().__init__()
        check_choice("task", task, TASKS)
        check_choice("strategy", strategy, STRATEGIES)
        check_classes(num_classes, class_names, templates)
        loaded = load_clip(
            model_name, pretrained=pretrained, device=device, dtype=dtype, seed=seed, cache_dir=cache_dir
        )
        self.clip = loaded.clip
        self.towers, self.tokenize, self.preprocess = loaded.towers, loaded.tokenize, loaded.preprocess
        self.image_size, self.embedding_dim = loaded.image_size, loaded.embedding_dim
        self.model_name, self.pretrained, self.seed = model_name, pretrained, seed
        self._encode_image, self._encode_text = loaded.encode_image, loaded.encode_text
        self._lean_modules = lean_modules(self.clip, self.towers)
        self.task, self.strategy, self.train_head = TASKS[task], strategy, train_head
        self.num_classes = num_classes
        self.class_names = tuple(class_names) if class_names is not None else None
        self.templates = tuple(templates)
        self.keeps_class_embeddings, self.trims_prompts, self.precision = True, True, "fp32"
        self._class_tokens: Tokens | None = None
        self._class_cache: Tensor | None = None
        self.head: nn.Module | None = self._build_head() if self.task.uses_head else None
        self.num_blocks = count_blocks(self.clip, self.towers)
        self._apply_strategy()

    # What trains and what travels

    def _apply_strategy(self) -> None:
        check_strategy(self.strategy, self.task, self.dtype, train_head=self.train_head)
        choice = STRATEGIES[self.strategy]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trains(choice, name, self.towers, train_head=self.train_head))
        self.ready(name for name, parameter in self.named_parameters() if parameter.requires_grad)

    def refresh(self) -> None:
        """Drop the class embeddings too, and look again at what a lean forward pass leaves out."""
        self._class_cache = None
        self._lean_modules = lean_modules(self.clip, self.towers)
        super().refresh()

    def parameters_changed(self) -> None:
        """See which towers, and which of their blocks, are constant."""
        names = {name for name, parameter in self._named if parameter.requires_grad}
        self.moving = moving_parts(names.union(self.exchanged_names), self.towers, self.num_blocks)
        if not self.moving.text_is_frozen:
            self._class_cache = None

    def check_batch(self, batch: Batch) -> None:
        """Refuse a batch that lacks what the towers that train read."""
        check_given(self, batch)

    def after_step(self) -> None:
        """Keep the temperature in CLIP's range."""
        self.clamp_temperature()

    @property
    def vision_is_frozen(self) -> bool:
        """Whether nothing of the vision tower or its projection trains or travels."""
        return self.moving.vision_is_frozen

    @property
    def text_is_frozen(self) -> bool:
        """Whether nothing of the text tower or its projection trains or travels."""
        return self.moving.text_is_frozen

    @torch.no_grad()
    def zero_shot_accuracy(self, batches: Iterable[Batch]) -> float:
        """Share of images whose nearest class-prompt embedding is their class's."""
        metrics = TASKS["zero_shot"].evaluate(self, (self._batch(batch, None) for batch in batches))
        return metrics["accuracy"]

    def lean(self) -> AbstractContextManager[None]:
        """Inside, nothing is computed that features and gradients do not need (``models.lean_blocks``)."""
        return lean(self._lean_modules)

    # Features and logits

    def __repr__(self) -> str:
        """One line: what it is, what trains, what travels; `print(model.clip)` shows the modules."""
        parameters = list(self.parameters())
        total, trained = (
            sum(p.numel() for p in parameters),
            sum(p.numel() for p in parameters if p.requires_grad),
        )
        classes = f", {self.num_classes} classes" if self.head is not None or self.class_names else ""
        return (
            f"{type(self).__name__}({self.model_name}, {self.task.name}{classes}: {trained:,} of "
            f"{total:,} parameters train, {len(self.exchanged_names)} tensors travel)"
        )

    def forward(self, data: Tensor | Batch) -> Tensor:
        """Class logits of images (B, 3, H, W) or a batch, (B, C): the head's, else by class prompts.

        Raises:
            UserError: There is neither a head nor class names.
        """
        batch = self._batch(data, None)
        return self.zero_shot_logits(batch) if self.head is None else self.logits(batch)

    @property
    def logit_scale(self) -> nn.Parameter:
        """The CLIP's log-temperature, a scalar."""
        return cast(nn.Parameter, self.clip.logit_scale)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep exp(logit_scale) at 100 or below where it trains; called after every optimizer step."""
        if self.logit_scale.requires_grad:
            self.logit_scale.clamp_(max=MAX_LOG_TEMPERATURE)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the CLIP's weights; a temperature that trains beside adapters is float32 whatever they are."""
        return next(parameter.dtype for parameter in self.clip.parameters() if parameter.ndim > 1)

    def encode_image(self, pixel_values: Tensor, *, patches: bool = False, block: int = -1) -> Tensor:
        """Project images: (B, 3, H, W) -> (B, D) float32, not normalised.

        Args:
            pixel_values: The images.
            patches: Give what a block of the vision tower says of each patch instead, (B, T, width), not
                projected: the input of a language model that sees.
            block: Which block then; the last one. LLaVA takes the one before, -2.
        """
        pixel_values = pixel_values.to(self.device, self.dtype)
        if patches:
            with autocast(self.precision, self.device.type):
                return patch_features(self, pixel_values, block)
        with self._lean_without_gradients(), autocast(self.precision, self.device.type):
            return self._encode_image(self.clip, pixel_values).float()

    def encode_text(self, texts: Sequence[str] | Tokens) -> Tensor:
        """Project texts or tokens: N of them -> (N, D) float32, not normalised."""
        tokens = texts if isinstance(texts, dict) else self.tokenize(texts)
        tokens = {key: value.to(self.device) for key, value in tokens.items()}
        if not self.trims_prompts:
            tokens = pad_tokens(tokens, self.clip)
        with self._lean_without_gradients(), autocast(self.precision, self.device.type):
            return self._encode_text(self.clip, tokens).float()

    def _lean_without_gradients(self) -> AbstractContextManager[None]:
        """Leave a forward with gradients as it is: checkpointed blocks run again in a backward outside."""
        return nullcontext() if torch.is_grad_enabled() else self.lean()

    def image_features(self, batch: Batch) -> Tensor:
        """Projected image features of a batch (B, D): the given ones, else computed."""
        return image_features(self, batch)

    def text_features(self, batch: Batch) -> Tensor:
        """Projected text features of a batch (B, D): the given ones, else computed."""
        return text_features(self, batch)

    def temperature_scale(self) -> Tensor:
        """exp(logit_scale), a float32 scalar."""
        return self.logit_scale.float().exp()

    def logits(self, batch: Batch) -> Tensor:
        """Class logits of the head (B, C)."""
        if self.head is None:
            raise UserError(f"task={self.task.name} has no head: use zero_shot_logits")
        features = F.normalize(self.image_features(batch), dim=-1)
        return self.head(self.temperature_scale() * features)

    def zero_shot_logits(self, batch: Batch) -> Tensor:
        """Class logits by similarity to the class prompts (B, C)."""
        features = F.normalize(self.image_features(batch), dim=-1)
        return self.temperature_scale() * features @ self.class_embeddings().T

    def class_embeddings(self) -> Tensor:
        """Normalised embedding of each class, averaged over the templates, (C, D).

        Computed once while the text tower is frozen, with gradients at each call otherwise.

        Raises:
            UserError: The model has no class names.
        """
        if self._class_cache is not None:
            return self._class_cache
        if not (self.text_is_frozen and self.keeps_class_embeddings):
            return self._embed_classes()
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            self._class_cache = self._embed_classes()
        return self._class_cache

    def _tokenized_classes(self) -> Tokens:
        if self.class_names is None:
            raise UserError("class_names are needed for class prompts: pass class_names=[...] to the model")
        if self._class_tokens is None:
            prompts = class_prompts(self.class_names, self.templates)
            warn_of_cut(self.tokenize, prompts, "class prompts")
            self._class_tokens = self.tokenize(prompts)
        return self._class_tokens

    def classes_that_read_alike(self) -> list[tuple[str, ...]]:
        """Group the classes whose prompts are the same tokens; empty without names or a tokenizer."""
        if self.class_names is None:
            return []
        try:
            return names_that_read_alike(self._tokenized_classes(), self.class_names)
        except TokenizerMissingError:
            return []

    def _embed_classes(self) -> Tensor:
        tokens = self._tokenized_classes()
        features = encode_in_chunks(self.encode_text, tokens)
        return average_templates(features, self.num_classes)

    def _build_head(self) -> nn.Linear:
        return class_head(
            self.embedding_dim,
            self.num_classes,
            scale=self.temperature_scale().detach(),
            seed=self.seed,
            embed=self._initial_embeddings,
        )

    def _initial_embeddings(self) -> Tensor | None:
        """Class embeddings; None without class names, or where random weights have no tokenizer."""
        if self.class_names is None:
            return None
        try:
            return self._embed_classes()
        except TokenizerMissingError:
            if self.pretrained:
                raise
            logger.warning("%s has random weights and no tokenizer: the head starts random", self.model_name)
            return None
