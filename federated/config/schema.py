"""The configuration of a run: one pydantic tree, defaults in code, YAML holds the differences.

``federated.config.config_files`` reads it from a file. Past this package configuration objects go no deeper
than ``federated.rounds.build`` and ``federated.rounds.run``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from federated.config.augmentation_options import augmentation_from
from federated.config.choices import no_such
from federated.config.faults_and_clock import ClockSection, FaultsSection
from federated.config.section import Section
from lora.config import MAX_RANK, LoRAConfig
from models.registration import added
from models.untrusted import PathText

TASK_NAMES = ("classification", "zero_shot", "retrieval", "vqa")
"""What ``models.tasks`` holds, which imports torch; plugins add others."""

MODEL_FAMILIES = ("clip", "vqa")
"""What ``federated.rounds.families`` holds, likewise."""

ADAPTED = "_lora"
"""Ends ``model.type`` where adapters train."""

MAY_CHANGE = "may_change"
"""Mark of keys that may differ when a run goes on: they change no round, or no round that is done."""
ON_RESUME: dict[str, Any] = {MAY_CHANGE: "resume"}
ON_FORK: dict[str, Any] = {MAY_CHANGE: "fork"}
"""Marks: of keys that say how rounds are computed, or how many; of keys that rounds to come may have of their
own, in a branch that says so."""


class ModelSection(Section):
    """Which model, and what of it is fine-tuned."""

    type: str = "clip_lora"
    """``clip_lora``: adapters train and travel; ``clip``: the weights that ``fine_tuning`` names do. Likewise
    ``vqa_lora`` and ``vqa``, for questions about images, and any other model family."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the model family's own, such as ``decoder`` of ``vqa``; CLIP has none."""
    model_name: PathText = "tiny"
    """``tiny`` (bundled), a hub name, a local folder in the hub's format, or ``open_clip:<architecture>``."""
    adapter: PathText | None = Field(None, json_schema_extra=ON_RESUME)
    """Start from this adapter, a run's folder or one of PEFT's, that fits ``lora``; fresh ones otherwise."""
    num_classes: int | None = Field(None, ge=2)
    """Checked against the data when given; taken from the data otherwise."""
    fine_tuning: str | None = None
    """What trains and travels when ``type`` names no adapters: full (the default), head_only, or for CLIP
    another key of ``models.finetuning.STRATEGIES``."""
    pretrained: bool = True
    """False: the same architecture with random weights, a control for what pre-training is worth."""
    device: str = Field("cpu", json_schema_extra=ON_RESUME)
    """Device of the model, as torch spells it: ``cpu``, ``cuda``, ``cuda:1``."""
    cache_dir: PathText | None = Field(None, json_schema_extra=ON_RESUME)
    """Folder in which downloaded models are kept and looked for; the hub's own when not given."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the frozen weights; adapters and head are float32 always."""

    @field_validator("type")
    @classmethod
    def _type_is_known(cls, value: str) -> str:
        families = (*MODEL_FAMILIES, *(name for _, name in added("model family")))
        known = [name + ending for name in families for ending in ("", ADAPTED)]
        if value not in known:
            raise ValueError(no_such("model type", value, known))
        return value

    @property
    def family(self) -> str:
        """Name of the model family."""
        return self.type.removesuffix(ADAPTED)


class TaskSection(Section):
    """What is learnt and how it is scored."""

    name: str = "classification"
    """A task of ``models.tasks.TASKS``: for CLIP classification (by a linear head), zero_shot (by class
    prompts) or retrieval (match images and captions); vqa, questions about images, for the family vqa."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Prompts around a class name; their text embeddings are averaged."""
    train_head: bool = True
    """Whether the classification head trains and travels beside the adapters."""

    @field_validator("name")
    @classmethod
    def _task_is_known(cls, value: str) -> str:
        known = (*TASK_NAMES, *(name for _, name in added("task")))
        if value not in known:
            raise ValueError(no_such("task", value, known))
        return value


class DataSection(Section):
    """Which rows, and how they reach the model."""

    source: str = "fashion_mnist"
    """A registered source: fashion_mnist, emoji, digits, easy_vqa, emoji_vqa (embedded), csv …"""
    path: PathText | None = Field(None, json_schema_extra=ON_RESUME)
    """Folder, file or hub name of the sources that need one."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the source, such as ``language`` or ``skip_corrupt``."""
    background: str = "white"
    """The colour that transparent places of images show, by name or as ``"#rrggbb"``."""
    max_train_samples: int | None = Field(None, ge=1)
    """Most training rows, a seeded choice stratified by class; all of them when not given."""
    max_validation_samples: int | None = Field(None, ge=1)
    """Most validation rows, chosen likewise; all of them when not given."""
    max_test_samples: int | None = Field(None, ge=1)
    """Most test rows, chosen likewise; all of them when not given."""
    validation_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of train set apart as the validation split where the source has none."""
    cache_bytes: int = Field(1_000_000_000, ge=0, json_schema_extra=ON_RESUME)
    """Budget for decoded images kept in memory; beyond it they are decoded on demand."""


class PartitionSection(Section):
    """How the training images are split into one shard a client."""

    name: str = "dirichlet"
    """A partitioner of ``federated.data.partitioners.PARTITIONERS``: iid, dirichlet, natural, shard …"""
    num_clients: int = Field(10, ge=1)
    """Number of clients, which is the number of shards."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The partitioner's own arguments, such as ``alpha`` and ``min_samples`` of dirichlet."""
    local_test_fraction: float = Field(0.1, ge=0, lt=1)
    """Part of each shard that its client keeps for its own evaluation and never trains on."""


