"""Aggregation of LoRA factors: what travels, and how the server combines it."""

from federated.methods.aggregation_error import EncodingLoss, Known, aggregation_error, encoding_loss
from federated.methods.base_delta import BaseDelta, BaseUpdate
from federated.methods.checks import Refusal, check_ranks, check_updates, run_round
from federated.methods.downlinks import (
    join_auxiliary,
    pack_downlink,
    receive,
    split_auxiliary,
    unpack_downlink,
)
from federated.methods.dual import dual
from federated.methods.fed_sb import InBasis, fed_sb, spectral_start
from federated.methods.fedavg import fedavg
from federated.methods.fedex import fedex
from federated.methods.fedsa import fedsa
from federated.methods.fedsvd import fedsvd
from federated.methods.ffa import ffa
from federated.methods.flexlora import flexlora
from federated.methods.flora import flora
from federated.methods.fresh import fresh_factors
from federated.methods.hetlora import cut_to_rank, hetlora
from federated.methods.lora_fair import lora_fair
from federated.methods.plausibility import DEFAULT_LIMITS, Limits
from federated.methods.protocol import (
    NEVER,
    Aggregator,
    ClientProfile,
    ClientRules,
    Downlink,
    FreshDraw,
    LocalStart,
    LossTerm,
    ServerState,
    Update,
    skip_round,
)
from federated.methods.registry import AGGREGATORS, aggregator_from_name
from federated.methods.rolora import rolora
from federated.methods.server_state_file import load_server, save_server

__all__ = [
    "AGGREGATORS",
    "DEFAULT_LIMITS",
    "NEVER",
    "Aggregator",
    "BaseDelta",
    "BaseUpdate",
    "ClientProfile",
    "ClientRules",
    "Downlink",
    "EncodingLoss",
    "FreshDraw",
    "InBasis",
    "Known",
    "Limits",
    "LocalStart",
    "LossTerm",
    "Refusal",
    "ServerState",
    "Update",
    "aggregation_error",
    "aggregator_from_name",
    "check_ranks",
    "check_updates",
    "cut_to_rank",
    "dual",
    "encoding_loss",
    "fed_sb",
    "fedavg",
    "fedex",
    "fedsa",
    "fedsvd",
    "ffa",
    "flexlora",
    "flora",
    "fresh_factors",
    "hetlora",
    "join_auxiliary",
    "load_server",
    "lora_fair",
    "pack_downlink",
    "receive",
    "rolora",
    "run_round",
    "save_server",
    "skip_round",
    "spectral_start",
    "split_auxiliary",
    "unpack_downlink",
]
