"""Images, texts and classes of an adapter are those of the model that it is put on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lora.adapter_saving import save_lora_adapters
from lora.clip_wrapper import CLIPLoRAWrapper
from lora.config import LoRAConfig
from lora.input_identity import PROBE, differing_settings, input_settings
from lora.loading import load_lora_adapters
from models.clip import FederatedCLIPModel
from models.clip_loading import TINY_FOLDER
from models.errors import UserError
from tests.lora_models import disturb, small_clip

CLASSES = ("cat", "dog", "frog")
HEAD = LoRAConfig.for_classification_head(r=2)


def tiny(classes: tuple[str, ...] | None = CLASSES, folder: Path | str = "tiny", **options: Any) -> Any:
    count = len(classes or CLASSES)
    return FederatedCLIPModel(str(folder), count, class_names=classes, strategy="lora", **options)


def trained(folder: Path, config: LoRAConfig) -> tuple[Any, Path]:
    model = CLIPLoRAWrapper(tiny(), config).apply_lora_to_federated_model()
    disturb(model)
    return model.federated_model, save_lora_adapters(model, folder)


def changed_folder(target: Path, file: str, **changes: Any) -> Path:
    shutil.copytree(TINY_FOLDER, target)
    content = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps({**content, **changes}))
    return target


@pytest.mark.parametrize(
    ("file", "changes", "name"),
    [
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}, "image_shift"),
        ("preprocessor_config.json", {"image_std": [0.5, 0.5, 0.5]}, "image_scale"),
        ("preprocessor_config.json", {"resample": 2}, "image_resample"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 40}}, "image_size"),
    ],
)
def test_a_base_that_prepares_its_inputs_in_another_way_is_refused(
    file: str, changes: dict[str, Any], name: str, tmp_path: Path
) -> None:
    _, folder = trained(tmp_path / "adapter", LoRAConfig(r=2))
    other = tiny(folder=changed_folder(tmp_path / "clip", file, **changes))
    with pytest.raises(UserError, match=rf"another way.*{name}.*--any-base"):
        load_lora_adapters(other, folder)
    load_lora_adapters(other, folder, check_base=False)


def test_a_base_with_the_words_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    _, folder = trained(tmp_path / "adapter", LoRAConfig(r=2))
    content = json.loads((TINY_FOLDER / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["a</w>"], words["cat</w>"] = words["cat</w>"], words["a</w>"]
    other = tiny(folder=changed_folder(tmp_path / "clip", "tokenizer.json", model=content["model"]))
    with pytest.raises(UserError, match=r"another way.*tokens"):
        load_lora_adapters(other, folder)


def test_settings_that_one_side_does_not_know_do_not_differ() -> None:
    mine = input_settings(tiny())
    assert {"image_size", "image_crop", "image_scale", "image_shift", "tokens"} <= set(mine)
    assert len(mine["tokens"]) > len(PROBE.split())
    assert differing_settings(mine, json.loads(json.dumps(mine))) == []
    assert differing_settings(mine, {}) == differing_settings(mine, None) == []
    assert input_settings(small_clip()) == {}


@pytest.mark.parametrize("config", [LoRAConfig(r=2), HEAD], ids=["head", "its-adapter"])
def test_a_head_is_loaded_by_the_names_of_its_classes(config: LoRAConfig, tmp_path: Path) -> None:
    model, folder = trained(tmp_path, config)
    images = torch.randn(4, model.embedding_dim, generator=torch.Generator().manual_seed(0))
    order = ("frog", "cat", "dog")
    other = tiny(order)
    load_lora_adapters(other, folder)
    with torch.no_grad():
        wanted, found = (m.logits({"image_features": images}) for m in (model, other))
    columns = [CLASSES.index(name) for name in order]
    torch.testing.assert_close(found, wanted[:, columns], rtol=1e-5, atol=1e-4)


def test_a_head_of_other_classes_is_refused_and_they_are_named(tmp_path: Path) -> None:
    _, folder = trained(tmp_path, LoRAConfig(r=2))
    with pytest.raises(UserError, match=r"differ in \['frog', 'horse'\]"):
        load_lora_adapters(tiny(("cat", "dog", "horse")), folder)
    load_lora_adapters(tiny(None), folder)  # a model without names takes the head as it is


def test_an_adapter_of_a_head_goes_with_the_prompts_that_made_the_head(tmp_path: Path) -> None:
    _, folder = trained(tmp_path, HEAD)
    with pytest.raises(UserError, match=r"task\.templates"):
        load_lora_adapters(tiny(templates=("a drawing of a {}",)), folder)
