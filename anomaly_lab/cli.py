"""The console commands. Heavy imports stay inside the functions, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import subprocess
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from anomaly_lab.files import UNWRITABLE

if TYPE_CHECKING:
    from omegaconf import DictConfig

DRY_RUN = "--dry-run"

DONE, FAILED, MISTAKE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
"""Exit codes: everything asked for is there; a run failed or is left; the command itself is wrong; Ctrl-C; SIGTERM."""

JOURNAL = "ANOMALY_LAB_JOURNAL"
"""Environment variable, for a launcher's workers: the journal of the sweep they work for."""

EXTRAS = {"hydra/sweeper/optuna": "optuna"}
"""Configs that come with an optional package, and the extra of ours that installs it."""


def train() -> None:
    """``anomaly-lab``: train and evaluate one run, or with ``-m`` every run of a grid that is not there yet.

    ``--dry-run`` says what is done, what is to do and about how long it will take, and does nothing.
    """
    from hydra import main
    from hydra._internal.utils import get_args_parser

    from anomaly_lab import config

    dry = DRY_RUN in sys.argv
    sys.argv[1:] = [word for word in sys.argv[1:] if word != DRY_RUN]
    asked = get_args_parser().parse_args(sys.argv[1:])
    # OpenMP's threads spin while they wait; where cores are shared with other processes that makes steps many times
    # slower. Read when torch is loaded, and inherited by a launcher's workers.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here as exceptions, not as pages of Hydra's own
    for name in ("hydra", "hydra_plugins", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)  # a sweep prints a line a run, not two more of the launcher
    try:
        if asked.config_dir or asked.config_path or asked.config_name:
            raise ValueError(
                f"configs of your own go into the folder that {config.EXTRA_CONFIGS} names, not into flags"
            )
        if dry:
            sys.exit(_dry_run(asked.overrides))
        sys.argv += config.search_path()
        hydra_main = main(config_path=str(config.CONFIG_DIR), config_name="train", version_base="1.3")(_job)
        if not asked.multirun:
            hydra_main()
            return
        sweep = config.sweep(asked.overrides)
        with _journal(sweep.runs) as journal:
            _whatever_dies(hydra_main, journal)
            jobs = journal.jobs() if sweep.chooses_points else config.jobs(asked.overrides)
        sys.exit(_summary(jobs, searched=sweep.chooses_points))
    except (KeyboardInterrupt, SystemExit) as end:
        if type(end).__name__ == "SIGTERMException":  # Lightning's, a SystemExit without a code
            print("terminated: the same command goes on after the last whole epoch", file=sys.stderr)
            sys.exit(TERMINATED)
        # In the middle of training Lightning makes a SystemExit of Ctrl-C.
        if not isinstance(end, KeyboardInterrupt) and not isinstance(end.__context__, KeyboardInterrupt):
            raise
        print("interrupted: the same command goes on after the last whole epoch", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        line = _explained(error)
        if line is None:
            raise
        sys.exit(_mistake("anomaly-lab", line, FAILED if _is_failure(error) else MISTAKE))


class _Journal(NamedTuple):
    """What became of the jobs of a sweep, a line each time one starts or ends, by whatever process makes it.

    Sweepers that choose their own points tell nobody which, and a process that was killed cannot say which it made.
    """

    path: Path

    def note(self, event: str, job: Sequence[str]) -> None:
        with suppress(FileNotFoundError):  # the sweep is over, and this one of the jobs that it left in a queue
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                # One write of one line: those of several processes do not mix. The line break is in front of it, so
                # that a line which a full disk has cut off spoils no other.
                os.write(file, b"\n" + json.dumps([event, list(job)]).encode())
            finally:
                os.close(file)

    def jobs(self) -> list[list[str]]:
        """Every job that was begun, in that order, each once."""
        return [list(job) for job in self._last()]

    def in_state(self, event: str) -> list[list[str]]:
        return [list(job) for job, last in self._last().items() if last == event]

    def _last(self) -> dict[tuple[str, ...], str]:
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        whole = [line for line in lines if line.endswith("]]")]
        return {tuple(job): event for event, job in map(json.loads, whole)}


@contextmanager
def _journal(runs: Path) -> Iterator[_Journal]:
    """The journal of one sweep: in the folder of runs, which all machines see, and for as long as the sweep lasts."""
    runs.mkdir(parents=True, exist_ok=True)
    for path in runs.glob(".sweep-*.jsonl"):  # of sweeps that were killed: nobody holds them
        with open(path, "rb") as left, suppress(OSError):
            fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    new = (runs / f".sweep-{uuid.uuid4().hex[:8]}.new").resolve()
    path = new.with_suffix(".jsonl")
    with open(new, "xb") as file:
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            new.rename(path)  # locked already where another sweep may find it
            os.environ[JOURNAL] = str(path)
            yield _Journal(path)
        finally:
            os.environ.pop(JOURNAL, None)
            path.unlink(missing_ok=True)


def _whatever_dies(sweep: Callable[[], None], journal: _Journal) -> None:
    """Let Hydra make its sweep; go on with the rest where a launcher's worker is killed and takes the others along.

    Nobody can tell which of those that were being made was to blame (the one that took all the memory, mostly). So
    each is made alone: what dies alone is given up, and the sweep goes on with what neither is done nor failed.
    """
    while True:
        try:
            sweep()
            return
        except Exception as error:
            # By name: joblib's, and need not be here.
            names = {kind.__name__ for kind in type(error).__mro__}
            suspects = journal.in_state("begun")
            if "BrokenProcessPool" not in names or not suspects:
                raise
        print(f"a worker process was killed; {len(suspects)} runs that were being made are made alone", file=sys.stderr)
        for job in suspects:
            program = "import sys; from anomaly_lab.cli import train; sys.argv[0] = 'anomaly-lab'; train()"
            code = subprocess.run([sys.executable, "-c", program, *job], stdout=subprocess.DEVNULL).returncode
            journal.note("done" if code == DONE else "failed", job)
            if code < 0:
                print(f"failed: {' '.join(job)}: its process was killed by signal {-code}", file=sys.stderr, flush=True)


def _job(cfg: DictConfig) -> float | None:
    """One run, under Hydra: in this process, or in one of a launcher's.

    Returns the ``val_score``, which sweepers that choose their own points minimise; None if there is no result.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode

    from anomaly_lab import config

    hydra = HydraConfig.get()
    sweep, job = hydra.mode == RunMode.MULTIRUN, list(hydra.overrides.task)
    journal = _Journal(Path(os.environ[JOURNAL])) if sweep and JOURNAL in os.environ else None
    if journal is not None:
        if job in journal.in_state("failed"):
            return None  # in this very sweep, before a worker died
        journal.note("begun", job)
    out: Path | None = None
    ended = "failed"
    try:
        cfg = config.with_choices(cfg, hydra.runtime.choices)
        if not sweep:
            _refuse_grid(cfg.choices.experiment, hydra.sweeper.params, hydra.overrides.task)
        out = config.run_dir(cfg)  # finds most mistakes, before anything heavy is imported
        result = before = config.finished(cfg)
        if before is None:
            from anomaly_lab.run import run  # torch and Lightning: seconds

            _quiet()
            result = run(cfg)
        elif "WANDB_SWEEP_ID" in os.environ:  # its agent waits for a result, also of a point that is known
            from anomaly_lab.tracking import show_again

            show_again(cfg, out, before)
        ended = "done" if result is not None else "busy"
    except Exception as error:
        if isinstance(error, OSError) and error.errno in UNWRITABLE and sweep:
            raise  # the others could not write either
        line = _explained(error)
        if line is None:
            traceback.print_exc()
            line = f"{type(error).__name__}: {_flat(str(error))}"
            code = FAILED
        else:
            code = FAILED if _is_failure(error) else MISTAKE
            if isinstance(error, HydraException) and out is not None:  # a method that could not be made
                line += f"; traceback in {out / 'failure.json'}"
        if not sweep:
            sys.exit(_mistake("anomaly-lab", line, code))
        # The other runs of a sweep go on; the summary at its end finds the failure again.
        _show(f"failed: {out or ' '.join(job)}: {line}", sys.stderr)
        return None
    finally:
        if journal is not None:
            journal.note(ended, job)
    if result is None:
        _show(f"left to the process that is busy with it: {out}", sys.stderr)
        return None
    if sweep:
        _show(_result_line(result) + ("  (done before)" if before else ""), sys.stdout)
    else:
        _print_result(result, out)
    return float(result["metrics"]["val_score"])


def _show(line: str, file: IO[str]) -> None:
    """A line about one run, between the progress bars of those beside it."""
    bars = sys.modules.get("tqdm") if sys.stderr.isatty() else None  # there are none before its import
    with bars.tqdm.external_write_mode(file) if bars else nullcontext():
        if bars:
            print(end="\r", file=sys.stderr, flush=True)  # a bar that was not the first leaves the cursor at its end
        print(line, file=file, flush=True)


def _is_failure(error: Exception) -> bool:
    """Whether the command was right and the run, or the machine, failed it."""
    # By name: torch need not be here yet.
    named = type(error).__name__ in ("Diverged", "OutOfMemory")
    return named or (isinstance(error, OSError) and error.errno in UNWRITABLE)


def _refuse_grid(experiment: str | None, grid: Mapping[str, Any] | None, given: Sequence[str]) -> None:
    """Without -m an experiment's grid would shrink to one run of the defaults, without a word."""
    missing = grid and [key for key in grid if not any(word.startswith(f"{key}=") for word in given)]
    if missing:
        one = " ".join(f"{key}=..." for key in missing)
        raise ValueError(f"experiment={experiment} is a grid of runs: add -m, or ask for one of them with {one}")


def _quiet() -> None:
    """Keep Lightning's greetings and known harmless warnings off the screen; its import sets its own levels."""
    import warnings

    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*weights_only. was not set.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # on a cluster's login node


def _explained(error: Exception) -> str | None:
    """A user's mistake in one line that says what to do; None for what is no user's mistake."""
    from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    from anomaly_lab import config

    text, cause = _flat(str(error)), error.__cause__
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
        method = name.removesuffix(config.SMALL)
        if group == "model" and name != method and method in error.options:
            return f"there is no model={name}: write model={method} size=small"
        return f"there is no {group}={name}: choose among {', '.join(error.options)}"
    if isinstance(error, InstantiationException) and isinstance(cause, ValueError):
        return _flat(str(cause))  # what a data set, a split or a method says about its parameters
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value: give {error.full_key}=..."
    if isinstance(error, OverrideParseException):
        return f"{error.override} is no key=value: {text}"
    if isinstance(error, HydraException) and "--multirun" in text:
        named = text.split("'")[1]
        return f"{named} asks for several runs: add -m"
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key} cannot be set ({_flat(str(cause))}): anomaly-lab --cfg job shows the keys there are"
    mistake = isinstance(error, HydraException | OmegaConfBaseException | ValueError | OSError)
    # Lightning's own, by name: a device that is not there. Its import would cost seconds.
    return text if mistake or type(error).__name__ == "MisconfigurationException" else None


