"""Adapter folders: ours in plain PEFT, plain PEFT's here, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn
from transformers import CLIPModel

from lora.adapter_files import ADAPTER_FILE, CONFIG_FILE, HEAD_FILE, read_adapter
from lora.adapter_saving import save_full_checkpoint, save_lora_adapters
from lora.adapters import adapter_layers, get_lora_state_dict, scalings, set_scaling
from lora.base_delta_file import BASE_DELTA_FILE
from lora.clip_wrapper import CLIPLoRAWrapper
from lora.config import LoRAConfig, TowerOverride
from lora.injection import inject_lora
from lora.loading import load_full_checkpoint, load_lora_adapters
from models.clip import FederatedCLIPModel
from models.committed_folders import MANIFEST_FILE
from models.errors import UserError
from models.state import save_state
from tests.lora_models import BACKENDS, disturb, features, outputs, small_clip, small_config

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own call
TOLERANCE = 1e-5
UNEVEN = LoRAConfig(r=2, lora_alpha=6, vision=TowerOverride(r=4, lora_alpha=2, layers=[1]))


def adapted(config: LoRAConfig, backend: str = "huggingface") -> nn.Module:
    model = small_clip(backend)
    inject_lora(model, config)
    disturb(model)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_lora_adapters(adapted(LoRAConfig(r=2)), tmp_path / "adapter")


@pytest.fixture
def federated(small_clip_folder: Path) -> FederatedCLIPModel:
    return FederatedCLIPModel(str(small_clip_folder), 3, class_names=("cat", "dog", "red car"))


def by_hand(folder: Path, backend: str, scaling: float) -> nn.Module:
    """A naive oracle: the base model with W + scaling * B @ A written into it from a PEFT file."""
    model = small_clip(backend)
    tensors = {n.removeprefix("base_model.model."): t for n, t in load_file(folder / ADAPTER_FILE).items()}
    for name in [n.removesuffix(".lora_A.weight") for n in tensors if n.endswith(".lora_A.weight")]:
        module = model.get_submodule(name.replace("base_layer.", ""))
        weight = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight
        weight.data += scaling * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    return model


CONFIGS = pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(r=2),
        UNEVEN,
        LoRAConfig(use_rslora=True),
        LoRAConfig(bias="lora_only"),
        LoRAConfig(bias="all"),
    ],
    ids=["plain", "uneven", "rslora", "lora_only", "all"],
)


@CONFIGS
def test_our_files_give_the_same_features_in_plain_peft(config: LoRAConfig, tmp_path: Path) -> None:
    model = adapted(config)
    save_lora_adapters(model, tmp_path)
    theirs = PeftModel.from_pretrained(small_clip(), str(tmp_path)).eval()
    torch.testing.assert_close(outputs(theirs.base_model.model), outputs(model), rtol=0, atol=TOLERANCE)
    assert all(name.startswith("base_model.model.") for name in load_file(tmp_path / ADAPTER_FILE))


@CONFIGS
def test_plain_peft_finds_every_value_of_a_fused_attention(config: LoRAConfig, tmp_path: Path) -> None:
    """Values, not features: PEFT 0.21 adds the output projection's product twice."""
    save_lora_adapters(adapted(config, "fused"), tmp_path)
    theirs = PeftModel.from_pretrained(small_clip("fused"), str(tmp_path))
    values = {n.replace(".default", ""): p for n, p in theirs.named_parameters()}
    for name, tensor in load_file(tmp_path / ADAPTER_FILE).items():
        assert torch.equal(values[name], tensor)
    scaling = {
        n: layer.scaling["default"] for n, layer in theirs.named_modules() if hasattr(layer, "scaling")
    }
    ours = scalings(adapted(config, "fused"))
    assert {f"base_model.model.{n}": s for n, s in ours.items()} == scaling


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_means_scaling_times_b_times_a(backend: str, tmp_path: Path) -> None:
    model = adapted(LoRAConfig(r=3, lora_alpha=5), backend)
    save_lora_adapters(model, tmp_path)
    torch.testing.assert_close(
        outputs(by_hand(tmp_path, backend, 5 / 3)), outputs(model), rtol=0, atol=TOLERANCE
    )


def test_a_changed_scaling_is_saved(tmp_path: Path) -> None:
    model = adapted(UNEVEN)
    first = next(iter(scalings(model)))
    set_scaling(model, {first: 0.25})
    save_lora_adapters(model, tmp_path)
    theirs = PeftModel.from_pretrained(small_clip(), str(tmp_path)).eval()
    torch.testing.assert_close(outputs(theirs.base_model.model), outputs(model), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("backend", "targets"),
    [("huggingface", ["q_proj", "v_proj"]), ("huggingface", "all-linear"), ("fused", ["attn", "c_fc"])],
)
def test_plain_pefts_files_load_here(backend: str, targets: list[str] | str, tmp_path: Path) -> None:
    theirs = get_peft_model(small_clip(backend), LoraConfig(r=3, lora_alpha=5, target_modules=targets)).eval()
    disturb(theirs)
    theirs.save_pretrained(str(tmp_path))
    model = small_clip(backend)
    load_lora_adapters(model, tmp_path)
    torch.testing.assert_close(
        outputs(model), outputs(by_hand(tmp_path, backend, 5 / 3)), rtol=0, atol=TOLERANCE
    )
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())
    if backend == "huggingface":
        torch.testing.assert_close(outputs(model), outputs(theirs.base_model.model), rtol=0, atol=TOLERANCE)