class EarlyStoppingSection(Section):
    """When training ends before its last epoch or round: the validation split decides."""

    patience: int | None = Field(None, ge=1, json_schema_extra=ON_RESUME)
    """Evaluations without an improvement after which training stops; never before the end when not given."""
    metric: str | None = None
    """Metric of the validation split; the task's headline metric when not given. A loss is better lower."""
    minimum_change: float = Field(0.0, ge=0)
    """An improvement must be larger than this to count."""


class FederationSection(Section):
    """Rounds and cohorts."""

    rounds: int = Field(5, ge=1, json_schema_extra=ON_RESUME)
    """Rounds of training; round 0, before them, evaluates the pre-trained model."""
    cohort_size: int | None = Field(None, ge=1, json_schema_extra=ON_FORK)
    """Clients sampled a round; all of them when not given."""
    timeout_seconds: float = Field(3600.0, gt=0, json_schema_extra=ON_RESUME)
    """Seconds that the server waits for the replies of one broadcast; who has not replied then has failed. A
    worker is ended then; without workers a running client ends late."""
    keep_best: bool = True
    """Keep the best round's adapter in ``adapter_best/``; the server's test rows choose, so flatter it."""
    early_stopping: EarlyStoppingSection = Field(EarlyStoppingSection(), json_schema_extra=ON_RESUME)


class ClientSection(Section):
    """A client's local training."""

    local_steps: int = Field(20, ge=1, json_schema_extra=ON_FORK)
    """Optimizer steps that a client takes in a round."""
    batch_size: int = Field(32, ge=1, json_schema_extra=ON_FORK)
    """Most rows in one optimizer step; a smaller shard gives itself."""
    micro_batch_size: int | None = Field(None, ge=1, json_schema_extra=ON_FORK)
    """Images that pass through the model at once; the rest of a batch is accumulated."""
    optimizer: Literal["adamw", "sgd"] = Field("adamw", json_schema_extra=ON_FORK)
    """Optimizer of the local steps. Its moments start at zero in every round."""
    momentum: float = Field(0.9, ge=0, lt=1, json_schema_extra=ON_FORK)
    """Momentum of ``sgd``; 0: plain SGD."""
    learning_rate: float = Field(1e-3, gt=0, json_schema_extra=ON_FORK)
    """Peak learning rate of the local steps."""
    weight_decay: float = Field(0.0, ge=0, json_schema_extra=ON_FORK)
    """Weight decay of matrices (decoupled for ``adamw``, L2 for ``sgd``); biases and norms have none."""
    warmup_steps: int = Field(0, ge=0, json_schema_extra=ON_FORK)
    """Steps in which the learning rate rises linearly, counted anew in each round."""
    warmup_ratio: float = Field(0.0, ge=0, lt=1, json_schema_extra=ON_FORK)
    """The same as a share of the steps: of a round's local steps, or of all steps of ``fedlora train``."""
    schedule: Literal["constant", "cosine"] = Field("constant", json_schema_extra=ON_FORK)
    """Learning rate after the warm-up: constant, or a cosine down to 0 at the round's last local step."""
    clip_norm: float | None = Field(None, gt=0, json_schema_extra=ON_FORK)
    """Largest norm of the whole gradient in a step; not clipped when not given."""
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", json_schema_extra=ON_FORK)
    """Precision of the local steps: plain, bf16 autocast, or fp16 autocast with loss scaling (CUDA alone)."""
    proximal_mu: float = Field(0.0, ge=0, json_schema_extra=ON_FORK)
    """FedProx: (mu / 2) times the squared distance to the values received joins the loss; 0: none."""
    scaffold: bool = False
    """SCAFFOLD: correct gradients by control variates, which double the payload both ways."""
    augmentation: dict[str, Any] = Field(default_factory=dict, json_schema_extra=ON_FORK)
    """Options of ``federated.config.augmentation_options``, such as ``flip_probability``; empty: none."""
    gradient_checkpointing: bool = False
    """Compute each block of the towers again in the backward pass: less memory, one more forward pass."""
    ranks: list[Annotated[int, Field(le=MAX_RANK)]] | None = Field(None, min_length=1)
    """Adapter rank of each client, for aggregators that mix ranks; a shorter list is repeated (groups). The
    largest is ``lora.r``."""

    @field_validator("augmentation")
    @classmethod
    def _augmentation_is_known(cls, value: dict[str, Any]) -> dict[str, Any]:
        augmentation_from(value)
        return value


