"""Model families: how a federated model is built, adapted and fed, by name; ``model.type`` chooses one.

What only one family offers (caches of frozen towers,
batches that clients share) is the doing of its reader and of its tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from federated.config.choices import Choice
from federated.config.schema import ADAPTED
from federated.data.image_reader import clip_reader
from federated.data.question_reader import QuestionReader
from federated.data.row_reader import ReadingSettings, RowReader, task_reader
from federated.data.sources.form import FederatedData
from federated.rounds.learnable import CLIP_CHECKS
from lora.clip_wrapper import CLIPLoRAWrapper
from lora.config import LoRAConfig
from lora.vqa_wrapper import VQALoRAWrapper
from lora.wrapper import LoRAWrapper
from models.clip import FederatedCLIPModel
from models.errors import UserError
from models.federated_model import FederatedModel
from models.images import with_background
from models.registration import add, check_call
from models.tasks import Task
from models.vqa import Decoder, FederatedVQAModel, Head
from models.vqa_metrics import Language

if TYPE_CHECKING:
    from federated.rounds.run import Run

KIND = "model family"
FAMILY = Choice(KIND, "model.type", "model.options")


@dataclass(frozen=True)
class ModelSetup:
    """What a configuration and its data say of a model; a family makes use of what it can.

    Attributes:
        task: What the model learns.
        num_classes: Classes of the data; 2 where it has none.
        class_names: Their names; None where there are none, or nobody needs them.
        model_name: Of the pre-trained weights.
        pretrained: Whether weights are loaded, or drawn from ``seed``.
        cache_dir: Where downloads are kept; None: the hub's own place.
        fine_tuning: What trains and travels: "lora" where adapters are put in next, "full" or a name of the
            family's own.
        train_head: Whether the head trains beside adapters.
        templates: Prompts around class names.
        background: The colour that transparent places of images show.
        device: Where the model goes; "meta" where shapes are enough.
        dtype: Of the frozen weights.
        seed: Of whatever starts random.
        keeps_class_embeddings: Whether CLIP embeds the class prompts once while its text tower is frozen.
        trims_prompts: Whether CLIP reads tokens up to the longest text of a batch alone.
    """

    task: Task
    num_classes: int
    class_names: tuple[str, ...] | None
    model_name: str
    pretrained: bool
    cache_dir: str | None
    fine_tuning: str
    train_head: bool
    templates: tuple[str, ...]
    background: str
    device: torch.device
    dtype: torch.dtype
    seed: int
    keeps_class_embeddings: bool = True
    trims_prompts: bool = True


def adapt(model: FederatedModel, config: LoRAConfig, seed: int) -> LoRAWrapper:
    """Put adapters into the towers that a model names."""
    return LoRAWrapper(model, config, seed=seed).apply_lora_to_federated_model()


@dataclass(frozen=True)
class ModelFamily:
    """Models of one kind, and what it takes to train and evaluate them.

    Attributes:
        name: ``model.type`` without adapters; with ``_lora`` behind it, with adapters.
        build: (setup, \\*, options) -> federated model on ``setup.device``, in which all trains and travels
            that ``setup.fine_tuning`` names. Options are ``model.options``, of the types of the annotations.
        adapt: (model, settings, seed) -> the model with adapters.
        read: (model, data, settings) -> what makes batches of rows; by default the task does.
        checks: Refuse, before training, a run that could not learn anything.
    """

    name: str
    build: Callable[..., FederatedModel]
    adapt: Callable[[Any, LoRAConfig, int], LoRAWrapper] = adapt
    read: Callable[[Any, FederatedData, ReadingSettings], RowReader] = task_reader
    checks: tuple[Callable[[Run], None], ...] = ()


def build_clip(setup: ModelSetup) -> FederatedCLIPModel:
    """A CLIP, with a head where the task has one."""
    model = FederatedCLIPModel(
        setup.model_name,
        setup.num_classes,
        class_names=setup.class_names,
        templates=setup.templates,
        task=setup.task.name,
        strategy=setup.fine_tuning,
        train_head=setup.train_head,
        pretrained=setup.pretrained,
        cache_dir=setup.cache_dir,
        device=setup.device,
        dtype=setup.dtype,
        seed=setup.seed,
    )
    model.preprocess = with_background(model.preprocess, setup.background)
    model.keeps_class_embeddings = setup.keeps_class_embeddings
    model.trims_prompts = setup.trims_prompts
    return model


def adapt_clip(model: FederatedCLIPModel, config: LoRAConfig, seed: int) -> CLIPLoRAWrapper:
    """Put adapters into a CLIP's towers and head."""
    return CLIPLoRAWrapper(model, config, seed=seed).apply_lora_to_federated_model()


