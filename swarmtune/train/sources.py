"""Where text comes from: files, directories, saved datasets and hub ids, read by ``datasets`` and checked here.

Local files are read as they stand, chunk by chunk: no converted copy is kept that could be older than the file.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from swarmtune.errors import UsageError
from swarmtune.train.documents import Document
from swarmtune.train.python_library import PYTHON_TEXTS, PythonText
from swarmtune.train.rows import ChatRows, LabelRows, RowReader, TextRows

READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".arrow": "arrow",
}
"""File endings that can be read, and the reader of ``datasets`` for each."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""Endings that may follow one of these."""
READER_OPTIONS: dict[str, dict[str, Any]] = {
    ".txt": {"sample_by": "paragraph"},
    ".csv": {"keep_default_na": False, "na_values": [""]},  # a text "null" is a text
    ".tsv": {"keep_default_na": False, "na_values": [""], "sep": "\t"},
}
SAVED_MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")
"""A directory that ``save_to_disk`` wrote holds one of these."""
CHUNK_ROWS = 256
"""Rows read at once."""
CHECKED_FILES = 16
"""Files whose columns are looked at before anything starts."""
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
HUB_TIMEOUT_S = 10.0
"""How long the hub may take to say whether a dataset exists."""
Said = Callable[[int], None]
"""Told how many bytes have been read."""

log = logging.getLogger(__name__)


