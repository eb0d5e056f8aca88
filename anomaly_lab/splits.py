"""Protocols: who is normal, what trains, what is held out, what tests.

A `Split` is a frozen set of parameters and a pure function of (images, class, seed): the same arguments give the same
`Partition` on every machine and in every later release. A change that could move a single image must raise the
protocol's version.

Every random choice is drawn class by class, from NumPy's `RandomState` (its streams are frozen, unlike `Generator`'s)
seeded with the SHA-256 of "protocol/version/purpose/seed/class name". So a draw for one class does not depend on
which other classes a file holds.

All protocols follow the same order:

1. the protocol cuts the images of the normal and of the anomalous classes into a training and a test part;
2. `max_train` thins the normals of the training part;
3. a tenth of them (`val_share`), at least 5, is held out as `val` (thresholds and model selection see nothing else);
4. contamination adds anomalies from the training part of the anomalous classes to what is left to train on;
5. known anomalies are drawn from what contamination left of that part, for methods that ask for them;
6. `max_test` thins the test part.

Steps 2 to 5 leave the test images as they are (except in `one_abnormal`, where the anomalies are one pool).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from anomaly_lab.images import Images

Indices = NDArray[np.int64]

Target = int | tuple[int, ...]
"""The class that a run names, as a zero-based index; several of them, rising, where it names several."""

FEWEST_NORMALS = 10
"""Training images of the normal class below which there is nothing to learn and to hold out."""

# fmt: off
PIAD_OBJECTS = tuple(f"obj{n}" for n in (
    79, 48, 65, 98, 73, 13, 14, 39, 57, 28, 42, 75, 44, 24, 82,
    56, 7, 47, 68, 30, 33, 90, 70, 87, 12, 91, 4, 22, 71, 55,
))
# fmt: on
"""The 30 normal objects of COIL-100 in PIAD's published code (whose class 0 is obj100)."""


@dataclass(frozen=True, eq=False)
class Partition:
    """Which images train, which are held out, which test, as rising indices into the `Images`."""

    train: Indices  # (T,) contaminating anomalies included
    train_truth: NDArray[np.uint8]  # (T,) 0 normal, 1 anomalous; for reports, given to no detector but a ceiling
    val: Indices  # (V,) normals only
    test: Indices  # (M,)
    test_truth: NDArray[np.uint8]  # (M,)
    fingerprint: str  # 16 hex digits over the protocol and the content of the images
    labelled: Indices  # (L,) training anomalies that neither train nor test: for `with_labelled` alone
    known: Indices  # (K,) training anomalies that are known to be such: for `with_known` alone

    def with_known(self) -> Partition:
        """The same, training on the known anomalies as well: what a semi-supervised method sees, and no other."""
        return self._training_on(self.known)

    def with_labelled(self) -> Partition:
        """The same, training on the labelled anomalies as well: what a supervised ceiling sees, and no detector.

        Raises ValueError when there are none.
        """
        if not len(self.labelled):
            raise ValueError("model.labels=true: this split tests on all anomalies, so there are none to learn from")
        return replace(self._training_on(self.labelled), labelled=self.labelled[:0])

    def _training_on(self, anomalies: Indices) -> Partition:
        train = np.concatenate([self.train, anomalies])
        truth = np.concatenate([self.train_truth, np.ones(len(anomalies), np.uint8)])
        order = np.argsort(train, kind="stable")
        return replace(self, train=train[order], train_truth=truth[order])


@dataclass(frozen=True)
class _Anomalies:
    """Anomalies beside the training normals.

    `rate` is their share of the training images, themselves included, after the validation cut, in [0, 1). `classes`
    are the classes they come from, by name or zero-based index; None stands for all the anomalous ones.
    """

    rate: float = 0.0
    classes: tuple[str | int, ...] | None = None

    key: ClassVar[str]  # of `Split`

    def __post_init__(self) -> None:
        if not (_is_number(self.rate) and 0 <= self.rate < 1):
            raise ValueError(f"split.{self.key}.rate={self.rate} must be at least 0 and below 1")
        if self.classes is not None:
            # A config gives a list of its own kind, a command line a single name.
            single = isinstance(self.classes, str | int)
            object.__setattr__(self, "classes", (self.classes,) if single else tuple(self.classes))


