"""The contract, held to any method: what must be true of each row of a table before its figures can mean anything.

    from anomaly_lab import testing
    testing.check("mine")                   # or, on the command line: anomaly-lab-check model=mine

The method is trained for a few steps on the run's data set (the embedded digits unless ``dataset=`` says otherwise),
straight through and killed after every epoch, and is scored alone, in a crowd and from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import random
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.errors import InstantiationException
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from anomaly_lab import config, switches
from anomaly_lab.batches import Batch
from anomaly_lab.build import make_data, make_detector, make_trainer
from anomaly_lab.data import OneClassData
from anomaly_lab.detector import Detector
from anomaly_lab.errors import RunFailed, explained, shortened
from anomaly_lab.players import parameters_of

KEPT, FEW = (64, 16), 24
"""Numbers of training images and held-out normals, and of test images that are scored."""

NEAR = (1e-4, 1e-6)
"""Relative and absolute tolerance between scores of one image: other batch sizes sum in other orders."""

QUICK = {"trainer.progress": False, "trainer.accelerator": "cpu", "trainer.checkpoint_every": 1}


class Broken(RunFailed):
    """A method breaks the contract: one line for each fault.

    Attributes:
        faults: the lines.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = list(faults)


def check(model: str, *overrides: str) -> None:
    """Hold the config ``model`` to the contract.

    Args:
        model: one of ours, or of the folder that ANOMALY_LAB_CONF names.
        overrides: as on the command line, such as ``dataset=mnist`` or smaller networks. Without a budget of its own
            (``model.budget...``) the method trains for two epochs, or two of each stage, of two steps of 32 images.

    Raises:
        Broken: it does something wrong; each line says what, and what to do.
        hydra.errors.HydraException: the configuration does not compose.
    """
    found = [fault for _, faults in examine([f"model={model}", *overrides]) for fault in faults]
    if found:
        raise Broken(found)


