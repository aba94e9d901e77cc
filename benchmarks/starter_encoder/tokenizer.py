"""Train the starter encoder's tokenizer: cased Unigram pieces, with bytes for whatever no piece covers."""

import itertools
import json
import random
from collections import defaultdict

from corpus import Corpus
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MAX_LENGTH = 256
ROUND_TRIP = [
    "Æblegrød på ø'en, så blåt!",
    "Žluťoučký kůň úpěl.",
    "🙂👩‍🚀 naïve",
    "東京は晴れ。",
    "𝔘 ¿Qué?",
    "a_b\u00ad<0x41>",
]


def balanced_sample(corpus: Corpus, characters: int = 1_500_000, seed: int = 0) -> list[str]:
    """Return text with `characters` of each language, pairs before novels; related languages get a fifth.

    A language with less text than that is read up to three times, so that its words are not cut finer than the others'.
    """
    rng = random.Random(seed)
    by_language: dict[str, list[str]] = defaultdict(list)
    for _, language, english, other in rng.sample(corpus.pairs, len(corpus.pairs)):
        by_language[language].append(other)
        by_language["eng"].append(english)
    by_language["eng"] += corpus.english
    rng.shuffle(by_language["eng"])
    for language in by_language:
        by_language[language] = list(dict.fromkeys(by_language[language]))
    for language, text in corpus.passages:
        by_language[language].append(text)
    sample = []
    for language, texts in by_language.items():
        left = characters if language in ("eng", "deu", "fra", "spa", "por", "ces") else characters // 5
        left = min(left, 3 * sum(map(len, texts)))
        for text in itertools.cycle(texts):
            if left <= 0:
                break
            sample.append(text)
            left -= len(text)
    return sample


def train_tokenizer(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation("isolated"), pre_tokenizers.Digits(True)]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - len(SPECIAL + BYTES), unk_token="[UNK]", show_progress=True
    )
    tokenizer.train_from_iterator(balanced_sample(corpus), trainer)
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    pieces = [(piece, round(score, 3)) for piece, score in vocabulary if piece != "[UNK]"]
    lowest = min(score for _, score in pieces)
    tokenizer.model = models.Unigram(
        [(token, 0.0) for token in SPECIAL] + [(token, round(lowest - 5.0, 3)) for token in BYTES] + pieces,
        unk_id=SPECIAL.index("[UNK]"),
        byte_fallback=True,
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, SPECIAL.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        **dict(zip(names, SPECIAL, strict=True)),
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise unless languages and signs that the tokenizer never saw come back whole, without an unknown token."""
    for text in ROUND_TRIP:
        ids = tokenizer(text)["input_ids"]
        if tokenizer.unk_token_id in ids:
            raise ValueError(f"unknown token in {text!r}: {tokenizer.convert_ids_to_tokens(ids)}")
        if (back := tokenizer.decode(ids, skip_special_tokens=True)) != text:
            raise ValueError(f"{text!r} came back as {back!r}")
