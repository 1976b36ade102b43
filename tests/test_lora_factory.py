"""create_model, quick_clip_lora and the managers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lora.adapter_files import FULL_FILE
from lora.adapter_saving import save_lora_adapters
from lora.clip_wrapper import CLIPLoRAWrapper
from lora.config import LoRAConfig
from lora.factory import LoRAConfigManager, LoRAModelManager, create_model, quick_clip_lora
from models.clip import FederatedCLIPModel
from models.errors import UserError
from tests.lora_models import disturb

CLASS_NAMES = ("cat", "dog", "red car")


def quick(folder: Path, **options: Any) -> CLIPLoRAWrapper:
    return quick_clip_lora(str(folder), 3, r=2, lora_alpha=4, class_names=CLASS_NAMES, **options)


def test_types_dispatch(small_clip_folder: Path, tmp_path: Path) -> None:
    section = {"model_name": str(small_clip_folder), "num_classes": 3}
    plain = create_model({"model": {"type": "clip", "fine_tuning": "head_only", **section}})
    assert isinstance(plain, FederatedCLIPModel)
    assert plain.exchanged_names == ("head.bias", "head.weight")
    tree = {
        "seed": 3,
        "model": {"type": "clip_lora", "dtype": "float32", **section},
        "lora": {"r": 2, "lora_alpha": 4, "target_components": ["vision"]},
        "task": {"name": "zero_shot", "templates": ["a {}."]},
        "federation": {"rounds": 3},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    wrapper = create_model(tmp_path / "run.yaml", class_names=CLASS_NAMES)
    assert isinstance(wrapper, CLIPLoRAWrapper)
    assert wrapper.task.name == "zero_shot"
    assert (wrapper.lora_config.r, wrapper.seed, wrapper.templates) == (2, 3, ("a {}.",))
    assert all(".vision_model." in name for name in wrapper.exchanged_names)
    tree["lora"]["enabled"] = False
    assert not create_model(tree, class_names=CLASS_NAMES).is_applied


def test_a_configuration_may_start_from_an_adapter(small_clip_folder: Path, tmp_path: Path) -> None:
    trained = quick(small_clip_folder)
    disturb(trained)
    save_lora_adapters(trained, tmp_path / "adapter")
    section = {"model_name": str(small_clip_folder), "num_classes": 3, "adapter": str(tmp_path / "adapter")}
    built = create_model({"model": section, "lora": {"r": 2, "lora_alpha": 4}}, class_names=CLASS_NAMES)
    wanted = trained.get_state()
    assert all(torch.equal(value, wanted[name]) for name, value in built.get_state().items())


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": {"type": "vqa", "options": {"decodre": "full"}}}, "did you mean decoder"),
        (
            {"model": {"type": "vqa_lora", "options": {"unfreeze_encoder_layers": 1}}, "lora": {"r": 2}},
            "unfreeze",
        ),
        ({"model": {"type": "bert"}}, "'bert' is unknown; valid are clip, clip_lora"),
        ({"model": {"type": "clip", "model_nam": "x"}}, "'model_nam'; did you mean model_name"),
        ({"model": {"model_name": "FOLDER"}, "lora": {"lora_alpa": 2}}, "lora_alpa.*did you mean lora_alpha"),
    ],
)
def test_wrong_configurations_are_refused_with_the_remedy(
    tree: dict[str, Any], message: str, small_clip_folder: Path
) -> None:
    if tree["model"].get("model_name") == "FOLDER":
        tree = {**tree, "model": {"model_name": str(small_clip_folder), "num_classes": 3}}
    with pytest.raises(UserError, match=message):
        create_model(tree)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no configuration .*nowhere"):
        create_model(tmp_path / "nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="not valid YAML"):
        create_model(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="mapping"):
        create_model(tmp_path / "list.yaml")


def test_configs_are_kept_by_name(tmp_path: Path) -> None:
    manager = LoRAConfigManager(tmp_path / "configs")
    assert manager.list_configs() == []
    config = LoRAConfig(r=3, lora_alpha=7, target_components=["text"])
    manager.save_config(config, "clip_small")
    assert manager.load_config("clip_small") == config
    assert manager.list_configs() == ["clip_small"]
    with pytest.raises(UserError, match=r"'large'.*clip_small"):
        manager.load_config("large")
    with pytest.raises(UserError, match="file name"):
        manager.save_config(config, "../escape")
    (tmp_path / "configs" / "odd.yaml").write_text("rank: 3")
    with pytest.raises(UserError, match="rank"):
        manager.load_config("odd")


def test_models_are_kept_by_name(small_clip_folder: Path, tmp_path: Path) -> None:
    manager = LoRAModelManager(tmp_path / "models")
    assert manager.list_models() == []
    wrapper = quick(small_clip_folder)
    disturb(wrapper)
    manager.save_model(wrapper, "first", server_round=2, metrics={"accuracy": 0.5})
    assert manager.list_models() == ["first"]
    other = quick(small_clip_folder, seed=9)
    assert manager.load_model("first", other) is other
    assert all(torch.equal(t, wrapper.get_state()[n]) for n, t in other.get_state().items())
    info = manager.get_model_info("first")
    assert (info["server_round"], info["metrics"], info["base_model"]) == (
        2,
        {"accuracy": 0.5},
        str(small_clip_folder),
    )
    assert info["num_parameters"] == sum(t.numel() for t in wrapper.get_state().values())
    assert info["size_bytes"] > 4 * info["num_parameters"]
    assert (info["has_head"], info["is_full"], info["lora_config"]["r"]) == (True, False, 2)
    with pytest.raises(UserError, match=r"'second'.*first"):
        manager.load_model("second", other)


def test_models_that_keep_everything_restore_the_base_too(small_clip_folder: Path, tmp_path: Path) -> None:
    manager = LoRAModelManager(tmp_path)
    model = FederatedCLIPModel(str(small_clip_folder), 3, class_names=CLASS_NAMES)
    config = LoRAConfig(r=2, save_only_trainable=False)
    wrapper = CLIPLoRAWrapper(model, config).apply_lora_to_federated_model()
    folder = manager.save_model(wrapper, "full")
    assert (folder / FULL_FILE).is_file()
    assert manager.get_model_info("full")["is_full"]
    other = FederatedCLIPModel(str(small_clip_folder), 3, pretrained=False, seed=5)
    manager.load_model("full", other)
    assert all(torch.equal(t, wrapper.federated_model.state_dict()[n]) for n, t in other.state_dict().items())
