"""How a comparison looks in a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_paged.bench.demo.compare import Chat
from hf_paged.bench.report import MIB
from hf_paged.bench.run import Run

SHOWN = 180  # characters of an answer, unless all of it is asked for


def answers(console: Console, chat: Chat, prompts: Sequence[str], ours: Run, stock: Run | None, full: bool) -> None:
    """Print each prompt with its answers: stock's and the patched one's side by side, or the patched one's alone."""
    table = Table(show_lines=True, expand=True)
    table.add_column("prompt", ratio=2)
    if stock is not None:
        table.add_column("stock generate()", ratio=3)
    table.add_column("hf_paged", ratio=3)
    if stock is not None:
        table.add_column("same", justify="center")
    for index, prompt in enumerate(prompts):
        # Text, not markup: what a model writes may hold square brackets.
        cells = [Text(_short(prompt, full))]
        if stock is not None:
            cells.append(Text(_short(chat.decode(stock.outputs[index]), full)))
        cells.append(Text(_short(chat.decode(ours.outputs[index]), full)))
        if stock is not None:
            same = stock.outputs[index] == ours.outputs[index]
            cells.append(Text("yes", "green") if same else Text("no", "bold red"))
        table.add_row(*cells)
    console.print(table)


def summary(console: Console, ours: Run, stock: Run | None) -> None:
    """Print speeds and KV memory, and how many answers are the same token by token."""
    table = Table(expand=True)
    table.add_column("")
    for name, right in (("stock generate()", stock), ("hf_paged", ours)):
        if right is not None:
            table.add_column(name, justify="right")
    runs = [run for run in (stock, ours) if run is not None]
    lines = {
        "useful tokens": [f"{run.tokens:,}" for run in runs],
        "seconds": [f"{run.seconds:.1f}" for run in runs],
        "useful tokens a second": [f"{run.tokens_per_second:.1f}" for run in runs],
        "KV token slots reserved": [f"{run.kv.reserved_tokens:,}" for run in runs],
        "KV token slots used": [f"{run.kv.used_tokens:,}" for run in runs],
        "KV slots wasted": [f"{run.kv.waste:.1%}" if run.kv.reserved_tokens else "none seen" for run in runs],
        "KV memory at its peak": [f"{run.kv.peak_bytes / MIB:.1f} MiB" for run in runs],
    }
    for name, cells in lines.items():
        table.add_row(name, *cells)
    console.print(table)
    if stock is not None:
        same = sum(a == b for a, b in zip(ours.outputs, stock.outputs, strict=True))
        total = len(ours.outputs)
        console.print(
            f"[bold {'green' if same == total else 'red'}]tokens identical: {same}/{total}[/]; hf_paged is "
            f"[bold]{ours.tokens_per_second / stock.tokens_per_second:.2f} times[/] as fast as stock generate()"
        )


def _short(text: str, full: bool) -> str:
    return text if full else textwrap.shorten(text, SHOWN, placeholder=" …")
