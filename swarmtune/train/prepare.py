"""From documents to flat streams of tokens for training and validation, a chunk at a time: only tokens stay in memory."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from swarmtune.errors import UsageError
from swarmtune.model_files import why_unreadable
from swarmtune.train.documents import Document, held_out
from swarmtune.train.preparing import Preparing
from swarmtune.train.sources import Source
from swarmtune.train.windows import flat

CHUNK_DOCUMENTS, CHUNK_CHARS = 512, 1 << 20
"""A chunk of text is tokenised when it has as many documents or characters."""

log = logging.getLogger(__name__)


def load_tokenizer(path: str) -> Any:
    """The model's own tokenizer.

    Raises:
        UsageError: the model has none, or it cannot be read.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise UsageError(f"model {path}: its tokenizer cannot be read: {why_unreadable(error)}") from error


def tokenizer_digest(tokenizer: Any) -> str | None:
    """A digest of all that decides its tokens; ``None`` for one that is not of the ``tokenizers`` library and cannot say."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return None
    ends = [tokenizer.eos_token_id, pad_token(tokenizer)]
    return hashlib.sha256(json.dumps([type(tokenizer).__name__, backend.to_str(), ends]).encode(errors="surrogatepass")).hexdigest()


def pad_token(tokenizer: Any) -> int:
    """The token that fills windows; its value never reaches a loss."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def tokenise(documents: Iterable[Document], tokenizer: Any) -> Iterator[tuple[Document, list[int]]]:
    """Each document and its tokens, a chunk at a time."""
    chunk: list[Document] = []
    chars = 0
    for document in documents:
        chunk.append(document)
        chars += len(document.text)
        if len(chunk) >= CHUNK_DOCUMENTS or chars >= CHUNK_CHARS:
            yield from _tokenise(chunk, tokenizer)
            chunk, chars = [], 0
    yield from _tokenise(chunk, tokenizer)


def _tokenise(chunk: list[Document], tokenizer: Any) -> Iterator[tuple[Document, list[int]]]:
    if chunk:
        texts = [item.text for item in chunk]
        found = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        yield from zip(chunk, found, strict=True)


def prepare(train: Source, validation: Source | None, fraction: float, tokenizer: Any, show: Preparing) -> dict[str, Tensor]:
    """Flat streams of tokens, in int32, of ``train`` and ``val``.

    Args:
        train: where training text comes from, and validation text too if ``validation`` is not given.
        validation: where validation text comes from.
        fraction: how much of ``train`` is held out, if ``validation`` is not given.
        tokenizer: of Hugging Face's kind.
        show: where progress goes.

    Raises:
        UsageError: the data cannot be read, or there is too little of it.
    """
    sizes: dict[bytes, int] = defaultdict(int)
    with show.phase("reading", "characters") as advance:
        for document in train.documents(warn=True):
            sizes[document.digest] += len(document.text)
            advance(len(document.text))
    held = held_out(sizes, fraction) if validation is None else set()
    streams = {"train": array("i"), "val": array("i")}
    with show.phase("tokenizing", "characters", sum(sizes.values())) as advance:
        for document, tokens in tokenise(train.documents(), tokenizer):
            _add(streams["val" if held and document.digest in held else "train"], tokens, tokenizer)
            advance(len(document.text))
    if validation is not None:
        both = total = 0
        with show.phase("tokenizing validation text", "characters") as advance:
            for document, tokens in tokenise(validation.documents(warn=True), tokenizer):
                both, total = both + (document.digest in sizes), total + 1
                _add(streams["val"], tokens, tokenizer)
                advance(len(document.text))
        if both:
            log.warning("%d of %d validation documents stand in the training text too", both, total)
    return {name: flat(stream) for name, stream in streams.items()}


def _add(stream: array[int], tokens: list[int], tokenizer: Any) -> None:
    stream.extend(tokens)
    if tokenizer.eos_token_id is not None:
        stream.append(tokenizer.eos_token_id)
