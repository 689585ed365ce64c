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
from ..rewrite.ghost import Carried
from ..rewrite.pipeline import Findings, carry_out
from ..rewrite.report import Report
from ..rewrite.savings import bits_of
from ..spec import GHOST_IO, NO_IO
from ..staging import staging_folder

NO = "no"
LONG_CONTEXT = 16384


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for, whatever the model.

    verify: the level, "" for not at all. chooses_io: whether the host may say what config.io is.
    """

    config: KiviConfig
    partial: bool
    verify: str
    chooses_io: bool = False

    def for_host(self, report: Report) -> Request:
        """The same for a host that carries a past: with ghost I/O, if that is left open and the model can have it."""
        io = GHOST_IO if self.chooses_io and not report.no_ghost else self.config.io
        return replace(self, config=replace(self.config, io=io))


@dataclass(frozen=True, slots=True)
class Rewritten:
    """What is to say of a model that is rewritten, but not saved. checked: None if it was not to be verified.

    ghost: what it keeps under ghost I/O; None without.
    """

    report: Report
    checked: Verification | None
    ghost: Carried | None
    config: KiviConfig

    @property
    def io(self) -> str:
        """What stands in the place of past and present."""
        return GHOST_IO if self.ghost else NO_IO

    @property
    def removed_inputs(self) -> list[str]:
        """Past inputs that are no more."""
        return [name for name in self.report.removed_inputs if not self.ghost or name not in self.ghost.past]

    @property
    def removed_outputs(self) -> list[str]:
        """Present outputs that are no more."""
        return [name for name in self.report.removed_outputs if not self.ghost or name not in self.ghost.present]

    @property
    def failure(self) -> str:
        """Why it must not be saved; "" if it may."""
        return "" if self.checked is None else self.checked.reason

    def to_dict(self) -> dict[str, Any]:
        """The facts that `rewrite --json` prints of a model."""
        return self.report.to_dict() | {
            "io": self.io,
            "removed_inputs": self.removed_inputs,
            "removed_outputs": self.removed_outputs,
            "bits_at_16k": bits_of(self.report.sites, self.config, LONG_CONTEXT),
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
    ghost = findings.ghost if config.io == GHOST_IO else None
    whole = model
    if request.verify and config.window:
        # A window changes what the model says, by choice; everything else is verified as if there were none.
        whole = graph.copied(model)
        carry_out(findings, whole, replace(config, window=0, window_sinks=0), partial=request.partial)
    carry_out(findings, model, config, partial=request.partial)
    if not request.verify:
        return Rewritten(report, None, ghost, config)
    with staging_folder(output) as folder:
        staged = folder / output.name
        graph.save(whole, staged, link=True)
        checked = verify(source, staged, level=request.verify, report=report, progress=progress)
        return Rewritten(report, checked, ghost, config)
