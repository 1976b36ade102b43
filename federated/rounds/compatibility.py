"""Which settings go together: an aggregator with its server optimizer, codecs, client terms and ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable

from federated.communication.codec import Codec, codec_from_name
from federated.communication.sparsifiers import SELECTIONS
from federated.config.schema import ADAPTED, ExperimentConfig
from federated.methods import Aggregator, ServerState, aggregator_from_name, check_ranks
from federated.methods.fedprox import with_fedprox
from federated.methods.scaffold import with_scaffold
from federated.methods.server_optimizers import (
    SERVER_OPTIMIZERS,
    server_optimizer_from_name,
    with_server_optimizer,
)
from models.errors import UserError

log = logging.getLogger(__name__)

_SET_ELSEWHERE = {
    "fedprox": "client.proximal_mu=0.01",
    "scaffold": "client.scaffold=true",
    **{name: f"aggregation.server_optimizer.name={name}" for name in SERVER_OPTIMIZERS},
}
"""What is often called an aggregator, and goes with one here -> what sets it."""


def build_aggregator(config: ExperimentConfig) -> Aggregator:
    """Return a configuration's aggregator, with its server optimizer, after checking what goes with it.

    Raises:
        UserError: Something is unknown, out of range, or does not go with the aggregator.
    """
    section = config.aggregation
    if section.name.lower() in _SET_ELSEWHERE:
        raise UserError(
            f"aggregation.name={section.name}: that goes with an aggregator, such as "
            f"aggregation.name=fedavg, and is set by {_SET_ELSEWHERE[section.name.lower()]}"
        )
    aggregator = aggregator_from_name(section.name, section.options, seed=config.seed)
    if section.server_optimizer is not None:
        options = dict(section.server_optimizer)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise UserError(
                "aggregation.server_optimizer needs a name, as in server_optimizer: {name: fedadam}"
            )
        aggregator = with_server_optimizer(aggregator, server_optimizer_from_name(name, options))
    for check in _CHECKS:
        check(config, aggregator)
    return _with_client_terms(config, aggregator)


def _with_client_terms(config: ExperimentConfig, aggregator: Aggregator) -> Aggregator:
    """Return the aggregator with what the client section adds to its clients' loss."""
    if config.client.proximal_mu:
        aggregator = with_fedprox(aggregator, config.client.proximal_mu)
    if not config.client.scaffold:
        return aggregator
    if config.client.precision == "fp16":
        raise UserError("client.scaffold=true needs unscaled gradients: set client.precision=fp32 or bf16")
    try:
        return with_scaffold(aggregator, config.partition.num_clients)
    except UserError as error:
        raise UserError(f"client.scaffold=true: {error}") from error


def check_client_ranks(config: ExperimentConfig, aggregator: Aggregator, server: ServerState) -> None:
    """Refuse client ranks that the aggregator or the model's adapters do not allow.

    Raises:
        UserError: ``client.ranks`` has a rank that is not allowed, or there are no adapters.
    """
    ranks = config.client.ranks
    if ranks is None:
        return
    if not config.uses_adapters:
        raise UserError(
            f"client.ranks gives adapter ranks, but there are no adapters: set {_with_adapters(config)}"
        )
    clients = range(config.partition.num_clients)
    check_ranks(aggregator, server, {client_id: ranks[client_id % len(ranks)] for client_id in clients})


def _codec_under(key: str, name: str) -> Codec:
    """Return the codec of that name; where there is none, say under which key it stands."""
    try:
        return codec_from_name(name)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def _check_downlink_codec(config: ExperimentConfig, aggregator: Aggregator) -> None:
    name = config.communication.downlink
    if _codec_under("communication.downlink", name).error_feedback or name.partition(":")[0] in SELECTIONS:
        raise UserError(
            f"communication.downlink={name}: the downlink carries values, not changes, so a sparse "
            "codec would set the rest to zero and error feedback has nothing to add to; take fp32, fp16, "
            "bf16, int8 or int4"
        )
    if aggregator.merges_into_base and name != "fp32":
        raise UserError(
            f"communication.downlink={name}: {aggregator.name} sends what clients merge into their base "
            "weights, where rounding would add up round by round; take communication.downlink=fp32"
        )


def _check_uplink_codec(config: ExperimentConfig, aggregator: Aggregator) -> None:
    name = config.communication.uplink
    if _codec_under("communication.uplink", name).error_feedback and not aggregator.keeps_basis:
        raise UserError(
            f"communication.uplink={name}: with {aggregator.name} factors do not mean the same from round to "
            "round, so what an earlier update lost cannot be added to a later one; take the codec without "
            ":ef, or fedavg, ffa, rolora, fedsa, fed_sb or dual"
        )


def _check_base_precision(config: ExperimentConfig, aggregator: Aggregator) -> None:
    if aggregator.merges_into_base and config.model.dtype != "float32":
        raise UserError(
            f"{aggregator.name} merges into the base weights, and a {config.model.dtype} base would lose "
            "most of what is merged; set model.dtype=float32"
        )


def _check_adapters(config: ExperimentConfig, aggregator: Aggregator) -> None:
    if config.aggregation.name == "dual" and not config.uses_adapters:
        raise UserError(f"aggregation.name=dual needs adapters: set {_with_adapters(config)}, or take fedavg")


def _with_adapters(config: ExperimentConfig) -> str:
    """Return the override that gives the run adapters."""
    wanted = f"model.type={config.model.family}{ADAPTED}"
    return "lora.enabled=true" if config.model.type.endswith(ADAPTED) else wanted


def _check_evaluation(config: ExperimentConfig, aggregator: Aggregator) -> None:
    if aggregator.has_global_model:
        return
    if not config.evaluation.clients or not config.partition.local_test_fraction:
        raise UserError(
            f"{aggregator.name} has no global model, only its clients can be evaluated: set "
            "evaluation.clients=true and partition.local_test_fraction above 0"
        )
    if config.federation.early_stopping.patience is not None:
        raise UserError(
            f"federation.early_stopping follows a global model on the validation split, and "
            f"{aggregator.name} has none: set federation.early_stopping.patience=null"
        )


def _warn_of_lost_exactness(config: ExperimentConfig, aggregator: Aggregator) -> None:
    """Say so where a rule that is exact averages what a codec has changed."""
    codecs = {f"communication.{way}": getattr(config.communication, way) for way in ("uplink", "downlink")}
    lossy = [f"{key}={name}" for key, name in codecs.items() if not codec_from_name(name).lossless]
    if aggregator.exact and lossy:
        log.warning(
            "aggregation.name=%s is exact only without loss, and %s loses some: the global model is not the "
            "average of what clients trained; aggregation_error in metrics.jsonl says by how much",
            config.aggregation.name,
            " and ".join(lossy),
        )


_CHECKS: tuple[Callable[[ExperimentConfig, Aggregator], None], ...] = (
    _check_downlink_codec,
    _check_uplink_codec,
    _check_base_precision,
    _check_adapters,
    _check_evaluation,
    _warn_of_lost_exactness,
)
