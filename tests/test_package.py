"""What is shipped: every file of the package, declared dependencies and nothing else."""

import ast
import re
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "graftlm"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Needed without an import of ours: Trainer asks for accelerate, from_pretrained for safetensors and huggingface_hub.
INDIRECT = {"accelerate", "safetensors", "huggingface_hub"}
IMPORT_NAMES = {"ruamel.yaml": "ruamel", "jinja2": "jinja2", "lazy_loader": "lazy_loader"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_holds_every_file_of_the_package(wheel):
    expected = {
        str(path.relative_to(PACKAGE.parent))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in wheel.namelist() if not name.startswith("graftlm-")} == expected
    assert {"graftlm/py.typed", "graftlm/__init__.pyi"} <= expected
    for folder, suffix in (("recipes", ".yaml"), ("starter", ".jsonl"), ("starter", ".safetensors")):
        assert any(name.startswith(f"graftlm/{folder}/") and name.endswith(suffix) for name in expected), folder


def test_the_wheel_carries_the_licences_and_the_command(wheel):
    names = {name.split("/", 1)[1] for name in wheel.namelist() if name.startswith("graftlm-")}
    assert {"licenses/LICENSE", "licenses/NOTICE", "entry_points.txt"} <= names
    (entry,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "graftlm = graftlm.cli:main" in wheel.read(entry).decode()


def imported() -> set[str]:
    """Top-level names that the package imports, anywhere in a file."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"graftlm"}


def declared() -> set[str]:
    extras = PROJECT["optional-dependencies"]
    for_users = [
        requirement for name in extras if name not in ("bench", "test", "docs", "dev") for requirement in extras[name]
    ]
    requirements = [*PROJECT["dependencies"], *for_users]
    names = {re.split(r"[<>=!~\[ ]", requirement)[0].replace("-", "_") for requirement in requirements}
    return {IMPORT_NAMES.get(name, name) for name in names}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    assert imported() - declared() == set()
    assert declared() - imported() - INDIRECT == set()


def test_the_constraints_fit_the_declared_ranges():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    assert pins["torch"] == "2.13.0"
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *extras["cluster"], *extras["test"], *extras["docs"], *extras["dev"][1:]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_no_path_or_address_of_a_machine_in_the_constraints():
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"@|file:|https?:|/home|/root|/tmp", text)
