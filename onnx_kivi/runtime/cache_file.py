"""Cache files: a CacheState in one file, the same bytes for the same state, whichever backend held it.

SPEC.md, "The cache file", is the format; shapes follow from the counts in the header and from the nodes' attributes
(`backend.QuantizedBlock` defines the layout of codes). Loading trusts nothing: every way in which a file can lie is
a CacheError, found before memory is taken for it, and a header must say what saving would have written.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..arrays import Array, FloatArray
from ..block_parts import Parts, key_parts, value_parts
from ..errors import CacheError, KiviError
from ..paths import open_regular
from ..spec import DENSE, FORMAT_VERSIONS, FREED, SEALED, SINKS, SdpaAttributes, StepAttributes
from ..staging import staged
from .backend import BlockState, CacheState, DenseState, QuantizedBlock, RowState, SlotState
from .state import check_state

MAGIC = b"KIVIKV"
PREFIX = struct.Struct("<6sHQ")
DIGEST_BYTES = hashlib.sha256().digest_size
LARGEST_SIZE = 1 << 32
LARGEST_HEADER = 1 << 26

BlockSide = QuantizedBlock | FloatArray


def save_state(path: str | os.PathLike[str], state: CacheState) -> None:
    """Write `state`, under a temporary name until complete. Raises CacheError if the file can't be written.

    A link, a folder or a device in the place of the file is refused; the file's mode is what the umask says.
    """
    target = Path(path)
    version = _least_version(state)
    header = _encoded(_header(state, version))
    digest = hashlib.sha256()
    try:
        _check_header_size(len(header))
        with staged(target) as file:
            for part in (PREFIX.pack(MAGIC, version, len(header)), header, *_payload(state)):
                digest.update(part)
                file.write(part)
            file.write(digest.digest())
    except (OSError, KiviError) as error:
        raise CacheError(f"{target}: expected a place where the cache can be written, got: {error}") from error


def load_state(path: str | os.PathLike[str]) -> CacheState:
    """Read what save_state wrote. Raises CacheError if the file is missing, damaged, or not what it claims to be."""
    source = Path(path)
    try:
        with open_regular(source) as file:
            return _parse(_Reader(file))
    except KiviError as error:
        raise CacheError(f"{source}: {error}") from error
    except MemoryError:
        raise CacheError(f"{source}: expected a cache that fits in memory, got a larger one") from None
    except OSError as error:
        raise CacheError(f"{source}: expected a cache file, got: {error.strerror or error}") from error


def _parse(reader: _Reader) -> CacheState:
    version, text = _read_header(reader)
    try:
        header = json.loads(text.decode())
        slots = tuple(_slot(reader, slot, version) for slot in header["slots"])
        lengths = tuple(map(_size, header["lengths"])) if version > 1 else _one_length(_size(header["length"]), slots)
        step = None if header["step"] is None else StepAttributes.from_wire(header["step"])
        state = CacheState(step, lengths, slots)
        same = version == _least_version(state) and _encoded(_header(state, version)) == text
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise CacheError(f"expected a header that describes a cache, got {_shown(error)}; it may be damaged") from error
    reader.finish()
    if not same:
        raise CacheError("expected the header that saving this cache writes, got one that says it otherwise")
    check_state(state)
    return state


def _one_length(length: int, slots: tuple[SlotState, ...]) -> tuple[int, ...]:
    """The length of each row, as version 1 says it. Raises CacheError."""
    rows = max((len(slot.rows) for slot in slots), default=0)
    if length and not rows:
        raise CacheError(f"expected rows that hold the {length} tokens, got none")
    return (length,) * rows


def _shown(error: Exception) -> str:
    return str(error) if isinstance(error, KiviError) else repr(error)


def _read_header(reader: _Reader) -> tuple[int, bytes]:
    prefix = reader.take(min(PREFIX.size, reader.left), "a header")
    if len(prefix) < PREFIX.size or not prefix.startswith(MAGIC):
        raise CacheError("expected a cache file of onnx_kivi, got something else, or only its beginning")
    _, version, header_size = PREFIX.unpack(prefix)
    if version not in FORMAT_VERSIONS:
        raise CacheError(
            f"expected format version {' or '.join(map(str, FORMAT_VERSIONS))}, got {version}; load it with the newer "
            "onnx_kivi that saved it"
        )
    _check_header_size(header_size)
    return version, reader.take(header_size, "a header")


def _check_header_size(size: int) -> None:
    if size > LARGEST_HEADER:
        raise CacheError(f"expected a header of at most {LARGEST_HEADER:,} bytes, got {size:,}; it may be damaged")


class _Reader:
    """Takes bytes off the front of a file, never more than it has, and checks their sum at the end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.left = max(os.fstat(file.fileno()).st_size - DIGEST_BYTES, 0)

    def take(self, count: int, what: str = "bytes of arrays") -> bytes:
        """The next `count` bytes."""
        if count > self.left:
            raise CacheError(
                f"expected {count:,} more bytes ({what}), got {self.left:,}: the file is damaged or truncated"
            )
        taken = self._file.read(count)
        self._digest.update(taken)
        self.left -= count
        return taken

    def array(self, dtype: npt.DTypeLike, *shape: int) -> Array:
        """The next array, as a copy of its own."""
        element = np.dtype(dtype).newbyteorder("<")
        flat = np.frombuffer(self.take(element.itemsize * math.prod(shape)), element)
        return flat.reshape(shape).astype(dtype)

    def finish(self) -> None:
        """Raise CacheError if anything is left, or was changed after it was written."""
        if self.left:
            raise CacheError(f"expected no more bytes of arrays, got {self.left:,}: the file is damaged")
        if self._file.read() != self._digest.digest():
            raise CacheError("expected content that agrees with its checksum, got a damaged or truncated file")