def _flat(text: str) -> str:
    """One line of many, without what Hydra and OmegaConf add for their own developers."""
    noise = ("See https://", "Error parsing override", "full_key:", "object_type=", "reference_type=")
    return " ".join(line.strip() for line in text.splitlines() if line and not line.strip().startswith(noise))


def _mistake(program: str, line: str, code: int = MISTAKE) -> int:
    print(f"{program}: error: {line}", file=sys.stderr)
    return code


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _result_line(result: Mapping[str, Any]) -> str:
    """One finished run of a sweep."""
    identity = result["identity"]
    seconds = result["seconds"]["fit"] + result["seconds"]["score"]
    changed = "".join(f"  {key.rpartition('.')[2]}={value}" for key, value in identity["changed"].items())
    return (
        f"{identity['model']}  {identity['dataset']}  {identity['split']}  {result['role']} {result['class_name']}  "
        f"seed {identity['seed']}  AUROC {_number(result['metrics']['auroc'])}  {seconds:.0f} s{changed}"
    )


def _print_result(result: Mapping[str, Any], out: Path) -> None:
    identity, measured = result["identity"], {k: _number(v) for k, v in result["metrics"].items()}
    rows = [
        ("model", identity["model"]),
        ("data", f"{identity['dataset']}, split {identity['split']}, {result['role']} class {result['class_name']}"),
        ("AUROC", f"{measured['auroc']}  (95 % interval {measured['auroc_low']} to {measured['auroc_high']})"),
        ("average precision", measured["average_precision"]),
        ("FPR at 95 % TPR", measured["fpr95"]),
        ("balanced accuracy", measured["balanced_accuracy"]),
    ]
    if result["metrics"]["balanced_accuracy"] is None:
        held_out = result["partition"]["val"]
        rows[-1] = (
            "balanced accuracy",
            f"n/a  ({held_out} held-out normals are too few for a threshold: 20 are needed)",
        )
    if result["metrics"]["oracle_auroc"] is not None:
        rows.append(("oracle AUROC", f"{measured['oracle_auroc']}  (best epoch on the test labels: not a result)"))
    pictures = sorted(path.name for path in (out / "figures").glob("*.png"))
    rows += [
        ("training", f"{result['epochs']} epochs, {result['seconds']['fit']:.0f} s on {result['device']}"),
        ("result", str(out / "result.json")),
        ("figures", f"{out / 'figures'}: {', '.join(pictures)}"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows), flush=True)


