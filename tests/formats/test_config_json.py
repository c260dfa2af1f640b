"""A model's config.json with values that no model has: one line, at once, whatever reads it."""

from __future__ import annotations

import json

import pytest

from lrquant import LRQuantError
from lrquant.model.loading import load_model

HUGE = 10**18
VALUES = [
    *({"hidden_size": value} for value in (0, -1, 3, "32", None, [32], HUGE, 10**30)),
    *({"num_hidden_layers": value} for value in (0, -1, 2**31, HUGE, "2", None, 1.5)),
    *({"num_attention_heads": value} for value in (0, -4, 3, HUGE)),
    *({"num_key_value_heads": value} for value in (0, -1, 3, HUGE)),
    *({"head_dim": value} for value in (0, -1, 2**31, HUGE, "8")),
    *({"intermediate_size": value} for value in (0, -1, HUGE, [])),
    *({"vocab_size": value} for value in (0, -1, HUGE, "264")),
    *({"hidden_act": value} for value in ("", "swoosh", 3, [])),
    *({"rope_parameters": {"rope_type": kind}} for kind in ("unknown", "linear", "llama3", 3)),
    *({"pad_token_id": HUGE}, {"num_labels": 2**31}, {"num_labels": 1e300}, {"id2label": 7}),
    *({"dtype": value} for value in ("int4", 3, [], "x")),
    {"auto_map": 3},
    *({"model_type": value} for value in (None, 3, [], {}, "", "llama9")),
    *({"quantization_config": value} for value in (3, "x", {"quant_method": 3})),
    *({"architectures": {"a": 1}, "hidden_size": None}, {"rms_norm_eps": "small"}),
]
TEXTS = {
    **{"empty": "", "half": '{"model_type": "llama"', "a list": "[]", "null": "null"},
    **{"deep": "[" * 100_000, "many digits": '{"model_type": "llama", "x": ' + "9" * 5000 + "}"},
}


def refusal(folder) -> str:
    with pytest.raises(LRQuantError) as caught:
        load_model(str(folder))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize("values", VALUES, ids=lambda values: json.dumps(values)[:50])
def test_a_value_that_no_model_has(model_folder, values):
    folder = model_folder("llama")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    refusal(folder)


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
def test_a_text_that_is_no_configuration(model_folder, content):
    folder = model_folder("llama")
    (folder / "config.json").write_text(content)
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, '{"model": 3}', "\0"])
def test_a_damaged_tokenizer_is_one_line_or_is_not_needed(model_folder, name, content):
    folder = model_folder("llama")
    (folder / name).write_text(content)
    try:
        assert load_model(str(folder)).tokenizer is not None
    except LRQuantError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
