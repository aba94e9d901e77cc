"""`import graftlm` is light, and the stub says what the package has."""

import ast
import importlib
import importlib.metadata
import pkgutil
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import graftlm

HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "sklearn", "scipy", "pandas", "matplotlib")
STUB = Path(graftlm.__file__).with_suffix(".pyi")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded_after(code: str) -> list[str]:
    return run(f"{code}\nimport sys\nprint(*[name for name in {HEAVY} if name in sys.modules])").split()


def stub_names() -> dict[str, str]:
    """{public name: module} as type checkers read them."""
    names = {}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 1
            for alias in node.names:
                assert alias.asname == alias.name, "`X as X` is what makes a name public in a stub"
                names[alias.name] = f"graftlm.{node.module}"
    return names


def test_the_check_itself_sees_a_heavy_import():
    assert loaded_after("import matplotlib") == ["matplotlib"]


@pytest.mark.parametrize(
    "code",
    [
        "import graftlm",
        "import graftlm; graftlm.GraftError; graftlm.__version__; dir(graftlm)",
        "from graftlm.cli import main",
    ],
)
def test_light(code):
    assert loaded_after(code) == []


def test_a_name_loads_only_what_it_needs():
    loaded = loaded_after("import graftlm; graftlm.describe")
    assert "torch" in loaded and "peft" not in loaded and "transformers" not in loaded


def test_help_answers_within_a_second():
    seconds = []
    for _ in range(3):  # processor time: a busy machine makes the wall clock lie
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        text = subprocess.run(
            [sys.executable, "-m", "graftlm", "--help"], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert all(verb in text for verb in ("demo", "check", "train", "evaluate", "report", "recipes"))
    assert min(seconds) < 1.0


def test_the_stub_and_the_package_agree():
    assert sorted(graftlm.__all__) == sorted(stub_names())
    assert set(stub_names()) <= set(dir(graftlm))


@pytest.mark.parametrize(("name", "module"), stub_names().items())
def test_every_public_name_resolves(name, module):
    value = getattr(graftlm, name)
    assert value is getattr(importlib.import_module(module), name)
    assert value.__module__ == module, "the stub names the module that defines it"
    assert value.__doc__


def test_no_submodule_hides_a_public_name():
    # importing graftlm.load would set the attribute graftlm.load to the module
    submodules = {module.name for module in pkgutil.iter_modules(graftlm.__path__)}
    assert not submodules & set(stub_names())


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Unfreezr"):
        graftlm.Unfreezr  # noqa: B018


def test_one_version():
    assert importlib.metadata.version("graftlm") == graftlm.__version__
