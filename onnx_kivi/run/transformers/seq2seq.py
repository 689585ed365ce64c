"""KiviForSeq2SeqLM: an encoder and a rewritten decoder that transformers' generate() takes for a model of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime as ort
import torch
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from ...arrays import FloatArray, IntArray
from ...errors import ConfigError, UnsupportedModelError
from ...model_config import CONFIG_FILE
from ...paths import tellable
from ..session import Session, open_model
from ..stepper import logits_of, token_feeds
from .arguments import floats, ids_of, integers, mask_of, refuse
from .base import KiviModel
from .cache import KiviCache
from .loading import check_described, open_config, read_generation_config
from .protocol import PROTOCOL

ENCODER_FILE, DECODER_FILE = "encoder_model.onnx", "decoder_model_merged.onnx"
FOLDERS = ("", "onnx")
STATES, MASK = "encoder_hidden_states", "encoder_attention_mask"
WHISPER = "whisper"


class KiviEncoder(torch.nn.Module):
    """An encoder, run by onnxruntime: tokens or features in, states (B, T, width) out."""

    def __init__(self, session: ort.InferenceSession) -> None:
        super().__init__()
        self.session = session
        self.main_input_name = session.get_inputs()[0].name
        self._takes_mask = any(i.name == "attention_mask" for i in session.get_inputs())

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        **others: Any,
    ) -> BaseModelOutput:
        """The states of tokens (B, T), with a mask that is 0 at padding, or of features (B, bins, frames)."""
        refuse(others)
        given = {"input_ids": input_ids, "input_features": input_features}.get(self.main_input_name)
        if given is None:
            raise ConfigError(f"{self.main_input_name}: expected what the encoder takes, got none")
        array = floats(given) if given.is_floating_point() else integers(given)
        feeds = {self.main_input_name: array}
        if self._takes_mask:
            feeds["attention_mask"] = mask_of(attention_mask, *given.shape[:2])
        return BaseModelOutput(last_hidden_state=torch.from_numpy(self.session.run(None, feeds)[0]))


class KiviForSeq2SeqLM(KiviModel):
    """An encoder-decoder, see KiviModel. The decoder stores what its layers make of the encoder's states, once."""

    base_model_prefix = "model"

    def __init__(
        self, session: Session, encoder: ort.InferenceSession, config: Any, generation_config: Any = None
    ) -> None:
        super().__init__(session, config, generation_config)
        self.encoder = KiviEncoder(encoder)
        self.main_input_name = self.encoder.main_input_name
        if self._signature.stored != {STATES}:
            got = ", ".join(sorted(self._signature.stored)) or "none"
            raise UnsupportedModelError(
                f"inputs: expected a decoder that stores what it makes of {STATES}, got one that stores {got}; "
                f"{self._how_to_rewrite()}"
            )

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        config: Any = None,
        *,
        host: str = "auto",
        backend: str = "auto",
        sess_options: ort.SessionOptions | None = None,
        providers: Sequence[Any] | None = None,
    ) -> KiviForSeq2SeqLM:
        """Open a folder with encoder_model.onnx and a rewritten decoder_model_merged.onnx, or with both in `onnx`.

        config: a transformers config, or the folder of one, instead of the model's. generation_config.json is read
        where there is one. The rest is as Session takes it. Raises as Session does, and ConfigError for a config that
        is missing, can't be read, or is another model's, and for a file that is missing.
        """
        folder = tellable(model)
        decoder, encoder = _file(folder, DECODER_FILE), _file(folder, ENCODER_FILE)
        chosen = open_config(folder if config is None else config)
        session = Session(decoder, sess_options, providers, host=host, backend=backend)
        check_described(chosen, session, str(folder / CONFIG_FILE) if config is None else "config", seq2seq=True)
        kind = KiviWhisper if chosen.model_type == WHISPER else cls
        opened = kind(session, open_model(encoder, sess_options, providers), chosen, read_generation_config(folder))
        opened.name_or_path = str(model)
        return opened

    def get_encoder(self, *_: Any, **__: Any) -> KiviEncoder:
        """The encoder."""
        return self.encoder

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: KiviCache | None = None,
        cache: KiviCache | None = None,
        labels: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Logits (B, S, vocabulary) of the new tokens `decoder_input_ids` (B, S), which the cache takes in.

        attention_mask: the encoder's, 0 at padding. encoder_outputs: states (B, T, width) first, else the encoder runs
        on input_ids or input_features, unless the cache holds what was made of them. decoder_attention_mask: no
        padding. labels: (B, S), -100 = not counted; gives the loss, and without decoder_input_ids the tokens too.
        """
        refuse(others)
        if decoder_attention_mask is not None and not bool((decoder_attention_mask != 0).all()):
            raise ConfigError("decoder_attention_mask: expected no padding, which the decoder takes no mask for, got 0")
        held = self._held(past_key_values, cache)
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = _shifted(labels, self.config)
        ids = ids_of("decoder_input_ids", decoder_input_ids, self._vocabulary)
        if encoder_outputs is None and held.cache.length == 0:
            encoder_outputs = self.encoder(input_ids, attention_mask, input_features)
        states = None if encoder_outputs is None else encoder_outputs[0]
        logits = torch.from_numpy(self._run(ids, states, attention_mask, held))
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.to(logits.device).flatten())
        kept = {PROTOCOL.cache_name: None if use_cache is False else held}
        output = Seq2SeqLMOutput(loss=loss, logits=logits, encoder_last_hidden_state=states, **kept)
        return output if return_dict or return_dict is None else output.to_tuple()

    def _run(
        self, ids: IntArray, states: torch.Tensor | None, mask: torch.Tensor | None, held: KiviCache
    ) -> FloatArray:
        """One step of the session; a first one stores what the decoder makes of the states."""
        (B, S), past = ids.shape, held.cache.length
        known: dict[str, Any] = {}
        if past == 0:
            if states is None or states.dim() != 3 or len(states) != B:
                got = "none" if states is None else f"shape {tuple(states.shape)}"
                raise ConfigError(f"encoder_outputs: expected states (batch, tokens, width) of {B} rows, got {got}")
            known[STATES] = floats(states)
        if MASK in self._signature.inputs:
            known[MASK] = _encoder_mask(mask, states, B)
        feeds = token_feeds(self._signature, ids, mask_of(None, B, past + S), known)
        results = self.session.run(None, feeds, cache=held.cache)
        return logits_of(dict(zip(self._signature.outputs, results, strict=True)))

    def _how_to_rewrite(self) -> str:
        return f"rewrite {DECODER_FILE} with --cross"


class KiviWhisper(WhisperGenerationMixin, KiviForSeq2SeqLM):
    """An encoder-decoder of speech: generate() is Whisper's own."""

    input_modalities = ("audio",)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Whisper's generate() asks the strides of its encoder's convolutions: frames per state.
        strides = {f"conv{i}": SimpleNamespace(stride=(i,)) for i in (1, 2)}
        self.model = SimpleNamespace(encoder=SimpleNamespace(**strides), config=self.config)

    def _postprocess_outputs(self, seek_outputs: Any, *arguments: Any, **options: Any) -> Any:
        """Whisper's own splits what it hands out by rows, the cache too, as tensors in layers, which ours has not."""
        if not isinstance(seek_outputs, torch.Tensor):
            fields = {name: value for name, value in seek_outputs.items() if name != PROTOCOL.cache_name}
            seek_outputs = type(seek_outputs)(**fields)
        return super()._postprocess_outputs(seek_outputs, *arguments, **options)


def _encoder_mask(mask: torch.Tensor | None, states: torch.Tensor | None, B: int) -> IntArray:
    """The encoder's mask (B, T). Raises ConfigError if nothing says how many tokens it has."""
    sized = mask if states is None else states
    if sized is None:
        raise ConfigError("attention_mask: expected the encoder's, or its encoder_outputs, got neither")
    return mask_of(mask, B, sized.shape[1])


def _file(folder: Path, name: str) -> Path:
    """A file of the folder, or of `onnx` in it. Raises ConfigError."""
    places = [folder / place / name for place in FOLDERS]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise ConfigError(
            f"{places[0]}: expected {ENCODER_FILE} and a rewritten {DECODER_FILE}, got nothing there; rewrite a folder "
            "of optimum's"
        )
    return found


def _shifted(labels: torch.Tensor, config: Any) -> torch.Tensor:
    """The tokens that come before each label."""
    start = torch.full_like(labels[:, :1], config.decoder_start_token_id)
    return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, config.pad_token_id)], 1)
