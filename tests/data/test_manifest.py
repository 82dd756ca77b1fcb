"""A table of images becomes the same index whatever its dialect, and each of its faults names the rows."""

import os
from pathlib import Path

import numpy as np
import pytest

from tests.data.files import entries
from vit_cls.data.folders import find_parts
from vit_cls.data.index import ImageIndex, index_folder
from vit_cls.data.manifest import inspect_manifest, is_manifest, read_manifest
from vit_cls.data.partition import Split, split_for_training
from vit_cls.data.parts import PART_OF
from vit_cls.errors import ConfigError, DataError

ROWS = ["path,label", "x/1.png,cat", "x/2.png,dog", "y/3.png,cat", "4.png,dog"]


def _write(folder: Path, lines: list[str], file: str = "m.csv", *, files: bool = True) -> Path:
    """A table, and an empty file for the first cell of each row."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if files:
        for line in lines[1:]:
            image = folder / line.split(",")[0]
            image.parent.mkdir(parents=True, exist_ok=True)
            image.touch()
    return path


def _split(path: Path, **options) -> Split:
    return split_for_training(find_parts(path), **{"val_fraction": 0.5, "seed": 0} | options)


def _read(path: Path, part: str = "all", **options) -> ImageIndex:
    return read_manifest(path, **options).index(part)


EXPECTED = [("x/1.png", "cat"), ("y/3.png", "cat"), ("4.png", "dog"), ("x/2.png", "dog")]


def test_rows_become_an_index_sorted_by_class_and_path(tmp_path):
    manifest = read_manifest(_write(tmp_path, ROWS))
    index = manifest.index("all")
    assert manifest.parts == ["all"]
    assert entries(index) == EXPECTED
    assert index.class_names == ["cat", "dog"]
    assert index.labels.dtype == np.int64
    assert index.path(0) == tmp_path / "x/1.png"
    assert index.groups is index.weights is None


@pytest.mark.parametrize("file", ["m.csv", "m.tsv", "m.txt"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_dialect_gives_the_same_index(tmp_path, file, delimiter, encoding, newline):
    folder = _write(tmp_path, ROWS).parent
    lines = [f'"Label "{delimiter}note{delimiter} PATH']
    for row in ROWS[1:]:
        path, label = row.split(",")
        lines.append(f'{label} {delimiter}"ü, ; \t ""x"" "{delimiter}{path}')
    text = newline.join([*lines[:3], "", *lines[3:], ""])  # an empty line is no row
    (folder / file).write_bytes(text.encode(encoding))
    assert entries(_read(folder / file)) == EXPECTED


def test_order_of_rows_has_no_effect(tmp_path):
    rng = np.random.default_rng(0)
    lines = ["path,label,group,weight", *(f"{i}.png,{'ab'[i % 2]},g{i // 4},{i / 4 + 1}" for i in range(40))]
    splits = []
    for k in range(3):
        shuffled = [lines[0], *(lines[1 + i] for i in rng.permutation(40))]
        splits.append(_split(_write(tmp_path / str(k), shuffled)))
    for split in splits:
        for part, first in (
            (split.train.index, splits[0].train.index),
            (split.val.index, splits[0].val.index),
        ):
            assert entries(part) == entries(first)
            assert list(part.groups) == list(first.groups)
            assert part.weights.tolist() == first.weights.tolist()
            assert all(
                part.weights[i] == int(Path(path).stem) / 4 + 1
                and part.groups[i] == f"g{int(path[:-4]) // 4}"
                for i, path in enumerate(part.paths)
            )


def test_table_of_a_folder_gives_the_index_of_the_folder(tmp_path, write_folder):
    folder = index_folder(write_folder(tmp_path / "data", {"b": 5, "a": ["deep/x.png", "y.png"]}))
    lines = [
        "path,label",
        *(f"{path},{folder.class_names[i]}" for path, i in zip(folder.paths, folder.labels, strict=True)),
    ]
    table = _read(_write(tmp_path / "data", lines, files=False))
    assert entries(table) == entries(folder)
    assert table.fingerprint() == folder.fingerprint()


def test_paths_below_the_table_become_relative_whatever_their_spelling(tmp_path):
    _write(tmp_path / "data", ROWS)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    lines = [
        "path,label",
        f"{tmp_path}/data/x/1.png,cat",
        "./x//2.png,dog",
        "x/../y/./3.png,cat",
        f"{tmp_path}/link/4.png,dog",
    ]
    _write(tmp_path / "data", lines, files=False)
    assert entries(_read(tmp_path / "link" / "m.csv")) == EXPECTED
    lines[4] = "../data/4.png,dog"
    assert entries(_read(_write(tmp_path / "data", lines, files=False))) == EXPECTED


def test_images_may_be_anywhere_on_the_machine(tmp_path):
    photos = _write(tmp_path / "photos", ROWS).parent
    lines = ["path,label", f"{photos}/x/../x/1.png,cat", f"{photos}//4.png,dog", "../photos/./x/2.png,dog"]
    index = _read(_write(tmp_path / "tables", lines, files=False))
    assert list(index.paths) == [f"{photos}/x/1.png", "../photos/x/2.png", f"{photos}/4.png"]
    assert [index.class_names[i] for i in index.labels] == ["cat", "dog", "dog"]
    assert all(index.path(i).is_file() for i in range(3))
    (photos / "4.png").unlink()
    with pytest.raises(
        DataError, match=rf"no file: row 3 \('{photos}//4\.png'\)\. Relative paths start from"
    ):
        _read(tmp_path / "tables" / "m.csv")


@pytest.mark.parametrize("spelling", ["x/1.png", "./x//1.png", "{folder}/y/../x/1.png"])
def test_one_file_is_there_twice_in_any_spelling(tmp_path, spelling):
    path = _write(tmp_path, [*ROWS, f"{spelling.format(folder=tmp_path)},dog"], files=False)
    message = (
        r"1 of 5 rows have a path that is there already: x/1\.png \(rows 2 and 6\)\. Each image may have"
    )
    with pytest.raises(DataError, match=message):
        read_manifest(path)


def test_file_names_with_dots_quotes_spaces_and_commas_are_read_as_they_are(tmp_path):
    for name in ("..a.png", ".b/c.png", 'q".png', " s .png", "c,d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    lines = ["path,label", "..a.png,k", ".b/c.png,k", '"q"".png",l', " s .png,l", '"c,d.png",l']
    index = _read(_write(tmp_path, lines, files=False))
    assert list(index.paths) == ["..a.png", ".b/c.png", " s .png", "c,d.png", 'q".png']


@pytest.mark.parametrize("spelling", PART_OF)
def test_split_column_takes_the_names_of_part_folders_in_any_case(tmp_path, spelling):
    lines = ["path,label,split", f"1.png,a,{spelling.upper()}", f"2.png,b, {spelling.title()}"]
    manifest = read_manifest(_write(tmp_path, lines))
    assert manifest.parts == [PART_OF[spelling]]
    assert len(manifest.index(PART_OF[spelling])) == 2


def test_split_column_makes_the_parts(tmp_path):
    lines = ["path,label,split", "1.png,a,Train", "2.png,b,TRAINING", "3.png,b,valid", "4.png,a,test "]
    path = _write(tmp_path, lines)
    manifest = read_manifest(path)
    assert manifest.parts == ["train", "val", "test"]
    assert entries(manifest.index("train")) == [("1.png", "a"), ("2.png", "b")]
    assert entries(manifest.index("val")) == [("3.png", "b")]
    assert entries(manifest.index("test")) == [("4.png", "a")]
    assert manifest.index("test", ["b", "a"]).labels.tolist() == [1]
    split = _split(path)
    assert entries(split.val.index) == [("3.png", "b")]
    assert split.origin == f"2 rows to train on and 1 to validate on of {path}"


@pytest.mark.parametrize("column", ["", ",train"])
def test_rows_without_a_part_to_validate_on_are_split_by_class(tmp_path, column):
    header = f"path,label{column and ',split'}"
    lines = [header, *(f"{i}.png,{'ab'[i % 2]}{column}" for i in range(20))]
    split = _split(_write(tmp_path, lines), val_fraction=0.2, seed=3)
    assert split.train.index.counts().tolist() == [8, 8]
    assert split.val.index.counts().tolist() == [2, 2]
    rows = f"{'the train rows of ' if column else ''}{tmp_path / 'm.csv'}"
    assert split.origin == f"0.2 of each class of {rows} held out for validation, seed 3"


def test_group_column_keeps_groups_whole(tmp_path):
    lines = ["path,label,group", *(f"{i}.png,{'ab'[i % 2]},g{i // 4}" for i in range(40))]
    split = _split(_write(tmp_path, lines), val_fraction=0.3)
    assert not set(split.train.index.groups) & set(split.val.index.groups)
    assert len(set(split.val.index.groups)) == 3
    assert "0.3 of the groups of each class (the manifest's; 12 of 40 images)" in split.origin


def test_pattern_takes_the_place_of_a_group_column_but_not_both(tmp_path):
    lines = ["path,label", *(f"p{i // 4}_{i}.png,{'ab'[i % 2]}" for i in range(40))]
    split = _split(_write(tmp_path / "a", lines), val_fraction=0.3, group_by=r"(p\d+)_")
    groups = [{path.split("_")[0] for path in part.paths} for part in (split.train.index, split.val.index)]
    assert not groups[0] & groups[1]
    assert len(groups[1]) == 3
    both = _write(
        tmp_path / "b", [lines[0] + ",group", *(f"{line},g{i}" for i, line in enumerate(lines[1:]))]
    )
    with pytest.raises(
        ConfigError, match=r"data\.group_by .* has no effect: the manifest has a group column"
    ):
        _split(both, group_by=r"(p\d+)_")


@pytest.mark.parametrize("part", ["val", "test"])
def test_group_in_two_parts_is_refused(tmp_path, part):
    lines = ["path,label,split,group", "1.png,a,train,g1", "2.png,b,train,g2", f"3.png,b,{part},g1"]
    with pytest.raises(DataError, match=rf"m\.csv: 1 group\(s\) are in train and in {part}: g1\."):
        read_manifest(_write(tmp_path, lines))


def test_group_of_a_pattern_in_two_parts_is_refused(tmp_path):
    lines = ["path,label,split", "p1_1.png,a,train", "p2_2.png,b,train", "p3_3.png,b,val"]
    assert "no group of '(p" in _split(_write(tmp_path, lines), group_by=r"(p\d)").origin
    with pytest.raises(DataError, match=r"1 group\(s\) are in train and in val: p1\."):
        _split(_write(tmp_path, [*lines, "p1_4.png,a,val"]), group_by=r"(p\d)")


def test_weights_are_read_as_numbers_and_go_with_their_images(tmp_path):
    lines = ["path,label,weight", "3.png,b,0", "1.png,a, 2.5", "2.png,a,1e-3"]
    train = _read(_write(tmp_path, lines))
    assert list(train.paths) == ["1.png", "2.png", "3.png"]
    assert train.weights.dtype == np.float64
    assert train.weights.tolist() == [2.5, 0.001, 0.0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [],
            r"has no column path and no column label\. Its columns: none\. It must have path and label, and",
        ),
        (["path,label"], r"m\.csv has no rows\."),
        (["file;label", "1.png;a"], r"has no column path\. Its columns: file, label\."),
        (["path\tclass", "1.png\ta"], r"has no column label\. Its columns: path, class\."),
        (["path,label,Path", "1,a,1"], r"has the column path more than once"),
        (["path,label,groups", "1,a,g"], r"has a column groups, which has no effect\. Call it group, or"),
        (["path,label,Weights", "1,a,1"], r"has a column weights, which has no effect\. Call it weight"),
        ([*ROWS, "5.png"], r"has 2 columns, but 1 row\(s\) have not: row 6 has 1\."),
        (
            [*ROWS, "5,1.png,a", "6.png,a,,"],
            r"but 2 row\(s\) have not: row 6 has 3, row 7 has 4\..* in quotes",
        ),
        ([*ROWS, '5.png,"a'], r"cannot be read after row 5: unexpected end of data"),
        ([*ROWS, "5.png, ", "6.png,"], r"2 of 6 rows have an empty label: row 6, row 7\."),
        ([*ROWS, ",cat"], r"1 of 5 rows have an empty path: row 6\."),
        (
            ["path,label,split", "1,a,train", "2,b,dev"],
            r"1 of 2 rows .* not known: row 3 \('dev'\)\. Known: tr",
        ),
        (["path,label,split", "1,a,train", "2,b,"], r"1 of 2 rows have an empty split: row 3\."),
        (["path,label,split", "1,a,val", "2,b,val"], r"has no row to train on"),
        (
            ["path,label,split", "1,a,train", "2,b,train", "3,c,val"],
            r"that no training row has: row 4 \('c'\)",
        ),
        (["path,label", "1,a", "2,a"], r"has only one label to train on \(a\)"),
        (["path,label,group", "1,a,g", "2,b, "], r"1 of 2 rows have an empty group: row 3\."),
        (["path,label,weight", "1,a,1", "2,b,"], r"1 of 2 rows have an empty weight: row 3\."),
        (["path,label,weight", "1,a,nan", "2,b,1"], r"not a number from 0 on: row 2 \('nan'\)"),
        (["path,label,weight", "1,a,inf", "2,b,x"], r"2 of 2 rows .*: row 2 \('inf'\), row 3 \('x'\)"),
        (["path,label,weight", "1,a,-1", "2,b,1"], r"not a number from 0 on: row 2 \('-1'\)"),
        (["path,label,weight", "1,a,0", "2,b,0"], r"all rows to train on have weight 0"),
        (
            ["path,label", *(f"{i}.png," for i in range(100))],
            r"100 of 100 rows have .*: row 2, row 3, row 4, row 5, row 6 and more\.$",
        ),
        (  # rows are counted as a spreadsheet counts them
            ["path,label,note", '1.png,a,"two\nlines"', "", "2.png,,x"],
            r"1 of 2 rows have an empty label: row 4\.",
        ),
    ],
)
def test_each_fault_is_one_clear_error_with_its_rows(tmp_path, lines, message):
    path = tmp_path / "m.csv"
    path.write_text("".join(f"{line}\n" for line in lines))
    for line in filter(None, lines[1:]):
        image = tmp_path / line.replace(";", ",").split(",")[0]
        image.parent.mkdir(exist_ok=True)
        image.touch()
    with pytest.raises(DataError, match=message) as error:
        split_for_training(find_parts(path, name="data.root"), val_fraction=0.5, seed=0)
    assert str(error.value).startswith(f"data.root {path}")
    assert "\n" not in str(error.value)


def test_absent_files_are_counted_and_named_when_their_part_is_indexed(tmp_path):
    path = _write(tmp_path, ROWS)
    (tmp_path / "x/2.png").unlink()
    (tmp_path / "4.png").unlink()
    (tmp_path / "4.png").mkdir()
    manifest = read_manifest(path)
    message = (
        r"2 of 4 rows have a path where there is no file: row 3 \('x/2\.png'\), row 5 \('4\.png'\)\. Rel"
    )
    with pytest.raises(DataError, match=message):
        manifest.index("all")


def test_a_table_with_faults_is_read_whole_for_those_who_look_for_them(tmp_path):
    lines = ["path,label,split,weight", "1.png,,train,x", ",b,dev,1"]
    manifest, faults = inspect_manifest(_write(tmp_path, lines, files=False))
    assert manifest.part_of == ["train", ""]
    assert {fault.text: fault.positions for fault in faults if fault.positions} == {
        "an empty path": [1],
        "an empty label": [0],
        "a weight that is not a number from 0 on": [0],
        "a split that is not known": [1],
    }


@pytest.mark.skipif(os.sep != "/", reason="there it separates folders")
def test_backslashes_of_another_system_are_pointed_out(tmp_path):
    path = _write(tmp_path, ["path,label", r"x\1.png,a", r"x\2.png,b"], files=False)
    with pytest.raises(DataError, match=r"2 of 2 .* Folders are separated by / here\."):
        _read(path)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_table_that_is_not_utf8_is_refused(tmp_path, encoding):
    (tmp_path / "m.csv").write_bytes("path,label\n1.png,café\n".encode(encoding))
    with pytest.raises(
        DataError, match=r"m\.csv is not UTF-8, from about row \d on\. Save it as CSV UTF-8\."
    ):
        read_manifest(tmp_path / "m.csv")


def test_missing_table_and_folder_in_its_place_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"^--data .*none\.csv does not exist\.$"):
        read_manifest(tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"^--images .* is not a file\.$"):
        read_manifest(tmp_path, name="--images")


def test_what_is_a_manifest_is_told_by_the_ending(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    assert not is_manifest(tmp_path / "folder.csv")
    assert all(is_manifest(name) for name in ("a.csv", "b/A.CSV", "a.tsv", "a.parquet"))
    assert not any(is_manifest(name) for name in ("csv", "a.png", "data/train"))
