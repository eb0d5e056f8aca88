"""Files are written whole or not at all, and locks end with their process."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

log = logging.getLogger(__name__)

UNWRITABLE = {
    errno.ENOSPC: "the file system is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
}
"""Error numbers that say that nothing can be written in a place, whichever file it is."""


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write ``path`` atomically: ``write`` fills a temporary file in the same folder, which is flushed and renamed.

    Missing parent folders are created. The temporary name is unique, for processes on several machines may write the
    same file. `remove_parts` removes what a killed process leaves.

    Raises:
        OSError: it cannot be written; names ``path``, whose content is unchanged.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder, name a file in it", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with open(part, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):  # a file system that has become read-only keeps it until `remove_parts`
            part.unlink()
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(part)):  # a write names no file
            error.filename = str(path)
        raise


def write_text(path: str | Path, text: str) -> None:
    """`write_atomically` of a text, in UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """`write_atomically` of plain values; NaN and infinity, which JSON lacks, are a ValueError."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False))


def read_json(path: Path) -> Any:
    """The plain values of a JSON file that somebody else may have written.

    Raises:
        ValueError: it is no file, or no JSON as `write_json` writes it: a number is not finite, or a key there twice.
        RecursionError: it has thousands of brackets.
    """
    if not path.is_file():  # a pipe would wait for somebody who writes
        raise ValueError("it is no file")
    text = path.read_text(encoding="utf-8")
    return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"a number is {name}")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"a number is {text}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"a key is there twice: {next(key for key in keys if keys.count(key) > 1)!r}")
    return found


def refuse_bomb(path: Path, most: float = 50) -> None:
    """Hold a zip archive (npz, checkpoint) to what it says of its own size, before anything of it is unpacked.

    Args:
        most: how many times its size it may unpack to; 1 for archives that are not compressed.

    Raises:
        ValueError: it unpacks to more, and to more than 100 MB; or it is no file but a pipe or a device.
    """
    if not path.is_file():
        raise ValueError("it is no file")
    if zipfile.is_zipfile(path):
        packed = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > max(most * packed, 1e8):
            raise ValueError(f"its {packed / 1e6:.1f} MB unpack to {unpacked / 1e6:,.0f} MB")


def cell(text: str) -> str:
    """``text`` as a spreadsheet shows it: one that begins like a formula gets an apostrophe, or it would be run."""
    text = text.replace("\r", " ")  # csv does not quote a bare CR; some readers take it for a line break
    return f"'{text}" if text.startswith(FORMULAS) else text


FORMULAS = ("=", "+", "-", "@", "\t")


def remove_parts(folder: Path, *, seconds: float = 0) -> None:
    """Remove what killed processes left of `write_atomically` in ``folder`` and below.

    Args:
        seconds: how old it must be; 0 where no other process may be writing there.
    """
    for part in folder.rglob(".*.part"):
        with suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime >= seconds:
                part.unlink()


def take_lock(file: IO[Any] | int, *, wait: bool = False) -> bool:
    """Lock an open file until it is closed or this process dies; False if another process has the lock.

    Args:
        wait: until the other process lets go, instead of returning False.

    Raises:
        OSError: the file system has no locks, as some of clusters.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock on the file ``path``; False where there is no such file, or no locks.

    It takes the lock, shared and without waiting, and releases it at once. Locks of other machines are seen only
    where the file system passes flock on.
    """
    if not path.is_file():  # a pipe would wait for somebody who writes
        return False
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        fcntl.flock(file, fcntl.LOCK_UN)
        return False


class Lock(NamedTuple):
    """A lock that is held on the file ``path``."""

    path: Path
    file: IO[Any]

    def kept(self) -> bool:
        """Whether ``path`` is still the locked file (same inode); False once the folder was removed or replaced."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno()))
        except FileNotFoundError:
            return False


@contextmanager
def locked(folder: Path) -> Iterator[Lock | None]:
    """The lock on ``folder``'s ``.lock`` during the block, for this process alone; None where another process has it.

    The folder is made. The owner of the lock removes what killed processes left half-written. Where the file system
    has no locks a warning says so, and everybody gets one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        lock = Lock(folder / ".lock", file)
        try:
            mine = take_lock(file)
            if not mine:
                time.sleep(0.2)  # `is_locked` may have asked in this very moment
                mine = take_lock(file)
        except OSError as error:  # the parts stay: without a lock another process may be writing them
            log.warning("%s cannot be locked (%s): take care that nobody else makes the same run", folder, error)
            yield lock
            return
        if mine:
            remove_parts(folder)
        yield lock if mine else None
