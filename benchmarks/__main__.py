"""``python -m benchmarks cpu`` or ``gpu``: measure, write ``benchmarks/cpu.json`` or ``gpu.json``, then the page.

With ``--only`` these sections alone are measured, or of a section the rows of one part (``training.aae``), and all else
in the file stays as it is; the file says of every section, and of such a part, when, with which code and on how busy a
machine it was measured.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from anomaly_lab import record, switches
from anomaly_lab.files import write_atomically
from anomaly_lab.measure import processor

SECTIONS = ("machine", "training", "peers", "shallow", "counts", "scoring", "growth", "startup", "abreast")
"""Modules of `benchmarks`, each with ``measure(device, quick)``, in the order in which they are measured."""

PARTS = {"training": "model", "growth": "what"}
"""Sections of which one part can be measured alone, by the column that names it: ``measure(device, quick, part)``."""

PACKAGES = ("torch", "lightning", "numpy", "anomalib", "pyod")


def header(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    found = {name: _version(name) for name in PACKAGES}
    about: dict[str, Any] = {
        "cpu": f"{len(os.sched_getaffinity(0))} × {processor()}",
        "versions": {"python": platform.python_version()} | {k: v for k, v in found.items() if v is not None},
    }
    if device == "gpu":
        about["gpu"] = torch.cuda.get_device_name()
    return about


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def replaced(rows: Sequence[Mapping[str, Any]], column: str, part: str, new: Sequence[Any]) -> list[Mapping[str, Any]]:
    """The rows with those of one part replaced, the first by the first and so on; further ones follow the last."""
    places = [place for place, row in enumerate(rows) if row[column] == part]
    merged, left = [], list(new)
    for place, row in enumerate(rows):
        if row[column] != part:
            merged.append(row)
        elif left:
            merged.append(left.pop(0))
        if place in places[-1:]:
            merged += left
    return merged


@switches.resources()  # a run's threads and memory, for what is compared with it too
def main() -> None:
    from benchmarks import page

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("device", choices=("cpu", "gpu"))
    names = [*SECTIONS, *(f"{section}.{column.upper()}" for section, column in PARTS.items())]
    parser.add_argument("--only", nargs="+", metavar="NAME", default=SECTIONS, help="these alone: " + ", ".join(names))
    parser.add_argument("--quick", action="store_true", help="a smoke test of a few minutes: few pairs, small sizes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the files")
    given = parser.parse_args()
    if given.device == "gpu" and not torch.cuda.is_available():
        parser.error("no CUDA device here: python -m benchmarks cpu measures the CPU")

    path = given.out / f"{given.device}.json"
    for name in given.only:
        section, _, part = name.partition(".")
        if section not in SECTIONS or (part and section not in PARTS):
            parser.error(f"there is no {name} to measure: choose among {', '.join(names)}")
    whole = given.only is SECTIONS
    content: dict[str, Any] = json.loads(path.read_text()) if not whole and path.is_file() else {}
    measured = content.get("header", {}).get("measured", {})
    for name in given.only:
        section, _, part = name.partition(".")
        started, load = time.perf_counter(), os.getloadavg()[0]
        print(f"{name} ...", flush=True)
        measure = importlib.import_module(f"benchmarks.{section}").measure
        if part:
            there = content[section]
            rows = there["rows"] if isinstance(there, Mapping) else there
            found = measure(given.device, given.quick, part)
            new = replaced(rows, PARTS[section], part, found["rows"] if isinstance(found, Mapping) else found)
            content[section] = {**there, "rows": new} if isinstance(there, Mapping) else new
        else:
            content[section] = measure(given.device, given.quick)
            measured = {key: about for key, about in measured.items() if not key.startswith(f"{section}.")}
        code = record.code()
        measured[name] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - started),
            "threads": torch.get_num_threads(),
            "load": round(load, 1),  # of the machine in the minute before: other processes, since this one only begins
            "quick": given.quick,
            "git_sha": code["sha"],
            "dirty": code["dirty"],
        }
        about = header(given.device)
        about["versions"] = content.get("header", {}).get("versions", {}) | about["versions"]  # of others' rows, too
        content["header"] = about | {"measured": measured}
        text = json.dumps(content, indent=1, allow_nan=False)
        write_atomically(path, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]
        print(f"{name}: {measured[name]['seconds']} s", flush=True)
    page.write(given.out)
    print(f"written: {path}, {given.out / 'README.md'}")


if __name__ == "__main__":
    logging.disable(logging.INFO)  # a screenful of Lightning's for every trainer, whoever sets its level
    warnings.filterwarnings("ignore", module="lightning")
    main()
