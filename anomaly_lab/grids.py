"""What the overrides of a multirun describe: its grids, and the jobs of each, before any of them is made.

Imports neither torch nor Lightning: a dry run over hundreds of runs stays quick.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from anomaly_lab import config
from anomaly_lab.advice import advice, unknown_key
from anomaly_lab.errors import explained

_BELOW_A_GROUP = re.compile(rf"({'|'.join(config.GROUPS)})\.[\w.]+=")
"""Overrides of a key that a group's choice decides about."""


class Sweep(NamedTuple):
    """What a multirun is, before any of its jobs is composed."""

    runs: Path
    grid: dict[str, Any]  # an experiment's own, or a search's space
    chooses_points: bool  # while it runs, so its jobs cannot be listed beforehand


def sweep(overrides: Sequence[str]) -> Sweep:
    """The multirun that ``overrides`` describe."""
    chosen = [word for word in config.without_sweeps(overrides) if not _BELOW_A_GROUP.match(word)]
    cfg = config.compose_with_hydra(chosen)
    sweeper = cfg.hydra.sweeper
    return Sweep(Path(cfg.runs), dict(sweeper.params or {}), not sweeper._target_.endswith(".BasicSweeper"))


def grids(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each grid of a multirun: one, or where several experiments are swept one of each.

    An experiment may itself sweep ``experiment``: its runs are those of the experiments that it names.
    """
    return [in_each_job(grid, own.grid) for grid, own in _grids(overrides)]


def _grids(overrides: Sequence[str]) -> list[tuple[list[str], Sweep]]:
    """The overrides of each grid, as they were given, with the multirun that they describe."""
    parsed = config.parse(overrides)
    rest = [text for text, one in zip(overrides, parsed, strict=True) if one.get_key_element() != "experiment"]
    named = [one for one in parsed if one.get_key_element() == "experiment"]
    if named and named[-1].is_sweep_override():
        each = ([*rest, f"experiment={name}"] for name in _values(named[-1]))
        return [grid for one in each for grid in _grids(one)]
    own = sweep(overrides)
    if "experiment" in own.grid:
        return _grids([*(f"{key}={value}" for key, value in own.grid.items()), *rest])
    return [(list(overrides), own)]


def in_each_job(overrides: Sequence[str], grid: Collection[str]) -> list[str]:
    """The overrides, a single value of a key below a swept group moved to the sweeper's own, which it sets in each job.

    Hydra sets a single value before any job's group is chosen, too: in the default model, which may lack the key.
    """
    parsed = config.parse(overrides)
    if any(one.get_key_element() == "hydra.sweeper.params" and one.value() is None for one in parsed):
        return list(overrides)  # Hydra cannot add to params that the command has removed
    swept = {one.get_key_element() for one in parsed if one.is_sweep_override()} | set(grid)
    last = {one.get_key_element(): place for place, one in enumerate(parsed)}
    words = []
    for place, (word, one) in enumerate(zip(overrides, parsed, strict=True)):
        found = _BELOW_A_GROUP.match(word)
        if not found or found[1] not in swept:
            words.append(word)
        elif last[one.get_key_element()] > place:
            continue  # of a key that is given twice the last one counts
        elif one.is_sweep_override():
            words.append(word)
        else:
            value = QuotedString(one.get_value_element_as_str().replace("${", "\\${"), Quote.single).with_quotes()
            words.append(f"+hydra.sweeper.params={{{one.get_key_element()}:{value}}}")
    return words


def jobs(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every job of a multirun, in Hydra's order, the experiments' own grids included.

    Raises:
        ValueError: the sweeper chooses its points itself, or a key is swept over nothing.
    """
    return [job for grid, own in _grids(overrides) for job in _jobs(grid, own)]


def expected_runs(experiment: str, overrides: Sequence[str] = ()) -> list[config.Job]:
    """Every run of ``conf/experiment/<experiment>.yaml``."""
    return [config.job(config.compose(words)) for words in jobs([f"experiment={experiment}", *overrides])]


def _jobs(overrides: Sequence[str], own: Sweep) -> list[list[str]]:
    if own.chooses_points:
        raise ValueError("this sweeper chooses its points while it runs: there is no list of them beforehand")
    given = [f"{key}={value}" for key, value in own.grid.items()] + list(overrides)
    choices: dict[str, list[str]] = {}
    for override in config.parse(given):
        key = override.get_key_element()
        if override.is_sweep_override():
            choices[key] = [f"{key}={value}" for value in _values(override)]
        else:
            choices[key] = [f"{key}={override.get_value_element_as_str()}"]
    return [list(job) for job in itertools.product(*choices.values())]


def _values(swept: Override) -> list[str]:
    if values := list(swept.sweep_string_iterator()):
        return values
    raise ValueError(f"{swept.input_line} has no value, so there is no run to make: range(0,10) has 0 to 9")


def refuse_unknown_keys(jobs: Sequence[Sequence[str]]) -> None:
    """Raise where a job sets a key that its model, data set or split does not have, before the first one is made.

    Raises:
        ValueError: no job has the key, and which it may mean; or some have it, and what the others have chosen.
    """
    chooses = tuple(f"{group}=" for group in (*config.GROUPS, "experiment"))
    kinds: dict[tuple[str, ...], Sequence[str]] = {}  # a job of each choice of files and keys: values do not matter
    for job in jobs:
        if any(map(_BELOW_A_GROUP.match, job)):
            kinds.setdefault(tuple(w if w.startswith(chooses) else w.partition("=")[0] for w in job), job)
    lacking: dict[str, list[tuple[Sequence[str], Exception]]] = {}
    for job in kinds.values():
        try:
            config.compose(job)
        except HydraException as error:
            key = unknown_key(error)
            if key is None:
                raise
            lacking.setdefault(key, []).append((job, error))
    for key, found in lacking.items():
        job, first = found[0]
        if len(found) == sum(any(word.startswith(f"{key}=") for word in job) for job in kinds.values()):
            raise ValueError(advice(first, job) or explained(first)) from first
        group = key.partition(".")[0]
        chosen = [config.compose([w for w in job if not _BELOW_A_GROUP.match(w)]).choices[group] for job, _ in found]
        names = sorted({*chosen})
        raise ValueError(
            f"{key} cannot be set for every {group} of this sweep ({', '.join(names)} "
            f"{'has' if len(names) == 1 else 'have'} none): give those that have it a command of their own"
        )
