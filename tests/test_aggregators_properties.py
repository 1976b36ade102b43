"""What must hold for every aggregator, and what exactness means: checked on whole rounds of a federation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from aggregator_simulation import (
    MIXED_RANKS,
    SHAPES,
    Federation,
    a_name,
    adapter,
    b_name,
    federation,
    naive_average,
    normal,
    play_round,
    relative_distance,
    scaling_of,
    send,
    train,
    weights,
)

from federated.methods import (
    AGGREGATORS,
    Aggregator,
    ClientProfile,
    ServerState,
    Update,
    aggregation_error,
    aggregator_from_name,
    load_server,
    save_server,
)
from models.errors import UserError
from models.state import State

CASES: dict[str, Callable[[], Aggregator]] = {
    **AGGREGATORS,
    "fedex(rank_cap=0)": lambda: aggregator_from_name("fedex", {"rank_cap": 0}),
    "fedex(rank_cap=3)": lambda: aggregator_from_name("fedex", {"rank_cap": 3}),
    "fedsa(private_head=False)": lambda: aggregator_from_name("fedsa", {"private_head": False}),
    "fedsvd(period=2)": lambda: aggregator_from_name("fedsvd", {"period": 2}),
    "lora_fair(regularisation=0)": lambda: aggregator_from_name("lora_fair", {"regularisation": 0.0}),
}
EXACT = [name for name, make in CASES.items() if make().exact]
MIXED = [name for name, make in CASES.items() if make().allows_mixed_ranks]
GLOBAL = [name for name, make in CASES.items() if make().has_global_model]
COHORTS = ([0, 1, 2], [1, 3], [2, 3, 0], [4, 1], [0, 1, 2, 3, 4])
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}

every = pytest.mark.parametrize("name", CASES)
ONE_RANK: tuple[int, ...] = (4, 4, 4, 4, 4)


def ranked(names: list[str]) -> pytest.MarkDecorator:
    """All names with one rank, and with mixed ranks those that allow them."""
    cases = [(name, ONE_RANK) for name in names] + [(name, MIXED_RANKS) for name in names if name in MIXED]
    ids = [f"{name}-{'one rank' if ranks is ONE_RANK else 'mixed ranks'}" for name, ranks in cases]
    return pytest.mark.parametrize(("name", "ranks"), cases, ids=ids)


both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def private_adapter(dtype: torch.dtype) -> State:
    """A second adapter under another name, as `dual` has it."""
    values = {}
    for index, (module, (d_out, d_in)) in enumerate(SHAPES.items()):
        values[f"{module}.lora_A.private.weight"] = normal(70 + index, 2, d_in, dtype=dtype)
        values[f"{module}.lora_B.private.weight"] = torch.zeros(d_out, 2, dtype=dtype)
    return values


def start(name: str, **options) -> Federation:
    extra = private_adapter(options.get("dtype", torch.float64)) if name == "dual" else None
    return federation(CASES[name](), extra=extra, **options)


def test_the_registry_has_every_documented_method():
    documented = "fedavg ffa rolora flora fedex flexlora hetlora fedsa lora_fair fedsvd fed_sb dual"
    assert sorted(AGGREGATORS) == sorted(documented.split())
    assert sorted(EXACT) == sorted(
        ["ffa", "rolora", "flora", "fedex", "fedsvd", "fedsvd(period=2)", "fed_sb"]
    )
    assert sorted(MIXED) == ["flexlora", "flora", "hetlora"]


@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_method_stands_in_a_file_of_its_name(name):
    assert AGGREGATORS[name].__module__ == f"federated.methods.{name}"


@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_method_states_its_equation_paper_bytes_and_what_it_preserves(name):
    text = AGGREGATORS[name].__doc__ or ""
    assert any(sign in text.splitlines()[0] for sign in ("<-", "+"))
    assert "arXiv:" in text.partition("Source:")[2]
    assert all(word in text.partition("Bytes:")[2] for word in ("up", "down", "Preserves:"))


# ---- rules on changes


def with_changes_times(method: Aggregator, share: float) -> Aggregator:
    """A rule that acts on every client's change and knows nothing of the method behind it."""

    def apply(server: ServerState, updates: Sequence[Update]) -> ServerState:
        shrunk = [u.with_delta({n: share * change for n, change in u.delta.items()}) for u in updates]
        return method.apply(server, shrunk)

    return replace(method, apply=apply)


