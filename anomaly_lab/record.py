"""What code makes a run and how it ended: its failure, or its result, whose place, checksums and metrics are checked.

Imports nothing heavy: status reports and dry runs read hundreds of these.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import subprocess
import traceback
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from anomaly_lab.files import read_json, refuse_bomb, write_json

IDENTITY = {"model": str, "dataset": str, "split": str, "normal_class": int, "seed": int, "changed": dict}
"""What makes a run the same run. ``normal_class`` is a class's index, or ``0+1`` or ``all`` of several (`SEVERAL`)."""

SEVERAL = re.compile(r"all|\d+(\+\d+)+")

SHARES = (
    *("auroc", "auroc_low", "auroc_high", "average_precision", "fpr95", "balanced_accuracy", "f1"),
    *("precision", "recall", "oracle_auroc", "oracle_shuffled_auroc", "oracle_sorted_auroc"),
    "oracle_sorted_best_auroc",
)
"""Metrics that lie between 0 and 1, or are None."""

LEARNED = 0.1
"""A run is marked if its reconstructions explain less than this share of the held-out normals' variance around their
mean image: one principal component explains .12 (a digit of MNIST) to .41 (a class of Fashion-MNIST) of it."""

MOVED = 1e-3
"""Relative change of the parameters below which a run is marked: the first Adam step of 2e-4 moves them further."""

SUBMITTED = "ANOMALY_LAB_SUBMITTED"
"""Environment variable of a queued job: the `code` it was submitted with, as JSON."""

_CODE = ("anomaly_lab", "hydra_plugins", "conf")
"""What a run reads of a checkout: uncommitted changes elsewhere (notes, pages) change no result."""

_ROOT = Path(__file__).resolve().parent.parent

FAILURE = "failure.json"
"""Why a run has no result; goes when it gets one."""


@functools.cache
def code() -> dict[str, Any]:
    """Commit, dirtiness and the hash of uncommitted changes of the code that runs; nulls where it is no checkout.

    ``diff`` covers the code and the configurations, new files among them; None without such changes. Kept from the
    first call on, for a process goes on with the modules it has loaded.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(_ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, errors="replace").stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()) != _ROOT:
            return {"sha": None, "dirty": None, "diff": None}  # installed inside somebody else's repository
        changes = git("diff", "HEAD", "--binary", "--no-ext-diff", "--no-color", "--", *_CODE)
        for name in git("ls-files", "-z", "--others", "--exclude-standard", "--", *_CODE).split("\0")[:-1]:
            changes += f"{name}\n{(_ROOT / name).read_text(errors='replace')}"
        return {
            "sha": git("rev-parse", "HEAD").strip(),
            "dirty": bool(git("status", "--porcelain")),
            "diff": hashlib.sha256(changes.encode()).hexdigest()[:12] if changes else None,
        }
    except (OSError, subprocess.CalledProcessError):
        return {"sha": None, "dirty": None, "diff": None}


def place(identity: Mapping[str, Any], role: str) -> Path:
    """Where a run lies below the folder of runs: ``<model>/<dataset>/<split>/n<class>/s<seed>``.

    The seed is followed by a hash of what was changed, where anything was; ``a`` stands for ``n`` where the class is
    the abnormal one.
    """
    seed = f"s{identity['seed']}"
    if identity["changed"]:
        seed += "-" + hashlib.sha256(json.dumps(identity["changed"], sort_keys=True).encode()).hexdigest()[:8]
    group = f"{'n' if role == 'normal' else 'a'}{identity['normal_class']}"
    return Path(identity["model"], identity["dataset"], identity["split"], group, seed)


def other(identity: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The keys in which ``identity`` differs from ``wanted``, such as ``seed=0 (not 1)``; empty if none."""
    wanted = json.loads(json.dumps(wanted))  # as a file has it
    differing = (key for key in IDENTITY if identity.get(key) != wanted[key])
    return ", ".join(f"{key}={identity.get(key)} (not {wanted[key]})" for key in differing)


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(folder: Path, *, scored: bool = True) -> dict[str, Any]:
    """The ``result.json`` in ``folder``.

    Args:
        scored: the arrays that the run wrote must be there as it wrote them (results of earlier code do not say how).

    Raises:
        ValueError: it cannot be read, or holds what no run writes; or the arrays are gone, or others. It is named.
    """
    file = folder / "result.json"
    try:
        result: dict[str, Any] = read_json(file)
        fault = next(_faults(result), "")
        for name, sha256 in result.get("sha256", {}).items() if scored and not fault else ():
            beside = folder / Path(name).name
            if not beside.is_file():
                fault = f"{beside.name} is gone"
            elif checksum(beside) != sha256:
                fault = f"{beside.name} is not the one that the run wrote"
    # What is no result.json may be anything: a list, a number, thousands of brackets.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        fault = f"{type(error).__name__}: {error}"
    if fault:
        raise ValueError(f"{file} is damaged ({fault}): delete it and run again")
    return result


