"""Pre-train the bundled tiny MBart from scratch: it restores Vietnamese and English texts with gaps.

Runs once, by whoever maintains `models/tiny_mbart`. The texts are names and tags of training concepts,
questions and descriptions made of the words of the scenes of emoji, and the training questions of easy-VQA.
No answer follows a question in any of them.
With `--evaluate FOLDER` it prints the numbers of the model card instead.

    OMP_NUM_THREADS=1 python scripts/pretrain_tiny_mbart.py --output models/tiny_mbart
    OMP_NUM_THREADS=1 python scripts/pretrain_tiny_mbart.py --evaluate models/tiny_mbart
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    MBartConfig,
    MBartForConditionalGeneration,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from federated.data.sources import embedded  # noqa: E402
from federated.data.sources.easy_vqa_source import easy_vqa  # noqa: E402
from federated.data.sources.question_form import QUESTION  # noqa: E402
from federated.data.sources.scene_vocabulary import (  # noqa: E402
    COLOURS,
    KINDS,
    NUMBERS,
    OBJECTS,
    PLACES,
    SCENE_LANGUAGES,
    TEMPLATES,
    asked,
)

logger = logging.getLogger("pretrain_tiny_mbart")

BUNDLED = ROOT / "models" / "tiny_mbart"
SEED = 20240517
VOCABULARY_SIZE = 2000
BOS, PAD, EOS, UNK, MASK = "<s>", "<pad>", "</s>", "<unk>", "<mask>"
"""The first four have the numbers 0 to 3, the mask the last, as in BARTpho."""
MAX_POSITIONS = 128
MAX_TOKENS = 40
MOST_SHIFT = MAX_POSITIONS - MAX_TOKENS
NUM_STEPS, BATCH_SIZE, LEARNING_RATE = 4000, 64, 1e-3
MASKED_SHARE, MEAN_GAP = 0.3, 2.0
EASY_SHARE = 0.5
"""Of the English questions."""

CAPTIONS = {
    "vi": ("{name}", "{name}, {tag}", "ảnh của {name}", "trong ảnh có {name}", "đây là {name}"),
    "en": (
        "{name}",
        "{name}, {tag}",
        "a picture of {name}",
        "there is {name} in the picture",
        "this is {name}",
    ),
}
SCENES = {
    "vi": (
        "{object} ở {place} trên nền {colour}",
        "{number} {object} trong ảnh",
        "{object} màu {colour}, {place}",
    ),
    "en": (
        "{object} in the {place} on {colour}",
        "{number} {objects} in the picture",
        "{colour} {object}, {place}",
    ),
}


class Texts:
    """Draws texts.

    Args:
        held_out: Of the held-out concepts instead of the training concepts, and captions alone.
    """

    def __init__(self, *, held_out: bool = False) -> None:
        self.concepts = [concept for concept in embedded.concepts() if concept.held_out == held_out]
        self.kinds = ("caption",) if held_out else ("caption", "question", "scene")
        self.easy_questions = sorted(set(easy_vqa(np.random.default_rng()).train[QUESTION][:]))

    def draw(self, rng: np.random.Generator) -> str:
        """Return a caption, a question or the description of a scene, in one of the two languages."""
        language = SCENE_LANGUAGES[int(rng.integers(2))]
        kind = self.kinds[int(rng.integers(len(self.kinds)))]
        if kind == "caption":
            return self._caption(language, rng)
        thing = OBJECTS[int(rng.integers(len(OBJECTS)))]
        place = int(rng.integers(4))
        if kind == "question" and language == "en" and rng.random() < EASY_SHARE:
            return pick(self.easy_questions, rng)
        if kind == "question":
            return asked(pick(TEMPLATES[language][pick(KINDS, rng)], rng), thing, language, place)
        number, colour = int(rng.integers(4)), COLOURS[int(rng.integers(len(COLOURS)))][1][language]
        return pick(SCENES[language], rng).format(
            object=thing.name(language),
            objects=thing.name(language) if number == 0 else thing.plural,
            place=PLACES[language][place],
            number=NUMBERS[language][number],
            colour=colour,
        )

    def _caption(self, language: str, rng: np.random.Generator) -> str:
        concept = self.concepts[int(rng.integers(len(self.concepts)))]
        tags = concept.tags[language] or (concept.names[language],)
        return pick(CAPTIONS[language], rng).format(name=concept.names[language], tag=pick(tags, rng))


def pick(choices: Sequence[str], rng: np.random.Generator) -> str:
    """Return one of several texts."""
    return choices[int(rng.integers(len(choices)))]


def train_tokenizer() -> Tokenizer:
    """Train a byte-level BPE on lower-case texts in Unicode's composed form; no text is unknown to it.

    The trainer breaks ties between equally frequent pairs in hash order, so two calls differ in a few merges.
    """
    trained = Tokenizer(models.BPE(unk_token=UNK))
    trained.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trained.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - 1,
        special_tokens=[BOS, PAD, EOS, UNK],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng, texts = np.random.default_rng(SEED), Texts()
    trained.train_from_iterator([texts.draw(rng) for _ in range(40_000)], trainer)
    trained.add_special_tokens([MASK])
    trained.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 0), (EOS, 2)]
    )
    return trained


def for_transformers(trained: Tokenizer) -> PreTrainedTokenizerFast:
    """Return the tokenizer with its special tokens named."""
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token=BOS,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        mask_token=MASK,
        cls_token=BOS,
        sep_token=EOS,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> MBartForConditionalGeneration:
    """The untrained model: width 128, two layers and four heads a side."""
    config = MBartConfig(
        vocab_size=len(tokenizer),
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        max_position_embeddings=MAX_POSITIONS,
        dropout=0.1,
        scale_embedding=False,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    return MBartForConditionalGeneration(config)


def with_gaps(ids: Sequence[int], mask: int, rng: np.random.Generator) -> list[int]:
    """Put one mask in place of each of a few runs of tokens, as BART does; first and last token stay."""
    kept = np.ones(len(ids), dtype=bool)
    wanted = max(1, round(MASKED_SHARE * (len(ids) - 2)))
    while (missing := wanted - int((~kept).sum())) > 0:
        length = min(missing, 1 + int(rng.poisson(MEAN_GAP - 1)))
        start = int(rng.integers(1, len(ids) - length))
        kept[start : start + length] = False
    gaps = []
    for place, token in enumerate(ids):
        if kept[place]:
            gaps.append(int(token))
        elif kept[place - 1]:
            gaps.append(mask)
    return gaps


def padded(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    """Return rows of numbers as one tensor, (B, T)."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, float(padding)).long()