@ranked(GLOBAL)
def test_a_rule_on_changes_can_stand_in_front_of_every_method(name, ranks):
    feds = [start(name, ranks=ranks, trained=True) for _ in range(3)]
    for fed, share in zip(feds[1:], (1.0, 0.0), strict=True):
        fed.aggregator = with_changes_times(fed.aggregator, share)
    before = feds[2].global_weights()
    for fed in feds:
        play_round(fed, [0, 2, 3])
    plain, whole, none = (fed.global_weights() for fed in feds)
    assert relative_distance(whole, plain, before) < 1e-12
    assert relative_distance(none, before, feds[2].pretrained) < 1e-12


# ---- exactness


@pytest.mark.parametrize("trained", [False, True], ids=["B = 0", "B != 0"])
@pytest.mark.parametrize("rank_stabilised", [False, True], ids=["alpha/r", "rslora"])
@both_dtypes
@pytest.mark.parametrize("name", EXACT)
def test_exact_rules_leave_every_client_with_the_average_of_the_trained_models(
    name, dtype, rank_stabilised, trained
):
    """From any start; partial cohorts, late joiners and clients that missed rounds included."""
    fed = start(name, dtype=dtype, rank_stabilised=rank_stabilised, trained=trained)
    for cohort in COHORTS:
        before = fed.global_weights()
        play_round(fed, cohort)
        ideal = naive_average(fed, cohort, before)
        assert relative_distance(fed.global_weights(), ideal, fed.pretrained) < TOLERANCE[dtype]
        for client in fed.clients:
            kept = (dict(client.base), dict(client.held), client.version)
            send(fed, client)
            assert relative_distance(client.start, ideal, fed.pretrained) < TOLERANCE[dtype]
            client.base, client.held, client.version = kept


@pytest.mark.parametrize("rank_stabilised", [False, True], ids=["alpha/r", "rslora"])
@both_dtypes
def test_flora_is_exact_with_mixed_ranks_and_scalings(dtype, rank_stabilised):
    fed = start("flora", dtype=dtype, ranks=MIXED_RANKS, rank_stabilised=rank_stabilised, trained=True)
    for cohort in COHORTS:
        before = fed.global_weights()
        updates = play_round(fed, cohort)
        assert {len(u.state[a_name("tower.first")]) for u in updates} == {MIXED_RANKS[i] for i in cohort}
        ideal = naive_average(fed, cohort, before)
        for client in fed.clients:
            kept = (dict(client.base), dict(client.held), client.version)
            send(fed, client)
            assert relative_distance(client.start, ideal, fed.pretrained) < TOLERANCE[dtype]
            client.base, client.held, client.version = kept


@pytest.mark.parametrize("name", [n for n in GLOBAL if n not in EXACT and n not in ("dual",)])
def test_rules_that_are_not_exact_do_err_on_heterogeneous_clients(name):
    """So that the flag `exact` means something."""
    fed = start(name)
    play_round(fed, [0, 1, 2, 3])
    before = fed.global_weights()
    play_round(fed, [0, 1, 2, 3])
    ideal = naive_average(fed, [0, 1, 2, 3], before)
    assert relative_distance(fed.global_weights(), ideal, fed.pretrained) > 1e-3


@pytest.mark.parametrize("most", [1, 4_000_000])  # values of all clients that are copied side by side
@ranked(GLOBAL)
def test_the_reported_aggregation_error_is_the_dense_one(name, ranks, most, monkeypatch):
    monkeypatch.setattr(sys.modules[aggregation_error.__module__], "_MAX_STACKED_VALUES", most)
    fed = start(name, ranks=ranks)
    if name == "dual":  # the private part is no part of the global model
        for client in fed.clients:
            client.held = {n: t for n, t in client.held.items() if ".private." not in n}
    for cohort in COHORTS[:3]:
        before, server = fed.global_weights(), fed.server
        updates = play_round(fed, cohort)
        ideal, after = naive_average(fed, cohort, before), fed.global_weights()
        origin = {
            m: fed.pretrained[m] + (server.base_delta[m].total() if m in server.base_delta else 0)
            for m in SHAPES
        }
        dense = relative_distance(after, ideal, origin)
        assert aggregation_error(fed.aggregator, server, fed.server, updates) == pytest.approx(
            dense, abs=1e-11
        )


def test_fedsa_has_no_global_model_and_no_aggregation_error():
    fed = start("fedsa")
    server = fed.server
    updates = play_round(fed, [0, 1])
    assert aggregation_error(fed.aggregator, server, fed.server, updates) is None


# ---- every aggregator


@every
def test_the_order_of_the_updates_does_not_matter_bit_for_bit(name):
    fed = start(name, dtype=torch.float32)
    play_round(fed, [0, 1, 2])
    for client in fed.clients:
        send(fed, client)
    updates = [train(fed, client, 3) for client in fed.clients]
    one, other = (fed.aggregator.apply(fed.server, order) for order in (updates, updates[::-1]))
    first, second = save_server(one)[0], save_server(other)[0]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@both_dtypes
