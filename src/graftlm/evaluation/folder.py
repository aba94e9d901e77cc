"""What a run folder holds beside `result.json`, read for the report and the card."""

import json
from collections.abc import Iterator
from pathlib import Path

from graftlm import yaml_lines
from graftlm.errors import DataError

RECIPE = "recipe.resolved.yaml"


def read_lines(path: Path) -> list[dict]:
    """Rows of a JSON lines file; none where there is no file."""
    if not path.exists():
        return []
    rows = []
    for line_number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise DataError("a line that is not JSON", found=f"{path}:{line_number}: {error}") from None
    return rows


def read_settings(folder: Path) -> Iterator[dict[str, str]]:
    """Dotted key, value as text and origin of every value in ``recipe.resolved.yaml``."""
    path = folder / RECIPE
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    values, at = yaml_lines.read(text, path.name)
    lines = text.splitlines()
    for key, value in yaml_lines.flatten(values):
        # a comment is the last thing on its line, and origins hold neither quotes nor brackets
        _, mark, origin = lines[at[key] - 1].rpartition("  # ")
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        yield {
            "key": ".".join(key),
            "value": shown,
            "origin": origin if mark and not set(origin) & set("\"'[]{}") else "",
        }
