"""What a client writes reaches record, log, console and report as one short line of visible characters."""

from __future__ import annotations

import io
import json
import sys
import unicodedata

import numpy as np
import pytest
from rich.console import Console

from federated.communication.foreign_text import MAX_CHARACTERS, shown
from federated.communication.ledger import Ledger
from federated.results.console import RunDisplay
from federated.results.round_record import Failure, RoundRecord
from federated.rounds.server import round_line

ATTACKS = {
    "clear screen": "\x1b[2J\x1b[H",
    "colour": "\x1b[1;31mred\x1b[0m",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://x\x1b\\click\x1b]8;;\x1b\\",
    "8-bit": "\x9b2J\x9d0;owned\x9c",
    "unfinished": "\x1b]0;no end",
    "device string": "\x1bP+q\x1b\\",
    "bidi": "\u202egnp.exe\u2066\u2069",
    "invisible": "a\u200bb\ufeffc\u00ad",
    "lines": "one\r\ntwo\u2028three\x85four\x0b",
    "surrogate": "\ud800",
    "null": "\x00\x7f\x08",
    "tags": "\U000e0041",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_command_and_nothing_invisible_gets_through(attack: str) -> None:
    line = shown(f"out of {ATTACKS[attack]} memory")
    assert line.startswith("out of ")
    assert line.endswith(" memory") or attack == "unfinished"
    assert all(not unicodedata.category(letter).startswith("C") for letter in line)
    assert len(line.splitlines()) == 1
    line.encode()
    assert shown(line) == line


def test_any_text_becomes_one_short_visible_line() -> None:
    rng = np.random.default_rng(0)
    letters = [*map(chr, range(0x300)), "\u2028", "\u202e", "\ud800", "\U000e0041", "\x1b[", "\x1b]", "\x07"]
    for _ in range(300):
        line = shown("".join(rng.choice(letters, size=rng.integers(0, 60))))
        assert all(not unicodedata.category(letter).startswith("C") for letter in line)
        assert len(line.splitlines()) <= 1


@pytest.mark.parametrize("text", ["", "RuntimeError: shape [3, 4], not (2,)", "<class 'int'>: Äpfel 猫 🐈 é"])
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert shown(text) == text


@pytest.mark.parametrize("piece", ["x", "\x1b[2J", "word \u202e"])
def test_ten_megabytes_become_a_line_that_says_how_much_is_missing(piece: str) -> None:
    text = piece * (10_000_000 // len(piece))
    line = shown(text)
    assert len(line) < MAX_CHARACTERS + 50
    assert "more characters)" in line
    assert shown("y" * 2000) == "y" * MAX_CHARACTERS + " … (1500 more characters)"


@pytest.mark.skipif(sys.platform == "win32", reason="asks for a terminal's sequences")
def test_a_reason_is_safe_in_the_record_on_disk_and_on_the_terminal() -> None:
    reason = "".join(ATTACKS.values()) + "[bold]<script>" + "x" * 10_000
    record = RoundRecord(server_round=1, cohort=[0], failed=[Failure(0, reason)])
    line = round_line(record, Ledger())
    text = json.dumps(line, ensure_ascii=False)
    assert not set(text) & {"\x1b", "\u202e", "\x9b", "\x07"}
    assert len(text) < 2000
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, color_system=None, width=120)
    RunDisplay(console).round_done(line)
    written = terminal.getvalue()
    assert "[bold]<script>" in written  # nothing is read as markup
    assert "owned" not in written
    assert "\x1b[2J" not in written