def examine(overrides: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Run the checks: the name of each and its faults, a line each. Ends early without a detector to check."""
    with tempfile.TemporaryDirectory() as folder, _undisturbed():
        cfg = config.compose(overrides)
        cfg = _with(cfg, {**_short(cfg, overrides), "runs": folder})
        with switches.of_a_run(cfg.trainer.precision, cfg.trainer.threads):
            case = _Case(cfg)
            for held, faults in CHECKS:
                try:
                    found = list(faults(case))
                except _Untrainable as error:
                    yield held, [str(error)]
                    return
                except Exception as error:
                    found = [f"{held}: this failed with {_named(error, case.source)}"]
                yield held, found


def _short(cfg: DictConfig, given: Sequence[str]) -> dict[str, Any]:
    """Overrides that shorten the training of ``cfg``, except keys that the user has ``given``."""
    budget, stages = cfg.model.budget, cfg.model.budget.get("stages") or {}
    short: dict[str, Any] = {"model.budget.epoch_steps": 2, "model.batch_size": min(cfg.model.batch_size, 32), **QUICK}
    if not any(word.startswith(("model.budget.epochs", "model.budget.steps", "model.budget.stages")) for word in given):
        short |= {f"model.budget.stages.{name}": min(length, 2) for name, length in stages.items()}
        if budget.epochs is not None or budget.steps is not None:
            epochs = budget.steps if budget.epochs is None else budget.epochs
            short |= {"model.budget.epochs": min(epochs, 2), "model.budget.steps": None}
    keys = {word.split("=")[0] for word in given}
    return {key: value for key, value in short.items() if key not in keys}


# One training ---------------------------------------------------------------------------------------------------------


class _Untrainable(Exception):
    """The detector cannot be made or trained, so the remaining checks are skipped."""


class _Killed(Exception):
    pass


class _EpochEnds(Checkpoint):
    """Keeps the checkpoint of every epoch, and on request ends training there as a kill would.

    A Checkpoint: Lightning calls those after all other callbacks, and the one that writes the file before this one.
    """

    def __init__(self, path: Path, kept: list[dict[str, Any]], kill: bool) -> None:
        self._path, self._kept, self._kill = path, kept, kill

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._kept.append(_read(self._path))
        if self._kill:
            raise _Killed


class _Trained(NamedTuple):
    detector: Detector  # fitted, in eval mode
    images: Tensor  # float32 (FEW,C,S,S), of the test set
    data: OneClassData
    epochs: list[dict[str, Any]]  # the checkpoint after each
    last: dict[str, Any]  # the one that a run scores with
    faults: list[str]  # of its plays


class _Case:
    """One method under examination."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.source = ""
        """The file of the method's class, once `make` has found it."""

    def make(self, cfg: DictConfig | None = None, shape: tuple[int, int, int] | None = None) -> Detector:
        """The untrained detector. Raises `_Untrainable` with the reason."""
        cfg = self.cfg if cfg is None else cfg
        try:
            made = make_detector(cfg, shape or make_data(config.job(cfg)).image_shape)
        except Exception as error:
            line = explained(error) if isinstance(error, ValueError | InstantiationException) else None
            raise _Untrainable(
                line or f"the detector cannot be made: {_named(error.__cause__ or error, '')}"
            ) from error
        self.source = inspect.getfile(type(made))
        return made

    @cached_property
    def trained(self) -> _Trained:
        """Trained straight through."""
        return self.train("straight", state=1)

    def train(self, name: str, *, state: int, kill: bool = False, cfg: DictConfig | None = None) -> _Trained:
        """A training in the folder ``name``, from global generators in some ``state``, killed after every epoch or not.

        Raises:
            _Untrainable: it fails.
        """
        job = config.job(self.cfg if cfg is None else cfg)
        job = dataclasses.replace(job, out=Path(job.cfg.runs, name))
        last, epochs = job.out / "last.ckpt", list[dict[str, Any]]()
        while True:
            state += 1
            _stir(state)  # whatever a process has drawn before, a run must not see it
            data = _thinned(make_data(job))
            detector = self.make(job.cfg, data.image_shape)
            watch = _Watch(detector)
            trainer = make_trainer(job, data, "", callbacks=[_EpochEnds(last, epochs, kill)])
            resume = last if last.is_file() else None
            try:
                trainer.fit(detector.train(), datamodule=data, ckpt_path=resume, weights_only=True)
                trainer.save_checkpoint(last, weights_only=False)
                break
            except _Killed:
                continue
            except Exception as error:
                again = f" after epoch {len(epochs)}" * bool(resume)
                reason = "; ".join(watch.faults) or _named(error, self.source)
                raise _Untrainable(f"training{again} failed: {reason}") from error
        shown = data.prepared("test", _spread(data.partition.test, FEW).tolist())
        return _Trained(detector.eval(), shown, data, epochs, _read(last), watch.faults)


class _Watch:
    """Looks at the first step of every stage: who moves, and along which gradient."""

    def __init__(self, detector: Detector) -> None:
        self.faults: list[str] = []
        self._detector, self._seen, self._plays = detector, set[str](), detector.plays
        detector.plays = self.plays  # type: ignore[method-assign]

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        stage = self._detector.stage
        if stage in self._seen:
            yield from self._plays(batch)
            return
        self._seen.add(stage)
        for losses in self._plays(batch):
            self._refuse(losses)
            yield from self._watched(losses)
        left = [name for name, p in self._detector.named_parameters() if p.grad is not None]
        if left:
            self._say(f"plays() leaves a gradient on {_some(left)}: call no backward(), yield the loss instead")

    def _refuse(self, losses: Mapping[str, Tensor]) -> None:
        players = self._detector.players()
        for name, loss in losses.items():
            if name not in players:
                known = f"players() names {', '.join(players)}" if players else "players() names none"
                self._say(f"plays() yields a loss for {name}, which is no player: {known}")
            elif not isinstance(loss, Tensor) or loss.numel() != 1:
                shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                self._say(f"plays() yields {shape} as the loss of {name}: yield a scalar tensor, such as the mean")
            elif not loss.requires_grad:
                self._say(
                    f"the loss of {name} has no gradient: it was detached, or computed by something that is not "
                    "differentiable"
                )
            elif not math.isfinite(loss.item()):
                when = f"the stage {self._detector.stage}" if self._detector.stage else "training"
                self._say(f"the loss of {name} is {loss.item()} in the first step of {when}")

    def _watched(self, losses: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
        players, clip = self._detector._players, self._detector.learning.clip
        everything = dict(self._detector.named_parameters())
        before = {name: p.detach().clone() for name, p in everything.items()}
        expected, taken, hooks = dict[str, list[Tensor]](), dict[str, list[Tensor]](), []
        if not self.faults:
            for name, loss in losses.items():
                own = [p for p in players[name].parameters if p.requires_grad]
                found = torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True)
                expected[name] = [torch.zeros_like(p) if g is None else g for p, g in zip(own, found, strict=True)]

                def keep(*_: Any, name: str = name, own: Sequence[Tensor] = own) -> None:
                    taken[name] = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in own]

                optimizer: Any = players[name].optimizer
                hooks.append(getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(keep))
        yield losses
        for hook in hooks:
            hook.remove()
        for name in expected.keys() if clip is None else ():
            for mine, right in zip(taken.get(name, ()), expected[name], strict=True):
                if not torch.allclose(mine, right, rtol=1e-3, atol=1e-5 * (1 + float(right.abs().max()))):
                    self._say(f"{name} moved along another gradient than that of its own loss")
        movers = {id(p) for name in losses if name in players for p in players[name].parameters}
        moved = [n for n, p in everything.items() if id(p) not in movers and not torch.equal(p, before[n])]
        if moved:
            self._say(
                f"{_some(moved)} moved with {', '.join(losses)}, whose it is not: let minimise alone move players"
            )

    def _say(self, fault: str) -> None:
        if fault not in self.faults:
            self.faults.append(fault)


