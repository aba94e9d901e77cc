"""The verbs of source tasks: `graftlm rank` and `graftlm pool …`. What they call is imported inside them."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftlm.cli_output import log_to_stderr
from graftlm.errors import SetupError

if TYPE_CHECKING:
    from graftlm.sources.embed import Embedder
    from graftlm.sources.pool import Skipped

pool_app = typer.Typer(help="Pools of Embedding Space Maps: build, add, list, verify, remove.", no_args_is_help=True)

Pool = Annotated[Path, typer.Argument(metavar="POOL", help="A pool's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def rank(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The base model: starter, a folder or a hub id.")],
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="The target task: a file or a hub id.")],
    text: Annotated[list[str], typer.Option(metavar="COLUMN", help="The column of texts; twice for pairs.")],
    pool: Annotated[Path, typer.Option(metavar="POOL", help="The pool of the source tasks' Embedding Space Maps.")],
    label: Annotated[str, typer.Option(metavar="COLUMN", help="The column of labels.")] = "label",
    subset: Annotated[str | None, typer.Option(help="Of a data set on the hub.")] = None,
    split: Annotated[str, typer.Option(help="Of a data set on the hub.")] = "train",
    task: Annotated[str | None, typer.Option(help="classification or regression; what labels look like.")] = None,
    encode: Annotated[bool, typer.Option("--encode", help="Number labels that are strings.")] = False,
    method: Annotated[str, typer.Option(help="esm-logme, or size.")] = "esm-logme",
    precision: Annotated[str, typer.Option(help="float64, or float32: 1.2 to 2 times as fast.")] = "float64",
    threads: Annotated[int | None, typer.Option(help="Maps scored at once.  [default: one a core]")] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, cuda:1 …: of the model and the maps.  [default: the model on a GPU if there is one]"
        ),
    ] = None,
    maps_at_once: Annotated[
        int | None, typer.Option(help="Maps in a batch on a GPU.  [default: by its memory]")
    ] = None,
    pooling: Annotated[str, typer.Option(help="auto, pooler, cls, mean or last.")] = "auto",
    max_length: Annotated[int | None, typer.Option(help="Tokens a text.  [default: 128]")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts embedded at once.")] = 32,
    top: Annotated[int, typer.Option(min=1, help="How many source tasks are printed.")] = 20,
    to: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Also write ranking.json and ranking.html there.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Rank source tasks for a target task: which one should the model be fine-tuned on first?"""
    from graftlm.sources.rank import rank_source_tasks
    from graftlm.sources.target import open_dataset

    _quiet()
    data = open_dataset(dataset, subset=subset, split=split)
    if encode and label in data.column_names:
        data = data.class_encode_column(label)
    embedding: dict[str, Any] = {"pooling": pooling, "max_length": max_length, "batch_size": batch_size}
    found = rank_source_tasks(
        _starter(device=device, **embedding) if model == "starter" else model,
        data,
        text_column=text,
        label_column=label,
        pool=pool,
        method=method,
        task=task,
        precision=precision,
        threads=threads,
        device=device,
        maps_at_once=maps_at_once,
        progress=True,
        **({} if model == "starter" else embedding),
    )
    typer.echo(found.to_json() if as_json else found.table(top))
    if to is not None:
        from graftlm.ranking_report import write_ranking

        typer.echo(f"page: {write_ranking(found, to)}", err=True)


def _starter(**embedding: Any) -> "Embedder":
    """The shipped encoder, under the name that pools know it by."""
    from graftlm.sources.embed import Embedder
    from graftlm.starter import starter_model

    found = Embedder(str(starter_model("starter")), progress=True, **embedding)
    found.name = "starter"
    return found


@pool_app.command()
def build(
    tasks: Annotated[Path, typer.Argument(metavar="TASKS", help="A YAML of source tasks: recipe, tasks, pool.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="For the recipe that all tasks share.")
    ] = None,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Do the I-th of N parts of the tasks: array jobs.")] = "1/1",
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Do the runs on a Ray cluster; auto, local.")
    ] = None,
) -> None:
    """Fine-tune the base model on each source task, fit its map, and add it to a pool.

    What is finished is not repeated, and a task that fails does not end the others: those that are not in the pool in
    the end are named, and the exit status is then 1.
    """
    from graftlm.study.execute import Shard
    from graftlm.study.pool_build import build_pool, load_tasks

    plan, part = load_tasks(tasks, overrides or ()), Shard.parse(shard)
    _quiet()
    log_to_stderr()
    made = build_pool(plan, part, ray=ray)
    for name, line in made.tasks.items():
        typer.echo(f"{name}: {line}")
    typer.echo(f"{len(made.tasks)} of {len(plan.study.variants)} source tasks are in {made.pool}")
    if made.waiting:
        typer.echo(f"{len(made.waiting)} are left to other processes: {', '.join(made.waiting)}")
    _name(list(made.skipped), "without a map")


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
