"""Captured steps, without a GPU: what a replay is given, and that a step can be replayed at all."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from omegaconf import DictConfig, OmegaConf, open_dict
from test_methods import MODELS
from test_run import Stop
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from anomaly_lab import config, turns
from anomaly_lab.build import make_data, make_detector, make_trainer
from anomaly_lab.cuda_graphs import WARM_UP, GraphedSteps, count_on_device, counted_on_host
from anomaly_lab.detector import Batch, Detector, looking
from anomaly_lab.players import Player, make_players, minimise
from anomaly_lab.run import run

METHODS: dict[str, list[str]] = {
    "shared_ae": ["model.detector.width=4"],
    "ganomaly": ["model.detector.width=4"],
    "aae": ["model.detector.width=16"],
    "itsr": [
        "model.detector.width=16",
        "model.detector.rounds=2",
        "model.budget.epochs=null",
        "model.budget.stages={pretrain:1,detect:2,retrain:1}",
    ],
    "piad_pixel_l1": ["model.budget.steps=null", "model.detector.gamma_every=4"],
}


class Recorded:
    """A graph without a GPU: a replay computes the captured step again, from the very tensors it was captured with.

    It refuses what a real replay would not do: change plain Python values, or make tensors that outlive the step.
    """

    def __init__(self, noise: torch.Generator) -> None:
        self.computed, self.replayed = 0, 0
        GRAPHS.append(self)

    def warm_up(self, step: Callable[[], None]) -> None:
        self.computed += 1
        step()

    def capture(self, step: Callable[[], None]) -> None:
        self._step = step

    def replay(self) -> None:
        self.replayed += 1
        detector = WATCHED[-1]
        before = lasting(detector)
        self._step()
        assert lasting(detector) == before, "a replay would not have done this"


GRAPHS: list[Recorded] = []
WATCHED: list[Detector] = []


def lasting(detector: Detector) -> dict[str, Any]:
    """Plain values of a detector, and where its tensors are, those of its means and its optimisers included."""

    def shown(value: Any) -> Any:
        return tree_map(lambda leaf: leaf.data_ptr() if isinstance(leaf, Tensor) else repr(leaf), value)

    skipped = ("_further", "_parameters", "_buffers", "_modules", "_trainer", "randomness")
    plain = vars(detector) | vars(detector.course) | vars(detector.stages)
    values = {name: shown(value) for name, value in plain.items() if not name.startswith(skipped)}
    for part, network in detector.named_modules():
        for name, tensor in [*network.named_parameters(recurse=False), *network.named_buffers(recurse=False)]:
            values[f"{part}.{name}"] = tensor.data_ptr()
    states = [optimizer.state for optimizer in detector.trainer.optimizers]
    return values | {"optimizers": [shown(value) for state in states for value in state.values()]}


class Watch(Callback):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        WATCHED.append(pl_module)


def tiny(runs: Path, model: str, *options: str) -> DictConfig:
    budget = ["model.budget.epochs=3", "model.budget.epoch_steps=7", "trainer.progress=false", "logger=none"]
    where = [f"runs={runs}", f"data_dir={runs.parent / 'data'}", f"model={model}"]
    return config.compose([*budget, *where, *METHODS[model], *options])


def outcome(cfg: DictConfig, callbacks: Sequence[Callback] = ()) -> tuple[dict[str, Any], dict[str, Tensor]]:
    result = run(cfg, callbacks)
    assert result is not None
    state = torch.load(config.job(cfg).out / "last.ckpt", weights_only=True)["state_dict"]
    return result, state


@pytest.mark.parametrize("model", [pytest.param(m, marks=[pytest.mark.slow] * (m != "ganomaly")) for m in METHODS])
def test_replayed_steps_end_where_computed_ones_do(tmp_path: Path, model: str) -> None:
    GRAPHS.clear()
    plain, weights = outcome(tiny(tmp_path / "plain", model))
    replayed, same = outcome(tiny(tmp_path / "replayed", model), [Watch(), GraphedSteps(Recorded)])
    assert weights.keys() == same.keys() and all(torch.equal(weights[name], same[name]) for name in weights)
    for one, other in zip(plain["history"], replayed["history"], strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}
    steps = replayed["steps"]
    not_steady = steps // 4 if model.startswith("piad") else 0
    assert sum(graph.replayed + graph.computed for graph in GRAPHS) == steps - not_steady
    assert all(graph.computed == WARM_UP for graph in GRAPHS if graph.replayed)
    assert sum(graph.replayed for graph in GRAPHS) >= steps // 3


def test_a_step_is_captured_anew_only_where_the_old_one_would_be_wrong(tmp_path: Path) -> None:
    GRAPHS.clear()
    outcome(tiny(tmp_path / "one", "ganomaly"), [Watch(), GraphedSteps(Recorded)])
    assert len(GRAPHS) == 1
    GRAPHS.clear()
    decaying = "model.scheduler={_target_: torch.optim.lr_scheduler.ExponentialLR, _partial_: true, gamma: 0.5}"
    _, weights = outcome(tiny(tmp_path / "decaying", "ganomaly", decaying), [Watch(), GraphedSteps(Recorded)])
    assert len(GRAPHS) == 3, "a learning rate is a number in the graph"
    _, plain = outcome(tiny(tmp_path / "plain", "ganomaly", decaying))
    assert all(torch.equal(weights[name], plain[name]) for name in plain)
    GRAPHS.clear()
    outcome(tiny(tmp_path / "itsr", "itsr"), [Watch(), GraphedSteps(Recorded)])
    assert len(GRAPHS) == 3, "what the first rejection found, then the images that come back with a negative weight"


class Counting(Detector):
    """Breaks the contract: what it does depends on a Python number that a replay would not change."""

    def __init__(self, image_shape: Sequence[int]) -> None:
        super().__init__(image_shape)
        self.layer, self.calls = nn.Linear(image_shape[1] * image_shape[2], 1), 0

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"layer": [self.layer]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        self.calls += 1
        yield {"layer": self.score(batch.x).mean() / self.calls}

    def score(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1)).square().squeeze(1)


def test_the_stand_in_for_a_graph_notices_what_a_replay_would_leave_out(tmp_path: Path) -> None:
    cfg = tiny(tmp_path / "runs", "shared_ae")
    with open_dict(cfg):
        cfg.model.detector = {"_target_": f"{__name__}.Counting"}
    with pytest.raises(AssertionError, match="would not have done"):
        run(cfg, [Watch(), GraphedSteps(Recorded)])


class NeverWait(TorchDispatchMode):
    """Refuses the operators that need a tensor's values on the host, for which a GPU has to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in WAITING, f"a step that waits for the device: {func}"
        if func in MASKS:
            indices = [index for index in args[1] if index is not None]
            assert all(index.dtype == torch.long for index in indices), f"a step that waits for the device: {func}"
        return func(*args, **kwargs or {})


