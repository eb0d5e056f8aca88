"""Problems beyond one class of one data set: several normal classes, and other data sets as the anomalies."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import Command

from anomaly_lab import config, record, report, results, splits
from anomaly_lab.build import make_data
from anomaly_lab.images import Images, _brought_to


def job(data: Path, *overrides: str) -> config.Job:
    return config.job(config.compose(["model=knn", f"data_dir={data}", *overrides]))


# Several normal classes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["[3,8]", "[8,3]", "['3',8,3]", "['8','3']"])
def test_several_classes_are_one_run_however_they_are_written(written: str, data: Path) -> None:
    made = job(data, f"normal_class={written}")
    assert made.identity["normal_class"] == "3+8" and made.path == "knn/digits/pooled/n3+8/s0"
    assert job(data, "normal_class=[3]").out == job(data, "normal_class=3").out


def test_all_images_of_them_are_normal(data: Path) -> None:
    made = make_data(job(data, "normal_class=[3,8]"))
    labels, parts = made.images.labels, made.partition
    for kind, truth in ((True, 0), (False, 1)):
        assert (np.isin(labels[parts.test[parts.test_truth == truth]], [3, 8]) == kind).all()
    assert set(labels[parts.train]) == set(labels[parts.val]) == {3, 8}
    single = [make_data(job(data, f"normal_class={c}")).partition for c in (3, 8)]
    normals = [part.test[part.test_truth == 0] for part in (*single, parts)]
    assert np.array_equal(np.sort(np.concatenate(normals[:2])), normals[2]), "each class is cut as ever"
    assert parts.fingerprint not in {part.fingerprint for part in single}


def test_what_is_abnormal_can_be_several_too(data: Path) -> None:
    made = make_data(job(data, "split=one_abnormal", "abnormal_class=[0,1]"))
    assert job(data, "split=one_abnormal", "abnormal_class=[0,1]").path == "knn/digits/one_abnormal/a0+1/s0"
    assert set(made.images.labels[made.partition.test[made.partition.test_truth == 1]]) == {0, 1}
    assert set(made.images.labels[made.partition.train]) == set(range(2, 10))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("normal_class=[3,12]", "has no class 12: choose name or index among 0 (0), "),
        ("normal_class=[]", "no normal class is named: name one or several"),
        ("'normal_class=[0,1,2,3,4,5,6,7,8,9]'", "no anomalous images to test normal class 'all 10 classes' on"),
        (
            "'normal_class=[3,8]' split.contamination.rate=.1 split.contamination.classes=[8]",
            "class 8 is not anomalous",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(words: str, message: str, lab: Command) -> None:
    said = lab(f"model=knn trainer.progress=false {words}")
    assert said.code == 2 and said.err.count("\n") == 1 and message in said.err


def test_a_grid_of_sets_has_a_table_of_its_own(lab: Command, tmp_path: Path) -> None:
    said = lab("-m model=mean_image normal_class=1,[3,8],[0,6] logger=none trainer.progress=false")
    assert said.code == 0 and re.search(r"normal 3 \+ 8  seed 0  AUROC 0\.\d{3}", said.out)
    frame = results.read(tmp_path / "runs", verify=True)
    assert frame["normal_class"].tolist() == [1, "0+6", "3+8"]
    assert frame["label"].tolist() == ["mean_image", *["mean_image [classes=2]"] * 2]
    assert frame["problem"].tolist() == ["", "classes=2", "classes=2"]
    results.write_csv(frame, tmp_path / "results.csv")
    again = results.read_csv(tmp_path / "results.csv")
    assert again["normal_class"].tolist() == [1, "0+6", "3+8"] and again["label"].tolist() == frame["label"].tolist()
    page = report.markdown(report.sections(frame))
    assert (
        re.search(r"\| method \| 1 \| 0 \+ 6 \| 3 \+ 8 \| mean", page) and "2 of an unknown number of classes" in page
    )
    report.write(tmp_path / "runs", tmp_path / "report", None, False, False)  # with its figures
    assert lab("-m model=mean_image normal_class=1,[3,8],[0,6] --dry-run").out.endswith("3 runs: 3 done, 0 to do\n")


def test_a_folder_cannot_claim_classes_that_lead_out_of_it(lab: Command, tmp_path: Path) -> None:
    assert lab("model=mean_image normal_class=[3,8] logger=none trainer.progress=false").code == 0
    [file] = tmp_path.glob("runs/**/result.json")
    result = json.loads(file.read_text())
    result["identity"]["normal_class"] = "../../elsewhere"
    file.write_text(json.dumps(result))
    with pytest.raises(ValueError, match=r"identity\.normal_class is '\.\./\.\./elsewhere'"):
        record.read(file.parent)


# Other data sets as the anomalies -----------------------------------------------------------------------------------


def photographs(count: int, name: str, shape: tuple[int, ...], *, halves: bool = True) -> Images:
    rng = np.random.RandomState(len(name))
    pixels = rng.randint(0, 256, (3 * count, *shape)).astype(np.uint8)
    test = np.tile([False, False, True], count) if halves else np.zeros(3 * count, bool)
    return Images.canonical(pixels, np.repeat([0, 1, 2], count), test, ("cat", "dog", "ship"), name=name)


def stored(images: Images, folder: Path) -> None:
    arrays = {"images": images.pixels, "labels": images.labels, "is_test": images.is_test}
    np.savez(folder / f"{images.name}.npz", **arrays, class_names=np.array(images.class_names))


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data sets "base" (colour, 8x8), "near" (the same) and "far" (grey, 6x5, no test half) with yamls of their own."""
    (tmp_path / "conf/dataset").mkdir(parents=True)
    monkeypatch.setenv(config.EXTRA_CONFIGS, str(tmp_path / "conf"))
    for images in (
        photographs(60, "base", (3, 8, 8)),
        photographs(30, "near", (3, 8, 8)),
        photographs(20, "far", (1, 6, 5), halves=False),
    ):
        stored(images, tmp_path)
        yaml = f"# Random.\n_target_: anomaly_lab.datasets.NPZ\nname: {images.name}\ndata_dir: ${{data_dir}}\n"
        yaml += f"path: ${{data_dir}}/{images.name}.npz\n"
        (tmp_path / f"conf/dataset/{images.name}.yaml").write_text(yaml)
    return tmp_path


