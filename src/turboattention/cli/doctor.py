"""``turboattention doctor``: reports the features of this machine, and which backends work on it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .machine import Machine, examine
from .missing import INSTALL
from .output import bytes_text, print_json, results
from .progress import Bars


def doctor(json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False) -> None:
    """Show the features of this machine, which backends work on it, and why the others do not."""
    with Bars(hidden=json).task("Looking around"):
        machine = examine()
    if json:
        print_json(machine.as_json())
    else:
        _show(machine, results())


def _show(machine: Machine, console: Console) -> None:
    console.print(_facts(machine))
    console.print()
    console.print(_backends(machine))
    if machine.missing:
        console.print(f"Not installed: {', '.join(machine.missing)}. For everything: {INSTALL}", markup=False)


def _facts(machine: Machine) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    versions = [f"{name} {version or 'missing'}" for name, version in machine.packages.items()]
    rows = {
        "turboattention": machine.turboattention,
        "packages": ", ".join(versions),
        "Python": f"{machine.python} on {machine.platform}",
        "CPU": f"{machine.cpu}, cores for this process: {machine.cores}, threads used: {machine.threads}",
        "instructions": _features(machine),
        "memory": _memory(machine),
        "GPU": "; ".join(machine.gpus) or "none that torch can use",
        "model": machine.model or "the bundled model is not here; name one with --model",
        "text": machine.text or "the bundled text is not here",
    }
    for name, value in rows.items():
        table.add_row(name, value if isinstance(value, Text) else Text(value))
    return table


def _features(machine: Machine) -> str:
    if not machine.features:
        return "unknown on this system"
    have = [name for name, there in machine.features.items() if there]
    lack = [name for name, there in machine.features.items() if not there]
    return (" ".join(have) or "none of those used") + (f" (not: {' '.join(lack)})" if lack else "")


def _memory(machine: Machine) -> str:
    if machine.memory is None:
        return "unknown on this system"
    free = f", {bytes_text(machine.memory_available)} available" if machine.memory_available is not None else ""
    return bytes_text(machine.memory) + free


def _backends(machine: Machine) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("backend", style="bold", no_wrap=True)
    table.add_column("works", no_wrap=True)
    table.add_column("why", overflow="fold")
    for backend in machine.backends:
        usable = Text("yes", style="green") if backend["usable"] else Text("no", style="red")
        table.add_row(backend["name"], usable, Text(backend["reason"]))
    return table