WAITING = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.isin.Tensor_Tensor,  # sorts and counts, from some number of elements on
    torch.ops.aten._unique2.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.lift_fresh.default,  # torch.tensor(...), copied from the host
)
MASKS = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)
"""Indexing; by a mask it has to count first."""


@pytest.mark.parametrize("model", MODELS)
def test_a_steady_step_never_waits_for_the_device(model: str) -> None:
    pretrained = OmegaConf.select(config.compose([f"model={model}"]), "model.detector.features.weights") is not None
    random = ["weights=random", "path=null", "sha256=null"] if pretrained else []  # the files may not be here
    words = [f"model={model}", *(f"model.detector.features.{option}" for option in random)]
    if model == "addpa_growing":  # VGG19 drawn anew is gigabytes of which three layers are used
        words.append(f"model.detector.architectures=[{','.join(['squeezenet1_0.features.0'] * 4)}]")
    cfg = config.compose(words)
    made, given, players = without_trainer(cfg)
    loader = make_data(config.job(cfg)).train_dataloader()
    assert made.steady()
    with NeverWait():
        for losses in made.plays(given):
            minimise(losses, players)
            for player, loss in losses.items():
                made.record(f"loss_{player}", loss)
        loader.batch(torch.arange(4))
    for waits in (lambda: given.x.sum().item(), lambda: given.x[given.x > 0], lambda: torch.tensor(1.0)):
        with pytest.raises(AssertionError, match="waits"), NeverWait():
            waits()


