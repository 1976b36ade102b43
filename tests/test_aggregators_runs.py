"""Every aggregator through real rounds on the bundled model: exact, private, repeatable, and as many bytes
as its formula says. The linear algebra itself is tested in ``test_aggregators_oracles.py`` and others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from real_federation import (
    EXACT,
    METHODS,
    NUM_CLIENTS,
    RANK,
    SMALL,
    RealFederation,
    distance,
    same,
    small_config,
    with_method,
)

import federated.results.report
import federated.rounds.client
from federated.cli import main
from federated.communication.codec import codec_from_name
from federated.communication.messages import read_state
from federated.engines.simulation import run_experiment
from federated.methods import ClientRules
from federated.rounds.build import client_settings
from federated.rounds.checkpoint import (
    ServerCheckpoint,
    latest_checkpoint,
    load_server_checkpoint,
    save_server_checkpoint,
)
from federated.rounds.client_state import CODEC_MEMORY, recall
from federated.rounds.compatibility import build_aggregator
from federated.rounds.global_model import load_global_state
from federated.rounds.local_training import Assignment, train_locally
from federated.rounds.run import Run, build_run
from lora.adapters import factor_pairs
from lora.base_delta_file import BASE_DELTA_FILE
from lora.loading import load_lora_adapters
from models.clip import FederatedCLIPModel
from models.committed_folders import MANIFEST_FILE
from models.errors import UserError
from models.state import State, layout_of

ROUNDS = ((0, 1), (1, 2), (0, 1, 3))
"""Cohorts: client 1 is always there, 0 misses a round, 2 and 3 come late."""


@pytest.fixture(scope="module")
def base() -> Run:
    return build_run(small_config())


@pytest.fixture(scope="module")
def private_base() -> Run:
    return build_run(small_config("aggregation.name=dual"))


@pytest.fixture
def experiment_for(base: Run, private_base: Run) -> Any:
    def choose(method: str, **changes: Any) -> Run:
        return with_method(private_base if method == "dual" else base, method, **changes)

    return choose


@contextmanager
def federation(experiment: Run, order: Any = None) -> Iterator[RealFederation]:
    with pytest.MonkeyPatch.context() as patch:
        yield RealFederation(experiment, patch, order)


def backwards(messages: Sequence[Message]) -> Sequence[Message]:
    return list(reversed(messages))


def play_all(fed: RealFederation) -> list[State]:
    """Play ROUNDS, with an evaluation by all clients at the end; return the global state after each."""
    states = []
    for server_round, cohort in enumerate(ROUNDS, start=1):
        fed.play(server_round, cohort)
        assert not fed.strategy.record.failed
        states.append(fed.strategy.server_state.state)
    fed.evaluate(len(ROUNDS), range(NUM_CLIENTS))
    return states


# ---- repeatable, in any order of clients


@pytest.mark.parametrize("method", METHODS)
def test_runs_repeat_bitwise_in_another_client_order(method: str, experiment_for: Any) -> None:
    experiment = experiment_for(method)
    with federation(experiment) as fed:
        states, clients, base = play_all(fed), fed.strategy.record.clients, experiment.base.current()
        held, rows = dict(fed.held), list(fed.ledger.rows)
    with federation(experiment, backwards) as again:
        repeated = play_all(again)
        assert all(same(a, b) for a, b in zip(states, repeated, strict=True))
        assert same(base, experiment.base.current())
        assert again.strategy.record.clients == clients
        assert again.strategy.record.metrics.get("aggregation_error") is not None or method == "fedsa"
        assert all(same(held[i], again.held[i]) for i in held)
        assert sorted(map(str, again.ledger.rows)) == sorted(map(str, rows))
    assert not same(states[0], states[2])


# ---- the right model


@pytest.mark.parametrize("method", EXACT)
def test_exact_methods_give_clients_the_weighted_mean_of_what_they_trained(
    method: str, experiment_for: Any
) -> None:
    with federation(experiment_for(method, local_steps=6)) as fed:
        for server_round, cohort in enumerate(ROUNDS, start=1):
            fed.evaluate(server_round - 1, range(NUM_CLIENTS))
            before = fed.client_weights(1)
            fed.play(server_round, cohort)
            total = sum(fed.experiment.num_examples(i) for i in cohort)
            ideal = dict(before)
            for i in cohort:
                share = fed.experiment.num_examples(i) / total
                ideal = {m: w + share * (fed.ends[i][m] - fed.starts[i][m]) for m, w in ideal.items()}
            fed.evaluate(server_round, range(NUM_CLIENTS))
            moved = distance(before, ideal)
            assert moved > 1e-3 or (method == "rolora" and moved > 1e-4)
            for i in range(NUM_CLIENTS):
                assert distance(fed.client_weights(i), ideal) < 1e-5
            assert fed.strategy.record.metrics["aggregation_error"] < 1e-4


def test_averaging_factors_apart_is_off_and_the_metric_says_by_how_much(experiment_for: Any) -> None:
    with federation(experiment_for("fedavg", local_steps=6)) as fed:
        before = None
        for server_round in (1, 2):
            fed.evaluate(server_round - 1, range(NUM_CLIENTS))
            before = fed.client_weights(1)
            fed.play(server_round, range(NUM_CLIENTS))
        fed.evaluate(2, [1])
        total = sum(fed.experiment.num_examples(i) for i in range(NUM_CLIENTS))
        shares = [fed.experiment.num_examples(i) / total for i in range(NUM_CLIENTS)]
        found = fed.client_weights(1)
        squared_error = squared_size = 0.0
        for module, start in fed.pretrained.items():
            ideal = sum(share * (fed.ends[i][module] - start) for i, share in enumerate(shares))
            squared_error += float((found[module] - start - ideal).square().sum())
            squared_size += float(ideal.square().sum())
        error = fed.strategy.record.metrics["aggregation_error"]
        assert error == pytest.approx((squared_error / squared_size) ** 0.5, rel=1e-3)
        assert error > 1e-3
        assert before is not None


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("fedsa", "dual")])
def test_a_late_joiner_ends_with_the_model_of_a_client_that_was_always_there(
    method: str, experiment_for: Any
) -> None:
    with federation(experiment_for(method)) as fed:
        play_all(fed)
        always = fed.client_weights(1)
        assert distance(always, fed.pretrained) > 1e-4
        for i in (0, 2, 3):
            assert distance(fed.client_weights(i), always) < 1e-5
        server = fed.experiment.base.current()
        assert distance(fed.bases[1], server) < 1e-5
        features = fed.global_features()
        assert torch.isfinite(features).all()


@pytest.mark.parametrize("method", METHODS)
def test_zero_training_keeps_the_model(method: str, experiment_for: Any) -> None:
    with federation(experiment_for(method, trained=True, learning_rate=1e-30)) as fed:
        start = fed.global_features()
        play_all(fed)
        before = {m: fed.client_weights(1)[m] for m in fed.pretrained}
        assert torch.allclose(fed.global_features(), start, atol=2e-4)
        for i in range(NUM_CLIENTS):
            assert distance(fed.client_weights(i), before) < 1e-5


# ---- private parts


@pytest.mark.parametrize("method", ["fedsa", "dual"])
def test_private_parts_never_travel_and_are_bit_identical_in_the_next_round(
    method: str, experiment_for: Any
) -> None:
    with federation(experiment_for(method)) as fed:
        kept: dict[int, State] = {}
        for server_round, cohort in enumerate((*ROUNDS, (0, 1, 2, 3)), start=1):
            fed.play(server_round, cohort)
            for i in cohort:
                private = fed.experiment.aggregator.private(fed.trained[i])
                assert private
                if i in kept:
                    assert same({n: fed.held[i][n] for n in private}, kept[i])
                kept[i] = {n: fed.trained[i][n] for n in private}
                assert same(fed.private_state(i), kept[i])
        assert all(not set(delta) & set(kept[i]) for i, delta in fed.uplinks)
        assert not same(kept[0], kept[1])
        initial = {n: fed.experiment.initial_state[n] for n in kept[0]}
        assert all(not same(values, initial) for values in kept.values())
        fed.evaluate(4, range(NUM_CLIENTS))
        assert all(same(fed.private_state(i), kept[i]) for i in kept)


def test_private_values_survive_a_server_that_never_saw_the_answer(experiment_for: Any) -> None:
    with federation(experiment_for("fedsa")) as fed:
        fed.play(1, [0, 1])
        kept = fed.private_state(0)
        fed.strategy.versions.clear()
        fed.play(2, [0, 1])
        assert same({n: fed.held[0][n] for n in kept}, kept)


@pytest.mark.parametrize("method", METHODS)
def test_a_client_that_lost_its_state_is_named_and_then_sent_everything(
    method: str, experiment_for: Any
) -> None:
    with federation(experiment_for(method)) as fed:
        if not fed.experiment.aggregator.clients_remember:
            pytest.skip("its clients keep nothing")
        for server_round in (1, 2):
            fed.play(server_round, range(NUM_CLIENTS))
        fed.grid.context(0).state.clear()
        fed.play(3, range(NUM_CLIENTS))
        (failure,) = fed.strategy.record.failed
        assert failure.client_id == 0
        assert "has lost its state" in failure.reason
        fed.bases[0] = dict(fed.pretrained)  # it starts again from the base model
        fed.play(4, range(NUM_CLIENTS))
        assert not fed.strategy.record.failed
        if method not in ("fedsa", "dual"):  # private parts are lost for good
            assert distance(fed.client_weights(0), fed.client_weights(1)) < 1e-5


# ---- bytes


def sizes(experiment: Run) -> dict[str, int]:
    pairs = factor_pairs({n for n in experiment.initial_state if ".private." not in n})
    shapes = [(experiment.initial_state[p.b].shape[0], experiment.initial_state[p.a].shape[1]) for p in pairs]
    head = sum(t.numel() for n, t in experiment.initial_state.items() if n.startswith("head."))
    a, b = (sum(RANK * shape[axis] for shape in shapes) for axis in (1, 0))
    return {"a": a, "b": b, "p": a + b, "head": head, "cores": RANK * RANK * len(shapes)} | {
        f"base{q}": sum(min(q * (o + i), o * i) for o, i in shapes) for q in (2, RANK, 2 * RANK)
    }


# method -> uplink, first downlink, downlink to a client of round 1 in round 2
FORMULAS = {
    "fedavg": ("p+head", "p+head", "p+head"),
    "ffa": ("b+head", "p+head", "b+head"),
    "rolora": ("b+head", "p+head", "b+head"),
    "flora": ("p+head", "head", "base8+head"),
    "fedex": ("p+head", "p+head", "p+head+base4"),
    "fedex(rank_cap=2)": ("p+head", "p+head", "p+head+base2"),
    "flexlora": ("p+head", "p+head", "p+head"),
    "hetlora": ("p+head", "p+head", "p+head"),
    "fedsa": ("a", "p+head", "a"),
    "lora_fair": ("p+head", "p+head", "p+head"),
    "fedsvd": ("b+head", "p+head", "p+head"),
    "fed_sb": ("cores+head", "p+cores+head", "cores+head"),
    "dual": ("p+head", "p+head", "p+head"),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_ledger_has_the_bytes_of_the_methods_formula(method: str, experiment_for: Any) -> None:
    experiment = experiment_for(method)
    values = sizes(experiment)
    up, first, later = (4 * sum(values[part] for part in text.split("+")) for text in FORMULAS[method])
    with federation(experiment) as fed:
        fed.play(1, (0, 1))
        fed.play(2, (1, 2))
        found = {
            (row.server_round, row.client_id, row.direction): row.payload_bytes for row in fed.ledger.rows
        }
    assert found[1, 0, "downlink"] == found[1, 1, "downlink"] == first
    assert found[1, 0, "uplink"] == found[1, 1, "uplink"] == up
    assert found[2, 1, "downlink"] == later
    newcomer = {"flora": later, "fedex": later, "fedex(rank_cap=2)": later}.get(method, first)
    assert found[2, 2, "downlink"] == newcomer
    if method == "rolora":
        assert found[2, 1, "uplink"] == 4 * (values["a"] + values["head"])


# ---- ranks that differ


@pytest.mark.parametrize("method", ["flora", "flexlora", "hetlora"])
def test_mixed_ranks_send_their_own_rank_and_end_with_one_model(method: str) -> None:
    experiment = build_run(small_config(f"aggregation.name={method}", "client.ranks=[4, 1, 2]"))
    with federation(experiment) as fed:
        for server_round, cohort in enumerate(ROUNDS, start=1):
            fed.play(server_round, cohort)
            assert not fed.strategy.record.failed
        values = sizes(experiment)
        for row in fed.ledger.rows:
            if row.direction == "uplink" and row.server_round == 1:
                rank = (4, 1, 2, 4)[row.client_id]
                assert row.parameters == values["p"] * rank // RANK + values["head"]
        if method == "flora":
            fed.evaluate(3, range(NUM_CLIENTS))
            for i in range(NUM_CLIENTS):
                assert distance(fed.client_weights(i), fed.client_weights(0)) < 1e-5


@pytest.mark.parametrize("method", ["flora", "flexlora", "hetlora"])
def test_zero_training_with_mixed_ranks_keeps_the_global_model(method: str) -> None:
    config = small_config(
        f"aggregation.name={method}", "client.ranks=[4, 1, 2]", "client.learning_rate=1e-30"
    )
    experiment = with_method(build_run(config), method, trained=True)
    with federation(experiment) as fed:
        start = fed.global_features()
        for server_round in range(1, 4):
            fed.play(server_round, range(3))
        assert torch.allclose(fed.global_features(), start, atol=2e-4)


@pytest.mark.parametrize(
    "method",
    ["fedavg", "ffa", "rolora", "fedex", "fedsa", "lora_fair", "fedsvd", "fed_sb", "dual"],
)
def test_other_methods_refuse_mixed_ranks_before_the_run(method: str) -> None:
    with pytest.raises(UserError, match=r"needs one rank for all clients.*flora, flexlora or hetlora"):
        build_run(small_config(f"aggregation.name={method}", "client.ranks=[4, 2]"))


def test_hetloras_penalty_acts_on_a_clients_own_components() -> None:
    """A client of rank 2 in a model of rank 4 has its tail in component 2, not in the zeros beyond it."""
    config = small_config(
        "aggregation={name: hetlora, options: {gamma: 0.5, penalty_weight: 50.0}}",
        "client.ranks=[4, 2]",
        "client.optimizer=sgd",
        "client.learning_rate=1e-4",
    )
    built = build_run(config)
    generator = torch.Generator().manual_seed(5)
    state = {n: torch.randn(t.shape, generator=generator) * 0.05 for n, t in built.initial_state.items()}
    experiment = replace(
        built, initial_state={**built.initial_state, **{n: t for n, t in state.items() if "_B." in n}}
    )
    no_penalty = replace(experiment.aggregator.client, terms=())
    free = replace(experiment, aggregator=replace(experiment.aggregator, client=no_penalty))
    held = experiment.wire_state(2)
    with_tail, without = (
        train_locally(run, Assignment(1, 1, rank=2), held).state for run in (experiment, free)
    )
    for pair in factor_pairs(held):
        assert float(with_tail[pair.b][:, 1].norm()) < float(without[pair.b][:, 1].norm())
        assert torch.allclose(with_tail[pair.b][:, 0], without[pair.b][:, 0], atol=1e-3)


def test_hetlora_prunes_without_given_ranks_and_the_server_follows() -> None:
    """All clients start at lora.r; one whose tail its penalty has shrunk goes on with floor(gamma r)."""
    config = small_config(
        "aggregation={name: hetlora, options: {gamma: 0.5, penalty_weight: 5.0, min_rank: 2}}",
        "client.optimizer=sgd",
        "client.learning_rate=0.01",
    )
    built = build_run(config)
    generator = torch.Generator().manual_seed(5)
    state = {n: torch.randn(t.shape, generator=generator) * 0.05 for n, t in built.initial_state.items()}
    start = {**built.initial_state, **{n: t for n, t in state.items() if "_B." in n}}
    experiment = replace(built, initial_state=start)
    p, head = (sizes(experiment)[name] for name in ("p", "head"))
    with federation(experiment) as fed:
        assert {fed.strategy._profile(i).rank for i in range(NUM_CLIENTS)} == {RANK}
        for server_round in (1, 2, 3):
            fed.play(server_round, [0, 1])
            assert not fed.strategy.record.failed
        assert fed.strategy.current_ranks == {0: 2, 1: 2}
        assert {fed.strategy._profile(i).rank for i in (2, 3)} == {RANK}
        found = {r.server_round: r.parameters for r in fed.ledger.rows if r.direction == "uplink"}
        assert found == {1: p + head, 2: p // 2 + head, 3: p // 2 + head}


def test_hetlora_that_may_prune_nothing_asks_clients_for_nothing() -> None:
    config = small_config("aggregation={name: hetlora, options: {gamma: 1.0}}")
    assert build_aggregator(config).client == ClientRules()


# ---- codecs, checkpoints, server optimizers in real rounds


@pytest.mark.parametrize("codec", ["topk:0.1:ef+int8", "int4:ef"])
def test_error_feedback_telescopes_over_rounds(codec: str, base: Run) -> None:
    """What was decoded and what is still owed add up to all updates, also after a missed round."""
    communication = base.config.communication.model_copy(update={"uplink": codec})
    config = base.config.model_copy(update={"communication": communication})
    experiment = replace(base, config=config, clients=client_settings(config))
    with federation(experiment) as fed:
        sent: dict[int, State] = {}
        original = federated.rounds.client.encode

        def encode(run: Run, delta: State, context: Any, assignment: Any) -> Any:
            content = original(run, delta, context, assignment)
            decoded = read_state(content, codec_from_name(codec), layout_of(delta))
            owner = assignment.client_id
            sent[owner] = {n: t + sent.get(owner, {}).get(n, 0.0) for n, t in decoded.items()}
            return content

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(federated.rounds.client, "encode", encode)
            for server_round, cohort in enumerate(ROUNDS, start=1):
                fed.play(server_round, cohort)
        for client_id in (0, 1):
            owed = recall(fed.grid.context(client_id), CODEC_MEMORY)
            deltas = [delta for owner, delta in fed.uplinks if owner == client_id]
            assert len(deltas) >= 2
            for name, value in owed.items():
                total = sum(delta[name] for delta in deltas)
                assert torch.allclose(sent[client_id][name] + value, total, atol=1e-5)
            assert any(value.any() for value in owed.values())


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("flora", ("aggregation.name=flora",)),
        ("fedex", ("aggregation.name=fedex",)),
        ("fedavg with fedadam", ("aggregation.server_optimizer={name: fedadam, eta: 0.002}",)),
        ("scaffold", ("client.scaffold=true",)),
    ],
)
def test_a_server_that_is_read_back_from_its_checkpoint_goes_on_bit_for_bit(
    name: str, overrides: Sequence[str], tmp_path: Path
) -> None:
    with federation(build_run(small_config(*overrides))) as fed:
        fed.play(1, (0, 1))
        fed.play(2, (1, 2))
        strategy = fed.strategy
        saved = ServerCheckpoint(strategy.server_state, strategy.versions, {2: 3})
        save_server_checkpoint(tmp_path, saved)
        content = (tmp_path / "server.safetensors").read_bytes()
        fed.play(3, (0, 1))
        expected = strategy.server_state
        read = load_server_checkpoint(tmp_path)
        assert (read.versions, read.ranks) == ({0: 0, 1: 1, 2: 1}, {2: 3})
        contexts = {i: fed.grid.context(i) for i in (0, 1)}
        for context in contexts.values():  # clients repeat the round from what they held before it
            context.state.clear()
        strategy.server_state = read.server
        strategy.versions = {}
        assert same(read.server.state, saved.server.state)
        assert same(read.server.memory, saved.server.memory)
        save_server_checkpoint(tmp_path, read)
        assert (tmp_path / "server.safetensors").read_bytes() == content
        if name != "scaffold":  # whose clients have lost their variates here
            fed.experiment.base.reset()
            fed.play(3, (0, 1))
            assert same(strategy.server_state.state, expected.state)


def test_a_server_optimizer_changes_what_the_server_makes_of_the_same_updates(base: Run) -> None:
    with federation(base) as fed:
        fed.play(1, (0, 1))
        averaged = fed.strategy.server_state.state
    section = base.config.aggregation.model_copy(
        update={"server_optimizer": {"name": "fedavgm", "learning_rate": 0.5, "momentum": 0.9}}
    )
    config = base.config.model_copy(update={"aggregation": section})
    with federation(replace(base, config=config, aggregator=build_aggregator(config))) as fed:
        start = fed.strategy.server_state.state
        fed.play(1, (0, 1))
        for name, value in fed.strategy.server_state.state.items():
            assert torch.allclose(value, start[name] + 0.5 * (averaged[name] - start[name]), atol=1e-7)


# ---- refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["aggregation={name: flexlora, server_optimizer: {name: fedadam}}"], "changes the basis"),
        (["aggregation.server_optimizer={eta: 0.1}"], "server_optimizer needs a name"),
        (["aggregation.server_optimizer={name: fedadamm}"], "no server optimizer 'fedadamm'"),
        (["aggregation.name=flora", "communication.downlink=fp16"], "merge into their base"),
        (["aggregation.name=fedex", "model.dtype=bfloat16"], "set model.dtype=float32"),
        (["communication.downlink=topk:0.1+fp16"], "carries values, not changes"),
        (["communication.downlink=int8:ef"], "carries values, not changes"),
        (["aggregation.name=fedsvd", "communication.uplink=topk:0.1:ef"], "do not mean the same"),
        (["aggregation.name=fedsa", "evaluation.clients=false"], "has no global model"),
        (["aggregation.name=dual", "model.type=clip"], "dual needs adapters"),
        (["aggregation.name=rolora", "client.scaffold=true"], "client.scaffold=true: rolora"),
        (["aggregation.name=fed_sb", "client.scaffold=true"], "client.scaffold=true: fed_sb"),
        (["aggregation.name=flora", "client.scaffold=true"], "client.scaffold=true: flora"),
        (["client.scaffold=true", "client.precision=fp16"], "unscaled gradients"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_with_the_remedy(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build_aggregator(small_config(*overrides))


def test_a_refused_run_exits_with_code_2_and_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, "client.ranks=[4, 2]", f"output.root={tmp_path}"]
    with pytest.raises(SystemExit) as stop:
        main(["run", "quickstart", *arguments])
    assert stop.value.code == 2
    assert "flora, flexlora or hetlora" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- what is left behind


@pytest.mark.parametrize("method", ["flora", "fedex"])
def test_adapter_and_base_delta_together_are_the_trained_model(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(federated.results.report, "write_report", lambda folder: None)  # plots take seconds
    config = small_config(
        f"aggregation.name={method}",
        f"output.root={tmp_path}",
        "federation.rounds=2",
        "federation.cohort_size=2",
    )
    run = run_experiment(config)
    line = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert line["aggregation_error"] < 1e-6
    experiment = build_run(config)
    pixel_values = experiment.reader.test_images.pixel_values(range(8))
    load_global_state(experiment, load_server_checkpoint(latest_checkpoint(run)).server)
    with torch.no_grad():
        wanted = experiment.model.encode_image(pixel_values)
    fresh = FederatedCLIPModel("tiny", 10, strategy="lora")
    load_lora_adapters(fresh, run / "adapter")
    with torch.no_grad():
        found = fresh.encode_image(pixel_values)
    assert torch.allclose(found, wanted, atol=1e-5)
    load_lora_adapters(fresh, run / "adapter")  # again: the base is set, not added to
    with torch.no_grad():
        assert torch.equal(fresh.encode_image(pixel_values), found)
    for name in (BASE_DELTA_FILE, MANIFEST_FILE):  # the manifest would tell that something is missing
        (run / "adapter" / name).unlink()
    load_lora_adapters(fresh, run / "adapter")
    with torch.no_grad():
        assert not torch.allclose(fresh.encode_image(pixel_values), wanted, atol=1e-3)
