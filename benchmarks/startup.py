"""From the command to its answer, and to the first training step.

Counted: wall-clock and CPU seconds of fresh processes, the interpreter's own start included; the median of a few. Not
counted: the very first start on a machine, which reads the libraries from the disk and compiles Python's files (one
process is started before, unmeasured).

The phases of a run are those of the real command. Nothing in the package takes times: the child process puts a finder
in front of Python's own, which takes the time when torch, Lightning and the package's modules begin and end to be
imported, and wraps the functions that load the images, make the data and the detector, and train one step.

    python -m benchmarks.startup [--quick] [--device cpu|cuda]

`ANOMALY_LAB_BARE_PYTHON` may name the interpreter of an environment without the package's extras; the commands are then
measured there as well.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

BARE_PYTHON = "ANOMALY_LAB_BARE_PYTHON"
STARTED = "ANOMALY_LAB_BENCHMARK_STARTED"  # for the child: time.monotonic() of its parent just before

TARGET = {"bare": 2.0, "extras": 4.0}  # seconds, for --help and for one composed configuration
DATA_TARGET = 1.0  # seconds until a cached data set is ready

COMMANDS = {
    "anomaly-lab --help": ("train", ["--help"]),
    "anomaly-lab --cfg job": ("train", ["--cfg", "job"]),
    "anomaly-lab -m experiment=jia2022_mnist_small --dry-run": (
        "train",
        ["-m", "experiment=jia2022_mnist_small", "--dry-run"],
    ),
    "anomaly-lab-report --help": ("report", ["--help"]),
}
"""What is measured, the function behind the command and its words. The dry run looks at 90 runs of MNIST."""

RUNS = {
    "digits": ["model=shared_ae", "size=full", "dataset=digits", "split=pooled"],
    "mnist": ["model=shared_ae", "size=full", "dataset=mnist", "split=official"],
    "cifar10": ["model=shared_ae", "size=full", "dataset=cifar10", "split=official"],
}

PHASES = (
    "interpreter, Hydra, configuration",
    "data set ready",
    "identity and folder of the run",
    "import torch",
    "import Lightning",
    "import the rest",
    "partition",
    "detector built",
    "trainer built, fit set up",
    "first step done",
)


def measure(device: str, quick: bool) -> list[dict[str, Any]]:
    """A row for each command, and one for each phase of a run up to its first step.

    Keys: what, phase ("" for a whole command), environment, seconds and cpu_seconds (medians), n, and target (seconds)
    where there is one. ``device`` is cpu or cuda; ``quick`` measures each once instead of five times.
    """
    n = 1 if quick else 5
    environments = {"extras": sys.executable}
    if bare := os.environ.get(BARE_PYTHON):
        environments = {"bare": bare} | environments
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = _caches(Path(folder))
        env = os.environ | {"ANOMALY_LAB_DATA": str(data)}
        for name, python in environments.items():
            for what, (function, words) in COMMANDS.items():
                if "mnist" in what and not (data / "mnist.npz").exists():
                    continue
                command = [python, "-c", _program(function), *words]
                seconds, cpu = _times([_run(command, env, folder) for _ in range(n + 1)][1:])
                row = {"what": what, "phase": "", "environment": _described(name), "seconds": seconds}
                row |= {"cpu_seconds": cpu, "n": n}
                rows.append(row if "--dry-run" in words else row | {"target": TARGET[name]})
        for dataset, words in RUNS.items():
            if not (data / f"{dataset}.npz").exists():
                continue
            command = [sys.executable, "-m", "benchmarks.startup", "--child", *words, f"trainer.accelerator={device}"]
            found = [_child([*command, f"runs={folder}/runs-{dataset}-{i}"], env) for i in range(n)]
            for phase in (*PHASES, "from the command to the first step"):
                seconds, cpu = _times([said[phase] for said in found])
                row = {"what": f"first step, shared_ae, {dataset}", "phase": phase, "environment": _described("extras")}
                row |= {"seconds": seconds, "cpu_seconds": cpu, "n": n}
                rows.append(row | ({"target": DATA_TARGET} if phase == "data set ready" else {}))
    return rows


def _program(function: str) -> str:
    """What a console script of that name does."""
    return f"import sys; from anomaly_lab.cli import {function}; sys.argv[0] = 'anomaly-lab'; sys.exit({function}())"


def _described(environment: str) -> str:
    if environment == "bare":
        return "no extras"
    launchers = {"hydra_joblib_launcher": "parallel", "hydra_submitit_launcher": "slurm"}
    launchers |= {"hydra_optuna_sweeper": "optuna", "wandb_workspaces": "dashboard"}
    there = [extra for package, extra in launchers.items() if _installed(package)]
    return f"extras: {', '.join(there) or 'none'}"


def _installed(package: str) -> bool:
    places = (package, f"hydra_plugins.{package}")
    return any(_found(place) for place in places)


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _caches(folder: Path) -> Path:
    """A folder with the data sets as ``anomaly-lab-data download`` leaves them, as far as they are on this machine.

    Somebody's own file of a published set is put into order at every start; what is measured here is a cache of ours.
    """
    from hydra.utils import instantiate

    from anomaly_lab import config, images

    data = folder / "data"
    data.mkdir()
    for name in RUNS:
        ready = instantiate(config.compose([f"dataset={name}"]).dataset)
        if ready.cache.exists():
            images.write_npz(data / ready.cache.name, ready.load(), type(ready).__name__)
        elif name == "digits":  # the others would have to be fetched
            instantiate(config.compose([f"dataset={name}", f"data_dir={data}"]).dataset).download()
    return data


def _run(command: Sequence[str], env: Mapping[str, str], folder: str) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a process, from its start to its end."""
    begin = time.perf_counter()
    with open(os.devnull, "wb") as nothing:
        process = subprocess.Popen(command, env=_importable(env), cwd=folder, stdout=nothing, stderr=nothing)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - begin, usage.ru_utime + usage.ru_stime


