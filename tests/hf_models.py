"""A tiny llama twice: transformers' own, in torch, and our ONNX decoder with the same weights, rewritten into a folder.

`Replay` is the oracle of what is quantized: no cache of a generation is ever reordered, copied or cropped in it.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

import onnx_kivi as kivi
from onnx_kivi.hf import KiviForCausalLM
from onnx_kivi.run.session import quiet_options
from onnx_kivi_models.decoder import DecoderConfig
from onnx_kivi_models.tiny import random_weights, tiny_config, tiny_decoder

SPECIAL = ("<pad>", "<bos>", "<eos>", "<turn>")
TEMPLATE = "{% for m in messages %}<turn>{{ m['role'] }}: {{ m['content'] }}{% endfor %}<turn>assistant: "
SHARPNESS = 1.4


def decoder_config() -> DecoderConfig:
    """Embeddings of its own for the output: tied ones make random models repeat themselves."""
    return tiny_config(vocabulary=256 + len(SPECIAL), tied_embeddings=False)


def llama(seed: int = 0) -> Any:
    """transformers' llama with the weights of tiny_decoder(seed=seed). Nothing ends its texts but their length."""
    tiny = decoder_config()
    config = LlamaConfig(
        vocab_size=tiny.vocabulary,
        hidden_size=tiny.hidden,
        num_hidden_layers=tiny.layers,
        num_attention_heads=tiny.heads,
        num_key_value_heads=tiny.kv_heads,
        head_dim=tiny.head_size,
        intermediate_size=tiny.feed_forward,
        max_position_embeddings=1024,
        rms_norm_eps=tiny.norm_epsilon,
        tie_word_embeddings=tiny.tied_embeddings,
        pad_token_id=256,
        bos_token_id=257,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    # Else, where scikit-learn is installed, what one generation drafts depends on the ones before it.
    model.generation_config.assistant_confidence_threshold = 0.0
    weights = random_weights(seed, sharpness=SHARPNESS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            linear = parameter.dim() == 2 and "embed" not in name
            shape = tuple(parameter.shape)[::-1] if linear else tuple(parameter.shape)
            array = torch.from_numpy(weights(name, shape))
            parameter.copy_(array.T if linear else array)
    return model


def tokenizer() -> Any:
    """A token for each byte, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, *SPECIAL])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    made.chat_template = TEMPLATE
    return made


def small(bits: int) -> kivi.KiviConfig:
    """A configuration that seals after a few tokens."""
    return kivi.KiviConfig(bits, bits, block_tokens=16, residual_length=8, sink_length=2)


def one_thread() -> ort.SessionOptions:
    """Options of sessions too small to gain from threads."""
    options = quiet_options()
    options.intra_op_num_threads = 1
    return options


def write_folder(folder: Path, bits: int, seed: int = 0) -> Path:
    """The rewritten decoder with its configuration and tokenizer, as an exporter lays them out."""
    model = tiny_decoder(decoder_config(), seed=seed, sharpness=SHARPNESS)
    onnx.save(model, folder / "original.onnx")
    kivi.save(kivi.rewrite(model, small(bits))[0], folder / "model.onnx")
    original = llama(seed)
    original.config.save_pretrained(folder)
    original.generation_config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


class Replay(KiviForCausalLM):
    """The same model, each row of each call fed anew to a cache of its own: up to every cut at once, then by token.

    Only for use_cache=False, where generate() brings all tokens in each call.
    """

    cuts: tuple[int, ...] = ()

    def forward(  # type: ignore[override]
        self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **_: Any
    ) -> Any:
        B, T = input_ids.shape
        mask = torch.ones((B, T), dtype=torch.long) if attention_mask is None else attention_mask
        rows = [
            self._row(input_ids[b, None], mask[b, None], position_ids[b % len(position_ids), None]) for b in range(B)
        ]
        return CausalLMOutputWithPast(logits=torch.cat(rows))

    def _row(self, ids: Any, mask: Any, positions: Any) -> Any:
        T = ids.shape[1]
        first = self.cuts[-1]
        ends = [0, *(cut for cut in self.cuts if cut < T), *range(first, T + 1)]
        with self.session.new_cache() as cache:
            for start, end in pairwise(sorted({*ends, T})):
                feeds = {
                    "input_ids": ids[:, start:end],
                    "attention_mask": mask[:, :end],
                    "position_ids": positions[:, start:end],
                }
                arrays = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in feeds.items()}
                logits = self.session.run(["logits"], arrays, cache=cache)[0]
        return torch.from_numpy(logits[:, -1:])
