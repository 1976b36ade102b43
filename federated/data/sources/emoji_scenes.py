"""The ``emoji_vqa`` source: scenes of embedded emoji, and Vietnamese and English questions about them.

A scene has four cells. An occupied cell is a coloured square with an emoji on it. One object is there one to
four times, the others once. Objects, colours, places and numbers are drawn evenly and apart from each other,
so that a question alone does not give its answer away.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from datasets import Dataset
from PIL import Image as PilImage

from federated.data.sources import embedded
from federated.data.sources.form import FederatedData
from federated.data.sources.question_form import CLIENT, MEANING, Question, question_rows
from federated.data.sources.scene_vocabulary import (
    COLOURS,
    KINDS,
    NUMBERS,
    OBJECTS,
    PLACES,
    SCENE_LANGUAGES,
    TEMPLATES,
    asked,
)
from models.errors import UserError

NUM_CELLS = 4
CELL_PIXELS = 32
SQUARE_PIXELS = 30
EMOJI_PIXELS = 24


@dataclass(frozen=True)
class Scene:
    """What is in a picture.

    Attributes:
        vendor: Whose drawings.
        objects: Number of the object in each cell, by rows, (4,); -1: the cell is empty.
        colours: Number of the colour behind it, (4,); -1: the cell is empty.
    """

    vendor: str
    objects: tuple[int, ...]
    colours: tuple[int, ...]

    @property
    def single(self) -> list[int]:
        """The cells whose object is in no other."""
        return [cell for cell, thing in enumerate(self.objects) if thing >= 0 and self.count(thing) == 1]

    def count(self, thing: int) -> int:
        """Return in how many cells an object is."""
        return self.objects.count(thing)


def emoji_vqa(  # noqa: PLR0913 -- the options of the data section, one by one
    rng: np.random.Generator,
    *,
    language: Literal["vi", "en", "both"] = "vi",
    vendors: Sequence[str] = embedded.VENDORS,
    test_vendors: Sequence[str] | None = None,
    clients_per_vendor: int = 1,
    num_train_pictures: int = 2000,
    num_test_pictures: int = 500,
    scene_seed: int = 0,
) -> FederatedData:
    """Scenes of bundled emoji, 64 px, with Vietnamese or English questions: object, number, colour, location.

    A scene is in one split and of one client. The client column is for ``partition.name: natural``.

    Args:
        rng: not used: scenes are the same for every seed of a run.
        language: language of the questions; "both": every scene has one of the two.
        vendors: whose drawings; each is so many clients.
        test_vendors: whose drawings to test on, by default the same.
        clients_per_vendor: clients that share the scenes of a vendor.
        num_train_pictures: training scenes; each has two to four questions.
        num_test_pictures: test scenes.
        scene_seed: draws the scenes and the questions.

    Raises:
        UserError: an unknown vendor or language, a size below 1, or fewer scenes than clients.
    """
    languages = SCENE_LANGUAGES if language == "both" else (language,)
    sizes = {"num_train_pictures": num_train_pictures, "num_test_pictures": num_test_pictures}
    for option, size in {**sizes, "clients_per_vendor": clients_per_vendor}.items():
        if size < 1:
            raise UserError(f"{option} is {size}; it must be at least 1", options=(option,))
    for names in (vendors, test_vendors or vendors):
        embedded.check_choices("vendor", names, embedded.VENDORS)
    clients = [(vendor, number) for number in range(clients_per_vendor) for vendor in vendors]
    if num_train_pictures < len(clients):
        raise UserError(
            f"{num_train_pictures} scenes do not reach for {len(clients)} clients; raise num_train_pictures",
            options=("num_train_pictures",),
        )
    test_clients = [(vendor, 0) for vendor in test_vendors or vendors]
    seen: set[Scene] = set()  # test scenes are drawn first: the same, however many train
    test = _split(test_clients, num_test_pictures, languages, np.random.default_rng([scene_seed, 1]), seen)
    train = _split(clients, num_train_pictures, languages, np.random.default_rng([scene_seed, 0]), seen)
    return FederatedData(
        train=train,
        validation=None,
        test=test,
        class_names=KINDS,
        domain_column=CLIENT,
        name="emoji_vqa",
        **MEANING,
    )


def _split(
    clients: Sequence[tuple[str, int]],
    num_pictures: int,
    languages: Sequence[str],
    rng: np.random.Generator,
    seen: set[Scene],
) -> Dataset:
    """Draw scenes that are not in ``seen``, and add them to it; clients and languages take turns."""
    images, questions = [], []
    tiles = {vendor: _scaled_tiles(vendor) for vendor in {vendor for vendor, _ in clients}}
    for picture in range(num_pictures):
        vendor, number = clients[picture % len(clients)]
        language = languages[picture // len(clients) % len(languages)]
        scene = draw_scene(vendor, rng)
        while scene in seen:
            scene = draw_scene(vendor, rng)
        seen.add(scene)
        pixels = render(scene, tiles[vendor], rng)
        images.append({"bytes": _png(pixels), "path": f"{vendor}-{picture:05d}.png"})
        name = f"{vendor}-{number}"
        questions += [
            Question(picture, question, answer, kind, name)
            for kind, question, answer in questions_about(scene, language, rng)
        ]
    return question_rows(images, questions, KINDS)


def draw_scene(vendor: str, rng: np.random.Generator) -> Scene:
    """Draw what is in a scene: one object one to four times, and at least one other where there is room."""
    count = int(rng.integers(1, NUM_CELLS + 1))
    cells = rng.permutation(NUM_CELLS)
    things = rng.choice(len(OBJECTS), size=NUM_CELLS, replace=False)
    free = NUM_CELLS - count
    num_others = int(rng.integers(1, free + 1)) if free else 0
    objects = np.full(NUM_CELLS, -1)
    objects[cells[:count]] = things[0]
    objects[cells[count : count + num_others]] = things[1 : 1 + num_others]
    colours = np.where(objects >= 0, rng.integers(len(COLOURS), size=NUM_CELLS), -1)
    return Scene(vendor, tuple(objects.tolist()), tuple(colours.tolist()))


def questions_about(scene: Scene, language: str, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Draw one question of each type that the scene allows.

    Colour and location are asked of an object that is there once; the number of the object that was drawn one
    to four times, which is the most frequent one, or one of several that are there once.

    Returns:
        (type, question, answer).
    """
    counts = [scene.count(thing) if thing >= 0 else 0 for thing in scene.objects]
    most = int(rng.choice(np.flatnonzero(np.array(counts) == max(counts))))
    filled = int(rng.choice(np.flatnonzero(np.array(scene.objects) >= 0)))
    subjects = {"object": filled, "number": most}
    if scene.single:
        subjects |= {kind: int(rng.choice(scene.single)) for kind in ("colour", "location")}
    found = []
    for kind, cell in subjects.items():
        thing = OBJECTS[scene.objects[cell]]
        answers = {
            "object": thing.name(language),
            "number": NUMBERS[language][counts[cell] - 1],
            "colour": COLOURS[scene.colours[cell]][1][language],
            "location": PLACES[language][cell],
        }
        templates = TEMPLATES[language][kind]
        template = templates[int(rng.integers(len(templates)))]
        found.append((kind, asked(template, thing, language, cell), answers[kind]))
    return found