def test_another_set_that_is_named_contaminates_the_training_images(sets: Path) -> None:
    words = ["split=ood", "dataset=base", "split.anomalies=[near,far]", "split.contamination.rate=0.1"]
    made = job(sets, *words, "split.contamination.classes=[near]")
    data = make_data(made)
    added = data.partition.train[data.partition.train_truth.astype(bool)]
    assert len(added) and set(data.images.labels[added]) == {data.images.class_names.index("near")}
    with pytest.raises(ValueError, match="contamination class 'cat' is not anomalous here: choose among far, near"):
        make_data(job(sets, *words, "split.contamination.classes=[cat]"))


def test_another_set_is_one_class_in_the_shape_of_the_first(sets: Path) -> None:
    made = job(sets, "split=ood", "dataset=base", "split.anomalies=[near,far]")
    assert made.identity["normal_class"] == "all" and made.path.startswith("knn/base/ood/nall/s0-")
    images = config.load_images(made.cfg)
    assert images.class_names == ("cat", "dog", "ship", "far", "near") and images.pixels.shape[1:] == (3, 8, 8)
    assert (images.pixels[images.labels == 3][:, 0] == images.pixels[images.labels == 3][:, 1]).all(), "grey, repeated"

    parts = make_data(made).partition
    assert set(images.labels[parts.train]) == {0, 1, 2} and len(parts.train) == 3 * 40 - 12
    test = images.labels[parts.test]
    assert np.bincount(test, minlength=5).tolist() == [20, 20, 20, 60, 30], "of far, without halves, everything"
    assert np.array_equal(parts.test_truth, test >= 3) and len(parts.val) == 12


