"""Progress: one bar in a live JupyterLab or terminal, one line an epoch anywhere else; nothing on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

Tell = Callable[[str], None]
"""Where lines of text for the user go."""


class Progress:
    """Counts epochs of one piece of work.

    Parameters
    ----------
    name : str
        What is being done.
    total, done : int
        Epochs in all, and those found finished.
    """

    def __init__(self, name: str, total: int, done: int = 0) -> None:
        self.name, self.total, self.done = name, total, done
        self.bar: Any = None
        if bar := live_bar():
            self.bar = bar(total=total, initial=done, desc=name, file=sys.stdout)
        elif done:
            print(f"{name}: goes on after epoch {done}", flush=True)

    def epoch(self, text: str) -> None:
        """One more epoch is done."""
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        else:
            print(f"{self.name} {self.done}/{self.total}: {text}", flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()


def live_bar() -> Any:
    """The bar that fits, or None: Jupyter Server names its sessions in the environment, papermill and nbval do not."""
    if "ipykernel" in sys.modules:
        if "JPY_SESSION_NAME" in os.environ:
            from tqdm.notebook import tqdm

            return tqdm
        return None
    if sys.stdout.isatty():
        from tqdm import tqdm

        return tqdm
    return None
