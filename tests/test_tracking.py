"""Loggers, on real runs of the embedded data set: what they show, after a resume too, and that they change nothing."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
import yaml
from lightning import Callback
from recordings import read_offline
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from anomaly_lab import cli, config, tracking
from anomaly_lab.run import run
from anomaly_lab.tracking import Wandb

pytestmark = pytest.mark.drawn

EPOCHS = 3
LOGGERS = ("csv", "tensorboard", "wandb")
IDENTITY = {"model": "m", "dataset": "d", "split": "s", "normal_class": 1, "seed": 0, "changed": {}}
RESOLVED = {"choices": {"experiment": None}}


@pytest.fixture(autouse=True)
def clean_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user without wandb's settings; and nothing of wandb's may appear at home or in the working directory."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_DIR", "WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    places = {"HOME": tmp_path / "home", "cwd": tmp_path / "cwd"}
    for place in places.values():
        place.mkdir()
    monkeypatch.setenv("HOME", str(places["HOME"]))
    monkeypatch.setattr(Wandb, "_ask_again", 0.0)  # what an earlier test found
    monkeypatch.chdir(places["cwd"])
    yield
    wandb.teardown()  # the next test has other environment variables
    assert not [*places["HOME"].rglob("*wandb*"), *places["cwd"].iterdir()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The configuration of a run of seconds, its results in a folder named by the first argument."""
    place = tmp_path_factory.mktemp("tracking")

    def compose(runs: str, *overrides: str) -> Any:
        budget = [f"model.budget.epochs={EPOCHS}", "model.budget.epoch_steps=1", "model.detector.width=4"]
        machine = [f"data_dir={place}/data", f"runs={place}/{runs}", "trainer.threads=1", "trainer.accelerator=cpu"]
        return config.compose([*budget, *machine, "trainer.progress=false", *overrides])

    return compose


@pytest.fixture(scope="module")
def whole(tiny: Callable[..., Any]) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """The folder and the result of a run that nothing disturbed, by logger; made once."""
    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def make(logger: str) -> tuple[Path, dict[str, Any]]:
        if logger not in made:
            cfg = tiny(f"whole_{logger}", f"logger={logger}")
            result = run(cfg)
            assert result is not None
            made[logger] = (config.job(cfg).out, result)
        return made[logger]

    return make


