"""Why one round sends more than another, told from the ledger alone: who was new, what came on top."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from federated.communication.ledger import Ledger, Transfer
from federated.results.wording import format_bytes, format_count, format_rounds


def byte_reasons(ledger: Ledger) -> list[str]:
    """Return a sentence for each thing that makes rounds differ in what they send; none where none does."""
    parts = (_setup, _newcomers, _missed_rounds, _more_than_the_state, _cohorts, _evaluation, _failures)
    return [sentence for part in parts for sentence in part(ledger)]


def _setup(ledger: Ledger) -> Iterator[str]:
    if total := ledger.total(phase="setup").wire_bytes:
        yield f"Before round 1 the server asked each node which client it is: {format_bytes(total)}."


def _newcomers(ledger: Ledger) -> Iterator[str]:
    """Tell of clients that receive for the first time, where that costs more or less than later."""
    first, later = _first_and_later(ledger)
    if {row.parameters for row in later} in (set(), {row.parameters for row in first}):
        return
    rounds = Counter(row.server_round for row in first)
    yield (
        "A client that takes part for the first time receives the whole state, "
        f"{_values(first)}; one that has taken part before receives {_values(later)}. "
        f"New clients: {', '.join(f'{number} in round {t}' for t, number in rounds.items())}."
    )


def _missed_rounds(ledger: Ledger) -> Iterator[str]:
    """Tell of clients whose downlink is larger where they missed rounds."""
    seen: dict[int, int] = {}
    by_missed: dict[int, list[Transfer]] = defaultdict(list)
    for row in ledger.select(direction="downlink", phase="train", status="ok"):
        if row.client_id in seen:
            by_missed[row.server_round - seen[row.client_id] - 1].append(row)
        seen[row.client_id] = row.server_round
    late = [row for missed, rows in by_missed.items() if missed for row in rows]
    if 0 in by_missed and late and _most(late) > _most(by_missed[0]):
        yield (
            f"A client of the round before receives {_values(by_missed[0])}, one that missed rounds what "
            f"changed in them: up to {format_count(_most(late))} values."
        )


def _more_than_the_state(ledger: Ledger) -> Iterator[str]:
    """Tell of clients that are sent more values than they send, although they took part before."""
    _, later = _first_and_later(ledger)
    sent = _most(list(ledger.select(direction="uplink", phase="train")))
    larger = [row for row in later if row.parameters > sent]
    if larger:
        yield (
            f"An update has {format_count(sent)} values; in round{_rounds(larger)} downlinks had up to "
            f"{format_count(_most(larger))}: they carry what rounds have merged into the base model, too."
        )


def _cohorts(ledger: Ledger) -> Iterator[str]:
    sizes: dict[int, list[int]] = defaultdict(list)
    for (server_round,), totals in ledger.totals_by("server_round").items():
        number = len({row.client_id for row in ledger.select(server_round=server_round, phase="train")})
        if totals.transfers and number:
            sizes[number].append(int(server_round))
    if len(sizes) > 1:
        parts = [f"{number} in round{_plural(rounds)}" for number, rounds in sorted(sizes.items())]
        yield f"Not every round has as many clients: {', '.join(parts)}."


def _evaluation(ledger: Ledger) -> Iterator[str]:
    rows = list(ledger.select(phase="evaluate"))
    if rows:
        number, total = len({row.client_id for row in rows}), sum(row.wire_bytes for row in rows)
        clients = "1 client" if number == 1 else f"{number} clients"
        yield (
            f"After round{_rounds(rows)}, {clients} received the new model to evaluate it on rows of their "
            f"own: {format_bytes(total)} in all."
        )


def _failures(ledger: Ledger) -> Iterator[str]:
    failed = [row for row in ledger.select(direction="uplink", status="failed") if row.phase != "setup"]
    failed += list(ledger.select(direction="downlink", status="failed", phase="train"))
    if failed:
        yield f"In round{_rounds(failed)} a client failed: it was sent to, and sent no update back."


def _first_and_later(ledger: Ledger) -> tuple[list[Transfer], list[Transfer]]:
    """Return each client's first training downlink, and the others."""
    first: list[Transfer] = []
    later: list[Transfer] = []
    known: set[int] = set()
    for row in ledger.select(direction="downlink", phase="train"):
        (later if row.client_id in known else first).append(row)
        known.add(row.client_id)
    return first, later


def _most(rows: Sequence[Transfer]) -> int:
    return max((row.parameters for row in rows), default=0)


def _values(rows: Sequence[Transfer]) -> str:
    least, most = min(row.parameters for row in rows), max(row.parameters for row in rows)
    counts = format_count(most) if least == most else f"{format_count(least)} to {format_count(most)}"
    return f"{counts} values"


def _rounds(rows: Sequence[Transfer]) -> str:
    return _plural(sorted({row.server_round for row in rows}))


def _plural(rounds: Sequence[int]) -> str:
    """End the word ``round`` and name them: ``s 1–3, 5``."""
    return f"{'s' if len(rounds) > 1 else ''} {format_rounds(rounds)}"
