"""`README.md` of a run: the model card, with front matter for the hub, how to load it, scores, limits and licences."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from graftlm import yaml_lines
from graftlm.evaluation.folder import read_settings
from graftlm.evaluation.record import write_text
from graftlm.evaluation.result import Licences, Result
from graftlm.evaluation.summary import setup, summary
from graftlm.evaluation.table import language_name, markdown_text
from graftlm.starter import MODELS

FILE = "README.md"

# task → (the hub's pipeline tag, transformers' class)
_TASKS = {
    "classification": ("text-classification", "AutoModelForSequenceClassification"),
    "multi_label": ("text-classification", "AutoModelForSequenceClassification"),
    "regression": ("text-classification", "AutoModelForSequenceClassification"),
    "token_classification": ("token-classification", "AutoModelForTokenClassification"),
    "question_answering": ("question-answering", "AutoModelForQuestionAnswering"),
    "causal_lm": ("text-generation", "AutoModelForCausalLM"),
    "masked_lm": ("fill-mask", "AutoModelForMaskedLM"),
}
_HUB_METRICS = {"accuracy": "accuracy", "macro_f1": "f1", "micro_f1": "f1", "token_f1": "f1", "entity_f1": "seqeval"}
_HUB_METRICS |= {"token_accuracy": "accuracy", "f1": "squad", "exact_match": "squad", "pearson": "pearsonr"}
_HUB_METRICS |= {"spearman": "spearmanr", "rmse": "mse"}
_HUB_LICENCES: tuple[str, ...] = (
    "apache-2.0",
    "mit",
    "cc0-1.0",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "bsd-3-clause",
    "gpl-3.0",
)
_HUB_LICENCES += ("cc-by-sa-3.0", "cc-by-3.0", "cc-by-2.0", "afl-3.0", "llama3", "gemma", "openrail", "unlicense")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[A-Za-z][\w-]*(\.[\w-]+)*")


def write_card(folder: str | Path) -> Path:
    """Write ``README.md`` into a run folder, from its ``result.json`` and ``recipe.resolved.yaml``; return its path.

    Raises:
        DataError: no result, or one of another schema version.
    """
    folder = Path(folder)
    result = Result.read(folder)
    values = {setting["key"]: setting["value"] for setting in read_settings(folder)}
    parts = [
        _front_matter(folder, result),
        f"# {markdown_text(result.name)}",
        markdown_text(" ".join(summary(result))),
        markdown_text(setup(result, values)),
        _how_to_load(folder, result),
        f"## Scores\n\n{result.table()}",
        _limits(result),
        _licences(result.licences),
        "Made with graftlm: "
        + ", ".join(markdown_text(f"{package} {version}") for package, version in result.versions.items())
        + ". The picture of the run is in `report.html`, the numbers for a program are in `result.json`,"
        " the recipe is in `recipe.yaml`.",
    ]
    path = folder / FILE
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def _front_matter(folder: Path, result: Result) -> str:
    tags = list(dict.fromkeys([result.source, *(score.language for score in result.scores)]))
    fields = {
        "language": tags,
        "library_name": "peft" if _is_adapter(folder) else "transformers",
        "pipeline_tag": _TASKS[result.task][0] if result.task in _TASKS else None,
        "base_model": result.model if _on_the_hub(result.model) else None,
        "metrics": list(
            dict.fromkeys(_HUB_METRICS[name] for s in result.scores for name in s.metrics if name in _HUB_METRICS)
        ),
        "tags": ["graftlm", "cross-lingual"],
    }
    licence = result.licences.weights
    if licence is not None:
        known = licence.lower() in _HUB_LICENCES
        fields |= {"license": licence.lower()} if known else {"license": "other", "license_name": licence}
    return f"---\n{yaml_lines.dump({key: value for key, value in fields.items() if value}, {})}---"


def _is_adapter(folder: Path) -> bool:
    return not (folder / "model").is_dir()


def _on_the_hub(model: str | None) -> bool:
    """Whether the name can be a hub id; the shipped models and paths are not."""
    return model is not None and model not in MODELS and bool(_HUB_ID.fullmatch(model)) and not model.startswith(".")


def _code(text: str) -> str:
    """A Python string literal that cannot end a code block."""
    return json.dumps(text).replace("`", "\\u0060")


def _how_to_load(folder: Path, result: Result) -> str:
    whole = f"""## How to load it

