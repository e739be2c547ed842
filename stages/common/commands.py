"""The command line of stages and tools: help keeps its lines, a mistake is one line."""

import argparse

from stages.common.errors import UserError


class CommandLine(argparse.ArgumentParser):
    """The command `python -m MODULE`, described by its module's docstring."""

    def __init__(self, module: str, doc: str, **kwargs):
        kwargs |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(prog=f"python -m {module}", description=doc, **kwargs)

    def error(self, message: str) -> None:
        raise UserError(f"{' '.join(message.split())}: see {self.prog} --help")
