"""The command `doconv`: what is in a checkpoint file, folded, converted, counted, compared."""

from doconv_core.cli.command import doconv, main

__all__ = ["doconv", "main"]
