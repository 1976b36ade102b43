"""The strategy that a run's configuration asks for, and which clients evaluate after which round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from federated.config.seeding import generator
from federated.methods import Limits
from federated.rounds.client_ranks import mixed_ranks, rank_of, scaling_at
from federated.rounds.conditions import Conditions, conditions_of
from federated.rounds.global_model import bring_base_up_to_date
from federated.rounds.replies import ShardSizes
from federated.rounds.run import Run
from federated.rounds.strategy import LoRAStrategy, Ranks


def build_strategy(
    run: Run,
    clients: Mapping[int, int],
    on_broadcast: Callable[[int, int, str], None] | None = None,
    conditions: Conditions | None = None,
) -> LoRAStrategy:
    """Return the strategy of a run, before round 1.

    Args:
        run: Model, data and settings.
        clients: Node id of each client id.
        on_broadcast: Told ``(server_round, number of clients, message type)`` before messages go out.
        conditions: That the run is under; None: those of its configuration.
    """
    config, under = run.config, conditions or conditions_of(run)

    def before_broadcast(server_round: int, num_clients: int, phase: str) -> None:
        # clients simulated in this process then find the base as it is sent to them, whatever their order
        bring_base_up_to_date(run, strategy.server_state)
        if on_broadcast is not None:
            on_broadcast(server_round, num_clients, phase)

    def evaluates(server_round: int) -> list[int]:
        is_last = under.reason_to_end(strategy.server_state, server_round) is not None
        return evaluating_clients(run, server_round, is_last=is_last)

    strategy = LoRAStrategy(
        aggregator=run.aggregator,
        server_state=run.initial_server_state,
        clients=clients,
        seed=config.seed,
        cohort_size=config.cohort_size,
        uplink=run.clients.uplink,
        downlink=run.clients.downlink,
        ranks=Ranks(partial(rank_of, run), partial(scaling_at, run)) if mixed_ranks(run) else Ranks(),
        limits=Limits(config.aggregation.max_update_ratio, config.aggregation.max_examples_ratio),
        shard_sizes=ShardSizes(run.num_examples, lambda client_id: len(run.shards[client_id].test)),
        error_every=config.evaluation.aggregation_error_every,
        fault_of=under.faults.of,
        reachable=under.is_reachable,
        evaluates=evaluates,
        on_broadcast=before_broadcast,
    )
    return strategy


def evaluating_clients(run: Run, server_round: int, *, is_last: bool = False) -> list[int]:
    """Return the clients that evaluate after a round: all of them, or a seeded sample of ``max_clients``.

    Args:
        run: The run.
        server_round: The round.
        is_last: Whether the run ends early, after this round.
    """
    settings, rounds = run.config.evaluation, run.config.federation.rounds
    is_last = is_last or server_round == rounds
    due = is_last or (settings.clients_every and server_round % settings.clients_every == 0)
    if not settings.clients or not due:
        return []
    clients = [i for i in range(run.num_clients) if len(run.shards[i].test)]
    if len(clients) <= settings.max_clients:
        return clients
    rng = generator(run.config.seed, "evaluation", server_round)
    return sorted(int(i) for i in rng.choice(clients, size=settings.max_clients, replace=False))
