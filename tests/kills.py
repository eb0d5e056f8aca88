"""Kills the runs of methods written outside the repository, and holds their scores to those of runs nobody killed.

    python tests/kills.py FOLDER        with the methods and conf/model of tests/test_outside.py in it

Every kill is SIGKILL at a chosen moment of a process of its own, forked from this one, which has imported everything
and has one thread.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # read when torch and numpy are loaded: no thread may live when this process forks

import matplotlib.pyplot  # noqa: E402, F401
import sklearn.datasets  # noqa: E402, F401

from anomaly_lab import config  # noqa: E402
from anomaly_lab.detector import Detector  # noqa: E402
from anomaly_lab.run import run  # noqa: E402


class Aim(NamedTuple):
    """A process dies at the ``number``-th call of a method of `Detector`."""

    method: str
    number: int


QUICK = [
    "trainer.progress=false",
    "trainer.figures=false",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "logger=none",
]
TWO_STEPS = ["model.detector.width=4", "model.budget.epoch_steps=2", "model.batch_size=64"]  # an epoch, on digits
METHODS = {
    "my_knn": ([], [Aim("_finish", 1)]),
    # Epochs of two steps: in the second epoch of either stage, the second one while a resumed process is at work.
    "my_svdd": (
        ["model.budget.stages={pretrain: 2, train: 2}", "model.optimizer.lr=0.001"]
        + [f"model.scheduler.{player}.milestones=[1]" for player in ("autoencoder", "encoder")],
        [Aim("play", 4), Aim("play", 6)],
    ),
    "my_anogan": (["model.budget.epochs=2", "model.detector.steps=3"], [Aim("play", 4), Aim("test_step", 2)]),
}
"""Of each method what makes it short, and where its processes die, one after another."""


def process(words: list[str], aim: Aim | None) -> int:
    """One process of a run; minus the signal that ended it, or its exit code."""
    assert len(os.listdir("/proc/self/task")) == 1, "forking with threads could leave a lock held by none"
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        if aim is not None:
            die_at(aim)
        run(config.compose(words))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def die_at(aim: Aim) -> None:
    real, calls = getattr(Detector, aim.method), 0

    def dying(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == aim.number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    setattr(Detector, aim.method, dying)


def main(folder: Path) -> int:
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ[config.EXTRA_CONFIGS] = "conf"
    wrong = 0
    for model, (short, aims) in METHODS.items():
        words = [f"model={model}", *short, *(TWO_STEPS if short else []), *QUICK]
        ends = {}
        for name, deaths in (("straight", [None]), ("killed", [*aims, None])):
            codes = [process([*words, f"runs={name}"], aim) for aim in deaths]
            assert codes == [-signal.SIGKILL] * (len(codes) - 1) + [0], f"{model} {name}: {codes}"
            [scores] = Path(name).glob(f"{model}*/**/scores.npz")
            ends[name] = scores.read_bytes()
        same = ends["straight"] == ends["killed"]
        wrong += not same
        print(f"{model:<12}{len(aims)} kills  {'the same bytes' if same else 'OTHER SCORES'}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
