"""The support matrix, docs/reference/support.md: which method was tested with what on which architecture.

A test says it with `@pytest.mark.supports(METHOD, FEATURE)` and a parameter called `architecture`; other parameters
stand in FEATURE in braces. When the whole suite has passed, the page has to say what the tests said; `pytest
--write-support-matrix` writes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from tiny import ARCHITECTURES

PAGE = Path(__file__).parents[1] / "docs/reference/support.md"
HEAD = """# Support matrix

Written by the tests (`make test PYTEST_ARGS=--write-support-matrix`). A mark says that a test of this feature passed on
a small random model of this architecture. What is not marked may work too, or not exist: nobody has looked.
"""
Fact = tuple[str, str, str]


def render(facts: Iterable[Fact]) -> str:
    """Return the page: a table a method, a row an architecture, a column a feature."""
    found = set(facts)
    page = [HEAD]
    for method in sorted({method for method, _, _ in found}):
        features = sorted({feature for name, feature, _ in found if name == method})
        page += [f"## {method}\n", f"| | {' | '.join(features)} |", f"| --- |{' :-: |' * len(features)}"]
        for architecture in ARCHITECTURES:
            marks = ("✓" if (method, feature, architecture) in found else "" for feature in features)
            page.append(f"| {architecture} | {' | '.join(marks)} |")
        page.append("")
    return "\n".join(page)


def facts_of(item: pytest.Item) -> list[Fact]:
    marks = list(item.iter_markers("supports"))
    if not marks:
        return []
    parameters = item.callspec.params
    facts = [
        (method, feature.format(**parameters), parameters["architecture"])
        for method, feature in (m.args for m in marks)
    ]
    return [fact for fact in facts if fact[-1] in ARCHITECTURES]


class SupportMatrix:
    """Collects what passed, and holds it against the page at the end of a run of everything."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.passed: set[Fact] = set()
        self.failed: set[Fact] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            item.user_properties += [("supports", fact) for fact in facts_of(item)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            facts = {tuple(value) for name, value in report.user_properties if name == "supports"}
            (self.passed if report.passed else self.failed).update(facts)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        options = self.config.option
        everything = not (options.keyword or options.markexpr or options.collectonly) and set(self.config.args) == set(
            self.config.getini("testpaths")
        )
        if hasattr(self.config, "workerinput") or not everything or exitstatus != pytest.ExitCode.OK:
            return
        page = render(self.passed - self.failed)
        if options.write_support_matrix:
            PAGE.write_text(page, encoding="utf-8")
        elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            self.config.get_terminal_writer().line(
                f"\n{PAGE.name} does not say what the tests say: make test PYTEST_ARGS=--write-support-matrix", red=True
            )
