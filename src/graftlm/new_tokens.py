"""Tokens for a new language, learned from its text; in the model they begin as the mean of their pieces."""

import copy
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from tokenizers import Tokenizer

from graftlm.errors import DataError, ModelError

_UNSPLIT = re.compile(r"▁?[^▁\s]+|▁+|\s+")  # words where nothing is split before the merges, or at ▁ not
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # stands for a byte that no other token has
_MOST_WORDS = 200_000  # distinct words that merges are learned from


def extend_tokenizer(tokenizer: Any, texts: Iterable[str], count: int) -> tuple[Any, dict[int, list[int]]]:
    """A copy of a tokenizer with new tokens for a text, learned as the old ones were.

    Byte-pair encoding goes on where it ended: the most frequent pair of neighbouring tokens becomes one, `count` times.
    What was a merge stays one, with precedence over the new ones. In a WordPiece vocabulary, which knows no merges, the
    words come in that save the most tokens. Text of an old language may fall into new tokens too, where it has the same
    pairs.

    Args:
        tokenizer: a fast one, of byte-pair encoding or WordPiece.
        texts: in the new language.
        count: of new tokens, at least 1.

    Returns:
        The tokenizer, and for the id of each new token the ids of the old ones that it stands for.

    Raises:
        ModelError: a tokenizer of another kind, or one in which old tokens would change their ids.
        DataError: a text without `count` new tokens.

    Source: Sennrich et al., arXiv 1508.07909, Algorithm 1, for the merges.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = state["model"]["type"]
    marked = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if state["model"].get(key)]
    if kind not in ("BPE", "WordPiece") or (kind == "BPE" and marked):
        raise ModelError(
            "new tokens are learned for byte-pair encoding and WordPiece only",
            found=f"{type(tokenizer).__name__}: {kind}" + (f" with {marked[0]}" if marked else ""),
            fix="leave new_tokens out",
        )
    backend = tokenizer.backend_tokenizer
    if count < 1:
        raise DataError("there is no new token to learn", found=f"count={count}", allowed="1, 2, …")
    words = _words(backend, texts)
    split = {word: [token.value for token in backend.model.tokenize(word)] for word in words}
    vocabulary = state["model"]["vocab"]
    # a special token behind the vocabulary (Llama 3, Qwen) is in it from now on, or it would get another id
    vocabulary |= {token["content"]: token["id"] for token in state["added_tokens"]}
    first = 1 + max(vocabulary.values())
    if kind == "BPE":
        whole = {state["model"].get("unk_token"), *filter(_BYTE.fullmatch, vocabulary)}
        merges = _merges(split, words, count, vocabulary, whole)
        old = state["model"]["merges"]
        state["model"]["merges"] = old + [
            " ".join(pair) if old and isinstance(old[0], str) else pair for pair in merges
        ]
        names = ["".join(pair) for pair in merges]
    else:
        saved = {word: words[word] * (len(pieces) - 1) for word, pieces in split.items() if len(pieces) > 1}
        names = sorted(saved, key=lambda word: (-saved[word], word))[:count]
    if len(names) < count:
        raise DataError(
            "the text has too few words for so many new tokens",
            found=f"new_tokens: {count}",
            allowed=f"up to {len(names)}",
        )
    pieces = {first + at: [token.id for token in backend.model.tokenize(name)] for at, name in enumerate(names)}
    vocabulary |= {name: first + at for at, name in enumerate(names)}
    made = copy.deepcopy(tokenizer)
    made._tokenizer = Tokenizer.from_str(json.dumps(state))
    if moved := sorted(dict(tokenizer.get_vocab().items() - made.get_vocab().items())):
        raise ModelError(
            "new tokens would give old ones other ids in this tokenizer",
            found=f"{type(tokenizer).__name__}: {', '.join(moved[:5])}",
            fix="leave new_tokens out",
        )
    return made, pieces


def _words(backend: Any, texts: Iterable[str]) -> Counter[str]:
    words: Counter[str] = Counter()
    for text in texts:
        text = backend.normalizer.normalize_str(text) if backend.normalizer else text
        split = [(text, None)] if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(text)
        for piece, _ in split:  # of Llama 2 and Gemma a whole document, blanks as ▁
            words.update(_UNSPLIT.findall(piece) if "▁" in piece[1:] or backend.pre_tokenizer is None else [piece])
    return Counter(dict(words.most_common(_MOST_WORDS)))


def _merges(
    split: dict[str, list[str]], words: Counter[str], count: int, vocabulary: dict[str, int], whole: set[str | None]
) -> list[list[str]]:
    """The next merges of byte-pair encoding that make a new token, in order; tokens in `whole` take no part."""

    def pairs_of(word: str) -> list[tuple[str, str]]:
        return [pair for pair in pairwise(split[word]) if not whole & {*pair}]

    pairs: Counter[tuple[str, str]] = Counter()
    where: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for word in split:
        for pair in pairs_of(word):
            pairs[pair] += words[word]
            where[pair].add(word)
    found: list[list[str]] = []
    known = set(vocabulary)
    while len(found) < count and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] < 1:
            break
        if "".join(best) in known:  # a token that other merges make
            del pairs[best]
            continue
        known.add("".join(best))
        found.append(list(best))
        for word in where.pop(best):
            for pair in pairs_of(word):
                pairs[pair] -= words[word]
            split[word] = _joined(split[word], best)
            for pair in pairs_of(word):
                pairs[pair] += words[word]
                where[pair].add(word)
        del pairs[best]
    return found


def _joined(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    made: list[str] = []
    at = 0
    while at < len(pieces):
        both = at + 1 < len(pieces) and (pieces[at], pieces[at + 1]) == pair
        made.append(pieces[at] + pieces[at + 1] if both else pieces[at])
        at += 2 if both else 1
    return made


@torch.no_grad()
def extend_model(model: Any, pieces: dict[int, list[int]]) -> dict[str, list[int]]:
    """Gives a model rows for new tokens: the mean of the rows of their pieces, in embeddings and output matrix.

    Returns:
        PEFT's ``trainable_token_indices``: the matrices, by name, and the new rows.

    Raises:
        DataError: no new token.
        ModelError: an output matrix with a bias, as masked language models have it. PEFT trains rows of a matrix by a
            layer that leaves the bias out.
    """
    if not pieces:
        raise DataError("there is no new token to give a row to", found="{}", fix="extend_tokenizer(…, count=1000)")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ModelError(
            "new tokens need an output matrix without a bias: PEFT would leave it out of the logits",
            found=f"{type(model).__name__} with a bias of {len(model.get_output_embeddings().bias)} tokens",
            allowed="decoders such as Llama, Qwen, Mistral, Gemma, GPT-2",
            fix="leave new_tokens out",
        )
    size = max(pieces) + 1
    if model.get_input_embeddings().weight.shape[0] < size:
        model.resize_token_embeddings(size, mean_resizing=False)
    source, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output is None or output.weight is source.weight
    parts: list[Any] = [source] if tied else [source, output]
    for part in parts:
        for row, old in pieces.items():
            part.weight[row] = part.weight[old].mean(0)
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(part)]: sorted(pieces) for part in parts}
