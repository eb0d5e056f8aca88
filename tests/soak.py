"""Kills sweeps, continues them by the same command, and holds the results to those of a sweep that nothing disturbed.

    python tests/soak.py --kills 6 --commands 1 --classes 3   # what tests/test_kill.py does
    make soak                                                 # more, and docs/soak.md

The processes are real and so is SIGKILL. Most are forked from this one, which has imported everything once and has no
threads; they call the console command's function. Those of ``--commands`` are the command itself, started anew.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # read when torch and numpy are loaded: no thread may live when this process forks

import matplotlib.pyplot  # noqa: E402, F401
import numpy as np  # noqa: E402
import sklearn.datasets  # noqa: E402, F401
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import anomaly_lab.run  # noqa: E402, F401
from anomaly_lab import cli, results  # noqa: E402

MODELS = ("shared_ae", "autoencoder")
TINY = (
    "model.budget.epochs=3 model.budget.epoch_steps=2 model.detector.width=4 trainer.progress=false trainer.threads=1"
)
WORDS = ["-m", f"model={','.join(MODELS)}", "seed=0", *TINY.split(), "trainer.accelerator=cpu"]
WRITES = 13  # whole files of one run: checkpoints, metrics.csv, scores, figures, result

COMMAND = [sys.executable, "-c", "import sys; from anomaly_lab.cli import train; sys.argv[0] = 'anomaly-lab'; train()"]
AIMED = ("half written", "before the rename", "after the rename")


class Place(NamedTuple):
    """Where one sweep happens: ``runs`` and the data lie in ``home``; ``tmp`` may be another file system."""

    home: Path
    tmp: Path
    classes: tuple[int, ...]  # the grid is a run of each of `MODELS` on each

    @property
    def runs(self) -> Path:
        return self.home / "runs"

    @property
    def words(self) -> list[str]:
        return [*WORDS, f"normal_class={','.join(map(str, self.classes))}", f"data_dir={self.home / 'data'}"]

    @property
    def size(self) -> int:
        return len(MODELS) * len(self.classes)


# Processes --------------------------------------------------------------------------------------------------------


def fork(place: Place, aim: Callable[[], None] | None = None) -> int:
    """The sweep in a child of this process; its pid."""
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads: forking now could leave a lock taken for ever"
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        log = os.open(place.home / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(place.home)
        os.environ["TMPDIR"] = str(place.tmp)
        tempfile.tempdir = None
        sys.argv = ["anomaly-lab", *place.words]
        if aim is not None:
            aim()
        try:
            cli.train()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def command(place: Place, *words: str) -> subprocess.Popen[bytes]:
    """The sweep as a user starts it."""
    environment = os.environ | {"TMPDIR": str(place.tmp)}
    log = open(place.home / "log.txt", "ab")  # noqa: SIM115 (the child's)
    return subprocess.Popen(
        [*COMMAND, *place.words, *words],
        cwd=place.home,
        env=environment,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def code_of(status: int) -> int:
    """The exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(status)


