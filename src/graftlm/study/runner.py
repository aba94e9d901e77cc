"""One run of a study in a process of its own: its memory is its own, and if it dies, it dies alone."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from graftlm import recipe as recipes
from graftlm.errors import GraftError
from graftlm.evaluation.folder import RECIPE
from graftlm.evaluation.record import write_text
from graftlm.evaluation.result import FILE as RESULT
from graftlm.fingerprint import changed_files
from graftlm.language_runs import language_runs, placed, trained
from graftlm.recipe import Recipe
from graftlm.study.claims import Claims

CLAIMS, LOGS, FAILED = "claims", "logs", "failed"
DONE, BROKEN, TAKEN, STOPPED = 0, 1, 75, 130  # exit codes
_PAUSE = 2.0  # seconds between two looks at a language adapter that another process trains


def finished(recipe: Recipe) -> bool:
    """Whether the run's folder holds its result; of another recipe's or other data's the run itself will complain."""
    if not all(map(finished, language_runs(recipe).values())):
        return False
    recipe = placed(recipe)
    folder = recipe.folder
    if not (folder / RESULT).is_file() or not (folder / RECIPE).is_file():
        return False
    same = _is_of(folder / RECIPE, (folder / RESULT).stat().st_mtime_ns, recipe.relocated(folder))
    return same and not changed_files(recipe, folder)


_known: dict[tuple[Path, int, str], bool] = {}  # reading YAML with its lines takes longer than all else here


def _is_of(resolved: Path, when: int, recipe: Recipe) -> bool:
    key = resolved, when, recipe.model_dump_json()
    if key not in _known:
        _known[key] = not recipes.differences(recipes.load_recipe(resolved), recipe)
    return _known[key]


def error_of(study: Path, name: str) -> str | None:
    """What ended the run, where it failed."""
    try:
        return json.loads((study / FAILED / f"{name}.json").read_text(encoding="utf-8"))["error"]
    except FileNotFoundError:
        return None


def error_age(study: Path, name: str) -> int | None:
    """When the run failed last, in nanoseconds of the file system's clock; None where it did not."""
    try:
        return (study / FAILED / f"{name}.json").stat().st_mtime_ns
    except FileNotFoundError:
        return None


def note_error(study: Path, name: str, error: str, details: str = "") -> None:
    """Keeps what ended a run."""
    text = json.dumps({"error": error, "details": details}, indent=2, ensure_ascii=False) + "\n"
    write_text(study / FAILED / f"{name}.json", text)


def do(recipe: Recipe, study: Path) -> int:
    """Claims the run and does it, in this process; returns one of the exit codes.

    An error is kept in `failed/`, everything printed goes to `logs/`.
    """
    claim = Claims(study / CLAIMS).take(recipe.name)
    if claim is None:
        return TAKEN
    try:
        if finished(recipe):  # by somebody who gave the claim back a moment ago
            return DONE
        (study / FAILED / f"{recipe.name}.json").unlink(missing_ok=True)
        from graftlm.run import run_recipe

        _share_languages(recipe, study)
        run_recipe(recipe, progress=False)
    except KeyboardInterrupt:
        return STOPPED
    except GraftError as error:
        note_error(study, recipe.name, str(error), traceback.format_exc())
        return BROKEN
    except Exception as error:  # noqa: BLE001  whatever ends one run must not end the others; it is kept and shown
        note_error(study, recipe.name, f"{type(error).__name__}: {error}", traceback.format_exc())
        return BROKEN
    finally:
        claim.give_back()
    return DONE


def _share_languages(recipe: Recipe, study: Path) -> None:
    """One of the processes trains a language adapter, the others wait for it."""
    from graftlm.run import run_recipe

    def once(language: Recipe) -> None:
        while not finished(language):
            claim = Claims(study / CLAIMS).take(language.name)
            if claim is None:
                time.sleep(_PAUSE)
                continue
            try:
                run_recipe(language, progress=False)
            finally:
                claim.give_back()
            return

    trained(recipe, once)


def _child(recipe: Recipe, study: Path) -> None:
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(STOPPED)  # nobody is left to tell; the checkpoints stay

    threading.Thread(target=follow, daemon=True).start()
    log = study / LOGS / f"{recipe.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    code = do(recipe, study)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # libraries' threads and atexit hooks have had their chance to hang


def _context() -> Any:
    """A server that has imported the libraries and forks a fresh process for each run in a moment."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["graftlm.run"])
    return context


def do_in_process(recipe: Recipe, study: Path) -> int:
    """`do` in a process of its own; returns its exit code, negative where a signal killed it.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the run has saved a checkpoint.
    """
    process = _context().Process(target=_child, args=(recipe, study), name=recipe.name)
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        process.join()  # the terminal sent it Ctrl-C too
        raise
    code = process.exitcode
    if code == STOPPED:
        raise KeyboardInterrupt
    if code < 0:
        cause = "; the machine may be out of memory" if -code == signal.SIGKILL else ""
        note_error(study, recipe.name, f"ended by {signal.Signals(-code).name}{cause}")
    elif code not in (DONE, BROKEN, TAKEN):
        note_error(study, recipe.name, f"the process ended with status {code}; see {LOGS}/{recipe.name}.log")
    return code
