"""Progress as a person sees it: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from ..progress import Progress


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A bar on `console` while the block runs, with an estimate of the time that is left.

    Where it is no terminal: plain lines, one for each new `what`.
    """
    if not console.is_terminal:
        said: list[str] = []

        def line(what: str, fraction: float) -> None:  # noqa: ARG001
            if what and said[-1:] != [what]:
                said.append(what)
                console.print(what, markup=False, highlight=False)

        yield line
        return
    times = (TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    with Bar(TextColumn("{task.description}"), BarColumn(), *times, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def update(what: str, fraction: float) -> None:
            bar.update(task, description=what, completed=fraction)
            if not what:
                bar.stop()

        yield update
