"""The only definition of the ops of domain `onnx_kivi`, and of what a cache holds.

Node construction, the hosts' declarations, validation, the state and its files, the tests' shapes and SPEC.md
are all derived from the tables below. Dimension letters: B batch, R rows (B, or 1 for all alike), Hq query heads,
Hkv key/value heads (Hq % Hkv == 0), S new tokens, N tokens given to append (S, or 0 to attend only), P past tokens,
T = P + N, Dk key head size, Dv value head size. S and N may be 0; B, Hq, Hkv, Dk and Dv are 1 to MAX_SIZE. Of ghost
I/O: G heads, L tokens and C channels as the host feeds them.

Version 1 is frozen: its models and files stay readable, bit for bit. Version 2 is a draft until it is released; what it
specifies and this package does not serve yet is refused by name. A node and a file carry the lowest version that can
say what they hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import ConfigError
from .spec_schemes import AFFINE, K_SCHEMES, V_SCHEMES, check_schemes
from .spec_types import MAX_SIZE, VERSIONS, NodeAttributes, OpSpec, TensorSpec, attribute, between, one_of

DOMAIN = "onnx_kivi"
OPSET_VERSION = 1
FORMAT_VERSIONS = (1, 2)
MIN_IR_VERSION = 8

HANDLE_INPUT = "cache_handle"
PAST_LENGTH_INPUT = "past_length"
NEW_LENGTH_INPUT = "new_length"
STORED_TOKENS = "tokens_to_store"
DEFAULT_HANDLE = 0
COMMITTED_LENGTH = -1
ALL_NEW = -1
NO_STEP = -1
CONTROL_INPUTS = {HANDLE_INPUT: DEFAULT_HANDLE, PAST_LENGTH_INPUT: COMMITTED_LENGTH, NEW_LENGTH_INPUT: ALL_NEW}
"""The inputs that a rewritten model has beside the original's, with their defaults."""

IO_KINDS = NO_IO, GHOST_IO = ("none", "ghost")
"""What a rewritten model has in the place of past inputs and present outputs."""

SELF = "self"
CROSS = "cross"
LATENT = "latent"

DENSE_BITS = 32
BITS = (2, 4, 8, DENSE_BITS)
VALUE_BITS = (2, 3, 4, 8, DENSE_BITS)
MAX_BLOCK_TOKENS = 1024
MAX_LAYERS = MAX_SLOT = MAX_SINK_LENGTH = MAX_SIZE
MAX_RESIDUAL_LENGTH = MAX_V_GROUP_SIZE = 1 << 20
MAX_WINDOW = MAX_KV_BYTES = 1 << 40

FLOAT32, FLOAT16 = "float32", "float16"
K_SCHEME_NAMES, V_SCHEME_NAMES = (", ".join(f"`{name}`" for name in names) for names in (K_SCHEMES, V_SCHEMES))


@dataclass(frozen=True, slots=True)
class SegmentSpec:
    """One kind of piece that a row of a slot is made of."""

    tag: str
    meaning: str
    built: bool = True


