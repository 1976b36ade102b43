"""FederatedVQAModel: a CLIP's vision tower and an MBart answer questions about images.

The encoder reads the projected patches of the image, followed by the embedded question. The decoder writes
the answer, or a linear layer chooses it from a closed set. What trains beside adapters is `head`: projector,
decoder or classifier, and unfrozen encoder layers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput

from models.clip_loading import load_clip
from models.construction import seeded_construction
from models.errors import UserError
from models.federated_model import FederatedModel
from models.finetuning import check_choice
from models.mbart_loading import TextTokenizer, load_mbart
from models.tasks import TASKS, Task
from models.towers import Towers
from models.training import Batch
from models.vqa_metrics import Language

logger = logging.getLogger(__name__)

VISION = ("vision.embeddings", "vision.pre_layrnorm", "vision.encoder")  # what follows sees no patches
ENCODER, DECODER = "text.model.encoder", "text.model.decoder"
FINE_TUNINGS = ("full", "head_only", "lora")
"""All weights; `head` alone, the pre-trained parts frozen; `head`, and adapters that are put in next."""

Decoder = Literal["full", "frozen", "lora"]
Head = Literal["generation", "classification"]
DECODERS: tuple[Decoder, ...] = get_args(Decoder)
HEADS: tuple[Head, ...] = get_args(Head)


class FederatedVQAModel(FederatedModel):
    """Answers questions about images.

    Attributes:
        head: What trains beside adapters and travels with them: `projector`, and as asked for `decoder`
            (with the word embeddings, which decoder, encoder and output share), `layers` (the last ones of
            the encoder) and `classifier`.
        vision: The vision tower of a CLIP.
        text: The MBart.
        preprocess: PIL image -> (3, H, W).
        tokenizer: Texts to numbers and back.
        answers: The closed set of answers; empty where answers are written.
        deduplicates: Encode a picture that is several times in a batch once.
        recipe: Arguments of the documented recipe that `lora.vqa_wrapper.VQALoRAWrapper` reads.
    """

    input_name = "pixel_values"
    head: Any
    vision: Any
    text: Any
    vision_is_frozen: bool
    vision_config: Any

    def __init__(  # noqa: PLR0913 - the public signature, keyword-only
        self,
        model_name: str = "tiny",
        *,
        text_model: str = "tiny",
        use_text_lora: bool = True,
        text_lora_r: int = 16,
        text_lora_alpha: float = 32,
        text_lora_dropout: float = 0.1,
        use_vision_lora: bool = False,
        vision_lora_r: int = 8,
        vision_lora_alpha: float = 16,
        unfreeze_encoder_layers: int = 0,
        decoder: Decoder = "full",
        head: Head = "generation",
        answers: Sequence[str] = (),
        dropout: float = 0.0,
        num_beams: int = 1,
        most_question_tokens: int = 32,
        most_answer_tokens: int = 24,
        language: Language = "en",
        strategy: str = "lora",
        train_head: bool = True,
        class_names: Sequence[str] | None = None,
        task: Task | None = None,
        pretrained: bool = True,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        """Load both parts, draw the projector, and freeze what does not train.

        Args:
            model_name: The CLIP whose vision tower is taken, as `models.clip_loading.load_clip` reads it.
            text_model: The MBart, as `models.mbart_loading.load_mbart` reads it.
            use_text_lora: Adapters in q, k and v of the encoder; read by `VQALoRAWrapper`, as the next six.
            text_lora_r: Their rank.
            text_lora_alpha: Their update is scaled by alpha / r.
            text_lora_dropout: Dropout of their inputs.
            use_vision_lora: Adapters in q, k and v of the vision tower.
            vision_lora_r: Their rank.
            vision_lora_alpha: Their scaling, likewise.
            unfreeze_encoder_layers: So many last layers of the encoder train; 0 with text adapters.
            decoder: "full", "frozen", or "lora": adapters go into it as well.
            head: "generation" writes the answer; "classification" chooses one of `answers`.
            answers: The closed set, for classification.
            dropout: Of the projected patches, in training.
            num_beams: Of beam search; 1 takes the most probable token each time.
            most_question_tokens: Longest question; a longer one is cut.
            most_answer_tokens: Longest answer, likewise.
            language: How answers are normalised before they are compared: "en" or "vi".
            strategy: One of `FINE_TUNINGS`.
            train_head: Whether `head` trains and travels.
            class_names: Types of question, for metrics of each.
            task: By default "vqa".
            pretrained: Load weights, or draw them from `seed`.
            device: Where the model runs.
            dtype: Of the weights; `head` stays float32.
            seed: Of whatever starts random.
            cache_dir: Where downloads are kept.

        Raises:
            UserError: An argument is unknown or contradicts another, or a model cannot be had.
        """
        super().__init__()
        check_choice("strategy", strategy, FINE_TUNINGS)
        self.recipe = {
            "use_text_lora": use_text_lora and unfreeze_encoder_layers == 0,
            "text_lora_r": text_lora_r,
            "text_lora_alpha": text_lora_alpha,
            "text_lora_dropout": text_lora_dropout,
            "use_vision_lora": use_vision_lora,
            "vision_lora_r": vision_lora_r,
            "vision_lora_alpha": vision_lora_alpha,
        }
        loading: dict[str, Any] = {"pretrained": pretrained, "device": device, "dtype": dtype, "seed": seed}
        clip = load_clip(model_name, cache_dir=cache_dir, **loading)
        if clip.towers.backend != "huggingface":
            raise UserError(f"model_name={model_name}: questions need a CLIP of Hugging Face's, such as tiny")
        text = load_mbart(text_model, cache_dir=cache_dir, **loading)
        tower: Any = clip.clip
        self.vision_config = tower.config.vision_config
        self.task = TASKS["vqa"] if task is None else task
        self.head_kind, self.decoder_kind, self.strategy = head, decoder, strategy
        self.train_head, self.unfreeze_encoder_layers = train_head, unfreeze_encoder_layers
        self.answers = tuple(answers)
        self.class_names = None if class_names is None else tuple(class_names)
        self.model_name, self.text_model, self.pretrained, self.seed = (
            model_name, text_model, pretrained, seed,
        )  # fmt: skip
        self.num_beams, self.most_question_tokens, self.most_answer_tokens = (
            num_beams, most_question_tokens, most_answer_tokens,
        )  # fmt: skip
        self._check(text.config)
        built = seeded_construction(lambda: self._build_head(text, dropout), seed=seed, device=device)
        self.head = built.to(device=device, dtype=torch.float32)  # before `text`: shared parts are its own
        self.vision, self.text = tower.vision_model, text
        self.preprocess, self.image_size = clip.preprocess, clip.image_size
        self.tokenizer = TextTokenizer(text_model, cache_dir)
        self.deduplicates, self.language = True, language
        self.towers = self._towers()
        self._apply_strategy()

    def _check(self, text: Any) -> None:
        check_choice("head", self.head_kind, HEADS)
        check_choice("decoder", self.decoder_kind, DECODERS)
        closed = self.head_kind == "classification"
        if closed and len(set(self.answers)) < 2:
            raise UserError(
                "head=classification chooses from a closed set: list two answers or more in "
                "model.options.answers, or take head=generation"
            )
        if not closed and self.answers:
            raise UserError("answers goes with head=classification; leave model.options.answers out")
        if closed and self.decoder_kind == "lora":
            raise UserError("decoder=lora goes with head=generation: a classifier has no decoder")
        if not 0 <= self.unfreeze_encoder_layers <= text.encoder_layers:
            raise UserError(
                f"unfreeze_encoder_layers={self.unfreeze_encoder_layers}: the encoder of {self.text_model} "
                f"has {text.encoder_layers} layers"
            )
        vision = self.vision_config
        length = (vision.image_size // vision.patch_size) ** 2 + self.most_question_tokens
        if length > text.max_position_embeddings:
            raise UserError(
                f"{length} patches and words, and {self.text_model} reads {text.max_position_embeddings}: "
                "lower model.options.most_question_tokens, or take a CLIP with fewer patches"
            )

    def _build_head(self, text: Any, dropout: float) -> nn.ModuleDict:
        width, wide = self.vision_config.hidden_size, text.config.d_model
        projector = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, wide), nn.Dropout(dropout))
        parts: dict[str, nn.Module] = {"projector": projector}
        if self.head_kind == "classification":
            classifier = nn.Linear(2 * wide, len(self.answers))
            parts["classifier"] = nn.Sequential(nn.LayerNorm(2 * wide), classifier)
        elif self.decoder_kind == "full":
            parts["decoder"] = text.model.decoder
        if self.unfreeze_encoder_layers:
            parts["layers"] = nn.ModuleList(text.model.encoder.layers[-self.unfreeze_encoder_layers :])
        return nn.ModuleDict(parts)

    def _towers(self) -> Towers:
        text = () if self.unfreeze_encoder_layers else (ENCODER,)
        if self.decoder_kind == "lora":
            text = (*text, DECODER)
        return Towers("huggingface", VISION, text, default_targets=("q_proj", "k_proj", "v_proj"))

    def _apply_strategy(self) -> None:
        if self.strategy == "full":
            self.requires_grad_(True)
            if self.head_kind == "classification":  # which reads no decoder, but the words
                self.text.model.decoder.requires_grad_(False)
                self.text.model.shared.requires_grad_(True)
        else:
            self.freeze_pretrained()
        self.ready(name for name, parameter in self.named_parameters() if parameter.requires_grad)
        own = {id(module) for module in self.head.projector.modules()}
        self._base_modules = [module for module in self._base_modules if id(module) not in own]
        self.refresh()

    # What trains

    def freeze_pretrained(self) -> None:
        """Freeze vision tower, encoder and decoder but for what `head` holds of them."""
        self.requires_grad_(False)
        if self.train_head:
            self.head.requires_grad_(True)

    def parameters_changed(self) -> None:
        """See whether the vision tower is constant."""
        moving = {name for name, parameter in self._named if parameter.requires_grad}
        self.vision_is_frozen = not any(
            name.startswith("vision.") for name in moving.union(self.exchanged_names)
        )

    def check_batch(self, batch: Batch) -> None:
        """Refuse a batch without images or answers."""
        if "labels" not in batch or not {"pixel_values", "patches"} & batch.keys():
            raise UserError(f"a batch needs pixel_values, input_ids and labels, and has {sorted(batch)}")

    def parameter_counts(self) -> dict[str, int]:
        """Trainable parameters by component: vision, encoder, decoder, head; and "total", all there are.

        Word embeddings, which encoder and decoder share, count as the decoder's.
        """
        counts = dict.fromkeys(("vision", "encoder", "decoder", "head"), 0)
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                counts[_component(name)] += parameter.numel()
        return {**counts, "total": sum(parameter.numel() for parameter in self.parameters())}

    # Forward

    def patch_states(self, pixel_values: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> states of their patches, (B, P, W), without the class token."""
        return self.vision(pixel_values=pixel_values).last_hidden_state[:, 1:]

    def _patches(self, batch: Batch) -> Tensor:
        if "patches" in batch:
            return batch["patches"]
        pixels, pictures = batch["pixel_values"], batch.get("picture")
        if not self.deduplicates or pictures is None:
            return self.patch_states(pixels)
        unique, places = torch.unique(pictures, return_inverse=True)
        if len(unique) == len(pictures):
            return self.patch_states(pixels)
        first = torch.empty_like(unique).scatter_(
            0, places.flip(0), torch.arange(len(pictures), device=pictures.device).flip(0)
        )
        return self.patch_states(pixels[first])[places]

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Read images and questions.

        Args:
            batch: "pixel_values" (B, 3, H, W) or "patches" (B, P, W), and "input_ids" and "attention_mask"
                (B, Q).

        Returns:
            The encoder's states (B, P + Q, D), and which of them are there, (B, P + Q).
        """
        patches = self.head.projector(self._patches(batch).float())  # (B, P, D)
        words = self.text.model.encoder.embed_tokens(batch["input_ids"])  # (B, Q, D)
        there = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
        mask = torch.cat([there, batch["attention_mask"]], dim=1)
        embeds = torch.cat([patches.to(words.dtype), words], dim=1)
        return self.text.model.encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state, mask

    def answer_logits(self, batch: Batch, states: Tensor, mask: Tensor) -> Tensor:
        """Logits of the answers, (B, C), or of each of their tokens given those before it, (B, A, V)."""
        if self.head_kind == "classification":
            words = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
            seen, asked = states[:, : -words.shape[1]], states[:, -words.shape[1] :]
            means = torch.cat([seen.mean(1), (asked * words).sum(1) / words.sum(1)], dim=1)  # (B, 2 D)
            return self.head.classifier(means.float())
        labels = batch["labels"]
        return self.text(
            encoder_outputs=BaseModelOutput(last_hidden_state=states), attention_mask=mask, labels=labels
        ).logits

    def forward(self, data: Batch) -> Tensor:
        """Logits of a batch, as `answer_logits`."""
        batch = self._batch(data, None)
        return self.answer_logits(batch, *self.encode(batch))

    def answer_loss(self, batch: Batch, logits: Tensor) -> Tensor:
        """Mean cross-entropy over the answers, or over their tokens; NaN where none counts."""
        labels = batch["labels"].flatten()
        return F.cross_entropy(logits.flatten(0, -2).float(), labels, ignore_index=-100)

    @torch.no_grad()
    def write_answers(self, states: Tensor, mask: Tensor, batch: Batch) -> list[str]:
        """Return the answers as texts, (B,)."""
        if self.head_kind == "classification":
            best = self.answer_logits(batch, states, mask).argmax(dim=-1).tolist()
            return [self.answers[number] for number in best]
        ids = self.text.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask,
            num_beams=self.num_beams,
            max_new_tokens=self.most_answer_tokens,
            do_sample=False,
        )
        return self.tokenizer.texts(ids)

    def __repr__(self) -> str:
        """One line: what it is, what trains."""
        counts = self.parameter_counts()
        trained = sum(number for name, number in counts.items() if name != "total")
        return (
            f"{type(self).__name__}({self.model_name} and {self.text_model}, {self.head_kind}: "
            f"{trained:,} of {counts['total']:,} parameters train, "
            f"{len(self.exchanged_names)} tensors travel)"
        )


def _component(name: str) -> str:
    for component, prefixes in (
        ("vision", ("vision.",)),
        ("encoder", (f"{ENCODER}.", "head.layers.")),
        ("decoder", (f"{DECODER}.", "head.decoder.", "text.")),
    ):
        if name.startswith(prefixes):
            return component
    return "head"


def check_recipe(unfreeze_encoder_layers: int, towers: Iterable[str]) -> None:
    """Refuse text adapters beside unfrozen encoder layers.

    Raises:
        UserError: Both are asked for.
    """
    if unfreeze_encoder_layers and "text" in towers:
        raise UserError(
            f"unfreeze_encoder_layers={unfreeze_encoder_layers} and adapters in the text encoder are both "
            "asked for: set unfreeze_encoder_layers=0, or leave text out (lora.target_components=[vision], "
            "use_text_lora=False)"
        )
