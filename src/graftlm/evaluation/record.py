"""What `result.json` and `study.json` have in common: strict records, atomic files, a schema that documents itself."""

import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from graftlm.errors import DataError


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# JSON has no NaN: an undefined number is null
Number = Annotated[float | None, BeforeValidator(_finite_or_none)]


class Record(BaseModel):
    """Frozen, without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_record(kind: type[AnyRecord], folder: str | Path, file: str, schema: str, *, fix: str) -> AnyRecord:
    """Reads a record from its file in a folder, or from the file itself.

    Args:
        kind: what to read.
        folder: folder or file.
        file: the file's name in a folder.
        schema: what the field `schema` must say.
        fix: what to type where there is no such file.

    Raises:
        DataError: no such file, not JSON, another schema version, or fields that are missing, unknown or of the wrong
            type.
    """
    path = Path(folder)
    path = path / file if path.is_dir() or path.suffix != ".json" else path
    what = kind.__name__.lower()
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"there is no {what} here", found=path, fix=fix) from None
    except ValueError as error:
        raise DataError(f"a {what} that is not JSON", found=f"{path}: {error}") from None
    found = record.get("schema") if isinstance(record, dict) else None
    if found != schema:
        raise DataError(
            f"a {what} of another schema version",
            found=f"{found!r} in {path}",
            allowed=schema,
            fix="read it with the version of graftlm that its `versions` names, or run the recipe again",
        )
    try:
        return kind.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"a {what} with a wrong field: {where}: {first['msg']}", found=path) from None


def write_record(record: Record, folder: str | Path, file: str) -> Path:
    """Writes a record into a folder, under a temporary name first; returns its path."""
    path = Path(folder) / file
    values = record.model_dump(mode="json", by_alias=True)
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: under a temporary name in the same folder, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0600 would hide a shared run folder's file
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def schema_rows(
    model: type[BaseModel], prefix: str = "", described: set[type[BaseModel]] | None = None
) -> Iterator[tuple[str, str, str]]:
    """(field, type, meaning) of every field, nested ones with dots; what is used in many places is described once."""
    described = set() if described is None else described
    for name, field in model.model_fields.items():
        title = f"{prefix}{field.alias or name}"
        nested, shown, suffix = _type_of(field.annotation)
        yield title, shown, field.description or ""
        if nested is not None and nested not in described:
            described.add(nested)
            yield from schema_rows(nested, f"{title}{suffix}.", described)


def _type_of(annotation: Any) -> tuple[type[BaseModel] | None, str, str]:
    """(nested model or None, type as JSON names it, what stands between the field and the nested field)."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    optional = " or null" if type(None) in get_args(annotation) else ""
    origin = getattr(annotation, "__origin__", None)
    if origin is tuple:
        nested, shown, _ = _type_of(parts[0])
        return nested, f"list of {shown}s", "[]"
    if origin is dict:
        nested, shown, _ = _type_of(parts[1])
        return nested, f"map to {shown}", "{}"
    if origin is Literal:
        return None, "string", ""
    if origin is Annotated:
        return _type_of(parts[0])
    if optional:
        nested, shown, suffix = _type_of(parts[0])
        return nested, shown + optional, suffix
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, annotation.__name__.lower(), ""
    return None, {str: "string", int: "integer", float: "number", bool: "boolean"}.get(annotation, "time"), ""


_FIELDS = re.compile(r"(?<=<!-- fields -->\n).*?(?=<!-- end -->)", flags=re.DOTALL)


def update_document(model: type[BaseModel], path: str | Path) -> None:
    """Replaces the table of fields in a document, between its two markers, by that of this version."""
    table = "| field | type | meaning |\n| --- | --- | --- |\n" + "".join(
        f"| `{field}` | {kind} | {meaning} |\n" for field, kind, meaning in schema_rows(model)
    )
    path = Path(path)
    write_text(path, _FIELDS.sub(lambda _: table, path.read_text(encoding="utf-8")))
