"""Configurations: where they lie, how they are composed, and what makes two runs the same run.

Imports neither torch nor Lightning: a dry run over hundreds of runs, a status report and ``--help`` stay quick.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.utils import _locate
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from anomaly_lab import record, values

if TYPE_CHECKING:
    from anomaly_lab.datasets import Dataset
    from anomaly_lab.images import Images
    from anomaly_lab.splits import Split, Target

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent / "conf"
CONFIG_DIR = _CHECKOUT if (_PACKAGE.parent / "pyproject.toml").is_file() else _PACKAGE / "conf"
"""The checkout's ``conf/`` where there is one (a packed copy goes stale), else the copy inside the wheel."""

EXTRA_CONFIGS = "ANOMALY_LAB_CONF"
"""Environment variable: a folder with further ``model/``, ``dataset/``, ``split/`` or ``experiment/`` files."""

GROUPS = ("model", "dataset", "split", "trainer")
"""The config groups whose choice, with the class and the seed, names a run."""

IDENTITY = ("model", "dataset", "split", "trainer.precision", "trainer.threshold_quantile")
"""Sections and keys that can change a result. Everything else (logger, paths, device, threads, progress) cannot."""

NOT_IDENTITY = ("dataset.data_dir", "dataset.path", "dataset.name")
"""Paths of the data (their checksum counts instead), and their name (the identity has it already). A ``path`` beside a
``sha256`` does not count either: the checksum identifies the file."""

OF_STEPS = ("model.budget.", "model.batch_size", "model.scheduler", "model.clip")
"""Keys that only training steps read. They are no part of the identity of a method without steps (``optimizer: null``),
so an experiment's grid may change them and include such a method once."""

LATER = {
    **{"model.input.features": None, "model.input.augment": None, "model.members": None},
    **{"split.known.rate": 0, "split.known.classes": None, "split.val_share": 0.1, "dataset.skip_broken": False},
    **{"model.detector.svm_sees": "in_use", "model.detector.contrast": False, "model.detector.offset": 0.0},
}
"""Keys that came after the first committed results, with the value at which a run is what it was without them."""

NAMES_OF_RUNS = ("normal_class", "abnormal_class", "seed")
"""Top-level keys that name a run."""

TOP_LEVEL = (*NAMES_OF_RUNS, "size", "runs", "data_dir")
"""Top-level keys that choose no file."""

UNCHECKED = ("model.input.", "trainer.")
"""Sections whose numbers nobody else holds to be some; the others say more of theirs where they are used."""

SMALL = "_small"
"""Ends the name of a run's model where its size is reduced: in folders, in tables, in every committed result."""


def _size(cfg: DictConfig) -> str:
    size = cfg.get("size")
    if size not in ("full", "small"):
        raise ValueError(f"size={size}: choose full, the paper's, or small")
    return str(size)


def _of_size(full: Any, small: Any, *, _root_: DictConfig) -> Any:
    """``${size:64,16}``: 64 where the whole configuration says ``size: full``, 16 where it says ``size: small``."""
    return full if _size(_root_) == "full" else small


OmegaConf.register_new_resolver("size", _of_size, replace=True)  # composing and making runs import this module


def search_path() -> list[str]:
    """The override that makes Hydra see the folder in ``ANOMALY_LAB_CONF``; none where it is not set.

    Raises:
        ValueError: the variable names no folder, or a file there has the name of one of ours, which would win.
    """
    extra = os.environ.get(EXTRA_CONFIGS)
    if not extra:
        return []
    if not Path(extra).is_dir():
        raise ValueError(f"{EXTRA_CONFIGS}={extra} is not a folder: name the one with your model/*.yaml, or unset it")
    for path in _of_the_user():
        if (CONFIG_DIR / path.relative_to(extra)).exists():
            raise ValueError(
                f"{path} has the name of a config of anomaly_lab, which would be used: give it another name"
            )
    return [f"hydra.searchpath=['file://{Path(extra).resolve()}']"]


