"""A recipe whose FLARE reads its source with another encoder, or from a cache: runs, and caches that are stale."""

import json
import random
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from small import save_model, small_recipe, words, write_rows
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoTokenizer, M2M100Config, M2M100Model, NllbTokenizer

import graftlm
import graftlm.prepare
from graftlm.check import check
from graftlm.cli import app
from graftlm.errors import DataError, ModelError, RecipeError, SetupError
from graftlm.folder import load
from graftlm.parallel import load_pairs
from graftlm.prepare import prepare
from graftlm.recipe import load_recipe, shipped
from graftlm.run import evaluate, run_recipe
from graftlm.source_encoder import cached, encoder_of

RECIPE = """\
name: fused
model: ./model
source: dan
data:
  train: train.jsonl
  dev: dev.jsonl
  test: {dan: test.jsonl}
  id: id
  parallel: {text: english}
adapter: {method: flare, r: 4, alpha: 8}
training: {epochs: 1, batch_size: 8, learning_rate: 2e-2, max_length: 24}
references: []
"""
MT = ("data.parallel=null", "adapter.source_encoder=./encoder")
MARKED = ("data.parallel=null", "adapter.source_encoder=./nllb", "source=dan_Latn")
COUNTS = {"train": 24, "dev": 8, "test": 8}


