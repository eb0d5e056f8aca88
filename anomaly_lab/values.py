"""Values that no run can have, whatever its data: each refused in one line, before anything is made.

Imports neither torch nor Lightning: a dry run refuses what the run would.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from anomaly_lab.errors import refuse_fewer

LEFT_OUT = ("model.detector", "model.optimizer", "model.scheduler", "model.budget.stages", "model.input.")
"""Sections that may be null, and those below them."""

MODEL_KEYS = {
    "model": (
        *("detector", "members", "optimizer", "scheduler", "clip", "budget", "batch_size", "input"),
        *("published", "pretrained", "labels"),
    ),
    "model.budget": ("epochs", "steps", "epoch_steps", "stages"),
    "model.input": ("size", "fit", "range", "channels", "augment", "features"),
}
"""All keys that a model's yaml may have; what stands below the detector, and the like, is for those to judge."""


def refuse(
    cfg: DictConfig, own_keys: Mapping[str, Sequence[str]], switches: Sequence[str], numbers: Sequence[str]
) -> None:
    """Hold the values of ``cfg`` to their kinds and ranges.

    Args:
        own_keys: keys that have keys of their own by default, with these.
        switches, numbers: keys whose default is true or false, or a number.

    Raises:
        ValueError: a seed that is no whole number, a key of the model that nothing reads, a number that is none (nor
            null), a switch that is neither true nor false (``no`` and ``off`` are texts, which Python takes for true),
            one value in the place of a section, an input range, a precision, a batch, a budget or an augmentation that
            there is not.
    """
    if type(cfg.seed) is not int or cfg.seed < 0:
        raise ValueError(f"seed={cfg.seed}: give a whole number from 0")
    for key in ("data_dir", "runs"):
        if not isinstance(cfg[key], str | Path) or not str(cfg[key]):
            raise ValueError(f"{key}={_shown(cfg[key])}: give a folder, such as {key}=./here")
    _refuse_unread(cfg)
    _refuse_flat_sections(cfg, own_keys)
    for keys, kinds, give in ((switches, (bool,), "true or false"), (numbers, (int, float), "a number")):
        for key in keys:
            section, _, name = key.rpartition(".")
            inside, value = OmegaConf.select(cfg, section), OmegaConf.select(cfg, key)
            if value is None and (kinds == (bool,) or not OmegaConf.is_dict(inside) or name not in inside):
                continue  # a switch that is off; or the key's section is another, or gone
            if type(value) not in kinds:
                raise ValueError(f"{key}={_shown(value)}: give {give}")
    model, trainer = cfg.model, cfg.trainer
    refuse_fewer(1, "model.input", size=model.input.size)
    _refuse_range(model.input.range)
    if not 0 < trainer.threshold_quantile < 1:
        raise ValueError(f"trainer.threshold_quantile={trainer.threshold_quantile}: give a number between 0 and 1")
    counts = {name: trainer[name] for name in ("threads", "score_batch_size") if trainer[name] is not None}
    refuse_fewer(1, "trainer", checkpoint_every=trainer.checkpoint_every, **counts)
    if trainer.precision not in ("32-true", "tf32", "bf16-mixed"):
        raise ValueError(f"trainer.precision={trainer.precision}: choose 32-true, tf32 or bf16-mixed")
    refuse_fewer(2, "model", batch_size=model.batch_size)  # batch norm needs two images
    refuse_fewer(1, "model.budget", epoch_steps=model.budget.epoch_steps)
    if model.optimizer is not None:  # else nobody reads it
        _refuse_budget(cfg)
    augmentation(cfg)


def _shown(value: Any) -> Any:
    return "null" if value is None else value


def _refuse_range(given: Any) -> None:
    """Refuse what 0 and 255 cannot become: `Prepare` does arithmetic with both."""
    numbers = list(given) if OmegaConf.is_list(given) else []
    finite = all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
    if len(numbers) != 2 or not finite or numbers[0] >= numbers[1]:
        raise ValueError(f"model.input.range={given}: give two growing numbers, such as [-1,1]")


