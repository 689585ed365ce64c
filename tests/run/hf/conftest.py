"""The tiny llama in torch, and rewritten: dense to be compared with it, quantized to be compared with our Session.

`bash tests/hosts` makes environments with transformers and torch; in any other this folder has no tests.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from hf_models import Replay
    from onnx_kivi.hf import KiviForCausalLM


def pytest_ignore_collect() -> bool | None:
    """Leave the folder out where its packages are missing."""
    return True if None in map(find_spec, ("torch", "transformers")) else None


@pytest.fixture(scope="session")
def original() -> Any:
    """transformers' own llama, too small to gain from threads."""
    import torch

    import hf_models

    torch.set_num_threads(1)
    return hf_models.llama()


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same llama rewritten at 32 bits, with configuration and tokenizer."""
    import hf_models

    return hf_models.write_folder(tmp_path_factory.mktemp("dense"), 32)


@pytest.fixture(scope="session")
def quantized_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same at 8 bits, with blocks of 16 tokens, 8 recent and 2 sink tokens."""
    import hf_models

    return hf_models.write_folder(tmp_path_factory.mktemp("quantized"), 8)


@pytest.fixture(scope="session")
def dense(dense_folder: Path) -> KiviForCausalLM:
    """Ours, exact."""
    from hf_models import one_thread
    from onnx_kivi.hf import KiviForCausalLM

    return KiviForCausalLM.from_pretrained(dense_folder, sess_options=one_thread())


@pytest.fixture(scope="session")
def quantized(quantized_folder: Path) -> KiviForCausalLM:
    """Ours, at 8 bits."""
    from hf_models import one_thread
    from onnx_kivi.hf import KiviForCausalLM

    return KiviForCausalLM.from_pretrained(quantized_folder, sess_options=one_thread())


@pytest.fixture(scope="session")
def replay(quantized_folder: Path) -> Replay:
    """What our Session makes of the same tokens at 8 bits, fed step by step."""
    from hf_models import Replay, one_thread

    return Replay.from_pretrained(quantized_folder, sess_options=one_thread())


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A token for each byte."""
    import hf_models

    return hf_models.tokenizer()