def _faults(result: Mapping[str, Any]) -> Iterator[str]:
    identity, metrics = result["identity"], result["metrics"]
    for name, kind in IDENTITY.items():
        several = name == "normal_class" and type(identity[name]) is str and SEVERAL.fullmatch(identity[name])
        if type(identity[name]) is not kind and not several:
            yield f"identity.{name} is {identity[name]!r}"
    if metrics["auroc"] is None:
        yield "no AUROC in it"
    for where in (metrics, *((result.get("by_kind") or {}).get(kind) or {} for kind in ("seen", "unseen"))):
        for name, value in where.items():
            if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
                yield f"{name} is {value!r}"
            elif value is not None and name in SHARES and not 0 <= value <= 1:
                yield f"{name} is {value}, which is not between 0 and 1"


def write_failure(folder: Path, why: BaseException | str, **more: Any) -> None:
    """Record in ``failure.json`` why a run ended without a result.

    Args:
        why: the exception, which is kept with its traceback; or one line, where none was raised.
        more: further plain values of the file, such as the run's identity.

    Raises:
        OSError: it cannot be written.
    """
    if isinstance(why, str):
        line, trace = why, ""
    else:
        line = " ".join(f"{type(why).__name__}: {why}".split())
        trace = "".join(traceback.format_exception(why))
    ended = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(folder / FAILURE, {**more, "error": line, "traceback": trace, "time": ended})


def failure(folder: Path) -> str | None:
    """The line of the ``failure.json`` in ``folder``; None where there is none."""
    if not (folder / FAILURE).exists():
        return None
    try:
        text = str(json.loads((folder / FAILURE).read_text(encoding="utf-8"))["error"]).strip()
    except (ValueError, KeyError, TypeError, OSError):
        return f"{FAILURE} cannot be read"
    return text.splitlines()[0] if text else "no message"


def refuse_misplaced(result: Mapping[str, Any], folder: Path) -> None:
    """Hold a result to its folder: a copy under another class or seed would count as that one.

    Raises:
        ValueError: it lies where another run belongs.
    """
    own = place(result["identity"], result.get("role") or "normal")
    if folder.absolute().parts[-len(own.parts) :] != own.parts:
        raise ValueError(
            f"{folder / 'result.json'} is of the run {own.as_posix()}: it was copied or renamed, move it back"
        )


def recompute(result: Mapping[str, Any], folder: Path) -> None:
    """Compute a result's metrics anew from its ``scores.npz``, threshold included; the oracle's are no part of it.

    Raises:
        ValueError: they are others, or there are no such scores.
    """
    import numpy as np

    file = folder / "scores.npz"
    try:
        refuse_bomb(file)
        with np.load(file, allow_pickle=False) as arrays:
            found = of_scores(arrays, result["config"]["trainer"]["threshold_quantile"])
    # A damaged archive is a BadZipFile, zlib.error, EOFError, ..., depending on the damage.
    except Exception as error:
        raise ValueError(f"{file} cannot be verified ({type(error).__name__}: {error})") from error
    refuse_other(found, result["metrics"], str(folder / "result.json"))


def of_scores(arrays: Mapping[str, Any], quantile: float) -> dict[str, float | None]:
    """Metrics and threshold from ``score``, ``truth``, ``val_score`` and, where the method has a rule, ``decided``."""
    from anomaly_lab import metrics

    threshold = metrics.threshold_from_normals(arrays["val_score"], quantile)
    found = metrics.evaluate(arrays["score"], arrays["truth"], threshold=threshold, decided=arrays.get("decided"))
    return found | {"threshold": threshold}


def refuse_other(found: Mapping[str, float | None], said: Mapping[str, Any], where: str) -> None:
    """Hold the metrics that ``where`` says to those ``found`` in its scores.

    Raises:
        ValueError: one differs by more than 1e-6 of itself; it is named.
    """
    for name, value in found.items():
        was = said.get(name)
        if not (value is was if value is None or was is None else math.isclose(value, was, rel_tol=1e-6, abs_tol=1e-9)):
            raise ValueError(f"{where} says {name} {was}, its scores say {value}")
