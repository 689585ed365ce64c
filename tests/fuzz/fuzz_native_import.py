"""Arrays in the canonical layout that lie: the native importer refuses them in words, or makes a cache of use."""

from __future__ import annotations

import argparse

from libfuzzer import fuzz as libfuzzer


def fuzz(args: argparse.Namespace) -> None:
    """Run this fuzzer."""
    libfuzzer(args, "native_import")