@dataclass(frozen=True)
class Contamination(_Anomalies):
    """Anomalies among the training images, unknown to the detector."""

    key: ClassVar[str] = "contamination"


@dataclass(frozen=True)
class Known(_Anomalies):
    """Anomalies that a semi-supervised detector trains on and knows to be such (Deep SAD's labelled ones)."""

    key: ClassVar[str] = "known"


@dataclass(frozen=True)
class Split(ABC):
    """One protocol with its parameters.

    `contamination` and `known` may be mappings. `max_train` and `max_test` cap the numbers of training normals and of
    test images, keeping the classes' shares and, where possible, an image of each. `seed` None is the run's seed.
    `val_share` of the training normals, at least 5, is held out.
    """

    contamination: Contamination = field(default_factory=Contamination)
    max_train: int | None = None
    max_test: int | None = None
    seed: int | None = None
    known: Known = field(default_factory=Known)
    val_share: float = 0.1

    name: ClassVar[str]
    version: ClassVar[int] = 1
    role: ClassVar[Literal["normal", "abnormal"]] = "normal"  # which class the user names

    def __post_init__(self) -> None:
        if isinstance(self.contamination, Mapping):
            object.__setattr__(self, "contamination", Contamination(**self.contamination))
        if isinstance(self.known, Mapping):
            object.__setattr__(self, "known", Known(**self.known))
        if not (_is_number(self.val_share) and 0 < self.val_share < 1):
            raise ValueError(f"split.val_share={self.val_share}: give a number between 0 and 1")
        for key, least, otherwise in (
            ("max_train", FEWEST_NORMALS, "all"),
            ("max_test", 2, "all"),
            ("seed", 0, "the run's own"),
        ):
            number = getattr(self, key)
            if number is not None and (type(number) is not int or number < least):
                raise ValueError(f"split.{key}={number}: give a whole number from {least}, or null for {otherwise}")

    def __call__(self, images: Images, target: Target, seed: int) -> Partition:
        """Split `images` with class number `target`, or several, as the normal (in `one_abnormal`: the abnormal) one.

        Raises ValueError when the protocol does not fit the data set, the class is not one of `targets`, or
        there are too few images for what was asked.
        """
        for one in _several(target):
            if one not in self.targets(images):
                raise ValueError(self._not_a_target(images, one))
        seed = seed if self.seed is None else self.seed
        name = self.title(images, target)
        normal, anomalous = self._sides(images, target)
        parts = self._parts(images, normal, anomalous, name, seed)

        normals = self._thin(images, [parts.train_normal], self.max_train, "max_train", seed)
        self._refuse_unlearnable(images, normals, name)
        normals, val = self.hold_out(images, normals, seed)
        draw = f"contamination of {name}"
        added = self._anomalies(self.contamination, images, parts.train_anomalous, anomalous, draw, len(normals), seed)
        train = np.sort(np.concatenate([normals, added]))
        left = _without(parts.train_anomalous, added)
        known = self._anomalies(self.known, images, left, anomalous, f"known for {name}", len(train), seed)

        # Only one_abnormal draws these from images that would otherwise be in the test.
        tested_anomalous = _without(parts.test_anomalous, np.concatenate([added, known]))
        tested = {"normal": parts.test_normal, "anomalous": tested_anomalous}
        if absent := [kind for kind, test in tested.items() if not len(test)]:
            alone = ", or train without a test: anomaly_lab.AnomalyDetector, docs/arrays.md"
            raise ValueError(
                f"{images.name} has no {absent[0]} images to test {self.role} class {name!r} on: "
                "choose another class or split" + alone * (len(np.unique(images.labels)) == 1)
            )
        test = self._thin(images, list(tested.values()), self.max_test, "max_test", seed)

        truth = ~np.isin(images.labels, normal)
        self._assert_sound(truth, train, val, test, added, known)
        roles = {"train": train, "val": val, "test": test} | ({"known": known} if len(known) else {})
        return Partition(
            train=train,
            train_truth=truth[train].astype(np.uint8),
            val=val,
            test=test,
            test_truth=truth[test].astype(np.uint8),
            fingerprint=self._fingerprint(images, truth, roles),
            labelled=_without(left, tested_anomalous),
            known=known,
        )

    def classes(self, images: Images) -> tuple[str, ...]:
        """Names of all classes; their positions are the indices that `resolve` gives and `__call__` takes."""
        self._require_fit(images)
        return images.class_names

    def targets(self, images: Images) -> tuple[int, ...]:
        """Indices of the classes that this protocol accepts, in the order of its table."""
        return tuple(range(len(self.classes(images))))

    def _refuse_unlearnable(self, images: Images, normals: Indices, name: str) -> None:
        if len(normals) < FEWEST_NORMALS:
            raise ValueError(
                f"{images.name} has {len(normals)} normal training images for {self.role} class {name!r}: "
                f"at least {FEWEST_NORMALS} are needed"
            )
        first = images.pixels[normals[0]]
        if not any((images.pixels[one] != first).any() for one in normals):
            raise ValueError(
                f"{images.name}: all {len(normals)} normal training images for {self.role} class {name!r} are the same "
                "image: there is nothing to learn"
            )

    def hold_out(self, images: Images, normals: Indices, seed: int) -> tuple[Indices, Indices]:
        """What trains of the training normals, and what is held out."""
        count = max(5, int(Fraction(str(self.val_share)) * len(normals)))  # exact: .29 of 100 are 29
        if len(normals) - count < 5:
            rest = f"{len(normals) - count} of {len(normals)}"
            raise ValueError(f"split.val_share={self.val_share} leaves {rest} normals to train on: lower it")
        val = self._draw(images, normals, count, "val", seed)
        return _without(normals, val), val

    def title(self, images: Images, target: Target) -> str:
        """The name of a class; of several the names, in the order of the alphabet."""
        names = self.classes(images)
        if len(names) > 1 and len(_several(target)) == len(names):
            return f"all {len(names)} classes"
        return " + ".join(sorted(names[one] for one in _several(target)))

    def default(self, images: Images) -> Target:
        """What a run has as its class that names none: the first of `targets`."""
        return self.targets(images)[0]

    def resolve(self, images: Images, named: str | int | Sequence[str | int]) -> Target:
        """Index of the class that was named by its name or its zero-based index; rising, of several.

        An int is always an index; a string is a name, or an index where no class has that name. Raises ValueError
        with the valid classes.
        """
        if isinstance(named, Sequence) and not isinstance(named, str):
            found = tuple(sorted({one for name in named for one in _several(self.resolve(images, name))}))
            if not found:
                raise ValueError(f"no {self.role} class is named: name one or several")
            return found if len(found) > 1 else found[0]
        index = self._index(images, named)
        if index is None or index not in self.targets(images):
            raise ValueError(self._not_a_target(images, named))
        return index

    # What a protocol decides.

    @classmethod
    def _misfit(cls, images: Images) -> str:
        """Why the protocol cannot be used on these images, as the end of a sentence; empty when it can."""
        return ""

    def _members(self, images: Images, index: int) -> list[int]:
        """The labels of one of `classes`."""
        return [index]

    def _sides(self, images: Images, target: Target) -> tuple[list[int], list[int]]:
        """Normal labels and anomalous labels."""
        normal = [label for one in _several(target) for label in self._members(images, one)]
        return normal, [label for label in range(len(images.class_names)) if label not in normal]

    @abstractmethod
    def _parts(self, images: Images, normal: list[int], anomalous: list[int], target: str, seed: int) -> _Parts:
        """Cut the images of both sides into training and test parts; `target` is the class's `title`, for streams."""

    # What is the same for all of them.

    def _require_fit(self, images: Images) -> None:
        if reason := self._misfit(images):
            *others, last = [f"split={kind.name}" for kind in _protocols() if not kind._misfit(images)]
            raise ValueError(f"{images.name} {reason}: use {', '.join(others)} or {last}")

    def _index(self, images: Images, named: str | int) -> int | None:
        names = self.classes(images)
        if isinstance(named, str) and named in names:
            return names.index(named)
        return int(named) if str(named).isdecimal() and int(named) < len(names) else None

    def _not_a_target(self, images: Images, named: str | int) -> str:
        names = self.classes(images)
        valid = ", ".join(f"{names[index]} ({index})" for index in self.targets(images))
        return f"split={self.name} of {images.name} has no class {named!r}: choose name or index among {valid}"

    def _keys(self, images: Images, indices: Indices, purpose: str, seed: int) -> NDArray[np.float64]:
        """One uniform number for each image, drawn by class."""
        keys = np.empty(len(indices))
        labels = images.labels[indices]
        for label in np.unique(labels):
            of_class = labels == label
            text = f"{self.name}/{self.version}/{purpose}/{seed}/{images.class_names[label]}"
            keys[of_class] = _stream(text).random_sample(int(of_class.sum()))
        return keys

    def _draw(self, images: Images, indices: Indices, count: int, purpose: str, seed: int) -> Indices:
        """`count` of the images, uniformly without replacement, in rising order."""
        order = np.argsort(self._keys(images, indices, purpose, seed), kind="stable")
        return np.sort(indices[order[:count]])

    def _thin(self, images: Images, groups: list[Indices], count: int | None, purpose: str, seed: int) -> Indices:
        """At most `count` images of all groups, keeping the shares of groups and of classes in them."""
        labels = [np.unique(images.labels[group], return_counts=True) for group in groups]
        sizes = [len(group) for group in groups]
        if count is None or count >= sum(sizes):
            return np.sort(np.concatenate(groups))
        kinds = [len(present) for present, _ in labels]
        # Every class gets an image if the quota allows; otherwise every group does (a test needs both).
        quotas = _apportion(sizes, count, kinds if count >= sum(kinds) else [1] * len(groups))
        kept = []
        for group, (present, numbers), quota in zip(groups, labels, quotas, strict=True):
            each = _apportion(numbers.tolist(), quota, [int(quota >= len(present))] * len(present))
            for label, n in zip(present, each, strict=True):
                kept.append(self._draw(images, group[images.labels[group] == label], n, purpose, seed))
        return np.sort(np.concatenate(kept))

    def _anomalies(
        self, of: _Anomalies, images: Images, pool: Indices, anomalous: list[int], purpose: str, beside: int, seed: int
    ) -> Indices:
        """Anomalies to train on beside so many other images, out of the pool."""
        if of.classes is not None:
            pool = pool[np.isin(images.labels[pool], self._named_labels(of, images, anomalous))]
        count = round(of.rate * beside / (1 - of.rate))
        if count > len(pool):
            raise ValueError(
                f"split.{of.key}.rate={of.rate} beside {beside} training images needs {count} anomalies, {images.name} "
                f"has {len(pool)} to give: lower the rate or split.max_train, or allow more classes"
            )
        return self._draw(images, pool, count, purpose, seed)

    def seen(self, images: Images, target: Target) -> list[int] | None:
        """The labels of the classes that `contamination` and `known` name, with `target` as in `__call__`.

        None where neither names any. Raises ValueError when a class that is named is not anomalous.
        """
        _, anomalous = self._sides(images, target)
        named = [of for of in (self.contamination, self.known) if of.classes is not None]
        return [label for of in named for label in self._named_labels(of, images, anomalous)] if named else None

    def indices(self, images: Images, named: tuple[str | int, ...]) -> list[int | str]:
        """The classes that are named, each once as an index, rising; unknown names stay last."""
        indices = {self._index(images, one) for one in named}
        unknown = {one for one in named if self._index(images, one) is None}
        return [*sorted(index for index in indices if index is not None), *sorted(map(str, unknown))]

    def _named_labels(self, of: _Anomalies, images: Images, anomalous: list[int]) -> list[int]:
        wanted = of.classes
        assert wanted is not None
        members = {index: self._members(images, index) for index in range(len(self.classes(images)))}
        valid = {index for index, labels in members.items() if set(labels) <= set(anomalous)}
        chosen = [self._index(images, named) for named in wanted]
        if wrong := [named for named, index in zip(wanted, chosen, strict=True) if index not in valid]:
            names = ", ".join(f"{self.classes(images)[index]} ({index})" for index in sorted(valid))
            raise ValueError(f"{of.key} class {wrong[0]!r} is not anomalous here: choose among {names}")
        return [label for index in chosen if index is not None for label in members[index]]

    def _assert_sound(
        self, truth: NDArray[np.bool_], train: Indices, val: Indices, test: Indices, added: Indices, known: Indices
    ) -> None:
        """The one place that holds every protocol to its promise: normals only, nothing twice."""
        together = np.concatenate([train, val, test, known])
        assert len(np.unique(together)) == len(together), "train, val, test and known overlap"
        assert truth[known].all(), "a known anomaly is none"
        assert not truth[val].any(), "val holds anomalies"
        assert np.array_equal(train[truth[train]], added), "train holds anomalies that were not asked for"
        assert self.contamination.rate > 0 or not len(added), "train is contaminated at rate 0"

    def _fingerprint(self, images: Images, truth: NDArray[np.bool_], roles: dict[str, Indices]) -> str:
        """Hash of protocol, version and the images' content by role, truth and class name.

        Positions and class numbers stay out: the same images in a partial file give the same fingerprint.
        """
        total = hashlib.sha256(f"{self.name}/{self.version}/{images.pixels.shape[1:]}".encode())
        by_name = sorted(range(len(images.class_names)), key=images.class_names.__getitem__)
        for role, indices in roles.items():
            for label in by_name:
                of_class = indices[images.labels[indices] == label]
                if not len(of_class):
                    continue
                side = "anomalous" if truth[of_class[0]] else "normal"
                total.update(f"/{role}/{side}/{images.class_names[label]}/{len(of_class)}/".encode())
                total.update(images.pixels[of_class].tobytes())
        return total.hexdigest()[:16]


