"""Help in panels: the options of a command by what they belong to, the commands by what they are for."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

from derivation.call import Call
from derivation.options import TABLE

HOMES = {"call": "The call", "pipeline": "The pipeline", "machine": "The machine"}
CALL = {*Call.__dataclass_fields__, "size", "guidance_scale", "aspect", "vram"}
LAST = "The answer"


def _panel(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return "Arguments"
    if parameter.name == "memory":
        return HOMES["machine"]
    row = TABLE.get(parameter.name)
    return HOMES[row.home] if row else HOMES["call"] if parameter.name in CALL else LAST


class PanelledCommand(TyperCommand):
    """A command whose options are listed in panels; option names are never cut off, as rich's panels do."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section a panel."""
        panels: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Arguments", *HOMES.values(), LAST)}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                panels[_panel(parameter)].append(record)
        _write(formatter, panels)


class PanelledGroup(TyperGroup):
    """A group whose commands are listed in panels."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section a panel, each summary whole where the terminal has room."""
        panels: dict[str, list[tuple[str, str]]] = {}
        widest = max(map(len, self.commands))
        for name, command in self.commands.items():
            summary = command.get_short_help_str(formatter.width - 6 - widest)
            panels.setdefault(str(command.rich_help_panel), []).append((name.ljust(widest), summary))  # type: ignore[attr-defined]
        _write(formatter, panels)


def _write(formatter: Any, panels: dict[str, list[tuple[str, str]]]) -> None:
    for title, records in panels.items():
        if records:
            with formatter.section(title):
                formatter.write_dl(records)
