"""A user's mistake is one line and exit status 1, never a traceback."""

import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from stages.common import USUAL_GC


class UserError(Exception):
    """A mistake in the user's input; its text is the one line that the user reads."""

    def __init__(self, text: str):
        # A key or a file name may hold anything, line ends too.
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


class OneProcessError(UserError):
    """A mistake that only one of the processes that train together has seen."""


def one_line(error: BaseException, limit: int = 200) -> str:
    """What another library's error says, on one line of bounded length."""
    return " ".join(str(error).split())[:limit]


def not_written(path: str | Path, error: BaseException) -> UserError:
    """The disk is full, or a file can't be written for another reason."""
    return UserError(f"{path}: can't be written ({one_line(error)}): free some disk space, then `dvc repro` goes on")


def note(text: str) -> None:
    """Says in one line on standard error what is no mistake, but good to know."""
    print(f"note: {text}", file=sys.stderr)


def leave_it_to_the_first(seconds: float = 10) -> None:
    """Processes that train together find the same mistake, and the first one on each machine says it.

    A launcher stops all of them when one ends, so the others end after it, or when it has had `seconds` for that.

    Raises:
        SystemExit: in the others.
    """
    if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        return
    launcher, end = os.getppid(), time.monotonic() + seconds
    while os.getppid() == launcher and time.monotonic() < end:  # Lightning's launcher is the first one itself
        time.sleep(0.1)
    sys.exit(1)


def run(main: Callable[[], None]) -> None:
    """Runs a command's main(): a mistake of the user's ends it with one line and exit status 1."""
    gc.freeze()
    gc.set_threshold(*USUAL_GC)
    try:
        main()
    except UserError as error:
        if not isinstance(error, OneProcessError):
            leave_it_to_the_first()
        sys.exit("error: " + " ".join(str(error).splitlines()))
    except BrokenPipeError:
        os._exit(1)
    except OSError as error:
        # A full disk or a file without permission is no bug of ours, so no traceback.
        sys.exit(f"error: {error.filename or 'writing output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException as error:
        # A regular expression that never ends, for one; Rust has said on standard error where.
        if type(error).__name__ != "PanicException":
            raise
        sys.exit(
            f"error: the tokenizer gave up on this text ({one_line(error)}): set another tokenizer.tokenizer_model"
        )
