"""Claims about the bundled tiny MBart: it loads offline, reads both languages, and has learned from texts."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MBartForConditionalGeneration

import models
from federated.data.dataset import load_data
from federated.data.sources.scene_vocabulary import KINDS, OBJECTS, PLACES, TEMPLATES, asked

FOLDER = Path(models.__file__).resolve().parent / "tiny_mbart"
LANGUAGES = ("vi", "en")


@pytest.fixture(scope="module")
def mbart() -> MBartForConditionalGeneration:
    return AutoModelForSeq2SeqLM.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


def questions(language: str) -> list[str]:
    """Every question about every object and place."""
    return sorted(
        {
            asked(template, thing, language, place)
            for kind in KINDS
            for template in TEMPLATES[language][kind]
            for thing in OBJECTS
            for place in range(4)
        }
    )


def test_it_is_an_mbart_of_the_stated_size(mbart):
    assert type(mbart) is MBartForConditionalGeneration
    assert mbart.num_parameters() < 2_000_000
    assert (FOLDER / "model.safetensors").stat().st_size < 4_000_000
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.float16"}  # noqa: SIM118


def test_its_special_tokens_have_the_numbers_of_bartpho(mbart, tokenizer):
    ids = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert ids == (0, 1, 2, 3)
    assert tokenizer.mask_token_id == len(tokenizer) - 1 == mbart.config.vocab_size - 1
    config = mbart.config
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (0, 1, 2)
    assert config.decoder_start_token_id == mbart.generation_config.decoder_start_token_id == 2
    assert tokenizer("con mèo")["input_ids"][0] == 0
    assert tokenizer("con mèo")["input_ids"][-1] == 2


@pytest.mark.parametrize("language", LANGUAGES)
def test_questions_and_answers_come_back_in_lower_case_and_are_short(tokenizer, language):
    texts = [*questions(language), *PLACES[language], *(thing.name(language) for thing in OBJECTS)]
    rows = tokenizer([unicodedata.normalize("NFD", text) for text in texts])["input_ids"]
    assert tokenizer.batch_decode(rows, skip_special_tokens=True) == [text.lower() for text in texts]
    assert max(map(len, rows)) <= 24


@settings(deadline=None, max_examples=50)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20))
def test_no_text_is_unknown(tokenizer, text):
    assert tokenizer.unk_token_id not in tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def restored(model: MBartForConditionalGeneration, tokenizer, texts: list[str]) -> float:
    """The share of words that the model restores, given the rest of its text, one word of each missing."""
    rows = [torch.tensor(row) for row in tokenizer(texts)["input_ids"]]
    places = [1 + 7 * number % (len(row) - 3) for number, row in enumerate(rows)]
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    chosen = torch.tensor(places).unsqueeze(1)
    ids = labels.scatter(1, chosen, tokenizer.mask_token_id)
    mask = (labels != tokenizer.pad_token_id).long()
    logits = model(
        input_ids=ids, attention_mask=mask, labels=labels.masked_fill(labels == tokenizer.pad_token_id, -100)
    ).logits
    found = logits.argmax(-1).gather(1, chosen)
    return float((found == labels.gather(1, chosen)).float().mean())


@pytest.mark.parametrize("language", LANGUAGES)
def test_pre_training_restores_words_that_random_weights_do_not(mbart, tokenizer, language):
    texts = questions(language)[::4]
    torch.manual_seed(0)
    control = MBartForConditionalGeneration(mbart.config).eval()
    assert restored(mbart, tokenizer, texts) > 0.5
    assert restored(control, tokenizer, texts) < 0.05


def test_generation_restores_a_text_and_ends(mbart, tokenizer):
    text = "con mèo ở góc trên bên trái trên nền đỏ"
    ids = mbart.generate(**tokenizer([text], return_tensors="pt"), max_new_tokens=30)
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == [text]
    assert ids[0, :2].tolist() == [2, 0]
    assert ids[0, -1] == 2


def test_the_answers_of_easy_vqa_are_few_tokens(tokenizer):
    answers = sorted(set(load_data("easy_vqa").test["answer"][:]))
    assert len(answers) == 13
    assert max(map(len, tokenizer(answers)["input_ids"])) <= 5


def test_its_card_says_its_size_and_licence(mbart):
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"{mbart.num_parameters():,} parameters" in card
    assert "license: apache-2.0" in card
    assert "Apache License" in (FOLDER / "LICENSE").read_text(encoding="utf-8")
    assert json.loads((FOLDER / "config.json").read_text())["model_type"] == "mbart"
