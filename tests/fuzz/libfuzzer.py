"""A fuzzer in native/, built with Clang under the address and undefined-behaviour sanitizers, guided by libFuzzer."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "custom_ops"
BUILD = HERE.parents[1] / "build" / "fuzz"

LONGEST_SECONDS = 20
LONGEST_INPUT = 4096


def fuzz(args: argparse.Namespace, name: str) -> None:
    """Run native/NAME.cpp on its corpus, and end the process with its exit code. New inputs stay with the findings."""
    program = _build(name)
    if args.replay:
        sys.exit(subprocess.run([program, *args.replay], check=False).returncode)
    kept = args.findings / name
    kept.mkdir(exist_ok=True)
    flags = [
        f"-max_total_time={args.seconds}",
        f"-seed={args.seed or 1}",
        f"-timeout={LONGEST_SECONDS}",
        f"-max_len={LONGEST_INPUT}",
        f"-artifact_prefix={args.findings}/",
        "-print_final_stats=1",
    ]
    sys.exit(subprocess.run([program, *flags, kept, HERE / "corpus" / name], check=False).returncode)


def _build(name: str) -> Path:
    compiler = os.environ.get("CXX", "clang++")
    options: list[str] = ["-DKIVI_FUZZ=ON", "-DKIVI_SANITIZE=address,undefined", f"-DCMAKE_CXX_COMPILER={compiler}"]
    subprocess.run(["cmake", "-S", str(SOURCE), "-B", str(BUILD), *options], check=True, stdout=subprocess.DEVNULL)
    build = ["cmake", "--build", str(BUILD), "--target", name, "--parallel", str(os.cpu_count())]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    return BUILD / name
