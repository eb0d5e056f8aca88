"""What a key that does not exist may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from anomaly_lab import config


def unknown_key(error: Exception) -> str | None:
    """The key that an override sets and no file has; None for other errors."""
    cause = error.__cause__
    if isinstance(error, HydraException) and isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return str(cause.full_key)
    return None


def advice(error: Exception, overrides: Sequence[str]) -> str | None:
    """Of an override that names no key: a line with the keys it may mean; None for other errors, or without any."""
    wrong = unknown_key(error)
    if wrong is None:
        return None
    near = _near(wrong, [word for word in overrides if word.split("=")[0] in (*config.GROUPS, "experiment")])
    if not near:
        return None
    value = next((word.partition("=")[2] for word in overrides if word.partition("=")[0] == wrong), "...")
    others = f" (or {', '.join(near[1:3])})" if near[1:] else ""
    return f"{wrong} cannot be set: write {near[0]}={value}{others}; anomaly-lab --cfg job shows all keys"


def _near(wrong: str, groups: Sequence[str]) -> list[str]:
    """Keys, and groups, with the last word of the key ``wrong`` or nearly so, the most alike first."""
    try:
        cfg = config.compose(config.without_sweeps(groups))
    except HydraException:
        cfg = config.compose()
    found = set(config.GROUPS)
    for top, section in OmegaConf.to_container(cfg).items():  # type: ignore[union-attr]
        for key in config.flatten(section, str(top)):
            found |= {key.rsplit(".", cut)[0] for cut in range(key.count(".") + 1)}
    last = wrong.rpartition(".")[2]
    words = {key.rpartition(".")[2] for key in found if not key.startswith("choices") and not key.endswith("_")}
    same = {last} & words or difflib.get_close_matches(last, words, n=2, cutoff=0.75)
    alike = [key for key in found if key.rpartition(".")[2] in same and not key.startswith("choices")]
    return sorted(alike, key=lambda key: (-difflib.SequenceMatcher(None, key, wrong).ratio(), key))