@dataclass(frozen=True)
class Official(Split):
    """P2: the training half of the normal class trains, the whole official test half tests."""

    name: ClassVar[str] = "official"

    @classmethod
    def _misfit(cls, images: Images) -> str:
        return "" if images.is_test.any() else "has no official test half"

    def _parts(self, images: Images, normal: list[int], anomalous: list[int], target: str, seed: int) -> _Parts:
        trained = set(np.unique(images.labels[~images.is_test]).tolist())
        if missing := [images.class_names[label] for label in normal if label not in trained]:
            names = self.classes(images)
            able = [names[i] for i in self.targets(images) if trained.issuperset(self._sides(images, i)[0])]
            raise ValueError(
                f"{images.name} as stored here has no training images of {', '.join(missing)}: get the "
                "complete data set" + (f", or choose among {', '.join(able)}" if able else "")
            )
        in_normal, in_anomalous = np.isin(images.labels, normal), np.isin(images.labels, anomalous)
        return _Parts(
            train_normal=np.flatnonzero(in_normal & ~images.is_test),
            test_normal=np.flatnonzero(in_normal & images.is_test),
            train_anomalous=np.flatnonzero(in_anomalous & ~images.is_test),
            test_anomalous=np.flatnonzero(in_anomalous & images.is_test),
        )


