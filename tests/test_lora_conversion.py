"""The `.pt` layout of hand-written LoRA code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lora.adapters import adapter_layers, get_lora_state_dict
from lora.config import LoRAConfig
from lora.injection import inject_lora
from lora.loading import load_lora_adapters
from lora.named import load_named_adapter, set_active_adapter
from models.errors import UserError
from tests.lora_models import BACKENDS, disturb, outputs, small_clip

RANK, ALPHA = 2, 6
WIDTHS = {"": 20, "visual.": 16}


def state_dict(
    parts: tuple[str, ...] = ("q", "k", "v", "out"),
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for tower, width in WIDTHS.items():
        for block in range(2):
            for part in parts:
                a, b = (
                    torch.randn(RANK, width, generator=generator),
                    torch.randn(width, RANK, generator=generator),
                )
                key = f"{tower}transformer.resblocks.{block}.lora_{part}"
                state[f"{key}.lora_A"], state[f"{key}.lora_B"] = a, b
    return state


def save(folder: Path, state: dict[str, torch.Tensor], **content: object) -> Path:
    config = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.1}
    torch.save({"lora_state_dict": state, "lora_config": config, **content}, folder / "adapter.pt")
    return folder / "adapter.pt"


def by_hand(backend: str, state: dict[str, torch.Tensor]) -> nn.Module:
    """A naive oracle: the base model with each product written into its slice of the weight."""
    model = small_clip(backend)
    for key in [k for k in state if k.endswith("lora_A")]:
        product = ALPHA / RANK * state[key.replace("lora_A", "lora_B")] @ state[key]
        block, part = key.split(".lora_")[0], key.split(".lora_")[1]
        if backend == "fused":
            attention = model.get_submodule(f"{block}.attn")
            index = {"q": 0, "k": 1, "v": 2}.get(part)
            rows = slice(None) if index is None else slice(index * len(product), (index + 1) * len(product))
            weight = attention.out_proj.weight if index is None else attention.in_proj_weight
            weight.data[rows] += product
        else:
            tower = model.vision_model if block.startswith("visual") else model.text_model
            attention = tower.encoder.layers[int(block[-1])].self_attn
            attention.get_submodule(f"{part}_proj").weight.data += product
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parts", [("q", "k", "v", "out"), ("q", "v"), ("out",)], ids="-".join)
def test_converted_adapters_are_the_same_function(
    backend: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    state = state_dict(parts)
    model = small_clip(backend)
    load_lora_adapters(model, save(tmp_path, state, epoch=4))
    torch.testing.assert_close(outputs(model), outputs(by_hand(backend, state)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rank_stabilised_scaling_is_that_of_the_file(backend: str, tmp_path: Path) -> None:
    config = {
        "r": RANK,
        "lora_alpha": ALPHA / RANK**0.5,
        "use_rslora": True,
    }  # alpha / sqrt(r) = ALPHA / RANK
    model, state = small_clip(backend), state_dict()
    load_lora_adapters(model, save(tmp_path, state, lora_config=config))
    torch.testing.assert_close(outputs(model), outputs(by_hand(backend, state)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "setting", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"alpha_pattern": {"q": 3}}], ids=str
)
def test_settings_that_change_what_the_factors_compute_are_refused(
    setting: dict[str, object], tmp_path: Path
) -> None:
    config = {"r": RANK, "lora_alpha": ALPHA, "dropout": 0.1, "position": "all", **setting}
    with pytest.raises(UserError, match=next(iter(setting))):
        load_lora_adapters(small_clip(), save(tmp_path, state_dict(), lora_config=config))


def test_converted_adapters_can_be_loaded_by_name(tmp_path: Path) -> None:
    model = small_clip()
    load_named_adapter(model, save(tmp_path, state_dict(), epoch=3), "old")
    set_active_adapter(model, "old")
    torch.testing.assert_close(
        outputs(model), outputs(by_hand("huggingface", state_dict())), rtol=0, atol=1e-5
    )


def test_metadata_are_kept(tmp_path: Path) -> None:
    found = load_lora_adapters(
        small_clip(), save(tmp_path, state_dict(), epoch=4, metrics={"accuracy": 0.25})
    )
    assert dict(found.metadata) == {"epoch": 4, "metrics": {"accuracy": 0.25}}


def full_file(path: Path, trained: nn.Module) -> Path:
    """A file of every weight, as a training loop on an open_clip model writes it."""
    content = {"epoch": 7, "state_dict": {f"module.{n}": t for n, t in trained.state_dict().items()}}
    config = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0}
    torch.save({**content, "optimizer": {"state": {}, "param_groups": []}, "lora_config": config}, path)
    return path


def test_a_file_of_every_weight_makes_another_open_clip_model_the_same(tmp_path: Path) -> None:
    trained = small_clip("fused")
    config = LoRAConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0, target_modules=["in_proj", "out_proj"])
    inject_lora(trained, config)
    disturb(trained)
    path = full_file(tmp_path / "epoch_7.pt", trained)
    fresh = small_clip("fused", seed=5)
    assert load_lora_adapters(fresh, path).metadata["epoch"] == 7
    assert torch.equal(outputs(fresh), outputs(trained))
    assert get_lora_state_dict(fresh).keys() == get_lora_state_dict(trained).keys()


def test_a_file_of_every_weight_is_refused_on_another_base_of_other_names(tmp_path: Path) -> None:
    model = small_clip()
    state = state_dict() | {"token_embedding.weight": model.text_model.embeddings.token_embedding.weight.data}
    content = {"state_dict": state, "lora_config": {"r": RANK, "lora_alpha": ALPHA}}
    torch.save(content, tmp_path / "full.pt")
    load_lora_adapters(model, tmp_path / "full.pt")
    torch.testing.assert_close(
        outputs(model), outputs(by_hand("huggingface", state_dict())), rtol=0, atol=1e-5
    )
    with pytest.raises(UserError, match=r"its own token_embedding\.weight is not this model's"):
        load_lora_adapters(small_clip(seed=5), tmp_path / "full.pt")
    assert load_lora_adapters(small_clip(seed=5), tmp_path / "full.pt", check_base=False)


@pytest.mark.parametrize("targets", [["in_proj", "out_proj"], ["attn"]], ids="-".join)
def test_a_file_goes_into_adapters_that_are_there_in_either_form(targets: list[str], tmp_path: Path) -> None:
    model, state = small_clip("fused"), state_dict()
    width = 3 if targets == ["attn"] else 1
    inject_lora(model, LoRAConfig(r=width * RANK, lora_alpha=width * ALPHA, target_modules=targets))
    load_lora_adapters(model, save(tmp_path, state))
    torch.testing.assert_close(outputs(model), outputs(by_hand("fused", state)), rtol=0, atol=1e-5)


class Payload:
    """Something that a pickle would have to construct."""


def test_bad_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    def refuses(message: str, state: object, **content: object) -> None:
        with pytest.raises(UserError, match=message):
            load_lora_adapters(small_clip(), save(tmp_path, state, **content))  # type: ignore[arg-type]

    good = state_dict()
    first = next(iter(good))
    refuses("cannot be read safely", good, extra=Payload())
    refuses("unknown key 'bert.weight'", {**good, "bert.weight": torch.ones(1)})
    refuses("one factor only", {n: t for n, t in good.items() if n != first})
    refuses("does not fit rank 2", {**good, first: torch.ones(5, 20)})
    refuses("holds no factors", {})
    refuses("has no 'r'", good, lora_config={"lora_alpha": 1})
    refuses("has no 'lora_config'", good, lora_config=None)
    (tmp_path / "adapter.pt").write_bytes(b"not a torch file")
    with pytest.raises(UserError, match="cannot be read"):
        load_lora_adapters(small_clip(), tmp_path / "adapter.pt")
    with pytest.raises(UserError, match="no such file"):
        load_lora_adapters(small_clip(), tmp_path / "nowhere.pt")


def test_a_file_for_more_blocks_than_the_model_has_is_refused(tmp_path: Path) -> None:
    state = {n.replace("resblocks.1", "resblocks.7"): t for n, t in state_dict().items()}
    model = small_clip()
    with pytest.raises(UserError, match=r"not in the model.*layers\.7"):
        load_lora_adapters(model, save(tmp_path, state))
    assert not adapter_layers(model)