@every
def test_one_client_gets_its_own_model_back(name, dtype):
    fed = start(name, dtype=dtype)
    for _ in range(3):
        client = fed.clients[1]
        play_round(fed, [1])
        wanted, wanted_head = fed.client_weights(client), client.held["head.bias"]
        send(fed, client)
        assert relative_distance(client.start, wanted, fed.pretrained) < TOLERANCE[dtype]
        assert torch.equal(client.held["head.bias"], wanted_head)


@ranked(MIXED)
def test_ten_rounds_without_training_change_nothing_with_rslora_scalings(name, ranks):
    fed = start(name, trained=True, ranks=ranks, rank_stabilised=True)
    wanted = fed.global_weights()
    for server_round in range(10):
        play_round(fed, COHORTS[server_round % len(COHORTS)], steps=0)
    assert relative_distance(fed.global_weights(), wanted, fed.pretrained) < 1e-11


@both_dtypes
@ranked(list(CASES))
def test_ten_rounds_without_training_change_nothing(name, ranks, dtype):
    """No rank band fades, although low-rank clients never hold the upper ones."""
    fed = start(name, dtype=dtype, trained=True, ranks=ranks)
    wanted, head = fed.global_weights(), fed.server.state["head.bias"].clone()
    for server_round in range(10):
        play_round(fed, COHORTS[server_round % len(COHORTS)], steps=0)
        assert relative_distance(fed.global_weights(), wanted, fed.pretrained) < 10 * TOLERANCE[dtype]
        for module in SHAPES:
            old, new = (
                torch.linalg.svdvals(w[module] - fed.pretrained[module])
                for w in (wanted, fed.global_weights())
            )
            torch.testing.assert_close(new, old, rtol=0, atol=20 * TOLERANCE[dtype] * float(old[0]))
    tolerance = 0 if dtype is torch.float32 else 1e-15  # float32 is rounded once, from float64
    torch.testing.assert_close(fed.server.state["head.bias"], head, rtol=tolerance, atol=0)


@every
def test_the_head_is_the_weighted_mean_unless_private(name):
    fed = start(name)
    head = fed.server.state["head.bias"]
    updates = play_round(fed, [0, 1, 2])
    if "head.bias" in fed.aggregator.private(fed.clients[0].held):
        assert torch.equal(fed.server.state["head.bias"], head)
        return
    naive = sum(w * u.state["head.bias"] for w, u in zip(weights(updates), updates, strict=True))
    torch.testing.assert_close(fed.server.state["head.bias"], naive)
    assert not torch.allclose(naive, head)


@every
def test_private_parts_never_travel_up_and_are_never_overwritten(name):
    fed = start(name)
    for cohort in COHORTS:
        for client_id in cohort:
            client = fed.clients[client_id]
            private = fed.aggregator.private(client.held)
            kept = {n: client.held[n] for n in private if client.version >= 0}
            send(fed, client)
            assert all(torch.equal(client.held[n], tensor) for n, tensor in kept.items())
            update = train(fed, client, 2)
            assert not set(private) & set(update.state)
        fed.server = fed.aggregator.apply(fed.server, [train(fed, fed.clients[i], 2) for i in cohort])
        assert not any(".private." in name for name in fed.server.state)


@every
def test_what_travels_up_trains_and_what_trains_travels_up_or_is_private(name):
    fed = start(name)
    rules = fed.aggregator
    send(fed, fed.clients[0])
    held = fed.clients[0].held
    model = rules.client.to_model(held)
    for server_round in (1, 2, 3):
        trains, travels = set(rules.trains(model, server_round)), set(rules.uplink(held, server_round))
        private = set(rules.private(held))
        if rules.client.bases(held):  # Fed-SB trains B inside its basis and sends the core
            trains = {n.replace("lora_B", "lora_R") for n in trains}
        assert trains == travels | private
        assert not travels & private


@every
def test_clients_remember_exactly_where_a_downlink_leaves_something_out(name):
    fed = start(name)
    leaves_out = bool(fed.aggregator.private(fed.clients[0].held))
    for version in (0, 1):
        play_round(fed, [0, 1])
        downlink = fed.aggregator.downlink(fed.server, ClientProfile(version=version))
        leaves_out |= downlink.state.keys() != fed.server.state.keys() or bool(downlink.base_updates)
    assert fed.aggregator.clients_remember == leaves_out