def test_a_class_of_it_can_be_normal_and_the_others_take_no_part(sets: Path) -> None:
    made = job(sets, "split=ood", "dataset=base", "split.anomalies=near", "normal_class=dog")
    assert made.identity["normal_class"] == 1
    data = make_data(made)
    assert set(data.images.labels[data.partition.test]) == {1, 3}


def test_the_order_in_which_sets_are_named_does_not_count(sets: Path) -> None:
    def out(words: str) -> Path:
        return job(sets, "split=ood", "dataset=base", f"split.anomalies={words}").out

    assert out("[near,far]") == out("[far,near]") == out("[far,near,far]") != out("[near]")
    assert out("near") == out("[near]")


def test_near_and_far_have_figures_of_their_own(sets: Path, lab: Command) -> None:
    said = lab(
        f"model=mean_image split=ood dataset=base split.anomalies=[near,far] data_dir={sets} trainer.progress=false"
    )
    assert said.code == 0 and "normal class all 3 classes" in said.out
    [file] = sets.glob("runs/mean_image/base/ood/nall/*/result.json")
    result = json.loads(file.read_text())
    assert set(result["by_kind"]["auroc"]) == {"near", "far"}
    assert abs(result["by_kind"]["auroc"]["near"] - 0.5) < 0.15, "the same noise"
    assert abs(result["by_kind"]["auroc"]["far"] - 0.5) > 0.15, "smoother, and without colour"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "split.anomalies has no value: give split.anomalies=..."),
        ("split.anomalies=nowhere", "there is no dataset=nowhere: choose among"),
        ("split.anomalies=base", "base cannot have base beside it: name other data sets"),
        ("split.anomalies=[]", "split.anomalies is empty: name another data set"),
        ("split.anomalies=near normal_class=near", "has no class 'near': choose name or index among cat (0)"),
        (
            "split.anomalies=near dataset=digits",
            "digits+near has no official test half of all 10 classes: use a data set that has",
        ),
        (
            "split.anomalies=npz",
            "split.anomalies=npz lacks dataset.name and dataset.path: put a dataset/NAME.yaml that gives them",
        ),
    ],
)
def test_what_cannot_stand_beside_it_is_said(words: str, message: str, sets: Path, lab: Command) -> None:
    said = lab(f"model=knn split=ood dataset=base data_dir={sets} trainer.progress=false {words}")
    assert said.code == 2 and said.err.count("\n") == 1 and message in said.err, said.err


@pytest.mark.parametrize("shape", [(1, 7, 7), (3, 5, 9)])
def test_pixels_are_brought_over_by_pillow(shape: tuple[int, ...]) -> None:
    from PIL import Image

    colour = photographs(2, "colour", (3, 6, 8))
    found = _brought_to(colour.pixels, shape)
    opened = Image.fromarray(colour.pixels[0].transpose(1, 2, 0)).convert("L" if shape[0] == 1 else "RGB")
    expected = np.asarray(opened.resize(shape[:0:-1], Image.Resampling.BILINEAR)).reshape(*shape[1:], shape[0])
    assert found.shape == (6, *shape) and np.array_equal(found[0], expected.transpose(2, 0, 1))


@pytest.mark.data
@pytest.mark.slow
def test_cifar10_against_mnist_has_all_its_images(data_dir: Path) -> None:
    made = job(data_dir, "split=ood", "dataset=cifar10", "split.anomalies=mnist")
    parts = make_data(made).partition
    assert (len(parts.train), len(parts.val), len(parts.test)) == (45_000, 5_000, 20_000)
    assert splits.Ood(anomalies="mnist").version == 1 and parts.fingerprint == "f8eb2332336c7df3"
