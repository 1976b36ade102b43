"""Claims about images as tensors and the order of batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PilImage

from federated.data.batch_order import index_batches, local_index_batches, steps_per_epoch
from federated.data.dataset import FederatedData, ImageTensors, image_tensors
from models.errors import UserError

SIZE = 8
NUM_ROWS = 20
MEAN = torch.tensor([0.48, 0.46, 0.41])[:, None, None]
DEVIATION = torch.tensor([0.27, 0.26, 0.28])[:, None, None]


class Counting:
    """A processor like CLIP's (resize to 8-bit, scale, normalise) that counts what it decodes."""

    def __init__(self):
        self.num_calls = 0

    def __call__(self, image: PilImage.Image) -> torch.Tensor:
        self.num_calls += 1
        pixels = np.array(image.resize((SIZE, SIZE), PilImage.Resampling.BICUBIC))
        return (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - MEAN) / DEVIATION


def averaging(image: PilImage.Image) -> torch.Tensor:
    """A processor with values between the 8-bit ones, though one of 256 wherever an image is of one grey."""
    pixels = torch.from_numpy(np.array(image.resize((SIZE, SIZE)))).permute(2, 0, 1).float() / 255
    return (pixels + pixels.flip(-1)) / 2


def vignette(image: PilImage.Image) -> torch.Tensor:
    """A processor that does not even keep one grey: brightness falls off to the side."""
    return averaging(image) * torch.linspace(1, 0.5, SIZE)


def rows(count: int = NUM_ROWS) -> Dataset:
    rng = np.random.default_rng(0)
    shapes = [(9, 12, 3), (16, 8, 3), (5, 5)]  # colour of two shapes, and grey
    images = [
        PilImage.fromarray(rng.integers(0, 256, shapes[number % 3], dtype=np.uint8))
        for number in range(count)
    ]
    columns = {
        "image": images,
        "label": [number % 4 for number in range(count)],
        "caption": [f"number {number}" for number in range(count)],
        "concept": [f"concept {number // 2}" for number in range(count)],
    }
    names = ClassLabel(names=list("abcd"))
    features = {"image": Image(), "label": names, "caption": Value("string"), "concept": Value("string")}
    return Dataset.from_dict(columns, features=Features(features))


def oracle(dataset: Dataset, preprocess) -> torch.Tensor:
    return torch.stack([preprocess(image.convert("RGB")) for image in dataset["image"]])


FLOAT_BYTES = NUM_ROWS * 3 * SIZE * SIZE * 4


