"""Claims about augmentation."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from federated.config.augmentation_options import Augmentation, augmentation_from
from federated.data.augmentation import augment_captions, augment_images, crop_and_resize, crop_boxes
from models.errors import UserError

ALL = Augmentation(
    crop_scale=(0.3, 1.0),
    flip_probability=0.5,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    templates=("a photo of {}", "{}, drawn"),
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 6, height: int = 12, width: int = 10, seed: int = 0) -> torch.Tensor:
    """Preprocessed images whose colours are within 0 to 1."""
    off = Augmentation()
    colours = torch.rand((count, 3, height, width), generator=generator(seed))
    return (colours - torch.tensor(off.mean)[:, None, None]) / torch.tensor(off.deviation)[:, None, None]


def colours_of(pixel_values: torch.Tensor) -> torch.Tensor:
    off = Augmentation()
    return pixel_values * torch.tensor(off.deviation)[:, None, None] + torch.tensor(off.mean)[:, None, None]


def test_off_is_the_very_same_tensor_and_the_same_captions():
    batch, off = images(), Augmentation()
    assert augment_images(batch, off, generator()) is batch
    assert augment_captions(["a", "b"], off, np.random.default_rng(0)) == ["a", "b"]
    assert not off.changes_images
    assert ALL.changes_images
    assert not Augmentation(templates=("{}!",)).changes_images


def test_the_generator_decides_and_the_input_stays():
    batch = images()
    before = batch.clone()
    first, again, other = (augment_images(batch, ALL, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(batch, before)
    assert first.shape == batch.shape
    assert first.dtype == batch.dtype


def test_no_global_random_state_is_read_or_changed():
    outputs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 -- the global state is what is tested
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
        outputs.append(augment_images(images(), ALL, generator()))
        augment_captions(["a"], ALL, np.random.default_rng(0))
        assert torch.equal(before[0], torch.get_rng_state())
        assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
        assert before[2] == random.getstate()
    assert torch.equal(*outputs)


def test_images_of_a_batch_are_changed_independently():
    same = images(1).expand(8, -1, -1, -1)
    changed = augment_images(same, ALL, generator())
    assert len({image.numpy().tobytes() for image in changed}) == 8


def test_flipping_mirrors_exactly_and_as_often_as_asked():
    batch = images(400, 4, 5)
    assert torch.equal(augment_images(batch, Augmentation(flip_probability=1.0), generator()), batch.flip(-1))
    flipped = augment_images(batch, Augmentation(flip_probability=0.25), generator())
    is_flipped = (flipped == batch.flip(-1)).flatten(1).all(dim=1)
    is_same = (flipped == batch).flatten(1).all(dim=1)
    assert (is_flipped ^ is_same).all()
    assert 0.15 < is_flipped.float().mean() < 0.35


def test_the_whole_image_as_box_is_the_identity():
    batch = images()
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(batch), 4)
    assert torch.allclose(crop_and_resize(batch, boxes), batch, atol=1e-5)


def test_cropping_equals_slicing_and_interpolating():
    """Naive oracle: cut with slices, enlarge with torch's bilinear interpolation.

    Away from the box's edge, where the oracle cannot see the neighbouring pixels.
    """
    batch = images(3, 12, 16)
    pixel_boxes = [(0, 0, 8, 6), (4, 3, 8, 6), (5, 6, 4, 3)]  # left, top, width, height in pixels
    boxes = torch.tensor([[left / 16, top / 12, w / 16, h / 12] for left, top, w, h in pixel_boxes])
    out = crop_and_resize(batch, boxes)
    for row, (left, top, w, h) in enumerate(pixel_boxes):
        cut = batch[row : row + 1, :, top : top + h, left : left + w]
        naive = F.interpolate(cut, size=(12, 16), mode="bilinear", align_corners=False)[0]
        margin_y, margin_x = 12 // h, 16 // w
        inner = slice(margin_y, 12 - margin_y), slice(margin_x, 16 - margin_x)
        assert torch.allclose(out[row][:, *inner], naive[:, *inner], atol=1e-4)


@pytest.mark.parametrize("aspect", [1.0, 2.0])
def test_boxes_lie_inside_and_have_the_area_and_ratio_asked_for(aspect):
    wanted = Augmentation(crop_scale=(0.1, 0.3), crop_ratio=(0.8, 1.25))
    left, top, width, height = crop_boxes(500, wanted, generator(), aspect=aspect).unbind(dim=1)
    assert (torch.stack([left, top, 1 - left - width, 1 - top - height]) >= -1e-6).all()
    area, ratio = width * height, aspect * width / height
    assert area.min() >= 0.1 - 1e-6
    assert area.max() <= 0.3 + 1e-6
    assert ratio.min() >= 0.8 - 1e-5
    assert ratio.max() <= 1.25 + 1e-5
    assert area.std() > 0.04


def test_brightness_scales_every_channel_by_one_factor_an_image():
    batch = images(20)
    colours = colours_of(batch) * 0.5  # far from the limits
    batch = (colours - torch.tensor(Augmentation().mean)[:, None, None]) / torch.tensor(
        Augmentation().deviation
    )[:, None, None]
    factors = colours_of(augment_images(batch, Augmentation(brightness=0.3), generator())) / colours
    assert torch.allclose(factors, factors[:, :1, :1, :1].expand_as(factors), atol=1e-3)
    assert factors.min() > 0.7 - 1e-3
    assert factors.max() < 1.3 + 1e-3
    assert factors[:, 0, 0, 0].std() > 0.1


def test_contrast_and_saturation_leave_what_they_turn_around():
    batch = images(10)
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    grey = (colours_of(batch) * weights).sum(1)
    saturated = colours_of(augment_images(batch, Augmentation(saturation=0.1), generator()))
    inside = ((saturated > 0) & (saturated < 1)).all(dim=1)  # not clamped
    assert torch.allclose((saturated * weights).sum(1)[inside], grey[inside], atol=1e-5)
    flat = torch.full((2, 3, 4, 4), 0.3)
    contrasted = augment_images(
        flat, Augmentation(contrast=0.9, mean=(0, 0, 0), deviation=(1, 1, 1)), generator()
    )
    assert torch.allclose(contrasted, flat, atol=1e-6)


def test_colours_stay_within_0_and_1():
    strong = Augmentation(brightness=1.0, contrast=1.0, saturation=1.0)
    colours = colours_of(augment_images(images(50), strong, generator()))
    assert colours.min() >= -1e-5
    assert colours.max() <= 1 + 1e-5


def test_captions_go_into_every_template_and_keep_their_own_braces():
    captions = [f"number {number} {{}}" for number in range(100)]
    out = augment_captions(captions, ALL, np.random.default_rng(0))
    for text, caption in zip(out, captions, strict=True):
        assert text in (f"a photo of {caption}", f"{caption}, drawn")
    assert 20 < sum(text.startswith("a photo of") for text in out) < 80
    assert out == augment_captions(captions, ALL, np.random.default_rng(0))


def test_options_of_the_configuration_become_an_augmentation():
    made = augmentation_from({"crop_scale": [0.5, 1.0], "flip_probability": 0.5, "templates": ["a {}"]})
    assert made == Augmentation(crop_scale=(0.5, 1.0), flip_probability=0.5, templates=("a {}",))
    assert augmentation_from({}) == Augmentation()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_scale": [0.0, 1.0]}, "crop_scale"),
        ({"crop_scale": [0.9, 0.5]}, "crop_scale"),
        ({"crop_scale": 0.5}, "not of the right form"),
        ({"crop_ratio": [0, 1]}, "crop_ratio"),
        ({"flip_probability": 1.5}, "flip_probability is 1.5"),
        ({"brightness": -0.1}, "brightness"),
        ({"templates": ["no place"]}, "one {} where"),
        ({"deviation": [1, 0, 1]}, "deviation"),
        ({"hue": 0.1}, "no augmentation hue; there are crop_scale"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        augmentation_from(options)