class AggregationSection(Section):
    """How the server combines the clients' updates."""

    name: str = "fedavg"
    """An aggregator of ``federated.methods.registry.AGGREGATORS``: fedavg, ffa, flora, fedex …"""
    options: dict[str, Any] = Field(default_factory=dict)
    """The aggregator's own arguments, such as ``rank_cap`` of fedex."""
    server_optimizer: dict[str, Any] | None = None
    """A ``name`` of ``federated.methods.server_optimizers`` (fedavgm, fedadam, fedyogi, fedadagrad) and its
    options; the averages as they are when not given."""
    max_update_ratio: float = Field(100.0, gt=1, json_schema_extra=ON_FORK)
    """Most that a client's values may be, in norms of the larger of cohort (median) and global state."""
    max_examples_ratio: float = Field(1e6, gt=1, json_schema_extra=ON_FORK)
    """Most training examples a client may claim, in multiples of its cohort's median."""


class CommunicationSection(Section):
    """How states are encoded, and the link that transfer times are stated for."""

    uplink: str = Field("fp32", json_schema_extra=ON_FORK)
    """Codec of the clients' updates, which are changes: fp32, int8, topk:0.1:ef+int8 …"""
    downlink: str = "fp32"
    """Codec of what the server sends, which are values: fp32, fp16, bf16, int8 or int4."""
    uplink_mbps: float = Field(10.0, gt=0, json_schema_extra=ON_RESUME)
    """A client's uplink in megabits a second, for transfer times alone; nothing is slowed down."""
    downlink_mbps: float = Field(50.0, gt=0, json_schema_extra=ON_RESUME)
    """A client's downlink in megabits a second, likewise."""
    base_preinstalled: bool = False
    """True when clients already hold the base model; the one-off base is stated separately either way."""


class TrainSection(Section):
    """``fedlora train``: one client that holds all the data, with the settings of ``client``."""

    epochs: int = Field(10, ge=1)
    """Passes over the training data."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps in all; takes the place of ``epochs`` when given."""
    save_every: int | None = Field(None, ge=1)
    """Epochs between adapters that are kept in ``checkpoint-epoch-N/``; none when not given."""
    evaluate_every: int = Field(1, ge=1)
    """Epochs between evaluations; the last epoch is always evaluated."""
    keep_best: bool = True
    """Keep the weights of the epoch that is best on the validation split; otherwise those of the last."""
    early_stopping: EarlyStoppingSection = EarlyStoppingSection()


class EvaluationSection(Section):
    """When the global model and the clients are evaluated."""

    every: int = Field(1, ge=1)
    """Rounds between evaluations on the server's test set; the last round is always evaluated."""
    clients_every: int = Field(0, ge=0)
    """Rounds between evaluations on the clients' own data; 0: after the last round alone."""
    clients: bool = True
    """Whether clients evaluate at all; their downlink is counted in the ledger."""
    max_clients: int = Field(100, ge=1)
    """At most this many clients evaluate at a time; a seeded sample where there are more."""
    batch_size: int = Field(250, ge=1)
    """Rows in one batch of an evaluation."""
    max_samples: int | None = Field(None, ge=1)
    """The server evaluates on this many of its test rows, drawn once by the seed; on all when not given."""
    aggregation_error_every: int = Field(1, ge=0)
    """Rounds between measurements of the aggregation error, which cost server time; 0: never."""


class CacheSection(Section):
    """Frozen work done once (``federated.data.feature_cache``); a switch acts where its cache is valid."""

    image_features: bool = True
    """Features of the images, where the vision tower is frozen."""
    text_features: bool = True
    """Features of the captions, where the text tower is frozen."""
    class_embeddings: bool = True
    """Embeddings of the class prompts, where the text tower is frozen."""
    activations: bool = True
    """What enters a tower's first adapted block, where ``lora.layers`` leaves out the blocks before it."""
    deduplicate_captions: bool = True
    """Encode a caption that occurs several times in a batch once."""
    trim_prompts: bool = True
    """Tokens up to the longest text of a batch; false: the tower's whole context."""
    max_bytes: int = Field(1_000_000_000, ge=0)
    """Most memory for features and activations; rows beyond it are computed when they are asked for."""
    folder: PathText | None = None
    """Folder of memory-mapped temporary files that take the place of memory: for features and activations,
    and for the text tower where the run does not read it."""


