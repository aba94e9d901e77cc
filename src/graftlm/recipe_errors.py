"""pydantic's complaints about a recipe in the words of its file: line, key, nearest key, allowed values."""

import math
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from graftlm import yaml_lines
from graftlm.errors import RecipeError
from graftlm.yaml_lines import Path_, nearest

WHOLE_TEXT = ("classification", "multi_label", "regression")


def explain(
    error: ValidationError, root: type[BaseModel], values: Any, name: str, origins: Mapping[Path_, str]
) -> RecipeError:
    """One error that lists every problem of a recipe, each where it stands.

    Args:
        error: what pydantic found.
        root: the model that was validated.
        values: the plain values that it was given.
        name: the recipe's file name, for keys that stand nowhere.
        origins: path → `file:line` or `override`.
    """
    problems: dict[str, str] = {}
    allowed: list[str] | None = None
    fix = None
    for detail in error.errors():
        path = _real_path(detail["loc"], root, values)
        if detail["type"] == "string_type" and isinstance(detail["input"], dict) and len(path) < len(detail["loc"]):
            continue  # a text or a mapping, and this is a mapping: what is wrong with it stands elsewhere
        key = ".".join(path)
        where = place(path, name, origins)
        if detail["type"] == "extra_forbidden":
            names = list(_fields(_describer(root, path[:-1])))
            near = nearest(path[-1], names)
            problems.setdefault(key, f"{where}: unknown key {key!r}" + (f"; did you mean {near!r}?" if near else ""))
            allowed, fix = allowed or names, fix or (f"{near}: …" if near else None)
        elif detail["type"] == "missing":
            problems.setdefault(key, f"{where}: the key {key!r} is missing")
        elif key in problems:  # one message for each member of a union
            problems[key] += f", or {_message(detail)}"
        else:
            found = detail["input"]
            shown = "" if isinstance(found, dict) or detail["type"] == "value_error" else f" (found {found!r})"
            problems[key] = f"{where}: {key + ': ' if key else ''}{_message(detail)}{shown}"
    return RecipeError("\n".join(problems.values()), allowed=allowed, fix=fix)


def refuse_idle(recipe: Any, language_modelling: tuple[str, ...]) -> None:
    """Raises where the recipe sets a key that its task does not read."""
    raw, masked = recipe.task in language_modelling, recipe.task == "masked_lm"
    reads = {
        "data": {
            **dict.fromkeys(("text_b", "label", "answer_start", "label_separator"), not raw),
            **dict.fromkeys(("documents", "old"), raw),
            "parallel": recipe.task in WHOLE_TEXT,
        },
        "training": {"masking": masked},
    }
    for section, keys in reads.items():
        values = getattr(recipe, section)
        for key, is_read in keys.items():
            # a recipe that was written out names every key, so that only another value than the default counts
            if not is_read and getattr(values, key) != type(values).model_fields[key].default:
                raise ValueError(f"task: {recipe.task} does not read {section}.{key}; delete it")
    if recipe.mixing and not raw:
        raise ValueError(f"task: {recipe.task} does not read mixing; delete it")
    if recipe.new_tokens and not (raw and recipe.adapter.method in ("neutral_residues", "lora")):
        raise ValueError("new_tokens: needs raw text and adapter.method: neutral_residues or lora")
    for tag, source in recipe.data.test.items():
        if recipe.mixing and source == recipe.mixing.data:
            raise ValueError(f"mixing.data is the text of data.test.{tag} too: what is trained on cannot be scored")
    penalised = recipe.adapter.method == "neutral_residues" and recipe.adapter.penalty_weight > 0
    if penalised and not (recipe.mixing and recipe.mixing.share):
        raise ValueError(
            "neutral_residues: the penalty is on text of the original domain, and there is none; write "
            f"{'' if raw else 'task: causal_lm and '}mixing: {{share: 0.1, data: …}}, or adapter.penalty_weight: 0"
        )
    for tag in recipe.data.old:
        if tag not in recipe.data.test:
            raise ValueError(f"data.old: {tag!r} has no text in data.test; allowed: {', '.join(recipe.data.test)}")
    _refuse_gaps(recipe, raw)