def _of_the_user() -> list[Path]:
    """The yamls in the folder in ``ANOMALY_LAB_CONF``."""
    extra = os.environ.get(EXTRA_CONFIGS)
    # An editor's lock is a link to nowhere beside the file, with its ending.
    return sorted(path for path in Path(extra).rglob("*.yaml") if path.is_file()) if extra else []


def _written() -> tuple[object, ...]:
    """What changes when the user's yamls do: part of the key under which something made of them is cached."""
    return (*search_path(), *((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in _of_the_user()))


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration of one run, as ``anomaly-lab OVERRIDES`` sees it, with the group choices under ``choices``.

    Composing takes a tenth of a second: half a minute for a table of three hundred runs. So a process composes each
    choice of files once, and sets the other keys afterwards, as Hydra does.

    Raises:
        hydra.errors.HydraException: an override that does not parse, or names no config or key.
    """
    files = tuple(word for word in overrides if not _SETS_A_KEY.match(word))
    try:
        before = _composed(_canonical(files), _written())
        return _with_keys(before.copy(), overrides, before)
    except (HydraException, OmegaConfBaseException):
        return without_hydra(compose_with_hydra(overrides))  # it raises, and names the override


_SETS_A_KEY = re.compile(rf"({'|'.join(TOP_LEVEL)}|(?!hydra\.)\w+(\.\w+)+)=")
"""Overrides that choose no file."""


def _canonical(files: tuple[str, ...]) -> tuple[str, ...]:
    """The same choice in one order and without what is chosen anyway: one composition for all that ask for it."""
    groups = [word.partition("=")[0] for word in files]
    if "experiment" in groups or len({*groups}) < len(groups):
        return files  # an experiment chooses files itself; what is chosen twice is for Hydra to judge
    return tuple(sorted(word for word in files if word not in _chosen_anyway()))


@functools.cache
def _chosen_anyway() -> frozenset[str]:
    defaults = OmegaConf.load(CONFIG_DIR / "train.yaml").defaults
    return frozenset(f"{group}={name}" for one in defaults if OmegaConf.is_dict(one) for group, name in one.items())


@functools.lru_cache(maxsize=256)
def _composed(files: tuple[str, ...], written: tuple[object, ...]) -> DictConfig:
    """What is composed of ``files`` alone, of the user's own as they were ``written`` last."""
    return without_hydra(compose_with_hydra(files))


@functools.lru_cache(maxsize=4096)
def _parsed(word: str) -> tuple[str, Any]:
    """The key and the value of an override."""
    [override] = OverridesParser.create().parse_overrides([word])
    if override.is_sweep_override():
        raise ConfigCompositionException(f"{word} asks for several runs")
    return override.get_key_element(), override.value()


def _with_keys(cfg: DictConfig, words: Sequence[str], before: DictConfig) -> DictConfig:
    """Set what chooses no file; 1e3, a float to Hydra, is 1000 where ``before`` has a whole number or null."""
    for word in words:
        if _SETS_A_KEY.match(word):
            key, value = _parsed(word)
            if isinstance(value, float) and not isinstance(OmegaConf.select(before, key), float):
                value = _plain(value)
            OmegaConf.update(cfg, key, value, merge=True)
    return cfg


@contextmanager
def _hydra() -> Iterator[None]:
    # Inside a running Hydra job the global state is taken; put it aside and restore it.
    state = GlobalHydra.instance().hydra
    GlobalHydra.instance().hydra = None
    try:
        with initialize_config_dir(str(CONFIG_DIR), job_name="anomaly-lab", version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = state


def compose_with_hydra(overrides: Sequence[str]) -> DictConfig:
    """All that Hydra composes, its own section included."""
    with _hydra():
        return hydra_compose("train", overrides=[*overrides, *search_path()], return_hydra_config=True)


def parse(overrides: Sequence[str]) -> list[Override]:
    """Overrides as Hydra understands them, those that ask for several runs included."""
    loader = None
    if any("glob(" in word for word in overrides):  # its names come from the folders of conf/
        with _hydra():
            loader = GlobalHydra.instance().config_loader()
    return OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))


