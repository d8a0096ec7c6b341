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
        if isinstance(field.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        else:
            group.add_argument(flag, default=field.default, metavar="VALUE", help=text)


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options that differ from their defaults; raises DerivationError for a bad value."""
    hints, unset = get_type_hints(Options), Options().as_dict()
    values = {name: value_of(name, hints[name], getattr(arguments, name)) for name in unset}
    return {name: value for name, value in values.items() if value != unset[name]}
