"""graftlm's verbs: parse, call, print. What they call is imported inside them, so that --help answers at once."""

import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from graftlm import cli_sources
from graftlm.cli_output import err, log_to_stderr, out
from graftlm.errors import GraftError, RecipeError

if TYPE_CHECKING:
    from graftlm.check import Check
    from graftlm.evaluation.result import Result
    from graftlm.study.plan import Study

app = typer.Typer(
    help="Graft a new language, domain or task onto a pretrained language model, keep what it knew, and show both.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
recipes_app = typer.Typer(help="List the recipes that come with graftlm, or copy one.", invoke_without_command=True)
app.add_typer(recipes_app, name="recipes")
app.command("rank")(cli_sources.rank)
app.add_typer(cli_sources.pool_app, name="pool")

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; `graftlm recipes` lists examples.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="seed=1 training.epochs=5 …")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/demo.")]
OtherTests = Annotated[
    list[str] | None, typer.Option(metavar="LANGUAGE=PATH", help="Another test set; may be repeated.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def main() -> None:
    """The `graftlm` command."""
    with _reported():
        app(standalone_mode=True)


@contextmanager
def _reported() -> Iterator[None]:
    """Errors as a few lines instead of a traceback: exit status 2 for ours, 130 after Ctrl-C."""
    try:
        yield
    except GraftError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _quiet_libraries() -> None:
    """Our own messages on standard error; transformers' only where they are errors (or TRANSFORMERS_VERBOSITY asks)."""
    import datasets
    import transformers

    log_to_stderr()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # of loading weights; training shows its own
    datasets.disable_progress_bars()
    warnings.showwarning = _show_warning
    # peft 0.21 reads an attribute that transformers 5.23 deprecates
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    err.print(f"[yellow]warning:[/] {escape(str(message))}", soft_wrap=True, highlight=False)


def _show(result: "Result", as_json: bool) -> None:
    if as_json:
        out.print_json(result.model_dump_json(by_alias=True))
    else:
        out.print(result.table())


@app.command()
def demo(as_json: Json = False) -> None:
    """Train the shipped recipe on the shipped data, offline: English labels, six languages scored."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from graftlm.recipe import load_recipe, shipped

    _train(load_recipe(shipped()["demo"]), as_json)


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Train a recipe into its run folder; a stopped run goes on where it stopped.

    On several devices: accelerate launch -m graftlm train RECIPE …
    """
    from graftlm.recipe import load_recipe

    _train(load_recipe(recipe, overrides or ()), as_json)


def _train(recipe: Any, as_json: bool) -> None:
    from graftlm.run import run_recipe

    _quiet_libraries()
    result = run_recipe(recipe)
    _show(result, as_json)
    if not as_json:
        out.print(f"report: {recipe.folder / 'report.html'}", highlight=False, soft_wrap=True, markup=False)


@app.command()
def check(recipe: RecipeFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show what a recipe would do: everything but the training."""
    from graftlm.check import check as examine
    from graftlm.recipe import load_recipe

    _quiet_libraries()
    found = examine(load_recipe(recipe, overrides or ()))
    if as_json:
        out.print_json(json.dumps(found.as_dict()))
    else:
        _show_check(found)


def _show_check(found: "Check") -> None:
    out.print("[bold]recipe[/], with where each value came from")
    out.print(found.recipe, highlight=False, markup=False)

    if found.language_adapters:
        _show_languages(found.language_adapters)
    table = Table(title="trainable parameters, bottom first", title_justify="left")
    table.add_column("layer")
    table.add_column("parameters", justify="right")
    for name, count in found.layers.items():
        table.add_row(name, f"{count:,}")
    trainable = sum(found.layers.values())
    table.add_row("together", f"{trainable:,} of {found.total_parameters:,} ({trainable / found.total_parameters:.2%})")
    out.print(table)
    if found.targets:
        out.print(f"LoRA on: {', '.join(found.targets)}", markup=False)
    if size := found.size:
        share = f"{size['share']:.2%} of {size['of']:,} ({size['counted'].replace('_', '-')})"
        units = f"{size['hidden_units']} hidden units in each of {size['blocks']} blocks"
        out.print(f"neutral residues: {units}, {size['added']:,} parameters, {share}", highlight=False)
    out.print(f"random at the start, trained and saved: {', '.join(found.fresh) or 'nothing'}\n", markup=False)

    table = Table(title="text", title_justify="left")
    for column in ("split", "language", "items", "inputs", "tokens a word", "characters a token", "unknown", "cut"):
        table.add_column(column, justify="left" if column in ("split", "language") else "right")
    for row in found.texts:
        ratios = f"{row.tokens_per_word:.2f}", f"{row.characters_per_token:.2f}"
        shares = f"{row.unknown:.2%}", f"{row.truncated:.2%}"
        table.add_row(row.split, row.language, str(row.items), str(row.windows), *ratios, *shares)
    out.print(table)
    first = f"first training item: {found.example}\nits label:           {found.label}\n"
    out.print(first, markup=False, highlight=False)

    memory = found.memory
    out.print(
        f"one step:  loss {found.loss:.3f}, {found.step_seconds:.3f} s forward and backward\n"
        f"the run:   {found.steps} steps, about {_duration(found.train_seconds)} (estimate, without evaluation)\n"
        f"memory:    {memory['parameters_mb']:.1f} MB parameters, {memory['gradients_mb']:.1f} MB gradients, "
        f"{memory['optimizer_mb']:.1f} MB optimizer (estimate; activations come on top)",
        highlight=False,
    )
    if found.source_cache_bytes is not None:
        out.print(f"source:    {found.source_cache_bytes / 1e6:.1f} MB on disk; the step above is one without it")
    if penalty := found.penalty:
        term = f"{penalty.weight * penalty.term:.3g} ({penalty.weight:g} · {penalty.term:.3g})"
        ratio = f"gradient {penalty.gradients:.2g} of the loss's"
        out.print(
            f"penalty:   {term} beside a loss of {penalty.loss:.3f}, {ratio}, after one step of Adam", highlight=False
        )
    for advice in found.advice:
        out.print(f"advice:    {advice}", highlight=False, markup=False)
    if found.openings:
        steps = ", ".join(f"{step}: {' '.join(names) if names else 'largest tr(F)'}" for step, names in found.openings)
        out.print(f"opens at:  {steps}", highlight=False, markup=False)


def _show_languages(found: "dict[str, Check]") -> None:
    table = Table(title="language adapters, trained first; what follows is without them", title_justify="left")
    for column in ("language", "documents", "tokens a word", "unknown", "parameters", "steps", "estimate"):
        table.add_column(column, justify="left" if column == "language" else "right")
    for language, one in found.items():
        text, parameters = one.texts[0], sum(one.layers.values())
        cells = (str(text.items), f"{text.tokens_per_word:.2f}", f"{text.unknown:.2%}", f"{parameters:,}")
        table.add_row(language, *cells, str(one.steps), _duration(one.train_seconds))
    out.print(table)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@app.command()
def evaluate(
    run: RunFolder,
    test: OtherTests = None,
    as_json: Json = False,
) -> None:
    """Score a finished run on its own test sets, or on others; nothing is written."""
    tests = dict(_pair(one) for one in test) if test else None
    from graftlm.run import evaluate as score_run

    _quiet_libraries()
    _show(score_run(run, tests), as_json)


Several = Annotated[list[str] | None, typer.Option(metavar="KEY=A,B,…", help="What varies; may be repeated.")]
Arms = Annotated[
    list[str] | None,
    typer.Option(metavar="'[NAME: ]KEY=VALUE …'", help="Instead of --vary: one variant by hand; repeat it."),
]
Tuned = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=A,B,…", help="Tuned for each variant on the dev split, with equal budgets."),
]


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe's YAML, or that of a study.")],
    overrides: Overrides = None,
    vary: Several = None,
    variant: Arms = None,
    tune: Tuned = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each variant.  [default: 3]")] = None,
    name: Annotated[str | None, typer.Option(help="The study's folder under studies/.")] = None,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Do the I-th of N parts of the runs: array jobs.")] = "1/1",
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Do the runs on a Ray cluster; auto, local.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run variants of a recipe with several seeds and hold them against the first one.

    What is finished is not repeated, a run that fails does not end the others, and the same command started twice
    divides the runs. Tables are printed; study.json, study.md and study.html lie in the study's folder.
    """
    study = _study(recipe, overrides or [], vary, variant, tune, seeds, name)
    from graftlm.study.compare import compare as run_study
    from graftlm.study.execute import Shard

    part = Shard.parse(shard)
    log_to_stderr()
    made = run_study(study, part, ray=ray)
    if made is None:
        return
    if as_json:
        out.print_json(made.model_dump_json(by_alias=True))
        return
    from graftlm.evaluation.comparison_table import notes, tables

    for title, table in tables(made):
        out.print(f"\n[bold]{escape(title)}[/]")
        out.print(table)
    for note in notes(made):
        out.print(note, highlight=False, markup=False, soft_wrap=True)
    out.print(f"page: {study.folder / 'study.html'}", highlight=False, markup=False, soft_wrap=True)


def _study(
    file: Path,
    overrides: list[str],
    vary: list[str] | None,
    variant: list[str] | None,
    tune: list[str] | None,
    seeds: int | None,
    name: str | None,
) -> "Study":
    from graftlm.recipe import load_recipe
    from graftlm.study.plan import is_study, load_study, parse_variant, parse_vary, plan_study

    if is_study(file):
        given = {"--vary": vary, "--variant": variant, "--tune": tune, "--seeds": seeds, "--name": name}
        if idle := [option for option, value in given.items() if value is not None]:
            raise RecipeError(
                "a study's YAML says this itself", found=f"{', '.join(idle)} beside {file}", fix=str(file)
            )
        return load_study(file, overrides)
    return plan_study(
        load_recipe(file, overrides),
        vary=dict(map(parse_vary, vary)) if vary else None,
        variants=dict(map(parse_variant, variant)) if variant else None,
        tune=dict(map(parse_vary, tune)) if tune else None,
        seeds=3 if seeds is None else seeds,
        name=name,
    )


def _pair(text: str) -> tuple[str, str]:
    language, equals, path = text.partition("=")
    if not equals or not language or not path:
        raise RecipeError("a test set is written LANGUAGE=PATH", found=text, fix="--test deu=test.deu.jsonl")
    return language, path


@app.command()
def merge(run: RunFolder) -> None:
    """Write the model of a finished LoRA run as a checkpoint of its own, which a recipe's model may name."""
    from graftlm.folder import merge as merge_run

    _quiet_libraries()
    out.print(str(merge_run(run)), highlight=False, soft_wrap=True, markup=False)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Folders of runs, studies and rankings.")],
) -> None:
    """Write report.html again from a finished run's files, study.html from a study's, ranking.html from a ranking's."""
    from graftlm.evaluation.comparison import FILE as STUDY
    from graftlm.evaluation.comparison_report import write_comparison_report
    from graftlm.evaluation.report import write_report
    from graftlm.ranking_report import write_ranking_report
    from graftlm.sources.result import FILE as RANKING

    pages = {STUDY: write_comparison_report, RANKING: write_ranking_report}
    for run in runs:
        write = next((page for file, page in pages.items() if (run / file).is_file()), write_report)
        out.print(str(write(run)), highlight=False, soft_wrap=True, markup=False)


@recipes_app.callback()
def recipes(context: typer.Context, as_json: Json = False) -> None:
    """List the recipes that come with graftlm, or copy one."""
    if context.invoked_subcommand:
        return
    from graftlm.recipe import shipped

    # a recipe's first line says what it is for
    found = {name: file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for name, file in shipped().items()}
    if as_json:
        out.print_json(json.dumps(found))
        return
    table = Table("recipe", "what it does", caption="graftlm recipes copy NAME", caption_justify="left")
    for name, title in found.items():
        table.add_row(name, title)
    out.print(table)


@recipes_app.command()
def copy(
    name: Annotated[str, typer.Argument(help="One of `graftlm recipes`.")],
    to: Annotated[Path | None, typer.Argument(help="A file or folder; the working folder otherwise.")] = None,
) -> None:
    """Copy a recipe, to be changed."""
    from graftlm.recipe import shipped

    known = shipped()
    if name not in known:
        raise RecipeError("there is no such recipe", found=name, allowed=known, fix="graftlm recipes")
    target = to or Path()
    target = target / f"{name}.yaml" if target.is_dir() else target
    if target.exists():
        fix = f"graftlm recipes copy {name} OTHER.yaml"
        raise RecipeError("the file exists, and is not overwritten", found=target, fix=fix)
    shutil.copyfile(known[name], target)
    out.print(str(target), highlight=False, markup=False)