def _encoded(header: Any) -> bytes:
    return json.dumps(header, separators=(",", ":"), sort_keys=True).encode()


def _least_version(state: CacheState) -> int:
    """The lowest format version that can say what the state holds."""
    later = len({*state.lengths}) > 1 or any(row.freed for slot in state.slots for row in slot.rows)
    nodes = [state.step, *(slot.attributes for slot in state.slots)]
    return max(2 if later else 1, *(node.spec_version for node in nodes if node is not None), 1)


def _header(state: CacheState, version: int) -> dict[str, Any]:
    slots = [
        {"attributes": slot.attributes.to_wire(), "rows": [_row_header(row, version) for row in slot.rows]}
        for slot in state.slots
    ]
    lengths: dict[str, Any] = {"length": state.length} if version == 1 else {"lengths": state.lengths}
    return {"step": None if state.step is None else state.step.to_wire(), "slots": slots} | lengths


def _row_header(row: RowState, version: int) -> dict[str, Any]:
    k_head_size, v_head_size = row.head_sizes
    sizes = {"heads": row.kv_heads, "k_head_size": k_head_size, "v_head_size": v_head_size}
    blocks = "".join(_letter(b.key) + _letter(b.value) for b in row.blocks)
    if version == 1:
        return sizes | {"sinks": row.sinks.tokens, "residual": row.residual.tokens, "blocks": blocks}
    held = {SINKS: row.sinks.tokens, FREED: row.freed, SEALED: blocks, DENSE: row.residual.tokens}
    return sizes | {"segments": [[tag, count] for tag, count in held.items() if count]}


def _counts(header: Mapping[str, Any], version: int) -> tuple[int, int, str, int]:
    """Tokens of the sinks, freed tokens, letters of the blocks, tokens of the dense end. Raises CacheError."""
    if version == 1:
        return _size(header["sinks"]), 0, header["blocks"], _size(header["residual"])
    tags = [tag for tag, _ in header["segments"]]
    if tags != [tag for tag in (SINKS, FREED, SEALED, DENSE) if tag in tags]:
        raise CacheError(f"expected segments {SINKS}, {FREED}, {SEALED}, {DENSE}, in this order, each once, got {tags}")
    held = dict(header["segments"])
    return _size(held.get(SINKS, 0)), _size(held.get(FREED, 0)), held.get(SEALED, ""), _size(held.get(DENSE, 0))


def _letter(side: BlockSide) -> str:
    return "q" if isinstance(side, QuantizedBlock) else "d"


def _payload(state: CacheState) -> Iterator[bytes]:
    for slot in state.slots:
        for row in slot.rows:
            for array in _row_arrays(row):
                yield array.astype(array.dtype.newbyteorder("<")).tobytes()


def _row_arrays(row: RowState) -> Iterator[Array]:
    yield from (row.sinks.key, row.sinks.value)
    for block in row.blocks:
        for side in (block.key, block.value):
            yield from side.arrays if isinstance(side, QuantizedBlock) else (side,)
    yield from (row.residual.key, row.residual.value)


def _slot(reader: _Reader, header: Mapping[str, Any], version: int) -> SlotState:
    attributes = SdpaAttributes.from_wire(header["attributes"])
    return SlotState(attributes, tuple(_row(reader, attributes, row, version) for row in header["rows"]))


def _row(reader: _Reader, attributes: SdpaAttributes, header: Mapping[str, Any], version: int) -> RowState:
    heads, k_size, v_size = (_size(header[name]) for name in ("heads", "k_head_size", "v_head_size"))
    sinks, freed, letters, residual = _counts(header, version)
    tokens = attributes.block_tokens

    def dense(tokens: int) -> DenseState:
        key = reader.array(np.float32, heads, tokens, k_size)
        return DenseState(key, reader.array(np.float32, heads, tokens, v_size))

    first = dense(sinks)
    blocks = tuple(
        BlockState(
            _side(reader, k, (heads, tokens, k_size), key_parts(attributes, heads, k_size)),
            _side(reader, v, (heads, tokens, v_size), value_parts(attributes, heads, v_size)),
        )
        for k, v in zip(letters[::2], letters[1::2], strict=True)
    )
    return RowState(first, freed, blocks, dense(residual))


def _side(reader: _Reader, letter: str, dense: tuple[int, ...], parts: Parts) -> BlockSide:
    if letter == "d":
        return reader.array(np.float32, *dense)
    if letter != "q":
        raise CacheError(f"expected blocks of letters q and d, got {letter!r}")
    arrays = (reader.array(kind, *shape) for kind, shape in parts.values())
    return QuantizedBlock(*arrays)


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < LARGEST_SIZE:
        raise CacheError(f"expected a size, got {value!r}")
    return value