@every
def test_a_saved_server_continues_bit_for_bit(name):
    fed = start(name, dtype=torch.float32)
    play_round(fed, [0, 1, 2])
    play_round(fed, [0, 3])
    tensors, numbers = save_server(fed.server)
    restored = load_server(tensors, numbers)
    for client in fed.clients:
        send(fed, client)
    updates = [train(fed, client, 2) for client in fed.clients]
    one, other = (save_server(fed.aggregator.apply(s, updates)) for s in (fed.server, restored))
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][key], other[0][key]) for key in one[0])


@every
def test_a_round_does_not_change_the_state_it_started_from(name):
    fed = start(name)
    play_round(fed, [0, 1])
    server = fed.server
    copy = {key: tensor.clone() for key, tensor in save_server(server)[0].items()}
    play_round(fed, [0, 1, 2])
    assert all(torch.equal(copy[key], tensor) for key, tensor in save_server(server)[0].items())


# ---- ranks


@pytest.mark.parametrize("name", [n for n in CASES if n not in MIXED])
def test_rules_for_one_rank_refuse_another_and_name_client_and_ranks(name):
    fed = start(name)
    send(fed, fed.clients[0])
    good = train(fed, fed.clients[0], 1)
    narrow = start(name)
    smaller = {n: t[:2] if ".lora_A." in n else t[:, :2] for n, t in good.state.items() if "head" not in n}
    bad = type(good)(7, 10, {**good.state, **smaller}, good.scaling)
    with pytest.raises(UserError, match=r"client 7 sent .*\(.*2.*\).*the server has"):
        narrow.aggregator.apply(narrow.server, [good, bad])
    with pytest.raises(UserError, match=r"client has rank 2, the server 4"):
        narrow.aggregator.downlink(narrow.server, ClientProfile(rank=2))


@pytest.mark.parametrize("name", MIXED)
def test_rules_for_mixed_ranks_refuse_a_rank_above_the_servers(name):
    fed = start(name)
    with pytest.raises(UserError, match="rank 9, the server 4"):
        fed.aggregator.downlink(fed.server, ClientProfile(rank=9))


@pytest.mark.parametrize("name", MIXED)
def test_a_client_of_low_rank_receives_the_leading_part_in_its_own_scaling(name):
    fed = start(name, ranks=MIXED_RANKS, trained=True)
    play_round(fed, [0, 3])
    client = fed.clients[1]
    send(fed, client)
    for module in SHAPES:
        assert client.held[a_name(module)].shape[0] == client.rank
        model = fed.server.state
        leading = model[b_name(module)][:, : client.rank] @ model[a_name(module)][: client.rank]
        base = fed.pretrained[module] + (
            fed.server.base_delta[module].total() if module in fed.server.base_delta else 0
        )
        torch.testing.assert_close(client.start[module], base + fed.server.scaling[module] * leading)


# ---- starting


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("fedavg", "dual")])
def test_rules_about_factors_ask_for_adapters(name):
    with pytest.raises(UserError, match="needs adapters"):
        CASES[name]().init({"head.bias": torch.zeros(3)}, {})


def test_fedavg_averages_any_model_exactly():
    rule = AGGREGATORS["fedavg"]()
    server = rule.init({"layer.weight": torch.zeros(2, 3)}, {})
    values = [normal(i, 2, 3, dtype=torch.float32) for i in range(3)]
    updates = [
        Update(i, n, {"layer.weight": v}, {}) for i, (n, v) in enumerate(zip((1, 2, 5), values, strict=True))
    ]
    torch.testing.assert_close(
        rule.apply(server, updates).state["layer.weight"], (values[0] + 2 * values[1] + 5 * values[2]) / 8
    )


@every
def test_half_precision_and_missing_scalings_are_refused_at_the_start(name):
    rule = CASES[name]()
    with pytest.raises(UserError, match="bfloat16"):
        rule.init({n: t.bfloat16() for n, t in adapter().items()}, scaling_of(4))
    with pytest.raises(UserError, match=r"tower\.second has no scaling"):
        rule.init(adapter(), {"tower.first": 1.0})


def test_unknown_names_and_options_are_named():
    with pytest.raises(UserError, match="did you mean 'fedex'"):
        aggregator_from_name("fedexx", {})
    with pytest.raises(UserError, match=r"no option 'rank', did you mean 'rank_cap'|has no option 'rank'"):
        aggregator_from_name("fedex", {"rank": 3})
    for name, options in {
        "fedex": {"rank_cap": -1},
        "hetlora": {"gamma": 0},
        "lora_fair": {"regularisation": -1},
        "fedsvd": {"period": 0},
        "dual": {"private_adapter": "default"},
    }.items():
        with pytest.raises(UserError, match=name):
            aggregator_from_name(name, options)
