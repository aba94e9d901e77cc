"""Errors that say what is wrong, what was found, what is allowed and what to type."""

from collections.abc import Iterable


class GraftError(Exception):
    """Base of every error that graftlm raises on purpose.

    Args:
        problem: one sentence that says what is wrong.
        found: the value that was found.
        allowed: what would be right: a text, or the values one by one.
        fix: what to type or do.
    """

    def __init__(
        self,
        problem: str,
        *,
        found: object = None,
        allowed: str | Iterable[object] | None = None,
        fix: str | None = None,
    ):
        self.problem, self.found, self.allowed, self.fix = problem, found, allowed, fix
        lines = [problem]
        if found is not None:
            lines.append(f"  found:   {found}")
        if allowed is not None:
            lines.append(f"  allowed: {allowed if isinstance(allowed, str) else ', '.join(map(str, allowed))}")
        if fix is not None:
            lines.append(f"  try:     {fix}")
        super().__init__("\n".join(lines))

    def __reduce__(self):
        state = {"problem": self.problem, "found": self.found, "allowed": self.allowed, "fix": self.fix}
        return _rebuild, (type(self), state)


def _rebuild(kind: type[GraftError], state: dict) -> GraftError:
    return kind(**state)


class RecipeError(GraftError):
    """A recipe or an override that cannot be read or makes no sense."""


class DataError(GraftError):
    """Data that is missing, malformed or does not fit the task."""


class ModelError(GraftError):
    """A model whose structure is unknown or does not fit what was asked of it."""


class SetupError(GraftError):
    """A training set-up in which a method would be silently wrong, or an argument it cannot take."""


class MissingExtra(GraftError):
    """An optional dependency that is not installed."""