class Stop(Callback):
    """Ends a run after its second epoch, as a crash would."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 2:
            raise RuntimeError("stopped on purpose")


def shown(logger: str, out: Path) -> list[dict[str, float]]:
    """The rows a logger shows, one an epoch, without what no two runs share."""
    rows: list[dict[str, float]] = []
    if logger == "csv":
        with open(out / "metrics.csv", newline="") as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
        rows = [{"epoch": row.pop("step"), **row} for row in rows]
    elif logger == "tensorboard":
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        events = accumulator.EventAccumulator(str(out), size_guidance={accumulator.TENSORS: 0})
        events.Reload()
        by_epoch: dict[int, dict[str, float]] = {}
        for name in (name for name in events.Tags()["tensors"] if "/" not in name):
            for event in events.Tensors(name):
                row = by_epoch.setdefault(event.step, {"epoch": event.step})
                assert name not in row, f"{name} of epoch {event.step} is shown twice"
                row[name] = event.tensor_proto.double_val[0]
        rows = [row for _, row in sorted(by_epoch.items())]
    else:
        recorded = [row for row in read_offline(out)["history"] if "epoch" in row]
        assert [row["_step"] for row in recorded] == [row["epoch"] for row in recorded]
        rows = [{name: value for name, value in row.items() if not name.startswith("_")} for row in recorded]
    return without_seconds(rows)


def without_seconds(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize("logger", LOGGERS)
def test_resumed_run_shows_the_same_rows_as_one_never_stopped(
    logger: str, tiny: Callable[..., Any], whole: Callable[[str], tuple[Path, dict[str, Any]]]
) -> None:
    undisturbed, result = whole(logger)
    assert [row["epoch"] for row in result["history"]] == [1, 2, 3]
    assert shown(logger, undisturbed) == without_seconds(result["history"])

    cfg = tiny(f"stopped_{logger}", f"logger={logger}")
    out = config.job(cfg).out
    with pytest.raises(RuntimeError, match="on purpose"):
        run(cfg, callbacks=[Stop()])
    assert shown(logger, out) == without_seconds(result["history"])[:2]
    assert run(cfg) is not None
    assert shown(logger, out) == without_seconds(result["history"])


def test_logger_changes_no_score_and_none_leaves_no_file(whole: Callable[[str], tuple[Path, dict[str, Any]]]) -> None:
    silent, _ = whole("none")
    own = {"csv": {"metrics.csv"}, "wandb": {"wandb"}}
    for logger, extra in own.items():
        out, _ = whole(logger)
        assert {path.name for path in out.iterdir()} == {path.name for path in silent.iterdir()} | extra
        with np.load(out / "scores.npz") as seen, np.load(silent / "scores.npz") as expected:
            assert seen["score"].tobytes() == expected["score"].tobytes()


def test_tensorboard_shows_results_figures_and_configuration(
    whole: Callable[[str], tuple[Path, dict[str, Any]]],
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out, result = whole("tensorboard")
    events = accumulator.EventAccumulator(str(out))
    events.Reload()
    tags = events.Tags()
    assert events.Tensors("result/auroc")[0].tensor_proto.double_val[0] == result["metrics"]["auroc"]
    assert set(tags["images"]) == {f"figures/{path.stem}" for path in (out / "figures").glob("*.png")}
    assert "config/text_summary" in tags["tensors"]


def test_wandb_recording_holds_all_of_the_run(whole: Callable[[str], tuple[Path, dict[str, Any]]]) -> None:
    out, result = whole("wandb")
    seen = read_offline(out)
    config_seen = {name: value for name, value in seen["config"].items() if name != "_wandb"}
    assert config_seen == {**result["config"], "identity": result["identity"]}
    for name, value in result["metrics"].items():
        assert seen["summary"].get(name) == value, name
    assert seen["summary"]["partition"] == result["partition"]
    assert seen["exit_code"] == 0
    identity = result["identity"]
    kind = [identity[key] for key in ("model", "dataset", "split")]
    assert seen["run"]["tags"] == kind
    assert seen["run"]["group"] == "/".join(kind)
    assert seen["run"]["name"] == "/".join(out.parts[-5:])

    (media,) = [row for row in seen["history"] if "scores" in row]
    figures = {path.stem for path in (out / "figures").glob("*.png")}
    assert figures >= {"roc", "scores", "training", "reconstructions"}
    assert {name.removeprefix("figures/") for name in media if name.startswith("figures/")} == figures
    assert all(path.is_file() for path in seen["files"])
    assert sum(path.suffix == ".png" for path in seen["files"]) == len(figures)
    table = table_of(seen)
    with np.load(out / "scores.npz") as scores:
        rows = zip(*(scores[key].tolist() for key in ("index", "label", "truth", "score")), strict=True)
        assert table["data"] == [list(row) for row in rows]


def table_of(recording: Mapping[str, Any]) -> dict[str, Any]:
    (path,) = [path for path in recording["files"] if path.name.endswith(".table.json")]
    return json.loads(path.read_text())


def test_wandb_run_keeps_its_id_and_one_recording_through_failure_and_resume(
    tiny: Callable[..., Any], whole: Callable[[str], tuple[Path, dict[str, Any]]]
) -> None:
    cfg = tiny("failing_wandb", "logger=wandb")
    out = config.job(cfg).out
    with pytest.raises(RuntimeError, match="on purpose"):
        run(cfg, callbacks=[Stop()])
    failed = read_offline(out)
    assert failed["exit_code"] == 1
    run(cfg)
    finished = read_offline(out)
    assert finished["exit_code"] == 0
    assert finished["run"]["id"] == failed["run"]["id"] == read_offline(whole("wandb")[0])["run"]["id"]
    assert len(list((out / "wandb").glob("*run-*-*"))) == 1


def result_of(scores: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `Tracker.publish` gets at the end of a run whose best epoch was not its last."""
    result = {"metrics": {"auroc": 1 / 3, "oracle_auroc": 0.9, "f1": None}, "identity": IDENTITY, "partition": {}}
    result |= {"epochs": 2, "steps": 2, "images_per_second": 1.0, "peak_memory_mb": 1.0, "seconds": {"fit": 1.0}}
    arrays = {name: np.arange(scores) for name in ("index", "label", "truth")}
    return result, arrays | {"score": np.linspace(0, 1, scores, dtype=np.float32)}