def test_metadata_say_when_where_from_and_how_good(federated: FederatedCLIPModel, tmp_path: Path) -> None:
    wrapper = CLIPLoRAWrapper(federated, LoRAConfig(r=2)).apply_lora_to_federated_model()
    save_lora_adapters(wrapper, tmp_path, server_round=7, metrics={"accuracy": 0.5})
    with safe_open(tmp_path / ADAPTER_FILE, framework="pt") as handle:
        metadata = handle.metadata()
    assert metadata["server_round"] == "7"
    assert json.loads(metadata["metrics"]) == {"accuracy": 0.5}
    assert LoRAConfig(**json.loads(metadata["lora_config"])) == wrapper.lora_config
    found = read_adapter(tmp_path)
    assert (found.metadata["server_round"], found.base_model) == (7, federated.model_name)
    assert "epoch" not in found.metadata


def test_the_head_travels_in_a_file_of_its_own(
    federated: FederatedCLIPModel, small_clip_folder: Path, tmp_path: Path
) -> None:
    wrapper = CLIPLoRAWrapper(federated, LoRAConfig(r=2)).apply_lora_to_federated_model()
    disturb(wrapper)
    save_lora_adapters(wrapper, tmp_path)
    assert set(load_file(tmp_path / HEAD_FILE)) == {"head.weight", "head.bias"}
    assert not any("head" in name for name in load_file(tmp_path / ADAPTER_FILE))
    other = FederatedCLIPModel(str(small_clip_folder), 3)
    load_lora_adapters(other, tmp_path)
    assert all(torch.equal(t, wrapper.get_state()[n]) for n, t in other.get_state().items())
    retrieval = FederatedCLIPModel(str(small_clip_folder), 3, task="retrieval")
    load_lora_adapters(retrieval, tmp_path)  # no place for a head: the adapters alone
    with pytest.raises(UserError, match=r"head.*shape"):
        load_lora_adapters(FederatedCLIPModel(str(small_clip_folder), 5), tmp_path)


def test_an_adapter_of_the_head_alone_is_saved_and_loaded(
    federated: FederatedCLIPModel, small_clip_folder: Path, tmp_path: Path
) -> None:
    config = LoRAConfig.for_classification_head()
    wrapper = CLIPLoRAWrapper(federated, config).apply_lora_to_federated_model()
    disturb(wrapper)
    save_lora_adapters(wrapper, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {HEAD_FILE, MANIFEST_FILE}
    other = FederatedCLIPModel(str(small_clip_folder), 3, class_names=("cat", "dog", "red car"))
    load_lora_adapters(other, tmp_path)
    assert all(torch.equal(t, wrapper.get_state()[n]) for n, t in other.get_state().items())


def test_nothing_is_pickled_and_nothing_left_lying_about(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {CONFIG_FILE, ADAPTER_FILE, MANIFEST_FILE}


def test_an_interrupted_save_leaves_the_old_files(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("lora.adapter_saving.save_state", fail)
    with pytest.raises(UserError, match="disk full"):
        save_lora_adapters(adapted(LoRAConfig(r=5)), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_saving_again_leaves_no_head_of_an_earlier_save(
    federated: FederatedCLIPModel, tmp_path: Path
) -> None:
    wrapper = CLIPLoRAWrapper(federated, LoRAConfig(r=2)).apply_lora_to_federated_model()
    save_lora_adapters(wrapper, tmp_path)
    save_lora_adapters(adapted(LoRAConfig(r=2)), tmp_path)
    assert not (tmp_path / HEAD_FILE).exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRAConfig(r=3), "rank r"),
        (LoRAConfig(r=2, target_modules=["k_proj"]), "target_modules"),
        (LoRAConfig(r=2, target_components=["vision"]), "target_components"),
        (LoRAConfig(r=2, lora_alpha=1), "lora_alpha"),
    ],
    ids=["rank", "targets", "towers", "alpha"],
)
def test_adapters_that_do_not_fit_are_refused_and_change_nothing(
    config: LoRAConfig, message: str, saved: Path
) -> None:
    model = adapted(config)
    before = get_lora_state_dict(model)
    with pytest.raises(UserError, match=message):
        load_lora_adapters(model, saved)
    assert all(torch.equal(t, before[n]) for n, t in get_lora_state_dict(model).items())


def test_adapters_of_another_base_model_are_refused(saved: Path) -> None:
    other = small_clip(seed=1)
    with pytest.raises(UserError, match="another|trained on base model"):
        load_lora_adapters(other, saved)
    assert not adapter_layers(other)
    load_lora_adapters(other, saved, check_base=False)
    load_lora_adapters(small_clip().to(torch.bfloat16), saved)  # the same base in another dtype


def test_a_base_of_another_name_is_refused_where_only_names_are_known(tmp_path: Path) -> None:
    theirs = get_peft_model(small_clip(), LoraConfig(r=2, target_modules=["q_proj"]))
    theirs.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    config["base_model_name_or_path"] = "openai/clip-vit-base-patch16"
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    model = small_clip()
    load_lora_adapters(model, tmp_path)  # the model has no name: nothing to compare
    named = small_clip()
    named.model_name = "tiny"
    with pytest.raises(UserError, match=r"clip-vit-base-patch16.*tiny"):
        load_lora_adapters(named, tmp_path)


def test_folders_that_are_no_adapters_are_refused_with_the_reason(saved: Path, tmp_path: Path) -> None:
    model = small_clip()
    with pytest.raises(UserError, match="no such folder"):
        load_lora_adapters(model, tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="no PEFT adapter"):
        load_lora_adapters(model, empty)
    (saved / ADAPTER_FILE).write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 not a header")
    with pytest.raises(UserError, match="damaged"):
        load_lora_adapters(model, saved)
    config = (saved / CONFIG_FILE).read_text()
    (saved / CONFIG_FILE).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_lora_adapters(model, saved)
    (saved / CONFIG_FILE).write_text(config)
    (saved / ADAPTER_FILE).unlink()
    with pytest.raises(UserError, match=rf"{ADAPTER_FILE} is missing; copy"):
        load_lora_adapters(model, saved)
    (saved / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="safe_serialization"):
        load_lora_adapters(model, saved)
    assert not adapter_layers(model)


@pytest.mark.parametrize(
    ("key", "value", "message"), [("peft_type", "IA3", "only LORA"), ("use_dora", True, "use_dora")]
)
def test_other_methods_are_refused(key: str, value: object, message: str, saved: Path) -> None:
    config = json.loads((saved / CONFIG_FILE).read_text())
    (saved / CONFIG_FILE).write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError, match=message):
        load_lora_adapters(small_clip(), saved)


