"""The lines of an offline run: what is asked, what was answered by a run before, and the file that answers go to.

An answer is written by one append of a whole line, so a killed run leaves whole lines and at most one torn at the end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mllm_squeeze.errors import ConfigError, InUseError, UnsupportedInputError, did_you_mean

_LISTS = ("images", "videos")
_ALLOWED = ("prompt", *_LISTS, "id")


@dataclass(frozen=True)
class Line:
    """One line of the input: its number from 1, its text, and the folder that its relative paths start from."""

    number: int
    text: str
    folder: Path

    def key(self, settings: str) -> str:
        """Return what tells this line, answered with these settings, from any other."""
        return hashlib.sha256(f"{settings}\n{self.text}".encode()).hexdigest()[:16]

    def question(self) -> Question:
        """Return what the line asks.

        Raises:
            UnsupportedInputError: it is no JSON object, or one of its keys is unknown or of another type.
        """
        try:
            data = json.loads(self.text)
        except ValueError as error:
            raise UnsupportedInputError(f"Line {self.number} is no JSON: {error}.") from error
        if not isinstance(data, dict):
            raise UnsupportedInputError(
                f'Line {self.number} is no JSON object. Write {{"prompt": "...", "images": ["a.png"]}}.'
            )
        for name in data:
            if name not in _ALLOWED:
                raise UnsupportedInputError(f"Line {self.number} has the key '{name}'. {did_you_mean(name, _ALLOWED)}")
        if not isinstance(data.get("prompt"), str):
            raise UnsupportedInputError(f"Line {self.number} needs a 'prompt' that is text.")
        return Question(data["prompt"], *(self._paths(name, data.get(name, [])) for name in _LISTS))

    def _paths(self, name: str, given: Any) -> tuple[Path, ...]:
        if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
            raise UnsupportedInputError(f"Line {self.number}: '{name}' is a list of paths; got {given!r}.")
        return tuple(self.folder / one for one in given)

    def head(self, settings: str) -> dict[str, Any]:
        """Return how its answer starts: its number, its key, and its id where it has one."""
        out: dict[str, Any] = {"line": self.number, "key": self.key(settings)}
        try:
            data = json.loads(self.text)
        except ValueError:
            return out
        return {**out, "id": data["id"]} if isinstance(data, dict) and "id" in data else out


@dataclass(frozen=True)
class Question:
    """What one line asks: the words, and the files that it is about."""

    prompt: str
    images: tuple[Path, ...] = ()
    videos: tuple[Path, ...] = ()


def read(path: Path) -> list[Line]:
    """Return the lines of an input file, empty ones left out.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as lines of JSON: {error}.") from error
    # Not splitlines: JSON may hold characters that it takes for ends of lines.
    found = enumerate(text.split("\n"), start=1)
    return [Line(number, one.strip(), path.parent) for number, one in found if one.strip()]


class Answers:
    """The output file of a run, held by this process alone.

    done: numbers of the lines that were answered before.
    """

    def __init__(self, file: BinaryIO, path: Path, lines: Sequence[Line], settings: str) -> None:
        self._file = file
        self._settings = settings
        self.done = self._resume(path, {line.number: line for line in lines})

    def write(self, line: Line, **answer: Any) -> None:
        """Append the answer of one line."""
        if line.number in self.done:
            raise InUseError(f"Line {line.number} was answered already; its answer is written once.")
        text = json.dumps({**line.head(self._settings), **answer}, ensure_ascii=False)
        self._file.write(text.encode("utf-8", "replace") + b"\n")
        self._file.flush()
        self.done.add(line.number)

    def _resume(self, path: Path, lines: dict[int, Line]) -> set[int]:
        """Return which lines have their answer, and cut off what a killed run left of its last one."""
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind(b"\n") + 1]
        done: set[int] = set()
        for row in whole.splitlines():
            number, key = _number_and_key(row, path)
            line = lines.get(number)
            if line is None or line.key(self._settings) != key:
                raise ConfigError(
                    f"{path} answers line {number} of other prompts, or with other settings. Give the same command "
                    "and prompts to go on with it, or another --out."
                )
            if number in done:
                raise ConfigError(f"{path} answers line {number} twice, so this command did not write it.")
            done.add(number)
        # Only now: a file that is not ours stays as it is.
        if len(whole) < len(text):
            if not text[len(whole) :].startswith(b'{"line": '[: len(text) - len(whole)]):
                raise _not_ours(path)
            self._file.truncate(len(whole))
        self._file.seek(0, 2)
        return done


def _number_and_key(row: bytes, path: Path) -> tuple[int, str]:
    try:
        data = json.loads(row)
        return int(data["line"]), str(data["key"])
    except (ValueError, KeyError, TypeError) as error:
        raise _not_ours(path) from error


def _not_ours(path: Path) -> ConfigError:
    return ConfigError(f"{path} holds something else than answers of this command. Give another --out.")


@contextmanager
def answers(path: Path, lines: Sequence[Line], settings: str) -> Iterator[Answers]:
    """Open the output file, to go on with what it holds.

    settings: what the answers depend on besides their lines.

    Raises:
        ConfigError: it cannot be written, or holds other answers. InUseError: another process writes it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}.") from error
    with file:
        _hold(file, path)
        yield Answers(file, path, lines, settings)


def _hold(file: BinaryIO, path: Path) -> None:
    """Keep other processes out until the file is closed or this process is gone."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InUseError(f"Another process writes {path}. Wait for it, or give another --out.") from error
