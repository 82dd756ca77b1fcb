"""Images are divided by class and by group, the same on every machine."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from vit_cls.data.index import ImageIndex, PathTable
from vit_cls.data.splits import held_out_images
from vit_cls.errors import ConfigError, DataError


def _index(counts: dict[str, int], first: int = 0) -> ImageIndex:
    """An index of files that need not exist."""
    names = sorted(counts)
    paths = [f"{name}/{i:04d}.png" for name in names for i in range(first, first + counts[name])]
    labels = np.repeat(np.arange(len(names)), [counts[name] for name in names])
    return ImageIndex(Path("nowhere"), PathTable(paths), labels, names)


def _divide(
    index: ImageIndex, *, val_fraction: float, seed: int, group_by: str | None = None
) -> tuple[ImageIndex, ImageIndex]:
    held_out = held_out_images(index, val_fraction=val_fraction, seed=seed, group_by=group_by)
    return index.subset(~held_out), index.subset(held_out)


@pytest.mark.parametrize(
    ("images", "val_fraction", "held_out"),
    [
        (1, 0.5, 0),  # the last one is never taken
        (2, 0.1, 1),  # at least one
        (2, 0.9, 1),  # never the last one
        (3, 0.1, 1),
        (10, 0.1, 1),
        (14, 0.1, 1),
        (16, 0.1, 2),
        (20, 0.25, 5),
        (25, 0.1, 2),  # 2.5 rounds to even
        (35, 0.1, 4),  # 3.5 too
        (100, 0.999, 99),
    ],
)
def test_held_out_images_of_a_class_are_its_share_rounded(images, val_fraction, held_out):
    train, val = _divide(_index({"a": images, "b": 2}), val_fraction=val_fraction, seed=0)
    assert train.counts().tolist() == [images - held_out, 1]
    assert val.counts().tolist() == [held_out, 1]


@pytest.mark.parametrize("seed", range(5))
def test_split_is_disjoint_complete_and_keeps_each_image_with_its_class(seed):
    rng = np.random.default_rng(seed)
    index = _index({f"c{i}": int(rng.integers(1, 60)) for i in range(8)})
    train, val = _divide(index, val_fraction=float(rng.uniform(0.05, 0.95)), seed=seed)
    assert sorted([*train.paths, *val.paths]) == sorted(index.paths)
    assert len(set(train.paths) & set(val.paths)) == 0
    for part in (train, val):
        assert part.class_names == index.class_names
        assert [path.split("/")[0] for path in part.paths] == [part.class_names[i] for i in part.labels]
        assert list(part.paths) == sorted(part.paths)
    assert train.counts().min() >= 1


def test_split_depends_on_names_and_seed_alone():
    """Golden: another choice of files would move images of runs that were made before."""
    _, val = _divide(_index({"a": 20, "b": 20}), val_fraction=0.2, seed=0)
    assert " ".join(path.removesuffix(".png") for path in val.paths) == (
        "a/0000 a/0001 a/0006 a/0013 b/0012 b/0013 b/0015 b/0016"
    )


def test_another_seed_holds_out_other_images():
    index = _index({"a": 100, "b": 100})
    splits = [set(_divide(index, val_fraction=0.2, seed=seed)[1].paths) for seed in range(4)]
    assert len({frozenset(split) for split in splits}) == 4
    assert len(splits[0] & splits[1]) < 20  # 8 of 40 by chance


def test_most_held_out_images_stay_held_out_when_files_are_added():
    before = _index({"a": 100, "b": 100})
    after = _index({"a": 120, "b": 110, "c": 50})
    for seed in range(5):
        old = set(_divide(before, val_fraction=0.2, seed=seed)[1].paths)
        new = set(_divide(after, val_fraction=0.2, seed=seed)[1].paths)
        assert len(old & new) >= 0.8 * len(old)
        assert len((new - old) & set(before.paths)) <= 0.1 * len(old)  # few were trained on before


def test_classes_with_one_image_are_trained_on_and_do_not_stop_the_others_from_being_split():
    train, val = _divide(_index({"many": 10, "one": 1}), val_fraction=0.5, seed=0)
    assert train.counts().tolist() == [5, 1]
    assert val.counts().tolist() == [5, 0]
    assert val.class_names == ["many", "one"]


@pytest.mark.parametrize("val_fraction", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
def test_val_fraction_out_of_range_is_refused_with_its_value(val_fraction):
    with pytest.raises(
        ConfigError, match=rf"data\.val_fraction must be above 0 and below 1; got {val_fraction}\."
    ):
        _divide(_index({"a": 9, "b": 9}), val_fraction=val_fraction, seed=0)


def _reference_held_out(index: ImageIndex, val_fraction: float, seed: int) -> list[str]:
    """Class by class, path by path."""

    def place(path: str) -> bytes:
        return hashlib.blake2b(f"{seed}\0{path}".encode("utf-8", "surrogateescape"), digest_size=8).digest()

    held_out = []
    for label in range(len(index.class_names)):
        members = sorted(
            (p for p, at in zip(index.paths, index.labels, strict=True) if at == label), key=place
        )
        held_out += members[: max(0, min(max(1, round(val_fraction * len(members))), len(members) - 1))]
    return held_out


@pytest.mark.parametrize("seed", range(6))
def test_split_is_that_of_hashing_one_path_after_the_other(seed):
    rng = np.random.default_rng(seed)
    index = _index({f"c{i}\udcff": int(rng.integers(1, 50)) for i in range(6)})
    index = index.subset(rng.permutation(len(index))).with_class_names(["none", *reversed(index.class_names)])
    val_fraction = float(rng.uniform(0.02, 0.98))
    _, val = _divide(index, val_fraction=val_fraction, seed=seed)
    assert sorted(val.paths) == sorted(_reference_held_out(index, val_fraction, seed))


BY_PATIENT = r"/(p\d+)_"


def _patients(
    rng: np.random.Generator, num_groups: int, num_classes: int = 3, classes_of_one: int = 1, first: int = 0
) -> ImageIndex:
    """Groups of 1 to 6 images, each with ``classes_of_one`` classes."""
    paths = []
    for group in range(first, first + num_groups):
        own = rng.choice(num_classes, size=classes_of_one, replace=False)
        images = own.tolist() + rng.choice(own, size=int(rng.integers(0, 6))).tolist()
        paths += [f"c{label}/p{group:03d}_{i}.png" for i, label in enumerate(images)]
    return _from_paths(paths)


def _from_paths(paths: list[str]) -> ImageIndex:
    names = sorted({path.split("/")[0] for path in paths})
    paths = sorted(paths)
    labels = np.array([names.index(path.split("/")[0]) for path in paths])
    return ImageIndex(Path("nowhere"), PathTable(paths), labels, names)


def _groups(index: ImageIndex) -> set[str]:
    return {path.split("/")[1].split("_")[0] for path in index.paths}


@pytest.mark.parametrize("classes_of_one", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_groups_stay_whole_and_every_class_is_on_both_sides(seed, classes_of_one):
    rng = np.random.default_rng(seed)
    index = _patients(rng, num_groups=60, classes_of_one=classes_of_one)
    val_fraction = float(rng.uniform(0.1, 0.9))
    train, val = _divide(index, val_fraction=val_fraction, seed=seed, group_by=BY_PATIENT)
    assert sorted([*train.paths, *val.paths]) == list(index.paths)
    assert not _groups(train) & _groups(val)
    assert train.counts().min() > 0
    assert val.counts().min() > 0


@pytest.mark.parametrize("classes_of_one", [1, 2, 3])
@pytest.mark.parametrize("val_fraction", [0.1, 0.25, 0.5])
def test_share_of_each_class_is_near_the_fraction(val_fraction, classes_of_one):
    index = _patients(np.random.default_rng(0), num_groups=400, classes_of_one=classes_of_one)
    for seed in range(5):
        _, val = _divide(index, val_fraction=val_fraction, seed=seed, group_by=BY_PATIENT)
        assert val.counts() / index.counts() == pytest.approx([val_fraction] * 3, abs=0.06)


def test_share_of_groups_of_one_class_is_exact():
    index = _patients(np.random.default_rng(1), num_groups=97)
    train, val = _divide(index, val_fraction=0.2, seed=0, group_by=BY_PATIENT)
    for name in index.class_names:
        of_class = [
            _groups(_from_paths([p for p in part.paths if p.startswith(name)])) for part in (train, val)
        ]
        assert len(of_class[1]) == round(0.2 * (len(of_class[0]) + len(of_class[1])))


@pytest.mark.parametrize("classes_of_one", [1, 3])
def test_group_split_does_not_depend_on_the_order_of_images_or_their_root(classes_of_one):
    rng = np.random.default_rng(2)
    index = _patients(rng, num_groups=50, classes_of_one=classes_of_one)
    expected = _divide(index, val_fraction=0.3, seed=1, group_by=BY_PATIENT)[1]
    for _ in range(3):
        order = rng.permutation(len(index))
        shuffled = ImageIndex(
            Path("else/where"), [index.paths[i] for i in order], index.labels[order], index.class_names
        )
        val = _divide(shuffled, val_fraction=0.3, seed=1, group_by=BY_PATIENT)[1]
        assert sorted(val.paths) == sorted(expected.paths)


def test_group_split_depends_on_group_names_and_seed_alone():
    """Golden: another choice of groups would move images of runs that were made before."""
    index = _from_paths([f"{c}/p{group}_{i}.png" for c in "ab" for group in range(10) for i in range(2)])
    for seed, groups in enumerate(("p1 p7 p9", "p1 p3 p5", "p7 p8 p9")):
        _, val = _divide(index, val_fraction=0.3, seed=seed, group_by=BY_PATIENT)
        assert _groups(val) == set(groups.split())


@pytest.mark.parametrize("classes_of_one", [1, 2])
def test_images_added_to_groups_move_nothing(classes_of_one):
    rng = np.random.default_rng(3)
    index = _patients(rng, num_groups=40, classes_of_one=classes_of_one)
    more = [path.replace(".png", f"_{i}.png") for path in index.paths for i in range(int(rng.integers(0, 9)))]
    after = _from_paths([*index.paths, *more])
    for seed in range(5):
        old, new = (
            _groups(_divide(each, val_fraction=0.25, seed=seed, group_by=BY_PATIENT)[1])
            for each in (index, after)
        )
        assert old == new


@pytest.mark.parametrize("classes_of_one", [1, 3])
def test_groups_added_move_few_others(classes_of_one):
    rng = np.random.default_rng(4)
    index = _patients(rng, num_groups=100, classes_of_one=classes_of_one)
    added = _patients(rng, num_groups=15, classes_of_one=classes_of_one, first=500)
    after = _from_paths([*index.paths, *added.paths])
    for seed in range(5):
        old, new = (
            _groups(_divide(each, val_fraction=0.25, seed=seed, group_by=BY_PATIENT)[1])
            for each in (index, after)
        )
        assert len((old ^ new) & _groups(index)) <= 0.2 * len(old)


def test_last_group_of_a_class_is_never_held_out():
    # p0 is the only one with a, p1 with b: whatever the fraction, both are trained on
    paths = ["a/p0_1.png", "c/p0_2.png", "b/p1_1.png", "c/p1_2.png", "c/p2_1.png", "c/p3_1.png"]
    for seed in range(10):
        train, val = _divide(_from_paths(paths), val_fraction=0.9, seed=seed, group_by=BY_PATIENT)
        assert _groups(train) >= {"p0", "p1"}
        assert _groups(val) == {"p2", "p3"}


def test_rarer_classes_leave_a_group_to_a_class_whose_groups_they_share():
    # a may give p0 and b may give p2, but not both: z would have nothing to learn from
    paths = [f"{name}.png" for name in ("a/p0_1", "a/p1_1", "b/p2_1", "b/p3_1", "z/p0_2", "z/p2_2")]
    for seed in range(20):
        train, val = _divide(_from_paths(paths), val_fraction=0.5, seed=seed, group_by=BY_PATIENT)
        assert train.counts().min() > 0
        assert val.counts()[:2].tolist() == [1, 1]


SIX = [f"{c}/000{i}.png" for c in "ab" for i in range(3)]


@pytest.mark.parametrize(
    ("paths", "group_by", "error", "message"),
    [
        (["a/p1_1.png", "a/p1_2.png", "b/p1_3.png"], BY_PATIENT, DataError, r"nowhere has one group \(p1\)"),
        (["a/p1_1.png", "a/p1_2.png", "b/p2_3.png"], BY_PATIENT, DataError, "nowhere has one group a class"),
        (SIX, "(p", ConfigError, r"data\.group_by '\(p' is not a regular expression: missing \)"),
        (SIX, "p1", ConfigError, r"data\.group_by 'p1' must have one capture group.*it has 0\. Example"),
        (SIX, "(p)(1)", ConfigError, r"must have one capture group.*it has 2\."),
        (SIX, r"(patient\d)", DataError, r"none of the 6 paths below nowhere, such as a/0000\.png, a/0001"),
        (SIX, r"a/(\d+)", DataError, r"finds no group in 3 of 6 paths below nowhere, such as b/0000\.png"),
        (SIX, r"(x*)", DataError, r"matches none of the 6 paths"),
        (SIX, r"(zz)?000", DataError, r"matches none of the 6 paths"),
    ],
)
def test_groups_that_cannot_be_held_out_and_patterns_without_any_are_refused(paths, group_by, error, message):
    with pytest.raises(error, match=message):
        _divide(_from_paths(paths), val_fraction=0.5, seed=0, group_by=group_by)


def test_groups_of_the_index_are_kept_whole_without_a_pattern():
    index = _patients(np.random.default_rng(5), num_groups=30)
    groups = [path.split("/")[1].split("_")[0] for path in index.paths]
    grouped = ImageIndex(index.root, index.paths, index.labels, index.class_names, groups=groups)
    _, val = _divide(grouped, val_fraction=0.3, seed=2)
    assert list(val.paths) == list(_divide(index, val_fraction=0.3, seed=2, group_by=BY_PATIENT)[1].paths)
    assert set(val.groups) == _groups(val)
    with pytest.raises(
        ConfigError, match=r"data\.group_by .* has no effect: the manifest has a group column"
    ):
        _divide(grouped, val_fraction=0.3, seed=2, group_by=BY_PATIENT)
