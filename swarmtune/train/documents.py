"""Documents, and which of them are held out for validation.

Validation documents are chosen before anything is packed, so a window never mixes the two sides. The choice hangs on the text alone, never on
the seed or the order of files: runs with different seeds are comparable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from swarmtune.errors import UsageError

SHARED_PARAGRAPH_CHARS = 60
"""Two help topics that share a paragraph at least this long are kept on one side of the split."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text, the key of those that must not be parted from it by the split, and its class where it has one."""

    text: str
    group: str
    label: str = ""

    @property
    def digest(self) -> bytes:
        """SHA-256 of the group: 32 bytes that stand for it, and that order groups."""
        return hashlib.sha256(self.group.encode(errors="surrogatepass")).digest()


def python_topics() -> list[Document]:
    """The help topics of Python's own ``pydoc``; topics that quote each other share a group, so that nothing leaks."""
    from pydoc_data.topics import topics

    leader = {name: name for name in topics}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    first_with: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) >= SHARED_PARAGRAPH_CHARS:
                leader[find(name)] = find(first_with.setdefault(words, name))
    return [Document(topics[name], find(name)) for name in sorted(topics)]


def held_out(sizes: Mapping[bytes, int], fraction: float) -> set[bytes]:
    """The groups for validation: about ``fraction`` of all characters, taken in the order of their digests while they fit.

    Args:
        sizes: characters of each group, by ``Document.digest``.
        fraction: between 0 and 1.

    Raises:
        UsageError: fewer than two groups.
    """
    if len(sizes) < 2:
        raise UsageError(f"at least two different documents are needed, one to train on and one to validate on; got {len(sizes)}")
    budget = fraction * sum(sizes.values())
    found: set[bytes] = set()
    for digest in sorted(sizes):
        if sizes[digest] <= budget and len(found) < len(sizes) - 1:
            found.add(digest)
            budget -= sizes[digest]
    return found or {min(sizes, key=lambda digest: (sizes[digest], digest))}


def falls_to_validation(digest: bytes, fraction: float) -> bool:
    """Whether a document of a stream is held out: by its digest alone, because nobody knows how many will come."""
    return int.from_bytes(digest[:8]) < fraction * 2**64
