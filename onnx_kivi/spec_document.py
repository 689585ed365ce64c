"""SPEC.md: the tables of `spec`, and in words what tables can't say. `python -m onnx_kivi.spec` prints it."""

from __future__ import annotations

from . import spec, spec_schemes
from .spec import OPS
from .spec_types import VERSIONS, OpSpec

TEMPLATE = """\
<!-- Generated: python -m onnx_kivi.spec > onnx_kivi/SPEC.md -->

# The ops, the cache and its file

| | |
|---|---|
| domain | `{DOMAIN}` |
| opset | {OPSET_VERSION} |
| versions (`spec_version` of a node) | {versions}, of which 2 is a draft |
| cache file formats | {formats} |
| least IR version of a model | {MIN_IR_VERSION} |

| dimension | is |
|---|---|
| B | rows of the batch |
| Hq, Hkv | query heads and key/value heads; query head h reads key/value head h // (Hq / Hkv), which is whole |
| S | new tokens, which ask |
| N | tokens given to append: S, or 0 to attend only |
| P, T | past tokens, and P + N |
| R | one number for all rows, or one for each: 1 or B |
| Dk, Dv | channels of a key and of a value; they may differ |
| G, L, C | heads, tokens and channels of what a host carries as its past; G * C is at least 4 |

| limit | value |
|---|---|
{limits}

## The ops

{ops}
Floats travel as decimal strings: a float attribute reaches a Python op of onnxruntime-extensions with six digits.
The rewriter writes every attribute out, because that library knows no defaults. Native nodes also take float16 and
bfloat16 tensors, and compute in f32.

## A step

One `KvCacheStep`, or `KvCacheStepV2`, per model runs before every attention node of it, which take its ticket.

1. `past_length` -1 stands for the committed length. Any other value must be between 0 and that; tokens beyond it
   are dropped when the step commits. The output `past_length` is P.
2. The ticket names the handle and this step of it. Opening a step supersedes one that is open: nodes with the old
   ticket fail, and say that two runs used one handle.
3. The committed length grows by N when the last of the model's `layers` nodes has run. Until then the cache is as
   it was before the step, and one that is given up leaves it so.
4. A node that fails poisons its step: later nodes of it touch nothing and fail too.
5. A handle belongs to the first `model_id` that commits a step on it; another model's step fails. Handle 0 is the
   default cache of the session (native host) or of the model (Python host).
6. After a step of which some nodes ran, none failed and some never ran, and if no step of the handle has committed
   yet, the next step fails once: the model may have fewer nodes than it says.

`cache_handle`, `past_length` and (version 2) `new_length` are graph inputs with default initializers
({DEFAULT_HANDLE}, {COMMITTED_LENGTH}, {ALL_NEW}), so a plain session feeds none, and each run appends to the default
cache.

## Rows of their own

`KvCacheStepV2` opens a step over rows that may hold different numbers of tokens: the rows of one cache, or several
caches of one row each. It is a left-padded batch whose padding is not stored.

1. Row b has P_b past tokens and N_b new ones: the last `new_length` of the S that a node is given, or all S. The
   output `past_length` is the largest P_b; `row_past_length` has each.
2. Of the queries it has the last N_b; the output of the others is 0. Of a mask's columns, which stand for the
   longest row and S, it has the last P_b + N_b. Its queries stand at P_b.
3. Everything of a step is for all rows or for none: an error names the row, and leaves every cache as it was.
4. A model may say in `one_length` why its rows must hold equally many tokens and take all S; a node of version 1
   always must.

## Ghost I/O

A model may keep the past inputs and present outputs of its first layer, so that hosts carry them from run to run as
they do for any decoder: these hold stamps. One `CacheOpen` stands before the step and one `CacheStamp` behind it, and
both take the graph input `cache_handle`. Where that is not 0, they pass on what they are given.

1. P is the length of the mask less S. Past tensors hold P tokens, or are buffers of P + S or more. P = 0 is a new,
   empty cache.
2. The stamps name each row's tokens one by one. A run goes on in the cache that wrote them if that holds these rows,
   in whatever order, and nothing more; otherwise in a copy, whose rows may come from several caches, cut to P.
3. What is no stamp, or of another process, another model or the other side, is refused, as is a token that is not
   where it was written, and a past whose cache was freed.
4. When all caches of the process take more than `kv_bytes`, those that stamps name are freed, used longest ago first.
   That the one in use takes more alone is an error.

The stamp of a token is in the first four channels of its heads, taken one after the other. Each is a float32 whose
bits are 010, then 29 bits:

| channel | bits |
|---|---|
| 0 | a random number of the process, 28 bits; 0 for a key, 1 for a value |
| 1 | the lower 29 bits of the number of the run |
| 2 | its upper 13 bits; the row, 16 bits |
| 3 | the position of the token |

## A node

In this order: attend, append, seal. The step's own tokens are never quantized before they are attended to.

1. Keys are those of [sinks, sealed blocks, residual], P tokens, and the N new ones as given. The scores of query i,
   which stands at position P + i, are query · key * `scale`.
2. `softcap`, unless 0: score = softcap * tanh(score / softcap).
3. `attn_mask`, if any, is added.
4. `is_causal` hides key j > P + i. `window`, unless 0, hides j > P + i and j <= P + i - window. Hidden scores are
   -inf. The first `window_sinks` tokens (version 2) are not hidden by the window.
5. Softmax over all keys in f32, finite fills included: a row filled with one finite number is uniform. `head_sink`
   is one more column, whose value is zero. A row of -inf alone is NaN, or zeros where `nan_to_zero` is 1. Without
   keys: zeros.
6. The output is softmax(scores) · values.

A slot of kind `self` takes new tokens once per step, N in each slot. A node with N = 0 reads what its slot holds by
then, which includes tokens that an earlier node of the step gave it; its queries still stand at P. A slot of kind
`cross` keeps what it was filled with: its P is its own length, new tokens replace all it holds, and `past_length`
does not cut it.

## Blocks

A row of a slot is a sequence of segments, in this order:

| segment | holds |
|---|---|
{segments}

The tokens of each row and slot, in order: the first `sink_length` are sinks, f32. Then come sealed blocks of
`block_tokens` tokens, then the residual, f32. Whenever the residual holds `residual_length` + `block_tokens`
tokens, its oldest `block_tokens` become a block, which never changes again. So a row depends on its tokens alone,
not on how they were split over steps. (The nodes of `cross` slots are written with `residual_length` 0.)

Cropping inside the residual is exact. Where it cuts a block, the tokens that stay are decoded and become the
residual.

When a step commits in which all nodes of a slot have one `window` and `evict` (version 2), the blocks are freed that
no query at or after the row's length can see: those that end before its length - window + 1. Their tokens still
count. A row can then be cut to 0, or to where all that its window shows is held: sinks + freed + window - 1 tokens
or more.

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

That is the scheme `affine`, of either side.

## Schemes

Version 2 has others. `lane_sum` adds terms i, i + 16, i + 32, ... in order, from 0, in lane i of 16, then the upper
half of the lanes to the lower one, four times. `rotated` multiplies by a Hadamard matrix, over its norm, for each power
of two that adds up to the head size, the largest first: 96 channels are 64 and 32. For h = 1, 2, 4, ... below the size
of a matrix (x_i, x_i+h) becomes (x_i + x_i+h, x_i - x_i+h), then all are multiplied by float32 of size^-1/2. It undoes
itself.

Keys:

- `+rotated`: the keys of a block are rotated before all else. The scores are those of the rotated query.
- `+token`: then each is divided by the scale of its token. Scores are multiplied by it.

      rms   = sqrt(lane_sum(k_c^2) / Dk)
      unit  = float16 toward +inf of (the block's largest rms / {TOKEN_SCALES[1]}), at least 2^-14
      token = clamp(round(rms / unit), {TOKEN_SCALES[0]}, {TOKEN_SCALES[1]}); the scale is token * unit

- `affine`: then codes as above. `digits:A`: `k_bits` is 2, and a block spends N = round(Dk * A / 2), ties to even,
  digits of two bits on each head. A channel of 1, 2 or 3 digits has lo, scale and codes as above at 2, 4 or 6 bits, one
  without digits lo = float16 nearest of lane_sum(k_t) / block_tokens, and scale 0. With error_d = lane_sum((k_t -
  k'_t)^2) of d digits, the gain of a channel's digit d is error_d-1 - error_d, at most the gain of digit d - 1. The N
  largest gains get a digit; of equal ones the lower digit, then the lower channel. A code is the sum of 4^e times digit
  e.

Values, `{SYMMETRIC}` (2, 3 or 4 bits): the values of each token are rotated; what the products of a run give is rotated
back. Groups as above, around zero: x' = scale * (code - c), c = (2^bits - 1) / 2.

    code(x, s) = clamp(round(x * (1 / s) + c), 0, 2^bits - 1), 1 / s = 0 where s is 0
    rms        = sqrt(lane_sum(x_i^2) / channels of the group)

For s = rms * f * start {starts}, rounded to float32, f = {factors}, and
n_i = 2 code(x_i, s) - 2 c: a = lane_sum(x_i n_i), b = lane_sum(n_i^2). Of the first s with the largest a * a / b,
scale = float16 nearest of 2 max(a, 0) / b, and the codes are code(x, scale).

A side that holds NaN or infinity, or needs a parameter that is infinite (of digits those of 1, 2 and 3 for every
channel), stays f32 for that block.

## The arrays of a block

Codes are packed along the last axis, lowest bits first, each row padded with zeros to a whole byte.

| array | keys | values |
|---|---|---|
| codes, u8 | (Hkv, Dk, ceil(block_tokens * k_bits / 8)) | (Hkv, block_tokens, ceil(Dv * v_bits / 8)) |
| codes of digits, u8 | (Hkv, N, ceil(block_tokens * 2 / 8)) | |
| lo, float16 | (Hkv, Dk) | (Hkv, block_tokens, ceil(Dv / v_group_size)), `affine` only |
| scale, float16 | (Hkv, Dk) | (Hkv, block_tokens, ceil(Dv / v_group_size)) |
| digits of each channel, u8 | (Hkv, ceil(Dk * 2 / 8)), `digits` only | |
| token, u8 | (Hkv, block_tokens), `+token` only | |
| unit, float16 | (Hkv), `+token` only | |
| dense, f32 | (Hkv, block_tokens, Dk) | (Hkv, block_tokens, Dv) |

The rows of digits are digit 0 of each channel that has one, in ascending order, then digit 1 of each that has two, then
digit 2.

## The cache file

| offset | bytes | content |
|---|---|---|
| 0 | 6 | `KIVIKV` |
| 6 | 2 | format version, u16 |
| 8 | 8 | n, the length of the header, u64 |
| 16 | n | header: JSON in UTF-8, keys sorted, no spaces |
| 16 + n | | arrays in C order, without padding, in the order below |
| last 32 | 32 | SHA-256 of all before it |

All numbers are little-endian. The same cache gives the same bytes, whichever backend holds it, in the lowest version
that can say what it holds. The header of version 1:

    {{"length": committed tokens,
     "slots": [{{"attributes": those of the QuantizedKvSdpa node,
                "rows": [{{"heads": Hkv, "k_head_size": Dk, "v_head_size": Dv,
                          "sinks": tokens, "residual": tokens, "blocks": "qqqd..."}}]}}],
     "step": attributes of the KvCacheStep node, or null for a cache that no model has used}}

Version 2 has `"lengths": [tokens of each row]` in the place of `length`, and in a row in the place of `sinks`,
`residual` and `blocks`:

    "segments": [["{SINKS}", tokens], ["{FREED}", tokens], ["{SEALED}", "qqqd..."], ["{DENSE}", tokens]]

without those that hold nothing. Slots are in ascending order. `blocks`, or `{SEALED}`, has two letters per block, keys
and values: `q` for codes, `d` for f32. Arrays, for each slot and each of its rows: keys then values of the sinks; for
each block its keys then its values, each its arrays as above, or the dense array; keys then values of the residual. A
slot that holds nothing has no rows.

A reader trusts nothing: sizes, types, parameters (finite, scale at least 2^-14) and the checksum are checked before
a cache is made. [examples/read_cache.py](../examples/read_cache.py) reads a file in 40 lines of Python and NumPy,
and [tests/golden](../tests/golden) holds files and blocks that every version must write byte for byte."""


