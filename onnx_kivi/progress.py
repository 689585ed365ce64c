"""How long work says where it is: a callable that takes what is being done (nothing: all done) and how far (0 to 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

Progress = Callable[[str, float], None]


def silent(what: str, fraction: float) -> None:
    """Progress that nobody watches."""


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A bar on `console` while the block runs; plain lines where it is no terminal, one for each new `what`."""
    if not console.is_terminal:
        said: list[str] = []

        def line(what: str, fraction: float) -> None:  # noqa: ARG001
            if what and said[-1:] != [what]:
                said.append(what)
                console.print(what, markup=False, highlight=False)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def update(what: str, fraction: float) -> None:
            bar.update(task, description=what, completed=fraction)
            if not what:
                bar.stop()

        yield update