class EngineSection(Section):
    """What carries the messages and how much of the machine it may use."""

    name: Literal["inprocess"] = "inprocess"
    """The engine of ``fedlora run``; Flower's own are started with ``flwr run flower``."""
    threads: int = Field(1, ge=1)
    """Torch threads; one is best for the bundled model, two or more pay off on ViT-B/32."""
    batched_clients: Literal["auto", "off"] | Annotated[int, Field(ge=2)] = "off"
    """Clients whose local steps share a forward and a backward pass: a number, ``auto`` (measured at start)
    or ``off``. Results agree to rounding; it pays off where a client's batch is small."""

    @field_validator("batched_clients", mode="before")
    @classmethod
    def _yaml_reads_off_as_false(cls, value: Any) -> Any:
        return "off" if value is False else value

    workers: int = Field(1, ge=1)
    """Processes that share a round's clients (Linux); more than one needs ``threads: 1``."""


class OutputSection(Section):
    """Where the run folder goes."""

    root: PathText = "runs"
    """Folder that run folders are made in."""
    name: PathText | None = None
    """Folder name under ``root``; the configuration's own name when not given."""
    keep_checkpoints: int = Field(2, ge=1, json_schema_extra=ON_RESUME)
    """How many of the newest commits stay; ``fedlora fork --at ROUND`` needs the one of that round."""
    report: bool = Field(True, json_schema_extra=ON_RESUME)
    """Draw ``report.html`` and ``plots/`` at the end, in some seconds; ``fedlora report`` does it later."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where each round's numbers go beside ``metrics.jsonl``: TensorBoard events in the run folder, Weights &
    Biases, MLflow. Environment variables of the latter two say where, and whether they are offline."""


class ExperimentConfig(Section):
    """A whole run."""

    seed: int = Field(0, ge=0)
    """Seed of every random choice of the run."""
    model: ModelSection = ModelSection()
    lora: LoRAConfig = LoRAConfig()
    task: TaskSection = TaskSection()
    data: DataSection = DataSection()
    partition: PartitionSection = PartitionSection()
    federation: FederationSection = FederationSection()
    client: ClientSection = ClientSection()
    train: TrainSection = Field(TrainSection(), json_schema_extra=ON_RESUME)
    aggregation: AggregationSection = AggregationSection()
    communication: CommunicationSection = CommunicationSection()
    evaluation: EvaluationSection = Field(EvaluationSection(), json_schema_extra=ON_FORK)
    faults: FaultsSection = Field(FaultsSection(), json_schema_extra=ON_FORK)
    clock: ClockSection | None = None
    """Simulated time; none when not given."""
    cache: CacheSection = Field(CacheSection(), json_schema_extra=ON_RESUME)
    engine: EngineSection = Field(EngineSection(), json_schema_extra=ON_RESUME)
    output: OutputSection = OutputSection()

    @model_validator(mode="after")
    def _consistent(self) -> ExperimentConfig:
        cohort, clients = self.federation.cohort_size, self.partition.num_clients
        if cohort is not None and cohort > clients:
            raise ValueError(
                f"federation.cohort_size is {cohort} but partition.num_clients is {clients}: "
                f"sample at most {clients} clients a round, or make more clients"
            )
        if self.faults.late and (self.clock is None or self.clock.deadline_seconds is None):
            raise ValueError(
                f"faults.late={self.faults.late:g} is late against a deadline: set clock.deadline_seconds"
            )
        default = ClientSection.model_fields["momentum"].default
        if self.client.optimizer != "sgd" and self.client.momentum != default:
            raise ValueError(
                f"client.momentum={self.client.momentum} goes with client.optimizer=sgd; "
                f"{self.client.optimizer} has moments of its own"
            )
        if self.client.warmup_steps and self.client.warmup_ratio:
            raise ValueError(
                f"client.warmup_steps={self.client.warmup_steps} and client.warmup_ratio="
                f"{self.client.warmup_ratio} both say how long the warm-up is: leave one out"
            )
        if self.model.adapter is not None and not self.uses_adapters:
            raise ValueError(
                f"model.adapter goes with model.type={self.model.family}{ADAPTED} and lora.enabled=true"
            )
        if self.model.type.endswith(ADAPTED) and self.model.fine_tuning is not None:
            raise ValueError(
                f"model.fine_tuning={self.model.fine_tuning} goes with model.type={self.model.family}; "
                f"model.type={self.model.type} trains adapters"
            )
        return self

    @property
    def uses_adapters(self) -> bool:
        """Whether LoRA adapters are injected."""
        return self.model.type.endswith(ADAPTED) and self.lora.enabled

    @property
    def cohort_size(self) -> int:
        """Clients sampled a round."""
        return self.federation.cohort_size or self.partition.num_clients
