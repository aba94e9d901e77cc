"""Bits per byte against loops that feed one prefix at a time, and against distributions whose entropy is known."""

import json
import math

import numpy as np
import pytest
import torch
from evaluation.made_up_study import write_run
from lms import lm
from raw import byte_tokenizer, chain
from tiny import tiny_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from graftlm.errors import DataError, ModelError, SetupError
from graftlm.evaluation.bits_per_byte import bits_per_byte, marks, token_bytes, windows
from graftlm.evaluation.compare_runs import VariantRuns, compare_runs
from graftlm.evaluation.metrics import statistics
from graftlm.evaluation.result import Result
from graftlm.measure.likelihood import IGNORED

CAUSAL = ("llama", "gemma2", "gpt2", "qwen3")
MASKED = ("bert", "xlm-roberta", "modernbert")


def log_p(model, ids: list[int], position: int, token: int) -> float:
    """log p of a token at a position, from one input without padding."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, position]
    return float(logits.double().log_softmax(-1)[token])


@pytest.mark.parametrize("architecture", CAUSAL)
def test_causal_equals_a_loop_over_prefixes(architecture):
    tokenizer, model = tiny_tokenizer(), lm(architecture).eval()
    texts = chain(4, seed=1, longest=25)
    length, stride = 12, 4
    found = bits_per_byte(model, tokenizer, texts, max_length=length, stride=stride, batch_size=3)
    room = length - 1
    nats = count = 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for i, token in enumerate(ids):
            # later windows score room - stride tokens each, and repeat `stride` tokens before them
            piece = 0 if i < room else 1 + (i - room) // (room - stride)
            given = 0 if piece == 0 else room + (piece - 1) * (room - stride) - stride
            prefix = [tokenizer.bos_token_id, *ids[given:i]]
            nats -= log_p(model, prefix, -1, token)
            count += 1
    assert any(len(tokenizer(text, add_special_tokens=False)["input_ids"]) > 2 * room for text in texts)
    size = sum(len(text.encode()) for text in texts)
    assert found["bits_per_byte"].value == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["nats_per_token"].value == pytest.approx(nats / count, rel=1e-5)
    assert found["bits_per_byte"].low < found["bits_per_byte"].value < found["bits_per_byte"].high


def test_the_mode_of_the_model_is_restored():
    model = lm("gpt2").train()
    bits_per_byte(model, tiny_tokenizer(), ["w1 w2 w3"], max_length=12, stride=4)
    assert model.training


@pytest.mark.parametrize("architecture", MASKED)
def test_masked_equals_a_loop_over_windows_and_every_model_gets_the_same_gaps(architecture):
    tokenizer, model = tiny_tokenizer(), lm(architecture).eval()
    texts = chain(4, seed=2, longest=25)
    made = list(windows(texts, tokenizer, "masked_lm", max_length=12, stride=4))
    nats = size = count = 0
    for owner, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        words = text.split()
        pieces = [window for window in made if window.owner == owner]
        assert len(pieces) == math.ceil(len(ids) / 10)
        for number, window in enumerate(pieces):
            piece = ids[10 * number : 10 * number + 10]
            hidden = [i for i, label in enumerate(window.labels) if label != IGNORED]
            assert len(hidden) == max(1, round(0.15 * len(piece)))
            whole = [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id]
            for i in hidden:
                assert window.labels[i] == whole[i] and window.ids[i] == tokenizer.mask_token_id
                place = 10 * number + i - 1
                size += len(words[place].encode()) + (place > 0)  # a space goes with the word after it
                nats -= log_p(model, window.ids, i, whole[i])
                count += 1
            assert [a for i, a in enumerate(window.ids) if i not in hidden] == [
                a for i, a in enumerate(whole) if i not in hidden
            ]
    found = bits_per_byte(model, tokenizer, texts, task="masked_lm", max_length=12, stride=4, batch_size=3)
    assert found["masked_bits_per_byte"].value == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["nats_per_masked_token"].value == pytest.approx(nats / count, rel=1e-5)


# ---------------------------------------------------------------- comparable over tokenizers


class Unigram(nn.Module):
    """Every token with its probability, whatever stands before it."""

    def __init__(self, probabilities: torch.Tensor):
        super().__init__()
        self.log_p = nn.Parameter(probabilities.double().log())

    def forward(self, input_ids, attention_mask=None):
        return CausalLMOutput(logits=self.log_p.expand(*input_ids.shape, -1))


LETTERS = {"a": 0.5, "b": 0.2, "é": 0.2, "語": 0.1}


def letters_tokenizer(pieces: list[str], pattern: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0} | {piece: i + 1 for i, piece in enumerate(pieces)}, "<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<s>")


def test_one_distribution_over_text_has_one_number_of_bits_whatever_the_tokenizer():
    """p(pair) = p(letter) · p(letter), so a model over pairs and one over letters say the same of every text."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list(LETTERS), size=2 * n, p=list(LETTERS.values()))) for n in (3, 20, 31)]
    pairs = {one + other: p * q for one, p in LETTERS.items() for other, q in LETTERS.items()}
    found = []
    for table, pattern in ((LETTERS, "."), (pairs, "..")):
        model = Unigram(torch.tensor([1e-30, *table.values()]))
        found.append(bits_per_byte(model, letters_tokenizer(list(table), pattern), texts, max_length=16, stride=5))
    bits = -sum(math.log2(LETTERS[letter]) for text in texts for letter in text)
    size = sum(len(text.encode()) for text in texts)
    for one in found:
        assert one["bits_per_byte"].value == pytest.approx(bits / size, rel=1e-9)
    assert found[0]["nats_per_token"].value == pytest.approx(found[1]["nats_per_token"].value / 2, rel=1e-9)
    assert found[0]["bits_per_byte"].low == pytest.approx(found[1]["bits_per_byte"].low)


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), byte_tokenizer()], ids=["words", "bytes"])
@pytest.mark.parametrize("text", ["w1 w2  w3 ", "w1 [EOS] <|endoftext|>", "Ünï 語é\n\nw2 🌱!", "  w5 w6"])
def test_the_bytes_of_all_tokens_are_those_of_the_text(tokenizer, text):
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
    sizes = token_bytes(text, encoded["offset_mapping"])
    assert sizes.sum() == len(text.encode())
    assert (sizes >= 0).all()
    made = list(windows([text], tokenizer, "causal_lm", max_length=8, stride=3))
    assert sum(window.bytes for window in made) == len(text.encode())
    scored = [label for window in made for label in window.labels if label != IGNORED]
    assert scored == encoded["input_ids"], "each token once, in order"
    assert not set(scored) & {tokenizer.eos_token_id}, "what looks like a special token is text here"


