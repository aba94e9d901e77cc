"""Tokens for a new language: merges against a naive loop, rows as means of their pieces, whole runs."""

import copy
import itertools
import json
import re
from collections import Counter

import pytest
import torch
from peft import get_peft_model
from raw import byte_tokenizer, chain, raw_folder, raw_recipe
from safetensors.torch import load_file
from small import write_rows
from tiny import tiny_batch, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerFast

import graftlm
import graftlm.prepare
from graftlm.check import check
from graftlm.errors import DataError, ModelError, RecipeError
from graftlm.evaluation.bits_per_byte import bits_per_byte
from graftlm.folder import load
from graftlm.new_tokens import extend_model, extend_tokenizer
from graftlm.run import run_recipe

TEXTS = ["der Hund und der Bär", "und der Wald, und der Mond", "bärenstark under der Bärin"]


def words_of(tokenizer, texts):
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    return Counter(word for text in texts for word, _ in split(text))


def naive_merges(words, count, apart=""):
    """Sennrich et al., Algorithm 1, every pair counted again for every merge."""
    split = {word: list(word) for word in words}
    found = []
    for _ in range(count):
        pairs = Counter()
        for word, pieces in split.items():
            for pair in itertools.pairwise(pieces):
                pairs[pair] += words[word] if not {*apart} & {*pair} else 0
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        found.append("".join(best))
        for word, pieces in split.items():
            joined, at = [], 0
            while at < len(pieces):
                if tuple(pieces[at : at + 2]) == best:
                    joined.append("".join(best))
                    at += 2
                else:
                    joined.append(pieces[at])
                    at += 1
            split[word] = joined
    return found


def test_merges_are_those_of_a_naive_loop_and_text_comes_back(tmp_path):
    old = byte_tokenizer()
    new, pieces = extend_tokenizer(old, TEXTS, 12)
    assert [new.convert_ids_to_tokens(one) for one in pieces] == naive_merges(words_of(old, TEXTS), 12)
    assert list(pieces) == list(range(len(old), len(old) + 12)) and len(new) == len(old) + 12
    for one, parts in pieces.items():
        assert "".join(old.convert_ids_to_tokens(parts)) == new.convert_ids_to_tokens(one)
    further, _ = extend_tokenizer(new, TEXTS, 3)  # it goes on from there
    assert further.get_vocab().items() >= new.get_vocab().items()
    new.save_pretrained(tmp_path)
    for made in (new, AutoTokenizer.from_pretrained(tmp_path)):
        for text in (*TEXTS, "ein anderer Text, mit  Lücken\n", "🐻 w1"):
            ids = made(text)["input_ids"]
            assert made.decode(ids) == text and len(ids) <= len(old(text)["input_ids"])
            whole = [part for one in ids for part in pieces.get(one, [one])]
            assert whole == old(text)["input_ids"], "new tokens stand for the pieces that they are the mean of"
    assert len(new(TEXTS[0])["input_ids"]) < len(old(TEXTS[0])["input_ids"]) / 2
    assert old.get_vocab() == byte_tokenizer().get_vocab()


