"""The verbs of source tasks: `graftlm rank` and `graftlm pool …`. What they call is imported inside them."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftlm.errors import SetupError

if TYPE_CHECKING:
    from graftlm.sources.pool import Skipped

pool_app = typer.Typer(help="Pools of Embedding Space Maps: list, add, remove, verify.", no_args_is_help=True)

Pool = Annotated[Path, typer.Argument(metavar="POOL", help="A pool's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def rank(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The base model: a folder or a hub id.")],
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="The target task: a file or a hub id.")],
    text: Annotated[list[str], typer.Option(metavar="COLUMN", help="The column of texts; twice for pairs.")],
    pool: Annotated[Path, typer.Option(metavar="POOL", help="The pool of the source tasks' Embedding Space Maps.")],
    label: Annotated[str, typer.Option(metavar="COLUMN", help="The column of labels.")] = "label",
    subset: Annotated[str | None, typer.Option(help="Of a data set on the hub.")] = None,
    split: Annotated[str, typer.Option(help="Of a data set on the hub.")] = "train",
    task: Annotated[str | None, typer.Option(help="classification or regression; what labels look like.")] = None,
    encode: Annotated[bool, typer.Option("--encode", help="Number labels that are strings.")] = False,
    method: Annotated[str, typer.Option(help="esm-logme, or size.")] = "esm-logme",
    precision: Annotated[str, typer.Option(help="float64, or float32: about twice as fast.")] = "float64",
    pooling: Annotated[str, typer.Option(help="auto, pooler, cls, mean or last.")] = "auto",
    max_length: Annotated[int | None, typer.Option(help="Tokens a text.  [default: 128]")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts embedded at once.")] = 32,
    top: Annotated[int, typer.Option(min=1, help="How many source tasks are printed.")] = 20,
    as_json: Json = False,
) -> None:
    """Rank source tasks for a target task: which one should the model be fine-tuned on first?"""
    from graftlm.sources.rank import rank_source_tasks
    from graftlm.sources.target import open_dataset

    _quiet()
    data = open_dataset(dataset, subset=subset, split=split)
    if encode and label in data.column_names:
        data = data.class_encode_column(label)
    found = rank_source_tasks(
        model,
        data,
        text_column=text,
        label_column=label,
        pool=pool,
        method=method,
        task=task,
        precision=precision,
        progress=True,
        pooling=pooling,
        max_length=max_length,
        batch_size=batch_size,
    )
    typer.echo(found.to_json() if as_json else found.table(top))


@pool_app.command("list")
def list_entries(pool: Pool, as_json: Json = False) -> None:
    """List what is in a pool."""
    import json
    from dataclasses import asdict

    from graftlm.sources.pool import SourcePool

    found = SourcePool.open(pool)
    if as_json:
        rows = [{key: value for key, value in asdict(e).items() if key != "config"} for e in found.entries.values()]
        typer.echo(json.dumps({"base_model": found.base_model, "width": found.width, "entries": rows}, indent=2))
        return
    width = max([len(name) for name in found.entries] + [len("entry")])
    typer.echo(f"{'entry':<{width}}  {'architecture':<17}  {'rank':>5}  {'rows':>7}  {'MB':>6}")
    for entry in found.entries.values():
        count = "" if entry.rows is None else f"{entry.rows}"
        shape = f"{entry.architecture:<17}  {entry.rank:>5}  {count:>7}  {entry.size / 1e6:>6.2f}"
        typer.echo(f"{entry.name:<{width}}  {shape}")
    total = sum(entry.size for entry in found.entries.values()) / 1e6
    typer.echo(f"{len(found)} maps for {found.base_model}, width {found.width}, {total:.1f} MB")


@pool_app.command()
def add(
    pool: Pool,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="ESM…", help="Folders of maps; OWNER/NAME or a collection on the hub; hub: all of the base."
        ),
    ],
    replace: Annotated[bool, typer.Option("--replace", help="Entries of the same name.")] = False,
    base_model: Annotated[str | None, typer.Option(help="Of a pool that is made; that of the first map.")] = None,
) -> None:
    """Add maps from folders and from the hub; a pool that is not there is made.

    What cannot be added is named at the end; the exit status is then 1.
    """
    from graftlm.sources.pool import SourcePool

    _quiet()
    folders, skipped = _folders(sources, base_model or (SourcePool.open(pool).base_model if _is_pool(pool) else None))
    found = SourcePool.open(pool) if _is_pool(pool) else _make(pool, folders, base_model, skipped)
    if found is not None:
        added, more = found.add_all(folders, replace=replace, progress=True)
        skipped += more
        typer.echo(f"{len(added)} added to {pool}, which holds {len(found)} now")
    _name(skipped)


@pool_app.command()
def remove(pool: Pool, names: Annotated[list[str], typer.Argument(metavar="ENTRY…", help="As listed.")]) -> None:
    """Remove entries from a pool, files included."""
    from graftlm.sources.pool import SourcePool

    found = SourcePool.open(pool)
    found.remove(names)
    typer.echo(f"{len(names)} removed from {pool}, which holds {len(found)} now")


@pool_app.command()
def verify(
    pool: Pool,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make a lost or damaged index anew first.")] = False,
) -> None:
    """Check every entry's files against the index; the exit status is 1 where something is wrong."""
    from graftlm.sources.pool import SourcePool

    skipped: list[Skipped] = []
    if rebuild:
        found, skipped = SourcePool.rebuild(pool)
    else:
        found = SourcePool.open(pool)
    problems = [*skipped, *found.verify(progress=True)]
    typer.echo(f"{len(found)} maps for {found.base_model}, {len(problems)} with a problem")
    _name(problems, "damaged")


