"""The command line: arguments, exit codes and errors. What each command does is in `commands`.

Exit code 0 on success, 1 when a check that was asked for fails, 2 on bad usage or bad input, with one line on stderr.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from rich.console import Console

from .. import __version__
from ..config import PRESETS
from ..errors import KiviError
from ..measure.plans import FULL, LEVELS, QUICK
from ..progress import Progress
from ..spec import BITS, IO_KINDS, MAX_KV_BYTES
from ..spec_schemes import AFFINE, K_SCHEMES, V_SCHEMES
from . import commands
from .progress_bar import progress_bar
from .rewriting import NO

Run = Callable[[argparse.Namespace, Progress], commands.Outcome]

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
TERMINATED = 143

PRESET_HELP = "bits and schemes by name, best first"


def _whole(least: int, most: int) -> Callable[[str], int]:
    """The type of an option that takes an integer in this range."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected an integer from {least} to {most}, got {text!r}")
        return value

    return read


def _real(least: float, most: float) -> Callable[[str], float]:
    """The type of an option that takes a number in this range."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected a number from {least:g} to {most:g}, got {text!r}")
        return value

    return read


OUTPUT_HELP = "the file to write; or, for a folder, the folder, unless it ends in .onnx"
COPY_HELP = "a folder gets weights of its own (else hard links to the original's, which onnx.load refuses to read)"
IO_HELP = (
    "what stands in the place of past and present: none (default of files), or stamps for hosts that carry a past "
    "(default of folders of optimum and genai)"
)
KV_BYTES_HELP = "that caches may take under ghost I/O (default 0: what ONNX_KIVI_KV_BYTES says)"
LAST_LOGITS_HELP = "add an input num_logits_to_keep, which long prompts are fed with (0, its default: all)"
LEVEL_HELP = "full: the file as it is (default); quick: its graph with small blocks, on few tokens"
VERIFY_HELP = "quick: the graph with small blocks, on few tokens (default); full: the file as it is; no: not at all"
WINDOW_HELP = "lossy: a query sees the last N tokens only, and the rest is freed (default 0: all)"

COUNT = _whole(0, 1 << 20)
TOKENS = _whole(1, 1 << 20)
WINDOW = _whole(2, 1 << 20)
SPAN = _whole(2, 1 << 24)
FEW = _whole(1, 1024)
CONTEXT = _whole(1, 1 << 24)
SIZE = _whole(1, 1 << 16)
SEED = _whole(0, (1 << 63) - 1)
BYTES = _whole(0, MAX_KV_BYTES)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)
    try:
        return _run(args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on: say nothing at exit either
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if args.debug or not (isinstance(error, KiviError | OSError | MemoryError) or _is_onnxruntimes(error)):
            raise
        reason = f"out of memory: {error}" if isinstance(error, MemoryError) else str(error)
        print(f"onnx-kivi {args.command}: {' '.join(reason.split())}", file=sys.stderr)
        return BAD_INPUT


def _stop(*_: object) -> NoReturn:
    """End by an exception, so that temporary files go."""
    sys.exit(TERMINATED)


def _is_onnxruntimes(error: Exception) -> bool:
    """Whether onnxruntime refused to run a model on what it was given."""
    return type(error).__module__.startswith("onnxruntime.")


def _run(args: argparse.Namespace) -> int:
    with progress_bar(Console(stderr=True)) as progress:
        outcome = args.run(args, progress)
    if args.json:
        print(json.dumps(_finite(outcome.data), allow_nan=False))
    elif isinstance(outcome.view, str):
        print(outcome.view)
    elif outcome.view is not None:
        Console().print(outcome.view)
    if not outcome.ok and outcome.failure:
        print(f"onnx-kivi {args.command}: {outcome.failure}", file=sys.stderr)
    sys.stdout.flush()
    return 0 if outcome.ok else FAILED


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="onnx-kivi", description="Makes the KV cache of an exported ONNX decoder small and fast.")
    parser.add_argument("--version", action="version", version=f"onnx-kivi {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Run, about: str, example: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(
            name,
            help=about,
            description=about,
            epilog=f"example: onnx-kivi {name} {example}".rstrip(),
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else there")
        sub.add_argument("--debug", action="store_true", help="show a traceback on errors")
        return sub

    _inspect(command("inspect", commands.inspect_model, "List attention sites and misses.", "model.onnx"))
    _rewrite(
        command("rewrite", commands.rewrite_model, "Rewrite, verify and save a model.", "model.onnx -o small.onnx")
    )
    _verify(command("verify", commands.verify_model, "Run both on the same tokens.", "model.onnx small.onnx"))
    _generate(command("generate", commands.generate_text, "Stream text.", "small.onnx --tokenizer DIR --prompt Once"))
    _ppl(command("ppl", commands.perplexity, "Perplexity.", "small.onnx --tokenizer DIR --reference model.onnx"))
    _bench(command("bench", commands.bench, "Speed and memory by context.", "small.onnx --reference model.onnx"))
    _batch_bench(command("batch-bench", commands.batch_bench, "Speed of many streams.", "small.onnx --streams 1,8"))
    _kernel_bench(command("kernel-bench", commands.kernel_bench, "One decode step of attention, against others.", ""))
    _host_bench(command("host-bench", commands.host_bench, "What a node costs on each host.", "--turns 1000"))
    _demo(command("demo", commands.demo, "The main job on a real small model, from nothing.", ""))
    command("info", commands.info, "Versions, hosts and backends available, and the ISA chosen.", "")
    return parser


def _inspect(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    _cross(parser)


def _rewrite(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help=OUTPUT_HELP)
    _quantization(parser)
    _cross(parser)
    parser.add_argument("--io", choices=IO_KINDS, help=IO_HELP)
    parser.add_argument("--kv-bytes", type=BYTES, default=0, metavar="N", help=KV_BYTES_HELP)
    parser.add_argument("--partial", action="store_true", help="rewrite what matches and leave the other caches")
    parser.add_argument("--last-logits", action="store_true", help=LAST_LOGITS_HELP)
    verify = parser.add_mutually_exclusive_group()
    verify.add_argument("--verify", choices=(*LEVELS, NO), default=QUICK, help=VERIFY_HELP)
    verify.add_argument("--no-verify", dest="verify", action="store_const", const=NO, help="the same as --verify no")
    parser.add_argument("--copy-weights", action="store_true", help=COPY_HELP)


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("original", metavar="ORIGINAL")
    parser.add_argument("rewritten", metavar="REWRITTEN")
    parser.add_argument("--level", choices=LEVELS, default=FULL, help=LEVEL_HELP)
    parser.add_argument("--prompt", type=TOKENS, metavar="N", help="of a full run's prefill (default: enough to seal)")
    parser.add_argument("--steps", type=TOKENS, metavar="N", help="single tokens after it (default 4, quick 2)")
    parser.add_argument("--batch", type=FEW, default=2, metavar="N", help="rows (default 2)")
    parser.add_argument("--seed", type=SEED, default=0, metavar="N")
    parser.add_argument("--tolerance", type=_real(0, 1), metavar="X", help="of the logits' range, at 32 bits")


def _generate(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    _tokenizer(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the ChatML form of chat models")
    parser.add_argument("--max-new-tokens", type=COUNT, default=64, metavar="N", help="at most (default 64)")
    parser.add_argument("--temperature", type=_real(0, 1000), default=0.0, metavar="X", help="0 = greedy (default)")
    parser.add_argument("--top-p", type=_real(1e-6, 1), default=1.0, metavar="X")
    parser.add_argument("--seed", type=SEED, metavar="N")


def _ppl(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    _tokenizer(parser)
    parser.add_argument("--text", metavar="FILE", help="default: the Python documentation that comes with CPython")
    parser.add_argument("--reference", metavar="ORIGINAL", help="also report KL and top-1 agreement against it")
    parser.add_argument("--window", type=WINDOW, default=1024, metavar="N", help="tokens per window (default 1024)")
    parser.add_argument("--windows", type=TOKENS, default=6, metavar="N", help="windows (default 6)")


def _bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="+", metavar="MODEL", help="rewritten models; the JSON rows are the first one's")
    parser.add_argument("--reference", metavar="ORIGINAL", help="take turns with this model")
    parser.add_argument(
        "--context", type=_numbers(CONTEXT), default=[512, 4096], metavar="N,N", help="default 512,4096"
    )
    parser.add_argument("--new-tokens", type=TOKENS, default=16, metavar="N", help="tokens timed (default 16)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the curves of all models")


def _batch_bench(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--reference", metavar="ORIGINAL", help="also what this gives one stream after another")
    parser.add_argument("--streams", type=_numbers(FEW), default=[1, 8], metavar="N,N", help="default 1,8")
    parser.add_argument("--context", type=_numbers(CONTEXT), default=[2048], metavar="N,N", help="default 2048")
    parser.add_argument("--new-tokens", type=TOKENS, default=16, metavar="N", help="of each, timed (default 16)")


def _kernel_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--heads", type=SIZE, default=32, metavar="N", help="query heads (default 32)")
    parser.add_argument("--kv-heads", type=SIZE, default=8, metavar="N", help="key/value heads (default 8)")
    parser.add_argument("--head-size", type=SIZE, default=128, metavar="N", help="channels of a head (default 128)")
    parser.add_argument("--context", type=SPAN, default=16384, metavar="N", help="tokens held (default 16384)")
    parser.add_argument("--bits", type=int, default=8, choices=BITS, help="of our cache (default 8)")
    parser.add_argument("--threads", type=FEW, default=1, metavar="N", help="of every contender (default 1)")


def _host_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--turns", type=TOKENS, default=300, metavar="N", help="runs of each host (default 300)")


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bits", type=int, default=8, choices=BITS, help="of the cache (default 8)")
    parser.add_argument("--max-new-tokens", type=TOKENS, default=48, metavar="N", help="of the answers (default 48)")


def _numbers(each: Callable[[str], int]) -> Callable[[str], list[int]]:
    """The type of an option that takes several, separated by commas."""
    return lambda text: [each(part) for part in text.split(",")]


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null stands for them."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="an .onnx file, or a folder that holds model.onnx")


def _cross(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cross", action="store_true", help="also the caches that never grow: an encoder's")


def _tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="folder that holds tokenizer.json")


def _quantization(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, help=PRESET_HELP)
    parser.add_argument("--bits", type=int, metavar="N", help="of keys and values: 8 (default), 4, 2, or 32 = dense")
    parser.add_argument("--k-bits", type=int, metavar="N", help="of keys (default: --bits)")
    parser.add_argument("--v-bits", type=int, metavar="N", help="of values (default: --bits)")
    parser.add_argument("--k-scheme", metavar="NAME", help=f"{', '.join(K_SCHEMES)} (default {AFFINE}; see SPEC.md)")
    parser.add_argument("--v-scheme", metavar="NAME", help=f"{', '.join(V_SCHEMES)} (default {AFFINE})")
    parser.add_argument("--block-tokens", type=int, default=64, metavar="N", help="tokens sealed at once (default 64)")
    parser.add_argument("--v-group-size", type=int, default=64, metavar="N", help="channels; 0 = all (default 64)")
    parser.add_argument("--residual", type=int, default=128, metavar="N", help="recent tokens in f32 (default 128)")
    parser.add_argument("--sinks", type=int, default=4, metavar="N", help="first tokens in f32 (default 4)")
    parser.add_argument("--window", type=COUNT, default=0, metavar="N", help=WINDOW_HELP)
    parser.add_argument("--window-sinks", type=COUNT, default=0, metavar="N", help="first tokens seen beside a window")
    parser.add_argument("--layer-bits", default="", metavar="SPEC", help='exceptions, such as "0,29:8" or "0:8;1:8/4"')
