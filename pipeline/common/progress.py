"""What a stage shows: messages, its progress and the time left. All other output goes to its log file."""

import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

LINE_EVERY = 10  # seconds, where there is no terminal

_screen: TextIO | None = None


@contextmanager
def logged(log: Path) -> Iterator[None]:
    """Redirect what this process and the programs that it starts print to the file `log`; only `say` and Bar are shown.

    The traceback of an error that ends the block is written to the log, too.
    """
    global _screen
    log.parent.mkdir(parents=True, exist_ok=True)
    _flush()
    with (
        log.open("wb") as stream,
        os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1) as screen,
        os.fdopen(os.dup(2), "wb") as errors,
    ):
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        _screen = screen
        try:
            yield
            _flush()
        except Exception:
            traceback.print_exc()
            raise
        finally:
            with suppress(OSError):  # the disk is full, and the block has failed for that already
                _flush()
            os.dup2(screen.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            _screen = None


def say(line: str) -> None:
    """Print `line` to the screen, and to the log when there is one."""
    if _screen is not None and _screen.isatty():
        tqdm.write(line, file=_screen)  # above the bar
    elif _screen is not None:
        _screen.write(line + "\n")
    print(line, flush=True)


class Bar(tqdm):  # type: ignore[type-arg]
    """The progress of a loop and the time left: a bar in a terminal, elsewhere a line every LINE_EVERY seconds."""

    monitor_interval = 0  # starts no thread

    def __init__(self, *arguments: Any, **options: Any) -> None:
        screen = _screen or sys.stdout
        self._plain = not screen.isatty()
        self._told = 0.0
        if self._plain:
            screen, options = io.StringIO(), options | {"mininterval": LINE_EVERY}  # no codes that move the cursor
        # Without smoothing, the time left follows from the mean pace. That of the last few items jumps.
        super().__init__(*arguments, **options | {"file": screen, "dynamic_ncols": True, "smoothing": 0})

    def display(self, *arguments: Any, **options: Any) -> None:
        """Show the bar, or outside a terminal a line if the loop has advanced."""
        if not self._plain:
            super().display(*arguments, **options)
        elif self.n != self._told:
            self._told = self.n
            time = " in {elapsed}" if self.n == self.total else ", {remaining} left"
            say(self.format_meter(**dict(self.format_dict, bar_format="{desc}: {n_fmt} of {total_fmt}" + time)))


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
