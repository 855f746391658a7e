"""Progress bars for long steps: rate and time left on a terminal, nothing anywhere else."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """`with Progress("capture", total=n, unit="sequences") as p: p.advance(1, note="...")`.

    Draws on standard error, so that `--json` on standard output stays clean; silent when standard error
    is not a terminal.
    """

    def __init__(self, title: str, *, total: int, unit: str, shown: bool = True) -> None:
        console = Console(stderr=True)
        self._bar = RichProgress(
            TextColumn("{task.description:<28}"), BarColumn(bar_width=28), MofNCompleteColumn(),
            TextColumn(unit), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("[dim]{task.fields[note]}"),
            console=console, disable=not (shown and console.is_terminal), transient=False,
        )  # fmt: skip
        self._task = self._bar.add_task(title, total=total, note="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def advance(self, count: int, *, note: str = "") -> None:
        """Count `count` more units as done and show a short note beside the bar."""
        self._bar.update(self._task, advance=count, note=note)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
