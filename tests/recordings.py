"""wandb's recordings read without a server, for tests."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_offline(path: Path) -> dict[str, Any]:
    """A wandb run as recorded on disk, without a server: what ``wandb sync`` would upload.

    Args:
        path: a ``.wandb`` file, a folder with one, or a run's folder: then the newest recording in its ``wandb/``.

    Returns:
        ``run`` (id, name, group, tags, project, entity), ``config``, ``summary``, ``history`` (a dict a row),
        ``files`` (paths of the recorded files), ``artifacts`` (names) and ``exit_code`` (None if it never ended).

    Raises:
        ValueError: there is no recording, or it is damaged. The torn last record of a killed process is left out.
    """
    from wandb.proto import wandb_internal_pb2

    path = Path(path)
    if not path.is_file():
        found = [*path.glob("run-*.wandb"), *path.glob("wandb/*run-*/run-*.wandb")]
        if not found:
            raise ValueError(f"{path}: no wandb recording (run-*.wandb) in it")
        path = max(found, key=lambda file: file.stat().st_mtime)
    recording: dict[str, Any] = {"run": {}, "config": {}, "summary": {}, "history": []}
    recording |= {"files": [], "artifacts": [], "exit_code": None}
    for content in _records(path):
        record: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined]  # protobuf makes it when imported
        record.ParseFromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            recording["run"] = {"id": run.run_id, "name": run.display_name, "group": run.run_group}
            recording["run"] |= {"tags": list(run.tags), "project": run.project, "entity": run.entity}
            _update(recording["config"], run.config.update)
        elif kind == "config":
            _update(recording["config"], record.config.update)
        elif kind == "summary":
            _update(recording["summary"], record.summary.update)
        elif kind == "history":
            row: dict[str, Any] = {}
            _update(row, record.history.item)
            recording["history"].append(row)
        elif kind == "files":
            root = path.parent / "files"
            recording["files"] += [root / file.path for file in record.files.files]
        elif kind == "artifact":
            recording["artifacts"].append(record.artifact.name)
        elif kind == "exit":
            recording["exit_code"] = record.exit.exit_code
    return recording


def _update(values: dict[str, Any], items: Any) -> None:
    for item in items:
        *parents, last = list(item.nested_key) or [item.key]
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = json.loads(item.value_json)


def _records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format, with zlib's CRC-32 and a header of seven bytes."""
    block, head = 2**15, struct.Struct("<IHB")  # checksum, length, kind: 1 whole, 2 first, 3 middle, 4 last
    raw = path.read_bytes()
    if raw[:4] != b":W&B":
        raise ValueError(f"{path}: not a wandb recording")
    position, record = 7, b""
    while position + head.size <= len(raw):
        left = block - position % block
        if left < head.size:  # too short for a record's head: padding
            position += left
            continue
        checksum, length, kind = head.unpack_from(raw, position)
        position += head.size
        if position + length > len(raw):
            return
        part = raw[position : position + length]
        position += length
        if zlib.crc32(part, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(f"{path}: damaged before byte {position}")
        record += part
        if kind in (1, 4):
            yield record
            record = b""
