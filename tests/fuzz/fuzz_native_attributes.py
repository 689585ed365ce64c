"""Attributes of any text and size: the native parser takes what is finite and within limits, and refuses in ASCII."""

from __future__ import annotations

import argparse

from libfuzzer import fuzz as libfuzzer


def fuzz(args: argparse.Namespace) -> None:
    """Run this fuzzer."""
    libfuzzer(args, "native_attributes")