@pytest.mark.parametrize(
    ("preprocess", "cache_bytes", "mode"),
    [
        (Counting(), FLOAT_BYTES, "uint8"),
        (Counting(), FLOAT_BYTES // 4, "uint8"),
        (Counting(), FLOAT_BYTES // 4 - 1, "decode"),
        (Counting(), 0, "decode"),
        (averaging, FLOAT_BYTES, "float"),
        (averaging, FLOAT_BYTES - 1, "decode"),
        (vignette, FLOAT_BYTES, "float"),
        (vignette, FLOAT_BYTES - 1, "decode"),
    ],
)
def test_every_way_of_keeping_images_gives_the_processors_output_bit_by_bit(preprocess, cache_bytes, mode):
    dataset = rows()
    tensors = ImageTensors(dataset, preprocess, cache_bytes=cache_bytes)
    expected = oracle(dataset, preprocess)
    for chosen in ([3, 1, 3], range(NUM_ROWS), [0], range(NUM_ROWS)):
        indices = np.asarray(chosen)
        assert torch.equal(tensors.pixel_values(indices), expected[indices])
    assert tensors.mode == mode
    kept = tensors._kept
    assert (0 if kept is None else kept.numel() * kept.element_size()) <= cache_bytes


def test_images_kept_as_bytes_stay_right_after_one_that_cannot_be():
    grey = PilImage.new("RGB", (SIZE, SIZE), (7, 80, 200))
    columns = {"image": [grey, *rows(4)["image"]]}
    dataset = Dataset.from_dict(columns, features=Features({"image": Image()}))
    tensors = ImageTensors(dataset, averaging)
    expected = oracle(dataset, averaging)
    for mode, chosen in (("uint8", [0]), ("float", [2]), ("float", [0, 1, 2, 3, 4])):
        assert torch.equal(tensors.pixel_values(chosen), expected[chosen])
        assert tensors.mode == mode


def test_images_are_decoded_once_and_only_when_asked_for():
    preprocess = Counting()
    tensors = ImageTensors(rows(), preprocess)
    at_start = preprocess.num_calls
    tensors.pixel_values([2, 5])
    tensors.pixel_values([5, 2, 7])
    assert preprocess.num_calls == at_start + 3
    for _ in range(3):
        for _ in tensors.batches(None, 6, rng=None):
            pass
    assert preprocess.num_calls == at_start + NUM_ROWS


def test_a_batch_holds_what_the_data_has():
    columns = {"label_column": "label", "caption_column": "caption", "concept_column": "concept"}
    batch = ImageTensors(rows(), Counting(), **columns).batch([4, 5, 9])
    assert batch["pixel_values"].shape == (3, 3, SIZE, SIZE)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["index"].tolist() == [4, 5, 9]
    assert batch["labels"].tolist() == [0, 1, 1]
    assert batch["captions"] == ["number 4", "number 5", "number 9"]
    assert batch["concept"][0] == batch["concept"][1] != batch["concept"][2]
    assert set(ImageTensors(rows(), Counting()).batch([0])) == {"pixel_values", "index"}


def test_batches_of_one_pass_hold_every_row_once():
    tensors = ImageTensors(rows(), Counting(), label_column="label")
    for rng in (None, np.random.default_rng(0)):
        batches = list(tensors.batches(None, 6, rng=rng))
        assert [len(batch["index"]) for batch in batches] == [6, 6, 6, 2]
        order = torch.cat([batch["index"] for batch in batches]).tolist()
        assert sorted(order) == list(range(NUM_ROWS))
        assert (order == list(range(NUM_ROWS))) == (rng is None)
        for batch in batches:
            assert torch.equal(batch["labels"], batch["index"] % 4)
    full = list(tensors.batches(range(15), 6, rng=None, drop_last=True))
    assert [len(batch["index"]) for batch in full] == [6, 6]


@pytest.mark.parametrize(
    ("num_rows", "batch_size"), [(1, 32), (31, 32), (32, 32), (33, 32), (100, 32), (7, 1)]
)
def test_local_batches_see_every_row_once_a_pass_and_are_never_empty(num_rows, batch_size):
    shard = np.arange(1000, 1000 + num_rows)
    per_pass = steps_per_epoch(num_rows, batch_size)
    steps = list(local_index_batches(shard, batch_size, 3 * per_pass, np.random.default_rng(0)))
    sizes = [len(step) for step in steps]
    assert max(sizes) <= batch_size
    assert min(sizes) >= max(1, max(sizes) - 1)
    for start in range(0, len(steps), per_pass):
        assert np.array_equal(np.sort(np.concatenate(steps[start : start + per_pass])), shard)


def test_local_batches_reshuffle_and_are_a_function_of_the_generator():
    first, again, other = (
        list(local_index_batches(np.arange(20), 20, 3, np.random.default_rng(seed))) for seed in (0, 0, 1)
    )
    assert all(map(np.array_equal, first, again))
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], other[0])
    assert len(list(local_index_batches(np.arange(5), 2, 0, np.random.default_rng(0)))) == 0


def test_empty_shards_and_batch_sizes_below_one_are_refused():
    with pytest.raises(UserError, match="without training samples"):
        next(local_index_batches([], 4, 1, np.random.default_rng(0)))
    with pytest.raises(UserError, match="batch_size is 0"):
        next(local_index_batches([1], 0, 1, np.random.default_rng(0)))
    with pytest.raises(UserError, match="batch_size is 0"):
        next(index_batches([1], 0, rng=None))
    with pytest.raises(UserError, match="no samples"):
        ImageTensors(rows(1).select([]), Counting())
    with pytest.raises(UserError, match="no column 'picture'"):
        ImageTensors(rows(1), Counting(), image_column="picture")


def test_an_image_that_turns_out_corrupt_is_named(tmp_path):
    paths = []
    for number in range(3):
        paths.append(str(tmp_path / f"{number}.png"))
        PilImage.new("RGB", (4, 4)).save(paths[-1])
    dataset = Dataset.from_dict({"image": paths}, features=Features({"image": Image()}))
    tensors = ImageTensors(dataset, Counting())
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1\.png \(row 1\) cannot be decoded"):
        tensors.pixel_values([2, 1])


def test_image_tensors_knows_the_columns_of_federated_data():
    dataset = rows()
    data = FederatedData(
        dataset, None, dataset, tuple("abcd"), "label", "image", "caption", None, "made here"
    )
    assert set(image_tensors(data, "test", Counting()).batch([0])) == {
        "pixel_values",
        "index",
        "labels",
        "captions",
        "text",
    }
    with pytest.raises(UserError, match="no validation split"):
        image_tensors(data, "validation", Counting())