def without_hydra(composed: DictConfig) -> DictConfig:
    """The configuration of one run out of all that Hydra composed."""
    cfg = composed.copy()
    with open_dict(cfg):
        del cfg["hydra"]
    return with_choices(cfg, composed.hydra)


def with_choices(cfg: DictConfig, hydra: Any) -> DictConfig:
    """``cfg``, which ``hydra`` composed, with the names of its groups, so that it says where it came from; 1e3 is 1000.

    Raises:
        ValueError: a name leaves its group's folder, such as ``model=../dataset/digits``; folders are named after it.
    """
    choices, words = hydra.runtime.choices, hydra.overrides.task
    for group in (*GROUPS, "experiment"):
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", choices[group] or "none"):
            raise ValueError(
                f"{group}={choices[group]}: name a yaml in conf/{group}, by letters, digits, '.', '_', '-'"
            )
    with open_dict(cfg):
        cfg.choices = {group: choices[group] for group in (*GROUPS, "experiment")}
    if any(isinstance(_parsed(word)[1], float) for word in words if _SETS_A_KEY.match(word)):
        _with_keys(cfg, words, compose([word for word in words if not _SETS_A_KEY.match(word)]))
    return cfg


def without_sweeps(overrides: Sequence[str]) -> list[str]:
    """The overrides that every job of a multirun shares."""
    parsed = parse(overrides)
    return [text for text, override in zip(overrides, parsed, strict=True) if not override.is_sweep_override()]


def flatten(section: Any, prefix: str) -> dict[str, Any]:
    if isinstance(section, Mapping) and section:
        items = [flatten(value, f"{prefix}.{key}") for key, value in section.items()]
        return {key: value for item in items for key, value in item.items()}
    return {prefix: section}


