"""The command line of stages and tools: help keeps its lines, a mistake is one line."""

import argparse
from typing import Any

from stages.common.errors import UserError

from tqdm import tqdm


class CommandLine(argparse.ArgumentParser):
    """The command `python -m MODULE`, described by its module's docstring."""

    def __init__(self, module: str, doc: str, **kwargs: Any):
        kwargs |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(prog=f"python -m {module}", description=doc, **kwargs)

    def error(self, message: str) -> None:
        raise UserError(f"{' '.join(message.split())}: see {self.prog} --help")


def progress_bar(total: int, what: str, unit: str = "B", shown: bool = True) -> tqdm:
    """A bar on a terminal, and nothing elsewhere."""
    disable = None if shown else True
    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, mininterval=1, disable=disable)