@dataclass(frozen=True)
class Superclass(Official):
    """CIFAR-100 by its coarse classes: one of them normal, the others anomalous, official halves."""

    name: ClassVar[str] = "superclass"

    @classmethod
    def _misfit(cls, images: Images) -> str:
        return super()._misfit(images) if images.superclass is not None else "has no superclasses"

    def classes(self, images: Images) -> tuple[str, ...]:
        self._require_fit(images)
        return tuple(sorted(set(_superclasses(images))))

    def _members(self, images: Images, index: int) -> list[int]:
        coarse = self.classes(images)[index]
        return [label for label, name in enumerate(_superclasses(images)) if name == coarse]


@dataclass(frozen=True)
class Subclass(Official):
    """CIFAR-100 inside ten of its coarse classes: the first fine class normal, its siblings anomalous.

    First means alphabetically. Jia & Liu 2022 do not name their ten coarse classes; these come from a fixed seed.
    """

    name: ClassVar[str] = "subclass"

    @classmethod
    def _misfit(cls, images: Images) -> str:
        return super()._misfit(images) if images.superclass is not None else "has no superclasses"

    def targets(self, images: Images) -> tuple[int, ...]:
        self._require_fit(images)
        superclasses = _superclasses(images)
        coarse = sorted(set(superclasses))
        drawn = _stream(f"{self.name}/{self.version}/superclasses").permutation(len(coarse))[:10]
        pairs = list(zip(superclasses, images.class_names, strict=True))
        return tuple(pairs.index(min(pair for pair in pairs if pair[0] == coarse[i])) for i in sorted(drawn))

    def _sides(self, images: Images, target: Target) -> tuple[list[int], list[int]]:
        superclasses, normal = _superclasses(images), _several(target)
        families = {superclasses[one] for one in normal}
        siblings = [label for label, name in enumerate(superclasses) if name in families and label not in normal]
        return list(normal), siblings


