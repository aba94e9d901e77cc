"""Scores as text: numbers formatted once for the terminal, the model card and the report; names of languages."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graftlm.evaluation.metrics import METRICS, Metric

if TYPE_CHECKING:
    from rich.table import Table

    from graftlm.evaluation.result import Interval, Result

MISSING = "–"
MINUS = "−"

# ISO 639-3 and 639-1 codes of the languages that recipes name most; another tag is shown as it is
_NAMES = {
    "English": "eng en",
    "German": "deu de",
    "French": "fra fr",
    "Spanish": "spa es",
    "Portuguese": "por pt",
    "Czech": "ces cs",
    "Danish": "dan da",
    "Norwegian": "nob nor nb no",
    "Swedish": "swe sv",
    "Finnish": "fin fi",
    "Icelandic": "isl is",
    "Dutch": "nld nl",
    "Italian": "ita it",
    "Polish": "pol pl",
    "Russian": "rus ru",
    "Ukrainian": "ukr uk",
    "Bulgarian": "bul bg",
    "Greek": "ell el",
    "Romanian": "ron ro",
    "Hungarian": "hun hu",
    "Turkish": "tur tr",
    "Arabic": "ara arb ar",
    "Hebrew": "heb he",
    "Persian": "fas pes fa",
    "Hindi": "hin hi",
    "Bengali": "ben bn",
    "Urdu": "urd ur",
    "Tamil": "tam ta",
    "Thai": "tha th",
    "Vietnamese": "vie vi",
    "Indonesian": "ind id",
    "Swahili": "swh swa sw",
    "Hausa": "hau ha",
    "Yoruba": "yor yo",
    "Igbo": "ibo ig",
    "Amharic": "amh am",
    "Estonian": "est et",
    "Basque": "eus eu",
    "Chinese": "zho cmn zh",
    "Japanese": "jpn ja",
    "Korean": "kor ko",
    "Quechua": "quy que qu",
}
_BY_CODE = {code: name for name, codes in _NAMES.items() for code in codes.split()}


def language_name(tag: str) -> str:
    """English name of a language tag; a script or region is ignored, an unknown tag stays.

    >>> language_name("deu_Latn"), language_name("pt-BR"), language_name("zul")
    ('German', 'Portuguese', 'zul')
    """
    return _BY_CODE.get(tag.replace("_", "-").partition("-")[0].lower(), tag)


def metric_of(name: str) -> Metric:
    """What is known of a metric; one that a plug-in made up is shown as a plain number under its own name."""
    return METRICS.get(name, Metric(name, name, percent=False))


def number(value: float | None, metric: Metric, *, signed: bool = False) -> str:
    """A score as it is printed: percent with one decimal, or three decimals; a real minus sign.

    >>> accuracy = metric_of("accuracy")
    >>> number(0.6149, accuracy), number(-0.0123, accuracy, signed=True), number(None, accuracy)
    ('61.5', '−1.2', '–')
    """
    if value is None:
        return MISSING
    text = f"{100 * value:+.1f}" if metric.percent else f"{value:+.3f}"
    if float(text) == 0:
        text = text.lstrip("+-") if not signed else "±" + text[1:]
    return (text if signed else text.removeprefix("+")).replace("-", MINUS)


def interval_text(interval: Interval | None, metric: Metric, *, signed: bool = False) -> str:
    """Value and interval: ``61.5 [52.0, 70.1]``.

    >>> from graftlm.evaluation.result import Interval
    >>> interval_text(Interval(value=0.615, low=0.52, high=0.701), metric_of("accuracy"))
    '61.5 [52.0, 70.1]'
    """
    if interval is None:
        return MISSING
    text = number(interval.value, metric, signed=signed)
    if interval.low is None or interval.high is None:
        return text
    return f"{text} [{number(interval.low, metric, signed=signed)}, {number(interval.high, metric, signed=signed)}]"


@dataclass(frozen=True)
class ScoreTable:
    """Columns and rows of text; the first column is a name, the others are numbers; `sources` rows come first."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    sources: int
    caption: str

    @classmethod
    def of(cls, result: Result) -> ScoreTable:
        """The scores of a result, source language first; columns without any value are left out."""
        metric = metric_of(result.metric)
        others = dict.fromkeys(name for score in result.scores for name in score.metrics if name != result.metric)
        columns = (
            "language",
            metric.title,
            *(metric_of(name).title for name in others),
            "majority",
            "base",
            "change",
            "standard",
            "gain",
        )
        splits = {score.split for score in result.scores}
        rows = []
        for score in result.ordered:
            name = language_name(score.language) + (f" ({score.split})" if len(splits) > 1 else "")
            more = (
                number(score.metrics[key].value if key in score.metrics else None, metric_of(key)) for key in others
            )
            standard = score.standard.value if score.standard else None
            base = score.base.value if score.base else None
            numbers = (interval_text(result.primary(score), metric), *more, number(score.majority, metric))
            numbers += (number(base, metric), interval_text(score.change, metric, signed=True))
            rows.append((name, *numbers, number(standard, metric), interval_text(score.gain, metric, signed=True)))
        kept = [i for i in range(len(columns)) if i < 2 or any(row[i] != MISSING for row in rows)]
        sizes = sorted({score.n for score in result.scores})
        caption = ("Percent; " if metric.percent else "") + "95 % bootstrap interval over items in brackets"
        caption += f" ({sizes[0]}{f' to {sizes[-1]}' if len(sizes) > 1 else ''} items)." if sizes else "."
        if any(score.change for score in result.scores):
            caption += (
                " Fewer bits are better; base is the pretrained model, the change is paired with it, + is better."
            )
        if any(score.gain for score in result.scores):
            caption += " The gain is paired with standard training on the same items."
        shown = tuple(tuple(row[i] for i in kept) for row in rows)
        return cls(tuple(columns[i] for i in kept), shown, sum(score.is_source for score in result.scores), caption)

    def markdown(self) -> str:
        """A GitHub-flavoured table; ``|`` and markup in names are escaped."""
        lines = [tuple(map(markdown_text, self.columns)), ("---", *("---:" for _ in self.columns[1:]))]
        for position, row in enumerate(self.rows):
            lines.append((markdown_text(row[0]) + (", source" if position < self.sources else ""), *row[1:]))
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def rich(self) -> Table:
        """The table for a terminal of 80 columns; the source language stands apart."""
        from rich import box  # a script that only reads results need not load it
        from rich.table import Table
        from rich.text import Text

        table = Table(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            show_edge=False,
            collapse_padding=True,
            caption=self.caption,
            caption_justify="left",
        )
        for position, column in enumerate(self.columns):
            table.add_column(Text(column), justify="right" if position else "left", no_wrap=position > 0)
        for position, row in enumerate(self.rows, 1):
            table.add_row(*map(Text, row), end_section=position == self.sources)
        return table

    def __rich__(self) -> Table:
        return self.rich()

    def __str__(self) -> str:
        return f"{self.markdown()}\n\n{self.caption}"


_BIDI = {chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}  # embeddings, overrides, isolates


def inert(text: object) -> str:
    r"""Text from data on one line, control characters and those that change the direction of reading written out.

    >>> print(inert("label" + chr(0x202E) + "txt" + chr(0)))
    label\u202etxt\x00
    """
    return visible(" ".join(str(text).split()))


def visible(text: object) -> str:
    """`inert` text that keeps its spaces and lines."""
    return "".join(repr(letter)[1:-1] if letter in _BIDI or not _is_text(letter) else letter for letter in str(text))


def _is_text(letter: str) -> bool:
    return letter.isspace() or unicodedata.category(letter) not in ("Cc", "Cs", "Cn", "Co")


def markdown_text(text: object) -> str:
    """Text that Markdown and HTML show as it is, on one line.

    >>> markdown_text("a|b <script>")
    'a\\\\|b &lt;script&gt;'
    """
    shown = inert(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{letter}" if letter in "\\`*_[]|#" else letter for letter in shown)
