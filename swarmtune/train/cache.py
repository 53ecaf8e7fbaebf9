"""Prepared tokens on disk, so that the same data is read and tokenised once.

An entry is named by a digest of everything that decides its content, and carries digests of the content itself: it is either right or not used.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from swarmtune.train.windows import tensor_digest

FORMAT = 1
"""Raised when the same settings mean other tokens, or an entry is laid out otherwise."""
LIBRARIES = ("datasets", "tokenizers", "transformers")
"""Libraries whose version may change which tokens come of the same files."""

log = logging.getLogger(__name__)


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/swarmtune``, or ``~/.cache/swarmtune``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swarmtune"


def entry_key(**parts: Any) -> str:
    """The name of an entry: a digest of ``parts``, our format and the versions of the libraries that read."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return hashlib.sha256(json.dumps({"format": FORMAT, "versions": versions, **parts}, sort_keys=True).encode()).hexdigest()


class TokenCache:
    """Flat tensors by name, a file for each set.

    Args:
        folder: where the files are; made when first needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "tokens"

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The entry, or ``None`` where there is none, or it does not hold what was written."""
        from safetensors import SafetensorError, safe_open

        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                digests = file.metadata() or {}
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            log.warning("the prepared data in %s cannot be read (%s) and is made anew", path, error)
            return None
        if not found or {name: tensor_digest(tensor) for name, tensor in found.items()} != digests:
            log.warning("the prepared data in %s is damaged and is made anew", path)
            return None
        return found

    def save(self, key: str, tokens: Mapping[str, Tensor]) -> None:
        """Write an entry whole or not at all; where that cannot be done, say so and go on."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path, part = self._path(key), None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=self.folder, prefix=".part-")
            os.close(handle)
            save_file(dict(tokens), part, {name: tensor_digest(tensor) for name, tensor in tokens.items()})
            os.replace(part, path)
        except (OSError, SafetensorError) as error:
            log.warning("the prepared data cannot be kept in %s: %s", self.folder, error)
        finally:
            if part is not None:
                Path(part).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"