# The checks -----------------------------------------------------------------------------------------------------------


def _weights(case: _Case) -> Iterator[str]:
    one = case.make()
    again, other = case.make(), case.make(_with(case.cfg, {"seed": case.cfg.seed + 1}))
    first, second = one.state_dict(), again.state_dict()
    differing = [name for name in first if name not in second or not torch.equal(first[name], second[name])]
    if differing:
        yield (
            f"the same seed gives other initial values of {_some(differing)}: draw them from torch's global generator, "
            "which the run seeds before it calls the constructor"
        )
    drawn = [(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True) if a.numel() > 1 and a.std() > 0]
    if drawn and all(torch.equal(a, b) for a, b in drawn):
        yield "every seed gives the same initial weights: seed no generator in the constructor, the run does"


def _players(case: _Case) -> Iterator[str]:
    made = case.make()
    names = {id(p): name for name, p in made.named_parameters()}
    owned = {name: parameters_of(networks) for name, networks in made.players().items()}
    having = {id(p) for parameters in owned.values() for p in parameters}
    free = [name for place, name in names.items() if place not in having]
    if free:
        yield (
            f"{_some(free)} belongs to no player, so it never learns: give its network to a player in players(), or "
            "networks.freeze() it"
        )
    for player, parameters in owned.items():
        if not parameters:
            yield f"the player {player} has no parameters: give it networks that have some"
        if any(id(p) not in names for p in parameters):
            yield (
                f"the player {player} has parameters that are not the detector's, so no checkpoint holds them: assign "
                "its networks to self in the constructor, and give the same ones in players() every time"
            )


def _plays(case: _Case) -> Iterator[str]:
    trained = case.trained
    yield from trained.faults
    losses = [name for row in trained.detector.course.history for name in row if name.startswith("loss_")]
    if trained.detector.players() and trained.epochs and not losses:
        yield "players() names players, but plays() yields no loss: yield {player: loss} for each move"
    for name, chosen in trained.detector.rejected_images().items():
        number = len(trained.data.partition.train)
        if chosen.ndim != 1 or chosen.is_floating_point() or any(not 0 <= int(i) < number for i in chosen):
            yield f"rejected_images() gives {name} no positions among the {number} training images: int64 (n,)"


def _scores(case: _Case) -> Iterator[str]:
    detector, x = case.trained.detector, case.trained.images
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    noise, given = detector.noise.get_state(), x.clone()
    whole = _score(detector, given)
    if not isinstance(whole, Tensor) or whole.shape != (len(x),) or whole.dtype != torch.float32:
        shown = f"{whole.dtype} {tuple(whole.shape)}" if isinstance(whole, Tensor) else type(whole).__name__
        yield f"score() returns {shown} for {len(x)} images: return one float32 number an image, ({len(x)},)"
        return
    if not torch.equal(given, x):
        yield "score() changes the images that it is given: work on a copy"
    if wrong := int((~whole.isfinite()).sum()):
        yield f"score() is not finite for {wrong} of {len(x)} images: look for a logarithm, a division or a root of 0"
        return
    if len(whole.unique()) == 1:
        yield f"score() is {whole[0].item():.6g} for every image, so it tells nothing apart"
    _stir(7)
    again = _score(detector, x.clone())
    if not torch.equal(again, whole):
        yield (
            "scoring the same images again gives other scores: draw no random numbers in score() (what a search starts "
            "from is kept with set_fitted in after_fit) and change nothing there"
        )
        return
    changed = [name for name, value in detector.state_dict().items() if not torch.equal(value, before[name])]
    if changed or not torch.equal(noise, detector.noise.get_state()):
        yield f"score() changes {_some(changed) if changed else 'self.noise'}: a score leaves the detector as it is"
    if left := [name for name, p in detector.named_parameters() if p.grad is not None]:
        yield f"score() leaves a gradient on {_some(left)}: search with torch.autograd.grad(loss, [z]), not backward()"
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    crowd = torch.cat([x[:3], torch.full((40, *x.shape[1:]), float(x.max()))])
    for how, now, right in (
        ("alone", torch.cat([_score(detector, one[None]) for one in x]), whole),
        ("in another order", _score(detector, x[order]), whole[order]),
        ("among 40 white ones", _score(detector, crowd)[:3], whole[:3]),
    ):
        if not torch.allclose(now, right, *NEAR):
            worst = (now - right).abs().max().item()
            yield (
                f"score() of an image changes by {worst:.2g} when it is scored {how}: no mean, norm or statistic over "
                "the batch, and a search sums its loss over the images"
            )
            return