def llama3(texts):
    """Byte-level merges, and special tokens that are added behind them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens(["<|begin|>", "<|end|>", "<|pad|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>"
    )


def sentencepiece(texts, kind):
    """Characters, blanks as ▁, bytes for what is missing: Llama 2 and Gemma hand whole documents to their merges."""
    letters = sorted({letter for text in texts for letter in text.replace(" ", "▁")} - set("äöü\n"))
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    made = Tokenizer(models.BPE({token: at for at, token in enumerate(tokens)}, [], unk_token="<unk>"))
    made.model.byte_fallback = made.model.fuse_unk = True
    if kind == "gemma":
        made.normalizer = normalizers.Replace(" ", "▁")
        made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif kind == "llama2":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def test_special_tokens_behind_the_vocabulary_keep_their_ids(tmp_path):
    old = llama3(["the dog and the tree"] * 5)
    special = [old.bos_token_id, old.eos_token_id, old.pad_token_id]
    new, pieces = extend_tokenizer(old, TEXTS, 8)
    assert list(pieces) == list(range(len(old), len(old) + 8)) and max(special) == len(old) - 1
    new.save_pretrained(tmp_path)
    for made in (new, AutoTokenizer.from_pretrained(tmp_path)):
        assert made.get_vocab().items() > old.get_vocab().items() and len(made) == len(old) + 8
        assert [made.bos_token_id, made.eos_token_id, made.pad_token_id] == special
        assert made("der Hund<|end|>")["input_ids"][-1] == old.eos_token_id
        ids = made(TEXTS[0])["input_ids"]
        assert [part for one in ids for part in pieces.get(one, [one])] == old(TEXTS[0])["input_ids"]


@pytest.mark.parametrize("kind", ["gemma", "llama2", "llama2 legacy"])
def test_no_new_token_crosses_a_word_or_holds_a_byte(kind):
    texts = [text.replace(", ", "\n") for text in TEXTS] * 3
    old = sentencepiece(texts, kind)
    new, pieces = extend_tokenizer(old, texts, 12)
    begin = "" if kind == "gemma" else "▁"
    words = Counter(word for text in texts for word in re.findall(r"▁?[^▁\n]+", begin + text.replace(" ", "▁")))
    assert [new.convert_ids_to_tokens(one) for one in pieces] == naive_merges(words, 12, apart="äöü")
    for text in texts:
        ids = new(text)["input_ids"]
        assert new.decode(ids) == text and len(ids) < len(old(text)["input_ids"])
        assert [part for one in ids for part in pieces.get(one, [one])] == old(text)["input_ids"]


def test_words_of_a_wordpiece_vocabulary():
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "der", "hu", "##nd", "##n", "h", "##u", "##d"]
    old = BertTokenizerFast(vocab={token: at for at, token in enumerate(vocabulary)})
    new, pieces = extend_tokenizer(old, ["der Hund", "Hund hund", "hun"], 1)
    assert pieces == {12: [6, 7]} and new.tokenize("Der Hund, hun") == ["der", "hund", "[UNK]", "hu", "##n"]


def test_what_cannot_be_extended():
    with pytest.raises(ModelError, match="byte-pair encoding and WordPiece only"):
        extend_tokenizer(tiny_tokenizer(), TEXTS, 1)
    with pytest.raises(DataError, match=r"count=0(.|\n)*allowed: 1, 2"):
        extend_tokenizer(byte_tokenizer(), TEXTS, 0)
    with pytest.raises(DataError, match="no new token"):
        extend_model(tiny_model("llama", "causal_lm"), {})
    for architecture in ("bert", "roberta", "distilbert", "modernbert"):  # PEFT drops their output bias
        base = tiny_model(architecture, "masked_lm")
        with pytest.raises(ModelError, match="output matrix without a bias(.|\\n)*96 tokens"):
            extend_model(base, {96: [5, 6]})
        assert len(base.get_input_embeddings().weight) == 96
    suffixed = Tokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    with pytest.raises(ModelError, match="BPE with end_of_word_suffix"):
        extend_tokenizer(PreTrainedTokenizerFast(tokenizer_object=suffixed), TEXTS, 1)
    with pytest.raises(DataError, match="too few words"):
        extend_tokenizer(byte_tokenizer(), ["aa aa"], 50)


@pytest.mark.parametrize(
    ("architecture", "tied"), [("llama", False), ("llama", True), ("gpt2", True), ("gemma2", True)]
)
def test_rows_are_means_and_train_alone(architecture, tied, tmp_path):
    base = tiny_model(architecture, "causal_lm", dropout=0.0, tie_word_embeddings=tied)
    batch = tiny_batch(architecture, "causal_lm")
    plain = copy.deepcopy(base).eval()(**batch).logits
    before = base.get_input_embeddings().weight.clone()
    head = base.get_output_embeddings().weight.clone()
    pieces = {96: [5, 6], 97: [7, 8, 9]}
    rows = extend_model(base, pieces)
    assert len(rows) == (1 if tied else 2) and all(found == [96, 97] for found in rows.values())
    for matrix, old in ((base.get_input_embeddings(), before), (base.get_output_embeddings(), head)):
        assert torch.equal(matrix.weight[:96], old)
        for row, parts in pieces.items():
            torch.testing.assert_close(matrix.weight[row], old[parts].mean(0))
    untouched = copy.deepcopy(base)
    config = graftlm.NeutralResiduesConfig(penalty_weight=0, trainable_token_indices=rows, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    torch.testing.assert_close(model.eval()(**batch).logits[..., :96], plain)
    batch["input_ids"][:, 1] = 96
    batch["labels"] = batch["labels"].where(batch["labels"] == -100, batch["input_ids"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()(**batch).loss.backward()
    optimizer.step()
    trained = model.eval()(**batch).logits
    merged = model.base_model.model.get_input_embeddings().weight
    assert torch.equal(merged[:96], before) and not torch.equal(merged[96], before[[5, 6]].mean(0))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = graftlm_loaded(untouched, tmp_path)
    torch.testing.assert_close(again.eval()(**batch).logits, trained)


def graftlm_loaded(base, path):
    from peft import PeftModel

    return PeftModel.from_pretrained(base, path)


def recipe_of(path, method, *more, tied=False):
    folder = raw_folder(
        path, "causal_lm", "llama", vocab_size=260, max_position_embeddings=256, tie_word_embeddings=tied
    )
    byte_tokenizer().save_pretrained(folder / "model")
    write_rows(folder / "replay.jsonl", [{"text": text} for text in chain(5, 5, first=30)])
    penalised = ("adapter.penalty_weight=1", "mixing={share: 0.2, data: replay.jsonl}")
    return raw_recipe(
        folder,
        "new_tokens=20",
        f"adapter={{method: {method}}}",
        *(penalised if method == "neutral_residues" else ()),
        "training={epochs: 2, batch_size: 8, learning_rate: 1e-2, max_length: 128, stride: 8}",
        *more,
    )


@pytest.mark.parametrize("method", ["neutral_residues", "lora"])
def test_a_run_with_new_tokens(method, tmp_path):
    folder, recipe = tmp_path, recipe_of(tmp_path, method)
    texts = {row.split: row for row in check(recipe).texts}
    result = run_recipe(recipe, progress=False)
    model, tokenizer = load(recipe.folder, tokenizer=True)
    assert len(tokenizer) == len(byte_tokenizer()) + 20
    base = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    for score in result.scores:
        lines = (folder / f"test.{score.language}.jsonl").read_text(encoding="utf-8").splitlines()
        documents = [json.loads(line)["text"] for line in lines]
        for one, how, value in (
            (model, tokenizer, score.metrics["bits_per_byte"]),
            (base, byte_tokenizer(), score.base),
        ):
            ours = bits_per_byte(one, how, documents, max_length=128, stride=8)
            assert value.value == pytest.approx(ours["bits_per_byte"].value, rel=1e-4)
    assert texts["train"].tokens_per_word < 2.5  # a byte each, and the blank: more than three before


@pytest.mark.parametrize(("method", "tied"), [("neutral_residues", False), ("neutral_residues", True), ("lora", False)])
def test_a_run_that_crashed_ends_where_the_uninterrupted_one_does(method, tied, tmp_path, monkeypatch):
    class TrainingClock(graftlm.prepare.TrainingClock):  # the same name: checkpoints list callbacks by it
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise OSError("the machine went away")

    found = []
    for crashes in (False, True):
        steps = ("training.max_steps=6", "training.eval_steps=2", "data.dev=null")
        recipe = recipe_of(tmp_path / str(crashes), method, *steps, tied=tied)
        if crashes:
            with monkeypatch.context() as patch:
                patch.setattr(graftlm.prepare, "TrainingClock", TrainingClock)
                with pytest.raises(OSError, match="went away"):
                    run_recipe(recipe, progress=False)
            assert (recipe.folder / "checkpoints/checkpoint-4").is_dir()
        result = run_recipe(recipe, progress=False)
        lines = (recipe.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        log = [(row["step"], row["loss"], row.get("penalty")) for row in map(json.loads, lines) if "loss" in row]
        found.append((result, load_file(recipe.folder / "adapter/adapter_model.safetensors"), log))
    (whole, weights, log), (resumed, again, log_again) = found
    assert log == log_again and [step for step, *_ in log] == [1, 2, 3, 4, 5, 6]
    new = [name for name in weights if "trainable_tokens_delta" in name]
    assert len(new) == (1 if tied else 2) and all(len(weights[name]) == 20 for name in new)
    assert weights.keys() == again.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, again[name]), name
    for one, other in zip(whole.scores, resumed.scores, strict=True):
        assert one.metrics == other.metrics and one.base == other.base and one.change == other.change


def test_check_advises_tokens_for_a_language_that_takes_many_more(tmp_path):
    recipe = recipe_of(tmp_path, "neutral_residues", "new_tokens=null")
    assert not any("tokens a word" in line for line in check(recipe).advice)
    write_rows(tmp_path / "replay.jsonl", [{"text": "a b c d"}] * 5)
    write_rows(tmp_path / "test.eng.jsonl", [{"text": "a b c d"}] * 3)
    (said,) = [line for line in check(recipe).advice if "tokens a word" in line]
    assert said.startswith("Danish takes 3.") and "the old language 1.75" in said and "new_tokens=1000" in said
    assert not any("tokens a word" in line for line in check(recipe.changed("new_tokens=20")).advice)


def test_a_recipe_that_cannot_have_new_tokens(tmp_path):
    folder = raw_folder(tmp_path, "causal_lm", "llama")
    with pytest.raises(RecipeError, match=r"new_tokens(.|\n)*neutral_residues or lora"):
        raw_recipe(folder, "new_tokens=5", "adapter={method: none}")
