"""Protocols: what every one of them must keep to, their counts, and partitions pinned by fingerprint."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import hydra
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from anomaly_lab import datasets
from anomaly_lab.config import compose
from anomaly_lab.images import Images
from anomaly_lab.splits import (
    PIAD_OBJECTS,
    Coil,
    Contamination,
    Known,
    Official,
    OneAbnormal,
    Ood,
    Partition,
    Pooled,
    Split,
    Subclass,
    Superclass,
    _apportion,
)

CONF = Path(__file__).parents[1] / "conf" / "split"
PROTOCOLS = [Official, Pooled, Coil, Superclass, Subclass, OneAbnormal]
every_protocol = pytest.mark.parametrize("kind", PROTOCOLS, ids=lambda kind: kind.name)

# Suits all six protocols: COIL-100's names, three superclasses, two halves.
CLASSES = {
    "obj79": "red",
    "obj48": "red",
    "obj100": "blue",
    "obj65": "blue",
    "obj1": "green",
    "obj98": "green",
}
# A class that each protocol accepts, with its siblings under the superclasses.
TARGET = {Superclass: "blue", Subclass: "obj1"}


def image_set(
    train: Mapping[str, int], test: Mapping[str, int], *, coarse: bool = True, shuffled: int | None = None
) -> Images:
    """Random 3x3 images. The n-th image of a class is the same in every set, whatever else the set holds."""
    pixels, labels, is_test = [], [], []
    for label, name in enumerate(train):
        for half, count in ((0, train[name]), (1, test[name])):
            rng = np.random.RandomState([*name.encode(), half])
            pixels.append(rng.randint(256, size=(count, 1, 3, 3)).astype(np.uint8))
            labels += [label] * count
            is_test += [bool(half)] * count
    order = np.arange(len(labels))
    if shuffled is not None:
        np.random.RandomState(shuffled).shuffle(order)
    return Images.canonical(
        np.concatenate(pixels)[order],
        np.array(labels)[order],
        np.array(is_test)[order],
        tuple(train),
        tuple(CLASSES[name] for name in train) if coarse else None,
        name="toys",
    )


TOY_TRAIN, TOY_TEST = dict.fromkeys(CLASSES, 40), dict.fromkeys(CLASSES, 20)
TOYS = image_set(TOY_TRAIN, TOY_TEST)


def target(kind: type[Split], images: Images) -> int:
    return kind().resolve(images, TARGET.get(kind, "obj79"))


def counts(partition: Partition) -> dict[str, int]:
    return {
        "normal": len(partition.val) + int(np.sum(partition.train_truth == 0)),
        "val": len(partition.val),
        "contaminating": int(partition.train_truth.sum()),
        "test_normal": int(np.sum(partition.test_truth == 0)),
        "test_anomalous": int(partition.test_truth.sum()),
    }


def same(a: Partition, b: Partition) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Partition))


def content(images: Images, indices: np.ndarray) -> list[bytes]:
    return sorted(images.pixels[i].tobytes() for i in indices)


sizes = st.fixed_dictionaries({name: st.integers(15, 40) for name in CLASSES})
test_sizes = st.fixed_dictionaries({name: st.integers(3, 20) for name in CLASSES})


@every_protocol
@settings(max_examples=40, deadline=None)
@given(
    train=sizes,
    test=test_sizes,
    seed=st.integers(0, 10**6),
    rate=st.sampled_from([0.0, 0.01, 0.05]),
    known=st.sampled_from([0.0, 0.05]),
    max_train=st.none() | st.integers(10, 60),
    max_test=st.none() | st.integers(2, 60),
    data=st.data(),
)
def test_normals_only_nothing_twice_and_the_counts_of_the_protocol(
    kind, train, test, seed, rate, known, max_train, max_test, data
):
    images = image_set(train, test)
    split = kind(contamination=Contamination(rate), max_train=max_train, max_test=max_test, known=Known(known))
    chosen = data.draw(st.sampled_from(split.targets(images)))
    partition = split(images, chosen, seed)

    # Who is normal, who anomalous, written out here once more by names.
    name = split.classes(images)[chosen]
    sides = {
        Superclass: ([n for n in CLASSES if CLASSES[n] == name], [n for n in CLASSES if CLASSES[n] != name]),
        Subclass: ([name], [n for n in CLASSES if n != name and CLASSES[n] == CLASSES.get(name)]),
        OneAbnormal: ([n for n in CLASSES if n != name], [name]),
    }
    normal, anomalous = sides.get(kind, ([name], [n for n in CLASSES if n != name]))
    named = np.array(images.class_names)[images.labels]
    assert set(named[partition.train[partition.train_truth == 0]]) <= set(normal)
    assert set(named[partition.val]) <= set(normal)
    assert set(named[partition.train[partition.train_truth == 1]]) <= set(anomalous)
    assert set(named[partition.test[partition.test_truth == 0]]) <= set(normal)
    assert set(named[partition.test[partition.test_truth == 1]]) <= set(anomalous)

    assert set(named[partition.known]) <= set(anomalous)

    used = np.concatenate([partition.train, partition.val, partition.test, partition.known])
    assert len(set(used)) == len(used)
    assert used.min() >= 0 and used.max() < len(images)
    for indices in (partition.train, partition.val, partition.test, partition.known):
        assert indices.dtype == np.int64 and np.all(np.diff(indices) > 0)

    if issubclass(kind, Official):
        pool = sum(train[n] for n in normal)
        test_normal, test_anomalous = sum(test[n] for n in normal), sum(test[n] for n in anomalous)
        assert images.is_test[partition.test].all() and not images.is_test[partition.train].any()
        assert not images.is_test[partition.known].any()
    else:
        cut = {n: int(0.8 * (train[n] + test[n]) + 1e-9) for n in CLASSES}
        pool = sum(cut[n] for n in normal)
        test_normal = sum(train[n] + test[n] - cut[n] for n in normal)
        test_anomalous = min(test_normal, sum(train[n] + test[n] - cut[n] for n in anomalous))
        if kind is OneAbnormal:
            test_anomalous = train[name] + test[name]
    found = counts(partition)
    pool = min(pool, max_train or pool)
    assert found["normal"] == pool
    assert found["val"] == max(5, pool // 10)
    left = pool - found["val"]
    assert found["contaminating"] == round(rate * left / (1 - rate))
    assert len(partition.known) == round(known * len(partition.train) / (1 - known))
    if kind is OneAbnormal:
        test_anomalous -= found["contaminating"] + len(partition.known)
    if max_test is None or max_test >= test_normal + test_anomalous:
        assert (found["test_normal"], found["test_anomalous"]) == (test_normal, test_anomalous)
    else:
        assert len(partition.test) == max_test
        assert found["test_normal"] >= 1 and found["test_anomalous"] >= 1
        classes_there = {n for n in named[np.isin(named, normal) | np.isin(named, anomalous)]}
        if max_test >= 2 * len(classes_there):
            share = max_test * test_normal / (test_normal + test_anomalous)
            assert abs(found["test_normal"] - share) <= len(classes_there)


@every_protocol
@given(seed=st.integers(-5, 2**64))
@settings(max_examples=10, deadline=None)
def test_a_partition_is_a_pure_function_of_images_class_and_seed(kind, seed):
    assert same(kind()(TOYS, target(kind, TOYS), seed), kind()(TOYS, target(kind, TOYS), seed))


@every_protocol
def test_several_classes_are_on_one_side(kind):
    split, images = kind(), TOYS
    chosen = split.targets(images)[:2]
    partition = split(images, chosen, 0)
    sides = [split._sides(images, one) for one in chosen]
    named = set(sides[0][split.role == "abnormal"]) | set(sides[1][split.role == "abnormal"])
    own = images.labels[partition.test[partition.test_truth == (split.role == "abnormal")]]
    assert set(own) == named
    assert split.resolve(images, [str(chosen[1]), chosen[0]]) == tuple(sorted(chosen))
    assert split.title(images, chosen) == " + ".join(sorted(split.classes(images)[one] for one in chosen))


@every_protocol
def test_another_seed_draws_other_images(kind):
    drawn = {tuple(kind()(TOYS, target(kind, TOYS), seed).val) for seed in range(20)}
    assert len(drawn) == 20


@every_protocol
def test_the_splits_own_seed_takes_the_place_of_the_runs(kind):
    chosen = target(kind, TOYS)
    assert same(kind(seed=3)(TOYS, chosen, 8), kind()(TOYS, chosen, 3))


@every_protocol
@given(shuffled=st.integers(0, 1000))
@settings(max_examples=5, deadline=None)
def test_the_order_of_a_source_does_not_count(kind, shuffled):
    other = image_set(TOY_TRAIN, TOY_TEST, shuffled=shuffled)
    assert same(kind()(other, target(kind, other), 0), kind()(TOYS, target(kind, TOYS), 0))


@pytest.mark.parametrize("kind", [Pooled, Coil], ids=lambda kind: kind.name)
def test_what_is_drawn_for_a_class_does_not_depend_on_the_other_classes(kind):
    few = ("obj98", "obj79", "obj100")
    partial = image_set(dict.fromkeys(few, 40), dict.fromkeys(few, 20))
    whole, part = (kind()(images, target(kind, images), 0) for images in (TOYS, partial))
    assert content(TOYS, whole.train) == content(partial, part.train)
    assert content(TOYS, whole.val) == content(partial, part.val)
    normals = [content(i, p.test[p.test_truth == 0]) for i, p in ((TOYS, whole), (partial, part))]
    assert normals[0] == normals[1]


@pytest.mark.parametrize("kind", [Official, Superclass, Subclass], ids=lambda kind: kind.name)
def test_a_file_without_the_unused_images_gives_the_same_fingerprint(kind):
    normal = {Superclass: ("obj100", "obj65"), Subclass: ("obj1",)}.get(kind, ("obj79",))
    names = [n for n in reversed(CLASSES) if kind is not Subclass or CLASSES[n] == "green"]
    partial = image_set({n: 40 * (n in normal) for n in names}, {n: 20 for n in names})
    assert len(partial) < len(TOYS)
    fingerprints = [kind()(i, target(kind, i), 0).fingerprint for i in (TOYS, partial)]
    assert fingerprints[0] == fingerprints[1]


@every_protocol
@pytest.mark.parametrize("role", ["train", "val", "test"])
def test_a_changed_pixel_changes_the_fingerprint(kind, role):
    chosen = target(kind, TOYS)
    partition = kind()(TOYS, chosen, 0)
    pixels = TOYS.pixels.copy()
    pixels[getattr(partition, role)[3], 0, 1, 1] ^= 1
    # The arrays are kept in place, so that nothing but that pixel differs.
    changed = kind()(dataclasses.replace(TOYS, pixels=pixels), chosen, 0)
    assert np.array_equal(changed.test, partition.test)
    assert changed.fingerprint != partition.fingerprint


def test_every_difference_between_partitions_shows_in_the_fingerprint():
    partitions = [
        split(TOYS, 0, 0)
        for split in (
            *(Official(), Official(seed=1), Official(max_train=30), Official(max_test=30)),
            *(Official(contamination=Contamination(0.1)), Official(contamination=Contamination(0.1, (1,)))),
            *(Official(known=Known(0.1)), Official(known=Known(0.1, (1,)))),
            *(Pooled(), Pooled(seed=1), Coil(), OneAbnormal()),
        )
    ]
    partitions.append(Official()(TOYS, 1, 0))
    assert len({partition.fingerprint for partition in partitions}) == len(partitions)


def test_truth_is_part_of_the_fingerprint():
    # The same images in the same roles: what trains as a normal here is an anomaly there.
    split, roles = Official(), {"train": np.arange(3)}
    truths = (TOYS.labels == 0, TOYS.labels != 0)
    assert len({split._fingerprint(TOYS, truth, roles) for truth in truths}) == 2


@pytest.mark.parametrize(
    ("kind", "clean", "contaminated"),
    [
        (Official, "32f41b5fe9e3e504", "f3f70ca4a8033b93"),
        (Pooled, "e0640186372cfff1", "6c766e7d691d5cc5"),
        (Coil, "81abd8c03f5df9b5", "0f936616250dca5a"),
        (Superclass, "e829a341e92137e3", "9d3f6e5be09e2fde"),
        (Subclass, "802110000d742d19", "e60959f4d8bb5d01"),
        (OneAbnormal, "d614e33ee5af205c", "65b88b69fdcd97fa"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_fingerprints_are_pinned(kind, clean, contaminated):
    # When this fails, published partitions have changed: raise the protocol's version instead.
    chosen = target(kind, TOYS)
    dirty = kind(contamination=Contamination(0.1), max_train=30, max_test=25)
    assert kind.version == 1
    assert kind()(TOYS, chosen, 0).fingerprint == clean
    assert dirty(TOYS, chosen, 0).fingerprint == contaminated


@every_protocol
def test_contamination_leaves_the_normals_alone_and_the_test_too_but_for_one_abnormal(kind):
    chosen = target(kind, TOYS)
    clean, dirty = (kind(contamination=Contamination(rate))(TOYS, chosen, 0) for rate in (0.0, 0.1))
    assert np.array_equal(dirty.train[dirty.train_truth == 0], clean.train)
    assert np.array_equal(dirty.val, clean.val)
    missing = np.setdiff1d(clean.test, dirty.test)
    added = dirty.train[dirty.train_truth == 1]
    assert len(added) and np.array_equal(missing, added if kind is OneAbnormal else [])
    assert np.isin(dirty.test, clean.test).all()


@pytest.mark.parametrize(
    ("kind", "classes", "labels"),
    [
        (Official, ("obj48",), {1}),
        (Official, (1, "obj98"), {1, 5}),
        (Official, ("5",), {5}),
        (Official, "obj48", {1}),
        (Official, 1, {1}),
        (Pooled, ("obj48",), {1}),
        (Coil, ("obj100",), {2}),
        (Superclass, ("green",), {4, 5}),
        (Subclass, ("obj98",), {5}),
        (OneAbnormal, ("obj79",), {0}),
    ],
)
def test_contamination_comes_from_the_classes_that_are_named(kind, classes, labels):
    partition = kind(contamination=Contamination(0.2, classes))(TOYS, target(kind, TOYS), 0)
    assert set(TOYS.labels[partition.train[partition.train_truth == 1]]) == labels


@pytest.mark.parametrize(("share", "held_out"), [(0.1, 5), (0.29, 11), (0.5, 20), (0.7, 28)])
def test_the_held_out_share_is_a_key(share, held_out):
    partition = Official(val_share=share)(TOYS, 0, 0)
    assert len(partition.val) == held_out and len(partition.train) == 40 - held_out
    assert np.array_equal(partition.test, Official()(TOYS, 0, 0).test)
    assert set(Official()(TOYS, 0, 0).val) <= set(partition.val), "drawn in one order"


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(ValueError, match=r"split\.val_share=.*: give a number between 0 and 1"):
        Official(val_share=share)
    with pytest.raises(ValueError, match=r"split\.val_share=0\.9 leaves 4 of 40 normals to train on"):
        Official(val_share=0.9)(TOYS, 0, 0)


def test_contamination_keeps_its_rate_when_the_normals_are_capped():
    # 100 normals, 10 held out, and 10 of 100 training images are anomalous.
    many = image_set(dict.fromkeys(CLASSES, 200), dict.fromkeys(CLASSES, 20))
    partition = Official(contamination=Contamination(0.1), max_train=100)(many, 0, 0)
    assert len(partition.train) == 100 and partition.train_truth.mean() == 0.1


@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=12),
    total=st.integers(0, 6000),
    at_least=st.integers(0, 1),
)
@settings(deadline=None)
def test_shares_are_proportional_by_the_largest_remainder(sizes, total, at_least):
    assume(len(sizes) * at_least <= total <= sum(sizes))
    shares = _apportion(sizes, total, [at_least] * len(sizes))
    assert sum(shares) == total
    assert all(at_least <= share <= size for share, size in zip(shares, sizes, strict=True))
    exact = [total * size / sum(sizes) for size in sizes]
    if min(exact) >= 1 or not at_least:
        assert all(abs(share - x) < 1 for share, x in zip(shares, exact, strict=True))


@pytest.mark.parametrize(
    ("sizes", "total", "floors", "shares"),
    [
        ([70, 20, 10], 10, [1, 1, 1], [7, 2, 1]),
        ([50, 30, 20], 5, [0, 0, 0], [3, 1, 1]),  # 2.5 1.5 1: the earlier of equal remainders
        ([97, 2, 1], 10, [1, 1, 1], [8, 1, 1]),
        ([97, 2, 1], 10, [0, 0, 0], [10, 0, 0]),
    ],
)
def test_shares_of_examples(sizes, total, floors, shares):
    assert _apportion(sizes, total, floors) == shares


def test_a_capped_test_set_keeps_every_class_where_there_is_room():
    # 10 normals and 90 anomalies, of which one is of a class of its own.
    rare = dict(zip(CLASSES, (10, 1, 22, 22, 22, 23), strict=True))
    ten_percent = image_set(TOY_TRAIN, rare)
    for most, kinds in ((6, 6), (30, 6), (4, 4), (2, 2)):
        partition = Official(max_test=most)(ten_percent, 0, 0)
        assert len(partition.test) == most
        assert len(set(ten_percent.labels[partition.test])) == kinds
        assert counts(partition)["test_normal"] == {30: 3}.get(most, 1)


def test_caps_beyond_the_data_change_nothing():
    assert same(Official(max_train=10**6, max_test=10**6)(TOYS, 0, 0), Official()(TOYS, 0, 0))


def test_coil_takes_piads_objects_by_name():
    assert len(set(PIAD_OBJECTS)) == 30 and PIAD_OBJECTS[0] == "obj79" and "obj100" not in PIAD_OBJECTS
    assert [TOYS.class_names[i] for i in Coil().targets(TOYS)] == ["obj79", "obj48", "obj65", "obj98"]


def test_subclass_takes_the_alphabetically_first_class_of_each_superclass():
    assert {TOYS.class_names[i] for i in Subclass().targets(TOYS)} == {"obj48", "obj100", "obj1"}


def test_superclasses_are_indexed_in_sorted_order():
    assert Superclass().classes(TOYS) == ("blue", "green", "red")
    assert Superclass().resolve(TOYS, "red") == Superclass().resolve(TOYS, 2) == 2


def test_a_class_is_named_by_name_or_index():
    digits = dataclasses.replace(TOYS, class_names=("5", "4", "3", "2", "1", "0"), superclass=None)
    assert Official().resolve(TOYS, "obj48") == Official().resolve(TOYS, 1) == Official().resolve(TOYS, "1") == 1
    assert Official().resolve(digits, "5") == 0  # a string is a name first
    assert Official().resolve(digits, 5) == 5  # a number is an index


SMALL = image_set(dict.fromkeys(CLASSES, 9), dict.fromkeys(CLASSES, 20))
UNHALVED = image_set(TOY_TRAIN, dict.fromkeys(CLASSES, 0), coarse=False)
LONE = image_set({"obj79": 40}, {"obj79": 20}, coarse=False)
ONE_TRAINED = image_set({n: 40 * (n == "obj79") for n in CLASSES}, TOY_TEST)
UNTESTED = image_set(TOY_TRAIN, TOY_TEST | {"obj79": 0})
PLAIN = dataclasses.replace(UNHALVED, class_names=tuple("abcdef"))


@pytest.mark.parametrize(
    ("split", "images", "named", "message"),
    [
        (Official(), PLAIN, 0, r"toys has no official test half: use split=pooled or split=one_abnormal$"),
        (Official(), UNHALVED, 0, r"use split=pooled, split=coil or split=one_abnormal$"),
        (Superclass(), PLAIN, 0, r"toys has no superclasses: use split=pooled or split=one_abnormal$"),
        (Subclass(), PLAIN, 0, r"toys has no superclasses: use split=pooled or split=one_abnormal$"),
        (Coil(), PLAIN, 0, r"toys is not COIL-100: use split=pooled or split=one_abnormal$"),
        (Official(), TOYS, "cat", r"no class 'cat': choose name or index among obj79 \(0\), .* obj98 \(5\)$"),
        (Official(), TOYS, 6, r"no class 6: choose"),
        (Official(), TOYS, -1, r"no class -1: choose"),
        (Superclass(), TOYS, "obj79", r"no class 'obj79': choose .* blue \(0\), green \(1\), red \(2\)$"),
        (Subclass(), TOYS, "obj79", r"no class 'obj79': choose .* obj100 \(2\), obj1 \(4\), obj48 \(1\)$"),
        (Coil(), TOYS, "obj100", r"'obj100': choose .* obj79 \(0\), obj48 \(1\), obj65 \(3\), obj98 \(5\)$"),
        (Official(), SMALL, 0, r"9 normal training images for normal class 'obj79': at least 10 are needed"),
        (Official(), UNTESTED, 0, r"no normal images to test normal class 'obj79' on"),
        (Pooled(), LONE, 0, r"no anomalous images .* or split, or train without a test: .*AnomalyDetector"),
        (Official(), ONE_TRAINED, "obj48", r"no training images of obj48: .* or choose among obj79$"),
        (Superclass(), ONE_TRAINED, "red", r"no training images of obj48: get the complete data set$"),
        (
            Official(contamination=Contamination(0.6, ("obj48",))),
            TOYS,
            0,
            r"rate=0.6 beside 35 training images needs 52 anomalies, toys has 40 to give: lower the rate",
        ),
        (
            Subclass(contamination=Contamination(0.1)),
            image_set({n: 40 * (n == "obj1") for n in CLASSES}, TOY_TEST),
            "obj1",
            r"needs 4 anomalies, toys has 0 to give",
        ),
        (
            Official(contamination=Contamination(0.1, ("obj48", "obj79"))),
            TOYS,
            0,
            r"contamination class 'obj79' is not anomalous here: choose among obj48 \(1\)",
        ),
        (
            Subclass(contamination=Contamination(0.1, ("obj79",))),
            TOYS,
            "obj1",
            r"contamination class 'obj79' is not anomalous here: choose among obj98 \(5\)$",
        ),
        (
            Superclass(contamination=Contamination(0.1, ("obj79",))),
            TOYS,
            "red",
            r"contamination class 'obj79' is not anomalous here: choose among blue \(0\), green \(1\)$",
        ),
        (
            OneAbnormal(contamination=Contamination(0.1, ("obj48",))),
            TOYS,
            "obj79",
            r"'obj48' is not anomalous here: choose among obj79 \(0\)$",
        ),
        (
            OneAbnormal(contamination=Contamination(0.3)),
            TOYS,
            "obj79",
            r"rate=0.3 beside 216 training images needs 93 anomalies, toys has 60 to give",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(split, images, named, message):
    with pytest.raises(ValueError, match=message) as error:
        split(images, split.resolve(images, named), 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "refused"), [(Coil, "obj100"), (Subclass, "obj79")])
def test_an_index_that_the_protocol_does_not_accept_is_refused_by_the_call_too(kind, refused):
    with pytest.raises(ValueError, match="choose name or index"):
        kind()(TOYS, TOYS.class_names.index(refused), 0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Contamination(1.0), r"split\.contamination\.rate=1.0 must be at least 0 and below 1"),
        (lambda: Contamination(-0.1), "rate=-0.1 must be"),
        (lambda: Contamination(float("nan")), "rate=nan must be"),
        (lambda: Official(max_train=9), r"split\.max_train=9: give a whole number from 10, or null for all"),
        (lambda: Official(max_test=1), r"split\.max_test=1: give a whole number from 2"),
        (lambda: Official(max_test=1e3), r"split\.max_test=1000\.0: give a whole number"),
        (lambda: Official(max_train="ten"), r"split\.max_train=ten: give a whole number"),
        (lambda: Official(seed="abc"), r"split\.seed=abc: give a whole number from 0, or null for the run's own"),
        (lambda: Contamination("abc"), r"split\.contamination\.rate=abc must be at least 0 and below 1"),
        (lambda: Known(True), r"split\.known\.rate=True must be"),
        (lambda: Official(val_share="40%"), r"split\.val_share=40%: give a number between 0 and 1"),
        (lambda: Official(val_share=None), r"split\.val_share=None: give a number"),
    ],
)
def test_parameters_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@every_protocol
def test_a_split_goes_through_a_plain_dictionary_and_back(kind):
    split = kind(Contamination(0.1, ("obj48", 2)), max_train=30, max_test=20, seed=7, known=Known(0.1, ("obj1",)))
    assert kind(**dataclasses.asdict(split)) == split
    assert hash(kind(**dataclasses.asdict(split))) == hash(split)


@every_protocol
def test_the_config_builds_the_protocol_with_its_defaults(kind):
    config = compose([f"split={kind.name}"]).split
    assert hydra.utils.instantiate(config) == kind()
    config.contamination.classes, config.contamination.rate, config.max_train = ["obj48", 2], 0.1, 30
    built = hydra.utils.instantiate(config)
    assert built == kind(contamination=Contamination(0.1, ("obj48", 2)), max_train=30)
    assert type(built.contamination.classes) is tuple


def test_every_protocol_has_a_config():
    assert {path.stem for path in CONF.glob("*.yaml")} == {kind.name for kind in [*PROTOCOLS, Ood]}


READERS = {
    "mnist": datasets.MNIST,
    "fashion_mnist": datasets.FashionMNIST,
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
    "coil100": datasets.COIL100,
}


@functools.lru_cache(maxsize=1)  # tests are grouped by data set; CIFAR-10 alone takes 184 MB
def real(name: str, data_dir: Path) -> Images:
    return READERS[name](data_dir=data_dir, name=name).load()


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "split", "named", "normal", "test_normal", "test_anomalous", "fingerprint"),
    [
        ("mnist", Pooled(), 8, 5460, 1365, 1365, "e35973c8b6f675cd"),
        ("mnist", Official(), 5, 5421, 892, 9108, "9be9367aaf958be9"),
        ("mnist", Official(), 1, 6742, 1135, 8865, "849f7eddb2d1fdec"),
        ("mnist", Official(max_train=1000, max_test=500), 8, 1000, 49, 451, "84031de09925ca69"),
        ("mnist", OneAbnormal(), 8, 50536, 12639, 6825, "d25d5ee9431c8627"),
        ("fashion_mnist", Pooled(), 0, 5600, 1400, 1400, "871a27fcf90cd9d3"),
        ("fashion_mnist", Official(), 9, 6000, 1000, 9000, "c94c9885ab3baf22"),
        ("cifar10", Official(), "frog", 5000, 1000, 9000, "0ad7690bedc95f77"),
        ("cifar10", Pooled(), "frog", 4800, 1200, 1200, "f80357ee74565c44"),
        ("cifar100", Subclass(), "bicycle", 500, 100, 400, "bcac391226370c38"),
        ("coil100", Coil(), "obj79", 57, 15, 15, "5becc5ab0bdececd"),
        ("coil100", Pooled(), "obj100", 57, 15, 15, "9f930c8cdad9675a"),
    ],
)
def test_real_sets_have_the_published_counts_and_pinned_fingerprints(
    data_dir, name, split, named, normal, test_normal, test_anomalous, fingerprint
):
    images = real(name, data_dir)
    partition = split(images, split.resolve(images, named), 0)
    assert counts(partition) == {
        "normal": normal,
        "val": max(5, normal // 10),
        "contaminating": 0,
        "test_normal": test_normal,
        "test_anomalous": test_anomalous,
    }
    assert partition.fingerprint == fingerprint


@pytest.mark.data
@pytest.mark.parametrize(("rate", "added"), [(0.05, 281), (0.01, 54), (0.001, 5)])
def test_contamination_of_mnist_0_counts_the_normals_after_the_validation_cut(data_dir, rate, added):
    # 5923 zeros, 592 held out. Of all 5923 they would be 312, 60 and 6.
    images = real("mnist", data_dir)
    partition = Official(contamination=Contamination(rate, (2,)))(images, 0, 0)
    assert counts(partition)["contaminating"] == added
    assert set(images.labels[partition.train]) == {0, 2}


@pytest.mark.data
def test_coil_lists_thirty_objects_and_subclass_ten_classes_of_the_real_sets(data_dir):
    coil = real("coil100", data_dir)
    assert tuple(coil.class_names[i] for i in Coil().targets(coil)) == PIAD_OBJECTS
    cifar = real("cifar100", data_dir)
    assert " ".join(cifar.class_names[i] for i in Subclass().targets(cifar)) == (
        "aquarium_fish apple clock bed bear fox crab hamster bicycle lawn_mower"
    )
