"""Reads the annotation files of a data set with distrust, and remembers which files were read.

The files come from anywhere: names may lead out of the folder, an XML may hold an entity bomb, lists may have Windows
line ends. The memory of what was read, by its content, tells the cache when to read again.
"""

from __future__ import annotations

import csv
import gc
import hashlib
import io
import json
import os
import xml.parsers.expat as expat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

from mlfast.data.annotations import AnnotationError

_SHOWN = 120
_BLOCK_BYTES = 1 << 20
_ABSENT = "absent"
How = Literal["content", "names", "stamp", "there"]
Stamp = tuple[int, int, int]  # size, time of change of the content, and of its entry in the file system, in ns


class Sources:
    """The files below one root folder.

    Attributes:
        root: the folder.
        seen: relative name -> mark of every file and folder that was read or looked for: "content:" and the digest of
            what a file held; "names:" and the digest of what a folder held; "stamp:" and size and times of a file that
            is too large to be read as a whole, as shards of images are; "there" or "absent" where that is all.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise AnnotationError(f"{self.root} is not a folder; give the folder that holds the data set.")
        self.seen: dict[str, str] = {}

    def exists(self, name: str) -> bool:
        """Whether the file or folder is there."""
        mark = _mark(self.root / name, "there")
        self.seen.setdefault(name, mark)  # what it holds says more
        return mark != _ABSENT

    def shard(self, name: str) -> Path:
        """The full path of a file of images that must be there."""
        return self._noted(name, "stamp")

    def size(self, name: str) -> int:
        """Bytes of a file that must be there."""
        return self._noted(name, "stamp").stat().st_size

    def digest(self, name: str) -> str:
        """Of the content of a file that must be there."""
        self._noted(name, "content")
        return self.seen[name]

    def unchanged(self, seen: Mapping[str, str]) -> bool:
        """Whether all files and folders are as other sources of this root have `seen` them."""
        return all(_mark(self.root / name, mark.partition(":")[0]) == mark for name, mark in seen.items())

    def newest_stamp(self) -> int:
        """When the youngest of the files that are known by their stamps was changed, in ns."""
        stamps = [mark.split(":") for mark in self.seen.values() if mark.startswith("stamp:")]
        return max((int(changed) for _, _, changed, _ in stamps), default=0)

    def _existing(self, name: str) -> Path:
        if not self.exists(name):
            raise AnnotationError(f"{self.root / name} does not exist. {self._nearby(name)}")
        return self.root / name

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        entries = _entries(self._existing(folder))
        self.seen[folder] = _mark_of(entries)
        return entries

    def _noted(self, name: str, how: How) -> Path:
        path = self._existing(name)
        self.seen[name] = _mark(path, how)
        return path

    def first_of(self, *names: str) -> str:
        """The first of these that exists."""
        for name in names:
            if self.exists(name):
                return name
        raise AnnotationError(f"None of {', '.join(names)} exists in {self.root}. {self._nearby(names[0])}")

    def listing(self, folder: str) -> list[str]:
        """Sorted names of the entries of a folder, hidden ones left out."""
        return [entry.name for entry in self._entries(folder)]

    def files_and_folders(self, folder: str) -> tuple[list[str], list[str]]:
        """As `listing`, but files and folders; links to folders are neither, as they may lead in a circle."""
        entries = self._entries(folder)
        files = [entry.name for entry in entries if entry.is_file()]
        return files, [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]

    def blocks(self, name: str, size: int) -> Iterator[bytes]:
        """The content of a file in blocks of `size` bytes."""
        digest = hashlib.sha256()
        with open(self._existing(name), "rb") as file:
            while block := file.read(size):
                digest.update(block)
                yield block
        self.seen[name] = f"content:{digest.hexdigest()}"

    def content(self, name: str) -> bytes:
        """The content of a file."""
        data = self._existing(name).read_bytes()
        self.seen[name] = f"content:{_digest([data])}"
        return data

    def text(self, name: str) -> str:
        """A UTF-8 file, with or without byte order mark, with any line ends."""
        data = self.content(name)
        try:
            return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            place = f"{self.root / name}, line {data.count(10, 0, error.start) + 1}"
            raise AnnotationError(f"{place}: not UTF-8 ({error.reason}); save the file as UTF-8.") from None

    def lines(self, name: str) -> Iterator[tuple[str, str]]:
        """(where, line) of the lines that are not blank, without the blanks at both ends."""
        # Not str.splitlines, which also splits at characters that are legal in a name.
        for number, line in enumerate(self.text(name).split("\n"), 1):
            if line := line.strip():
                yield f"{self.root / name}, line {number}", line

    def rows(self, name: str, separator: str) -> Iterator[tuple[str, list[str]]]:
        """(where, fields) of the rows of a CSV file; blank rows are left out."""
        reader = csv.reader(io.StringIO(self.text(name), newline=""), delimiter=separator, strict=True)
        begin = 1  # of the row that is read; a quoted field may hold line ends
        try:
            for row in reader:
                if row:
                    yield f"{self.root / name}, line {reader.line_num}", row
                begin = reader.line_num + 1
        except csv.Error as error:
            remedy = "close the quote, or double it inside a field"
            raise AnnotationError(f"{self.root / name}, line {begin}: {error}; {remedy}.") from None

    def json(self, name: str) -> Any:
        """A JSON file."""
        text = self.text(name)
        collecting = gc.isenabled()
        gc.disable()  # millions of small lists and not one cycle: the collector would take most of the time
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            line = shown(text.split("\n")[error.lineno - 1])
            raise AnnotationError(f"{self.root / name}, line {error.lineno}: not JSON ({error.msg}): {line}") from None
        except RecursionError:
            raise AnnotationError(f"{self.root / name}: nested too deeply to be annotations.") from None
        finally:
            if collecting:
                gc.enable()

    def xml_elements(self, name: str) -> list[tuple[tuple[str, ...], str]]:
        """(path of tags, text) of every leaf of a small XML file, in order; entities and DTDs are refused."""
        return _xml_elements(self.content(name), self.root / name)

    def _nearby(self, name: str) -> str:
        folder = (self.root / name).parent
        if not folder.is_dir():
            return f"The folder {folder} does not exist either."
        names = sorted(entry.name for entry in folder.iterdir())
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return f"{folder} holds: {', '.join(names[:8]) or 'nothing'}{more}."


def stamp(path: Path) -> Stamp:
    """Size and times of the last change.

    Raises:
        OSError: the file is not there.
    """
    found = path.stat()
    return (found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _mark(path: Path, how: str) -> str:
    """See `Sources.seen`."""
    try:
        if how == "content":
            with open(path, "rb") as file:
                return f"content:{_digest(iter(lambda: file.read(_BLOCK_BYTES), b''))}"
        if how == "names":
            return _mark_of(_entries(path))
        if how == "stamp":
            return ":".join(["stamp", *map(str, stamp(path))])
        path.stat()
        return "there"
    except OSError:
        return _ABSENT


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _mark_of(entries: Iterable[os.DirEntry[str]]) -> str:
    return f"names:{_digest(os.fsencode(entry.name) + b'/' for entry in entries)}"


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def safe_path(name: str, where: str) -> str:
    """The relative path with forward slashes; refuses what leads out of the folder.

    Backslashes are separators, as in lists that were made on Windows.
    """
    path = name.replace("\\", "/") if isinstance(name, str) else ""
    parts = path.split("/")
    if not path or path[0] == "/" or path[1:2] == ":" or ".." in parts or "\0" in path:
        raise AnnotationError(
            f"{where}: the image path {shown(name)} is refused; paths must be relative and stay inside of the folder."
        )
    return "/".join(part for part in parts if part not in ("", ".")) if "" in parts or "." in parts else path


def shown(content: object) -> str:
    """Content of a file as an error message quotes it: one line, not too long."""
    text = repr(content)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _xml_elements(content: bytes, path: Path) -> list[tuple[tuple[str, ...], str]]:
    parser = expat.ParserCreate()
    open_tags: list[str] = []
    text: list[str] = []
    leaves: list[tuple[tuple[str, ...], str]] = []

    def start(tag: str, _: dict[str, str]) -> None:
        open_tags.append(tag)
        text.clear()

    def end(_: str) -> None:
        leaves.append((tuple(open_tags), "".join(text).strip()))
        open_tags.pop()
        text.clear()

    def refuse(*_: object) -> NoReturn:
        # Entities are how a small file becomes gigabytes or reads other files; annotations have no use for them.
        raise AnnotationError(f"{path}, line {parser.CurrentLineNumber}: a DTD or entity declaration is refused.")

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text.append
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = parser.ExternalEntityRefHandler = refuse
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise AnnotationError(f"{path}, line {error.lineno}: not well-formed XML ({error}).") from None
    return leaves