def document() -> str:
    """The text of SPEC.md."""
    facts = {name: value for module in (spec, spec_schemes) for name, value in vars(module).items() if name.isupper()}
    limits = "\n".join(f"| `{name}` | {value:,} |" for name, value in facts.items() if name.startswith("MAX_"))
    lists = {"versions": VERSIONS, "formats": spec.FORMAT_VERSIONS}
    words = {name: " and ".join(map(str, values)) for name, values in lists.items()}
    segments = "\n".join(f"| `{s.tag}` | {s.meaning}{'' if s.built else '; not built yet'} |" for s in spec.SEGMENTS)
    starts = ", ".join(f"{start:g} at {bits}" for bits, start in spec_schemes.STARTS.items()) + " bits"
    words |= {"starts": f"({starts})", "factors": ", ".join(map(str, spec_schemes.FACTORS))}
    return TEMPLATE.format(limits=limits, ops="\n".join(map(_op_table, OPS)), segments=segments, **words, **facts)


def _op_table(op: OpSpec) -> str:
    head = f"Version {op.version}. {op.doc}"
    lines = [f"### {op.name}", "", head, "", "| | name | type | meaning |", "|---|---|---|---|"]
    for role, tensors in (("input", op.inputs), ("output", op.outputs)):
        lines += [f"| {role} | `{t.name}` | {t.element} ({', '.join(t.shape)}) | {t.meaning} |" for t in tensors]
    for a in op.attributes:
        default = "" if a.default is None else f", default `{a.default}`"
        lines.append(f"| attribute | `{a.name}` | {a.wire}{default} | {a.meaning} |")
    return "\n".join([*lines, ""])
