"""A file of measured records: written whole after every point, so that a run can stop and resume anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from derivation.config.json_file import read_json
from derivation.errors import unsupported
from derivation.files import write_file

FORMAT = "derivation-measurements-1"
# A point that failed for another reason than memory is measured again on resuming.
FINAL = ("ok", "oom")


@dataclass
class Records:
    """Measured records by key, with the file they are kept in."""

    path: Path
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, must_exist: bool = False) -> Records:
        """Return the records of ``path``, none where it does not exist; raises DerivationError for another format."""
        if not must_exist and not os.path.lexists(path):
            return cls(path)
        content = read_json(path)
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, Mapping) else content
            raise unsupported(f"{path}: format", found, FORMAT)
        records = content.get("records")
        if not isinstance(records, Mapping) or not all(isinstance(r, Mapping) for r in records.values()):
            raise unsupported(f"{path}: records", records, "objects by key")
        return cls(path, {key: dict(record) for key, record in records.items()})

    def done(self, key: str) -> bool:
        """Return whether ``key`` was measured, or did not fit."""
        return self.records.get(key, {}).get("status") in FINAL

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep a record and write the file."""
        self.records[key] = dict(record)
        self.save()

    def save(self) -> None:
        """Write the file in one step; raises DerivationError where that is not possible."""
        write_json(self.path, {"format": FORMAT, "records": self.records})


def described(versions: Mapping[str, Any], *names: str) -> str:
    """Return the versions called ``names`` of a record, in one line, unknown ones left out."""
    return ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name) is not None)


def write_json(path: Path, content: object) -> None:
    """Write JSON to ``path`` in one step; raises DerivationError where that is not possible."""
    write_file(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
