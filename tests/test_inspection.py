"""``fedlora info``: the documented figures, without weights or network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from federated.config.config_files import load_config
from federated.tools.inspection import describe_run

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BEYOND_AVERAGING = README.partition("Beyond averaging")[2].partition("\n\n")[0]
EXAMPLES = re.findall(r"`'?([a-z_.]+=[^`']+)'?`", BEYOND_AVERAGING)


def test_vit_b32_with_q_and_v_in_both_towers_at_rank_8_sends_the_documented_bytes() -> None:
    description = describe_run(load_config("clip_lora"))
    assert description.counts["adapter"] == description.uplink_values == 491_520  # docs/lora.md
    assert description.uplink_bytes == description.downlink_bytes == 4 * 491_520 == 1_966_080
    assert description.full_model_bytes == 605_109_252  # 4 bytes for each of 151,277,313


def test_the_codec_decides_the_expected_bytes() -> None:
    description = describe_run(load_config("clip_lora", ["communication.uplink=fp16"]))
    assert description.uplink_bytes == 2 * 491_520
    assert description.downlink_bytes == 4 * 491_520


def test_expected_bytes_are_those_of_a_run() -> None:
    description = describe_run(load_config("quickstart"))
    adapters = 4 * 4 * 8 * (128 + 128)  # blocks x projections x rank x (d_in + d_out)
    head = 10 * 128 + 10
    assert description.uplink_values == adapters + head


@pytest.mark.parametrize("override", EXAMPLES)
def test_each_override_of_the_readme_is_one_that_a_run_takes(override: str) -> None:
    assert len(EXAMPLES) == 6
    mixed = ["aggregation.name=hetlora"] if override.startswith("client.ranks") else []
    assert describe_run(load_config("quickstart", [*mixed, override])).uplink_values > 0


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_every_link_of_the_readme_inside_the_repository_leads_somewhere(target: str) -> None:
    assert target.startswith("https://") or (Path(__file__).parents[1] / target).exists()