def render(scene: Scene, tiles: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene on a plain light ground, each emoji a little off the middle of its square.

    Args:
        scene: What to draw.
        tiles: The objects' pictures, (40, 24, 24, 4) RGBA.
        rng: Draws the ground and the places within the squares.

    Returns:
        (64, 64, 3) unsigned bytes.
    """
    side = 2 * CELL_PIXELS
    pixels = np.full((side, side, 3), int(rng.integers(215, 256)), dtype=np.uint8)
    most = SQUARE_PIXELS - EMOJI_PIXELS
    shifts = rng.integers(1, most, size=(NUM_CELLS, 2))
    for cell, (thing, colour) in enumerate(zip(scene.objects, scene.colours, strict=True)):
        if thing < 0:
            continue
        top, left = (CELL_PIXELS * place + 1 for place in divmod(cell, 2))
        square = np.full((SQUARE_PIXELS, SQUARE_PIXELS, 3), COLOURS[colour][0], dtype=np.uint16)
        down, right = shifts[cell]
        under = square[down : down + EMOJI_PIXELS, right : right + EMOJI_PIXELS]
        alpha = tiles[thing][..., 3:].astype(np.uint16)
        under[:] = (tiles[thing][..., :3] * alpha + under * (255 - alpha) + 127) // 255
        pixels[top : top + SQUARE_PIXELS, left : left + SQUARE_PIXELS] = square
    return pixels


def _scaled_tiles(vendor: str) -> np.ndarray:
    """The objects' pictures of a vendor, (40, 24, 24, 4) RGBA."""
    places = {concept.code_points: number for number, concept in enumerate(embedded.concepts())}
    tiles = embedded.emoji_tiles(vendor)
    size = (EMOJI_PIXELS, EMOJI_PIXELS)
    pictures = (PilImage.fromarray(tiles[places[thing.code_points]]) for thing in OBJECTS)
    return np.stack([np.asarray(picture.resize(size, PilImage.Resampling.LANCZOS)) for picture in pictures])


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PilImage.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
