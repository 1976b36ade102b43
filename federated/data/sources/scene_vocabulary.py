"""The words of the ``emoji_vqa`` source: objects, colours, places, numbers and questions in two languages.

Every object is a training concept of the bundled models, drawn by every vendor. `docs/vqa_data.md` shows all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

KINDS = ("object", "number", "colour", "location")
"""The types of ViVQA (Tran et al. 2021), in its order."""

SCENE_LANGUAGES = ("vi", "en")


@dataclass(frozen=True)
class SceneObject:
    """What may be in a scene.

    Attributes:
        code_points: Of its emoji.
        vi: Its Vietnamese name, with the classifier.
        en: Its English name.
        plural: The English plural.
    """

    code_points: str
    vi: str
    en: str
    plural: str

    def name(self, language: str) -> str:
        """Return the name in a language."""
        return self.vi if language == "vi" else self.en


OBJECTS = (
    SceneObject("1F408", "con mèo", "cat", "cats"),
    SceneObject("1F412", "con khỉ", "monkey", "monkeys"),
    SceneObject("1F404", "con bò", "cow", "cows"),
    SceneObject("1F416", "con lợn", "pig", "pigs"),
    SceneObject("1F418", "con voi", "elephant", "elephants"),
    SceneObject("1F407", "con thỏ", "rabbit", "rabbits"),
    SceneObject("1F414", "con gà", "chicken", "chickens"),
    SceneObject("1F427", "chim cánh cụt", "penguin", "penguins"),
    SceneObject("1F986", "con vịt", "duck", "ducks"),
    SceneObject("1F438", "con ếch", "frog", "frogs"),
    SceneObject("1F422", "con rùa", "turtle", "turtles"),
    SceneObject("1F40D", "con rắn", "snake", "snakes"),
    SceneObject("1F41F", "con cá", "fish", "fish"),
    SceneObject("1F980", "con cua", "crab", "crabs"),
    SceneObject("1F577-FE0F", "con nhện", "spider", "spiders"),
    SceneObject("1F989", "con cú", "owl", "owls"),
    SceneObject("1F34C", "quả chuối", "banana", "bananas"),
    SceneObject("1F349", "quả dưa hấu", "watermelon", "watermelons"),
    SceneObject("1F353", "quả dâu tây", "strawberry", "strawberries"),
    SceneObject("1F345", "quả cà chua", "tomato", "tomatoes"),
    SceneObject("1F347", "chùm nho", "grape", "grapes"),
    SceneObject("1F34D", "quả dứa", "pineapple", "pineapples"),
    SceneObject("1F955", "củ cà rốt", "carrot", "carrots"),
    SceneObject("1F35E", "ổ bánh mì", "bread", "breads"),
    SceneObject("1F95A", "quả trứng", "egg", "eggs"),
    SceneObject("1F355", "bánh pizza", "pizza", "pizzas"),
    SceneObject("1F3E0", "ngôi nhà", "house", "houses"),
    SceneObject("1F68C", "xe buýt", "bus", "buses"),
    SceneObject("1F6B2", "xe đạp", "bicycle", "bicycles"),
    SceneObject("2708-FE0F", "máy bay", "airplane", "airplanes"),
    SceneObject("1F680", "tên lửa", "rocket", "rockets"),
    SceneObject("26F5", "thuyền buồm", "sailboat", "sailboats"),
    SceneObject("2602-FE0F", "cái ô", "umbrella", "umbrellas"),
    SceneObject("1F3B8", "đàn ghi-ta", "guitar", "guitars"),
    SceneObject("1F4F7", "máy ảnh", "camera", "cameras"),
    SceneObject("1F514", "cái chuông", "bell", "bells"),
    SceneObject("1FA91", "cái ghế", "chair", "chairs"),
    SceneObject("1F528", "cái búa", "hammer", "hammers"),
    SceneObject("1F451", "vương miện", "crown", "crowns"),
    SceneObject("26BD", "quả bóng", "ball", "balls"),
)

COLOURS = (
    ((214, 48, 49), {"vi": "đỏ", "en": "red"}),
    ((243, 146, 40), {"vi": "cam", "en": "orange"}),
    ((250, 219, 70), {"vi": "vàng", "en": "yellow"}),
    ((76, 166, 82), {"vi": "xanh lá", "en": "green"}),
    ((52, 108, 212), {"vi": "xanh dương", "en": "blue"}),
    ((136, 78, 178), {"vi": "tím", "en": "purple"}),
    ((246, 164, 194), {"vi": "hồng", "en": "pink"}),
    ((128, 84, 50), {"vi": "nâu", "en": "brown"}),
)
"""(red, green, blue) of the square behind an object, and its name by language."""

PLACES: Mapping[str, tuple[str, ...]] = {
    "vi": ("góc trên bên trái", "góc trên bên phải", "góc dưới bên trái", "góc dưới bên phải"),
    "en": ("top left", "top right", "bottom left", "bottom right"),
}
"""Names of the four cells, by rows."""

NUMBERS: Mapping[str, tuple[str, ...]] = {
    "vi": ("một", "hai", "ba", "bốn"),
    "en": ("one", "two", "three", "four"),
}
"""One to four."""

TEMPLATES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "vi": {
        "object": ("Cái gì ở {place}?", "Ở {place} có gì?", "Vật nằm ở {place} là gì?"),
        "number": (
            "Có bao nhiêu {object} trong ảnh?",
            "Trong ảnh có mấy {object}?",
            "Số lượng {object} là bao nhiêu?",
        ),
        "colour": (
            "Nền phía sau {object} có màu gì?",
            "Ô vuông chứa {object} màu gì?",
            "Màu của ô có {object} là gì?",
        ),
        "location": ("{object} ở đâu?", "{object} nằm ở góc nào?", "Vị trí của {object} trong ảnh là gì?"),
    },
    "en": {
        "object": (
            "What is in the {place}?",
            "What can be seen in the {place}?",
            "Which object is in the {place}?",
        ),
        "number": (
            "How many {objects} are there?",
            "How many {objects} are in the picture?",
            "What is the number of {objects}?",
        ),
        "colour": (
            "What colour is behind the {object}?",
            "What is the colour of the square with the {object}?",
            "Which colour is the {object} on?",
        ),
        "location": (
            "Where is the {object}?",
            "In which corner is the {object}?",
            "What is the place of the {object}?",
        ),
    },
}
"""Language -> type -> questions. Each is asked as often as the others of its type."""


def asked(template: str, thing: SceneObject, language: str, place: int) -> str:
    """Fill a question in.

    Args:
        template: One of ``TEMPLATES``.
        thing: The object that it is about.
        language: Its language.
        place: Number of the cell that it is about.
    """
    names = {"object": thing.name(language), "objects": thing.plural, "place": PLACES[language][place]}
    text = template.format(**names)
    return text[0].upper() + text[1:]