class _Run(NamedTuple):
    """One job of a grid, and how far it is."""

    name: str  # its folder; where it is impossible, what tells it from the others
    state: str  # one of results.STATES, or "impossible"
    detail: str
    cfg: DictConfig | None = None  # None where it is impossible
    out: Path | None = None


def _grid(jobs: Sequence[Sequence[str]]) -> list[_Run]:
    from anomaly_lab import config, results

    common = set[str]().union(*jobs[:1]).intersection(*jobs) if len(jobs) > 1 else set()
    runs = []
    for job, cfg in zip(jobs, config.compose_all(jobs), strict=True):
        try:
            out = config.run_dir(cfg)
            [status] = results.status(cfg.runs, [({}, out)])
            unwatched = status.state == "done" and config.finished(cfg) is None
        except Exception as error:  # a class that is none of the data set's, missing data, an edited yaml, ...
            line = _explained(error)
            if line is None:
                raise
            runs.append(_Run(" ".join(word for word in job if word not in common), "impossible", line))
            continue
        if unwatched:
            runs.append(_Run(str(out), "missing", "its test AUROC was not watched", cfg, out))
        else:
            runs.append(_Run(str(out), status.state, status.detail, cfg, out))
    return runs


def _summary(jobs: Sequence[Sequence[str]], *, searched: bool) -> int:
    """How a sweep ended: why runs failed, how many of each state there are, and what a search found.

    What is with Slurm has not failed.
    """
    from anomaly_lab import config

    runs = _grid(jobs)
    if searched:
        runs = list({run.name: run for run in runs}.values())  # a search may come back to a point
        found = [(result, run) for run in runs if run.cfg is not None and (result := config.finished(run.cfg))]
        if found:
            best, run = min(found, key=lambda pair: pair[0]["metrics"]["val_score"])
            changed = "  ".join(f"{key}={value}" for key, value in best["identity"]["changed"].items())
            print(f"lowest val_score: {best['metrics']['val_score']:.6g}  {run.name}  {changed}".rstrip())
    states = ["failed" if run.state == "impossible" else run.state for run in runs]
    for run, state in zip(runs, states, strict=True):
        if state != "done":
            print(f"{state:<12}{run.name}  {run.detail}")
    print(f"{_runs(runs)}: " + ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))
    left = [run for run, state in zip(runs, states, strict=True) if state != "done"]
    if not left:
        return DONE
    if all(run.detail.startswith("Slurm job") for run in left):
        print(f"the jobs go on by themselves: anomaly-lab-report {left[0].cfg.runs} --status")  # type: ignore[union-attr]
        return DONE
    print("the same command tries again what is not done")
    return FAILED


