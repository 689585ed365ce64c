"""Builders of the models that the demo and the tests use: a real small one, and tiny random ones."""

from .decoder import DecoderConfig, Spelling, emit
from .smollm2 import SmolLM2, build, chat_prompt
from .tiny import random_weights, tiny_config, tiny_decoder

__all__ = [
    "DecoderConfig",
    "SmolLM2",
    "Spelling",
    "build",
    "chat_prompt",
    "emit",
    "random_weights",
    "tiny_config",
    "tiny_decoder",
]