def _is_pool(pool: Path) -> bool:
    from graftlm.sources.pool import INDEX

    return (pool / INDEX).exists()


def _folders(sources: list[str], base_model: str | None) -> tuple[list[Path], "list[Skipped]"]:
    """Local folders of everything that is asked for; the hub's are fetched."""
    from graftlm.sources import hub
    from graftlm.sources.pool import Skipped

    folders: list[Path] = []
    remote: list[str] = []
    for source in sources:
        if source == "hub" and not Path(source).exists():
            if base_model is None:
                raise SetupError("whose maps on the hub?", found="hub", fix="--base-model OWNER/NAME")
            remote += hub.published(base_model)
        elif Path(source).is_dir():
            folders.append(Path(source))
        elif hub.is_collection(source):
            remote += hub.in_collection(source)
        elif source.count("/") == 1 and not source.startswith((".", "/", "~")):
            remote.append(source)
        else:
            raise SetupError("neither a folder nor a name on the hub", found=source, allowed="FOLDER, OWNER/NAME, hub")
    fetched, problems = hub.fetch(remote, progress=True) if remote else ({}, {})
    return [*folders, *fetched.values()], [Skipped(name, problem) for name, problem in problems.items()]


def _make(pool: Path, folders: list[Path], base_model: str | None, skipped: "list[Skipped]") -> Any:
    """A new pool for the base model of the first readable map; None where there is none."""
    from graftlm.errors import DataError
    from graftlm.sources.esm import EmbeddingSpaceMap
    from graftlm.sources.pool import Skipped, SourcePool

    for number, folder in enumerate(list(folders)):
        try:
            first = EmbeddingSpaceMap.load(folder)
        except DataError as error:
            skipped.append(Skipped(str(folder), str(error)))
            continue
        del folders[:number]
        return SourcePool.create(pool, base_model=base_model or first.base_model, width=first.width)
    return None


def _name(skipped: "list[Skipped]", what: str = "skipped") -> None:
    if skipped:
        typer.echo(f"{len(skipped)} {what}:", err=True)
        for one in skipped:
            typer.echo(f"  {one.name}: {' '.join(one.problem.split())}", err=True)
        raise typer.Exit(1)


def _quiet() -> None:
    """Libraries' own bars and hints off: ours are shown."""
    import datasets
    import transformers

    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
