"""Building by name: wrong names and options are told by the dotted keys that they were written under."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import pytest
from pydantic import Field

from federated.config.choices import Choice, build
from models.errors import UserError

if TYPE_CHECKING:
    from somewhere import NotThere

CHOICE = Choice("drink", "menu.name", "menu.options", {"glass": "table.glass"})


def tea(water: str, *, sugar: float = 0.0, glass: str = "cup") -> tuple[str, float, str]:
    if sugar > 3:
        raise UserError("sugar is too much", options=["sugar"])
    if glass == "sieve":
        raise UserError("it runs out", options=["glass", "sugar"])
    if water == "salt":
        raise UserError("undrinkable, whatever sugar is in the glass")
    return water, sugar, glass


def juice(
    water: NotThere, *, fruit: str, share: Annotated[float, Field(gt=0, le=1)] = 0.5, ice=0
) -> NotThere:
    return water, fruit, share, ice


DRINKS = {"juice": juice, "tea": tea, "water": lambda water: (water, 0.0, "cup")}


def refusal(name: str, water: str = "sweet", **options: object) -> str:
    with pytest.raises(UserError) as error:
        build(DRINKS, CHOICE, name, options, water)
    return str(error.value)


def test_what_yaml_reads_as_text_becomes_the_number_that_the_option_is() -> None:
    assert build(DRINKS, CHOICE, "tea", {"sugar": "1e-3"}, "sweet") == ("sweet", 1e-3, "cup")
    assert refusal("tea", sugar="much").startswith("menu.options.sugar: ")


def test_a_refusal_begins_with_the_keys_that_it_is_about() -> None:
    assert refusal("tea", sugar=4) == "menu.options.sugar: sugar is too much"
    assert refusal("tea", glass="sieve") == "table.glass, menu.options.sugar: it runs out"
    assert refusal("tea", water="salt") == "menu.name: undrinkable, whatever sugar is in the glass"


def test_a_wrong_name_or_option_has_the_nearest_one_named() -> None:
    assert refusal("tee").startswith("menu.name: no drink 'tee', did you mean 'tea'?")
    assert "did you mean 'sugar'?" in refusal("tea", suger=1)


def test_an_option_of_another_function_comes_with_the_override_that_drops_it() -> None:
    assert "menu.options={}" in refusal("water", sugar=1)
    assert "Leave table.glass out" in refusal("water", glass="cup")
    inside = Choice("drink", "menu.name", "menu")
    with pytest.raises(UserError, match="menu={name: water}"):
        build(DRINKS, inside, "water", {"sugar": 1}, "sweet")


def test_an_option_without_a_default_is_needed() -> None:
    assert refusal("juice") == "menu.options.fruit: drink 'juice' needs the option 'fruit'"


def test_the_bounds_of_an_annotation_hold_and_other_annotations_are_not_looked_at() -> None:
    assert refusal("juice", fruit="plum", share=2).startswith("menu.options.share: Input should be less than")
    assert build(DRINKS, CHOICE, "juice", {"fruit": "plum", "ice": [1]}, 1) == (1, "plum", 0.5, [1])