SINKS, FREED, SEALED, DENSE = "sinks", "freed", "sealed", "dense"
SEGMENTS = (
    SegmentSpec(SINKS, "the first tokens, as given; at most sink_length, never freed"),
    SegmentSpec(FREED, "tokens that no query can see any more: only their number is kept"),
    SegmentSpec(
        SEALED,
        "one block of block_tokens tokens, each side in codes of its scheme or, where these can't say it, as given",
    ),
    SegmentSpec(DENSE, "the last tokens, as given, float32"),
    SegmentSpec(f"{DENSE} {FLOAT16}", "the last tokens, rounded to float16", built=False),
    SegmentSpec(LATENT, "one block of compressed states, in codes per channel", built=False),
)
"""A row is a sequence of these, in this order: sinks, freed at most once, any number of sealed, dense at most once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAttributes(NodeAttributes):
    """Attributes of KvCacheStep and KvCacheStepV2."""

    model_id: str = attribute("identity of the rewritten model; a handle belongs to the first one that uses it")
    layers: int = attribute("how many attention nodes take this step's ticket; the last one commits")
    one_length: str = attribute(
        "why the rows of a run must hold equally many tokens; empty = they need not", "", since=2
    )
    spec_version: int = attribute("version of this table", VERSIONS[0])

    def __post_init__(self) -> None:
        self.check_version()
        check_model_id(self.model_id)
        between("layers", self.layers, 1, MAX_LAYERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class SdpaAttributes(NodeAttributes):
    """Attributes of QuantizedKvSdpa and QuantizedKvSdpaV2."""

    slot: int = attribute("which cache of the model this node reads and appends to")
    kind: str = attribute(
        "`self`: grows with each step; `cross`: filled once, never cropped; `latent`: not built", SELF
    )
    k_bits: int = attribute("bits of a sealed key code: 2, 4, 8; 32 keeps keys in f32", 8)
    v_bits: int = attribute("bits of a sealed value code: 2, 3, 4, 8; 32 keeps values in f32", 8)
    block_tokens: int = attribute("tokens sealed at once, and the tokens that share a key channel's parameters", 64)
    v_group_size: int = attribute("channels of a token that share value parameters; 0 = the whole row", 64)
    residual_length: int = attribute("most recent tokens that stay f32", 128)
    sink_length: int = attribute("first tokens that stay f32 for good", 4)
    scale: float = attribute("multiplies the scores (decimal string)", 1.0)
    softcap: float = attribute("scores become softcap * tanh(scores / softcap); 0 = none (decimal string)", 0.0)
    is_causal: int = attribute("1: query i sees keys j <= P + i only", 0)
    window: int = attribute("query i sees keys P + i - window < j <= P + i only; 0 = no window", 0)
    nan_to_zero: int = attribute(
        "1: a softmax row that is NaN (all -inf, or a NaN, +inf or score beyond float32) becomes zeros", 0
    )
    evict: int = attribute("1: blocks that the window hides from every query to come are freed", 0, since=2)
    window_sinks: int = attribute("first tokens that a query sees beside its window", 0, since=2)
    k_scheme: str = attribute(f"how key codes are made: {K_SCHEME_NAMES}", AFFINE, since=2)
    v_scheme: str = attribute(f"how value codes are made: {V_SCHEME_NAMES}", AFFINE, since=2)
    dense_element: str = attribute("type of what stays as given: `float32`", FLOAT32, since=2)
    spec_version: int = attribute("version of this table", VERSIONS[0])

    def __post_init__(self) -> None:
        self.check_version()
        between("slot", self.slot, 0, MAX_SLOT)
        check_store_options(
            self.k_bits, self.v_bits, self.block_tokens, self.v_group_size, self.residual_length, self.sink_length
        )
        one_of("kind", self.kind, (SELF, CROSS), (LATENT,))
        one_of("is_causal", self.is_causal, (0, 1))
        one_of("nan_to_zero", self.nan_to_zero, (0, 1))
        check_window(self.window, self.window_sinks, self.sink_length)
        one_of("evict", self.evict, (0, 1))
        if self.evict and not (self.window and self.kind == SELF):
            raise ConfigError(f"evict: expected 0 without a window over a slot that grows, got {self.evict}")
        check_schemes(self.k_scheme, self.k_bits, self.v_scheme, self.v_bits)
        one_of("dense_element", self.dense_element, (FLOAT32,), (FLOAT16,))
        if not math.isfinite(self.scale):
            raise ConfigError(f"scale: expected a finite number, got {self.scale:g}")
        if not (math.isfinite(self.softcap) and self.softcap >= 0):
            raise ConfigError(f"softcap: expected a finite number >= 0, got {self.softcap:g}")

    @property
    def op(self) -> OpSpec:
        """The op of a node with these attributes."""
        return QUANTIZED_KV_SDPA if self.spec_version == 1 else QUANTIZED_KV_SDPA_V2


def check_model_id(model_id: str) -> None:
    """Raise ConfigError unless a model may be called so."""
    if not model_id:
        raise ConfigError("model_id: expected a non-empty string, got ''")
    if not (model_id.isascii() and model_id.isprintable()):
        raise ConfigError("model_id: expected printable ASCII characters, got others")


def check_window(window: int, window_sinks: int, sink_length: int) -> None:
    """Raise ConfigError unless the op can keep to this window, and show these first tokens beside it."""
    between("window", window, 0, MAX_WINDOW)
    between("window_sinks", window_sinks, 0, MAX_SINK_LENGTH)
    if window_sinks > sink_length or (window_sinks and not window):
        raise ConfigError(
            f"window_sinks: expected at most sink_length, {sink_length}, and a window, got {window_sinks} and window "
            f"{window}"
        )


def check_store_options(
    k_bits: int, v_bits: int, block_tokens: int, v_group_size: int, residual_length: int, sink_length: int
) -> None:
    """Raise ConfigError unless the quantization options are ones that the op knows."""
    one_of("k_bits", k_bits, BITS)
    one_of("v_bits", v_bits, VALUE_BITS)
    between("block_tokens", block_tokens, 1, MAX_BLOCK_TOKENS)
    between("v_group_size", v_group_size, 0, MAX_V_GROUP_SIZE)
    between("residual_length", residual_length, 0, MAX_RESIDUAL_LENGTH)
    between("sink_length", sink_length, 0, MAX_SINK_LENGTH)


KV_CACHE_STEP = OpSpec(
    name="KvCacheStep",
    version=1,
    doc="Opens a step on a cache: drops what lies beyond past_length and hands out the ticket that every "
    "QuantizedKvSdpa of the model takes.",
    inputs=(
        TensorSpec(HANDLE_INPUT, "int64", ("1",), "which cache; 0 = the default one of this model"),
        TensorSpec(PAST_LENGTH_INPUT, "int64", ("1",), "tokens to keep; -1 = the committed length"),
    ),
    outputs=(
        TensorSpec("past_length", "int64", ("1",), "P, the tokens that attention will see before the new ones"),
        TensorSpec("step", "int64", ("1",), "the ticket; -1 when the step could not be opened"),
    ),
    attributes=StepAttributes.specs(1),
)

QUANTIZED_KV_SDPA = OpSpec(
    name="QuantizedKvSdpa",
    version=1,
    doc="Attends the new queries to the cache and the new tokens, then appends the new tokens, then seals full blocks.",
    inputs=(
        TensorSpec("query", "float", ("B", "Hq", "S", "Dk"), "queries, as the original attention consumed them"),
        TensorSpec(
            "key", "float", ("B", "Hkv", "N", "Dk"), "keys of the new tokens only; N = 0 attends without appending"
        ),
        TensorSpec("value", "float", ("B", "Hkv", "N", "Dv"), "values of the new tokens only"),
        TensorSpec(
            "attn_mask",
            "float",
            ("B", "Hq", "S", "T"),
            "added to the scores; each dimension is 1 or as given; shape (0) = none",
            optional=True,
            broadcast=True,
        ),
        TensorSpec(
            "head_sink",
            "float",
            ("Hq",),
            "logit of one more softmax column that carries no value; shape (0) = none",
            optional=True,
        ),
        TensorSpec("step", "int64", ("1",), "the ticket of this run"),
    ),
    outputs=(TensorSpec("output", "float", ("B", "Hq", "S", "Dv"), "softmax(scores) @ values"),),
    attributes=SdpaAttributes.specs(1),
)

KV_CACHE_STEP_V2 = OpSpec(
    name="KvCacheStepV2",
    version=2,
    doc="Opens a step over rows that may lie in caches of their own and hold different numbers of tokens: a left-padded"
    " batch whose padding is not stored. Row b's new tokens are the last new_length of the S, and its mask is the last "
    "past_length + new_length columns.",
    inputs=(
        TensorSpec(HANDLE_INPUT, "int64", ("R",), "which cache; one for each row, or one that holds all rows"),
        TensorSpec(
            PAST_LENGTH_INPUT, "int64", ("R",), "tokens to keep, for each row or for all; -1 = the committed length"
        ),
        TensorSpec(NEW_LENGTH_INPUT, "int64", ("R",), "new tokens, for each row or for all; -1 = all S"),
    ),
    outputs=(
        TensorSpec("past_length", "int64", ("1",), "P, the most tokens of any row"),
        TensorSpec("row_past_length", "int64", ("B",), "the tokens of each row, (1) where the cache is empty"),
        TensorSpec("step", "int64", ("1",), "the ticket; -1 when the step could not be opened"),
    ),
    attributes=StepAttributes.specs(2),
)

QUANTIZED_KV_SDPA_V2 = OpSpec(
    name="QuantizedKvSdpaV2",
    version=2,
    doc=QUANTIZED_KV_SDPA.doc,
    inputs=QUANTIZED_KV_SDPA.inputs,
    outputs=QUANTIZED_KV_SDPA.outputs,
    attributes=SdpaAttributes.specs(2),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GhostAttributes(NodeAttributes):
    """Attributes of CacheOpen and CacheStamp."""

    model_id: str = attribute("identity of the rewritten model", since=2)
    kv_bytes: int = attribute(
        "bytes that all caches of the process may take before those that stamps name are freed, used longest ago "
        "first; 0 = what the environment says in ONNX_KIVI_KV_BYTES, else a quarter of the machine's memory",
        0,
        since=2,
    )
    spec_version: int = attribute("version of this table", 2)

    def __post_init__(self) -> None:
        self.check_version()
        check_model_id(self.model_id)
        check_kv_bytes(self.kv_bytes)


def check_kv_bytes(kv_bytes: int) -> None:
    """Raise ConfigError unless ghost caches can be told this budget."""
    between("kv_bytes", kv_bytes, 0, MAX_KV_BYTES)


STAMP_CHANNELS = 4
"""Channels of a token, over all its heads, that a stamp takes."""

GHOSTS = (
    TensorSpec("new_shape", "int64", ("2",), "shape of the new tokens, (B, S)"),
    TensorSpec("mask_shape", "int64", ("2",), "shape of the attention mask, (B, P + S)"),
    *(
        TensorSpec(f"past_{side}", "float", ("B", "G", "L", "C"), f"what the host carries as past {side}s: stamps")
        for side in ("key", "value")
    ),
)

CACHE_OPEN = OpSpec(
    name="CacheOpen",
    version=2,
    doc="Finds the cache that holds the past which the stamps name, reordered, cropped, copied and joined as the host "
    "did it to the stamps.",
    inputs=(
        TensorSpec(HANDLE_INPUT, "int64", ("R",), "caches to use; 0 = read the stamps"),
        TensorSpec(PAST_LENGTH_INPUT, "int64", ("R",), "tokens to keep of these caches; -1 where stamps are read"),
        *GHOSTS,
    ),
    outputs=(
        TensorSpec(HANDLE_INPUT, "int64", ("R",), "for KvCacheStepV2"),
        TensorSpec(PAST_LENGTH_INPUT, "int64", ("R",), "for KvCacheStepV2; P where stamps are read"),
    ),
    attributes=GhostAttributes.specs(2),
)

CACHE_STAMP = OpSpec(
    name="CacheStamp",
    version=2,
    doc="Gives the new tokens of a step their stamps, behind those of the past.",
    inputs=(
        TensorSpec(HANDLE_INPUT, "int64", ("R",), "as CacheOpen has it; unless 0 the past is passed on as it is"),
        TensorSpec("step", "int64", ("1",), "the ticket of this run"),
        *GHOSTS,
    ),
    outputs=tuple(
        TensorSpec(
            f"present_{side}", "float", ("B", "G", "M", "C"), "as wide as the past; M = P + S, or L if that is more"
        )
        for side in ("key", "value")
    ),
    attributes=GhostAttributes.specs(2),
)

STEP_OPS = (KV_CACHE_STEP.name, KV_CACHE_STEP_V2.name)
GHOST_OPS = (CACHE_OPEN.name, CACHE_STAMP.name)
ATTENTION_OPS = (QUANTIZED_KV_SDPA.name, QUANTIZED_KV_SDPA_V2.name)
OPS = (KV_CACHE_STEP, QUANTIZED_KV_SDPA, KV_CACHE_STEP_V2, QUANTIZED_KV_SDPA_V2, CACHE_OPEN, CACHE_STAMP)


if __name__ == "__main__":
    from .spec_document import document

    print(document(), end="")
