"""Errors of users, machines and runs: each in one line, and the exit code that a command ends with."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from anomaly_lab.files import UNWRITABLE

DONE, FAILED, MISTAKE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
"""Exit codes: all runs are done; some failed or remain; the command itself is wrong; Ctrl-C; SIGTERM."""

EXTRAS = {"hydra/sweeper/optuna": "optuna"}
"""Configs that come with an optional package, and the extra of ours that installs it."""


class RunFailed(ValueError):
    """The command was right; the run, or the machine, failed it. One line says what to do."""


class Terminated(SystemExit):
    """SIGTERM ended the run; started again, it resumes after its last whole epoch."""

    def __init__(self, code: int = TERMINATED) -> None:
        super().__init__(code)


def refuse_fewer(least: int, section: str = "model.detector", /, **numbers: object) -> None:
    """Check options of a method, or of another ``section`` of the configuration, that count something.

    Raises:
        ValueError: one of them is no whole number, or below ``least``.
    """
    for name, number in numbers.items():
        if type(number) is not int or number < least:
            raise ValueError(f"{section}.{name}={number}: give a whole number from {least}")


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raise `Terminated` in the main thread on SIGTERM during the block, unless another handler is set in it."""

    def end(number: int, frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def ignore_pipe(stream: IO[str]) -> None:
    """Redirect ``stream`` to /dev/null once its reader has closed the pipe (``| head``), so that the work goes on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def shortened(error: BaseException) -> str:
    """The first 200 characters of an error's message in one line; its type where it has no message."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def printable(text: str) -> str:
    """A text in one line that no terminal obeys: control characters, of names that come from a file, are blanks."""
    return "".join(character if character.isprintable() else " " for character in text)


def exit_code(error: Exception) -> int:
    """`FAILED` where the command was right, else `MISTAKE`; of an error that `explained` has a line for."""
    failed = isinstance(error, RunFailed) or (isinstance(error, OSError) and error.errno in UNWRITABLE)
    return FAILED if failed else MISTAKE


def unwritten(error: OSError, another: str) -> str:
    """One line on a file that a command could not write; ``another`` is the option that names another place."""
    reason = UNWRITABLE.get(error.errno or 0) or (error.strerror or shortened(error)).lower()
    return f"{error.filename or 'a file'} cannot be written: {reason}; name another place with {another}"


def explained(error: Exception) -> str | None:
    """A user's mistake in one line that says what to do; None for a bug, whose traceback is needed."""
    # Late: --help needs no configuration.
    from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    text, cause = flat(str(error)), error.__cause__
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        where = error.filename or "a file"
        return (
            f"{where} cannot be written: {UNWRITABLE[error.errno]}. Make room or let it be written, or name another "
            "place (runs=DIR); the same command then goes on after the last whole epoch"
        )
    if isinstance(error, MissingConfigException) and (extra := EXTRAS.get(error.missing_cfg_file or "")):
        return f"{error.missing_cfg_file} needs an extra: pip install anomaly-lab[{extra}]"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        method = name.removesuffix("_small")
        if group == "model" and name != method and method in error.options:
            return f"there is no model={name}: write model={method} size=small"
        if near := difflib.get_close_matches(name, error.options, n=3, cutoff=0.7):
            others = f" (or {', '.join(near[1:])})" if near[1:] else ""
            return f"there is no {group}={name}: write {group}={near[0]}{others}; anomaly-lab --help shows all"
        return f"there is no {group}={name}: choose among {', '.join(error.options)}"
    if isinstance(error, InstantiationException) and isinstance(cause, ValueError):
        return flat(str(cause))  # what a data set, a split or a method says about its parameters
    if isinstance(error, InstantiationException):
        return _not_made(text, cause)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value: give {error.full_key}=..."
    if isinstance(error, OverrideParseException):
        return f"{error.override} is no key=value: {_quoted(error.override) or text}"
    if isinstance(error, HydraException) and "--multirun" in text:
        named = text.split("'")[1]
        return f"{named} asks for several runs: add -m"
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException):
        why = "there is no such key" if "not in struct" in str(cause) else flat(str(cause))
        return f"{cause.full_key} cannot be set ({why}): anomaly-lab --cfg job shows the keys there are"
    mistake = isinstance(error, HydraException | OmegaConfBaseException | ValueError | OSError)
    return text if mistake else None


def _not_made(text: str, cause: BaseException | None) -> str:
    """What Hydra says of a class that it could not find or call, with the reason, which it keeps to itself."""
    if not text.startswith("Error locating target"):
        lacks = "'params'" in text or "'optimizer'" in text  # which only an optimiser and a schedule are given later
        return text + ": give it _partial_: true" * ("missing 1 required positional argument" in text and lacks)
    while cause is not None and cause.__cause__ is not None:
        cause = cause.__cause__
    said = text.partition(", set env var")[0]
    target = said.partition("'")[2].rstrip("'")
    module, _, name = target.rpartition(".")
    missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
    if cause is None or missing == target:
        return f"{said}: {module} has no {name}"
    path = ": PYTHONPATH must name the folder of modules of your own" * (missing == target.partition(".")[0])
    return f"{said}: {type(cause).__name__}: {shortened(cause)}{path}"


def _quoted(override: str) -> str:
    """How to write a value whose signs Hydra takes for its own, or none of; empty where quotes would not help."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, value = override.partition("=")
    listed = value.startswith("[") and value.endswith("]")
    names = [name.strip() for name in value.strip("[]").split(",")] if listed else [value]
    quoted = [name if re.fullmatch(r"\w+|'.*'", name, re.A) else "'" + name.replace("'", r"\'") + "'" for name in names]
    written = f"{key}=[{','.join(quoted)}]" if listed else f"{key}={quoted[0]}"
    try:
        OverridesParser.create().parse_override(written)
    except HydraException:  # of signs that no quotes help with, not its OverrideParseException
        return ""
    also = ", or give the index of the class" if key.endswith(("_class", "classes")) else ""
    whole = shlex.quote(written) if re.search(r'["$`\\!]', written) else f'"{written}"'  # the shell's own signs
    return f"quote the value and the whole, {whole}{also}" if equals and value else ""


def flat(text: str) -> str:
    """One line of many, without what Hydra and OmegaConf add for their own developers."""
    noise = ("See https://", "Error parsing override", "full_key:", "object_type=", "reference_type=")
    return " ".join(line.strip() for line in text.splitlines() if line and not line.strip().startswith(noise))
