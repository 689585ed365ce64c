"""Writes the tokenizer of a GGUF file as the files that `tokenizers` and `transformers` read.

Contract: a folder gets tokenizer.json, tokenizer_config.json (with the chat template and the special tokens' names) and
generation_config.json (the ids at which to stop). Only byte-level BPE with the pre-tokenizer 'smollm' is known: digits
stand alone, then GPT-2's pattern.
"""

from __future__ import annotations

import json
from pathlib import Path

from onnx_kivi.errors import KiviError, UnsupportedModelError

from .checkpoint import Vocabulary

PRE_TOKENIZER = "smollm"


def write_tokenizer(vocabulary: Vocabulary, context: int, folder: Path) -> None:
    """Write the three files into `folder`; `context` is the longest input the model was trained for, in tokens."""
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    except ImportError as error:
        raise KiviError("writing a tokenizer needs the package tokenizers: pip install 'onnx_kivi[demo]'") from error
    if vocabulary.pre_tokenizer != PRE_TOKENIZER:
        raise UnsupportedModelError(f"pre-tokenizer {vocabulary.pre_tokenizer!r}, expected {PRE_TOKENIZER!r}")
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.BPE(ids, list(vocabulary.merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(vocabulary.tokens[index], special=True, normalized=False) for index in vocabulary.special]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos": vocabulary.bos, "eos": vocabulary.eos, "unk": vocabulary.unknown, "pad": vocabulary.padding}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": vocabulary.chat_template,
        **{f"{role}_token": vocabulary.tokens[index] for role, index in names.items()},
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": vocabulary.bos, "eos_token_id": vocabulary.eos, "pad_token_id": vocabulary.padding},
    )


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write a JSON object for people and programs to read."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