def record(out: Path, resolved: Mapping[str, Any] = RESOLVED, **options: Any) -> dict[str, Any]:
    """A run of two epochs as a `Wandb` tracker records it, without the training."""
    out.mkdir(parents=True)
    (out / "last.ckpt").write_bytes(b"weights")
    tracker = Wandb(out, IDENTITY, dict(resolved), mode="offline", **options)
    tracker.start([{"epoch": 1, "oracle_auroc": 0.9}])
    tracker.log_metrics({"oracle_auroc": 0.5}, step=2)
    tracker.log_metrics({"auroc": 0.1, "epoch": 2}, step=7)  # Lightning's own row after a test
    result, scores = result_of(50)
    tracker.publish(result, out / "figures", scores)
    tracker.close(0)
    return read_offline(out)


def test_wandb_samples_large_tables_the_same_way_each_time_and_uploads_the_checkpoint_on_request(
    tmp_path: Path,
) -> None:
    first, second = record(tmp_path / "a", table_rows=10, artifact=True), record(tmp_path / "b", table_rows=10)
    table = table_of(first)["data"]
    assert len(table) == 10
    assert table == sorted(table)
    assert table == table_of(second)["data"]
    checkpoint = f"{first['run']['id']}-checkpoint"
    assert checkpoint in first["artifacts"]
    assert checkpoint not in second["artifacts"]


def test_wandb_summary_is_the_result_and_not_the_last_epoch(tmp_path: Path) -> None:
    seen = record(tmp_path / "run")
    assert [row["oracle_auroc"] for row in seen["history"] if "epoch" in row] == [0.9, 0.5]
    assert seen["summary"]["oracle_auroc"] == 0.9
    assert seen["summary"]["auroc"] == 1 / 3


def test_wandb_recording_is_read_across_blocks_and_up_to_a_torn_end(tmp_path: Path) -> None:
    long = "".join(map(str, range(30_000)))  # several blocks of 32 KiB
    seen = record(tmp_path / "run", {**RESOLVED, "long": long})
    assert seen["config"]["long"] == long
    (path,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    raw = path.read_bytes()
    path.write_bytes(raw[:-3])
    torn = read_offline(path)
    assert torn["exit_code"] is None
    assert torn["summary"]["auroc"] == 1 / 3
    path.write_bytes(raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:])
    with pytest.raises(ValueError, match="damaged"):
        read_offline(path)
    with pytest.raises(ValueError, match="no wandb recording"):
        read_offline(tmp_path)


def test_wandb_id_follows_from_identity_and_group(tmp_path: Path) -> None:
    def identifier(identity: Mapping[str, Any] = IDENTITY, **options: Any) -> str:
        return Wandb(tmp_path, identity, RESOLVED, **options).id

    assert identifier() == identifier(dict(reversed(IDENTITY.items())), project="other", tags=["x"])
    others = [identifier(group="g"), identifier({**IDENTITY, "seed": 1}), identifier({**IDENTITY, "changed": {"a": 1}})]
    assert len({identifier(), *others}) == 4


