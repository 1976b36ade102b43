"""Claims about predict, encode, search and compare, made through the command line."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch.nn import functional

import federated.tools.search
from federated.cli import main
from federated.config.config_files import dump_config, load_config
from federated.engines.simulation import run_experiment
from federated.rounds.build import load_run_data
from federated.tools.embedding_files import weights_sha256
from federated.tools.search import nearest_rows
from federated.tools.trained_models import open_model
from lora import LoRAConfig
from lora.adapter_saving import save_full_checkpoint, save_lora_adapters
from lora.adapters import adapter_parameters, factor_of, scalings, set_scaling
from lora.injection import inject_lora
from models.clip import FederatedCLIPModel
from models.clip_loading import load_clip
from tests.command import fedlora

SMALL = (
    "federation.rounds=1",
    "partition.num_clients=2",
    "client.local_steps=1",
    "client.batch_size=4",
    "data.max_train_samples=100",
    "data.max_test_samples=50",
)
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 230)}
CLASSES = "red,green,blue"


def records(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict]:
    code, output, _ = fedlora(capsys, *arguments, "--format", "json")
    assert code == 0
    return json.loads(output)


def make_images(folder: Path, per_colour: int = 3) -> Path:
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(per_colour):
            pixels = np.clip(np.array(colour) + rng.integers(-40, 40, (40, 30 + number, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


def change_adapter(folder: Path) -> None:
    """Give the adapter in a folder other weights, as another training would."""
    path = folder / "adapter_model.safetensors"
    state = {name: tensor + 0.05 for name, tensor in load_file(path).items()}
    path.write_bytes(save(state, {"format": "pt"}))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_experiment(
        load_config("quickstart", [*SMALL, f"output.root={tmp_path_factory.mktemp('runs')}"])
    )


@pytest.fixture(scope="module")
def merged_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose aggregator put part of what was learnt into the base weights."""
    root = tmp_path_factory.mktemp("merged")
    options = ("aggregation.name=flora", "client.learning_rate=0.02", f"output.root={root}")
    return run_experiment(load_config("quickstart", [*SMALL, *options]))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on both towers of the bundled model that changes its embeddings much."""
    model = FederatedCLIPModel("tiny", 2, task="zero_shot", strategy="lora")
    inject_lora(model, LoRAConfig(r=2, lora_alpha=4))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if factor_of(name) == "lora_B":
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return save_lora_adapters(model, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def corrupt_images(tmp_path: Path) -> Path:
    folder = make_images(tmp_path / "corrupt", per_colour=1)
    (folder / "red" / "broken.png").write_bytes(b"no image")
    content = (folder / "green" / "0.png").read_bytes()
    (folder / "blue" / "cut off.png").write_bytes(content[: len(content) // 2])
    return folder


@pytest.fixture(scope="module")
def index(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / "images.safetensors"
    with pytest.raises(SystemExit, match="0"):
        main(["encode", "tiny", str(images), "--output", str(path)])
    return path


@pytest.fixture(scope="module")
def places(run, merged_run, adapter, images, index) -> dict[str, Path]:
    return {"run": run, "merged_run": merged_run, "adapter": adapter, "images": images, "index": index}


def naive_features(files: list[Path]) -> torch.Tensor:
    """Image features of the bundled model, one image at a time."""
    loaded = load_clip("tiny")
    with torch.no_grad():
        rows = [loaded.encode_image(loaded.clip, loaded.preprocess(Image.open(f))[None]) for f in files]
    return torch.cat(rows)


def naive_text_features(texts: list[str]) -> torch.Tensor:
    loaded = load_clip("tiny")
    with torch.no_grad():
        return torch.cat([loaded.encode_text(loaded.clip, loaded.tokenize([text])) for text in texts])


# ---- predict


@pytest.mark.parametrize("kind", ["run", "merged_run"])
def test_predictions_of_a_run_have_the_accuracy_and_loss_that_it_reported(kind, request, tmp_path, capsys):
    run = request.getfixturevalue(kind)
    data = load_run_data(load_config(run / "config.yaml"))
    for number, row in enumerate(data.test):
        folder = tmp_path / str(row["label"])
        folder.mkdir(exist_ok=True)
        row["image"].save(folder / f"{number}.png")
    found = records(capsys, "predict", run, tmp_path, "--top-k", 10)
    rights = [row for row in found if row["class"] == data.class_names[int(Path(row["image"]).parent.name)]]
    reported = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert len(rights) == 50
    assert np.mean([row["rank"] == 1 for row in rights]) == pytest.approx(reported["accuracy"], abs=1e-9)
    loss = -np.mean([np.log(row["probability"]) for row in rights])
    # probabilities are printed with a few digits, which a large loss feels: 2e-4 of it at most, seen
    assert loss == pytest.approx(reported["loss"], rel=1e-3, abs=1e-3)


def test_probabilities_are_sorted_and_those_of_all_classes_sum_to_one(run, images, capsys):
    rows = records(capsys, "predict", run, images / "red" / "0.png", "--top-k", 99)
    values = [row["probability"] for row in rows]
    assert [row["rank"] for row in rows] == list(range(1, 11))
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(1, abs=1e-4)


def test_class_prompts_classify_as_a_naive_zero_shot_clip_does(images, capsys):
    files = sorted(images.rglob("*.png"))
    found = records(capsys, "predict", "--model", "tiny", "--classes", CLASSES, images, "--top-k", 3)
    texts = functional.normalize(
        naive_text_features([f"a photo of a {n}." for n in CLASSES.split(",")]), dim=-1
    )
    scale = load_clip("tiny").clip.logit_scale.detach().exp()
    wanted = (scale * functional.normalize(naive_features(files), dim=-1) @ texts.T).softmax(dim=-1)
    assert sorted({row["image"] for row in found}) == [str(file) for file in files]
    for row in found:
        value = wanted[files.index(Path(row["image"])), CLASSES.split(",").index(row["class"])]
        assert row["probability"] == pytest.approx(float(value), abs=2e-5)


def test_a_plain_adapter_is_used_with_or_without_naming_its_base_model(adapter, images, capsys):
    by_folder = records(capsys, "predict", adapter, images, "--classes", CLASSES)
    by_model = records(
        capsys, "predict", "--model", "tiny", "--adapter", adapter, "--classes", CLASSES, images
    )
    plain = records(capsys, "predict", "tiny", images, "--classes", CLASSES)
    assert by_folder == by_model
    assert by_folder != plain


def test_an_adapter_of_another_base_is_refused_unless_any_base_is_given(images, tmp_path, capsys):
    model = FederatedCLIPModel("tiny", 2, pretrained=False, task="zero_shot", strategy="lora")
    targets = ["q_proj", "k_proj", "v_proj", "out_proj"]  # as quickstart has them
    inject_lora(model, LoRAConfig(r=8, lora_alpha=16, target_components=["vision"], target_modules=targets))
    folder = save_lora_adapters(model, tmp_path / "adapter")
    commands = (
        ("predict", "tiny", images, "--classes", CLASSES),
        ("encode", "tiny", images, "--output", tmp_path / "e.npy"),
        ("evaluate", "quickstart", *SMALL, "--output", tmp_path / "evaluation"),
    )
    for command in commands:
        code, _, error = fedlora(capsys, *command, "--adapter", folder)
        assert (code, "--any-base" in error) == (2, True)
        assert fedlora(capsys, *command, "--adapter", folder, "--any-base")[0] == 0
    assert fedlora(capsys, "search", tmp_path / "e.npy", "red")[0] == 0  # the index names the very weights


def test_the_adapter_folder_of_a_run_stands_for_the_run(run, images, capsys):
    assert records(capsys, "predict", run / "adapter", images) == records(capsys, "predict", run, images)


def test_classes_given_to_a_run_are_scored_by_prompts_with_its_adapter(run, images, capsys):
    code, output, _ = fedlora(capsys, "predict", run, images, "--classes", CLASSES)
    assert code == 0
    assert "Predictions by class prompts" in output
    code, output, _ = fedlora(capsys, "predict", run, images)
    assert "Predictions by head" in output


def test_batch_size_does_not_change_predictions(run, images, capsys):
    one, all_at_once = (
        records(capsys, "predict", run, images, "--batch-size", size, "--top-k", 10) for size in (1, 64)
    )
    assert [row["class"] for row in one] == [row["class"] for row in all_at_once]
    np.testing.assert_allclose(
        [row["probability"] for row in one], [row["probability"] for row in all_at_once], atol=1e-5
    )


def test_csv_json_and_files_hold_the_same_rows(run, images, tmp_path, capsys):
    as_json = records(capsys, "predict", run, images)
    _, text, _ = fedlora(capsys, "predict", run, images, "--format", "csv")
    as_csv = list(csv.DictReader(io.StringIO(text)))
    assert [{key: str(value) for key, value in row.items()} for row in as_json] == as_csv
    for name in ("p.csv", "p.json"):
        assert fedlora(capsys, "predict", run, images, "--output", tmp_path / name)[0] == 0
    assert (tmp_path / "p.csv").read_text(encoding="utf-8") == text
    assert json.loads((tmp_path / "p.json").read_text(encoding="utf-8")) == as_json


def test_corrupt_images_are_all_named_and_nothing_is_written(corrupt_images, run, tmp_path, capsys):
    output = tmp_path / "p.json"
    code, _, error = fedlora(capsys, "predict", run, corrupt_images, "--output", output, "--batch-size", 1)
    assert code == 2
    assert "red/broken.png" in error
    assert "blue/cut off.png" in error
    assert "--skip-corrupt" in error
    assert not output.exists()
    assert not list(tmp_path.glob("*.part"))


def test_skip_corrupt_names_what_is_left_out_and_predicts_the_rest(corrupt_images, run, capsys):
    code, output, error = fedlora(
        capsys, "predict", run, corrupt_images, "--skip-corrupt", "--format", "json"
    )
    assert code == 0
    assert len({row["image"] for row in json.loads(output)}) == 3
    assert "red/broken.png" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{images}"], "only"),
        (["predict", "{run}", "{images}", "more"], "3 arguments"),
        (["predict", "tiny", "{images}"], "--classes"),
        (["predict", "tiny", "{images}", "--classes", "a"], "at least two"),
        (["predict", "tiny", "{images}", "--classes", "a,a"], "all different"),
        (["predict", "tiny", "{images}", "--classes", "a,b", "--template", "no place"], "{}"),
        (["predict", "tiny", "{images}", "--classes", "a,\udce9"], "is not UTF-8"),
        (["predict", "{run}", "{images}", "--template", "\udce9 {}"], "is not UTF-8"),
        (["predict", "{run}", "{tmp}/nowhere"], "nowhere: no such file or folder"),
        (["predict", "{run}", "{tmp}"], "holds no images"),
        (["predict", "{tmp}", "{images}"], "neither a run folder"),
        (["predict", "{run}", "{images}", "--adapter", "{adapter}"], "its own adapter"),
        (["predict", "{run}", "{images}", "--model", "tiny"], "leave --model out"),
        (["predict", "{run}", "{images}", "--device", "warp"], "device 'warp'"),
        (["predict", "{run}", "{images}", "--output", "{tmp}/p.dat"], "--format"),
        (["predict", "{run}", "{images}", "--output", "{tmp}/missing/p.csv"], "missing is no folder"),
        (["encode", "tiny", "{images}"], "--output"),
        (["encode", "tiny", "{images}", "--output", "{tmp}/e.txt"], ".safetensors or .npy"),
        (["encode", "tiny", "{images}", "--compare-base"], "no adapter"),
        (["encode", "{merged_run}", "{images}", "--compare-base"], "base weights too"),
        (["encode", "tiny", "{images}", "--text", "--output", "{tmp}/e.npy"], "no such file"),
        (["search", "{index}", " "], "query is empty"),
        (["search", "{index}", "caf\udce9"], "is not UTF-8"),
        (["search", "{index}", "{images}/green/1.png"], "1.png is an image file, not a text: pass --image"),
        (["search", "{index}", "{tmp}/no.png", "--image"], "no.png"),
        (["search", "{tmp}/none.npy", "red"], "none.npy.json is missing"),
        (["search", "/", "red"], ".json is missing"),
        (["compare", "{images}"], "not a run folder"),
    ],
)
def test_bad_input_ends_with_exit_code_2_and_a_message(arguments, message, places, tmp_path, capsys):
    filled = [
        argument.format(**places, tmp=tmp_path) if argument[0] == "{" else argument for argument in arguments
    ]
    code, _, error = fedlora(capsys, *filled)
    assert code == 2
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_global_model_is_refused(run, images, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = (copy / "config.yaml").read_text(encoding="utf-8").replace("name: fedavg", "name: fedsa")
    (copy / "config.yaml").write_text(config, encoding="utf-8")
    for command in (["predict", copy, images], ["evaluate", copy]):
        code, _, error = fedlora(capsys, *command)
        assert code == 2
        assert "fedsa, where only the clients hold complete models" in error
    assert not (copy / "evaluation_test").exists()


def test_a_run_of_full_fine_tuning_is_used_with_all_its_weights(run, images, tmp_path, capsys):
    config = load_config(run / "config.yaml", ["model.type=clip", "data.max_test_samples=2"])
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("metrics.jsonl", "partition.json"):
        shutil.copy(run / name, copy)
    (copy / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    model = FederatedCLIPModel("tiny", 10)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 100)
    save_full_checkpoint(model, copy / "adapter")
    files = sorted(images.rglob("*.png"))
    with torch.no_grad():
        pixels = torch.stack([model.preprocess(Image.open(file)) for file in files])
        wanted = model.logits({"pixel_values": pixels}).softmax(dim=-1).max(dim=-1).values.tolist()
    found = records(capsys, "predict", copy, images, "--top-k", 1)
    assert [row["probability"] for row in found] == pytest.approx(wanted, abs=1e-4)


# ---- encode


def test_rows_are_the_normalised_features_of_the_files_that_the_manifest_names(index, images):
    manifest = json.loads(index.with_name(index.name + ".json").read_text(encoding="utf-8"))
    rows = load_file(index)["embeddings"]
    files = [Path(manifest["folder"]) / row for row in manifest["rows"]]
    assert files == sorted(images.resolve().rglob("*.png"))
    assert torch.allclose(rows, functional.normalize(naive_features(files), dim=-1), atol=1e-5)
    assert manifest["array_sha256"] == hashlib.sha256(index.read_bytes()).hexdigest()
    assert (manifest["kind"], manifest["model"], manifest["adapter"]) == ("image", "tiny", None)
    assert (manifest["dimension"], manifest["dtype"], manifest["normalised"]) == (
        rows.shape[1],
        "float32",
        True,
    )


def test_npy_holds_the_same_array_and_raw_keeps_the_lengths(index, images, tmp_path, capsys):
    assert fedlora(capsys, "encode", "tiny", images, "--output", tmp_path / "a.npy")[0] == 0
    assert fedlora(capsys, "encode", "tiny", images, "--output", tmp_path / "b.npy", "--raw")[0] == 0
    normalised, raw = (torch.from_numpy(np.load(tmp_path / name)) for name in ("a.npy", "b.npy"))
    assert torch.equal(normalised, load_file(index)["embeddings"])
    assert not torch.allclose(raw.norm(dim=-1), torch.ones(len(raw)), atol=1e-2)
    assert torch.allclose(functional.normalize(raw, dim=-1), normalised, atol=1e-6)


def test_encoding_twice_gives_equal_files(index, images, tmp_path, capsys):
    again = tmp_path / index.name
    assert fedlora(capsys, "encode", "tiny", images, "--output", again)[0] == 0
    for name in (index.name, index.name + ".json"):
        assert (tmp_path / name).read_bytes() == (index.parent / name).read_bytes()


def test_a_file_of_texts_without_text_is_not_taken_for_a_broken_image(images, tmp_path, capsys):
    texts, nameless, output = tmp_path / "t.txt", tmp_path / "nameless", tmp_path / "e.npy"
    texts.write_text("a red bag\n", encoding="utf-8")
    code, _, error = fedlora(capsys, "encode", "tiny", texts, "--output", output)
    assert code == 2
    assert "t.txt is no image: pass --text" in error
    assert not output.exists()
    shutil.copy(images / "green" / "1.png", nameless)
    assert fedlora(capsys, "encode", "tiny", nameless, "--output", output)[0] == 0  # an image by its content


def test_an_encoded_file_is_replaced_only_when_told(adapter, images, tmp_path, capsys):
    output = tmp_path / "e.npy"
    assert fedlora(capsys, "encode", "tiny", images, "--output", output)[0] == 0
    before = output.read_bytes()
    arguments = ("encode", adapter, images, "--output", output)
    code, _, error = fedlora(capsys, *arguments)
    assert code == 2
    assert "--overwrite" in error
    assert output.read_bytes() == before
    assert fedlora(capsys, *arguments, "--overwrite")[0] == 0
    assert output.read_bytes() != before


def test_a_corrupt_image_stops_encoding_before_anything_is_written(corrupt_images, tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    code, _, error = fedlora(capsys, "encode", "tiny", corrupt_images, "--output", folder / "e.npy")
    assert code == 2
    assert "2 images cannot be decoded" in error
    assert list(folder.iterdir()) == []


def test_the_manifest_lists_the_corrupt_images_left_out(corrupt_images, tmp_path, capsys):
    output = tmp_path / "e.npy"
    assert fedlora(capsys, "encode", "tiny", corrupt_images, "--output", output, "--skip-corrupt")[0] == 0
    manifest = json.loads((tmp_path / "e.npy.json").read_text(encoding="utf-8"))
    assert manifest["corrupt"] == ["blue/cut off.png", "red/broken.png"]
    assert manifest["rows"] == ["blue/0.png", "green/0.png", "red/0.png"]
    assert len(np.load(output)) == 3


def test_a_text_file_gives_one_row_a_line(tmp_path, capsys):
    texts = ["a red bag", "chó", "two shoes on a very long table in the garden"]
    (tmp_path / "t.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    output = tmp_path / "t.safetensors"
    assert fedlora(capsys, "encode", "tiny", tmp_path / "t.txt", "--text", "--output", output)[0] == 0
    wanted = functional.normalize(naive_text_features(texts), dim=-1)
    assert torch.allclose(load_file(output)["embeddings"], wanted, atol=1e-5)


def test_an_empty_line_is_named(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("one\n\nthree\n", encoding="utf-8")
    code, _, error = fedlora(
        capsys, "encode", "tiny", tmp_path / "t.txt", "--text", "--output", tmp_path / "t.npy"
    )
    assert code == 2
    assert "t.txt, line 2" in error


def test_a_picture_stored_sideways_is_embedded_upright(tmp_path, capsys):
    upright = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # EXIF orientation: turn by 90 degrees clockwise to view
    upright.save(tmp_path / "a.png")
    upright.rotate(90, expand=True).save(tmp_path / "b.png", exif=exif)
    assert fedlora(capsys, "encode", "tiny", tmp_path, "--output", tmp_path / "e.npy")[0] == 0
    rows = np.load(tmp_path / "e.npy")
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)


def mean_cosine(output: str) -> float:
    return float(output.rpartition("mean ")[2].partition(",")[0])


def test_compare_base_prints_the_mean_cosine_of_adapted_and_base_embeddings(
    adapter, images, tmp_path, capsys
):
    arguments = ("encode", adapter, images, "--compare-base", "--batch-size", 4)
    code, output, _ = fedlora(capsys, *arguments, "--output", tmp_path / "adapted.npy")
    assert code == 0
    assert fedlora(capsys, "encode", "tiny", images, "--output", tmp_path / "base.npy")[0] == 0
    adapted, base = (np.load(tmp_path / f"{name}.npy") for name in ("adapted", "base"))
    wanted = float((adapted * base).sum(axis=1).mean())
    assert wanted < 0.99
    assert mean_cosine(output) == pytest.approx(wanted, abs=1e-5)


# ---- search


def test_a_text_finds_the_images_in_the_order_of_their_cosines(index, images, capsys):
    files = sorted(images.rglob("*.png"))
    found = records(capsys, "search", index, "a red square", "--top-k", 4)
    cosines = functional.cosine_similarity(naive_features(files), naive_text_features(["a red square"]))
    order = cosines.argsort(descending=True)[:4].tolist()
    assert [row["image"] for row in found] == [str(files[row].resolve()) for row in order]
    assert [row["score"] for row in found] == pytest.approx(cosines[order].tolist(), abs=1e-5)


def test_an_image_finds_itself_first(index, images, capsys):
    found = records(capsys, "search", index, images / "green" / "1.png", "--image")
    assert found[0]["image"].endswith("green/1.png")
    assert found[0]["score"] == pytest.approx(1, abs=1e-5)
    assert len(found) == 9


def test_an_index_of_texts_answers_with_texts(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("a dog\na bag\na shoe\n", encoding="utf-8")
    fedlora(capsys, "encode", "tiny", tmp_path / "t.txt", "--text", "--raw", "--output", tmp_path / "t.npy")
    found = records(capsys, "search", tmp_path / "t.npy", "a bag", "--top-k", 1)
    assert found == [{"rank": 1, "score": pytest.approx(1, abs=1e-5), "text": "a bag"}]


def test_faiss_and_torch_find_the_same_rows_also_among_equal_ones():
    pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(500, 16, generator=generator)
    rows[100:120] = rows[:20]
    for number in range(20):
        query = rows[number] + 0.1 * torch.randn(16, generator=generator)
        (faiss_rows, faiss_scores), (torch_rows, torch_scores) = (
            nearest_rows(rows, query, 7, engine=engine) for engine in ("faiss", "torch")
        )
        assert faiss_rows.tolist() == torch_rows.tolist()
        assert faiss_scores.tolist() == torch_scores.tolist()
        assert faiss_rows[:2].tolist() == [number, number + 100]
        wanted = functional.cosine_similarity(rows.double(), query.double(), dim=-1)
        assert torch_scores.tolist() == pytest.approx(wanted.topk(7).values.tolist(), abs=1e-12)


def test_search_prints_the_same_without_faiss(index, capsys, monkeypatch):
    before = fedlora(capsys, "search", index, "a blue square", "--format", "csv")
    monkeypatch.setattr(federated.tools.search, "default_engine", lambda: "torch")
    assert fedlora(capsys, "search", index, "a blue square", "--format", "csv") == before


def test_search_opens_the_run_that_made_the_index_and_notices_when_it_changed(run, images, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = tmp_path / "i.npy"
    assert fedlora(capsys, "encode", copy, images, "--output", path)[0] == 0
    assert fedlora(capsys, "search", path, "red")[0] == 0
    assert fedlora(capsys, "search", path, "red", "--model", run)[0] == 0  # the same weights elsewhere
    change_adapter(copy / "adapter")
    code, _, error = fedlora(capsys, "search", path, "red")
    assert (code, "is damaged: adapter_model" in error) == (2, True)
    (copy / "adapter" / "manifest.json").unlink()  # as another training would leave it: all of one piece
    code, _, error = fedlora(capsys, "search", path, "red")
    assert code == 2
    assert "other weights" in error


def test_search_with_another_adapter_than_the_index_has_is_refused(index, adapter, capsys):
    code, _, error = fedlora(capsys, "search", index, "red", "--adapter", adapter)
    assert code == 2
    assert "adapter none" in error
    assert str(adapter) in error


def test_weights_are_told_apart_by_the_scaling_of_the_adapter_too(adapter):
    clip = open_model(adapter).model.clip
    before = weights_sha256(clip)
    assert weights_sha256(open_model(adapter).model.clip) == before
    set_scaling(clip, {module: 2 * value for module, value in scalings(clip).items()})
    assert weights_sha256(clip) != before


def test_an_array_that_is_not_the_manifests_is_noticed(index, tmp_path, capsys):
    for name in (index.name, index.name + ".json"):
        shutil.copy(index.parent / name, tmp_path / name)
    content = bytearray((tmp_path / index.name).read_bytes())
    content[-1] ^= 1
    (tmp_path / index.name).write_bytes(content)
    code, _, error = fedlora(capsys, "search", tmp_path / index.name, "red")
    assert code == 2
    assert "not the file that its manifest describes" in error


# ---- compare, and all of them


def test_compare_shows_a_row_a_run_and_writes_its_files(run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = (other / "config.yaml").read_text(encoding="utf-8")
    (other / "config.yaml").write_text(config.replace("seed: 0", "seed: 1"), encoding="utf-8")
    code, output, _ = fedlora(capsys, "compare", run, other, "--output", tmp_path / "compared")
    assert code == 0
    assert "quickstart" in output
    assert "seed differs: 0 in quickstart; 1 in other." in output
    names = {path.name for path in (tmp_path / "compared").iterdir()}
    assert {"comparison.md", "comparison.json", "comparison.csv", "comparison.png"} <= names


@pytest.mark.parametrize("command", ["predict", "encode", "search", "compare"])
def test_help_shows_an_example(command, capsys):
    code, output, _ = fedlora(capsys, command, "--help")
    assert code == 0
    assert f"Example: fedlora {command}" in output


def test_progress_is_drawn_on_no_pipe(run, images, capsys):
    assert fedlora(capsys, "predict", run, images)[2] == ""


def test_search_writes_its_rows_to_a_file_and_replaces_none_unasked(tmp_path, capsys):
    texts, index = tmp_path / "texts.txt", tmp_path / "texts.safetensors"
    texts.write_text("a red bag\na blue shoe\n", encoding="utf-8")
    assert fedlora(capsys, "encode", "tiny", texts, "--text", "--output", index)[0] == 0
    hits = tmp_path / "hits.csv"
    assert fedlora(capsys, "search", index, "a red bag", "--top-k", 1, "--output", hits)[0] == 0
    printed = fedlora(capsys, "search", index, "a red bag", "--top-k", 1, "--format", "csv")[1]
    assert hits.read_text(encoding="utf-8") == printed
    assert "a red bag" in printed
    status, _, errors = fedlora(capsys, "search", index, "a red bag", "--output", hits)
    assert status == 2
    assert "--overwrite" in errors
