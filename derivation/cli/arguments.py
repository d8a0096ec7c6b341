"""argparse's view of the options, for build_report.py."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, get_type_hints

from derivation.cli.parameters import help_of, value_of
from derivation.options import Options


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add one argument for every option of a derivation."""
    group = parser.add_argument_group("options of the derivation")
    for field in fields(Options):
        flag, text = f"--{field.name.replace('_', '-')}", help_of(field.name).replace("%", "%%")
        kind: dict[str, Any] = {"metavar": "VALUE"}
        if isinstance(field.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        group.add_argument(flag, default=argparse.SUPPRESS, help=text, **kind)


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options that somebody typed; raises DerivationError for a bad value."""
    hints, given = get_type_hints(Options), vars(arguments)
    return {f.name: value_of(f.name, hints[f.name], given[f.name]) for f in fields(Options) if f.name in given}
