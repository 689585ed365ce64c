"""What a person sees of each command's outcome: rich tables and lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..measure.batch_bench import Row as StreamsRow
from ..measure.demo import Demo, Share
from ..measure.divergence import KlDivergence, Uncertain
from ..measure.host_bench import HostCost
from ..measure.kernel_bench import KernelBench
from ..measure.model_bench import Row
from ..measure.perplexity import Evaluation
from ..measure.verify import Verification
from ..runtime.cache import Cache
from .folder import RewrittenFolder
from .rewriting import Rewritten


def size(count: int) -> str:
    """Bytes for people, in powers of 1024."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def facts(rows: Mapping[str, object], title: str | None = None) -> Table:
    """Two columns: what, and its value. Rows whose value is None are left out."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, str(value))
    return table


def verification_view(checked: Verification) -> Table:
    """Table of a Verification."""
    return facts(
        {
            "verdict": checked.verdict,
            "largest difference at 32 bits": f"{checked.max_rel_diff:.1e} of the logits' range "
            f"(limit {checked.tolerance:.1e})",
            "mean KL to the original": f"{checked.mean_kl:.1e} nats over {checked.tokens} tokens",
            "top-1 agreement": f"{checked.top1_agreement:.3f}",
            "the model rounds activations to 8 bits": _as_is(checked),
            "tokens quantized in every slot": checked.sealed_tokens,
        },
        title="verify",
    )


def _as_is(checked: Verification) -> str | None:
    if checked.own_kl is None:
        return None
    own = f"moved by a rounding, the original's mean KL to itself is {checked.own_kl:.1e}"
    if checked.as_is_kl is None:
        return own
    return f"compared without that; with it mean KL is {checked.as_is_kl:.1e}; {own}"


def rewrite_view(done: Rewritten, files: Sequence[Path], window: str | None = None) -> Table:
    """Table of a rewrite into `files`, with what its window loses and its verification, if there are any."""
    report = done.report
    families = sorted({site.family for site in report.sites})
    table = facts(
        {
            "written": files[0],
            "with its weights in": ", ".join(str(file) for file in files[1:]) or None,
            "attention sites": f"{len(report.sites)} ({', '.join(families)})",
            "left as they are": len(report.misses) or None,
            "I/O": done.io,
            "cache inputs and outputs removed": len(done.removed_inputs) + len(done.removed_outputs),
            "window": window,
            "verified": None if done.checked else "no (--no-verify)",
        },
        title="rewrite",
    )
    return _with_verification(table, done.checked)


def folder_view(done: RewrittenFolder, output: Path, window: str | None) -> Table:
    """Table of a rewritten folder, with the verification that says most."""
    table = facts(
        {
            "written": output,
            **{name: _said_of(model) for name, model in done.models.items()},
            "other files": done.copied,
            "window": window,
            "verified": None if done.checked else "no (--no-verify)",
        },
        title="rewrite",
    )
    return _with_verification(table, done.checked)


def _said_of(model: Rewritten) -> str:
    reason = "" if model.ghost or not model.report.no_ghost else f" (ghost I/O: {model.report.no_ghost})"
    return f"{len(model.report.sites)} attention sites; I/O: {model.io}{reason}"


def _with_verification(table: Table, checked: Verification | None) -> Table:
    if checked is not None:
        table.add_section()
        for row in zip(*(column.cells for column in verification_view(checked).columns), strict=True):
            table.add_row(*map(str, row))
    return table


def generated_view(data: Mapping[str, Any], cache: Cache) -> Table:
    """Figures of a generation."""
    ms = data["ms_per_token"]
    return facts(
        {
            "tokens": data["tokens"],
            "ms per token": f"{ms:.1f}" if ms is not None else None,
            "cache": f"{size(cache.nbytes)} for {cache.length} tokens, {cache.sealed_tokens} of them quantized "
            f"(f32: {size(cache.dense_nbytes)})",
        },
    )


def perplexity_view(result: Evaluation) -> Table:
    """Figures of an evaluation."""
    original = None if result.reference_ppl is None else f"{result.reference_ppl:.4f}"
    return facts(
        {
            "perplexity": f"{result.ppl:.4f} over {result.tokens} tokens",
            "perplexity of the original": original,
            **(_divergence_facts(result.divergence) if result.divergence else {}),
            "tokens quantized at the end of a window": result.sealed_tokens,
        },
        title="perplexity",
    )


def _divergence_facts(found: KlDivergence) -> dict[str, str]:
    """Rows about a distance to the original."""

    def mean(x: Uncertain, form: str) -> str:
        return f"{x.value:{form}} \N{PLUS-MINUS SIGN} {x.error:.1e}"

    percentiles = ", ".join(f"{share}% {value:.1e}" for share, value in found.kl_percentiles.items())
    return {
        "mean KL to the original": mean(found.kl, ".2e"),
        "largest KL": f"{found.kl_max:.2e}",
        "percentiles of KL": percentiles,
        "mean change of p": mean(found.delta_p, ".2e"),
        "rms change of p": mean(found.delta_p_rms, ".2e"),
        "top-1 agreement": mean(found.same_top, ".4f"),
    }


def info_view(data: Mapping[str, Any]) -> Table:
    """Table of `info`."""
    return facts({k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in data.items()})


def demo_view(result: Demo) -> RenderableType:
    """The demo: what was found and verified, both answers, and the two models side by side."""
    found = facts(
        {
            "model": f"SmolLM2-135M-Instruct, {result.model}",
            "attention sites": f"{result.sites} ({result.family})",
            "prompt": f"{result.context} tokens of Python documentation and a question",
            "time in all": f"{result.seconds:.0f} s",
        },
        title="demo",
    )
    sides = Table(title="side by side", title_justify="left")
    for column in ("", "original", f"{result.bits}-bit cache", "ratio"):
        sides.add_column(column, justify="left" if not column else "right")

    def row(name: str, value: Callable[[Share], str], ratio: Callable[[Share], float] | None = None) -> None:
        share = f"{ratio(result.rewritten) / ratio(result.original):.2f}" if ratio else ""
        sides.add_row(name, value(result.original), value(result.rewritten), share)

    row("inputs, outputs", lambda c: f"{c.inputs}, {c.outputs}")
    row("tokens quantized", lambda c: str(c.sealed_tokens))
    row("cache", lambda c: size(c.cache_bytes), lambda c: c.cache_bytes)
    row("ms per token", lambda c: f"{c.ms_per_token:.1f}", lambda c: c.ms_per_token)
    return Group(
        found,
        Text("at 32 bits:"),
        verification_view(result.dense_verify),
        Text(f"at {result.bits} bits:"),
        verification_view(result.verify),
        Panel(Text(result.question), title="question", title_align="left"),
        Panel(Text(result.original.text), title="original", title_align="left"),
        Panel(Text(result.rewritten.text), title=f"{result.bits}-bit cache", title_align="left"),
        sides,
    )


def bench_view(curves: Mapping[str, Sequence[Row]]) -> Table:
    """One line per model and context length."""
    table = Table(title="bench", title_justify="left")
    for column in ("model", "context", "ms per token", "original", "ratio", "cache", "original"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, rows in curves.items():
        for row in rows:
            theirs = row.reference_ms_per_token
            table.add_row(
                name,
                str(row.context),
                f"{row.ms_per_token:.1f}",
                f"{theirs:.1f}" if theirs else "",
                f"{row.ms_per_token / theirs:.2f}" if theirs else "",
                size(row.cache_bytes),
                size(row.reference_cache_bytes) if row.reference_cache_bytes else "",
            )
    return table


def batch_bench_view(rows: Sequence[StreamsRow]) -> Table:
    """One line per number of streams and context length."""
    table = Table(title="batch-bench", title_justify="left")
    for column in ("streams", "context", "tokens/s", "original, one by one", "ratio", "first token, ms", "cache"):
        table.add_column(column, justify="right")
    for row in rows:
        theirs = row.reference_tokens_per_s
        table.add_row(
            str(row.streams),
            str(row.context),
            f"{row.tokens_per_s:.1f}",
            f"{theirs:.1f}" if theirs else "",
            f"{row.tokens_per_s / theirs:.2f}" if theirs else "",
            f"{row.first_token_ms:.0f}",
            size(row.cache_bytes),
        )
    return table


def kernel_bench_view(result: KernelBench) -> Table:
    """One line per contender, with how many times faster we are."""
    table = Table(title=f"kernel-bench: {result.isa}, threads {result.threads}", title_justify="left")
    for column in ("", "ms", "GB/s of cache", "we are faster by"):
        table.add_column(column, justify="right" if column else "left")
    for row in result.rows:
        ratio = result.ratios.get(str(row["name"]))
        share = "" if ratio is None else f"{ratio:.2f}x" if row["name"] != "stream" else f"{ratio:.2f} of the limit"
        table.add_row(str(row["name"]), f"{row['ms']:.3f}", f"{row['gb_per_s']:.1f}", share)
    return table


def host_bench_view(costs: Sequence[HostCost]) -> Table:
    """One line per host."""
    rows = {f"{cost.host} host, {cost.backend} backend": f"{cost.us_per_node:.1f} us per node" for cost in costs}
    return facts(rows, title="host-bench: beyond the backend's math")
