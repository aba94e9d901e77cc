"""Texts and pairs of texts as a tokenizer takes them, with the mark of their language where it has marks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graftlm.errors import SetupError

Text = str | tuple[str, ...]  # a text, or the two of a pair


def parts(text: Text) -> tuple[str, ...]:
    """A text alone, or the two of a pair."""
    return (text,) if isinstance(text, str) else tuple(text)


def tokenised(tokenizer: Any, texts: Sequence[Text], max_length: int | None, **settings: Any) -> Any:
    """What the tokenizer makes of texts, cut at `max_length` where there is one; `settings` are of its call."""
    columns = (list(column) for column in zip(*map(parts, texts), strict=True))
    return tokenizer(*columns, truncation=max_length is not None, max_length=max_length, **settings)


def has_marks(tokenizer: Any) -> bool:
    """Whether a tokenizer marks the language of a text."""
    return getattr(tokenizer, "src_lang", None) is not None


def marked(tokenizer: Any, language: str | None) -> Any:
    """The tokenizer, told the language of the next texts where it marks languages.

    Raises:
        SetupError: a language and no marks, marks and no language, or one that the tokenizer does not know.
    """
    marks = has_marks(tokenizer)
    if marks != (language is not None):
        raise SetupError(
            "This tokenizer marks the language of a text, and has to be told which it is."
            if marks
            else "This tokenizer has no marks of languages.",
            found=f"{type(tokenizer).__name__}, language={language!r}",
            fix='language="dan_Latn", say' if marks else "leave language out",
        )
    if marks and tokenizer.src_lang != language:
        before, known = tokenizer.src_lang, True
        try:
            tokenizer.src_lang = language
            known = getattr(tokenizer, "unk_token_id", None) not in tokenizer([""])["input_ids"][0]
        except KeyError:
            known = False
        if not known:
            tokenizer.src_lang = before
            raise SetupError(
                "The encoder's tokenizer has no mark for this language.",
                found=f"{language!r}; {type(tokenizer).__name__}",
                allowed=f"marks such as {before!r}",
                fix="in a recipe: tags of `source` and `data.test` as the tokenizer's, or adapter.source_language",
            )
    return tokenizer
