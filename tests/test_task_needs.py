"""What a task needs of the data is asked for before a run folder is made."""

from __future__ import annotations

import pytest
from datasets import Features, Image, Value

from federated.cli import main
from tests.test_data_tables import pictures, write_csv, write_hub_folder, write_images


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub_cache")


@pytest.mark.parametrize("command", ["run", "train"])
@pytest.mark.parametrize(
    ("task", "case", "message"),
    [
        ("retrieval", "imagefolder", "task.name=retrieval needs captions"),
        ("retrieval", "labels.csv", "data.options.caption_column"),
        ("classification", "captions.csv", "data.options.label_column"),
        ("zero_shot", "captions.csv", "task.name=zero_shot needs labels"),
        ("retrieval", "lists", "holds a list"),
        ("classification", "no_label_in_test", r"has no column 'label'"),
        ("classification", "empty_test", "header and no rows"),
        ("classification", "empty_train", "header and no rows"),
    ],
)
def test_data_without_what_the_task_needs_end_with_code_two_and_leave_nothing(
    command, task, case, message, tmp_path, capsys
):
    root = tmp_path / "data"
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            write_images(root / "imagefolder" / split / name, 6)
    write_images(root, 12)
    lines = [
        *[f"{number}.png,{'cat' if number % 2 else 'dog'},train" for number in range(12)],
        "1.png,dog,test",
    ]
    write_csv(root / "labels.csv", "image,label,split", lines)
    write_csv(root / "captions.csv", "image,caption,split", lines)
    for folder, train, test in (
        ("no_label_in_test", lines[:12], None),
        ("empty_test", lines[:12], []),
        ("empty_train", [], lines[12:]),
    ):
        write_images(root / folder, 12)
        write_csv(root / folder / "train.csv", "image,label,place", train)
        header = "image,place" if test is None else "image,label,place"
        write_csv(root / folder / "test.csv", header, ["0.png,a"] if test is None else test)
    if case == "lists":
        columns = {"image": pictures(2), "caption": [["a", "b"], ["c"]]}
        features = Features({"image": Image(), "caption": [Value("string")]})
        write_hub_folder(root / "lists", features, {"train": columns, "test": columns})
    source = {"imagefolder": "imagefolder", "lists": "hub"}.get(case, "csv")
    options = ["data.options.caption_column=caption"] if case == "lists" else []
    with pytest.raises(SystemExit) as end:
        main(
            [
                command, "quickstart", f"task.name={task}", f"data.source={source}",
                f"data.path={root / case}", "model.num_classes=null",
                f"output.root={tmp_path / 'runs'}", *options,
            ]
        )  # fmt: skip
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "error: " in error
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["run", "train", "evaluate"])
@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("data.options={path: /x}", "data.options.path"),
        ("data.options={seed: 1}", "data.options.seed"),
        ("data.options={max_train_samples: 3}", "data.options.max_train_samples"),
        ("partition.options={num_clients: 1}", "partition.options.num_clients"),
        ("partition.options={dataset: 3}", "partition.options.dataset"),
        ("model.device=meta", "device 'meta'"),
    ],
)
def test_what_no_run_can_do_is_one_message(command, override, key, tmp_path, capsys):
    small = ["data.max_train_samples=400", "data.max_test_samples=10", f"output.root={tmp_path / 'runs'}"]
    if command in ("train", "evaluate") and override.startswith("partition"):
        pytest.skip("there is one shard")
    with pytest.raises(SystemExit) as end:
        main([command, "quickstart", *small, override])
    assert end.value.code == 2
    assert key in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
