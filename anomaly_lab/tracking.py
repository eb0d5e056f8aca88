"""Trackers mirror a run while it runs; the run folder's files are the truth.

A tracker gets one row an epoch, the rows of the checkpoint's history. A resumed run replays them (`Tracker.start`), so
it shows what an uninterrupted one would have shown.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from anomaly_lab.config import Job
from anomaly_lab.errors import shortened
from anomaly_lab.files import write_text

log = logging.getLogger(__name__)


class Tracker(Logger):
    """Shows nothing (``logger=none``); the base of all trackers.

    Called in this order: `start`, `log_metrics` after each epoch, `publish` when the run's files are written, and
    `close` after a success or a failure.
    """

    @property
    def name(self) -> str | None:
        return None

    @property
    def version(self) -> int | str | None:
        return None

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the constructor got the whole configuration."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One row an epoch, from the detector.

        Values of ``self.log`` are left out: their step counts every optimiser's steps, and a resumed run could not
        replay them, for they are not in the history. ``Detector.record`` reaches trackers.
        """
        if "epoch" not in metrics:  # Lightning adds it to its own
            assert step is not None
            self.row(step, metrics)

    def start(self, history: Sequence[Mapping[str, float]]) -> None:
        """Begin, with the rows of the epochs that are done already: none, or those of the checkpoint."""
        for row in history:
            self.row(int(row["epoch"]), {name: value for name, value in row.items() if name != "epoch"})

    def row(self, epoch: int, values: Mapping[str, float]) -> None:
        """Show what was measured in ``epoch``, counted from 1."""

    def watched(self, history: Sequence[Mapping[str, float]]) -> None:
        """Show the test AUROCs of the epochs that were watched, once the fit is over."""
        for row in history:
            if oracles := _oracles(row):
                self.row(int(row["epoch"]), oracles)

    def publish(self, result: Mapping[str, Any], figures: Path, scores: Mapping[str, np.ndarray]) -> None:
        """Show the finished run: the content of result.json, the folder of its figures, the arrays of scores.npz."""

    def close(self, exit_code: int) -> None:
        """Let go of everything; 0 after a finished run."""


def _oracles(row: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.startswith("oracle_")}


@contextmanager
def opened(cfg: DictConfig, out: Path, identity: Mapping[str, Any]) -> Iterator[Tracker]:
    """The tracker ``cfg.logger`` describes, for the run in ``out``; closed at the end of the block."""
    resolved = OmegaConf.to_container(cfg, resolve=True)
    tracker = instantiate(cfg.logger)(out, identity, resolved) if cfg.get("logger") else Tracker()
    try:
        yield tracker
    except BaseException:
        tracker.close(1)
        raise
    tracker.close(0)


def show_again(job: Job, result: Mapping[str, Any]) -> None:
    """Show a finished run as if it had just been made, for an agent that reads the tracker only."""
    with opened(job.cfg, job.out, result["identity"]) as tracker, np.load(job.out / "scores.npz") as scores:
        tracker.start(result["history"])
        tracker.publish(result, job.out / "figures", dict(scores))


