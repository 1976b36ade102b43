"""Images of every mode are shown to a model as a viewer shows them, or refused by name."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from federated.config.config_files import load_config
from federated.data.dataset import load_data
from federated.data.folders import check_folder
from federated.data.image_tensors import ImageTensors
from federated.rounds.run import build_run
from federated.tools.embeddings import InputOptions, image_batches
from models.errors import UserError
from models.image_modes import load_image, rgb_image
from models.images import ImageProcessor
from tests.command import fedlora
from tests.test_data_tables import write_csv

SIZE = 8


def plain_processor(background: str = "white") -> ImageProcessor:
    """Pixel values as they are, (3, H, W)."""
    processor = ImageProcessor.from_values(
        size=None, crop=None, resample=Image.Resampling.NEAREST, factor=1.0, mean=[0.0] * 3, std=[1.0] * 3
    )
    return type(processor)(**{**processor.__dict__, "background": background})


@pytest.fixture
def grey() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)


@pytest.fixture
def colours() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 4), dtype=np.uint8)


def over(rgba: np.ndarray, background: int) -> np.ndarray:
    """Plain alpha compositing in floats."""
    alpha = rgba[..., 3:].astype(np.float64) / 255
    return rgba[..., :3] * alpha + background * (1 - alpha)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I"])
def test_sixteen_bits_are_scaled_to_eight(mode: str) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (SIZE, SIZE))
    values[0, :2] = 0, 65535
    if mode == "I":
        image = Image.fromarray(values.astype(np.int32))
    else:
        image = Image.frombytes(
            mode, (SIZE, SIZE), values.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
        )
    assert image.mode == mode
    shown = np.asarray(rgb_image(image))
    assert np.array_equal(shown[..., 0], np.round(values / 257))
    assert (shown == shown[..., :1]).all()


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_a_file_with_sixteen_bits_shows_what_its_twin_with_eight_shows(ending: str, grey, tmp_path) -> None:
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / f"deep.{ending}")
    assert np.array_equal(np.asarray(rgb_image(load_image(tmp_path / f"deep.{ending}")))[..., 0], grey)


def test_a_dark_image_of_sixteen_bits_stays_dark(tmp_path) -> None:
    Image.fromarray(np.full((SIZE, SIZE), 200, dtype=np.uint16)).save(tmp_path / "dark.pgm")
    assert np.asarray(rgb_image(load_image(tmp_path / "dark.pgm"))).max() <= 1


def test_floats_from_black_to_white_are_scaled(grey) -> None:
    shown = rgb_image(Image.fromarray(grey.astype(np.float32) / 255))
    assert np.array_equal(np.asarray(shown)[..., 0], grey)


@pytest.mark.parametrize(
    "values",
    [
        np.full((2, 2), 3.0, dtype=np.float32),
        np.full((2, 2), -1.0, dtype=np.float32),
        np.full((2, 2), np.nan, dtype=np.float32),
        np.array([[0.5, np.inf]], dtype=np.float32),
        np.full((2, 2), 70000, dtype=np.int32),
        np.full((2, 2), -1, dtype=np.int32),
        np.full((2, 2), 200, dtype=np.int32),  # white could be 255 or 65535
    ],
)
def test_values_of_which_it_is_not_known_what_is_white_are_refused_by_file(values, tmp_path) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(values).save(tmp_path / split / name / "0.tif")
    with pytest.raises(UserError, match=r"0\.tif cannot be decoded \(it holds .* 8 or 16 bits"):
        load_data("imagefolder", path=str(tmp_path))
    assert len(check_folder(tmp_path).corrupt) == 4
    data = load_data("imagefolder", path=str(tmp_path), check_images=False)
    with pytest.raises(UserError, match=r"0\.tif \(row 0\) cannot be decoded"):
        ImageTensors(data.train, plain_processor())
    model = type("Model", (), {"preprocess": staticmethod(plain_processor())})
    with pytest.raises(UserError, match=r"0\.tif \(it holds"):
        list(image_batches(model, [tmp_path / "train" / "a" / "0.tif"], InputOptions(), []))


@pytest.mark.parametrize("background", ["white", "black"])
@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_transparency_shows_the_background(mode: str, background: str, colours) -> None:
    straight = Image.fromarray(colours)
    source = straight.convert("LA") if mode in ("LA", "La") else straight
    if mode == "PA":
        palette = straight.convert("RGB").quantize(16)
        source = palette.convert("PA")
        source.putalpha(straight.getchannel("A"))
    image = source.convert(mode) if mode in ("RGBa", "La") else source
    assert image.mode == mode
    expected = over(np.asarray(source.convert("RGBA")), 255 if background == "white" else 0)
    assert np.abs(np.asarray(rgb_image(image, background)) - expected).max() <= 2  # premultiplied bytes round


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1", "I;16"])
def test_a_colour_that_stands_for_transparency_shows_the_background(mode: str, tmp_path) -> None:
    values = np.zeros((SIZE, SIZE), dtype=np.uint16 if mode == "I;16" else np.uint8)
    values[2:5, 2:5] = 65535 if mode == "I;16" else 255
    image = Image.fromarray(values)
    image = image if mode in ("I;16", "L") else image.convert(mode)
    see_through = (0, 0, 0) if mode == "RGB" else 0
    image.save(tmp_path / "icon.png", transparency=see_through)
    opened = load_image(tmp_path / "icon.png")
    assert "transparency" in opened.info
    assert np.asarray(rgb_image(opened, "red"))[0, 0].tolist() == [255, 0, 0]
    assert np.asarray(rgb_image(opened, "red"))[3, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB"])
def test_opaque_modes_are_as_pillow_shows_them(mode: str) -> None:
    y, x = np.mgrid[0:SIZE, 0:SIZE] * (255 // SIZE)
    picture = Image.fromarray(np.stack([x, y, x], axis=-1).astype(np.uint8))
    image = picture.convert(mode)
    assert image.mode == mode
    assert np.array_equal(np.asarray(rgb_image(image)), np.asarray(image.convert("RGB")))


def test_an_opaque_image_with_an_alpha_channel_keeps_every_bit(colours) -> None:
    colours[..., 3] = 255
    assert np.array_equal(np.asarray(rgb_image(Image.fromarray(colours), "red")), colours[..., :3])


def test_an_animation_shows_its_first_frame_and_a_turned_photo_stands_upright(tmp_path) -> None:
    frames = [Image.new("RGB", (4, 6), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    red, _, blue = rgb_image(load_image(tmp_path / "two.gif")).getpixel((0, 0))
    assert red > 200
    assert blue < 50
    exif = Image.Exif()
    exif[0x0112] = 6
    frames[0].save(tmp_path / "turned.png", exif=exif)
    assert load_image(tmp_path / "turned.png").size == (6, 4)


def test_training_prediction_and_the_check_are_shown_the_same_pixels(colours, tmp_path) -> None:
    path = tmp_path / "icon.png"
    Image.fromarray(colours).save(path)
    expected = torch.from_numpy(np.asarray(rgb_image(Image.fromarray(colours), "black")).copy()).permute(
        2, 0, 1
    )
    rows = Dataset.from_dict({"image": [str(path)]}, features=Features({"image": ImageFeature()}))
    processor = plain_processor("black")
    assert torch.equal(ImageTensors(rows, processor).pixel_values([0])[0], expected.float())
    model = type("Model", (), {"preprocess": staticmethod(processor)})
    ((_, pixels),) = image_batches(model, [path], InputOptions(), [])
    assert torch.equal(pixels[0], expected.float())


def test_the_background_is_an_option_of_the_data(tmp_path) -> None:
    small = [
        "data.source=digits",
        "data.max_train_samples=40",
        "data.max_test_samples=20",
        "partition.num_clients=2",
    ]
    icon = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    for background, level in (("white", 255), ("black", 0)):
        config = load_config("quickstart", [*small, f"data.background={background}"])
        preprocess = build_run(config).model.preprocess
        assert torch.equal(preprocess(icon), preprocess(Image.new("RGB", (32, 32), (level,) * 3)))
    with pytest.raises(UserError, match=r"data\.background='nocolour' is no colour"):
        build_run(load_config("quickstart", [*small, "data.background=nocolour"]))


def test_the_check_names_images_of_one_colour_and_those_that_only_look_alike(grey, tmp_path, capsys) -> None:
    deep = grey.astype(np.uint16) * 257
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "b").mkdir(parents=True)
    Image.fromarray(deep).save(tmp_path / "train/a/deep.png")
    Image.fromarray(np.minimum(deep.astype(int) + 20, 65535).astype(np.uint16)).save(
        tmp_path / "train/b/deeper.png"
    )
    Image.new("RGB", (4, 4), "red").save(tmp_path / "train/b/blank.png")
    Image.fromarray(grey.T).save(tmp_path / "test/a/0.png")
    Image.fromarray(grey[::-1]).save(tmp_path / "test/b/0.png")
    found = check_folder(tmp_path)
    assert [path.name for path in found.one_colour] == ["blank.png"]
    assert [[path.name for path in group] for group in found.look_alike] == [["deep.png", "deeper.png"]]
    _, shown, _ = fedlora(capsys, "data", "check", tmp_path)
    assert "1 images are of one colour: " in shown
    assert "deep.png = " in shown


def test_the_check_of_a_table_names_files_of_several_frames_and_pictures_of_two_splits(
    grey, tmp_path, capsys
) -> None:
    frames = [Image.fromarray(values) for values in (grey, grey.T, grey[::-1])]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:])
    frames[1].save(tmp_path / "still.png")
    frames[1].save(tmp_path / "again.png", compress_level=0)
    frames[0].save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=frames[1:])
    for split, files in (
        ("train", ["moving.gif", "pages.tif", "still.png"]),
        ("test", ["again.png", "phone.jpg"]),
    ):
        lines = [f"{file},{name}" for file, name in zip(files, "aba", strict=False)]
        write_csv(tmp_path / f"{split}.csv", "image,label", lines)
    _, shown, _ = fedlora(capsys, "data", "check", tmp_path)
    assert "2 images have several frames, of which the first is read: " in shown
    assert "phone.jpg" not in shown
    (leaks,) = (line for line in shown.splitlines() if line.startswith("in more than one split"))
    assert "still.png = " in leaks
    assert "again.png" in leaks


def test_bytes_of_a_parquet_file_are_shown_as_files_are(grey) -> None:
    buffer = io.BytesIO()
    Image.fromarray(grey.astype(np.uint16) * 257).save(buffer, "PNG")
    cell = {"bytes": buffer.getvalue(), "path": None}
    rows = Dataset.from_dict({"image": [cell]}, features=Features({"image": ImageFeature()}))
    pixels = ImageTensors(rows, plain_processor()).pixel_values([0])[0, 0]
    assert np.array_equal(pixels.numpy(), grey)


def test_the_twin_of_the_shared_gradient(tmp_path: Path) -> None:
    eight = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    Image.fromarray(eight).save(tmp_path / "8.png")
    Image.fromarray(eight.astype(np.uint16) * 256).save(tmp_path / "16.png")  # white is a little below 65535
    shown = [np.asarray(rgb_image(load_image(tmp_path / f"{bits}.png"))).astype(int) for bits in (8, 16)]
    assert np.abs(shown[0] - shown[1]).max() <= 1