With graftlm, which finds the pretrained model, the adapter and the head:

```python
import graftlm

model = graftlm.load({_code(folder.name)})  # the run folder; model.config.id2label names the labels
```"""
    if result.language_adapters:
        return whole + _how_to_swap(folder, result.language_adapters)
    _, auto = _TASKS.get(result.task, ("", "AutoModel"))
    if not _is_adapter(folder):
        return (
            whole
            + f"""

Without graftlm:

```python
from transformers import AutoTokenizer, {auto}

model = {auto}.from_pretrained("model")  # in the run folder
tokenizer = AutoTokenizer.from_pretrained("model")
```"""
        )
    if not _on_the_hub(result.model):
        return whole
    needs_graftlm = _peft_type(folder) not in ("LORA", None)
    first = "import graftlm  # registers the method with PEFT\n" if needs_graftlm else ""
    title = "With PEFT, after `import graftlm`" if needs_graftlm else "Without graftlm; PEFT alone reads the adapter"
    return (
        whole
        + f"""

{title}:

```python
{first}from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, {auto}

adapter = "adapter"  # in the run folder; on the hub, the id of this repository
config = AutoConfig.from_pretrained(adapter)  # has the names of the labels
model = {auto}.from_pretrained({_code(result.model or "")}, config=config)
model = PeftModel.from_pretrained(model, adapter)
tokenizer = AutoTokenizer.from_pretrained(adapter)
```"""
    )


def _how_to_swap(folder: Path, adapters: Mapping[str, str]) -> str:
    other = list(adapters)[-1]
    rows = "\n".join(f"| {markdown_text(language_name(tag))} | {markdown_text(at)} |" for tag, at in adapters.items())
    return f"""

`adapter/` holds the task adapter. It works over a language adapter: one is chosen with
`graftlm.load({_code(folder.name)}, language={_code(other)})`, and swapped later with
`graftlm.stack(model, ["lang_{other}", "default"])`. They are not in this folder; the recipe says where they lie:

| language | adapter |
| --- | --- |
{rows}"""


def _peft_type(folder: Path) -> str | None:
    file = folder / "adapter" / "adapter_config.json"
    return json.loads(file.read_text(encoding="utf-8")).get("peft_type") if file.is_file() else None


def _limits(result: Result) -> str:
    shown = ", ".join(markdown_text(language_name(score.language)) for score in result.zero_shot)
    raw = any(score.base is not None for score in result.scores)
    lines = [
        f"{'Text was read' if raw else 'Labels were seen'} in {markdown_text(language_name(result.source))} only."
        + (f" The scores in {shown} are zero-shot." if shown and not raw else "")
        + " Nothing is known of other languages, nor of text unlike that of the test sets.",
        "The intervals say how much the score may move with other test items. They do not cover the seed of the"
        f" training: this is one run (seed {result.seed}).",
    ]
    if result.selected_on:
        chosen = ", ".join(markdown_text(language_name(tag)) for tag in result.selected_on)
        lines.append(f"Choices (checkpoint, settings) were made on {'text' if raw else 'labels'} in {chosen}.")
    if result.forgetting is None:
        lines.append("What the model could do before and can no longer do was not measured.")
    read = "the text that it was trained on" if raw else "its labels"
    lines.append(f"It repeats what is wrong or unfair in {read} and in the text that the pretrained model has read.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _licences(licences: Licences) -> str:
    named = (
        ("pretrained model", licences.model),
        ("training data", licences.data),
        ("weights in this folder", licences.weights),
    )
    rows = "\n".join(f"| {what} | {markdown_text(licence or 'unknown')} |" for what, licence in named)
    text = f"## Licences\n\n| what | licence |\n| --- | --- |\n{rows}"
    if None in (licences.model, licences.data, licences.weights):
        text += "\n\nUnknown means that graftlm found no licence, not that there are no conditions:"
        text += " look before you hand these files on."
    return text