def ending(path: Path) -> str | None:
    """The ending that chooses the reader, without that of a compression; ``None`` where there is no reader."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def is_pattern(path: str) -> bool:
    """Whether a path is no file, but names some with ``*``, ``?`` or ``[...]``."""
    return glob.has_magic(path) and not Path(path).exists()


@dataclass(frozen=True, slots=True)
class DatasetSource:
    """One split of anything that ``datasets`` reads; plain values, so that it travels to worker processes.

    Args:
        path: a file, a pattern, a directory, a saved dataset or a hub id.
        rows: makes a document of each row.
        split: which split of those that the data has.
        name: which configuration of a hub dataset or directory.
        revision: which commit, branch or tag of a hub dataset.
        streaming: read a hub dataset as it comes, instead of downloading it first.
    """

    path: str
    rows: RowReader = field(default_factory=TextRows)
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    streaming: bool = False

    # --- what is there ---

    @property
    def layout(self) -> str:
        """``files``, ``saved``, ``directory`` or ``hub``."""
        local = Path(self.path)
        if local.is_dir():
            return "saved" if any((local / name).exists() for name in SAVED_MARKS) else "directory"
        if local.is_file() or is_pattern(self.path):
            return "files"
        if HUB_ID.fullmatch(self.path):
            return "hub"
        raise UsageError(f"data {self.path}: no such file or directory")

    def files(self) -> list[Path]:
        """Every local file that this reads, sorted; none for a hub id.

        Raises:
            UsageError: no file, an empty one, one that cannot be read, or several kinds.
        """
        layout, root = self.layout, Path(self.path)
        if layout == "hub":
            return []
        if layout == "saved":
            return sorted(path for path in root.rglob("*") if path.is_file())
        if layout == "files":
            found = [root] if root.is_file() else sorted(Path(name) for name in glob.glob(self.path, recursive=True) if Path(name).is_file())
            odd = next((path for path in found if ending(path) is None), None)
            if odd is not None:
                raise UsageError(f"data {odd}: a file must end in one of {', '.join(READERS)} (then perhaps {', '.join(COMPRESSED)})")
        else:
            hidden = lambda path: any(part.startswith(".") for part in path.relative_to(root).parts)  # noqa: E731
            found = sorted(path for path in root.rglob("*") if path.is_file() and ending(path) is not None and not hidden(path))
        if not found:
            raise UsageError(f"data {self.path}: no file here ends in one of {', '.join(READERS)}; is it empty?")
        empty = next((path for path in found if not path.stat().st_size), None)
        if empty is not None:
            raise UsageError(f"data {empty}: the file is empty")
        kinds = sorted({ending(path) or "" for path in found}, key=list(READERS).index)
        if len({(READERS[kind], str(READER_OPTIONS.get(kind))) for kind in kinds}) > 1 and not self._says_its_files():
            raise UsageError(f"data {self.path}: files of one kind are needed, got {' and '.join(kinds)}; name some of them, such as '*{kinds[0]}'")
        return found

    def _says_its_files(self) -> bool:
        """Whether a directory has a dataset card that lists its files itself."""
        card = Path(self.path) / "README.md"
        return card.is_file() and "data_files" in card.read_text(encoding="utf-8", errors="replace")

    def check(self) -> None:
        """Look for what is missing, as far as that is cheap: all of a local path but its later rows; a hub id's existence, splits and columns.

        Raises:
            UsageError: what is missing, and what is there.
        """
        if self.layout != "hub":
            for part in itertools.islice(self._parts(), CHECKED_FILES):
                next(self._rows_of(part), None)
            if next(self.documents(), None) is None:
                raise UsageError(f"data {self.path}: there is no {self.rows.noun} in {', '.join(self.rows.columns)}")
            return
        _ask_hub(self.path, self.revision)
        with _translated(self.path):
            import datasets

            info = datasets.load_dataset_builder(self.path, self.name, revision=self.revision).info
        if info.splits and self.split not in info.splits:
            raise UsageError(f"data {self.path}: there is no split {self.split!r}; there are: {', '.join(map(str, info.splits))}")
        if info.features:
            self._need_columns(list(info.features))

    # --- reading ---

    def documents(self, warn: bool = False) -> Iterator[Document]:
        """Every row that holds something.

        Args:
            warn: say at the end how many rows held nothing.

        Raises:
            UsageError: nothing there, no such split or column, a column of another kind, or a file that cannot be read.
        """
        total = blank = 0
        for rows in self._rows():
            for values in zip(*(rows[column] for column in self.rows.columns), strict=True):
                found, total = self.rows.document(values, f"data {self.path}"), total + 1
                if found is not None:
                    yield found
                else:
                    blank += 1
        if warn and blank and not self._splits_paragraphs():
            columns = f"column{'s' if len(self.rows.columns) > 1 else ''} {', '.join(self.rows.columns)}"
            log.warning("%d of %d rows of %s have no %s in %s: left out", blank, total, self.path, self.rows.noun, columns)

    def _splits_paragraphs(self) -> bool:
        """Whether rows are paragraphs of text files, where a blank one is but a gap."""
        files = self.files() if self.layout != "saved" else []
        return bool(files) and all(ending(path) == ".txt" for path in files)

    def _rows(self) -> Iterator[dict[str, list[Any]]]:
        """Chunks of rows by column, each with every column that is wanted."""
        for part in self._parts():
            yield from self._rows_of(part)

    def _rows_of(self, part: Callable[[], Any]) -> Iterator[dict[str, list[Any]]]:
        with _translated(self.path):
            found = part()
            if found.column_names is not None:
                self._need_columns(found.column_names)
                found = found.select_columns(self.rows.columns)
            classes = _class_names(found.features, self.rows.columns)
            for rows in found.iter(CHUNK_ROWS):
                self._need_columns(list(rows))
                yield rows if not classes else {name: _named(values, classes.get(name)) for name, values in rows.items()}

    def _need_columns(self, there: list[str]) -> None:
        for column in self.rows.columns:
            if column not in there:
                raise UsageError(f"data {self.path}: there is no column {column!r}; there are: {', '.join(there)} (set {self.rows.keys})")

    def _parts(self) -> Iterator[Callable[[], Any]]:
        """What opens the dataset, file by file where there are files: read together, one without the column would count as rows without text."""
        layout = self.layout
        self._refuse_ignored(layout)
        files = self.files()
        if layout == "directory":
            files = self._files_of_split(files)
        if layout == "saved" or layout == "hub" or not files:
            yield self._open
        for path in files if layout in ("files", "directory") else []:
            yield functools.partial(_open_file, path)

    def _files_of_split(self, files: list[Path]) -> list[Path]:
        """Those files of a directory that ``datasets`` takes for the split; none where the directory's card says how they are read."""
        if self._says_its_files():
            return []
        import datasets

        with _translated(self.path):
            options = READER_OPTIONS.get(ending(files[0]) or "", {})
            by_split = datasets.load_dataset_builder(self.path, self.name, **options).config.data_files
        if self.split not in by_split:
            raise UsageError(
                f"data {self.path}: there is no split {self.split!r}; there are: {', '.join(map(str, by_split))} (choose with data.split)"
            )
        return [Path(name) for name in by_split[self.split]]

    def _open(self) -> Any:
        """A dataset that is not read file by file; raises whatever ``datasets`` raises."""
        import datasets

        layout = self.layout
        if layout == "saved":
            return self._saved()
        streaming = self.streaming or layout != "hub"
        return datasets.load_dataset(self.path, self.name, split=self.split, revision=self.revision, streaming=streaming)

    def _saved(self) -> Any:
        import datasets

        found = datasets.load_from_disk(self.path)
        if not isinstance(found, datasets.DatasetDict):
            if self.split != "train":
                raise UsageError(f"data {self.path}: this saved dataset has no splits, so data.split={self.split} says nothing; leave it out")
            return found
        if self.split not in found:
            raise UsageError(f"data {self.path}: there is no split {self.split!r}; there are: {', '.join(found)} (choose with data.split)")
        return found[self.split]

    def _refuse_ignored(self, layout: str) -> None:
        if layout == "files" and self.split != "train":
            raise UsageError(f"data {self.path}: a file has no splits, so there is no {self.split!r} in it; leave data.split out")
        if layout in ("files", "saved") and self.name is not None:
            raise UsageError(f"data {self.path}: data.name={self.name} is for hub ids and directories; leave it out")
        if layout != "hub" and self.revision is not None:
            raise UsageError(f"data {self.path}: data.revision={self.revision} is for hub ids; leave it out")

    # --- identity ---

    def digest(self, said: Said) -> str:
        """A digest of everything that decides which documents come: the bytes of every file, and the choices made here."""
        total = hashlib.sha256(repr((self.layout, self.rows, self.split, self.name)).encode())
        files, root = self.files(), Path(self.path)
        if self.layout == "hub":
            with _translated(self.path):
                files = [Path(item["filename"]) for item in self._open().cache_files]
        for path in [*files, *([card] if (card := root / "README.md").is_file() else [])]:
            name = path.relative_to(root).as_posix() if path != root and root in path.parents else ending(path)
            total.update(f"{name}\0{_file_digest(path, said)}\0".encode())
        return total.hexdigest()

    def names(self) -> list[str]:
        """What a stream is known by: its settings, and the names, sizes and samples of local files, which may be too large to read whole."""
        settings = [self.layout, repr(self.rows), self.split, str(self.name), str(self.revision)]
        files = self.files()
        return [*settings, *(f"{path.name}:{_sampled_digest(path)}" for path in files)] if files else [*settings, self.path]