def ended(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return code_of(status) if found else None


def aimed_at_write(number: int, moment: str) -> Callable[[], None]:
    """Lets the process kill itself at its ``number``-th whole file, at exactly one of the `AIMED` moments."""

    def aim() -> None:
        real, count = os.replace, itertools.count(1)

        def replace(part: Any, path: Any) -> None:
            if not str(part).endswith(".part") or next(count) != number:
                real(part, path)
                return
            if moment == "half written":
                os.truncate(part, os.path.getsize(part) // 2)
            elif moment == "after the rename":
                real(part, path)
            os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace

    return aim


def parts(place: Place) -> list[Path]:
    return [*place.home.rglob(".*.part")]


def attempt(place: Place, kind: str, seconds: float, chance: random.Random) -> int:
    """Start the sweep and disturb it once as ``kind`` says; the exit code or minus the signal it died of."""
    if kind in AIMED:
        return code_of(os.waitpid(fork(place, aimed_at_write(chance.randint(1, 2 * WRITES), kind)), 0)[1])
    pid = fork(place)
    at, wanted, seen = time.monotonic() + chance.uniform(0, seconds), chance.randint(1, WRITES), set[Path]()
    while (code := ended(pid)) is None:
        if kind == "a file being written":  # by somebody else's eyes: whatever state it is in
            seen |= set(parts(place))
            due = len(seen) >= wanted
        else:
            due = time.monotonic() >= at
            time.sleep(0.001)
        if due:
            os.kill(pid, signal.SIGINT if kind == "Ctrl-C" else signal.SIGKILL)
            return code_of(os.waitpid(pid, 0)[1])
    return code


WORKER = "a worker of the parallel launcher"


def disturbed_command(place: Place, kind: str, seconds: float, chance: random.Random) -> tuple[int, bool]:
    """As `attempt`, by the command itself: its only process, its main process, or a worker is killed.

    The second: whether one was there to be killed, for at the moment drawn they may have ended.
    """
    parallel = ["hydra/launcher=parallel", "hydra.launcher.n_jobs=2"] if "parallel" in kind else []
    with command(place, *parallel) as process:
        while process.poll() is None and not list(place.runs.rglob(".lock")):
            time.sleep(0.01)  # imports
        time.sleep(chance.uniform(0, seconds))
        victims = [process.pid] if process.poll() is None else []
        if victims and kind == WORKER:
            victims = workers(process.pid)
        if victims:
            os.kill(chance.choice(victims), signal.SIGKILL)
        return process.wait(timeout=600), bool(victims)


def workers(pid: int) -> list[int]:
    """The processes that a parallel launcher has started to make runs."""
    children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    found = [child for child in children if b"loky" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return [child for child in found if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()]


# What is left -----------------------------------------------------------------------------------------------------


def torn(place: Place) -> list[str]:
    """The files with a final name that are not whole, read as their readers read them."""
    found = []
    for path in place.home.rglob("*"):
        if not path.is_file() or path.name.startswith("."):
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".npz":
                with np.load(path) as file:
                    for name in file.files:
                        _ = file[name]
            elif path.suffix == ".ckpt":
                with zipfile.ZipFile(path) as archive:
                    assert archive.testzip() is None
                torch.load(path, weights_only=True)
            elif path.suffix == ".png":
                with Image.open(path) as image:
                    image.load()
            elif path.name == "metrics.csv":
                rows = [*csv.reader(io.StringIO(path.read_text()))]
                assert len({len(row) for row in rows}) == 1 and path.read_text().endswith("\n")
        except Exception as error:
            found.append(f"{path.relative_to(place.home)}: {type(error).__name__}: {error}")
    return found


def made(place: Place) -> dict[str, Any]:
    """Everything measured by every run of a finished sweep, to the bit, and its metric columns as a report has them."""
    runs: dict[str, Any] = {}
    for path in sorted(place.runs.rglob("result.json")):
        result = json.loads(path.read_text())
        kept = ("identity", "metrics", "partition", "settings", "epochs", "steps", "image_shape")
        run = {name: result[name] for name in kept}
        run["history"] = [{k: v for k, v in row.items() if k != "seconds"} for row in result["history"]]
        with np.load(path.parent / "scores.npz") as scores:
            run["scores"] = {name: scores[name].tobytes().hex() for name in scores.files}
        with open(path.parent / "metrics.csv", newline="") as file:
            run["rows"] = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
        runs[str(path.parent.relative_to(place.runs))] = run
    frame = results.read(place.runs)
    of_machine = {"images_per_second", "seconds", "finished", "peak_memory_mb", "git_sha", "dirty", "device"}
    measured = [name for name in frame if name not in of_machine]
    return {"runs": runs, "report": json.loads(frame[measured].to_json(orient="records", double_precision=15))}


def folders(place: Place) -> list[Path]:
    return [path.parent for path in place.runs.rglob(".lock")]


# The soak ---------------------------------------------------------------------------------------------------------


def soak(
    kills: int,
    commands: Sequence[str],
    classes: Sequence[int],
    seed: int,
    keep: Path | None,
    note: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Disturb sweeps until there were so many ``kills`` and an interrupt; the figures, noted after every sweep too."""
    chance, started = random.Random(seed), time.monotonic()
    systems = [Path(tempfile.mkdtemp(prefix="soak-", dir=keep)), Path(tempfile.mkdtemp(prefix="soak-", dir="/dev/shm"))]
    undisturbed = Place(systems[0] / "undisturbed", systems[1], tuple(classes))
    undisturbed.home.mkdir()
    begun = time.monotonic()
    assert code_of(os.waitpid(fork(undisturbed), 0)[1]) == 0, (undisturbed.home / "log.txt").read_text()
    seconds = time.monotonic() - begun
    expected = made(undisturbed)
    assert len(expected["runs"]) == undisturbed.size
    code_at = json.loads(next(undisturbed.runs.rglob("result.json")).read_text())["git"]
    figures: dict[str, Any] = {"kills": Counter(), "sweeps": 0, "continued": 0, "interrupts": 0, "died in a write": 0}
    figures |= {"files checked whole": 0, "faults": [], "git": code_at}
    figures["seconds of the undisturbed sweep"] = round(seconds, 1)
    kinds = itertools.cycle(["a random moment", *AIMED, "a random moment", "a file being written", "Ctrl-C"])
    left_commands = list(commands)

    def enough() -> bool:
        """A Ctrl-C at a random moment may find its sweep already over, so it is waited for until one has not."""
        return figures["kills"].total() >= kills and not left_commands and figures["interrupts"] > 0

    while not enough():
        home, tmp = systems if figures["sweeps"] % 2 == 0 else reversed(systems)
        place = Place(home / f"sweep{figures['sweeps']}", tmp, undisturbed.classes)
        place.home.mkdir()
        for _ in range(5):
            if enough():
                break
            commanded, killed = bool(left_commands), True
            if commanded:
                kind = left_commands.pop()
                code, killed = disturbed_command(place, kind, seconds, chance)
            else:
                kind = next(kinds)
                code = attempt(place, kind, seconds, chance)
            where = f"sweep {figures['sweeps']}, {kind}"
            survived = killed and kind == WORKER  # the sweep itself goes on
            if kind == "Ctrl-C":
                figures["interrupts"] += code == cli.INTERRUPTED
                if code not in (0, cli.INTERRUPTED):
                    figures["faults"].append(f"{where}: ended with {code}")
            elif code == -signal.SIGKILL or (survived and code == 0):
                figures["kills"][kind] += 1
                figures["died in a write"] += bool(parts(place))
            elif code != 0:
                figures["faults"].append(f"{where}: ended with {code}")
            elif commanded:  # all that could be killed had ended before the moment that was drawn: again
                left_commands.append(kind)
            figures["files checked whole"] += sum(path.is_file() for path in place.home.rglob("*"))
            figures["faults"] += [f"{where}: {line}" for line in torn(place)]
            if code == 0:
                break
        for _ in range(30):  # workers that outlive their main process still have their runs
            figures["continued"] += 1
            code = code_of(os.waitpid(fork(place), 0)[1])
            if code == 0:
                break
            time.sleep(1)
        where = f"sweep {figures['sweeps']}"
        if code != 0:
            figures["faults"].append(f"{where}: the same command ended with {code}")
        figures["faults"] += [f"{where}: {line}" for line in torn(place)]
        figures["faults"] += [f"{where}: {path} is left" for path in [*parts(place), *place.runs.glob(".sweep-*")]]
        figures["faults"] += compared(made(place), expected, folders(place), where)
        figures["sweeps"] += 1
        shutil.rmtree(place.home) if not figures["faults"] else print(f"kept: {place.home}", file=sys.stderr)
        figures["seconds"] = round(time.monotonic() - started, 1)
        figures["runs"] = figures["sweeps"] * undisturbed.size
        note(figures)
    if not figures["faults"]:
        for folder in systems:
            shutil.rmtree(folder)
    return figures


def compared(found: dict[str, Any], expected: dict[str, Any], folders: Sequence[Path], where: str) -> list[str]:
    """What was lost, made twice, or came out otherwise than in the undisturbed sweep."""
    faults = [f"{where}: {name} is lost" for name in expected["runs"].keys() - found["runs"].keys()]
    faults += [f"{where}: {name} is too many" for name in found["runs"].keys() - expected["runs"].keys()]
    size = len(expected["runs"])
    if len(folders) != size or len(found["report"]) != size:
        faults.append(f"{where}: {len(folders)} folders and {len(found['report'])} rows of {size} runs")
    for name, run in expected["runs"].items():
        for what in run:
            if name in found["runs"] and found["runs"][name][what] != run[what]:
                faults.append(f"{where}: {name} has other {what}")
    if found["report"] != expected["report"]:
        faults.append(f"{where}: the report's metric columns differ")
    return faults


PAGE = """# Soak: what killing sweeps did

Written by `make soak` (`tests/soak.py`); the figures are in [soak.json](soak.json). A sweep of {runs_each} short runs
is killed with SIGKILL up to five times, continued by the same command, and then compared with a sweep that nothing
disturbed: scores, metrics, histories and the report's metric columns, bit by bit. Run folder and `TMPDIR` lie on
different file systems (disk and memory, by turns). After every kill each file is read as its reader does it.

| | |
| --- | ---: |
{rows}
"""


def page(figures: dict[str, Any]) -> str:
    rows = [("kills", sum(figures["kills"].values()))]
    rows += [(f"… {kind}", count) for kind, count in sorted(figures["kills"].items())]
    rows += [
        ("kills that left a half-written file behind", figures["died in a write"]),
        ("Ctrl-C, each ended with 130", figures["interrupts"]),
        ("sweeps", figures["sweeps"]),
        ("runs, each compared", figures["runs"]),
        ("files read after the kills", figures["files checked whole"]),
    ]
    for word, what in FAULTS.items():
        rows.append((what, sum(word in fault for fault in figures["faults"])))
    rows.append(("other faults", sum(not any(word in fault for word in FAULTS) for fault in figures["faults"])))
    dirty = " with uncommitted changes" if figures["git"]["dirty"] else ""
    rows += [("seconds, on a machine that did other things too", figures["seconds"])]
    rows += [("seconds of one undisturbed sweep", figures["seconds of the undisturbed sweep"])]
    rows += [("code", f"{(figures['git']['sha'] or 'unknown')[:9]}{dirty}")]
    shown = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return PAGE.format(rows=shown, runs_each=figures["runs"] // figures["sweeps"])


FAULTS = {
    "is lost": "runs lost",
    "too many": "runs made twice",
    "Error": "files that were not whole",
    "other": "runs with other scores, metrics or history",
    "is left": "half-written files left when a sweep was done",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--commands", type=int, default=0, help="how many of them through the command, started anew")
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 8], help="normal ones: two runs of each")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="on a disk (default: the system's for temporary files)")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--page", type=Path, help="Markdown")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts this in the background ignores it
    kinds = ["the command", WORKER, "the main process of the parallel launcher"]
    commands = [*itertools.islice(itertools.cycle(kinds), arguments.commands)]

    def note(figures: dict[str, Any]) -> None:
        if arguments.out:
            arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
        if arguments.page:
            arguments.page.write_text(page(figures))

    figures = soak(arguments.kills, commands[::-1], arguments.classes, arguments.seed, arguments.folder, note)
    print(json.dumps(figures, indent=1))
    sys.exit(bool(figures["faults"]))


if __name__ == "__main__":
    main()
