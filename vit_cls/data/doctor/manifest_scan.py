"""Every row of a manifest, by what training would do with it; no image is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator

from vit_cls.data.doctor.issues import Finding, Offender
from vit_cls.data.doctor.scan import FoundImage, Scan
from vit_cls.data.manifest import Manifest, inspect_manifest
from vit_cls.data.parts import ALL


def scan_manifest(path: str, *, split: str | None = None) -> Scan:
    """List the images of a manifest, or of a part, each once; what is wrong with rows is a finding."""
    manifest, faults = inspect_manifest(path)
    table = manifest.table
    findings: list[Finding] = []
    unusable: set[int] = set()
    for fault in faults:
        unusable.update(fault.positions)
        for i in fault.positions:
            detail = f"{fault.text}: {table.columns[fault.column][i]!r}" if fault.column else fault.text
            findings.append(("bad_row", Offender(f"row {table.rows[i]}", detail)))
    rows = [i for i, part in enumerate(manifest.part_of) if i not in unusable and split in (None, part)]
    absent = set(manifest.absent_files(rows).positions)
    for i in sorted(absent):
        findings.append(("missing_file", Offender(manifest.paths[i], f"row {table.rows[i]}")))
    rows = [i for i in rows if i not in absent]
    first: dict[str, int] = {}
    for i in rows:
        if (other := first.setdefault(manifest.paths[i], i)) != i:
            findings += _repeated(manifest, other, i)
    findings += _shared_groups(manifest, rows)
    parts = [part for part in manifest.parts if part and split in (None, part)]
    names = {part: "" if part in (ALL, split) else part for part in parts}
    training = next((names[part] for part in parts if part in ("train", ALL)), None)
    scan = Scan(str(manifest.folder), list(names.values()), training, findings=findings)
    if training is None and split is None:
        scan.note_lack_of_training()
    labels = table.columns["label"]
    for part, name in names.items():
        own = [i for i in first.values() if manifest.part_of[i] == part]
        scan.classes[name] = sorted({labels[i] for i in own})
        scan.check_classes(name, "class(es)")
        for i in sorted(own, key=lambda i: (labels[i], manifest.paths[i])):
            path = manifest.paths[i]
            scan.images.append(FoundImage(path, name, labels[i], _size(os.path.join(scan.root, path))))
    return scan


def _repeated(manifest: Manifest, first: int, again: int) -> Iterator[Finding]:
    """What two rows about one file are: a repetition, and perhaps a contradiction."""
    rows, labels, parts = manifest.table.rows, manifest.table.columns["label"], manifest.part_of
    path, which = manifest.paths[again], f"rows {rows[first]} and {rows[again]}"
    yield "repeated_row", Offender(path, which)
    if labels[first] != labels[again]:
        yield "label_conflict", Offender(path, f"{which}: {labels[first]} and {labels[again]}", path)
    if parts[first] != parts[again]:
        yield "leakage", Offender(path, f"{which}: {parts[first]} and {parts[again]}", path)


def _shared_groups(manifest: Manifest, rows: list[int]) -> Iterator[Finding]:
    groups = manifest.table.columns.get("group")
    if groups is not None:
        parts: dict[str, set[str]] = {}
        for i in rows:
            parts.setdefault(groups[i], set()).add(manifest.part_of[i])
        for group, its_parts in sorted(parts.items()):
            if "train" in its_parts and len(its_parts) > 1:
                yield "shared_group", Offender(group, f"in {', '.join(sorted(its_parts))}")


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None