def restoring_loss(
    model: MBartForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Return the loss of restoring texts, and for each of their tokens whether it is restored.

    The encoder reads each row at positions that start anywhere, so that what precedes a question in a
    multimodal model does not make its words foreign.
    """
    rows = tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
    ids = padded([with_gaps(row, tokenizer.mask_token_id, rng) for row in rows], tokenizer.pad_token_id)
    labels = padded(rows, -100)
    positions = model.model.encoder.embed_positions.weight[2:]  # (P, D); two rows are MBart's offset
    starts = torch.from_numpy(rng.integers(0, MOST_SHIFT, size=(len(rows), 1)))
    here = torch.arange(ids.shape[1])
    shifted = positions[starts + here] - positions[here]  # (B, T, D)
    output = model(
        inputs_embeds=model.get_input_embeddings()(ids) + shifted,
        attention_mask=(ids != tokenizer.pad_token_id).long(),
        labels=labels,
    )
    real = labels != -100
    return output.loss, (output.logits.argmax(-1) == labels)[real]


def train(output: Path, *, num_steps: int, new_tokenizer: bool) -> None:
    """Pre-train and write the folder."""
    trained = train_tokenizer() if new_tokenizer else Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    tokenizer = for_transformers(trained)
    tokenizer.save_pretrained(output)  # now: later its file would hold how the training cuts texts
    model = build_model(tokenizer, SEED).train()
    rng, texts = np.random.default_rng(SEED), Texts()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(200, num_steps // 10), num_steps)
    for step in tqdm(range(num_steps), mininterval=10):
        loss, _ = restoring_loss(model, tokenizer, [texts.draw(rng) for _ in range(BATCH_SIZE)], rng)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            logger.info("step %d: loss %.3f", step, float(loss))
    model.eval().half().save_pretrained(output)


@torch.no_grad()
def print_evaluation(folder: Path) -> None:
    """Print how well gaps are filled, pre-trained and with random weights."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    trained = MBartForConditionalGeneration.from_pretrained(folder).float()
    print(f"{trained.num_parameters():,} parameters, {len(tokenizer)} tokens")
    for name, model in (("pre-trained", trained), ("random", build_model(tokenizer, SEED + 1))):
        for part, texts in (("training concepts", Texts()), ("held-out captions", Texts(held_out=True))):
            rng = np.random.default_rng(SEED + 2)
            drawn = [texts.draw(rng) for _ in range(1000)]
            loss, right = restoring_loss(model.eval(), tokenizer, drawn, rng)
            print(
                f"{name}, {part}: loss {float(loss):.2f}, tokens restored {100 * right.float().mean():.1f} %"
            )


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder to write")
    parser.add_argument("--evaluate", type=Path, help="folder to print the numbers of")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="share of the steps, for a trial")
    parser.add_argument("--new-tokenizer", action="store_true", help="train another tokenizer too")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.evaluate is not None:
        print_evaluation(arguments.evaluate)
    elif arguments.output is not None:
        num_steps = max(1, round(NUM_STEPS * arguments.steps_scale))
        train(arguments.output, num_steps=num_steps, new_tokenizer=arguments.new_tokenizer)
    else:
        parser.error("give --output or --evaluate")


if __name__ == "__main__":
    main()