def test_the_interval_is_that_of_a_loop_over_drawn_documents():
    table = [[3.0, 4, 2], [5.0, 9, 3], [1.0, 2, 1]]
    made = statistics("causal_lm", [4, 9, 2], table)
    drawn = np.random.default_rng(0).integers(3, size=(20, 3))
    w = np.stack([np.bincount(row, minlength=3) for row in drawn]).astype(float)
    for row, bits, nats in zip(drawn, made["bits_per_byte"](w), made["nats_per_token"](w), strict=True):
        total = sum(table[i][0] for i in row)
        assert bits == pytest.approx(total / sum(table[i][1] for i in row) / math.log(2))
        assert nats == pytest.approx(total / sum(table[i][2] for i in row))
    diverged = statistics("masked_lm", [4, 9], [[math.inf, 4, 2], [1.0, 9, 3]])
    assert np.isnan(diverged["masked_bits_per_byte"](np.ones((1, 2)))).all()


def test_what_stands_before_a_text():
    assert marks(tiny_tokenizer(), "masked_lm").before == (2,) and marks(tiny_tokenizer(), "masked_lm").after == (1,)
    plain = byte_tokenizer()
    assert marks(plain, "causal_lm").before == (plain.eos_token_id,), "as GPT-2: the end of the text before"
    bare = letters_tokenizer(["a"], ".")
    bare.bos_token = None
    with pytest.raises(ModelError, match="neither a beginning"):
        marks(bare, "causal_lm")
    with pytest.raises(ModelError, match=r"(?s)no mask token.*task: causal_lm"):
        marks(plain, "masked_lm")


def test_what_is_refused():
    tokenizer, model = tiny_tokenizer(), lm("gpt2")
    with pytest.raises(DataError, match=r"(?s)row 2: a document of fewer than two tokens.*1 tokens"):
        bits_per_byte(model, tokenizer, ["w1 w2", "w1"], max_length=12, stride=4)
    with pytest.raises(DataError, match="list of documents"):
        bits_per_byte(model, tokenizer, "w1 w2")
    with pytest.raises(DataError, match="list of documents"):
        bits_per_byte(model, tokenizer, [])
    with pytest.raises(SetupError, match=r"(?s)stride.*training\.stride=3"):
        bits_per_byte(model, tokenizer, ["w1 w2"], max_length=12, stride=8)
    with pytest.raises(SetupError, match="classification"):
        bits_per_byte(model, tokenizer, ["w1 w2"], task="classification")


def test_runs_with_other_tokenizers_are_compared_over_the_same_documents(tmp_path):
    """Two variants of two seeds: fewer bits are better, whatever tokens they are made of."""
    rng = np.random.default_rng(0)
    sizes = {"dan": rng.integers(40, 200, size=30), "eng": rng.integers(40, 200, size=30)}
    bits: dict[tuple[str, int, str], float] = {}
    variants = []
    for name, factor, letters in (("words", 2.0, 5), ("bytes", 1.5, 1)):
        folders = {}
        for seed in (0, 1):
            folder = write_run(tmp_path / name / str(seed), {tag: np.ones(30) for tag in sizes}, seed=seed)
            rows = []
            for tag, size in sizes.items():
                nats = size * factor * math.log(2) * rng.uniform(0.9, 1.1, size=30)
                bits[name, seed, tag] = nats.sum() / math.log(2) / size.sum()
                said = [[float(a), int(b), int(b) // letters] for a, b in zip(nats, size, strict=True)]
                rows += [
                    {"id": i, "language": tag, "label": int(size[i]), "prediction": said[i]} for i in range(len(said))
                ]
            (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            update = {"task": "causal_lm", "metric": "bits_per_byte", "source": "dan", "name": f"{name}-{seed}"}
            Result.read(folder).model_copy(update=update).write(folder)
            folders[seed] = [folder]
        variants.append(VariantRuns(name, {}, folders))
    made = compare_runs("tokenizers", variants, root=tmp_path, planned=4, finished=4, resamples=200)
    for tag in sizes:
        mean = {name: np.mean([bits[name, seed, tag] for seed in (0, 1)]) for name in ("words", "bytes")}
        (found,) = (one for one in made.differences if one.language == tag)
        assert found.value == pytest.approx(mean["words"] - mean["bytes"]), "positive is better"
        assert found.low > 0
