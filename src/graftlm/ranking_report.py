"""`ranking.html`: a ranking of source tasks as a picture and a table, one file that needs no network."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from graftlm.evaluation.pictures import ACCENT, MUTED, PAPER, axes_in_pixels, both_widths, language_rows, shortened
from graftlm.evaluation.record import write_text
from graftlm.evaluation.report import environment
from graftlm.evaluation.table import inert
from graftlm.sources.result import FILE, Ranking

PAGE = "ranking.html"
_SHOWN = 30  # in the picture; the table has all


def write_ranking(ranking: Ranking, folder: str | Path) -> Path:
    """Writes ``ranking.json`` and ``ranking.html`` into a folder and returns the page's path."""
    write_text(Path(folder) / FILE, ranking.to_json() + "\n")
    return write_ranking_report(folder)


def write_ranking_report(folder: str | Path) -> Path:
    """Writes ``ranking.html`` from the folder's ``ranking.json`` and returns its path.

    All text is escaped; the page carries a content security policy that lets it load nothing.

    Raises:
        DataError: no ranking, or one of another schema version.
    """
    ranking = Ranking.read(folder)
    shown = ranking.sources[:_SHOWN]
    parts = [f"{one.name} {one.score:.4f}" for one in shown]
    page = environment().get_template("ranking.html.jinja").render(
        ranking=ranking,
        lead=_lead(ranking),
        picture=both_widths(_picture(ranking), "ranking", inert(f"Scores, the best first: {', '.join(parts)}.")),
        left_out=len(ranking) - len(shown),
        per_map=1000 * ranking.seconds / max(len(ranking), 1),
    )  # fmt: skip
    path = Path(folder) / PAGE
    write_text(path, page)
    return path


def _lead(ranking: Ranking) -> str:
    best = ranking.sources[0].name
    if ranking.without_source is None:
        return f"{best} comes first of {len(ranking)} source tasks."
    better = sum(one.score > ranking.without_source for one in ranking.sources)
    if not better:
        return f"None of {len(ranking)} source tasks scores above the base model as it is."
    return f"{best} comes first; {better} of {len(ranking)} source tasks score above the base model as it is."


def _picture(ranking: Ranking) -> Callable[[bool], Figure]:
    """A point a source task, the best first, and a line where the base model stands."""
    shown = ranking.sources[:_SHOWN]

    def draw(narrow: bool) -> Figure:
        names = [shortened(inert(one.name)) for one in shown]
        left = 24 + 7 * max(map(len, names))
        figure, axes = axes_in_pixels(narrow, 26 * len(shown) + 70, left=left, right=16, top=20, bottom=50)
        extent = [one.score for one in shown]
        if ranking.without_source is not None:
            axes.axvline(ranking.without_source, color=MUTED, lw=1.2, zorder=1)
            axes.text(
                ranking.without_source, -0.6, "no source task", color=MUTED, fontsize=12, ha="center", va="bottom"
            )  # fmt: skip
            extent.append(ranking.without_source)
        for place, one in enumerate(shown):
            axes.plot(one.score, place, "o", ms=8, color=ACCENT, mec=PAPER, mew=1.2, zorder=4)
        language_rows(axes, names, extent, left, narrow)
        axes.set_xlabel("log evidence a row (nats)" if ranking.method in ("esm-logme", "logme") else ranking.method)
        return figure

    return draw
