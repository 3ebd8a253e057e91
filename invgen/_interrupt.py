"""Ctrl-C that waits for the end of a step, so that what is saved can be continued."""

from __future__ import annotations

import signal
import threading
from typing import Any

__all__ = ["Stop"]


class Stop:
    """Turns Ctrl-C into a wish: a step cut in half would leave a state that no resumed run can reproduce.

    A second Ctrl-C interrupts at once. Outside the main thread signals cannot be caught and nothing changes.
    """

    def __init__(self, *, active: bool = True) -> None:
        self.asked = False
        self._active = active and threading.current_thread() is threading.main_thread()
        self._before: Any = None

    def __enter__(self) -> Stop:
        if self._active:
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: object) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._before if self._before is not None else signal.SIG_DFL)
