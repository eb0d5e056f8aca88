"""``python -m benchmarks cpu`` or ``gpu``: measure, write ``benchmarks/cpu.json`` or ``gpu.json``, then the page.

With ``--only`` these sections alone are measured, and the others of the file stay as they are; the file says for every
section when and with which code it was measured.
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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from anomaly_lab import config, switches
from anomaly_lab.files import write_whole

SECTIONS = ("machine", "training", "peers", "counts", "scoring", "growth", "startup", "abreast")
"""Modules of `benchmarks`, each with ``measure(device, quick)``, in the order in which they are measured."""

PACKAGES = ("torch", "lightning", "numpy", "anomalib", "pyod")


def header(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    found = {name: _version(name) for name in PACKAGES}
    about: dict[str, Any] = {
        "cpu": _cpu(),
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


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} × {names[0]}" if names else platform.processor()


@switches.resources()  # a run's threads and memory, for what is compared with it too
def main() -> None:
    from benchmarks import page

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("device", choices=("cpu", "gpu"))
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=SECTIONS, help="these alone: " + ", ".join(SECTIONS)
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test of a few minutes: few pairs, small sizes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the files")
    given = parser.parse_args()
    if given.device == "gpu" and not torch.cuda.is_available():
        parser.error("no CUDA device here: python -m benchmarks cpu measures the CPU")

    path = given.out / f"{given.device}.json"
    content: dict[str, Any] = json.loads(path.read_text()) if given.only and path.is_file() else {}
    measured = content.get("header", {}).get("measured", {})
    for name in given.only or SECTIONS:
        started = time.perf_counter()
        print(f"{name} ...", flush=True)
        content[name] = importlib.import_module(f"benchmarks.{name}").measure(given.device, given.quick)
        code = config.code()
        measured[name] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - started),
            "threads": torch.get_num_threads(),
            "quick": given.quick,
            "git_sha": code["sha"],
            "dirty": code["dirty"],
        }
        content["header"] = header(given.device) | {"measured": measured}
        text = json.dumps(content, indent=1, allow_nan=False)
        write_whole(path, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]
        print(f"{name}: {measured[name]['seconds']} s", flush=True)
    page.write(given.out)
    print(f"written: {path}, {given.out / 'README.md'}")


if __name__ == "__main__":
    logging.disable(logging.INFO)  # a screenful of Lightning's for every trainer, whoever sets its level
    warnings.filterwarnings("ignore", module="lightning")
    main()
