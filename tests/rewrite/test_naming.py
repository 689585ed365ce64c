"""How exporters name caches: what a name says of its layer, its side and its partner."""

from __future__ import annotations

import pytest

from onnx_kivi import naming


@pytest.mark.parametrize(
    ("name", "layer", "side"),
    [
        ("past_key_values.3.key", 3, "key"),
        ("past_key_values.12.decoder.value", 12, "value"),
        ("past_key_value_0_value", 0, "value"),
        ("past_3", 3, None),
        ("cache", None, None),
    ],
)
def test_a_cache_s_name_has_its_layer_and_side(name: str, layer: int | None, side: str | None) -> None:
    assert (naming.layer_of(name), naming.side_of(name)) == (layer, side)


@pytest.mark.parametrize(
    ("past", "present"),
    [
        ("past_key_values.0.key", "present.0.key"),
        ("past_key_values.0.key", "present_key_values.0.key"),
        ("past_0_key", "present_0_key"),
        ("past_key_0", "out_key_0"),
    ],
)
def test_an_input_is_carried_onward_by_the_output_named_like_it(past: str, present: str) -> None:
    assert naming.present_of(past, ["logits", present]) == present
    assert naming.present_of(past, ["logits"]) is None
    assert naming.may_be_present_of(past, present)


@pytest.mark.parametrize("present", ["present.1.key", "present.0.value", "past_1_key_out"])
def test_an_output_named_like_another_cache_s_is_not_its_present(present: str) -> None:
    assert not naming.may_be_present_of("past_key_values.0.key", present)


def test_an_output_with_a_name_of_another_kind_may_be_any_cache_s_present() -> None:
    assert naming.may_be_present_of("past_key_values.0.key", "hidden_1_value")


def test_what_is_named_like_a_cache() -> None:
    assert naming.is_cache_name("past_key_values.0.key")
    assert naming.is_cache_name("cache_k_0")
    assert not naming.is_cache_name("attention_mask")
    assert naming.is_past_name("past_0")
    assert not naming.is_past_name("cache_position")
    assert naming.is_encoder_name("past_key_values.0.encoder.key")
    assert not naming.is_encoder_name("past_key_values.0.decoder.key")
