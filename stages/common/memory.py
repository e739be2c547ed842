"""What is too large for this machine is refused before it is tried: the system would kill the stage, or hang."""

import os
import resource
import sys

from stages.common.errors import UserError


def check_memory(needed: int, what: str) -> None:
    """Raises UserError when this machine has less memory than the bytes needed for `what`, "KEY: why: what to do"."""
    here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > here:
        key, why, advice = what.split(": ", 2)
        raise UserError(
            f"{key}: {why} would need about {needed / 1e9:,.0f} GB, this machine has {here / 1e9:,.0f}: {advice}"
        )


def peak_memory() -> int:
    """The most bytes of memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
