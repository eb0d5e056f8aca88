"""Files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

UNWRITABLE = {
    errno.ENOSPC: "the file system is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
}
"""Error numbers that say that nothing can be written in a place, whichever file it is."""


def write_whole(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a neighbour of ``path``, then rename it; the folder is made where it is missing.

    The neighbour's name is its own, for processes on several machines may be writing the same file. What a killed
    process leaves of it goes with `remove_parts`.

    Raises:
        OSError: it cannot be written; the file named is ``path``, which is as it was.
    """
    path = Path(path)
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


def remove_parts(folder: Path) -> None:
    """Remove what killed processes left of `write_whole` in ``folder`` and below. Nobody may be writing there."""
    for part in folder.rglob(".*.part"):
        part.unlink(missing_ok=True)
