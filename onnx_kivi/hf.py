"""The door of the extra `hf`: rewritten models under transformers' generate() and pipelines.

Importing it raises ExtraUnavailableError where transformers or torch is missing, or is of a version that is not known.
"""

from __future__ import annotations

from .run.transformers.cache import KiviCache
from .run.transformers.model import KiviForCausalLM
from .run.transformers.seq2seq import KiviForSeq2SeqLM

__all__ = ["KiviCache", "KiviForCausalLM", "KiviForSeq2SeqLM"]