def _dry_run(overrides: Sequence[str]) -> int:
    from statistics import median

    from anomaly_lab import config

    runs = _grid(config.jobs(overrides))
    seconds: dict[Any, list[float]] = {}
    for run in runs:
        if run.state == "done" and run.out is not None:
            spent = json.loads((run.out / "result.json").read_text())["seconds"]
            seconds.setdefault(_kind(run.cfg), []).append(spent["fit"] + spent["score"])
    for run in runs:
        if run.state != "done":
            print(f"{run.state:<12}{run.name}  {run.detail}".rstrip())
    left = [run for run in runs if run.cfg is not None and run.state != "done"]
    known = [median(seconds[_kind(run.cfg)]) for run in left if _kind(run.cfg) in seconds]
    impossible = sum(run.cfg is None for run in runs)
    line = f"{_runs(runs)}: {len(runs) - len(left) - impossible} done, {len(left)} to do"
    if impossible:
        line += f", {impossible} impossible"
    if known:
        line += f"; about {_duration(sum(known))} one after another"
        line += "" if len(known) == len(left) else f" for {len(known)} of them"
    if len(known) < len(left):
        line += f"; no finished run tells how long {len(left) - len(known)} of them take"
    print(line)
    return MISTAKE if impossible else DONE


def _runs(runs: Sequence[_Run]) -> str:
    return f"{len(runs)} run{'s' * (len(runs) != 1)}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _kind(cfg: Any) -> tuple[Any, ...]:
    """Runs of one kind take about the same time: all but class and seed are equal."""
    from anomaly_lab import config

    return (config.model_name(cfg), cfg.dataset.name, cfg.choices.split, str(config.changed(cfg)))