def without_trainer(cfg: DictConfig) -> tuple[Detector, Batch, dict[str, Player]]:
    side = max(32, cfg.model.input.size)
    made = make_detector(cfg, (1, side, side)).train()
    x = torch.rand(12, 1, side, side, generator=torch.Generator().manual_seed(0))
    everything, given = Batch(x, torch.arange(12)), Batch(x[:4], torch.arange(4))
    made.next_batch = lambda: given  # type: ignore[method-assign]
    made._images = SimpleNamespace(everything=lambda: everything)  # type: ignore[assignment]
    if made.has("before_fit"):
        with looking(made):
            made.before_fit(x)
    return made, given, make_players(made.players(), functools.partial(torch.optim.SGD, lr=0.01))


@pytest.mark.parametrize("model", METHODS)
def test_in_half_precision_every_play_still_moves_its_players(model: str) -> None:
    """An autocast that caches would let a pass without gradients leave copies that gradients do not come through."""
    made, given, players = without_trainer(config.compose([f"model={model}"]))
    with MixedPrecision("bf16-mixed", "cpu").autocast_context_manager():
        for losses in made.plays(given):
            before = {name: weight.detach().clone() for name, weight in made.named_parameters()}
            minimise(losses, players)
            for player in losses:
                own = {id(weight) for weight in players[player].parameters}
                assert any(not torch.equal(w, before[n]) for n, w in made.named_parameters() if id(w) in own), player


VGG = ("piad", "piad_cifar10", "piad_coil100")


def test_half_precision_sees_the_weights_a_play_has_left(tmp_path: Path) -> None:
    """An autocast that caches keeps the copy of a weight: the second play would work with the weights of the first."""

    class Twice(Counting):
        def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
            for _ in range(2):
                loss = self.score(batch.x).mean()
                seen.append(loss.item())
                yield {"layer": loss}

    seen: list[float] = []
    made = Twice((1, 8, 8))
    players = make_players(made.players(), functools.partial(torch.optim.SGD, lr=0.01))
    given = Batch(torch.ones(2, 1, 8, 8), torch.arange(2))
    with MixedPrecision("bf16-mixed", "cpu").autocast_context_manager():
        for losses in made.plays(given):
            minimise(losses, players)
    assert seen[1] < seen[0]


