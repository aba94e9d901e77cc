"""Sphinx: pages in Markdown (MyST), the reference from docstrings. Warnings are errors (see the Makefile)."""

import types
import typing

from pydantic import BaseModel
from typer.main import get_command

import graftlm
from graftlm.cli import app
from graftlm.recipe import Recipe

project = "graftlm"
author = "The graftlm authors"
copyright = "2026, the graftlm authors"
release = version = graftlm.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_use_ivar = True
napoleon_custom_sections = [("Differs from the paper in", "notes_style"), ("Source", "notes_style")]
# Docstrings name things in `single backticks`: a link where it is one of ours, else code.
default_role = "py:obj"

html_theme = "furo"
html_title = f"graftlm {release}"


def recipe_fields(model: type[BaseModel] = Recipe, prefix: str = "") -> str:
    """A table row for every key that a recipe may have, read from the types that check it."""
    rows = []
    for name, field in model.model_fields.items():
        nested = [part for part in _parts(field.annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
        default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
        meaning = field.description or (nested[0].__doc__ or "").strip() if nested else field.description or ""
        choices = [f"`{choice}`" for part in _parts(field.annotation) for choice in _choices(part)]
        meaning = "; ".join(filter(None, [", ".join(choices), meaning.rstrip(".")]))
        rows.append(f"| `{prefix}{name}` | {default} | {meaning.replace('|', '∣')} |")
        if nested and nested[0].__name__ != "Source":
            inner = "LANGUAGE." if typing.get_origin(field.annotation) is dict else ""
            rows.append(recipe_fields(nested[0], f"{prefix}{name}.{inner}"))
    return "\n".join(rows)


def _parts(annotation: object) -> list[object]:
    """The alternatives of a union, and the values of a mapping."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) in (typing.Union, dict):
        return [inner for part in typing.get_args(annotation) for inner in _parts(part)]
    return [annotation]


def _choices(annotation: object) -> tuple[object, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()


def _shown(value: object) -> str:
    if isinstance(value, BaseModel):
        return ""
    names = {None: "null", True: "true", False: "false", "": '""'}
    text = names[value] if isinstance(value, str | bool | None) and value in names else value
    return f"`{list(text) if isinstance(text, tuple) else text}`"


def command_line() -> str:
    """What `graftlm VERB --help` says, verb by verb."""

    def sections(name: str, command: typing.Any) -> typing.Iterator[str]:
        yield f"## `{name}`\n\n{(command.help or '').strip()}\n"
        for parameter in command.params:
            is_option = parameter.param_type_name == "option"
            shown = parameter.opts[0] if is_option else parameter.metavar or parameter.name.upper()
            if text := getattr(parameter, "help", None):
                yield f"- `{shown}`: {text}"
        yield ""
        for verb, inner in getattr(command, "commands", {}).items():
            yield from sections(f"{name} {verb}", inner)

    verbs = get_command(app).commands.items()
    return "\n".join(line for verb, command in verbs for line in sections(f"graftlm {verb}", command))


def fill_in(app: object, page: str, source: list[str]) -> None:
    """Replace the markers of the reference pages by what the code says."""
    header = "| key | default | meaning |\n| --- | --- | --- |\n"
    if page == "reference/recipe":
        source[0] = source[0].replace("<!-- recipe fields -->", header + recipe_fields())
    if page == "reference/command-line":
        source[0] = source[0].replace("<!-- verbs -->", command_line())


def setup(app: object) -> None:
    app.connect("source-read", fill_in)
