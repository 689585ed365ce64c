"""What each command of the CLI does: takes parsed arguments, returns its Outcome. Printing is the CLI's."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import graph
from ..config import PRESETS, KiviConfig, parse_layer_bits
from ..errors import ConfigError
from ..measure import batch_bench as bench_batch
from ..measure import demo as demo_run
from ..measure import host_bench as bench_host
from ..measure import kernel_bench as bench_kernel
from ..measure import model_bench as bench_model
from ..measure.perplexity import evaluate
from ..measure.verify import verify
from ..paths import model_path, read_text
from ..progress import Progress
from ..rewrite import pipeline
from ..run.session import Session, open_stepper
from ..run.tokenizer import Tokenizer, chat
from ..runtime.hosts import describe
from ..spec import NO_IO
from ..staging import check_target
from .folder import RewrittenFolder, is_folder_wanted, only_model, rewrite_folder
from .rewriting import NO, Request, Rewritten, check_writable, rewritten
from .views import (
    batch_bench_view,
    bench_view,
    demo_view,
    folder_view,
    generated_view,
    host_bench_view,
    info_view,
    kernel_bench_view,
    perplexity_view,
    rewrite_view,
    verification_view,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """data: the JSON object. view: what a person sees (anything rich prints). failure: why a check failed."""

    data: dict[str, Any]
    view: Any = None
    ok: bool = True
    failure: str = ""


def inspect_model(args: argparse.Namespace, progress: Progress) -> Outcome:
    """Sites and misses of a model; succeeds whether or not all of it matches."""
    progress("reading the model", 0.0)
    report = pipeline.inspect(model_path(args.model), cross=args.cross)
    return Outcome(report.to_dict(), str(report))


def rewrite_model(args: argparse.Namespace, progress: Progress) -> Outcome:
    """Rewrite and verify a file or folder; nothing gets the name asked for before all is well."""
    level = "" if args.verify == NO else args.verify
    request = Request(_config(args), args.partial, level, chooses_io=args.io is None)
    output = Path(args.output)
    if is_folder_wanted(args.model, output):
        return _rewrite_folder(Path(args.model), output, request, args.copy_weights, progress)
    return _rewrite_file(model_path(only_model(args.model)), output, request, progress)


def _rewrite_folder(source: Path, output: Path, request: Request, copy_weights: bool, progress: Progress) -> Outcome:
    done = rewrite_folder(source, output, request, progress, copy_weights=copy_weights)
    return _said_of_rewriting(done, output, lambda: folder_view(done, output, _said_of_window(request.config)))


def _rewrite_file(source: Path, output: Path, request: Request, progress: Progress) -> Outcome:
    if output.exists() and source.exists() and output.samefile(source):
        raise ConfigError(f"-o: expected another file than the model, got {output}; the original is never overwritten")
    if output.is_dir():
        raise ConfigError(f"-o: expected a file to write, got the folder {output}; add a name, such as small.onnx")
    check_target(output)
    check_writable(output.parent)
    progress("rewriting", 0.0)
    model = graph.load(source)
    findings = pipeline.examine(model, cross=request.config.cross, source=source)
    done = rewritten(source, model, findings, request, output, progress)
    weights = () if done.failure else graph.save(model, output)
    view = partial(rewrite_view, done, [output, *weights], _said_of_window(request.config))
    return _said_of_rewriting(done, output, view)


def _said_of_rewriting(done: Rewritten | RewrittenFolder, output: Path, view: Callable[[], Any]) -> Outcome:
    data = done.to_dict() | {"rewritten": None if done.failure else str(output)}
    if done.failure and done.checked:
        return Outcome(data, verification_view(done.checked), ok=False, failure=f"nothing written: {done.failure}")
    return Outcome(data, view())


def verify_model(args: argparse.Namespace, progress: Progress) -> Outcome:
    """Compare an original and its rewrite."""
    checked = verify(
        model_path(args.original),
        model_path(args.rewritten),
        level=args.level,
        prompt=args.prompt,
        steps=args.steps,
        batch=args.batch,
        seed=args.seed,
        tolerance=args.tolerance,
        progress=progress,
    )
    return Outcome(checked.to_dict(), verification_view(checked), checked.ok, checked.reason)


def generate_text(args: argparse.Namespace, progress: Progress) -> Outcome:
    """Generate after a prompt; streams to stdout unless JSON was asked for."""
    tokenizer = Tokenizer.load(args.tokenizer)
    progress("loading the model", 0.0)
    session = Session(args.model)
    ids = tokenizer.encode(chat(args.prompt) if args.chat else args.prompt)
    cache = session.new_cache()
    progress("", 1.0)
    tokens: list[int] = []
    times = [time.perf_counter()]
    text = ""
    for token in session.generate(
        ids,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        stop_tokens=tokenizer.stop_tokens,
        cache=cache,
    ):
        times.append(time.perf_counter())
        tokens.append(token)
        longer = tokenizer.decode(tokens)
        if not longer.endswith("\N{REPLACEMENT CHARACTER}"):
            if not args.json:
                print(longer[len(text) :], end="", flush=True)
            text = longer
    if not args.json:
        print()
    decode = np.diff(times)[1:]
    data = {
        "text": tokenizer.decode(tokens),
        "tokens": len(tokens),
        "ms_per_token": float(np.median(decode) * 1e3) if len(decode) else None,
        "cache_bytes": cache.nbytes,
    }
    return Outcome(data, generated_view(data, cache))


def perplexity(args: argparse.Namespace, progress: Progress) -> Outcome:
    """Perplexity of a rewritten or an original model."""
    tokenizer = Tokenizer.load(args.tokenizer)
    ids = tokenizer.encode(read_text(Path(args.text)) if args.text else demo_run.document())
    result = evaluate(
        open_stepper(args.model),
        ids,
        reference=open_stepper(args.reference) if args.reference else None,
        window=args.window,
        windows=args.windows,
        progress=progress,
    )
    return Outcome(dataclasses.asdict(result), perplexity_view(result))


def bench(args: argparse.Namespace, progress: Progress) -> Outcome:
    """Decode speed and cache bytes by context length."""
    if args.plot:
        bench_model.check_plot(args.plot)
    curves = {
        Path(model).stem: bench_model.bench(
            model, reference=args.reference, contexts=args.context, new_tokens=args.new_tokens, progress=progress
        )
        for model in args.model
    }
    if args.plot:
        bench_model.plot(curves, args.plot)
    rows = [dataclasses.asdict(row) for row in next(iter(curves.values()))]
    return Outcome({"rows": rows}, bench_view(curves))


def batch_bench(args: argparse.Namespace, progress: Progress) -> Outcome:
    """Tokens per second of many streams."""
    rows = bench_batch.batch_bench(
        args.model,
        reference=args.reference,
        streams=args.streams,
        contexts=args.context,
        new_tokens=args.new_tokens,
        progress=progress,
    )
    return Outcome({"rows": [dataclasses.asdict(row) for row in rows]}, batch_bench_view(rows))


def kernel_bench(args: argparse.Namespace, progress: Progress) -> Outcome:
    """One decode step of attention."""
    result = bench_kernel.kernel_bench(
        heads=args.heads,
        kv_heads=args.kv_heads,
        head_size=args.head_size,
        context=args.context,
        bits=args.bits,
        threads=args.threads,
        progress=progress,
    )
    return Outcome(dataclasses.asdict(result), kernel_bench_view(result))


def host_bench(args: argparse.Namespace, progress: Progress) -> Outcome:
    """What a node costs on each host."""
    costs = bench_host.host_bench(turns=args.turns, progress=progress)
    return Outcome({"rows": [dataclasses.asdict(cost) for cost in costs]}, host_bench_view(costs))


def demo(args: argparse.Namespace, progress: Progress) -> Outcome:
    """The main job on the real small model."""
    result = demo_run.run(bits=args.bits, max_new_tokens=args.max_new_tokens, progress=progress)
    return Outcome(result.to_dict(), demo_view(result), not result.failure, result.failure)


def info(args: argparse.Namespace, progress: Progress) -> Outcome:  # noqa: ARG001
    """Versions and what this machine offers."""
    from .. import __version__

    data = {"version": __version__} | describe()
    return Outcome(data, info_view(data))


def _config(args: argparse.Namespace) -> KiviConfig:
    return KiviConfig(
        **_sides(args),
        block_tokens=args.block_tokens,
        v_group_size=args.v_group_size,
        residual_length=args.residual,
        sink_length=args.sinks,
        layer_bits=parse_layer_bits(args.layer_bits),
        cross=args.cross,
        window=args.window,
        window_sinks=args.window_sinks,
        io=args.io or NO_IO,
        kv_bytes=args.kv_bytes,
        last_logits=args.last_logits,
    )


def _sides(args: argparse.Namespace) -> Mapping[str, Any]:
    """Bits and schemes, of the preset or as they are given. Raises ConfigError for both."""
    given = {
        "k_bits": args.bits if args.k_bits is None else args.k_bits,
        "v_bits": args.bits if args.v_bits is None else args.v_bits,
        "k_scheme": args.k_scheme,
        "v_scheme": args.v_scheme,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    if args.preset and chosen:
        raise ConfigError(f"--preset: expected no bits and no schemes beside {args.preset}, got {', '.join(chosen)}")
    return PRESETS[args.preset] if args.preset else chosen


def _said_of_window(config: KiviConfig) -> str | None:
    if not config.window:
        return None
    seen = f"the last {config.window:,} tokens" + f" and the first {config.window_sinks:,}" * bool(config.window_sinks)
    return f"a query sees {seen}; what it no longer sees is lost (verified without the window)"
