"""The bytes of every transfer: one row per round, client, direction and phase, and what the rows add up to.

The metered grid appends a row for each message that crosses it, downlink and uplink: errors, replies that
come twice and replies that the server refuses included. At the end of a round the new rows go to
``communication.csv``. Every byte count that people see comes from these rows
(``federated.communication.savings`` says what they mean). Three counts are kept apart: ``parameters`` (values
that travel, k of n with a sparse codec), ``payload_bytes`` (those values after the codec) and ``wire_bytes``
(all that Flower serialises of a message).
"""

from __future__ import annotations

import csv
import io
import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from models.errors import UserError, shortened
from models.files import append_whole, write_text

logger = logging.getLogger(__name__)

Direction = Literal["uplink", "downlink"]
Phase = Literal["train", "evaluate", "setup"]
Status = Literal["ok", "failed"]


@dataclass(frozen=True, slots=True)
class Transfer:
    """One message between the server and one client, in one direction.

    Attributes:
        server_round: the round, from 1; 0 is before training.
        client_id: the client at the other end.
        direction: ``uplink`` is client to server, ``downlink`` is server to client.
        phase: ``train``, ``evaluate``, or ``setup``: on Flower's engines, which client a node is.
        status: ``failed`` for a reply without content and for a downlink that got no other; a reply that the
            server refuses is ``ok`` here, for it arrived.
        parameters: number of values carried; 0 for a reply that is not in the codec or layout agreed on.
        payload_bytes: the encoded values: scales, indices and the head included.
        wire_bytes: the serialised message: values, metadata, and Flower's Message object. What HTTP and TLS
            put around it is not counted.
        simulated_seconds: when it arrived, after its broadcast, by the simulated clock; None without one.
    """

    server_round: int
    client_id: int
    direction: Direction
    phase: Phase
    status: Status
    parameters: int
    payload_bytes: int
    wire_bytes: int
    simulated_seconds: float | None = None

    def __post_init__(self) -> None:
        """Refuse a row that no total could make sense of."""
        for value, allowed in ((self.direction, Direction), (self.phase, Phase), (self.status, Status)):
            if value not in get_args(allowed):
                raise ValueError(f"{value!r} is not one of {', '.join(get_args(allowed))}")
        if self.simulated_seconds is not None and not 0 <= self.simulated_seconds < math.inf:
            raise ValueError(f"a transfer arrives after no negative or endless time: {self}")
        if min(self.server_round, self.parameters, self.payload_bytes, self.wire_bytes) < 0:
            raise ValueError(f"a transfer has no negative counts: {self}")