def test_capture_is_said_to_have_no_effect_without_a_gpu(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny(tmp_path / "runs", "shared_ae", "trainer.cuda_graphs=true", "trainer.accelerator=cpu")
    job = replace(config.job(cfg), out=tmp_path)
    data = make_data(job)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(job, data, "title")
    assert "no GPU to capture steps on" in caplog.text
    assert not any(isinstance(callback, GraphedSteps) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def test_a_checkpoint_of_a_captured_run_resumes_without_a_capture() -> None:
    layer = nn.Linear(2, 1)
    adam, sgd = torch.optim.Adam(layer.parameters()), torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 2)).sum().backward()
    adam.step()
    count_on_device([adam, sgd])
    assert adam.param_groups[0]["capturable"] and "capturable" not in sgd.param_groups[0]
    kept = counted_on_host(adam.state_dict())
    adam.load_state_dict(kept)
    assert not adam.param_groups[0]["capturable"]
    adam.step()  # which would refuse capturable=True for weights on a CPU
    assert [state["step"].item() for state in adam.state.values()] == [2, 2]
    assert counted_on_host(sgd.state_dict()) == sgd.state_dict()
    with pytest.raises(ValueError, match="cannot capture Adagrad: take Adam"):
        count_on_device([sgd, torch.optim.Adagrad(layer.parameters())])


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("precision", ["32-true", "tf32", "bf16-mixed"])
@pytest.mark.parametrize("model", [pytest.param(model, marks=gpu) for model in METHODS])
def test_on_a_gpu_replays_end_where_computed_steps_do(tmp_path: Path, model: str, precision: str) -> None:
    """Computed with the same counts on the device, so nothing but the replaying differs."""
    options = ["trainer.accelerator=cuda", f"trainer.precision={precision}", "model.budget.epoch_steps=20"]
    _, computed = outcome(tiny(tmp_path / "computed", model, *options), [Watch(), GraphedSteps(Recorded)])
    _, replayed = outcome(tiny(tmp_path / "replayed", model, *options, "trainer.cuda_graphs=true"))
    for name, weight in computed.items():
        torch.testing.assert_close(replayed[name], weight, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("model", [pytest.param(model, marks=gpu) for model in METHODS if model != "itsr"])
def test_on_a_gpu_captured_scores_are_about_those_of_a_plain_run(tmp_path: Path, model: str) -> None:
    """Adam's bias correction is float64 on the host and float32 in a graph; a one-class SVM would choose otherwise."""
    scores = []
    for capture in ("false", "true"):
        cfg = tiny(tmp_path / capture, model, "trainer.accelerator=cuda", f"trainer.cuda_graphs={capture}")
        outcome(cfg)
        with np.load(config.job(cfg).out / "scores.npz") as file:
            scores.append(file["score"])
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-2, atol=1e-2 * float(np.median(scores[0])))


@pytest.mark.parametrize("model", [pytest.param(model, marks=gpu) for model in ("ganomaly", "aae")])
def test_on_a_gpu_a_captured_run_resumes_computed_and_the_other_way(tmp_path: Path, model: str) -> None:
    whole, _ = outcome(tiny(tmp_path / "whole", model, "trainer.accelerator=cuda"))
    for first, then in (("true", "false"), ("false", "true")):
        runs = tmp_path / first
        with pytest.raises(RuntimeError, match="stopped"):
            run(tiny(runs, model, "trainer.accelerator=cuda", f"trainer.cuda_graphs={first}"), [Stop(10)])
        cfg = tiny(runs, model, "trainer.accelerator=cuda", f"trainer.cuda_graphs={then}")
        result, _ = outcome(cfg)
        states = torch.load(config.job(cfg).out / "last.ckpt", weights_only=True)["optimizer_states"]
        assert {int(one["step"]) for state in states for one in state["state"].values()} == {result["steps"]}
        assert result["metrics"]["auroc"] == pytest.approx(whole["metrics"]["auroc"], abs=0.02)


@pytest.mark.parametrize("model", [pytest.param(model, marks=gpu) for model in METHODS])
def test_on_a_gpu_captured_runs_abreast_are_those_alone(tmp_path: Path, model: str) -> None:
    """Three runs in two places, so that one begins while another's step is being replayed."""
    options = ["trainer.accelerator=cuda", "trainer.cuda_graphs=true", "model.budget.epoch_steps=20"]
    cfgs = [tiny(tmp_path / "abreast", model, *options, f"normal_class={named}") for named in range(3)]
    turns.take([functools.partial(run, cfg) for cfg in cfgs], 2)
    for named, cfg in enumerate(cfgs):
        _, alone = outcome(tiny(tmp_path / "alone", model, *options, f"normal_class={named}"))
        beside = torch.load(config.job(cfg).out / "last.ckpt", weights_only=True)["state_dict"]
        for name, weight in alone.items():
            torch.testing.assert_close(beside[name], weight, rtol=1e-5, atol=1e-7, msg=name)
