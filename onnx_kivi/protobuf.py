"""Reads protobuf's wire format where it lies, so that a model can be looked into without onnx and without its weights.

Source: protobuf.dev, "Encoding". Groups, which no writer of ONNX has used, are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

VARINT, FIXED_64, BYTES, FIXED_32 = 0, 1, 2, 5
FIXED_SIZES = {FIXED_64: 8, FIXED_32: 4}
LONGEST_VARINT = 10
WIDTH = 64

Value = int | tuple[int, int]


def fields(file: BinaryIO, begin: int, end: int) -> Iterator[tuple[int, Value]]:
    """(number, value) of each field of the message between two offsets: an integer, or where its bytes begin and end.

    The file may be moved meanwhile. Raises ValueError for what is no message.
    """
    at = begin
    while at < end:
        file.seek(at)
        tag = _varint(file)
        number, wire = tag >> 3, tag & 7
        value: Value
        if wire == VARINT:
            value, at = _varint(file), file.tell()
        elif wire == BYTES:
            size, start = _varint(file), file.tell()
            value, at = (start, start + size), start + size
        elif wire in FIXED_SIZES:
            at = file.tell() + FIXED_SIZES[wire]
            value = (at - FIXED_SIZES[wire], at)
        else:
            raise ValueError(f"no field begins with {tag}")
        if at > end or not number:
            raise ValueError("a field is longer than its message")
        yield number, value


def taken(file: BinaryIO, span: tuple[int, int]) -> bytes:
    """The bytes between two offsets."""
    file.seek(span[0])
    return file.read(span[1] - span[0])


def signed(value: int) -> int:
    """A varint as an int64."""
    return value - (1 << WIDTH) if value >> (WIDTH - 1) else value


def _varint(file: BinaryIO) -> int:
    value = 0
    for place in range(LONGEST_VARINT):
        byte = file.read(1)
        if not byte:
            raise ValueError("the message ends within a number")
        value |= (byte[0] & 0x7F) << 7 * place
        if byte[0] < 0x80:
            return value & (1 << WIDTH) - 1
    raise ValueError("a number has no end")