def _pictures(case: _Case) -> Iterator[str]:
    yield from _shapes(case.trained.detector, case.trained.images)


def _shapes(detector: Detector, x: Tensor) -> Iterator[str]:
    """What is wrong with what the detector gives for images x (B,C,S,S), beside their scores."""
    with torch.no_grad():
        rebuilt, where, decided = detector.reconstruct(x), detector.anomaly_map(x), detector.decide(x)
    if rebuilt is not None and rebuilt.shape != x.shape:
        yield f"reconstruct() returns {tuple(rebuilt.shape)} for images {tuple(x.shape)}: return their shape, or None"
    if where is not None and where.shape != (len(x), *x.shape[2:]):
        yield f"anomaly_map() returns {tuple(where.shape)} for images {tuple(x.shape)}: return (B,H,W), or None"
    elif where is not None and not bool((where >= 0).all()):  # nor NaN
        yield "anomaly_map() has values that are negative or not finite: a heat map is of non-negative numbers"
    if decided is not None and (decided.shape != (len(x),) or decided.dtype != torch.bool):
        yield f"decide() returns {decided.dtype} {tuple(decided.shape)}: return bool (B,), or None"


def _checkpoint(case: _Case) -> Iterator[str]:
    trained = case.trained
    made = case.make()
    try:
        made.on_load_checkpoint(trained.last)
        made.load_state_dict(trained.last["state_dict"])
        found = _score(made.eval(), trained.images)
    except Exception as error:
        yield (
            f"a detector from its checkpoint cannot score ({_named(error, case.source)}): keep what fitting finds with "
            "set_fitted or in a buffer that the constructor registers"
        )
        return
    if not torch.equal(found, _score(trained.detector, trained.images)):
        yield (
            "a detector from its checkpoint gives other scores: keep what fitting finds with set_fitted or in a "
            "buffer, not in a plain attribute or a buffer with persistent=False"
        )


def _resume(case: _Case) -> Iterator[str]:
    straight, stages = case.trained, case.trained.detector.stages.epochs
    killed = case.train("killed", state=100, kill=True)
    of_epoch = [name for name, length in stages.items() for _ in range(length)]
    pairs = [*zip(straight.epochs, killed.epochs, strict=True), (straight.last, killed.last)]
    for number, (one, two) in enumerate(pairs, 1):
        name = _difference(_kept(one), _kept(two))
        if name is None:
            continue
        if number == 1:
            yield (
                f"trained again from the same seed, {name} differs: draw noise from self.noise, and in hooks from "
                "nothing else; neither numpy, random nor the clock belongs to the run"
            )
        else:
            stage = f" of the stage {of_epoch[number - 1]}" if len(of_epoch) >= number else ""
            yield (
                f"resumed after epoch {number - 1}, {name} differs after epoch {number}{stage} from a training that "
                "nobody killed: draw noise from self.noise, keep what one epoch hands to the next in buffers "
                "(register_buffer, set_fitted), and ask self.epoch, self.step and self.stage how far training is"
            )
        return
    if not torch.equal(*(_score(trained.detector, straight.images) for trained in (straight, killed))):
        yield (
            "resumed after every epoch, the detector gives other scores, with the same weights: keep what fitting "
            "finds with set_fitted or in a buffer, not in a plain attribute"
        )


