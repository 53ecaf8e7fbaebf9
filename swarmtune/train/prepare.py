"""From documents to flat tensors of tokens for training and validation, a chunk at a time: only these stay in memory."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from swarmtune.errors import UsageError
from swarmtune.model_files import why_unreadable
from swarmtune.train.documents import Document, held_out
from swarmtune.train.forms import Form, pad_token
from swarmtune.train.preparing import Preparing
from swarmtune.train.sources import Source

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


def tokenise(documents: Iterable[Document], form: Form, tokenizer: Any) -> Iterator[tuple[Document, Any]]:
    """Each document and what ``form`` makes of it, a chunk at a time."""
    chunk: list[Document] = []
    chars = 0
    for document in documents:
        chunk.append(document)
        chars += len(document.text)
        if len(chunk) >= CHUNK_DOCUMENTS or chars >= CHUNK_CHARS:
            yield from zip(chunk, form.encode(chunk, tokenizer), strict=True)
            chunk, chars = [], 0
    if chunk:
        yield from zip(chunk, form.encode(chunk, tokenizer), strict=True)


def prepare(train: Source, validation: Source | None, fraction: float, form: Form, tokenizer: Any, show: Preparing) -> dict[str, dict[str, Tensor]]:
    """What is kept of ``train`` and ``val``: flat tensors by name.

    Args:
        train: where training data come from, and validation data too if ``validation`` is not given.
        validation: where validation data come from.
        fraction: how much of ``train`` is held out, of each class, if ``validation`` is not given.
        form: what documents become.
        tokenizer: of Hugging Face's kind.
        show: where progress goes.

    Raises:
        UsageError: the data cannot be read, or there is too little of it.
    """
    sizes: dict[str, dict[bytes, int]] = {}
    class_of: dict[bytes, str] = {}
    with show.phase("reading", "characters") as advance:
        for document in train.documents(warn=True):
            of_class = sizes.setdefault(class_of.setdefault(document.digest, document.label), defaultdict(int))
            of_class[document.digest] += len(document.text)
            advance(len(document.text))
    held = _held_out(sizes, fraction) if validation is None else set()
    sides = {"train": form.collector(tokenizer), "val": form.collector(tokenizer)}
    with show.phase("tokenizing", "characters", sum(sum(of_class.values()) for of_class in sizes.values())) as advance:
        for document, encoded in tokenise(train.documents(), form, tokenizer):
            sides["val" if held and document.digest in held else "train"].add(encoded)
            advance(len(document.text))
    if validation is not None:
        both = total = 0
        with show.phase("tokenizing validation text", "characters") as advance:
            for document, encoded in tokenise(validation.documents(warn=True), form, tokenizer):
                both, total = both + (document.digest in class_of), total + 1
                sides["val"].add(encoded)
                advance(len(document.text))
        if both:
            log.warning("%d of %d validation documents stand in the training text too", both, total)
    return {name: side.tensors() for name, side in sides.items()}


def _held_out(sizes: dict[str, dict[bytes, int]], fraction: float) -> set[bytes]:
    """The groups for validation, chosen within each class, so that both sides have all of them; texts without a class are one."""
    if len(sizes) < 2:
        return held_out(next(iter(sizes.values()), {}), fraction)
    alone = sorted(label for label, of_class in sizes.items() if len(of_class) < 2)
    if alone:
        log.warning("%d classes have a single document, which is trained on and not validated: %s", len(alone), ", ".join(alone[:5]))
    return {digest for label, of_class in sizes.items() if label not in alone for digest in held_out(of_class, fraction)}