def _refuse_gaps(recipe: Any, raw: bool) -> None:
    """Raises where a language of the recipe has no language adapter while others have one."""
    known = recipe.adapter.language_adapters
    if known and raw:
        raise ValueError(f"task: {recipe.task} trains a language adapter; delete adapter.language_adapters")
    for tag in (recipe.source, *recipe.data.test):
        if known and tag not in known:
            raise ValueError(
                f"adapter.language_adapters: none for {tag!r}, which is scored or trained in; there: "
                f"{', '.join(known)}; write adapter.language_adapters.{tag}=FOLDER or "
                f"={{train: TEXT, test: HELD_OUT_TEXT}}, or leave {tag} out of data.test; "
                f"to train one: {recipe.adapter.how_to_make(tag)}"
            )


def refuse_lone_parallel(recipe: Any) -> None:
    """Raises where `data.parallel` and the keys that it goes with do not fit each other."""
    data, parallel, method = recipe.data, recipe.data.parallel, recipe.adapter.method
    if parallel is None:
        if method == "flare" and recipe.adapter.source_encoder is None:
            raise ValueError(
                "adapter: {method: flare} fuses two texts; data.parallel says where the second one is, or "
                "adapter.source_encoder which encoder reads the first one too (FLARE MT)"
            )
        if method == "flare" and recipe.task not in WHOLE_TEXT:
            raise ValueError(f"task: {recipe.task} does not go with adapter.source_encoder; {', '.join(WHOLE_TEXT)} do")
        return
    if (method == "flare") != (parallel.read == "fused"):
        raise ValueError(
            "data.parallel.read: fused goes with adapter: {method: flare}, and only with it; "
            f"method: {method} reads target, source, both or zero_shot"
        )
    if parallel.read == "both" and data.text_b is not None:
        raise ValueError("data.parallel.read: both makes a pair of a text and its source; data.text_b is one already")
    if (parallel.text_b is None) != (data.text_b is None):
        raise ValueError("data.text_b and data.parallel.text_b go together")
    if parallel.train is None:
        if parallel.text == data.text:
            raise ValueError(f"data.parallel.text: {parallel.text!r} is data.text itself; name its column or its files")
        return
    if data.id is None:
        raise ValueError("data.parallel joins files by their ids; data.id names the column that both have")
    if (parallel.dev is None) != (data.dev is None):
        raise ValueError("data.dev and data.parallel.dev go together")
    if parallel.test.keys() != data.test.keys():
        raise ValueError(f"data.parallel.test has to name a file for each of {', '.join(data.test)}, and for no other")


def refuse_non_finite(values: Any, name: str, origins: Mapping[Path_, str]) -> None:
    """Raises for NaN and infinity, which YAML can write and pydantic lets pass where any number may stand."""
    for path, value in yaml_lines.flatten(values):
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"{place(path, name, origins)}: {'.'.join(path)} is not a finite number", found=value)


def place(path: Path_, name: str, origins: Mapping[Path_, str]) -> str:
    """Where a key stands, or the nearest key above it that stands anywhere."""
    return next((origins[path[:end]] for end in range(len(path), 0, -1) if path[:end] in origins), name)


def _message(detail: Any) -> str:
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return message.replace("a valid array", "a list").replace("an object", "a mapping of keys to values")


def _real_path(loc: tuple[str | int, ...], root: type[BaseModel], values: Any) -> Path_:
    """Drops from pydantic's location the names of union members, which are no keys of the recipe."""
    path: list[str] = []
    for part in loc:
        described = part in _fields(_describer(root, tuple(path)))
        if isinstance(values, dict) and (described or part in values):
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int):
            values = values[part] if part < len(values) else None
        elif described:
            values = None
        else:
            continue
        path.append(str(part))
    return tuple(path)


def _describer(root: type[BaseModel], path: Path_) -> Any:
    """The annotation of the value at a path: a model, `dict[str, …]`, a union of those, or a plain type."""
    annotation: Any = root
    for part in path:
        fields = _fields(annotation)
        if part in fields:
            annotation = fields[part]
        else:
            inner = [get_args(one)[1] for one in _members(annotation) if get_origin(one) is dict]
            annotation = inner[0] if inner else None
    return annotation


def _members(annotation: Any) -> tuple[Any, ...]:
    return (annotation,) if get_origin(annotation) is dict else (annotation, *get_args(annotation))


def _fields(annotation: Any) -> dict[str, Any]:
    for one in _members(annotation):
        if isinstance(one, type) and issubclass(one, BaseModel):
            return {name: field.annotation for name, field in one.model_fields.items()}
    return {}