TIMED_COLUMNS = tuple(field.name for field in fields(Transfer))
TIME = "simulated_seconds"
COLUMNS = tuple(name for name in TIMED_COLUMNS if name != TIME)
"""Of the ledger of a run without a simulated clock; ``TIMED_COLUMNS`` of one with it."""
_GROUPED = ("direction", "phase", "status")
_TEXT_COLUMNS = frozenset(_GROUPED)
_SUMMED = frozenset({"server_round", *_GROUPED})
MAX_ROUND = 1_000_000
_MOST_DIGITS = 15  # a petabyte


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a set of transfers."""

    transfers: int = 0
    parameters: int = 0
    payload_bytes: int = 0
    wire_bytes: int = 0


class Ledger:
    """Every transfer of a run, in the order in which it happened."""

    def __init__(self, rows: Iterable[Transfer] = (), *, timed: bool = False) -> None:
        """Start from ``rows`` (none for a new run); ``timed``: the file says when each arrived."""
        self.timed = timed
        self._rows: list[Transfer] = []
        self._sums: dict[int, dict[tuple[str, ...], list[int]]] = {}
        self._written: dict[Path, int] = {}
        for row in rows:
            self.append(row)

    def __len__(self) -> int:
        """Return the number of transfers."""
        return len(self._rows)

    def append(self, transfer: Transfer) -> None:
        """Add one transfer."""
        self._rows.append(transfer)
        group = transfer.direction, transfer.phase, transfer.status
        sums = self._sums.setdefault(transfer.server_round, {}).setdefault(group, [0, 0, 0, 0])
        for place, count in enumerate((1, transfer.parameters, transfer.payload_bytes, transfer.wire_bytes)):
            sums[place] += count

    @property
    def rows(self) -> tuple[Transfer, ...]:
        """All transfers, oldest first."""
        return tuple(self._rows)

    def clients(self) -> tuple[int, ...]:
        """Return the clients that took part in a round at least once, sorted."""
        return tuple(sorted({row.client_id for row in self._rows if row.phase != "setup"}))

    def select(self, **where: int | str) -> Iterator[Transfer]:
        """Yield the rows whose columns equal ``where``, such as ``direction="uplink", server_round=3``."""
        _check_columns(where)
        for row in self._rows:
            if all(getattr(row, column) == value for column, value in where.items()):
                yield row

    def total(self, **where: int | str) -> Totals:
        """Return the sums over the rows whose columns equal ``where`` (all rows without it).

        Running sums answer what asks for no single client, so that a round does not cost more, the more
        rounds there were.
        """
        if not where.keys() <= _SUMMED:
            return _sum(self.select(**where))
        wanted = [where.get(column) for column in _GROUPED]
        rounds = [where["server_round"]] if "server_round" in where else list(self._sums)
        totals = [0, 0, 0, 0]
        for server_round in rounds:
            for group, sums in self._sums.get(int(server_round), {}).items():
                if all(value in (None, found) for value, found in zip(wanted, group, strict=True)):
                    totals = [total + more for total, more in zip(totals, sums, strict=True)]
        return Totals(*totals)

    def totals_by(self, *columns: str) -> dict[tuple[int | str, ...], Totals]:
        """Return the sums per distinct value of ``columns``, such as ``"server_round", "direction"``."""
        _check_columns(columns)
        groups: dict[tuple[int | str, ...], list[Transfer]] = defaultdict(list)
        for row in self._rows:
            groups[tuple(getattr(row, column) for column in columns)].append(row)
        return {key: _sum(groups[key]) for key in sorted(groups)}

    def cumulative_wire_bytes(self) -> dict[int, int]:
        """Return, for each round from 0 to the last, the wire bytes sent until its end, both ways."""
        per_round = self.totals_by("server_round")
        last = max((row.server_round for row in self._rows), default=0)
        so_far, cumulative = 0, {}
        for server_round in range(last + 1):
            so_far += per_round.get((server_round,), Totals()).wire_bytes
            cumulative[server_round] = so_far
        return cumulative

    @classmethod
    def continued(cls, path: Path) -> Ledger:
        """Read a ledger that ``write_csv`` goes on with: later rows are appended to the file.

        Raises:
            UserError: as ``read_csv``.
        """
        ledger = cls.read_csv(path)
        ledger._written[path.resolve()] = len(ledger)
        return ledger

    def write_csv(self, path: str | Path) -> None:
        """Bring ``path`` up to date.

        The first call replaces the file as a whole; later calls append the new rows in one write, and take a
        write that fell short back.
        """
        path = Path(path).resolve()
        if path in self._written and path.exists():
            append_whole(path, self._csv_text(self._rows[self._written[path] :], header=False))
        else:
            write_text(path, self._csv_text(self._rows, header=True))
        self._written[path] = len(self._rows)

    def _csv_text(self, rows: Iterable[Transfer], *, header: bool) -> str:
        buffer, columns = io.StringIO(), TIMED_COLUMNS if self.timed else COLUMNS
        writer = csv.writer(buffer, lineterminator="\n")
        if header:
            writer.writerow(columns)
        writer.writerows(astuple(row)[: len(columns)] for row in rows)
        return buffer.getvalue()

    @classmethod
    def read_csv(cls, path: str | Path) -> Ledger:
        """Read a ledger back.

        A last line without its end, as a killed run can leave, is dropped with a warning.

        Raises:
            UserError: the file is missing, has other columns, or a line that is no transfer.
        """
        from models.untrusted import parsing, read_text  # not at the top: the command line starts without it

        path = Path(path)
        if not os.path.isfile(path):
            raise UserError(f"{path} does not exist: give the folder of a run that has started")
        lines = read_text(path).splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            logger.warning("%s ends in the middle of a line; that line is left out", path)
            lines.pop()
        reader = csv.reader(lines)
        with parsing(path, "is no ledger", "give the file that a run wrote", csv.Error):
            header = tuple(next(reader, ()))
            if header not in (COLUMNS, TIMED_COLUMNS):
                found = shortened(",".join(header))
                raise UserError(f"{path}: the columns are {found!r}, not {','.join(COLUMNS)!r}")
            return cls(_parse(path, header, reader), timed=header == TIMED_COLUMNS)


def _check_columns(columns: Iterable[str]) -> None:
    unknown = [column for column in columns if column not in COLUMNS]
    if unknown:
        raise ValueError(f"no column {unknown} in the ledger; it has {', '.join(COLUMNS)}")


def _sum(rows: Iterable[Transfer]) -> Totals:
    transfers = parameters = payload_bytes = wire_bytes = 0
    for row in rows:
        transfers += 1
        parameters += row.parameters
        payload_bytes += row.payload_bytes
        wire_bytes += row.wire_bytes
    return Totals(transfers, parameters, payload_bytes, wire_bytes)


def _parse(path: Path, header: Sequence[str], reader: Iterable[list[str]]) -> Iterator[Transfer]:
    for number, cells in enumerate(reader, start=2):
        try:
            named = dict(zip(header, cells, strict=True))
            time = named.pop(TIME, "")
            values: dict[str, Any] = {k: v if k in _TEXT_COLUMNS else int(v) for k, v in named.items()}
            values[TIME] = float(time) if time else None
            if int(named["server_round"]) > MAX_ROUND or len(max(cells, key=len)) > _MOST_DIGITS:
                raise ValueError("a number is too large")
            yield Transfer(**values)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not a transfer ({shortened(error)})") from error
