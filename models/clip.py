"""FederatedCLIPModel: a CLIP, a head, and the four verbs of a federated model.

The server and every simulated client hold the same object. A client calls `set_parameters` with what the
downlink carried, `train_step` for its local steps, and `get_parameters` for the uplink; the server calls
`set_parameters` and `evaluate`. What travels is named once (`set_exchanged`): by the fine-tuning strategy at
construction, or by LoRA injection.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.clip_loading import Tokens, load_clip
from models.errors import UserError
from models.exchange import Exchanged, find_parameters
from models.features import check_given, image_features, text_features
from models.finetuning import STRATEGIES, check_choice, check_strategy, trains
from models.frozen import dropout_modules, moving_parts
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
from models.state import State
from models.tasks import TASKS
from models.temperature import MAX_LOG_TEMPERATURE
from models.training import Batch, LocalTrainer, TrainingSettings, num_examples

logger = logging.getLogger(__name__)


class FederatedCLIPModel(nn.Module):
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
        exchanged_names: Names of what travels, sorted.
        moving: What changes over a run, and what is frozen.
        num_blocks: Tower -> number of its transformer blocks; 0 where they cannot be told apart.
        keeps_class_embeddings: Compute the class prompts once while the text tower is frozen.
        trims_prompts: Tokens end with the longest text; False: with the tower's context length. Padding
            after the end-of-text token cannot change the output of a causal tower, only its cost.
        task: The task's loss and metrics.
    """

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

        Raises:
            UserError: An argument is unknown or contradicts another.
        """
        super().__init__()
        check_choice("task", task, TASKS)
        check_choice("strategy", strategy, STRATEGIES)
        check_classes(num_classes, class_names, templates)
        loaded = load_clip(model_name, pretrained=pretrained, device=device, dtype=dtype, seed=seed)
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
        self.keeps_class_embeddings, self.trims_prompts = True, True
        self._class_tokens: Tokens | None = None
        self._class_cache: Tensor | None = None
        self._trainer: LocalTrainer | None = None
        self.head: nn.Module | None = self._build_head() if self.task.uses_head else None
        self.num_blocks = count_blocks(self.clip, self.towers)
        self._base_modules = list(self.modules())
        self._apply_strategy()
        self.eval()

    # What trains and what travels

    def _apply_strategy(self) -> None:
        check_strategy(self.strategy, self.task, self.dtype, train_head=self.train_head)
        choice = STRATEGIES[self.strategy]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trains(choice, name, self.towers, train_head=self.train_head))
        self.set_exchanged(name for name, parameter in self.named_parameters() if parameter.requires_grad)

    def set_exchanged(self, names: Iterable[str]) -> None:
        """Name what travels from now on; `get_state` and `set_state` follow.

        Call it after any change of the set of parameters (LoRA injection, merging). Caches and
        the optimizer are dropped.

        Args:
            names: Wire names: parameter names relative to this module, less PEFT's ".default".

        Raises:
            UserError: A name fits no parameter.
        """
        self._exchanged = Exchanged(find_parameters(self, names))
        self.exchanged_names = tuple(self._exchanged.parameters)
        self.refresh()

    def refresh(self) -> None:
        """Drop caches and the optimizer, and look again at which modules and parameters there are.

        For code that changes modules or requires_grad; `set_exchanged` calls it. Clients only switch what
        travels on and off, which `start_training` sees by itself.
        """
        self._class_cache = None
        self._trainer = None
        self._lean_modules = lean_modules(self.clip, self.towers)
        self._named = tuple(self.named_parameters())
        travelling = {id(parameter) for parameter in self._exchanged.parameters.values()}
        self._trainable = [p for _, p in self._named if p.requires_grad or id(p) in travelling]
        self._switched = dropout_modules(self, self._base_modules)
        self._inspect()

    def _inspect(self) -> None:
        """See which towers, and which of their blocks, are constant."""
        names = {name for name, parameter in self._named if parameter.requires_grad}
        self.moving = moving_parts(names.union(self.exchanged_names), self.towers, self.num_blocks)
        if not self.moving.text_is_frozen:
            self._class_cache = None

    @property
    def vision_is_frozen(self) -> bool:
        """Whether nothing of the vision tower or its projection trains or travels."""
        return self.moving.vision_is_frozen

    @property
    def text_is_frozen(self) -> bool:
        """Whether nothing of the text tower or its projection trains or travels."""
        return self.moving.text_is_frozen

    @property
    def exchanged_parameters(self) -> dict[str, nn.Parameter]:
        """The live parameters of what travels, by wire name."""
        return dict(self._exchanged.parameters)

    # State

    def get_state(self) -> State:
        """Copy what travels: wire name -> detached float32 CPU tensor, a read-only mapping."""
        return self._exchanged.read()

    def set_state(self, state: State, *, partial: bool = False) -> None:
        """Overwrite what travels, in place; a temperature above CLIP's bound becomes the bound.

        Args:
            state: Wire name -> tensor of any float dtype and device.
            partial: Accept a subset of the names.

        Raises:
            UserError: A name is unknown or missing, or a shape differs; nothing is written then.
        """
        self._exchanged.write(state, partial=partial)

    def get_parameters(self) -> list[np.ndarray]:
        """Copy what travels, in the order of `exchanged_names`, as float32 arrays."""
        return [value.numpy() for value in self.get_state().values()]

    def set_parameters(self, parameters: Sequence[np.ndarray]) -> None:
        """Overwrite what travels from arrays in the order of `exchanged_names`.

        Raises:
            UserError: The number of arrays or a shape is wrong.
        """
        if len(parameters) != len(self.exchanged_names):
            raise UserError(
                f"{len(parameters)} arrays given, the model exchanges {len(self.exchanged_names)}"
            )
        arrays = (torch.as_tensor(np.asarray(array)) for array in parameters)
        self.set_state(dict(zip(self.exchanged_names, arrays, strict=True)))

    # Training and evaluation

    def start_training(
        self,
        settings: TrainingSettings,
        num_steps: int,
        *,
        extra_loss: Callable[[], Tensor] | None = None,
    ) -> None:
        """Begin one client's local training: zero moments, first step of the schedule.

        What travels, and what trained at the last `refresh`, is looked at again: call `refresh` after setting
        requires_grad on anything else.

        Args:
            settings: How to train.
            num_steps: Local steps that will follow.
            extra_loss: A scalar that is added to the loss of every step until the next start (a proximal
                term, say); it does not enter the loss that `train_step` returns.

        Raises:
            UserError: Nothing is trainable, or the settings do not suit the device.
        """
        trainable = [parameter for parameter in self._trainable if parameter.requires_grad]
        if self._trainer is None or not self._trainer.fits(trainable, settings):
            self._trainer = LocalTrainer(trainable, settings)
            self._inspect()
        self._trainer.reset(settings, num_steps, extra_loss=extra_loss)

    def train_step(self, data: Tensor | Batch, labels: Tensor | None = None) -> float:
        """Take one optimizer step.

        Without `start_training` before it, the default settings at a constant rate are used.

        Args:
            data: Pixel values (B, 3, H, W), or a batch with "pixel_values" or "image_features" and
                what the task needs of "labels", "input_ids", "attention_mask", "concept".
            labels: Class indices (B,), where `data` does not carry them.

        Returns:
            The batch's mean loss before the step.
        """
        if self._trainer is None:
            self.start_training(TrainingSettings(), num_steps=1)
        assert self._trainer is not None
        batch = self._batch(data, labels)
        self._check_trainable_on(batch)
        self._set_training_mode(training=True)
        try:
            with self.lean():
                loss = self._trainer.step(partial(self.task.loss, self), batch)
        finally:
            self._set_training_mode(training=False)
        self.clamp_temperature()
        return loss

    @torch.no_grad()
    def evaluate(
        self, data: Tensor | Batch | Iterable[Batch], labels: Tensor | None = None
    ) -> dict[str, float]:
        """Loss and metrics of the task.

        Args:
            data: Pixel values, one batch, or an iterable of batches (see `train_step`).
            labels: Class indices (B,), where `data` does not carry them.

        Returns:
            "loss", "num_examples" and the task's metrics ("accuracy", or recalls).
        """
        if self.training:
            self.eval()
        batches = cast(Iterable[Batch], [data] if isinstance(data, Tensor | Mapping) else data)
        return self.task.evaluate(self, (self._batch(batch, labels) for batch in batches))

    @torch.no_grad()
    def zero_shot_accuracy(self, batches: Iterable[Batch]) -> float:
        """Share of images whose nearest class-prompt embedding is their class's."""
        metrics = TASKS["zero_shot"].evaluate(self, (self._batch(batch, None) for batch in batches))
        return metrics["accuracy"]

    def lean(self) -> AbstractContextManager[None]:
        """Inside, nothing is computed that features and gradients do not need (``models.lean_blocks``)."""
        return lean(self._lean_modules)

    def _batch(self, data: Tensor | Batch, labels: Tensor | None) -> Batch:
        batch = {"pixel_values": data} if isinstance(data, Tensor) else dict(data)
        if labels is not None:
            batch["labels"] = labels
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    def _check_trainable_on(self, batch: Batch) -> None:
        assert self._trainer is not None
        check_given(self, batch)
        size = self._trainer.settings.micro_batch_size
        if size is not None and size < num_examples(batch) and not self.task.splits_into_micro_batches:
            raise UserError(
                f"micro_batch_size={size}: task={self.task.name} compares all pairs of a batch and cannot be "
                "split; set micro_batch_size to null or the batch size to at most that"
            )

    def _set_training_mode(self, *, training: bool) -> None:
        if self.training:
            self.eval()
        for module in self._switched:
            module.training = training

    # Features and logits

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

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Project images: (B, 3, H, W) -> (B, D) float32, not normalised."""
        pixel_values = pixel_values.to(self.device, self.dtype)
        with self._lean_without_gradients():
            return self._encode_image(self.clip, pixel_values).float()

    def encode_text(self, texts: Sequence[str] | Tokens) -> Tensor:
        """Project texts or tokens: N of them -> (N, D) float32, not normalised."""
        tokens = texts if isinstance(texts, dict) else self.tokenize(texts)
        tokens = {key: value.to(self.device) for key, value in tokens.items()}
        if not self.trims_prompts:
            tokens = pad_tokens(tokens, self.clip)
        with self._lean_without_gradients():
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