def build_vqa(  # noqa: PLR0913 - the family's options, keyword-only
    setup: ModelSetup,
    *,
    text_model: str = "tiny",
    head: Head = "generation",
    answers: tuple[str, ...] = (),
    decoder: Decoder = "full",
    unfreeze_encoder_layers: int = 0,
    dropout: float = 0.0,
    num_beams: int = 1,
    most_question_tokens: int = 32,
    most_answer_tokens: int = 24,
    language: Language = "en",
) -> FederatedVQAModel:
    """A CLIP's vision tower and an MBart that answer questions about images.

    Args:
        setup: ``model_name`` is that of the CLIP.
        text_model: ``tiny`` (bundled), a hub name such as vinai/bartpho-syllable, or a local folder.
        head: ``generation`` writes the answer; ``classification`` chooses one of ``answers``.
        answers: The closed set of answers.
        decoder: ``full`` trains it, ``frozen`` does not, ``lora`` puts adapters into it as well.
        unfreeze_encoder_layers: So many last layers of the text encoder train; 0 with adapters there.
        dropout: Of the projected patches, in training.
        num_beams: Of beam search; 1 takes the most probable token each time.
        most_question_tokens: Longest question; a longer one is cut.
        most_answer_tokens: Longest answer, likewise.
        language: How answers are normalised before they are compared.
    """
    return FederatedVQAModel(
        setup.model_name,
        text_model=text_model,
        head=head,
        answers=answers,
        decoder=decoder,
        unfreeze_encoder_layers=unfreeze_encoder_layers,
        dropout=dropout,
        num_beams=num_beams,
        most_question_tokens=most_question_tokens,
        most_answer_tokens=most_answer_tokens,
        language=language,
        strategy=setup.fine_tuning,
        train_head=setup.train_head,
        class_names=setup.class_names,
        task=setup.task,
        pretrained=setup.pretrained,
        device=setup.device,
        dtype=setup.dtype,
        seed=setup.seed,
        cache_dir=setup.cache_dir,
    )


def adapt_vqa(model: FederatedVQAModel, config: LoRAConfig, seed: int) -> VQALoRAWrapper:
    """Put adapters into the towers of a model for questions."""
    return VQALoRAWrapper(model, config, seed=seed).apply_lora_to_federated_model()


FAMILIES: dict[str, ModelFamily] = {
    family.name: family
    for family in (
        ModelFamily("clip", build_clip, adapt_clip, clip_reader, CLIP_CHECKS),
        ModelFamily("vqa", build_vqa, adapt_vqa, QuestionReader),
    )
}
"""Name -> model family."""


def register_model_family(family: ModelFamily) -> ModelFamily:
    """Add a model family under its own name; its tasks are added by ``register_task``.

    Raises:
        UserError: It is no model family, the name is taken, or its ``build`` cannot be called.
    """
    if not isinstance(family, ModelFamily):
        raise UserError(f"register_model_family takes a ModelFamily, not a {type(family).__name__}")
    if family.name.endswith(ADAPTED):
        raise UserError(f"model family {family.name!r}: leave {ADAPTED} out, model.type adds it for adapters")
    check_call(KIND, family.name, family.build, ["setup"])
    add(KIND, family.name, family, FAMILIES)
    return family