def sections(section: Any, prefix: str = "") -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Every key that has keys of its own, with these, the outer ones first."""
    for key, value in section.items() if isinstance(section, Mapping) else ():
        if isinstance(value, Mapping) and value:
            yield f"{prefix}{key}", value
        yield from sections(value, f"{prefix}{key}.")


def key_of(section: str, keys: Collection[Any]) -> str | None:
    """Of a section the key that a user who gives it one value may mean; None where that cannot be said."""
    return next((f"{section}.{name}" for name in ("rate", "lr", "size", "epochs") if name in keys), None)


def _refuse_unread(cfg: DictConfig) -> None:
    """Refuse keys of a model's yaml that nothing reads: the run of a misspelt one would be that without it."""
    for section, known in MODEL_KEYS.items():
        given = OmegaConf.select(cfg, section)
        for key in given if OmegaConf.is_dict(given) else ():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                write = f"write {section}.{near[0]}" if near else f"there are {', '.join(known)}"
                raise ValueError(f"{section}.{key} of model={cfg.choices.model} is read by nothing: {write}")


def _refuse_flat_sections(cfg: DictConfig, expected: Mapping[str, Sequence[str]]) -> None:
    """Refuse one value in the place of a section, such as ``split.contamination=0.1``."""
    for key, keys in expected.items():
        value, inside = OmegaConf.select(cfg, key), key.rpartition(".")[0]
        gone = value is None and (key.startswith(LEFT_OUT) or (inside and OmegaConf.select(cfg, inside) is None))
        if OmegaConf.is_config(value) or gone:
            continue
        meant = key_of(key, keys)
        given = value if type(value) in (int, float) else "..."
        advice = f"write {meant}={given}" if meant else f"set {', '.join(keys)}"
        raise ValueError(f"{key}={_shown(value)}: it has keys of its own, {advice}")
    for key in ("model.optimizer", "model.scheduler"):
        value = OmegaConf.select(cfg, key)
        if value is not None and not OmegaConf.is_dict(value):
            raise ValueError(f"{key}={value}: give a factory ({key}._target_, and _partial_: true) or null")


def stages(cfg: DictConfig) -> dict[str, int]:
    """Epochs of each stage of training, in order; empty for methods without stages.

    Raises:
        ValueError: they are no numbers of epochs.
    """
    given = cfg.model.budget.get("stages") or {}
    if not isinstance(given, Mapping):
        raise ValueError("model.budget.stages: give each stage its epochs, such as {pretrain: 50, detect: 100}")
    for name, epochs in given.items():
        refuse_fewer(0, "model.budget.stages", **{str(name): epochs})
    return {str(name): int(epochs) for name, epochs in given.items()}


def _refuse_budget(cfg: DictConfig) -> None:
    budget, own = cfg.model.budget, stages(cfg)
    if (budget.epochs is not None) + (budget.steps is not None) + bool(own) > 1:
        each = f"; of stages, change model.budget.stages.{next(iter(own))} and the like" if own else ""
        raise ValueError(f"give model.budget one of epochs, steps and stages, and null for the others{each}")
    given = {name: budget[name] for name in ("epochs", "steps") if budget[name] is not None}
    refuse_fewer(0, "model.budget", **given)


def augmentation(cfg: DictConfig) -> dict[str, Any] | None:
    """``model.input.augment``: arguments of `anomaly_lab.data.Augment`; None: training images stay as they are.

    Raises:
        ValueError: a key that there is not, a value outside of its range, or a run that would not be changed by it.
    """
    given = cfg.model.input.get("augment")
    if given is None:
        return None
    names = ("shift", "flip", "crop", "rotation")
    if not OmegaConf.is_dict(given) or (wrong := sorted({*map(str, given)} - {*names})):
        named = ", ".join(wrong) if OmegaConf.is_dict(given) else given
        raise ValueError(f"model.input.augment has no {named}: give some of shift, flip, crop and rotation, or null")
    parts = {str(key): value for key, value in given.items()}
    refuse_ranges(**parts)
    if cfg.model.input.get("features") is not None:
        raise ValueError("model.input.augment: fixed features are computed once for each image: set one to null")
    if cfg.model.optimizer is None:
        raise ValueError(
            f"model.input.augment would change nothing: {cfg.choices.model} takes no training steps (it has no "
            "gradients): set it to null"
        )
    if cfg.trainer.cuda_graphs:
        raise ValueError(
            "model.input.augment: a captured step would repeat its first draws: set trainer.cuda_graphs=false"
        )
    return parts


def refuse_ranges(*, shift: Any = 0, flip: Any = False, crop: Any = 1, rotation: Any = 0) -> None:
    """Raise ValueError for an augmentation outside of its range: see `anomaly_lab.data.Augment`."""
    numbers = (shift, crop, rotation)
    if (
        any(type(number) not in (int, float) or number < 0 for number in numbers)
        or not 0 < crop <= 1
        or type(flip) is not bool
    ):
        raise ValueError(
            "model.input.augment: give shift (pixels) and rotation (degrees) from 0, crop above 0 up to 1, "
            "flip true or false"
        )
