"""What a key that does not exist may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from anomaly_lab import config, values

NEIGHBOURS = {
    **dict.fromkeys(("data", "datamodule"), "dataset={}"),
    **dict.fromkeys(("class", "category", "class_name"), "normal_class={}"),
    **dict.fromkeys(("learning_rate", "base_lr"), "model.optimizer.lr={}"),
    **dict.fromkeys(("max_epochs", "n_epochs", "num_epochs"), "model.budget.epochs={}"),
    "max_steps": "model.budget.steps={} model.budget.epochs=null",
    **dict.fromkeys(("image_size", "img_size", "isize"), "model.input.size={}"),
    "device": "trainer.accelerator={}",
    **dict.fromkeys(("devices", "gpu", "gpus"), "trainer.accelerator=cuda"),
    **dict.fromkeys(("num_workers", "workers", "n_jobs"), "trainer.threads={}"),
    "threshold": "trainer.threshold_quantile={}",
    "contamination": "split.contamination.rate={}",
    "anomalies": "split=ood split.anomalies={}",
}
"""What users of anomalib, PyOD, GANomaly and Lightning write, and what it is here."""


def unknown_key(error: Exception) -> str | None:
    """The key that an override sets and no file has; None for other errors."""
    cause = error.__cause__
    if isinstance(error, HydraException) and isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return str(cause.full_key)
    return None


def advice(error: Exception, overrides: Sequence[str]) -> str | None:
    """Of an override that names no key: a line with the keys it may mean; None for other errors, or without any.

    Also of one that names no file of its group, but a number or null.
    """
    if "Config group override must be" in str(error):
        chosen = {
            one.get_key_element(): one for one in config.parse(overrides) if not isinstance(one.value(), str | list)
        }
        name, one = next((n, one) for n, one in chosen.items() if "." not in n and n not in config.TOP_LEVEL)
        return f"{one.input_line}: {name} is chosen by name, {name}=NAME; anomaly-lab --help shows all"
    wrong = unknown_key(error)
    if wrong is None:
        return None
    keys = _keys([word for word in overrides if word.split("=")[0] in (*config.GROUPS, "experiment")])
    value = next((word.partition("=")[2] for word in overrides if word.partition("=")[0] == wrong), "...")
    known = NEIGHBOURS.get(wrong.rpartition(".")[2], "")
    if known and all(word.partition("=")[0] in keys or "split=ood" in known for word in known.split()):
        return f"{wrong} cannot be set: write {known.format(value)}; anomaly-lab --cfg job shows all keys"
    near = _near(wrong, keys)
    if not near:
        return None
    if keys[near[0]] != near[0] and not value.replace(".", "", 1).isdecimal():
        value = "..."  # a section's own key has a number
    first, *others = dict.fromkeys(keys[key] for key in near)
    also = f" (or {', '.join(others[:2])})" if others else ""
    return f"{wrong} cannot be set: write {first}={value}{also}; anomaly-lab --cfg job shows all keys"


def _keys(groups: Sequence[str]) -> dict[str, str]:
    """By every key that is there, and every group, what to write for it: itself, or of a section one of its own."""
    try:
        cfg = config.compose(config.without_sweeps(groups))
    except HydraException:
        cfg = config.compose()
    plain: Any = OmegaConf.to_container(cfg)
    del plain["choices"]
    found = {key: key for top, section in plain.items() for key in config.flatten(section, str(top))}
    meant = {key: values.key_of(key, own) for key, own in values.sections(plain)}
    return {**found, **{key: own for key, own in meant.items() if own}, **{group: group for group in config.GROUPS}}


def _near(wrong: str, keys: dict[str, str]) -> list[str]:
    """The keys with the last word of ``wrong`` or nearly so, the most alike first."""
    last = wrong.rpartition(".")[2]
    words = {key.rpartition(".")[2] for key in keys if not key.endswith("_")}
    same = {last} & words or difflib.get_close_matches(last, words, n=2, cutoff=0.75)
    alike = [key for key in keys if key.rpartition(".")[2] in same]
    return sorted(alike, key=lambda key: (-difflib.SequenceMatcher(None, key, wrong).ratio(), key))