def _sampled_digest(path: Path) -> str:
    """A digest of a file's size and of pieces of it, evenly spaced, its first and last among them."""
    size = path.stat().st_size
    total = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for sample in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            total.update(file.read(SAMPLE_BYTES))
    return total.hexdigest()[:16]


SAMPLES, SAMPLE_BYTES = 64, 1 << 16
Source = PythonText | DatasetSource
SOURCE_KEYS = (
    *("source", "format", "path", "name", "revision", "text_column", "text_template", "label_column", "messages_column", "prompt_column"),
    *("completion_column", "role_field", "content_field", "split", "validation_split", "validation_path", "streaming"),
)
"""Keys of ``swarmtune.data_schema.DataConfig`` that say where the data come from."""


def make_sources(
    *,
    source: str = "python_topics",
    format: str = "text",
    path: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    text_column: str = "text",
    text_template: str | None = None,
    label_column: str = "label",
    messages_column: str = "messages",
    prompt_column: str | None = None,
    completion_column: str | None = None,
    role_field: str = "role",
    content_field: str = "content",
    split: str = "train",
    validation_split: str | None = None,
    validation_path: str | None = None,
    streaming: bool = False,
) -> tuple[Source, Source | None]:
    """Where training data and, if they are kept apart, validation data come from. The keys are those of ``swarmtune.data_schema.DataConfig``."""
    if source in PYTHON_TEXTS:
        return PythonText(source), None
    text = TextRows(text_column, text_template)
    rows: dict[str, RowReader] = {
        "text": text,
        "labels": LabelRows(text, label_column),
        "chat": ChatRows(messages_column, prompt_column, completion_column, role_field, content_field),
    }
    train = DatasetSource(path or "", rows[format], split, name, revision, streaming)
    if validation_path is not None:
        return train, replace(train, path=validation_path, split="train", name=None, revision=None)
    return train, None if validation_split is None else replace(train, split=validation_split)


def _class_names(features: Any, columns: Sequence[str]) -> dict[str, list[str]]:
    """The names of the classes of those columns that hold classes by number."""
    found: dict[str, list[str]] = {}
    for column in columns:
        kind: Any = (features or {}).get(column)
        if type(kind).__name__ == "ClassLabel":
            found[column] = list(kind.names)
    return found


def _named(values: list[Any], names: list[str] | None) -> list[Any]:
    """Class numbers as names; -1 says that there is none."""
    return values if names is None else [None if value is None or value < 0 else names[value] for value in values]


def _open_file(path: Path) -> Any:
    """One local file as a stream of rows; nothing is converted or kept."""
    import datasets

    kind = ending(path) or ""
    options = READER_OPTIONS.get(kind, {})
    return datasets.load_dataset(READERS[kind], data_files=[glob.escape(str(path))], split="train", streaming=True, **options)


def _file_digest(path: Path, said: Said) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
            said(len(chunk))
    return total.hexdigest()


def _ask_hub(path: str, revision: str | None) -> None:
    """Whether the hub has this dataset; an answer in seconds, where ``datasets`` would try again for half a minute.

    Raises:
        UsageError: it has none, or it does not answer and no copy is here.
    """
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    no_answer: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)  # its bases are those of the HTTP library in use
    try:
        huggingface_hub.HfApi().dataset_info(path, revision=revision, timeout=HUB_TIMEOUT_S)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        detail = " ".join(str(error).split())[:200]
        raise UsageError(f"data {path}: there is no such path here, and the hub has no such dataset for you: {detail}") from error
    except no_answer as error:
        try:
            datasets.load.CachedDatasetModuleFactory(path).get_module()
        except (OSError, ValueError):
            detail = " ".join(str(error).split())[:200]
            raise UsageError(f"data {path}: there is no such path here, and the hub did not answer: {detail}") from error


@contextmanager
def _translated(path: str) -> Iterator[None]:
    """Errors of ``datasets`` as one sentence, and its log silent, which would say the same in many."""
    import datasets
    import pyarrow

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    except (OSError, ValueError, EOFError, ImportError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        raise UsageError(f"data {path}: {' '.join(str(root).split())[:300] or type(root).__name__}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
