"""Reads the annotation files of a data set with distrust, and remembers which files were read.

The files come from anywhere: names may lead out of the folder, an XML may hold an entity bomb, lists may have Windows
line ends. The memory of what was read tells the cache when to read again.
"""

from __future__ import annotations

import csv
import gc
import io
import json
import os
import xml.parsers.expat as expat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from mlfast.data.annotations import AnnotationError

_SHOWN = 120
Stamp = tuple[int, int]  # size and mtime in ns; (-1, -1) of what is not there


class Sources:
    """The files below one root folder.

    Attributes:
        root: the folder.
        seen: relative name -> stamp of every file and folder that was read or looked for.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise AnnotationError(f"{self.root} is not a folder; give the folder that holds the data set.")
        self.seen: dict[str, Stamp] = {}

    def exists(self, name: str) -> bool:
        """Whether the file or folder is there."""
        self.seen[name] = stamp(self.root / name)
        return self.seen[name] != (-1, -1)

    def path(self, name: str) -> Path:
        """The full path of a file that must be there."""
        if not self.exists(name):
            raise AnnotationError(f"{self.root / name} does not exist. {self._nearby(name)}")
        return self.root / name

    def first_of(self, *names: str) -> str:
        """The first of these that exists."""
        for name in names:
            if self.exists(name):
                return name
        raise AnnotationError(f"None of {', '.join(names)} exists in {self.root}. {self._nearby(names[0])}")

    def listing(self, folder: str) -> list[str]:
        """Sorted names of the entries of a folder, hidden ones left out."""
        with os.scandir(self.path(folder)) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith("."))

    def text(self, name: str) -> str:
        """A UTF-8 file, with or without byte order mark, with any line ends."""
        path = self.path(name)
        data = path.read_bytes()
        try:
            return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise AnnotationError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8.") from None

    def lines(self, name: str) -> Iterator[tuple[str, str]]:
        """(where, line) of the lines that are not blank, without the blanks at both ends."""
        # Not str.splitlines, which also splits at characters that are legal in a name.
        for number, line in enumerate(self.text(name).split("\n"), 1):
            if line := line.strip():
                yield f"{self.root / name}, line {number}", line

    def rows(self, name: str, separator: str) -> Iterator[tuple[str, list[str]]]:
        """(where, fields) of the rows of a CSV file; blank rows are left out."""
        reader = csv.reader(io.StringIO(self.text(name), newline=""), delimiter=separator, strict=True)
        try:
            for row in reader:
                if row:
                    yield f"{self.root / name}, line {reader.line_num}", row
        except csv.Error as error:
            raise AnnotationError(f"{self.root / name}, line {reader.line_num}: {error}.") from None

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
        return _xml_elements(self.path(name))

    def _nearby(self, name: str) -> str:
        folder = (self.root / name).parent
        if not folder.is_dir():
            return f"The folder {folder} does not exist either."
        names = sorted(entry.name for entry in folder.iterdir())
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return f"{folder} holds: {', '.join(names[:8]) or 'nothing'}{more}."


def stamp(path: Path) -> Stamp:
    """Size and time of the last change."""
    try:
        found = path.stat()
    except OSError:
        return (-1, -1)
    return (found.st_size, found.st_mtime_ns)


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


def _xml_elements(path: Path) -> list[tuple[tuple[str, ...], str]]:
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
        parser.Parse(path.read_bytes(), True)
    except expat.ExpatError as error:
        raise AnnotationError(f"{path}, line {error.lineno}: not well-formed XML ({error}).") from None
    return leaves