def data(argv: Sequence[str] | None = None) -> int:
    """``anomaly-lab-data download|list|check``: the data sets' caches, where there is a network to fetch them."""
    parser = argparse.ArgumentParser(
        prog="anomaly-lab-data",
        description="Fetch, list and verify data sets. They lie in data_dir: ANOMALY_LAB_DATA, else ./data.",
        epilog="example: anomaly-lab-data download mnist cifar10; "
        "anomaly-lab-data check image_folder dataset.name=bottles dataset.path=photos/bottles",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("list", "say which data sets are ready"),
        ("download", "fetch and decode data sets, each once"),
        ("check", "verify the checksums of decoded data sets"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        if name != "list":
            command.add_argument("names", nargs="+", metavar="NAME", help="as in anomaly-lab-data list")
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as data_dir=DIR")
    arguments = parser.parse_args(argv)
    # argparse gives everything to the first list that takes it.
    words = [*getattr(arguments, "names", ()), *arguments.overrides]
    names = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]

    from anomaly_lab import config

    if arguments.command == "list":
        if names:
            return _mistake(parser.prog, f"list takes no names, got {' '.join(names)}")
        extra = os.environ.get(config.EXTRA_CONFIGS)
        folders = [config.CONFIG_DIR, Path(extra)] if extra else [config.CONFIG_DIR]
        names = sorted({path.stem for folder in folders for path in (folder / "dataset").glob("*.yaml")})
    elif not names:
        return _mistake(parser.prog, "name a data set, see anomaly-lab-data list")
    code = DONE
    for name in names:
        try:
            print(_data_line(arguments.command, name, overrides), flush=True)
        except Exception as error:
            line = _explained(error)
            if line is None:
                raise
            code = _mistake(parser.prog, line if name in line else f"{name}: {line}")
    return code


def _data_line(command: str, name: str, overrides: Sequence[str]) -> str:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from anomaly_lab import config

    given = config.compose([f"dataset={name}", *overrides]).dataset
    if missing := sorted(OmegaConf.missing_keys(given)):
        needed = " and ".join(f"{key}=..." for key in missing)
        if command == "list":
            return f"{name:<16}yours: give {needed}"
        raise ValueError(f"{name} is your own data set: give {needed}")
    dataset = instantiate(given)
    if command == "check":
        return str(dataset.check())
    if command == "download":
        return f"{name}: ready in {dataset.download()}"
    state = "ready" if dataset.cache.exists() else "not there"
    advice = "" if dataset.cache.exists() else f"  anomaly-lab-data download {name}"
    return f"{name:<16}{state:<11}{dataset.cache}{advice}"


def report(argv: Sequence[str] | None = None) -> int:
    """``anomaly-lab-report``: tables, figures and tests of difference from finished runs."""
    from anomaly_lab import results

    return results.main(argv)


def score(argv: Sequence[str] | None = None) -> int:
    """``anomaly-lab-score``: scores and decisions of new images by a finished run."""
    from anomaly_lab import predict

    return predict.main(argv)


def features(argv: Sequence[str] | None = None) -> int:
    """``anomaly-lab-features``: channel statistics of pretrained features over a folder of images."""
    parser = argparse.ArgumentParser(
        prog="anomaly-lab-features",
        description="Mean and standard deviation of each channel of a model's pretrained features over the images in a "
        "folder and all folders below (ImageNet, as PIAD has it), in one file with where they come from. A run uses it "
        "with model.detector.features.statistics.path=FILE and .sha256=CHECKSUM.",
        epilog="example: anomaly-lab-features imagenet/train --model piad --limit 50000 --out vgg19.npz",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="images, in it or in folders below")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as model.detector.features.path=FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .npz to write")
    parser.add_argument("--model", default="piad", help="whose features (default: piad)")
    parser.add_argument(
        "--size", type=int, metavar="N", help="pixels images are stretched to (default: the model's input)"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="only so many images, spread evenly over the sorted list"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    arguments = parser.parse_intermixed_args(argv)  # KEY=VALUE may also come last
    try:
        print(_features(arguments))
    except Exception as error:
        line = _explained(error)
        if line is None:
            raise
        return _mistake(parser.prog, line)
    return DONE


def _features(asked: argparse.Namespace) -> str:
    import hashlib
    from datetime import UTC, datetime
    from importlib.metadata import version

    import numpy as np
    import torch
    from hydra.utils import instantiate
    from tqdm import tqdm

    from anomaly_lab import config, networks, predict
    from anomaly_lab.datasets import open_image
    from anomaly_lab.files import write_whole

    cfg = config.compose([f"model={asked.model}", *asked.overrides])
    described = cfg.model.detector.get("features")
    if described is None:
        raise ValueError(f"model={asked.model} has no pretrained features: name one that has, such as piad")
    if described.weights == "random":
        raise ValueError("random features are drawn anew by every run, which computes their statistics itself")
    size = cfg.model.input.size if asked.size is None else asked.size
    if size < 1 or (asked.limit is not None and asked.limit < 1):
        raise ValueError("--size and --limit are whole numbers from 1")
    if not asked.folder.is_dir():
        raise ValueError(f"{asked.folder} is not a folder: give one with images, in it or in folders below")
    files = predict.image_files([asked.folder])
    if asked.limit is not None and asked.limit < len(files):
        files = [files[i * len(files) // asked.limit] for i in range(asked.limit)]
    network = instantiate(described, _convert_="all")().to(asked.device)
    if size < network.smallest:
        raise ValueError(f"--size {size}: {network.architecture} needs images of {network.smallest} pixels or more")
    checksum = hashlib.sha256()

    def batches() -> Iterator[torch.Tensor]:
        for start in tqdm(range(0, len(files), 64), desc="images, in batches of 64", disable=not sys.stderr.isatty()):
            some = files[start : start + 64]
            images = np.stack([open_image(file, str(file), 3, size) for file in some])
            for file, image in zip(some, images, strict=True):
                checksum.update(file.relative_to(asked.folder).as_posix().encode() + b"\0" + image.tobytes())
            yield network(torch.from_numpy(images).to(asked.device) / 127.5 - 1)  # [-1, 1]

    with torch.no_grad():
        mean, std = networks.channel_statistics(batches())
    origin = {
        "folder": asked.folder.resolve().name,
        "images": len(files),
        "images_sha256": checksum.hexdigest(),  # of names and pixels
        "size": size,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("anomaly-lab", "torch", "torchvision")},
    }
    write_whole(asked.out, lambda file: networks.save_statistics(file, network, mean, std, **origin))
    digest = hashlib.sha256(asked.out.read_bytes()).hexdigest()
    option = "model.detector.features.statistics"
    return f"{len(files)} images, {len(mean)} channels: {option}.path={asked.out} {option}.sha256={digest}"