class Csv(Tracker):
    """``metrics.csv`` in the run's folder, written whole after each epoch.

    Lightning's CSVLogger appends in place, so a reader may meet half a row.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], resolved: Any) -> None:
        super().__init__()
        self._path = out / "metrics.csv"
        self._rows: list[dict[str, float]] = []

    def start(self, history: Sequence[Mapping[str, float]]) -> None:
        self._path.unlink(missing_ok=True)  # an earlier attempt's
        super().start(history)

    def row(self, epoch: int, values: Mapping[str, float]) -> None:
        if not self._rows or self._rows[-1]["step"] < epoch:
            self._rows.append({"step": epoch})
        next(row for row in self._rows if row["step"] == epoch).update(values)
        text = io.StringIO()
        columns = dict.fromkeys(name for row in self._rows for name in row)
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(self._path, text.getvalue())


class TensorBoard(Tracker):
    """TensorBoard events in the run's folder: scalars an epoch, then the test metrics, figures and configuration."""

    def __init__(self, out: Path, identity: Mapping[str, Any], resolved: Any) -> None:
        super().__init__()
        self._out, self._resolved = out, resolved
        self._writer: Any = None

    def start(self, history: Sequence[Mapping[str, float]]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ValueError("logger=tensorboard needs TensorBoard: pip install tensorboard") from error
        for earlier in self._out.glob("events.out.tfevents.*"):
            earlier.unlink()
        # A TensorBoard that has read the earlier events drops them: everything from this step on comes again.
        self._writer = SummaryWriter(self._out, purge_step=0)
        super().start(history)

    def row(self, epoch: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch, new_style=True, double_precision=True)
        self._writer.flush()

    def publish(self, result: Mapping[str, Any], figures: Path, scores: Mapping[str, np.ndarray]) -> None:
        from PIL import Image

        epochs = result["epochs"]
        for name, value in result["metrics"].items():
            if value is not None:
                self._writer.add_scalar(f"result/{name}", value, epochs, new_style=True, double_precision=True)
        for path in sorted(figures.glob("*.png")):
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._writer.add_image(f"figures/{path.stem}", pixels, epochs, dataformats="HWC")
        yaml = OmegaConf.to_yaml(OmegaConf.create(self._resolved))
        self._writer.add_text("config", "\n".join(f"    {line}" for line in yaml.splitlines()), epochs)

    def close(self, exit_code: int) -> None:
        if self._writer is not None:
            self._writer.close()


class Wandb(Tracker):
    """The run on Weights & Biases, or in a folder that ``wandb sync`` uploads later.

    The run's id is a hash of its identity and its group, so a resumed or repeated run stays one line of the dashboard.
    A failure of wandb never ends a run: it is one line of warning. Files are written to the run's folder alone, unless
    wandb's environment variables say otherwise. Each run ends wandb's background process, and with it all other
    recordings of the same Python process.

    Args:
        mode: online, offline, or auto: what WANDB_MODE says, else online if there is an API key and offline if not.
        project, entity: where the run belongs; None leaves the entity to the API key.
        group: runs shown together; None takes the experiment's name, or ``<model>/<dataset>/<split>``.
        tags: besides the names of model, data set and split.
        table_rows: most images in the table of scores; larger test sets are sampled with a fixed seed.
        artifact: whether to upload last.ckpt as the artifact ``<id>-checkpoint``.
        init_timeout: seconds after which a server that answers, but begins no run, is given up and the run recorded
            offline. One that does not answer within `ANSWER` seconds is given up at once.
        finish_timeout: seconds the end of a run may wait for uploads; what is left stays in the folder.

    This process does not ask a server that was given up again for `RETRY` seconds.
    """

    ANSWER: ClassVar[float] = 5.0
    RETRY: ClassVar[float] = 600.0
    _ask_again: ClassVar[float] = 0.0  # on time.monotonic()'s clock

    def __init__(
        self,
        out: Path,
        identity: Mapping[str, Any],
        resolved: Any,
        *,
        mode: str = "auto",
        project: str = "anomaly-lab",
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        table_rows: int = 2000,
        artifact: bool = False,
        init_timeout: float = 30,
        finish_timeout: float = 60,
    ) -> None:
        super().__init__()
        if mode not in ("auto", "online", "offline"):
            raise ValueError(f"logger.mode={mode}: choose auto, online or offline")
        self._out = out.resolve()
        self._mode = mode
        self._table_rows, self._artifact = table_rows, artifact
        kind = [identity[key] for key in ("model", "dataset", "split")]
        group = group or resolved["choices"]["experiment"] or "/".join(kind)
        self.id = hashlib.sha256(json.dumps([identity, group], sort_keys=True).encode()).hexdigest()[:16]
        self._init_timeout, self._finish_timeout = init_timeout, finish_timeout
        self._init: dict[str, Any] = {
            "id": self.id,
            "name": "/".join(self._out.parts[-5:]),  # model, data set, split, class, seed: as the folder says it
            "project": project,
            "entity": entity,
            "group": group,
            "tags": [*dict.fromkeys([*kind, *tags])],
            "config": {**resolved, "identity": identity},
            "dir": str(self._out),
            "resume": "allow",
            "reinit": "create_new",  # never the run that the surrounding program has opened
        }
        self._run: Any = None
        self._broken = False  # wandb failed: nothing more is sent, but the run is still finished

    @property
    def name(self) -> str | None:
        return str(self._init["project"])

    @property
    def version(self) -> str | None:
        return self.id

    def start(self, history: Sequence[Mapping[str, float]]) -> None:
        with self._mirroring():
            mode = self._chosen_mode()
            if mode == "disabled":
                return
            self._run = self._begin(mode)
            log.info("wandb: %s", Path(self._run.dir).parent if self._run.offline else self._run.url)
            if not history and self._run.starting_step > 0:
                log.warning(
                    "wandb: run %s on the server holds %d epochs of an earlier run of the same identity, which stay; "
                    "logger.group=NAME keeps the two apart",
                    self.id,
                    self._run.starting_step - 1,
                )
            # This recording has the whole history. Those of earlier attempts, synced after it, would replace it.
            for folder in (self._out / "wandb").glob(f"offline-run-*-{self.id}"):
                if folder != Path(self._run.dir).parent:
                    shutil.rmtree(folder)
        super().start(history)

    def row(self, epoch: int, values: Mapping[str, float]) -> None:
        with self._mirroring():
            if self._sending and epoch >= self._run.starting_step:  # the server may know this epoch already
                self._run.log({"epoch": epoch, **values}, step=epoch, commit=True)

    def watched(self, history: Sequence[Mapping[str, float]]) -> None:
        with self._mirroring():
            for row in history if self._sending else ():
                if oracles := _oracles(row):  # behind the last step, for a server takes no earlier one
                    self._run.log({"epoch": int(row["epoch"]), **oracles}, commit=True)

    def publish(self, result: Mapping[str, Any], figures: Path, scores: Mapping[str, np.ndarray]) -> None:
        if not self._sending:
            return
        import wandb

        with self._mirroring():
            rows = np.arange(len(scores["score"]))
            if len(rows) > self._table_rows:
                rows = np.sort(np.random.default_rng(0).choice(rows, self._table_rows, replace=False))
            columns = {"index": "index", "class": "label", "anomalous": "truth", "score": "score"}
            data = zip(*(scores[key][rows].tolist() for key in columns.values()), strict=True)
            media: dict[str, Any] = {"scores": wandb.Table(columns=list(columns), data=[list(row) for row in data])}
            media |= {f"figures/{path.stem}": wandb.Image(str(path)) for path in sorted(figures.glob("*.png"))}
            self._run.log(media, commit=True)
            # Last: the rows above leave their own last values in the summary.
            self._run.summary.update({k: v for k, v in result["metrics"].items() if v is not None})
            own = ("epochs", "steps", "images_per_second", "peak_memory_mb", "partition")
            seconds = {f"{what}_seconds": value for what, value in result["seconds"].items()}
            self._run.summary.update({key: result[key] for key in own} | seconds)
            if self._artifact:
                artifact = wandb.Artifact(f"{self.id}-checkpoint", type="model", metadata=dict(result["identity"]))
                artifact.add_file(str(self._out / "last.ckpt"), policy="immutable")
                self._run.log_artifact(artifact)

    def close(self, exit_code: int) -> None:
        if self._run is None:
            return
        import wandb

        with self._mirroring():
            run, self._run = self._run, None
            try:
                run.finish(exit_code=exit_code)
            except TimeoutError:
                Wandb._ask_again = time.monotonic() + self.RETRY
                log.warning(
                    "wandb: not all was uploaded within %.0f s; `wandb sync --include-online %s` sends the rest",
                    self._finish_timeout,
                    Path(run.dir).parent,
                )
            finally:
                # finish() returns before the recording is on disk; this waits for it. It also ends wandb's service,
                # so that a broken one does not spoil the next run.
                wandb.teardown()

    @property
    def _sending(self) -> bool:
        return self._run is not None and not self._broken

    def _chosen_mode(self) -> str:
        import requests
        import wandb

        if self._mode == "offline":
            return self._mode
        settings = wandb.setup().settings  # environment variables and wandb's own files
        if self._mode == "auto" and settings.mode not in ("online", "run", "shared"):
            return "disabled" if settings.mode == "disabled" else "offline"
        if settings.api_key or settings.identity_token_file or requests.utils.get_netrc_auth(settings.base_url):
            return "online"
        if self._mode == "online":
            log.warning("wandb: no API key (wandb login); this run is recorded offline")
        return "offline"

    def _begin(self, mode: str) -> Any:
        import wandb

        before = set((self._out / "wandb").glob("*"))
        if mode == "online" and time.monotonic() >= Wandb._ask_again:
            settings = wandb.Settings(
                console="off",
                init_timeout=self._init_timeout,
                finish_timeout=self._finish_timeout,
                finish_timeout_raises=True,
            )
            try:
                self._ask(wandb.setup().settings.base_url)
                return wandb.init(**self._init, mode="online", settings=settings)
            except Exception as error:
                Wandb._ask_again = time.monotonic() + self.RETRY
                log.warning(
                    "wandb: no connection (%s); this run is recorded offline, for `wandb sync`, and so is what begins "
                    "in the next %.0f minutes",
                    shortened(error),
                    self.RETRY / 60,
                )
            wandb.teardown()  # its service holds the id of the run that could not begin
            for folder in set((self._out / "wandb").glob(f"run-*-{self.id}")) - before:
                shutil.rmtree(folder)
        settings = wandb.Settings(console="off", silent=True)
        return wandb.init(**self._init, mode="offline", settings=settings)

    def _ask(self, url: str) -> None:
        """Raise ConnectionError where the server does not answer: wandb itself would try for much longer."""
        import requests

        try:
            requests.head(url, timeout=self.ANSWER)
        except requests.exceptions.SSLError:
            return  # a server answered; wandb has certificates of its own
        except requests.exceptions.RequestException as error:
            raise ConnectionError(f"{url}: {type(error).__name__}") from error

    @contextmanager
    def _mirroring(self) -> Iterator[None]:
        """Keep wandb's files in the run's folder, and turn its failure into a warning."""
        home = self._out / "wandb"
        # Tables and artifacts are staged in the data folder, from where they are uploaded.
        given = {name: os.environ.get(name) for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR")}
        for name, value in given.items():
            os.environ[name] = value or str(home / name.split("_")[1].lower())
        try:
            yield
        except Exception as error:
            self._broken = True
            log.warning("wandb: %s: %s; the run goes on without it", type(error).__name__, error)
        finally:
            for name, value in given.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def workspace(entity: str, project: str) -> Any:
    """A `wandb_workspaces` view of a project: training by epoch, test metrics, figures; ``save()`` lays it out.

    ``oracle_auroc``, which looks at test labels during training, is in no panel: a dashboard invites choosing by it.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as layout
    except ModuleNotFoundError as error:
        raise ValueError("a dashboard needs an extra: pip install anomaly-lab[dashboard]") from error
    curves: list[Any] = [
        panels.LinePlot(title="val_score: mean score of held-out normals", x="epoch", y=["val_score"]),
        panels.LinePlot(title="losses", x="epoch", metric_regex="loss_.*"),
        panels.LinePlot(title="seconds an epoch", x="epoch", y=["seconds"]),
    ]
    measured = {"auroc": "AUROC", "average_precision": "average precision", "fpr95": "FPR at 95 % TPR"}
    bars: list[Any] = [
        panels.BarPlot(title=title, metrics=[name], max_runs_to_show=100) for name, title in measured.items()
    ]
    pictures = [f"figures/{name}" for name in ("roc", "scores", "reconstructions", "training")]
    return layout.Workspace(
        entity=entity,
        project=project,
        name="anomaly_lab",
        auto_generate_panels=False,
        sections=[
            layout.Section(name="Training", panels=curves, is_open=True),
            layout.Section(name="Test images", panels=bars, is_open=True),
            layout.Section(name="Figures", panels=[panels.MediaBrowser(media_keys=pictures)], is_open=True),
        ],
    )