def _other_images(case: _Case) -> Iterator[str]:
    size, channels = case.cfg.model.input.size, case.trained.images.shape[1]
    others: list[dict[str, Any]] = [{"model.input.size": size // 2}]
    if case.cfg.model.input.channels is None:  # else the method itself says what it sees
        others.append({"model.input.channels": 3 if channels == 1 else 1})
    for other in others:
        words = " ".join(f"{key}={value}" for key, value in other.items())
        cfg = _with(case.cfg, other)
        try:
            case.make(cfg)
        except _Untrainable as refused:
            if isinstance(refused.__cause__, InstantiationException) and isinstance(
                refused.__cause__.__cause__, ValueError
            ):
                continue  # it says in one line which images it takes
            yield f"{words}: {refused}; raise a ValueError that says which images the method takes"
            continue
        try:
            trained = case.train(words, state=200, cfg=cfg)
            found = _score(trained.detector, trained.images[:2])
            if found.shape != (2,):
                yield f"{words}: score() returns {tuple(found.shape)} for 2 images"
            for fault in _shapes(trained.detector, trained.images[:2]):
                yield f"{words}: {fault}"
        except _Untrainable as failed:
            yield f"{words}: {failed}; take such images, or raise a ValueError in the constructor that says which"


CHECKS: tuple[tuple[str, Callable[[_Case], Iterator[str]]], ...] = (
    ("the same weights from the same seed", _weights),
    ("every parameter belongs to a player", _players),
    ("a player moves along the gradient of its own loss, and nobody else moves", _plays),
    ("scores are finite, differ, and depend on their image alone", _scores),
    ("reconstructions, maps and decisions have their shapes", _pictures),
    ("a detector from its checkpoint gives the same scores", _checkpoint),
    ("a training killed after every epoch ends with the same bits", _resume),
    ("images of another size and with other channels", _other_images),
)
"""Every check: what it asserts, and the function that finds its faults."""


# Pieces ---------------------------------------------------------------------------------------------------------------


def _score(detector: Detector, x: Tensor) -> Tensor:
    with torch.autocast(detector.device.type, enabled=False), torch.no_grad():
        return detector.score(x)


def _read(path: Path) -> dict[str, Any]:
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            "a checkpoint holds something else than tensors and plain values, so it does not load under "
            f"weights_only=True: {shortened(error)}"
        ) from error
    return checkpoint


def _kept(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a checkpoint that must be equal in every training: all but the seconds."""
    own = dict(checkpoint["anomaly_lab"])
    own["history"] = [{name: value for name, value in row.items() if name != "seconds"} for row in own["history"]]
    names = ("state_dict", "optimizer_states", "lr_schedulers")
    return {**{name: checkpoint.get(name) for name in names}, "anomaly_lab": own}


def _difference(one: Any, two: Any, name: str = "") -> str | None:
    """The name of the first thing that differs."""
    if isinstance(one, Mapping) and isinstance(two, Mapping) and one.keys() == two.keys():
        pairs = [(str(key), one[key], two[key]) for key in one]
    elif isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(one, two, strict=True))]
    elif isinstance(one, Tensor) and isinstance(two, Tensor):
        return None if torch.equal(one, two) else name
    else:
        return None if one == two else name
    found = (_difference(a, b, f"{name}.{key}".removeprefix(".").removeprefix("state_dict.")) for key, a, b in pairs)
    return next((difference for difference in found if difference is not None), None)


def _thinned(data: OneClassData) -> OneClassData:
    """``data`` with few training images and held-out normals."""
    whole, (train, val) = data.partition, (_spread(data.partition.train, KEPT[0]), _spread(data.partition.val, KEPT[1]))
    data.partition = dataclasses.replace(
        whole, train=whole.train[train], train_truth=whole.train_truth[train], val=whole.val[val]
    )
    return data


def _spread(places: Sized, most: int) -> NDArray[np.int64]:
    """At most ``most`` of the positions, evenly spread."""
    return np.unique(np.linspace(0, len(places) - 1, min(most, len(places))).astype(np.int64))


def _with(cfg: DictConfig, values: Mapping[str, Any]) -> DictConfig:
    changed = cfg.copy()
    for key, value in values.items():
        OmegaConf.update(changed, key, value)
    return changed


def _named(error: BaseException, source: str) -> str:
    """An error in one line, with the place in the method's own file where there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == source] or frames
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {shortened(error)}{where}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _stir(seed: int) -> None:
    """Seed the global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Restore the global generators after the block, and silence Lightning during it."""
    states = np.random.get_state(), random.getstate()
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            np.random.set_state(states[0])
            random.setstate(states[1])
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