def _identity_keys(cfg: DictConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for name in IDENTITY:
        value = OmegaConf.select(cfg, name)
        plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        keys |= flatten(plain, name)
    # One canonical form of what is the same partition: the run's own seed is null, classes are rising indices.
    if keys.get("split.seed") == cfg.seed:
        keys["split.seed"] = None
    for name in ("contamination", "known"):
        if keys.get(f"split.{name}.classes") is not None:
            named = getattr(protocol(cfg), name).classes
            keys[f"split.{name}.classes"] = protocol(cfg).indices(load_images(cfg), named)
    if keys.get("split.anomalies", "???") != "???":
        keys["split.anomalies"] = list(protocol(cfg).anomalies)  # type: ignore[attr-defined]
    files = {f"{key.removesuffix('sha256')}path" for key in keys if key.endswith(".sha256")}
    unset = {key for key, before in LATER.items() if keys.get(key) == before}
    unread = OF_STEPS if cfg.model.optimizer is None else ()
    left_out = {*NOT_IDENTITY, *files, *unset}
    return {k: v for k, v in keys.items() if k not in left_out and not k.startswith(unread)}


class _Defaults(NamedTuple):
    keys: dict[str, Any]  # those of the identity
    sections: dict[str, tuple[str, ...]]  # keys that have keys of their own, and those
    sizes: bool  # whether the model's yaml has two sizes
    switches: tuple[str, ...]  # keys whose default is true or false
    numbers: tuple[str, ...]  # keys of the `UNCHECKED` whose default is a number


@functools.lru_cache(maxsize=256)
def _defaults(size: str, choices: tuple[str, ...], written: tuple[object, ...]) -> _Defaults:
    """What the yamls of the chosen groups say at that size, the user's own as they were ``written`` last."""
    groups = zip(GROUPS, choices, strict=True)
    cfg = compose([f"size={size}", *(f"{group}={choice}" for group, choice in groups)])
    plain = {group: OmegaConf.to_container(cfg[group], resolve=True) for group in GROUPS}
    flat = {key: value for group in GROUPS for key, value in flatten(plain[group], group).items()}
    parts = {key: tuple(map(str, part)) for key, part in values.sections(plain)}
    switches = tuple(key for key, value in flat.items() if type(value) is bool)
    numbers = tuple(key for key, value in flat.items() if key.startswith(UNCHECKED) and type(value) in (int, float))
    return _Defaults(_identity_keys(cfg), parts, "${size:" in OmegaConf.to_yaml(cfg.model), switches, numbers)


def _defaults_of(cfg: DictConfig) -> _Defaults:
    return _defaults(_size(cfg), tuple(cfg.choices[group] for group in GROUPS), _written())


def reduced(cfg: DictConfig) -> bool:
    """Whether the method of ``cfg`` is smaller than its paper's: ``size=small``, and its yaml has a small size.

    Raises:
        ValueError: ``size`` is neither full nor small.
    """
    has_sizes = _defaults_of(cfg).sizes
    rest = tuple(cfg.choices[group] for group in GROUPS[1:])
    sized = (_defaults(_size(cfg), (name, *rest), _written()).sizes for name in _named_members(cfg))
    return (has_sizes or any(sized)) and _size(cfg) == "small"


def model_name(cfg: DictConfig) -> str:
    """How a run names its model, in its folder and in tables: ``ganomaly``, or ``ganomaly_small`` where `reduced`."""
    return str(cfg.choices.model) + SMALL * reduced(cfg)


def settings(cfg: DictConfig, keys: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every key that can change a result with its value, and the checksum of the images: kept with what was made.

    A fused run's settings include its members', prefixed with their names. ``keys`` are those of ``cfg`` itself where
    they have been taken out of it before, which takes longest.
    """
    own = dict(keys or _identity_keys(cfg)) | {"images": load_images(cfg).sha256}
    for member in members(cfg):
        own |= {f"{member.identity['model']}.{key}": value for key, value in _identity_keys(member.cfg).items()}
    return own


def changed(cfg: DictConfig, keys: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every key that can change a result and is not the default of the chosen groups; ``keys`` as in `settings`."""
    own = keys or _identity_keys(cfg)
    default = _defaults_of(cfg).keys
    differing = (key for key in sorted(own.keys() | default.keys()) if own.get(key) != default.get(key))
    return {key: _plain(own.get(key)) for key in differing}


def refuse_missing_keys(cfg: DictConfig, *, learns: bool = False) -> None:
    """Name every key that a method's yaml lacks; imports the classes that its ``detector`` names.

    Args:
        learns: the method has players, which need an optimiser and a budget.

    Raises:
        ValueError: a key of ``model`` is ``???``, or an argument without a default is not given.
    """
    model = cfg.model
    detector = OmegaConf.to_container(model.detector, resolve=True)
    missing = {*map(str, OmegaConf.missing_keys(model)), *_missing_arguments(detector, "model.detector")}
    if learns and model.optimizer is None:
        missing.add("model.optimizer")
    if learns and not any(model.budget.get(kind) is not None for kind in ("epochs", "steps", "stages")):
        missing.add("model.budget.epochs (or .steps or .stages)")
    missing.discard("model.detector.image_shape")  # comes from the data
    if missing:
        raise ValueError(f"{_yaml_of(cfg.choices.model)} lacks {', '.join(sorted(missing))}")


def _missing_arguments(section: Any, prefix: str) -> Iterator[str]:
    if not isinstance(section, Mapping):
        return
    if "_target_" in section and not section.get("_partial_") and "_args_" not in section:
        try:
            parameters = list(inspect.signature(_locate(section["_target_"])).parameters.values())
        except Exception:  # no such class: Hydra says so in its own words
            parameters = []
        for parameter in parameters:
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if named and parameter.default is parameter.empty and parameter.name not in section:
                yield f"{prefix}.{parameter.name}"
    for key, value in section.items():
        yield from _missing_arguments(value, f"{prefix}.{key}")


def _yaml_of(model: str) -> str:
    extra = os.environ.get(EXTRA_CONFIGS)
    folders = [CONFIG_DIR, Path(extra)] if extra else [CONFIG_DIR]
    files = (folder / "model" / f"{model}.yaml" for folder in folders)  # none for runs of configs that are gone
    return next((str(file) for file in files if file.is_file()), f"model={model}")


def _plain(value: Any) -> Any:
    """2.0 as 2, in lists too: written either way on a command line it is the same number, and must be the same run."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def reader(section: DictConfig) -> Dataset:
    """The data set that a ``dataset`` section describes.

    Raises:
        ValueError: it has the name of one of anomaly_lab's, among whose runs its own would stand, and another reader.
    """
    found: Dataset = instantiate(section)
    ours = CONFIG_DIR / "dataset" / f"{found.name}.yaml"
    if ours.is_file() and OmegaConf.load(ours)._target_ != section._target_:
        name = found.name
        raise ValueError(f"dataset.name={name} is the name of dataset={name}: choose that, or give yours another name")
    return found


@functools.lru_cache(maxsize=4)
def _images(dataset: str) -> Images:
    # Below its own name, by which an error tells where a value is missing.
    return reader(OmegaConf.create({"dataset": json.loads(dataset)}).dataset).load()


@functools.lru_cache(maxsize=2)
def _beside(dataset: str, others: tuple[str, ...]) -> Images:
    from anomaly_lab.images import beside

    return beside(_images(dataset), [_images(other) for other in others])


@functools.cache
def _described(dataset: str, data_dir: str) -> str:
    cfg = compose([f"dataset={dataset}"])
    cfg.data_dir = data_dir
    if missing := sorted(OmegaConf.missing_keys(cfg.dataset)):
        raise ValueError(
            f"split.anomalies={dataset} lacks {' and '.join(missing)}: put a dataset/NAME.yaml that gives them into a "
            f"folder, name that in {EXTRA_CONFIGS}, and write split.anomalies=NAME"
        )
    return json.dumps(OmegaConf.to_container(cfg.dataset, resolve=True, throw_on_missing=True))


def load_images(cfg: DictConfig) -> Images:
    """The data set of ``cfg``, with those that ``split.anomalies`` names; one copy a process, for all its runs."""
    own = json.dumps(OmegaConf.to_container(cfg.dataset, resolve=True))
    if not cfg.split.get("anomalies"):
        return _images(own)
    others = protocol(cfg).anomalies  # type: ignore[attr-defined]
    return _beside(own, tuple(_described(name, str(cfg.data_dir)) for name in others))


@functools.lru_cache(maxsize=16)
def _protocol(split: str) -> Split:
    return instantiate(OmegaConf.create({"split": json.loads(split)}).split, _convert_="all")


def protocol(cfg: DictConfig) -> Split:
    """The split of ``cfg``; one immutable object a process."""
    return _protocol(json.dumps(OmegaConf.to_container(cfg.split, resolve=True)))


def target(cfg: DictConfig) -> Target:
    """Zero-based index of the class that the run names: the normal one, or with ``one_abnormal`` the abnormal one.

    Where the run names several, their indices, rising.

    Raises:
        ValueError: the other role's class was given, or a class that is none of the data set's.
    """
    split = protocol(cfg)
    role, other = ("normal_class", "abnormal_class")[:: 1 if split.role == "normal" else -1]
    if cfg[other] is not None:
        raise ValueError(f"split={cfg.choices.split} names the {split.role} class: write {role}={cfg[other]}")
    images, named = load_images(cfg), cfg[role]
    if named is None:
        return split.default(images)
    classes = split.classes(images)
    for one in named if OmegaConf.is_list(named) else [named]:
        index = int(one) if type(one) is int and 0 <= one < len(classes) else None
        if index is not None and str(one) in classes and classes[index] != str(one):
            other = classes[index]
            raise ValueError(
                f"{role}={one} is the name of class {classes.index(str(one))} and the index of class {other}: "
                f"""write {role}="'{one}'" or {role}={f'"{chr(39)}{other}{chr(39)}"' if other.isdecimal() else other}"""
            )
    return split.resolve(images, list(named) if OmegaConf.is_list(named) else named)


@dataclass(frozen=True)
class Job:
    """One run, before and after it is made: what it is, where it lies, and what can change its result.

    Made once for a run (`job`) and handed on; nothing else derives a name, a folder or settings from a configuration.
    """

    cfg: DictConfig
    """The whole configuration, with the names of the chosen groups under ``choices``."""
    identity: Mapping[str, Any]
    """What makes a run the same run: model, dataset, split, normal_class, seed, and what was changed.

    ``normal_class`` is an index; of several classes ``"0+1"``, or ``"all"``.
    """
    out: Path
    """``<runs>/<model>/<dataset>/<split>/n<class>/s<seed>`` (``a<class>`` for an abnormal class), with a hash of what
    was changed where anything was."""
    keys: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    """What ``settings`` begin with, where `job` has taken it out of ``cfg``."""

    @property
    def split(self) -> Split:
        """The protocol."""
        return protocol(self.cfg)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """Every key that can change a result with its value, and the checksum of the images. Decodes the data set."""
        return settings(self.cfg, self.keys)

    @property
    def path(self) -> str:
        """The run's folder below ``runs``, as reports name it."""
        return self.out.relative_to(self.cfg.runs).as_posix()

    def refuse_other_run(self, identity: Mapping[str, Any], file: Path) -> None:
        """What lies in the folder must be this run's own: a copied checkpoint would be scored as another class's.

        Raises:
            ValueError: ``file`` is of a run with another ``identity``.
        """
        if other := record.other(identity, self.identity):
            raise ValueError(f"{file} is of another run, {other}: it was copied there, delete it")

    def refuse_other_settings(self, kept: Mapping[str, Any]) -> None:
        """A run's name follows from the defaults of its groups; after an edit of those its old result is not its own.

        Raises:
            ValueError: what lies in the folder was made with other settings (``kept``).
        """
        now = json.loads(json.dumps(self.settings))
        differing = sorted(key for key in kept.keys() | now.keys() if kept.get(key) != now.get(key))
        if differing:
            some = ", ".join(f"{key}={kept.get(key)} (now {now.get(key)})" for key in differing[:3])
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise ValueError(
                f"{self.out} was made with {some}{more}: delete that folder to make it anew, "
                "or give the model or the data another name"
            )

    def finished(self) -> dict[str, Any] | None:
        """The run's ``result.json``; None where it is still to be made.

        Raises:
            ValueError: the file is damaged, of another run, or made from other defaults than today's.
        """
        path = self.out / "result.json"
        if not path.is_file():
            return None
        result = record.read(self.out)
        self.refuse_other_run(result["identity"], path)
        try:
            settings_then = result["settings"]
            then, found = result["config"]["trainer"], result["metrics"]
            watched = then["watch_test"] or found["oracle_auroc"] is not None
            # Both after every epoch; a method that is scored only after its fit has neither.
            both = then["watch_test"] and then["measure_leak"]
            together = both or found.get("oracle_sorted_best_auroc") is not None
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it and run again") from error
        self.refuse_other_settings(settings_then)
        # They change no score, so are no part of the identity; but a metric asked for and not recorded must be made.
        unwatched = self.cfg.trainer.watch_test and not watched
        measure = self.cfg.trainer.measure_leak and not self.cfg.model.members  # which have no batch norm together
        unmeasured = measure and "oracle_sorted_auroc" not in found
        apart = measure and self.cfg.trainer.watch_test and not together
        return None if unwatched or unmeasured or apart else result


def _named(cfg: DictConfig) -> int | str:
    """The class of a run, as its identity and its folder have it."""
    named = target(cfg)
    if isinstance(named, int):
        return named
    everything = len(named) == len(protocol(cfg).classes(load_images(cfg)))
    return "all" if everything else "+".join(map(str, named))


def refuse_impossible(cfg: DictConfig) -> dict[str, Any]:
    """Of any run, whatever its data; every key of ``cfg`` that can change a result.

    Raises:
        ValueError: see `values.refuse`; or a number that is not finite.
    """
    _size(cfg)
    default = _defaults_of(cfg)
    values.refuse(cfg, default.sections, default.switches, default.numbers)
    keys = _identity_keys(cfg)
    for key, value in keys.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}={value}: give a finite number")
    return keys


def job(cfg: DictConfig) -> Job:
    """The run that ``cfg`` describes.

    Raises:
        ValueError: see `refuse_impossible`, `target`, `reduced` and `semi_supervised`.
    """
    keys = refuse_impossible(cfg)
    if cfg.split.known.rate:  # else not even the method's class is imported
        semi_supervised(cfg)
    own_changes = changed(cfg, keys)
    lost = [key for key in own_changes if key.startswith("model.") and key != "model.members"]
    if cfg.model.members and lost:
        raise ValueError(f"{lost[0]} cannot be set: {cfg.choices.model} adds up its members' runs at their defaults")
    own = {
        "model": model_name(cfg),
        "dataset": cfg.dataset.name,
        "split": cfg.choices.split,
        "normal_class": _named(cfg),
        "seed": cfg.seed,
        "changed": own_changes,
    }
    out = Path(cfg.runs) / record.place(own, protocol(cfg).role)
    return Job(cfg, own, out, keys)


def semi_supervised(cfg: DictConfig) -> bool:
    """Whether the method of ``cfg`` asks for known anomalies; imports its class.

    Raises:
        ValueError: the split has some and the method asks for none.
    """
    if cfg.model.members:
        return False  # each member is asked for itself
    try:
        asks = bool(getattr(_locate(cfg.model.detector._target_), "SEMI_SUPERVISED", False))
    except Exception:  # no such class: Hydra says so in its own words
        return False
    if cfg.split.known.rate and not asks:
        raise ValueError(
            f"split.known.rate={cfg.split.known.rate}: {cfg.choices.model} learns from no known anomalies (it is "
            "not SEMI_SUPERVISED): set split.known.rate=0, or choose a method that does"
        )
    return asks


def caution(job: Job) -> str | None:
    """What is possible and hardly meant."""
    rate = job.split.contamination.rate
    if rate <= 0.5:
        return None
    return f"split.contamination.rate={rate}: most of the training images ({rate:.0%}) are anomalies, and none is known"


def _named_members(cfg: DictConfig) -> list[str]:
    """The models whose scores the run ``cfg`` adds up; none where it has a detector of its own.

    Raises:
        ValueError: neither a detector nor different models are named, or both.
    """
    own, names = cfg.model.get("detector"), cfg.model.get("members")
    if own is not None and not names:
        return []
    if own is not None:
        raise ValueError(f"model.members={names}: {cfg.choices.model} has a detector of its own: use model=fused")
    if not OmegaConf.is_list(names) or not 1 < len(set(names)) == len(names):
        raise ValueError(
            f"model.members={names}: name at least two different models: model=fused 'model.members=[pca,knn]'"
        )
    return list(names)


def members(cfg: DictConfig) -> list[Job]:
    """The runs whose scores the run ``cfg`` adds up; none where it has a detector of its own.

    Raises:
        ValueError: see `_named_members`; or one of them is itself made of others.
    """
    found = []
    for name in _named_members(cfg):
        groups = [f"{group}={cfg.choices[group]}" for group in GROUPS if group != "model"]
        member = compose([f"model={name}", f"size={cfg.size}", *groups])
        if member.model.members:
            raise ValueError(f"model.members: {name} is made of others itself; name those")
        for key in ("dataset", "split", "trainer", "logger", "runs", "data_dir", *NAMES_OF_RUNS):
            member[key] = cfg[key]
        found.append(job(member))
    return found
