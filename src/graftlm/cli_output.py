"""What all verbs print with: results on standard output, our own messages on standard error."""

import logging
import os

from rich.console import Console
from rich.markup import escape

_FIRST = os.environ.get("RANK", "0") == "0"  # under accelerate launch every process runs this, and one of them speaks
out = Console(quiet=not _FIRST)
err = Console(stderr=True, quiet=not _FIRST)


class _Speaker(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        err.print(escape(self.format(record)), soft_wrap=True, highlight=False)


def log_to_stderr() -> None:
    """Lines of progress from here on."""
    logger = logging.getLogger("graftlm")
    if not any(isinstance(one, _Speaker) for one in logger.handlers):
        logger.addHandler(_Speaker())
    logger.setLevel(logging.INFO)
