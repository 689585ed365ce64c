"""Cache files: a CacheState in one file, the same bytes for the same state, whichever backend held it.

SPEC.md, "The cache file", is the format; shapes follow from the counts in the header and from the nodes' attributes
(`backend.QuantizedBlock` defines the layout of codes). Loading trusts nothing: every way in which a file can lie is
a CacheError, found before memory is taken for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CacheError, KiviError
from ..spec import FORMAT_VERSION, SdpaAttributes, StepAttributes
from .backend import BlockState, CacheState, FloatArray, QuantizedBlock, RowState, SlotState
from .numpy_backend.quantize import group_count, packed_size
from .state import check_state

MAGIC = b"KIVIKV"
PREFIX = struct.Struct("<6sHQ")
DIGEST_BYTES = hashlib.sha256().digest_size
LARGEST_SIZE = 1 << 32

Side = QuantizedBlock | FloatArray


def save_state(path: str | os.PathLike[str], state: CacheState) -> None:
    """Write `state`, under a temporary name until complete. Raises CacheError if the file can't be written."""
    target = Path(path)
    header = json.dumps(_header(state), separators=(",", ":"), sort_keys=True).encode()
    digest = hashlib.sha256()
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            temporary = Path(file.name)
            for part in (PREFIX.pack(MAGIC, FORMAT_VERSION, len(header)), header, *_payload(state)):
                digest.update(part)
                file.write(part)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise CacheError(f"{target}: expected a place where the cache can be written, got: {error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def load_state(path: str | os.PathLike[str]) -> CacheState:
    """Read what save_state wrote. Raises CacheError if the file is missing, damaged, or not what it claims to be."""
    source = Path(path)
    try:
        data = source.read_bytes()
    except OSError as error:
        raise CacheError(f"{source}: expected a cache file, got: {error}") from error
    try:
        return _parse(data)
    except KiviError as error:
        raise CacheError(f"{source}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise CacheError(f"{source}: expected a header that describes a cache, got: {error!r}") from error


def _parse(data: bytes) -> CacheState:
    if len(data) < PREFIX.size + DIGEST_BYTES or not data.startswith(MAGIC):
        raise CacheError("expected a cache file of onnx_kivi, got something else, or only its beginning")
    _, version, header_size = PREFIX.unpack_from(data)
    if version != FORMAT_VERSION:
        raise CacheError(f"expected format version {FORMAT_VERSION}, got {version}; save it with this version again")
    if hashlib.sha256(memoryview(data)[:-DIGEST_BYTES]).digest() != data[-DIGEST_BYTES:]:
        raise CacheError("expected content that agrees with its checksum, got a damaged or truncated file")
    body = memoryview(data)[PREFIX.size : -DIGEST_BYTES]
    if header_size > len(body):
        raise CacheError(f"expected a header of {header_size} bytes, got {len(body)}")
    header = json.loads(bytes(body[:header_size]))
    reader = _Reader(body[header_size:])
    state = CacheState(
        None if header["step"] is None else StepAttributes.from_wire(header["step"]),
        _size(header["length"]),
        tuple(_slot(reader, slot) for slot in header["slots"]),
    )
    reader.finish()
    check_state(state)
    return state


class _Reader:
    """Takes arrays off the front of the payload, never more than it has."""

    def __init__(self, payload: memoryview) -> None:
        self._payload = payload
        self._offset = 0

    def array(self, dtype: npt.DTypeLike, *shape: int) -> npt.NDArray[Any]:
        """The next array, as a copy of its own."""
        element = np.dtype(dtype).newbyteorder("<")
        end = self._offset + element.itemsize * math.prod(shape)
        if end > len(self._payload):
            raise CacheError(f"expected {end} bytes of arrays, got {len(self._payload)}")
        flat = np.frombuffer(self._payload[self._offset : end], element)
        self._offset = end
        return flat.reshape(shape).astype(dtype)

    def finish(self) -> None:
        """Raise CacheError if anything is left."""
        if self._offset != len(self._payload):
            raise CacheError(f"expected {self._offset} bytes of arrays, got {len(self._payload)}")


def _header(state: CacheState) -> dict[str, Any]:
    return {
        "step": None if state.step is None else state.step.to_wire(),
        "length": state.length,
        "slots": [
            {"attributes": slot.attributes.to_wire(), "rows": [_row_header(row) for row in slot.rows]}
            for slot in state.slots
        ],
    }


def _row_header(row: RowState) -> dict[str, Any]:
    heads, residual, k_head_size = row.residual_key.shape
    return {
        "heads": heads,
        "k_head_size": k_head_size,
        "v_head_size": row.residual_value.shape[2],
        "sinks": row.sink_key.shape[1],
        "residual": residual,
        "blocks": "".join(_letter(b.key) + _letter(b.value) for b in row.blocks),
    }


def _letter(side: Side) -> str:
    return "q" if isinstance(side, QuantizedBlock) else "d"


def _payload(state: CacheState) -> Iterator[bytes]:
    for slot in state.slots:
        for row in slot.rows:
            for array in _row_arrays(row):
                yield array.astype(array.dtype.newbyteorder("<")).tobytes()


def _row_arrays(row: RowState) -> Iterator[npt.NDArray[Any]]:
    yield from (row.sink_key, row.sink_value)
    for block in row.blocks:
        for side in (block.key, block.value):
            yield from (side.codes, side.lo, side.scale) if isinstance(side, QuantizedBlock) else (side,)
    yield from (row.residual_key, row.residual_value)


def _slot(reader: _Reader, header: Mapping[str, Any]) -> SlotState:
    attributes = SdpaAttributes.from_wire(header["attributes"])
    return SlotState(attributes, tuple(_row(reader, attributes, row) for row in header["rows"]))


def _row(reader: _Reader, attributes: SdpaAttributes, header: Mapping[str, Any]) -> RowState:
    heads, k_size, v_size = (_size(header[name]) for name in ("heads", "k_head_size", "v_head_size"))
    sinks, residual, letters = _size(header["sinks"]), _size(header["residual"]), header["blocks"]
    sink_key = reader.array(np.float32, heads, sinks, k_size)
    sink_value = reader.array(np.float32, heads, sinks, v_size)
    blocks = tuple(
        BlockState(_key_side(reader, attributes, k, heads, k_size), _value_side(reader, attributes, v, heads, v_size))
        for k, v in zip(letters[::2], letters[1::2], strict=True)
    )
    residual_key = reader.array(np.float32, heads, residual, k_size)
    residual_value = reader.array(np.float32, heads, residual, v_size)
    return RowState(sink_key, sink_value, blocks, residual_key, residual_value)


def _key_side(reader: _Reader, attributes: SdpaAttributes, letter: str, heads: int, size: int) -> Side:
    tokens = attributes.block_tokens
    if letter == "d":
        return reader.array(np.float32, heads, tokens, size)
    codes = reader.array(np.uint8, heads, size, packed_size(tokens, attributes.k_bits))
    return _quantized(reader, letter, codes, (heads, size))


def _value_side(reader: _Reader, attributes: SdpaAttributes, letter: str, heads: int, size: int) -> Side:
    tokens = attributes.block_tokens
    if letter == "d":
        return reader.array(np.float32, heads, tokens, size)
    codes = reader.array(np.uint8, heads, tokens, packed_size(size, attributes.v_bits))
    return _quantized(reader, letter, codes, (heads, tokens, group_count(size, attributes.v_group_size)))


def _quantized(reader: _Reader, letter: str, codes: npt.NDArray[np.uint8], params: tuple[int, ...]) -> QuantizedBlock:
    if letter != "q":
        raise CacheError(f"expected blocks of letters q and d, got {letter!r}")
    return QuantizedBlock(codes, reader.array(np.float16, *params), reader.array(np.float16, *params))


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < LARGEST_SIZE:
        raise CacheError(f"expected a size, got {value!r}")
    return value
