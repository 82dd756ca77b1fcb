"""A table in Parquet is read as the same table in text would be."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.data.files import entries, touch
from vit_cls.data.index import ImageIndex
from vit_cls.data.manifest import read_manifest
from vit_cls.errors import DataError


def _read(path: Path) -> ImageIndex:
    return read_manifest(path).index("all")


class _Column(list):
    to_pylist = list.copy


class _Content(dict):
    column = dict.__getitem__


@pytest.fixture
def fake_parquet(monkeypatch):
    """A pyarrow that knows one table: columns by name."""

    def install(columns: dict[str, list]):
        module = ModuleType("pyarrow.parquet")
        module.read_schema = lambda path: type("Schema", (), {"names": list(columns)})
        module.read_table = lambda path, columns: _Content({c: _Column(given[c]) for c in columns})
        given = columns
        monkeypatch.setitem(sys.modules, "pyarrow", ModuleType("pyarrow"))
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)

    return install


def test_parquet_cells_are_read_as_text_would_be(tmp_path, fake_parquet):
    for name in "123":
        (tmp_path / name).touch()
    (tmp_path / "m.parquet").touch()
    fake_parquet({"Weight": [1.5, 2, 0.0], "label": [7, 10.0, 7], "x": [None] * 3, "path": ["1", "2", "3"]})
    train = _read(tmp_path / "m.parquet")
    assert entries(train) == [("2", "10"), ("1", "7"), ("3", "7")]
    assert train.weights.tolist() == [2.0, 1.5, 0.0]


@pytest.mark.parametrize("empty", [None, float("nan"), ""])
def test_rows_of_parquet_are_counted_from_one(tmp_path, fake_parquet, empty):
    (tmp_path / "m.pq").touch()
    fake_parquet({"path": ["1", "2"], "label": ["a", empty]})
    with pytest.raises(DataError, match=r"1 of 2 rows have an empty label: row 2\."):
        read_manifest(tmp_path / "m.pq")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "m.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        DataError, match=r"m\.parquet cannot be read without pyarrow\. Install it .* as CSV\.$"
    ):
        read_manifest(tmp_path / "m.parquet")


def test_file_that_only_claims_to_be_parquet_is_refused(tmp_path, fake_parquet):
    (tmp_path / "m.parquet").touch()
    fake_parquet({})

    def refuse(path):
        raise ValueError("Parquet magic bytes not found in footer")

    sys.modules["pyarrow.parquet"].read_schema = refuse
    with pytest.raises(DataError, match=r"m\.parquet is not a Parquet file: Parquet magic bytes not found"):
        read_manifest(tmp_path / "m.parquet")


@pytest.mark.parametrize("rows", [30])
def test_real_parquet_is_the_same_as_csv(tmp_path, rows):
    pyarrow = pytest.importorskip("pyarrow", reason="optional")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {
        "path": [f"{i}.png" for i in range(rows)],
        "label": [f"c{i % 3}" for i in range(rows)],
        "group": [i // 2 for i in range(rows)],
        "weight": [i / 8 for i in range(rows)],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "m.parquet")
    lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    touch(tmp_path, *columns["path"])
    (tmp_path / "m.csv").write_text("\n".join(lines))
    a = _read(tmp_path / "m.csv")
    b = _read(tmp_path / "m.parquet")
    assert entries(a) == entries(b)
    assert list(a.groups) == list(b.groups)
    assert a.weights.tolist() == b.weights.tolist()
