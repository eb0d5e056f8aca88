"""Files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_whole(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a neighbour of ``path``, then rename it; the folder is made where it is missing.

    The neighbour's name is its own, for processes on several machines may be writing the same file.
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
    finally:
        part.unlink(missing_ok=True)