def test_wandb_failure_is_one_warning_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Wandb(tmp_path, IDENTITY, RESOLVED, mode="offline")
    tracker.start([])

    def fail(*_: Any, **__: Any) -> None:
        raise BrokenPipeError("the service died")

    monkeypatch.setattr(tracker._run, "log", fail)
    with caplog.at_level(logging.WARNING, logger="anomaly_lab"):
        tracker.log_metrics({"loss": 1.0}, step=1)
        tracker.log_metrics({"loss": 1.0}, step=2)
        result, scores = result_of(5)
        tracker.publish(result, tmp_path, scores)
        tracker.close(0)
    (warning,) = own_lines(caplog)
    assert "goes on without it" in warning
    assert read_offline(tmp_path)["exit_code"] == 0


def own_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings of the tracker itself; wandb has loggers of its own, which no handler of a run shows."""
    return [record.getMessage() for record in caplog.records if record.name == "anomaly_lab.tracking"]


@pytest.mark.parametrize(("mode", "lines"), [("auto", 0), ("online", 1)])
def test_wandb_without_a_key_is_recorded_offline_and_says_so_where_online_was_asked_for(
    mode: str, lines: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Wandb(tmp_path, IDENTITY, RESOLVED, mode=mode)
    with caplog.at_level(logging.WARNING, logger="anomaly_lab"):
        tracker.start([])
    tracker.close(0)
    assert ["wandb login" in line for line in own_lines(caplog)] == [True] * lines
    assert read_offline(tmp_path)["run"]["id"] == tracker.id


def test_wandb_is_silenced_by_its_own_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = Wandb(tmp_path, IDENTITY, RESOLVED)
    tracker.start([{"epoch": 1, "loss": 0.5}])
    tracker.close(0)
    with pytest.raises(ValueError, match="no wandb recording"):
        read_offline(tmp_path)


def test_wandb_mode_that_does_not_exist_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose auto, online or offline"):
        Wandb(tmp_path, IDENTITY, RESOLVED, mode="offlin")


class Server(BaseHTTPRequestHandler):
    """As much of a wandb server as a run needs: keeps what it is sent, and knows two epochs of every run already.

    The latter is what ``known=0`` on the server turns off.
    """

    def do_PUT(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path == "/graphql":
            self.answer({"data": self.resolve(**json.loads(body))})
            return
        if self.path.endswith("/file_stream") and "wandb-history.jsonl" in json.loads(body).get("files", {}):
            self.server.received.append(json.loads(body)["files"]["wandb-history.jsonl"])  # type: ignore[attr-defined]
        self.answer({})

    def resolve(self, query: str, variables: dict[str, Any] | None = None, **_: Any) -> dict[str, Any]:
        project = {"id": "p", "name": "anomaly-lab", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": (variables or {}).get("name"), "displayName": "x", "config": "{}", "tags": []}
        if "upsertView" in query:
            self.server.views.append(variables)  # type: ignore[attr-defined]
            return {"upsertView": {"view": {"id": "w", "name": "nw-w-v"}, "inserted": True}}
        if "upsertBucket" in query:
            self.server.names.add((variables or {})["name"])  # type: ignore[attr-defined]
            return {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": False}}
        if "ResumeStatus" in query:
            if not getattr(self.server, "known", 2):
                return {"model": {**project, "bucket": None}}
            tails = {"historyTail": json.dumps([json.dumps({"_step": 2})]), "eventsTail": "[]", "summaryMetrics": "{}"}
            lines = {"historyLineCount": 2, "eventsLineCount": 0, "logLineCount": 0, "wandbConfig": '{"t": 1}'}
            return {"model": {**project, "bucket": bucket | tails | lines}}
        if "createRunFiles" in query:
            url = f"http://127.0.0.1:{self.server.server_address[1]}/upload/"
            files = [{"name": name, "uploadUrl": url + name} for name in (variables or {})["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if "viewer" in query.lower():
            return {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        return {}

    def answer(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def test_wandb_run_resumed_online_sends_only_the_epochs_that_the_server_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.received, server.names = [], set()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        tracker = Wandb(tmp_path, IDENTITY, RESOLVED)
        with caplog.at_level(logging.WARNING, logger="anomaly_lab"):
            tracker.start([{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.4}])
            tracker.log_metrics({"loss": 0.3}, step=3)
            tracker.close(0)
        server.shutdown()
    assert not own_lines(caplog)
    (sent,) = server.received  # type: ignore[attr-defined]
    assert sent["offset"] == 2
    assert [(row["epoch"], row["_step"], row["loss"]) for row in map(json.loads, sent["content"])] == [(3, 3, 0.3)]


def offline_from(out: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> float:
    """The seconds until a run whose server is at ``url`` goes on offline."""
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    out.mkdir()
    tracker = Wandb(out, IDENTITY, RESOLVED, init_timeout=1)
    started = time.monotonic()
    tracker.start([{"epoch": 1, "loss": 0.5}])
    seconds = time.monotonic() - started
    tracker.close(0)
    seen = read_offline(out)
    assert [row["loss"] for row in seen["history"]] == [0.5]
    assert len(list((out / "wandb").glob("*run-*-*"))) == 1
    return seconds


def test_unreachable_wandb_server_costs_seconds_and_one_warning_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refused = "http://127.0.0.1:9"  # the discard port: nobody listens
    with caplog.at_level(logging.WARNING, logger="anomaly_lab"):
        first = offline_from(tmp_path / "first", monkeypatch, refused)
        (warning,) = own_lines(caplog)
        assert "recorded offline" in warning and "in the next 10 minutes" in warning
        monkeypatch.setattr(Wandb, "_ask", lambda *_: pytest.fail("asked again"))
        offline_from(tmp_path / "second", monkeypatch, refused)
    assert first < 15  # wandb itself took fifty
    assert len(own_lines(caplog)) == 1


def test_wandb_server_that_accepts_and_never_answers_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Wandb, "ANSWER", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent, caplog.at_level(logging.WARNING, logger="anomaly_lab"):
        seconds = offline_from(tmp_path / "run", monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert 1 <= seconds < 15
    (warning,) = own_lines(caplog)
    assert "recorded offline" in warning


def test_wandb_server_that_goes_away_costs_the_finish_timeout_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.received, server.names, server.known = [], set(), 0  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        (tmp_path / "run").mkdir()
        tracker = Wandb(tmp_path / "run", IDENTITY, RESOLVED, finish_timeout=2)
        tracker.start([])
        server.shutdown()
    slowest = 0.0
    for epoch in range(1, 21):
        started = time.monotonic()
        tracker.log_metrics({"loss": 1 / epoch}, step=epoch)
        slowest = max(slowest, time.monotonic() - started)
    started = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="anomaly_lab"):
        tracker.close(0)
        assert time.monotonic() - started < 10
        assert slowest < 1
        (line,) = own_lines(caplog)
        assert "not all was uploaded within 2 s" in line and str(tmp_path / "run/wandb/run-") in line
        monkeypatch.setattr(Wandb, "_ask", lambda *_: pytest.fail("asked again"))
        offline_from(tmp_path / "next", monkeypatch, url)
    assert len(read_offline(tmp_path / "run")["history"]) == 20, "what was not uploaded is kept"


def test_wandb_offline_run_is_synced_later_as_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    tracker = Wandb(tmp_path / "run", IDENTITY, RESOLVED, mode="offline")
    tracker.start([{"epoch": 1, "loss": 0.5}])
    tracker.log_metrics({"loss": 0.25}, step=2)
    tracker.close(0)  # without a table of scores: artifacts are more than the server below knows
    (folder,) = (tmp_path / "run/wandb").glob("offline-run-*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.received, server.known = [], 0  # type: ignore[attr-defined]
        server.names = set()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = os.environ | {"WANDB_API_KEY": "0" * 40, "WANDB_CACHE_DIR": str(tmp_path / "cache")}
        environment["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.server_address[1]}"
        command = [sys.executable, "-m", "wandb", "sync", str(folder)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        server.shutdown()
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for sent in server.received for line in sent["content"]]  # type: ignore[attr-defined]
    assert [(row["epoch"], row["loss"]) for row in rows] == [(1, 0.5), (2, 0.25)]
    assert server.names == {tracker.id}  # type: ignore[attr-defined]


SWEEP = Path(__file__).parent.parent / "docs/wandb_sweep.yaml"


def points() -> Iterator[dict[str, Any]]:
    """The corners of the search that wandb is asked for, as its server would send them to an agent."""
    parameters = yaml.safe_load(SWEEP.read_text())["parameters"]
    values = {name: p.get("values") or [p[key] for key in ("value", "min", "max") if key in p]
              for name, p in parameters.items()}  # fmt: skip
    for chosen in itertools.product(*values.values()):
        yield {name: {"value": value} for name, value in zip(values, chosen, strict=True)}


def agents_command(point: Mapping[str, Any]) -> list[str]:
    """The command of a wandb agent, by wandb's own functions."""
    sweep = yaml.safe_load(SWEEP.read_text())
    args = create_sweep_command_args({"args": point})
    filled = {"program": [sweep["program"]], **args}
    words: list[str] = []
    for word in create_sweep_command(sweep["command"]):
        words += filled[word[2:-1]] if word.startswith("${") else [word]
    return words