def nllb(folder):
    """NLLB's architecture and tokenizer, which marks languages, with drawn weights and 60 words."""
    letters = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {c: n for n, c in enumerate("▁w0123456789", 4)}
    tokenizer = NllbTokenizer(vocab=letters, merges=[], extra_special_tokens=["dan_Latn", "deu_Latn"])
    tokenizer.save_pretrained(folder)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    torch.manual_seed(0)
    M2M100Model(M2M100Config(vocab_size=len(tokenizer), d_model=8, **layers, **heads)).save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, two encoders, and Danish with its English; the label follows from the English alone."""
    folder, rng = tmp_path_factory.mktemp("made"), random.Random(0)
    save_model(folder / "model", initializer_range=0.5)
    tiny_model("mt5", "seq2seq_lm", seed=4).save_pretrained(folder / "encoder")
    tiny_tokenizer().save_pretrained(folder / "encoder")
    nllb(folder / "nllb")
    for name, count in COUNTS.items():
        rows = []
        for number in range(count):
            colour = rng.choice(("red", "blue"))
            texts = {"text": " ".join(words(rng, "green", 4)), "english": " ".join(words(rng, colour, 5))}
            rows.append({"id": f"{name}{number}", **texts, "label": colour})
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "here")


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def said(recipe):
    return {row["id"]: row["scores"] for row in rows(recipe.folder, "predictions")}


def assert_near(one, other):
    assert one.keys() == other.keys()
    for key, scores in one.items():
        assert scores == pytest.approx(other[key], abs=2e-4), key


def caches(folder):
    return sorted(path.name for path in (folder / "cache").iterdir())


@pytest.mark.parametrize("more", [(), MT])
def test_a_run_with_a_cache_is_the_run_without_one(folder, more):
    plain = small_recipe(folder, *more, "name=plain")
    kept = small_recipe(folder, *more, "name=kept", "adapter.source_cache=cache")
    before = run_recipe(plain, progress=False)
    after = run_recipe(kept, progress=False)
    assert_near(said(plain), said(kept))
    (cache,) = [graftlm.SourceCache(folder / "cache" / name) for name in caches(folder)]
    assert (len(cache), cache.layers == 1) == (COUNTS["train"] + COUNTS["dev"], bool(more))
    assert (before.cost.source_cache_bytes, after.cost.source_cache_bytes) == (None, cache.bytes)
    assert check(kept).source_cache_bytes == cache.bytes
    assert "source cache" in (kept.folder / "report.html").read_text(encoding="utf-8")
    assert ("MT with" in (kept.folder / "README.md").read_text(encoding="utf-8")) == bool(more)
    when = (cache.folder / "states.bin").stat().st_mtime_ns
    features_of(small_recipe(folder, *more, "name=again", "adapter.source_cache=cache"))
    assert caches(folder) == [cache.folder.name] and (cache.folder / "states.bin").stat().st_mtime_ns == when
    shutil.rmtree(folder / "cache")
    assert run_recipe(kept, progress=False) == after, "what is finished needs its cache no more"
    assert evaluate(kept.folder, progress=False).scores == after.scores


def test_a_stopped_run_finds_its_cache_again_and_leaves_none(folder, monkeypatch):
    """With a schedule that measures tr(F): it reads the source from the cache too."""
    settings = (
        "adapter.source_cache=true",
        "unfreezing={schedule: fisher, every_n_steps: 1, trace_examples: 4}",
        "training.epochs=2",
    )
    whole = small_recipe(folder, *settings, "name=whole")
    run_recipe(whole, progress=False)
    broken = small_recipe(folder, *settings, "name=broken")

    class TrainingClock(graftlm.prepare.TrainingClock):  # the same name: checkpoints list callbacks by it
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise OSError("went away")

    with monkeypatch.context() as patch:
        patch.setattr(graftlm.prepare, "TrainingClock", TrainingClock)
        with pytest.raises(OSError, match="went away"):
            run_recipe(broken, progress=False)
    (file,) = (broken.folder / "checkpoints" / "sources").rglob("states.bin")
    when = file.stat().st_mtime_ns
    prepare(broken, broken.folder, progress=False)
    assert file.stat().st_mtime_ns == when, "it is not computed again"
    run_recipe(broken, progress=False)
    assert said(broken) == said(whole)
    assert not list(folder.rglob("states.bin"))


def features_of(recipe):
    """What the first training batch fuses, and what the same model reads from these texts now."""
    prepared = prepare(recipe, recipe.folder, progress=False)
    trainer = prepared.trainer
    first = trainer.data_collator([prepared.train.features[row] for row in range(4)])
    encode = encoder_of(prepared.loaded.model) or graftlm.ModelStates(
        prepared.loaded.model, prepared.tokenizer, recipe.training.max_length
    )
    return (first["source_states"], first["source_attention_mask"]), encode(prepared.splits.train.sources[:4])


def other_text(folder):
    changed = [row | {"english": row["english"] + " w0"} for row in rows(folder, "train")]
    write_rows(folder / "train.jsonl", changed)


def other_weights(folder):
    save_model(folder / "model", initializer_range=0.5, seed=1)


def other_settings(folder):
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.5}))


def other_tokenizer(folder):
    tiny_tokenizer(("w7", "w3")).save_pretrained(folder / "model")


CHANGES = {
    "text": (other_text, ()),
    "weights": (other_weights, ()),
    "settings of the model": (other_settings, ()),
    "tokenizer": (other_tokenizer, ()),
    "max_length": (lambda folder: None, ("training.max_length=9",)),
    "precision": (lambda folder: None, ("training.precision=bf16", "training.arguments={use_cpu: true}")),
    "encoder": (lambda folder: None, ("adapter.source_encoder=./encoder",)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_stale_cache_is_made_again_and_never_read(folder, what):
    change, overrides = CHANGES[what]
    settings = ("adapter.source_cache=cache", "training.max_length=10")
    features_of(small_recipe(folder, *settings))
    first = caches(folder)
    change(folder)
    from_disk, now = features_of(small_recipe(folder, *settings, *overrides))
    torch.testing.assert_close(from_disk[0], now[0].to(from_disk[0].dtype), rtol=1e-5, atol=1e-5)
    assert torch.equal(from_disk[1], now[1])
    assert len(caches(folder)) == 2 and set(first) < set(caches(folder))


def test_one_that_lies_in_the_place_of_another_is_an_error(folder):
    recipe = small_recipe(folder, "adapter.source_cache=cache")
    features_of(recipe)
    (right,) = caches(folder)
    other_text(folder)
    features_of(recipe)
    (wrong,) = set(caches(folder)) - {right}
    shutil.rmtree(folder / "cache" / wrong)
    (folder / "cache" / right).rename(folder / "cache" / wrong)
    with pytest.raises(DataError, match="does not hold all of these texts"):
        features_of(recipe)


def test_what_changes_nothing_of_the_source_makes_no_other_cache(folder):
    settings = ("adapter.source_cache=cache",)
    features_of(small_recipe(folder, *settings))
    for more in ("adapter.source_layer=same", "adapter.fusion=cross_attention", "adapter.r=2", "seed=3"):
        features_of(small_recipe(folder, *settings, more))
    assert len(caches(folder)) == 1


def test_a_loaded_run_of_flare_mt_says_what_the_run_said(folder):
    recipe = small_recipe(folder, *MT)
    run_recipe(recipe, progress=False)
    model, tokenizer = load(recipe.folder, tokenizer=True)
    config = model.peft_config["default"]
    assert (config.peft_type, config.encoder_width) == ("FLARE", 16)
    theirs, texts = AutoTokenizer.from_pretrained(folder / "encoder"), rows(folder, "test")
    apart = 0.0
    for row in texts:
        target = tokenizer(row["text"], return_tensors="pt")
        with torch.no_grad():
            found = model(**target, source_input_ids=theirs(row["text"], return_tensors="pt").input_ids)
            apart = max(apart, float((found.logits - model(**target).logits).abs().max()))
        assert said(recipe)[row["id"]] == pytest.approx(found.logits.softmax(-1)[0].tolist(), abs=1e-4)
    assert apart > 1e-4, "without its source it says something else"
    assert not any("encoder.block" in name for name in model.state_dict()), "the encoder is no part of the model"
    resolved = load_recipe(recipe.folder / "recipe.resolved.yaml")
    assert resolved.path(resolved.adapter.source_encoder).is_dir(), "paths are seen from the run folder"


def test_each_language_gets_its_mark(folder):
    tests = "data.test={dan_Latn: test.jsonl, deu_Latn: test.jsonl}"
    prepared = prepare(small_recipe(folder, *MARKED, tests), folder / "runs", progress=False)
    theirs = AutoTokenizer.from_pretrained(folder / "nllb")
    for language, split in prepared.splits.test.items():
        encoded = prepared.task.encode(split, prepared.tokenizer, prepared.recipe.training)
        for row, text in zip(encoded.features, split.texts, strict=True):
            first, *others = theirs.convert_ids_to_tokens(row["source_input_ids"])
            assert first == language and "".join(others).replace("▁", " ") == f" {text}</s>"
    english = prepare(
        small_recipe(folder, *MARKED[1:2], "adapter.source_language=deu_Latn"), folder / "runs", progress=False
    )
    for split, encoded in ((english.splits.train, english.train), (english.splits.dev, english.dev)):
        first = theirs.convert_ids_to_tokens(encoded.features[0]["source_input_ids"])
        assert first[0] == "deu_Latn" and "".join(first[1:]) == f"▁{split.sources[0][0].replace(' ', '▁')}</s>"


def test_a_cache_is_not_read_for_the_same_text_in_another_language(folder):
    tests = "data.test={dan_Latn: dev.jsonl, deu_Latn: dev.jsonl}"
    prepared = prepare(
        small_recipe(folder, *MARKED, tests, "adapter.source_cache=cache"), folder / "runs", progress=False
    )
    columns = {
        language: prepared.task.encode(split, prepared.tokenizer, prepared.recipe.training).features.column_names
        for language, split in prepared.splits.test.items()
    }
    assert "source_texts" in columns["dan_Latn"] and "source_input_ids" in columns["deu_Latn"]


@pytest.mark.parametrize("more", [(), MT])
def test_pairs_of_texts(folder, more):
    for name in COUNTS:
        pairs = [row | {"second": "w1 w2", "zweit": row["english"].split()[0]} for row in rows(folder, name)]
        write_rows(folder / f"{name}.jsonl", pairs)
    parallel = more or ("data.parallel={text: english, text_b: zweit}",)
    recipe = small_recipe(folder, *parallel, "data.text_b=second", "adapter.source_cache=cache")
    from_disk, now = features_of(recipe)
    torch.testing.assert_close(from_disk[0], now[0])
    split = load_pairs(recipe, recipe.data.train, "train")
    row = rows(folder, "train")[0]
    assert split.sources[0] == ((row["text"], "w1 w2") if more else (row["english"], row["zweit"]))
    live = prepare(recipe.changed("adapter.source_cache=false"), folder / "runs", progress=False)
    first = live.trainer.data_collator([live.train.features[0]])
    model = live.loaded.model.get_base_model()
    context = graftlm.adapters.flare.SourceContext.of(model)
    sources = {key: value for key, value in first.items() if key.startswith("source_")}
    record = context.read(model, {"input_ids": first["input_ids"]}, **sources)
    length = int(from_disk[1][0].sum())
    torch.testing.assert_close(torch.stack(record.states, 1)[0], from_disk[0][0][:, :length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["data.parallel=null"], r"data.parallel says where(.|\n)*adapter.source_encoder"),
        (["adapter={method: lora, source_encoder: ./encoder}", "data.parallel=null"], "lora takes no source_encoder"),
        (["adapter={method: lora, source_cache: true}", "data.parallel=null"], "lora takes no source_cache"),
        (["adapter.source_language=dan_Latn"], "goes with source_encoder"),
        ([*MT, "task=token_classification"], "does not go with adapter.source_encoder"),
        (["adapter.source_cache=3"], "source_cache"),
    ],
)
def test_keys_that_do_not_fit_each_other(folder, overrides, wanted):
    with pytest.raises(RecipeError, match=wanted):
        small_recipe(folder, *overrides)


@pytest.mark.parametrize(
    ("overrides", "error", "wanted"),
    [
        ([*MT, "adapter.source_encoder=./nowhere"], ModelError, "no such folder"),
        ([*MT, "adapter.source_encoder=./runs"], ModelError, r"adapter.source_encoder|override(.|\n)*cannot be loaded"),
        ([*MT, "adapter.source_language=dan_Latn"], SetupError, "no marks of languages"),
        ([*MARKED, "source=nor"], SetupError, r"no mark for this language(.|\n)*'nor'"),
        (MARKED, SetupError, r"no mark for this language(.|\n)*'dan'(.|\n)*data.test"),
    ],
)
def test_encoders_that_do_not_go(folder, overrides, error, wanted):
    (folder / "runs").mkdir()
    with pytest.raises(error, match=wanted):
        prepare(small_recipe(folder, *overrides), folder / "runs", progress=False)


def test_check_shows_both_texts_and_the_size_and_writes_nothing(folder, capsys):
    arguments = [f"adapter.source_cache={folder / 'cache'}", *MARKED[:1], f"adapter.source_encoder={folder / 'nllb'}"]
    languages = ("source=dan_Latn", "data.test={dan_Latn: test.jsonl}")
    app(["check", str(folder / "recipe.yaml"), *arguments, *languages], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "MB on disk" in shown and "dan_Latn w" in shown.replace("\n", " ")
    assert not (folder / "cache").exists()


def test_the_commands_in_the_docs():
    page = (Path(__file__).parents[1] / "docs/how-to/flare.md").read_text(encoding="utf-8")
    found = re.findall(r"\$ graftlm train flare.yaml (\S*(?:parallel|source_cache)[^#\n]*)", page)
    made = [load_recipe(shipped()["flare"], shlex.split(overrides)) for overrides in found]
    assert [recipe.adapter.source_cache for recipe in made] == [True, "cache", True]
    assert made[2].data.parallel is None and made[2].adapter.source_encoder == "facebook/nllb-200-distilled-600M"


def test_cached_is_none_without_the_key(folder):
    assert cached(small_recipe(folder), None, None, [], folder, progress=False) is None
