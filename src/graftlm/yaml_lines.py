"""YAML 1.2 with the line of every value: what a recipe's error messages and provenance are made of."""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from graftlm.errors import RecipeError

Path_ = tuple[str, ...]


def _parser() -> YAML:
    return YAML(typ="safe", pure=True)  # the pure parser is YAML 1.2: `1e-4` is a number and `no` is a string


def read(text: str, name: str) -> tuple[dict[str, Any], dict[Path_, int]]:
    """Reads one YAML mapping; the second value has the line (from 1) of each key's path.

    Args:
        text: the YAML.
        name: what an error calls it, a file name as a rule.

    Raises:
        RecipeError: no YAML 1.2, a key given twice, a tag that safe YAML has not, or no mapping at the top.

    Example:
        >>> values, lines = read("seed: 1\\ndata:\\n  text: no\\n", "topics.yaml")
        >>> values, lines["data", "text"]
        ({'seed': 1, 'data': {'text': 'no'}}, 3)
    """
    try:
        node = _parser().compose(text)
        values = _parser().load(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = (error.problem or "this is not YAML").split(" with value ")[0]
        fix = "indent with spaces; YAML does not allow tabs" if "\\t" in problem else None
        raise RecipeError(f"{name}:{line}: {problem}", fix=fix) from error
    except (YAMLError, ValueError) as error:
        raise RecipeError(f"{name}: this is not YAML 1.2: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{name}: a recipe is a mapping of keys to values", found=type(values).__name__)
    return values, dict(_lines(node, ()))


def _lines(node: Node, path: Path_) -> Iterator[tuple[Path_, int]]:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            inner = (*path, str(key.value))
            yield inner, key.start_mark.line + 1
            yield from _lines(value, inner)
    elif isinstance(node, SequenceNode):
        for index, value in enumerate(node.value):
            yield (*path, str(index)), value.start_mark.line + 1
            yield from _lines(value, (*path, str(index)))


def override(values: dict[str, Any], assignment: str) -> Path_:
    """Applies one `key.key=value` in place and returns its path; the value is read as YAML.

    Example:
        >>> values = {"seed": 0}
        >>> override(values, "training.learning_rate=1e-4"), values
        (('training', 'learning_rate'), {'seed': 0, 'training': {'learning_rate': 0.0001}})
    """
    key, equals, text = assignment.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise RecipeError("an override is written key=value", found=assignment, fix="training.learning_rate=1e-4")
    try:
        value = _parser().load(text)
    except YAMLError as error:
        raise RecipeError(f"the value of {key} is not YAML", found=text, fix=f"{key}='\"{text}\"'") from error
    place = values
    for depth, part in enumerate(path[:-1]):
        inner = place.get(part)
        if inner is None:
            inner = place[part] = {}
        if not isinstance(inner, dict):
            raise RecipeError(
                f"{'.'.join(path[: depth + 1])} is a single value, so {key} cannot be set under it", found=inner
            )
        place = inner
    place[path[-1]] = value
    return path


def nearest(key: str, allowed: Iterable[str]) -> str | None:
    """The allowed key that looks most like `key`, or None where none does."""
    found = difflib.get_close_matches(key, list(allowed), n=1, cutoff=0.5)
    return found[0] if found else None


def flatten(values: Mapping[str, Any], path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every leaf with its path; lists and empty mappings are leaves."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def dump(values: Mapping[str, Any], comments: Mapping[Path_, str], path: Path_ = ()) -> str:
    """Writes nested plain values as YAML 1.2, a comment behind each leaf; the result can be read again.

    Leaves are written as JSON, which YAML 1.2 contains; a string that YAML reads as itself stays bare.

    Example:
        >>> print(dump({"seed": 0, "data": {"text": "text"}}, {("seed",): "default"}), end="")
        seed: 0  # default
        data:
          text: text
    """
    lines = []
    indent = "  " * len(path)
    for key, value in values.items():
        here = (*path, str(key))
        if isinstance(value, Mapping) and value:
            lines.append(f"{indent}{_scalar(str(key))}:\n{dump(value, comments, here)}")
            continue
        comment = f"  # {comments[here]}" if here in comments else ""
        lines.append(f"{indent}{_scalar(str(key))}: {_scalar(value)}{comment}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, str) and value and value.isprintable() and not set(value) & set("#:,[]{}&*!|>'\"%@`?"):
        try:
            if _parser().load(value) == value:
                return value
        except YAMLError:
            pass  # not readable when bare: it is quoted below
    return json.dumps(value, ensure_ascii=False)


def at(values: Any, path: Path_) -> Any:
    """The value at a path of nested mappings."""
    for part in path:
        values = values[part]
    return values


def read_file(file: Path) -> str:
    """The text of a recipe; a missing file, a folder and bytes that are not UTF-8 are RecipeErrors."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError("there is no such recipe", found=file, fix="graftlm recipes") from error
    except IsADirectoryError as error:
        raise RecipeError("a recipe is a YAML file, and this is a folder", found=file) from error
    except UnicodeDecodeError as error:
        raise RecipeError("a recipe is UTF-8 text", found=f"{file}: {error.reason} at byte {error.start}") from error
