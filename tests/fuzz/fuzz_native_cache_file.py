"""Cache files with a right checksum that lie: libonnx_kivi refuses them, or saves the cache as the same file."""

from __future__ import annotations

import argparse

from libfuzzer import fuzz as libfuzzer


def fuzz(args: argparse.Namespace) -> None:
    """Run this fuzzer."""
    libfuzzer(args, "native_cache_file")
