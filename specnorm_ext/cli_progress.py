"""The progress bar of the ``specnorm-ext`` command."""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

__all__ = ["ProgressBar"]


class ProgressBar:
    """A bar on standard error, if that is a terminal, once the work has taken ``delay`` seconds.

    A timer starts it: the first matrix may take long to converge, and its callback comes only then.
    """

    def __init__(self, enabled: bool, delay: float = 1.0, console: Console | None = None) -> None:
        self._console = console
        self._enabled = enabled and (console is not None or sys.stderr.isatty())
        self._lock = threading.Lock()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._done, self._total = 0, 0
        self._closed = False
        self._timer = threading.Timer(delay, self._show)
        self._timer.daemon = True

    def __enter__(self) -> ProgressBar:
        if self._enabled:
            self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        with self._lock:
            self._closed = True
            if self._bar is not None:
                self._bar.stop()

    def update(self, done: int, total: int) -> None:
        with self._lock:
            self._done, self._total = done, total
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, completed=done, total=total)

    def _show(self) -> None:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress
        except ImportError:
            return  # a convenience; without rich the report goes on in silence
        with self._lock:
            if self._closed:
                return
            self._bar = Progress(
                "matrices",
                BarColumn(),
                MofNCompleteColumn(),
                console=self._console or Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("", completed=self._done, total=self._total or None)
            self._bar.start()
