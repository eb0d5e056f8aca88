"""What a run folder may make this process call: its detector and its fixed features (docs/security.md).

A configuration composed from yamls and a command line is its user's own program. One that lies in a run folder is data,
whoever wrote it: Hydra would import and call whatever it names.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from anomaly_lab.detector import Detector

OURS = "anomaly_lab"


def refuse_untrusted(saved: Any, trust: Sequence[str], where: str) -> None:
    """Check the ``detector`` and the ``input.features`` of the ``model`` that a run folder has, before they are made.

    The detector's class must be a `Detector` of this package or of a module in ``trust``. What else is named must be
    a network of this package, or anything that a module in ``trust`` defines itself. No other module is imported.

    Raises:
        ValueError: it names something else; one line, which begins with ``where``.
    """
    detector, given = saved.get("detector"), saved.get("input")
    features = given.get("features") if isinstance(given, Mapping) else None
    if not isinstance(detector, Mapping) or "_target_" not in detector:
        raise ValueError(f"{where}: model.detector names no class: delete it and start the run again")
    named = [*_targets(detector, "model.detector"), *_targets(features, "model.input.features")]
    for key, target in named:
        module, _, name = target.rpartition(".") if isinstance(target, str) else ("", "", "")
        found: Any = None
        if _within(module, (OURS, *trust)):
            try:
                found = getattr(importlib.import_module(module), name, None)
            except ImportError as error:
                raise ValueError(f"{where}: {key}={target} cannot be imported ({error})") from error
        # What a module has merely imported itself (torch.load, os.system) is not its own.
        own = callable(found) and _within(str(getattr(found, "__module__", "")), (OURS, *trust))
        if key == "model.detector" or not _within(module, trust):
            own = (
                own
                and isinstance(found, type)
                and issubclass(found, Detector if key == "model.detector" else nn.Module)
            )
        if not own:
            raise ValueError(
                f"{where} names {key}={str(target)[:80]!r}, and what a run folder names is not called: only detectors "
                "and networks of anomaly_lab are, and of modules that you trust (--trust MODULE, trust=[MODULE])"
            )


def _within(module: str, packages: Sequence[str]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def _targets(section: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every ``_target_`` in a section, outermost first, unresolved interpolations included."""
    if isinstance(section, Mapping):
        if "_target_" in section:
            yield key, section["_target_"]
        for name, value in section.items():
            yield from _targets(value, f"{key}.{name}") if name != "_target_" else ()
    elif isinstance(section, list | tuple):
        for number, value in enumerate(section):
            yield from _targets(value, f"{key}.{number}")
    elif isinstance(section, str) and "${" in section:
        yield key, section
