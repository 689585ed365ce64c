"""What the compiled library is made of, and that it serves programs without Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

native = pytest.importorskip("onnx_kivi.runtime.native", reason="nothing is compiled here", exc_type=ImportError)

SOURCE = Path(__file__).parents[2] / "custom_ops"
FLAGS = {
    "x86_64": ["-march=x86-64"],
    "x86_64_v3": ["-march=x86-64-v3"],
    "x86_64_v4": ["-march=x86-64-v4"],
    "x86_64_v4_vnni": ["-march=x86-64-v4", "-mavx512vnni"],
}
# What a per-level object may take from outside: C functions, and the baseline's functions of the seam.
OUTSIDE = re.compile(r"memcpy|memmove|memset|__stack_chk_fail|_GLOBAL_OFFSET_TABLE_|_ZN9onnx_kivi\d+\w+")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


def symbols(*arguments: str) -> list[tuple[str, str]]:
    """(kind, name) of each symbol as nm sees it."""
    listing = subprocess.run(["nm", *arguments], capture_output=True, text=True, check=True).stdout
    return [(line.split()[-2], line.split()[-1]) for line in listing.splitlines() if len(line.split()) >= 2]


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm here")
def test_the_library_knows_nothing_of_python_and_exports_its_entry_points() -> None:
    found = symbols("-D", native.library_path())
    assert not [name for _, name in found if name.startswith(("Py", "_Py"))]
    exported = {name for kind, name in found if kind == "T"}
    header = (SOURCE / "include" / "onnx_kivi.h").read_text()
    declared = set(re.findall(r"^[a-z].*?\b(kivi_\w+)\(", header, re.MULTILINE))
    assert len(declared) >= 8
    assert declared | {"RegisterCustomOps"} <= exported
    assert {name for name in exported if name.startswith("kivi_")} == declared


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("level", FLAGS)
def test_objects_of_an_isa_level_share_no_code_and_run_nothing_at_start(tmp_path: Path, level: str) -> None:
    """Otherwise a linker could take the AVX-512 copy of a template, or a static initializer run it, for all CPUs."""
    target = tmp_path / "level.o"
    options = ["-std=c++20", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"]
    options += ["-fno-exceptions", "-fno-rtti", f"-DKIVI_ISA={level}", *FLAGS[level]]
    subprocess.run(["g++", *options, "-c", SOURCE / "kernel" / "kernel.cpp", "-o", target], check=True)
    found = symbols(str(target))
    assert not [name for kind, name in found if kind in "WwVvu"]
    assert not [name for kind, name in found if kind == "U" and not OUTSIDE.fullmatch(name)]
    assert [name for kind, name in found if kind in "RD"] == [f"_ZN9onnx_kivi{len(level)}{level}6KERNELE"]
    sections = subprocess.run(["objdump", "-h", target], capture_output=True, text=True, check=True).stdout
    assert ".init_array" not in sections
    assert ".ctors" not in sections


C_PROGRAM = """
#include <stdio.h>
#include <string.h>
#include "onnx_kivi.h"
int main(void) {
    int64_t a = kivi_new_cache(), b = kivi_fork_cache(a);
    if (a <= 0 || b <= 0 || a == b || kivi_cache_length(b) != 0 || kivi_cache_nbytes(b) != 0) return 1;
    if (kivi_free_cache(a) != 0 || kivi_free_cache(a) != -1) return 2;
    if (strstr(kivi_last_error(), "expected an open handle") == 0) return 3;
    if (kivi_crop_cache(b, 1) != -1 || kivi_cache_sealed_tokens(b) != 0) return 4;
    int64_t row = 0, lengths[1] = {7};
    if (kivi_cache_lengths(b, lengths, 1) != 0 || lengths[0] != 7 || kivi_cache_shared_nbytes(b) != 0) return 5;
    if (kivi_gather_rows(&b, &row, 1) != -1 || strstr(kivi_last_error(), "that holds tokens") == 0) return 6;
    if (kivi_crop_rows(b, lengths, 1) != -1 || strstr(kivi_last_error(), "expected 0 lengths") == 0) return 7;
    if (kivi_crop_rows(b, lengths, 0) != 0 || kivi_reset_cache(b) != 0) return 8;
    if (kivi_reorder_cache(b, &row, 1) != -1) return 9;
    printf("%s\\n", kivi_isa());
    return 0;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc here")
def test_a_c_program_uses_the_library(tmp_path: Path) -> None:
    (tmp_path / "main.c").write_text(C_PROGRAM)
    library = Path(native.library_path())
    build = ["gcc", "-std=c99", "-Wall", "-Wextra", "-Werror", f"-I{SOURCE / 'include'}", "main.c", "-o", "main"]
    subprocess.run([*build, str(library), f"-Wl,-rpath,{library.parent}"], cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, native.isa())


@needs_compiler
def test_our_header_agrees_with_the_official_one(tmp_path: Path, onnxruntime_include: Path) -> None:
    check = SOURCE / "checks" / "ort_abi_check.cpp"
    compiler = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{onnxruntime_include}"]
    subprocess.run([*compiler, check], check=True)
    ours = (SOURCE / "ort" / "ort_abi.hpp").read_text()
    declared = set(re.findall(r"^using (\w+) =\s*(?:Status)?Function<\d+", ours, re.MULTILINE))
    assert declared == set(re.findall(r"^CHECK_FUNCTION\((\w+)\)", check.read_text(), re.MULTILINE))
    wrong = tmp_path / "wrong" / "checks"
    shutil.copytree(SOURCE / "ort", tmp_path / "wrong" / "ort")
    wrong.mkdir()
    shutil.copy(check, wrong)
    (tmp_path / "wrong" / "ort" / "ort_abi.hpp").write_text(ours.replace("StatusFunction<274,", "StatusFunction<273,"))
    failed = subprocess.run([*compiler, wrong / check.name], capture_output=True, text=True, check=False)
    assert "KernelContext_ParallelFor" in failed.stderr


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ONNX_KIVI_ISA", "x86_64_v9", "ONNX_KIVI_ISA: expected an ISA level that this machine can run"),
        ("ONNX_KIVI_THREADS", "many", "ONNX_KIVI_THREADS: expected a number from 1 to 1024, got 'many'"),
    ],
)
def test_an_environment_that_asks_for_the_impossible_is_refused_at_registration(
    variable: str, value: str, message: str
) -> None:
    code = "import onnxruntime as o; from onnx_kivi.runtime import native; native.register(o.SessionOptions())"
    environment = os.environ | {variable: value}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert message in done.stderr


def test_an_unknown_isa_is_refused_not_replaced_by_numpy() -> None:
    environment = os.environ | {"ONNX_KIVI_ISA": "x86_64_v9"}
    command = [sys.executable, "-m", "onnx_kivi", "info"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "ONNX_KIVI_ISA: expected an ISA level that this machine can run" in done.stderr
    assert "got 'x86_64_v9'" in done.stderr


@pytest.mark.parametrize("level", native.isa_levels())
def test_the_environment_forces_a_level(level: str) -> None:
    code = "from onnx_kivi.runtime import native; print(native.isa())"
    environment = os.environ | {"ONNX_KIVI_ISA": level}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == level
