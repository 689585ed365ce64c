"""The command line: parser (arguments, exit codes), commands (what each does), views (what a person sees)."""

from .parser import main

__all__ = ["main"]