def _importable(env: Mapping[str, str]) -> dict[str, str]:
    """``env`` in which the package that this process has imported is found first, by any interpreter."""
    import anomaly_lab

    assert anomaly_lab.__file__ is not None
    checkout = str(Path(anomaly_lab.__file__).parents[1])
    return {**env, "PYTHONPATH": os.pathsep.join(filter(None, [checkout, env.get("PYTHONPATH", "")]))}


def _times(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    wall, cpu = zip(*pairs, strict=True)
    return round(statistics.median(wall), 3), round(statistics.median(cpu), 3)


def _child(command: Sequence[str], env: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    started = {STARTED: repr(time.monotonic())}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=_importable(env) | started, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, tuple[float, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


# ----------------------------------------------------------------------------------------------------
# The child: the real command, with a watch beside it


class _Watch(MetaPathFinder):
    """Notes when phases end. ``imports``: module -> (what ends when it begins, what ends when it is there)."""

    def __init__(self) -> None:
        self._last = float(os.environ[STARTED]), 0.0
        self._origin = self._last[0]
        self.phases: dict[str, tuple[float, float]] = {}
        self.imports: dict[str, tuple[str, str]] = {}
        self.then: dict[str, Callable[[ModuleType], None]] = {}

    def end(self, phase: str) -> None:
        """The phase is over now; a phase that was over before stays as it is."""
        now = time.monotonic(), time.process_time()
        if phase and phase not in self.phases:
            self.phases[phase] = now[0] - self._last[0], now[1] - self._last[1]
            self._last = now

    def around(self, owner: Any, name: str, before: str, after: str) -> None:
        """Have ``owner.name`` end the one phase when it is called, and the other when it returns."""
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.end(before)
            result = function(*args, **kwargs)
            self.end(after)
            return result

        setattr(owner, name, watched)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in self.imports and name not in self.then:
            return None
        before, after = self.imports.pop(name, ("", ""))
        then = self.then.pop(name, None)
        self.end(before)
        spec = importlib.util.find_spec(name)  # comes here again, and is let through
        assert spec is not None and spec.loader is not None
        spec.loader = _Watched(spec.loader, self, after, then)
        return spec

    def report(self) -> None:
        missing = set(PHASES) - self.phases.keys()
        assert not missing, missing
        total = time.monotonic() - self._origin, time.process_time()
        print(json.dumps(self.phases | {"from the command to the first step": total}), flush=True)
        os._exit(0)  # nobody wants the rest of the run


class _Watched(Loader):
    def __init__(self, loader: Any, watch: _Watch, after: str, then: Callable[[ModuleType], None] | None) -> None:
        self._loader, self._watch, self._after, self._then = loader, watch, after, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._watch.end(self._after)
        if self._then is not None:
            self._then(module)


def _first_step(words: Sequence[str]) -> None:
    """``anomaly-lab WORDS`` up to the end of the first training step, then the seconds of each phase as JSON."""
    watch = _Watch()
    composed, ready, identity, torch, lightning, rest, partition, built, set_up, step = PHASES
    watch.imports = {"torch": (identity, torch), "lightning": ("", lightning), "anomaly_lab.run": ("", rest)}

    def config_is_there(config: ModuleType) -> None:
        watch.around(config, "_images", composed, ready)

    def detector_is_there(detector: ModuleType) -> None:
        watch.around(detector.Detector, "training_step", set_up, "")
        training_step = detector.Detector.training_step

        def first(*args: Any) -> None:
            training_step(*args)
            if "trainer.accelerator=cuda" in words:
                sys.modules["torch"].cuda.synchronize()
            watch.end(step)
            watch.report()

        detector.Detector.training_step = first

    def run_is_there(run: ModuleType) -> None:
        watch.around(run, "make_data", "", partition)
        watch.around(run, "make_detector", "", built)

    watch.then = {
        "anomaly_lab.config": config_is_there,
        "anomaly_lab.detector": detector_is_there,
        "anomaly_lab.run": run_is_there,
    }
    sys.meta_path.insert(0, watch)
    sys.argv = ["anomaly-lab", *words]
    [command] = [script for script in entry_points(group="console_scripts") if script.name == "anomaly-lab"]
    command.load()()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="each once instead of five times")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of the first step (default: cpu)")
    asked = parser.parse_args()
    for row in measure(asked.device, asked.quick):
        target = f"target {row['target']:g}" if "target" in row else ""
        print(f"{row['what']:<56}{row['phase']:<36}{row['seconds']:8.2f} s {row['cpu_seconds']:8.2f} s CPU  {target}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _first_step(sys.argv[2:])
    else:
        main()
