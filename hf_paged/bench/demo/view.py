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
    sides = _sides(ours, stock)
    table = Table(show_lines=True, expand=True)
    table.add_column("prompt", ratio=2)
    for name in sides:
        table.add_column(name, ratio=3)
    if stock is not None:
        table.add_column("same", justify="center")
    for index, prompt in enumerate(prompts):
        texts = [prompt, *(chat.decode(run.outputs[index]) for run in sides.values())]
        # Text, not markup: what a model writes may hold square brackets.
        cells = [Text(text if full else textwrap.shorten(text, SHOWN, placeholder=" …")) for text in texts]
        if stock is not None:
            same = stock.outputs[index] == ours.outputs[index]
            cells.append(Text("yes", "green") if same else Text("no", "bold red"))
        table.add_row(*cells)
    console.print(table)


def summary(console: Console, ours: Run, stock: Run | None) -> None:
    """Print speeds and KV memory, and how many answers are the same token by token."""
    sides = _sides(ours, stock)
    table = Table(expand=True)
    table.add_column("")
    for name in sides:
        table.add_column(name, justify="right")
    lines = {
        "useful tokens": lambda run: f"{run.tokens:,}",
        "seconds": lambda run: f"{run.seconds:.1f}",
        "useful tokens a second": lambda run: f"{run.tokens_per_second:.1f}",
        "KV token slots reserved": lambda run: f"{run.kv.reserved_tokens:,}",
        "KV token slots used": lambda run: f"{run.kv.used_tokens:,}",
        "KV slots wasted": lambda run: f"{run.kv.waste:.1%}" if run.kv.reserved_tokens else "none seen",
        "KV memory at its peak": lambda run: f"{run.kv.peak_bytes / MIB:.1f} MiB",
    }
    for name, cell in lines.items():
        table.add_row(name, *map(cell, sides.values()))
    console.print(table)
    if stock is not None:
        total, same = len(ours.outputs), sum(a == b for a, b in zip(ours.outputs, stock.outputs, strict=True))
        console.print(
            f"[bold {'green' if same == total else 'red'}]tokens identical: {same}/{total}[/]; hf_paged is "
            f"[bold]{ours.tokens_per_second / stock.tokens_per_second:.2f} times[/] as fast as stock generate()"
        )


def _sides(ours: Run, stock: Run | None) -> dict[str, Run]:
    return {"hf_paged": ours} if stock is None else {"stock generate()": stock, "hf_paged": ours}
