"""Rewrites one model and verifies it, under a temporary name, before anything gets its own."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import graph
from ..config import KiviConfig
from ..errors import ConfigError
from ..measure.verify import Verification, verify
from ..progress import Progress
from ..rewrite.pipeline import Findings, carry_out
from ..rewrite.report import Report
from ..staging import staging_folder

NO = "no"


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for, whatever the model. verify: the level, "" for not at all."""

    config: KiviConfig
    partial: bool
    verify: str


@dataclass(frozen=True, slots=True)
class Rewritten:
    """What is to say of a model that is rewritten, but not saved. checked: None if it was not to be verified."""

    report: Report
    checked: Verification | None

    @property
    def failure(self) -> str:
        """Why it must not be saved; "" if it may."""
        return "" if self.checked is None else self.checked.reason

    def to_dict(self) -> dict[str, Any]:
        """The facts that `rewrite --json` prints of a model."""
        return self.report.to_dict() | {
            "removed_inputs": self.report.removed_inputs,
            "removed_outputs": self.report.removed_outputs,
            "verify": self.checked.to_dict() if self.checked else None,
        }


def check_writable(folder: Path) -> None:
    """Raise ConfigError for a folder in which nothing can be written, before the work rather than after it."""
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"-o: expected a folder that can be written to, got {folder}")


def rewritten(
    source: Path, model: graph.Model, findings: Findings, request: Request, output: Path, progress: Progress
) -> Rewritten:
    """The `model` of `source`, as examined, rewritten in place, and verified in a folder beside `output`."""
    config, report = request.config, findings.report
    whole = model
    if request.verify and config.window:
        # A window changes what the model says, by choice; everything else is verified as if there were none.
        whole = graph.copied(model)
        carry_out(findings, whole, replace(config, window=0, window_sinks=0), partial=request.partial)
    carry_out(findings, model, config, partial=request.partial)
    if not request.verify:
        return Rewritten(report, None)
    with staging_folder(output) as folder:
        staged = folder / output.name
        graph.save(whole, staged, link=True)
        return Rewritten(report, verify(source, staged, level=request.verify, report=report, progress=progress))
