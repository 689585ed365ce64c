"""SPEC.md: the tables of `spec`, and in words what tables can't say. `python -m onnx_kivi.spec` prints it."""

from __future__ import annotations

from . import spec
from .spec import OPS, OpSpec

TEMPLATE = """\
<!-- Generated: python -m onnx_kivi.spec > onnx_kivi/SPEC.md -->

# The ops, the cache and its file

| | |
|---|---|
| domain | `{DOMAIN}` |
| opset | {OPSET_VERSION} |
| spec (`spec_version` of the nodes) | {SPEC_VERSION} |
| cache file format | {FORMAT_VERSION} |
| least IR version of a model | {MIN_IR_VERSION} |

| dimension | is |
|---|---|
| B | rows of the batch |
| Hq, Hkv | query heads and key/value heads; query head h reads key/value head h // (Hq / Hkv), which is whole |
| S | new tokens, which ask |
| N | tokens given to append: S, or 0 to attend only |
| P, T | past tokens, and P + N |
| Dk, Dv | channels of a key and of a value; they may differ |

| limit | value |
|---|---|
{limits}

## The ops

{ops}
Floats travel as decimal strings: a float attribute reaches a Python op of onnxruntime-extensions with six digits.
The rewriter writes every attribute out, because that library knows no defaults. Native nodes also take float16 and
bfloat16 tensors, and compute in f32.

## A step

One `KvCacheStep` per model runs before every `QuantizedKvSdpa` of it, which take its ticket.

1. `past_length` -1 stands for the committed length. Any other value must be between 0 and that; tokens beyond it
   are dropped at once. The output `past_length` is P.
2. The ticket names the handle and this step of it. Opening a step supersedes one that is open: nodes with the old
   ticket fail, and say that two runs used one handle.
3. The committed length grows by N when the last of the model's `layers` nodes has run. Until then the cache is as
   it was at P, and a step that is given up leaves it so.
4. A node that fails poisons its step: later nodes of it touch nothing and fail too. The next step starts at P.
5. A handle belongs to the first `model_id` that opens a step on it; another model's step fails. Handle 0 is the
   default cache of the session (native host) or of the model (Python host).

`cache_handle` and `past_length` are graph inputs with default initializers ({DEFAULT_HANDLE}, {COMMITTED_LENGTH}),
so a plain session feeds neither, and each run appends to the default cache.

## A node

In this order: attend, append, seal. The step's own tokens are never quantized before they are attended to.

1. Keys are those of [sinks, sealed blocks, residual], P tokens, and the N new ones as given. The scores of query i,
   which stands at position P + i, are query · key * `scale`.
2. `softcap`, unless 0: score = softcap * tanh(score / softcap).
3. `attn_mask`, if any, is added.
4. `is_causal` hides key j > P + i. `window`, unless 0, hides j > P + i and j <= P + i - window. Hidden scores are
   -inf.
5. Softmax over all keys in f32, finite fills included: a row filled with one finite number is uniform. `head_sink`
   is one more column, whose value is zero. A row of -inf alone is NaN, or zeros where `nan_to_zero` is 1. Without
   keys: zeros.
6. The output is softmax(scores) · values.

A slot of kind `self` takes new tokens once per step, N in each slot. A node with N = 0 reads what its slot holds by
then, which includes tokens that an earlier node of the step gave it; its queries still stand at P. A slot of kind
`cross` keeps what it was filled with: its P is its own length, new tokens replace all it holds, and `past_length`
does not cut it.

## Blocks

The tokens of each row and slot, in order: the first `sink_length` are sinks, f32. Then come sealed blocks of
`block_tokens` tokens, then the residual, f32. Whenever the residual holds `residual_length` + `block_tokens`
tokens, its oldest `block_tokens` become a block, which never changes again. So a row depends on its tokens alone,
not on how they were split over steps. (The nodes of `cross` slots are written with `residual_length` 0.)

Cropping inside the residual is exact. Where it cuts a block, the tokens that stay are decoded and become the
residual.

## Quantization

A side (keys or values) of a block has `k_bits` or `v_bits` bits; at 32 it stays f32. Groups of one key/value head:

- keys: one group per channel, over the block's tokens;
- values: one group per token and `v_group_size` consecutive channels; the last may be short, 0 means all channels.

All in f32, division correctly rounded, ties to even, subnormals kept, nothing contracted:

    lo    = float16 toward -inf of the group's minimum; a zero is +0
    scale = float16 toward +inf of (maximum - lo) / (2^bits - 1), at least 2^-14, the smallest normal float16
    code  = clamp(round((x - lo) / scale), 0, 2^bits - 1)
    x'    = lo + scale * code

The error is at most half a step. A side that holds NaN or infinity, or any group of which has an infinite lo or
scale, stays f32 for that block.

Codes are packed along the last axis of the arrays below, lowest bits first, each row padded with zeros to a whole
byte.

| array | keys | values |
|---|---|---|
| codes, u8 | (Hkv, Dk, ceil(block_tokens * k_bits / 8)) | (Hkv, block_tokens, ceil(Dv * v_bits / 8)) |
| lo, scale, float16 | (Hkv, Dk) | (Hkv, block_tokens, ceil(Dv / v_group_size)) |
| dense, f32 | (Hkv, block_tokens, Dk) | (Hkv, block_tokens, Dv) |

## The cache file

| offset | bytes | content |
|---|---|---|
| 0 | 6 | `KIVIKV` |
| 6 | 2 | format version, u16 |
| 8 | 8 | n, the length of the header, u64 |
| 16 | n | header: JSON in UTF-8, keys sorted, no spaces |
| 16 + n | | arrays in C order, without padding, in the order below |
| last 32 | 32 | SHA-256 of all before it |

All numbers are little-endian. The same cache gives the same bytes, whichever backend holds it. The header:

    {{"length": committed tokens,
     "slots": [{{"attributes": those of the QuantizedKvSdpa node,
                "rows": [{{"heads": Hkv, "k_head_size": Dk, "v_head_size": Dv,
                          "sinks": tokens, "residual": tokens, "blocks": "qqqd..."}}]}}],
     "step": attributes of the KvCacheStep node, or null for a cache that no model has used}}

Slots are in ascending order. `blocks` has two letters per block, keys and values: `q` for codes, `d` for f32.
Arrays, for each slot and each of its rows: keys then values of the sinks; for each block its keys then its values,
each codes, lo, scale, or the dense array; keys then values of the residual. A slot that holds nothing has no rows.

A reader trusts nothing: sizes, types, parameters (finite, scale at least 2^-14) and the checksum are checked before
a cache is made. [examples/read_cache.py](../examples/read_cache.py) reads a file in 40 lines of Python and NumPy,
and [tests/golden](../tests/golden) holds files and blocks that every version must write byte for byte."""


def document() -> str:
    """The text of SPEC.md."""
    facts = {name: value for name, value in vars(spec).items() if name.isupper()}
    limits = "\n".join(f"| `{name}` | {value:,} |" for name, value in facts.items() if name.startswith("MAX_"))
    return TEMPLATE.format(limits=limits, ops="\n".join(map(_op_table, OPS)), **facts)


def _op_table(op: OpSpec) -> str:
    lines = [f"### {op.name}", "", op.doc, "", "| | name | type | meaning |", "|---|---|---|---|"]
    for role, tensors in (("input", op.inputs), ("output", op.outputs)):
        lines += [f"| {role} | `{t.name}` | {t.element} ({', '.join(t.shape)}) | {t.meaning} |" for t in tensors]
    for a in op.attributes:
        default = "" if a.default is None else f", default `{a.default}`"
        lines.append(f"| attribute | `{a.name}` | {a.wire}{default} | {a.meaning} |")
    return "\n".join([*lines, ""])