def test_every_point_of_the_wandb_sweep_is_a_command_of_ours(tmp_path: Path) -> None:
    commands = [agents_command(point) for point in points()]
    assert len(commands) == 6
    folders = set()
    for program, *words in commands:
        assert program == "anomaly-lab"
        cfg = config.compose([*words, f"data_dir={tmp_path}"])
        assert cfg.logger._target_ == "anomaly_lab.tracking.Wandb"
        folders.add(config.job(cfg).out)
    assert len(folders) == 6


def test_the_wandb_sweep_minimises_what_a_run_logs_and_a_known_point_is_answered_too(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    metric = yaml.safe_load(SWEEP.read_text())["metric"]
    assert metric == {"name": "val_score", "goal": "minimize"}
    _, *words = agents_command(next(points()))
    cfg = tiny("swept", *words)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    for trial in ("trial1", "trial2"):  # ids are the server's; the second agent was given the same point
        monkeypatch.setenv("WANDB_RUN_ID", trial)
        job = config.job(cfg)
        before = job.finished()
        if before is None:
            result = run(cfg)
        else:
            tracking.show_again(job, before)
        wandb.teardown()
        (folder,) = (job.out / "wandb").glob(f"offline-run-*-{trial}")
        seen = read_offline(folder)
        assert result is not None and seen["summary"][metric["name"]] == result["metrics"]["val_score"]
        assert [row["val_score"] for row in seen["history"] if "epoch" in row] == [
            row["val_score"] for row in result["history"]
        ]
    assert before is not None


def test_the_dashboard_shows_what_runs_log_and_nothing_that_looked_at_test_labels_while_training(
    whole: Callable[[str], tuple[Path, dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("wandb_workspaces", reason="needs the extra: pip install anomaly-lab[dashboard]")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))  # wandb's Api has one, where runs of ours have none
    views: list[dict[str, Any]] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.views, server.names = views, set()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        code = cli.report(["--dashboard", "me/lab"])
        server.shutdown()
    assert code == 0, capsys.readouterr().err
    (view,) = views
    assert (view["entityName"], view["projectName"]) == ("me", "lab")
    sections = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    panels = [panel["config"] for section in sections for panel in section["panels"]]
    named = {name for panel in panels for name in (*panel.get("metrics", ()), *panel.get("mediaKeys", ()))}
    recorded = read_offline(whole("wandb")[0])
    logged = {name for row in recorded["history"] for name in row} | recorded["summary"].keys()
    assert named and named <= logged, named - logged
    (pattern,) = {panel["metricRegex"] for panel in panels if "metricRegex" in panel}
    assert any(re.fullmatch(pattern, name) for name in logged)
    assert not any("oracle" in name for name in named)


def test_a_dashboard_that_cannot_be_made_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.report(["--dashboard", "lab"]) == 2
    assert "give ENTITY/PROJECT" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    assert cli.report(["--dashboard", "me/lab"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install anomaly-lab[dashboard]" in err