def test_foreign_arrays_are_refused(saved: Path) -> None:
    tensors = load_file(saved / ADAPTER_FILE)
    save_file({**tensors, "base_model.model.x.lora_magnitude_vector": torch.ones(1)}, saved / ADAPTER_FILE)
    with pytest.raises(UserError, match="not plain LoRA"):
        load_lora_adapters(small_clip(), saved)


def test_a_model_without_adapters_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="apply LoRA first"):
        save_lora_adapters(small_clip(), tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_checkpoints_hold_every_weight(backend: str, tmp_path: Path) -> None:
    model = adapted(LoRAConfig(r=2, bias="all"), backend)
    save_full_checkpoint(model, tmp_path, epoch=3)
    other = small_clip(backend, seed=1)
    assert load_full_checkpoint(other, tmp_path)["epoch"] == 3
    assert torch.equal(outputs(other), outputs(model))
    features(other).sum().backward()
    with pytest.raises(UserError, match="does not fit"):
        load_full_checkpoint(adapted(LoRAConfig(r=2, layers=[0]), backend), tmp_path)
    with pytest.raises(UserError, match="is missing"):
        load_full_checkpoint(other, tmp_path / "nowhere")


def test_a_damaged_file_beside_the_adapter_changes_nothing(saved: Path) -> None:
    wrong = {"vision_model.encoder.layers.0.self_attn.q_proj.dense": torch.ones(3, 3)}
    half = {"vision_model.encoder.layers.0.self_attn.q_proj.left": torch.ones(16, 1)}
    (saved / MANIFEST_FILE).unlink()
    for content, message in (
        (b"no tensors", "damaged"),
        (save(wrong), "does not fit"),
        (save(half), "lacks"),
    ):
        (saved / BASE_DELTA_FILE).write_bytes(content)
        fresh, injected = small_clip(), small_clip()
        inject_lora(injected, LoRAConfig(r=2))
        for model in (fresh, injected):
            names, before = list(model.state_dict()), outputs(model)
            with pytest.raises(UserError, match=message):
                load_lora_adapters(model, saved)
            assert list(model.state_dict()) == names
            assert torch.equal(outputs(model), before)


def test_a_full_checkpoint_of_another_model_changes_nothing(tmp_path: Path) -> None:
    save_full_checkpoint(adapted(LoRAConfig(r=2)), tmp_path)
    other = CLIPModel(small_config(hidden_size=40)).eval()
    names, before = list(other.state_dict()), [p.requires_grad for p in other.parameters()]
    with pytest.raises(UserError, match="base model"):
        load_full_checkpoint(other, tmp_path)
    assert list(other.state_dict()) == names
    assert [p.requires_grad for p in other.parameters()] == before


def test_a_configuration_of_a_newer_version_is_named(saved: Path) -> None:
    state, metadata = load_file(saved / ADAPTER_FILE), {"lora_config": '{"r": 2, "sparkles": true}'}
    save_state(state, saved / ADAPTER_FILE, metadata)
    with pytest.raises(UserError, match="sparkles.*newer version"):
        read_adapter(saved)