@dataclass(frozen=True)
class Pooled(Split):
    """P1, by PIAD's rule: halves pooled, 80 % of the normal class trains, as many anomalies as normals test.

    The first floor(0.8 n) images of each permuted class are its training part. The test anomalies are drawn
    uniformly from the test parts of the other classes; all of them where they are fewer than the test normals.
    """

    name: ClassVar[str] = "pooled"

    def _parts(self, images: Images, normal: list[int], anomalous: list[int], target: str, seed: int) -> _Parts:
        train_normal, test_normal = self._cut(images, normal, seed)
        train_anomalous, test_anomalous = self._cut(images, anomalous, seed)
        drawn = self._draw(images, test_anomalous, len(test_normal), f"anomalies for {target}", seed)
        return _Parts(train_normal, test_normal, train_anomalous, drawn)

    def _cut(self, images: Images, labels: list[int], seed: int) -> tuple[Indices, Indices]:
        train: list[Indices] = [np.empty(0, np.int64)]
        for label in labels:
            of_class = np.flatnonzero(images.labels == label)
            train.append(self._draw(images, of_class, 4 * len(of_class) // 5, "cut", seed))
        chosen = np.sort(np.concatenate(train))
        return chosen, _without(np.flatnonzero(np.isin(images.labels, labels)), chosen)


@dataclass(frozen=True)
class Coil(Pooled):
    """P1 on COIL-100 with PIAD's 30 objects as the normal ones, anomalies from all other objects."""

    name: ClassVar[str] = "coil"

    @classmethod
    def _misfit(cls, images: Images) -> str:
        return "" if set(PIAD_OBJECTS) & set(images.class_names) else "is not COIL-100"

    def targets(self, images: Images) -> tuple[int, ...]:
        names = self.classes(images)
        return tuple(names.index(name) for name in PIAD_OBJECTS if name in names)


@dataclass(frozen=True)
class OneAbnormal(Pooled):
    """GANomaly's reverse problem: the target class is abnormal, all others are normal.

    Both halves are pooled, 80 % of each normal class trains, the rest and all abnormal images test. Contamination
    is taken from the abnormal images, so in this protocol alone it changes the test set.
    """

    name: ClassVar[str] = "one_abnormal"
    role: ClassVar[Literal["normal", "abnormal"]] = "abnormal"

    def _sides(self, images: Images, target: Target) -> tuple[list[int], list[int]]:
        return super()._sides(images, target)[::-1]

    def _parts(self, images: Images, normal: list[int], anomalous: list[int], target: str, seed: int) -> _Parts:
        train_normal, test_normal = self._cut(images, normal, seed)
        abnormal = np.flatnonzero(np.isin(images.labels, anomalous))
        return _Parts(train_normal, test_normal, train_anomalous=abnormal, test_anomalous=abnormal)


@dataclass(frozen=True)
class Ood(Official):
    """Out of distribution: classes of the data set are normal, all of them by default; other data sets are anomalous.

    Official halves of both; the other classes of the data set take no part. Each of `anomalies`, by the name of its
    data set, stands as one class behind the data set's own (`anomaly_lab.images.beside`), so every one has its own
    AUROC: near (CIFAR-100 beside CIFAR-10) and far (MNIST).
    """

    anomalies: tuple[str, ...] = ()

    name: ClassVar[str] = "ood"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "anomalies", other_sets(self.anomalies))
        if not self.anomalies:
            raise ValueError("split.anomalies is empty: name another data set, such as split.anomalies=mnist")

    @classmethod
    def _misfit(cls, images: Images) -> str:
        return super()._misfit(images) or "has no other data set beside it"  # so that it is nobody's advice

    def _require_fit(self, images: Images) -> None:
        if not images.is_test.any() or not set(self.anomalies) < set(images.class_names):
            super()._require_fit(images)

    def classes(self, images: Images) -> tuple[str, ...]:
        return tuple(name for name in super().classes(images) if name not in self.anomalies)

    def default(self, images: Images) -> Target:
        return self.targets(images)

    def _sides(self, images: Images, target: Target) -> tuple[list[int], list[int]]:
        return list(_several(target)), [images.class_names.index(name) for name in self.anomalies]

    def indices(self, images: Images, named: tuple[str | int, ...]) -> list[int | str]:
        return [*sorted({str(one) for one in named})]  # other data sets have a name and no index

    def _named_labels(self, of: _Anomalies, images: Images, anomalous: list[int]) -> list[int]:
        assert of.classes is not None
        if wrong := [named for named in of.classes if named not in self.anomalies]:
            names = ", ".join(self.anomalies)
            raise ValueError(f"{of.key} class {wrong[0]!r} is not anomalous here: choose among {names}")
        return [images.class_names.index(str(named)) for named in of.classes]

    def _parts(self, images: Images, normal: list[int], anomalous: list[int], target: str, seed: int) -> _Parts:
        if not images.is_test[np.isin(images.labels, normal)].any():  # the other data sets have a test half
            raise ValueError(f"{images.name} has no official test half of {target}: use a data set that has")
        return super()._parts(images, normal, anomalous, target, seed)


def other_sets(named: str | Sequence[str]) -> tuple[str, ...]:
    """The data sets that `Ood.anomalies` names, each once, in the order of the alphabet."""
    return tuple(sorted({named} if isinstance(named, str) else set(named)))


@dataclass(frozen=True, eq=False)
class _Parts:
    """What a protocol cuts; rising indices. `train_anomalous` is what contamination may be drawn from."""

    train_normal: Indices
    test_normal: Indices
    train_anomalous: Indices
    test_anomalous: Indices


def _protocols(kind: type[Any] = Split) -> Iterator[type[Split]]:
    """All classes derived from `kind`, protocols of the user's own included."""
    for child in kind.__subclasses__():
        yield child
        yield from _protocols(child)


def _is_number(value: object) -> bool:
    """A command line may give a text, and Python takes True for 1."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _several(target: Target) -> tuple[int, ...]:
    return (target,) if isinstance(target, int) else target


def _stream(text: str) -> np.random.RandomState:
    """The random numbers that belong to a text, the same on every machine."""
    return np.random.RandomState(np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype="<u4"))


def _superclasses(images: Images) -> tuple[str, ...]:
    assert images.superclass is not None
    return images.superclass


def _without(indices: Indices, removed: Indices) -> Indices:
    return indices[~np.isin(indices, removed)]


def _apportion(sizes: list[int], total: int, floors: list[int]) -> list[int]:
    """Whole shares of `total` in proportion to `sizes`, by the largest remainder, each at least its floor.

    Needs sum(floors) <= total <= sum(sizes) and floors <= sizes.
    """
    everything = sum(sizes)
    shares = [total * size // everything for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(total * sizes[i] % everything))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    while low := [i for i, share in enumerate(shares) if share < floors[i]]:
        # The group with the most above its floor gives one, so all others keep their share.
        giver = max(range(len(sizes)), key=lambda i: shares[i] - floors[i])
        shares[giver] -= 1
        shares[low[0]] += 1
    return shares
