"""The configuration: the paper's sizes, what derives from them, and mistakes that fail when it is built."""

import json
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import Qwen2Config, Siglip2VisionConfig, SiglipVisionConfig

from factories import tiny_config
from transformers_crosslmm import CrossLMMConfig
from transformers_crosslmm.configuration_crosslmm import CROSS_ATTENTION_FIELDS

# A mistake found by our checks; by the types of the fields; while the parts are put together.
MISTAKE = (StrictDataclassClassValidationError, StrictDataclassFieldValidationError, ValueError)


def fields(config, names: str) -> tuple:
    return tuple(getattr(config, name) for name in names.split())


# -- sizes ------------------------------------------------------------------------------------------------------------

LLM = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size"
VISION = "hidden_size num_hidden_layers num_attention_heads intermediate_size image_size patch_size"
QWEN_1_5B = (1536, 28, 12, 2, 8960, 151936)
QWEN_7B = (3584, 28, 28, 4, 18944, 152064)
SO400M = (1152, 27, 16, 4304, 384, 14)
GIANT = (1536, 40, 16, 6144, 384, 16)


def test_defaults_build_the_2b():
    config = CrossLMMConfig()
    assert fields(config.text_config, LLM) == QWEN_1_5B
    assert fields(config.vision_config, VISION) == SO400M
    assert config.text_config.rope_parameters["rope_theta"] == 1e6
    assert config.text_config.rms_norm_eps == 1e-6
    assert config.tie_word_embeddings is config.text_config.tie_word_embeddings is True
    assert (config.image_token_id, config.video_token_id) == (151655, 151656)
    assert (config.vision_feature_layer, config.vision_chunk_size) == (-2, 16)
    assert (config.pooled_grid_size, config.pooling_mode, config.projector_hidden_size) == (3, "bilinear", None)


def test_the_papers_options_are_the_defaults():
    names = "use_v2v use_t2v v2v_scope visual_norm visual_time gate_init cross_attention_cache"
    assert fields(CrossLMMConfig(), names) == (True, True, "video", "none", "none", 0.0, "kv")


@pytest.mark.parametrize(
    ("name", "llm", "vision", "tied", "tokens", "patch_grid"),
    [
        ("2B", QWEN_1_5B, SO400M, True, 9, 27),
        ("7B", QWEN_7B, SO400M, False, 9, 27),
        ("7B-16", QWEN_7B, GIANT, False, 16, 24),
    ],
)
@pytest.mark.parametrize("flavour", ["paper", "recommended"])
def test_presets_are_the_papers_sizes(name, llm, vision, tied, tokens, patch_grid, flavour):
    config = CrossLMMConfig.from_preset(name, flavour=flavour)
    assert fields(config.text_config, LLM) == llm
    assert fields(config.vision_config, VISION) == vision
    assert config.tie_word_embeddings is tied
    assert (config.tokens_per_frame, config.patch_grid_size) == (tokens, patch_grid)
    assert config.cross_attention_layer_indices == [0, 4, 8, 12, 16, 20, 24]
    assert config.num_vision_blocks == vision[1] - 1
    assert CrossLMMConfig.from_preset(name, flavour=flavour, tokens_per_frame=1).tokens_per_frame == 1


def test_the_flavours_differ_in_the_options_alone():
    paper, recommended = (
        CrossLMMConfig.from_preset("7B", flavour=flavour).to_dict() for flavour in ("paper", "recommended")
    )
    options = {name: paper.pop(name) for name in ("visual_norm", "visual_time")}
    assert options == {"visual_norm": "none", "visual_time": "none"}
    assert {recommended.pop(name) for name in options} == {"layernorm", "sinusoidal"}
    assert paper == recommended


def test_a_preset_is_new_each_time():
    CrossLMMConfig.from_preset("7B").vision_config.hidden_size = 7
    assert CrossLMMConfig.from_preset("7B").vision_config.hidden_size == 1152


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"name": "3B"}, "'2B', '7B', '7B-16'; got '3B'"),
        ({"name": "2B", "flavour": "best"}, "'paper', 'recommended'; got 'best'"),
        ({"name": "7B-16", "tokens_per_frame": 9}, "must be 1 or 16; got 9"),
    ],
    ids=["name", "flavour", "tokens"],
)
def test_unknown_presets_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        CrossLMMConfig.from_preset(**arguments)


def test_long_context_is_qwens_yarn_setting():
    config = CrossLMMConfig.from_preset("2B", long_context=True)
    assert config.text_config.rope_parameters["rope_type"] == "yarn"
    assert config.text_config.rope_parameters["rope_theta"] == 1e6
    assert config.max_sequence_length == 131072
    assert CrossLMMConfig().max_sequence_length == 32768


# -- what derives from what -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        ({}, [0, 4, 8]),
        ({"cross_attention_interval": 3}, [0, 3, 6, 9]),
        ({"cross_attention_interval": 12}, [0]),
        ({"cross_attention_layers": [2, 9]}, [2, 9]),
        ({"cross_attention_layers": []}, []),
        ({"cross_attention_layers": [0, 5], "cross_attention_interval": 5}, [0, 5]),
    ],
    ids=str,
)
def test_layers_follow_from_what_is_given_and_only_that_is_serialised(given, layers):
    config = CrossLMMConfig(text_config={"num_hidden_layers": 10}, **given)
    assert config.cross_attention_layer_indices == layers
    for written in (config.to_dict(), json.loads(config.to_json_string())):
        names = ("cross_attention_interval", "cross_attention_layers")
        assert {name: written[name] for name in names if written.get(name) is not None} == given


def test_layers_follow_a_changed_depth():
    numbers = CrossLMMConfig(text_config={"num_hidden_layers": 10}).to_dict()
    numbers["text_config"] |= {"num_hidden_layers": 5, "layer_types": None}
    assert CrossLMMConfig(**numbers).cross_attention_layer_indices == [0, 4]


def test_without_a_branch_no_layer_has_a_block():
    config = CrossLMMConfig(use_v2v=False, use_t2v=False)
    assert config.cross_attention_layer_indices == []


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_one_field_under_two_names(tied, tmp_path):
    for given in (
        {"text_config": {"tie_word_embeddings": tied}},
        {"text_config": {"tie_word_embeddings": not tied}, "tie_word_embeddings": tied},
        {"text_config": Qwen2Config(tie_word_embeddings=not tied), "tie_word_embeddings": tied},
    ):
        config = CrossLMMConfig(**given)
        assert config.tie_word_embeddings is config.text_config.tie_word_embeddings is tied
        assert config.to_dict()["tie_word_embeddings"] is tied
    config.tie_word_embeddings = not tied
    assert config.text_config.tie_word_embeddings is not tied
    config.text_config.tie_word_embeddings = tied
    assert config.tie_word_embeddings is tied
    config.save_pretrained(tmp_path)
    for change in ({"tie_word_embeddings": not tied}, {"text_config": {"tie_word_embeddings": not tied}}):
        loaded = CrossLMMConfig.from_pretrained(tmp_path, **change)
        assert loaded.tie_word_embeddings is loaded.text_config.tie_word_embeddings is not tied


@pytest.mark.parametrize(
    ("text_config", "heads"),
    [
        ({"model_type": "qwen2", "num_key_value_heads": 2}, (8, 6, 2)),
        ({"model_type": "qwen3", "num_key_value_heads": 3, "head_dim": 12}, (12, 6, 3)),
        ({"model_type": "llama", "num_key_value_heads": None, "head_dim": 14}, (14, 6, 6)),
    ],
    ids=["derived", "qwen3", "llama"],
)
def test_heads_are_as_many_and_as_wide_as_the_language_models(text_config, heads):
    config = CrossLMMConfig(text_config=text_config | {"hidden_size": 48, "num_attention_heads": 6})
    assert (config.head_dim, config.num_attention_heads, config.num_key_value_heads) == heads


def test_the_vision_head_is_never_asked_for():
    vision_config = SiglipVisionConfig(vision_use_head=True)
    assert CrossLMMConfig(vision_config=vision_config).vision_config.vision_use_head is False
    assert CrossLMMConfig(vision_config={"vision_use_head": True}).vision_config.vision_use_head is False


@pytest.mark.parametrize(("layer", "blocks"), [(-2, 2), (-1, 3), (3, 3), (1, 1), (0, 0), (-4, 0)])
def test_blocks_are_counted_as_hidden_states_are(layer, blocks):
    assert tiny_config(vision_feature_layer=layer).num_vision_blocks == blocks


def test_pixels_past_the_last_whole_patch_make_no_patch():
    assert tiny_config(vision_config={"image_size": 33, "patch_size": 6}).patch_grid_size == 5
    assert tiny_config(vision_config={"image_size": 36, "patch_size": 6}).patch_grid_size == 6


@pytest.mark.parametrize(("size", "tokens"), [(1, 1), (3, 9), (5, 25)])
def test_tokens_per_frame_is_the_square_of_the_pooled_grid(size, tokens):
    assert tiny_config(pooled_grid_size=size).tokens_per_frame == tokens


# -- saving -----------------------------------------------------------------------------------------------------------


def test_a_saved_config_comes_back_the_same(tmp_path):
    config = tiny_config(
        text_config={"visual_norm": "layernorm", "visual_time": "sinusoidal", "v2v_scope": "causal", "gate_init": 0.5},
        vision_feature_layer=-1,
        pooling_mode="average",
        projector_hidden_size=36,
    )
    config.save_pretrained(tmp_path)
    loaded = CrossLMMConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert type(loaded.text_config) is Qwen2Config
    assert type(loaded.vision_config) is SiglipVisionConfig


def test_the_same_config_is_written_the_same_way_again(tmp_path):
    tiny_config().save_pretrained(tmp_path / "once")
    CrossLMMConfig.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    once, twice = ((tmp_path / folder / "config.json").read_text() for folder in ("once", "twice"))
    assert once == twice


def test_overrides_at_loading_change_only_what_they_name(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    loaded = CrossLMMConfig.from_pretrained(tmp_path, text_config={"vocab_size": 140})
    assert loaded.text_config.vocab_size == 140
    expected, actual = config.to_dict(), loaded.to_dict()
    del expected["text_config"]["vocab_size"], actual["text_config"]["vocab_size"]
    assert actual == expected


# -- mistakes ---------------------------------------------------------------------------------------------------------

TEXT_MISTAKES = {
    "unknown-scope": ({"v2v_scope": "clip"}, "`v2v_scope` must be one of 'video', 'frame', 'causal'; got 'clip'"),
    "unknown-norm": ({"visual_norm": "rms"}, "`visual_norm` must be one of 'none', 'layernorm'; got 'rms'"),
    "unknown-time": ({"visual_time": "rotary"}, "`visual_time` must be one of 'none', 'sinusoidal'; got 'rotary'"),
    "unknown-cache": (
        {"cross_attention_cache": "x"},
        "`cross_attention_cache` must be one of 'kv', 'features'; got 'x'",
    ),
    "time-without-norm": ({"visual_time": "sinusoidal"}, 'set `visual_norm="layernorm"` too'),
    "layer-too-deep": ({"cross_attention_layers": [0, 5]}, r"between 0 and 4 .*is 5.*got \[0, 5\]"),
    "negative-layer": ({"cross_attention_layers": [-1, 0]}, r"between 0 and 4 .*got \[-1, 0\]"),
    "descending-layers": ({"cross_attention_layers": [2, 0]}, r"ascending.*got \[2, 0\]"),
    "repeated-layer": ({"cross_attention_layers": [1, 1]}, r"without repeats.*got \[1, 1\]"),
    "interval-of-zero": ({"cross_attention_interval": 0}, "`cross_attention_interval` must be at least 1; got 0"),
    "list-against-interval": (
        {"cross_attention_layers": [0, 3], "cross_attention_interval": 2},
        r"\[0, 3\] contradicts `cross_attention_interval` 2, which means \[0, 2, 4\]; give one of the two",
    ),
    "flag-as-text": ({"use_v2v": "yes"}, "'use_v2v' expected bool"),
    "key-heads-that-do-not-divide": ({"num_key_value_heads": 5}, "multiple of `num_key_value_heads`.*5 key/value"),
    "gate-that-is-no-number": ({"gate_init": float("nan")}, "`gate_init` must be finite; got nan"),
}
TOP_MISTAKES = {
    "grid-above-patch-grid": ({"pooled_grid_size": 6}, r"`pooled_grid_size`.*patch grid \(5\); got 6"),
    "grid-of-zero": ({"pooled_grid_size": 0}, r"`pooled_grid_size` must lie between 1 .*got 0"),
    "unknown-pooling": ({"pooling_mode": "max"}, "`pooling_mode` must be one of 'bilinear', 'average'; got 'max'"),
    "vision-layer-too-deep": ({"vision_feature_layer": 4}, r"`vision_feature_layer`.*-4 and 3 .*3 blocks.*got 4"),
    "vision-layer-too-negative": ({"vision_feature_layer": -5}, r"`vision_feature_layer`.*-4 and 3.*got -5"),
    "no-frames-at-a-time": ({"vision_chunk_size": 0}, "`vision_chunk_size` must be at least 1 frame; got 0"),
    "projector-of-width-zero": ({"projector_hidden_size": 0}, "`projector_hidden_size` must be at least 1; got 0"),
    "layout-of-a-later-version": ({"weight_layout": 2}, "`weight_layout` must be 1.*got 2.*Upgrade"),
    "one-token-for-both": ({"image_token_id": 128}, "must differ; both are 128"),
    "size-as-text": ({"pooled_grid_size": "3"}, "'pooled_grid_size' expected int"),
}
VISION_MISTAKES = {
    "frames-not-square": ({"image_size": [33, 39]}, r"`vision_config.image_size` must be one number.*\[33, 39\]"),
    "heads-that-do-not-divide": ({"num_attention_heads": 7}, "must divide its width 20; got 7"),
    "encoder-of-another-kind": (
        {"model_type": "siglip2_vision_model"},
        "must be one of 'siglip_vision_model', 'clip_vision_model', .*; got 'siglip2_vision_model'",
    ),
    "frame-below-a-patch": ({"image_size": 5}, r"patch grid \(0\)"),
}


def parameters(mistakes: dict[str, tuple]) -> list:
    return [pytest.param(mistake, text, id=name) for name, (mistake, text) in mistakes.items()]


@pytest.mark.parametrize(("mistake", "text"), parameters(TEXT_MISTAKES))
def test_a_mistake_in_the_text_config_fails_when_it_is_built(mistake, text):
    interval = {"cross_attention_interval": None} if "cross_attention_layers" in mistake else {}
    with pytest.raises(MISTAKE, match=f"(?s){text}"):
        tiny_config(text_config={**interval, **mistake})


@pytest.mark.parametrize(("mistake", "text"), parameters(TOP_MISTAKES))
def test_a_mistake_in_the_config_fails_when_it_is_built(mistake, text):
    with pytest.raises(MISTAKE, match=f"(?s){text}"):
        tiny_config(**mistake)


@pytest.mark.parametrize(("mistake", "text"), parameters(VISION_MISTAKES))
def test_a_mistake_in_the_vision_config_fails_when_it_is_built(mistake, text):
    with pytest.raises(MISTAKE, match=f"(?s){text}"):
        tiny_config(vision_config=mistake)


def test_time_needs_an_even_width():
    """Half of the width holds sines, the other half cosines."""
    with pytest.raises(MISTAKE, match=r"encoder of even width; got `vision_config\.hidden_size` 21"):
        tiny_config(
            text_config={"visual_norm": "layernorm", "visual_time": "sinusoidal"},
            vision_config={"hidden_size": 21, "num_attention_heads": 3},
        )


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"vision_config": Siglip2VisionConfig()}, "'siglip_vision_model', .*got 'siglip2_vision_model'"),
        ({"text_config": Siglip2VisionConfig()}, "config of a decoder; a Siglip2VisionConfig has no vocab_size"),
        ({"text_config": {"model_type": "qwen2x"}}, "model type of Transformers.*got 'qwen2x'"),
    ],
    ids=["vision", "text", "text-fields"],
)
def test_backbones_of_another_kind_are_refused(parts, text):
    with pytest.raises(MISTAKE, match=text):
        CrossLMMConfig(**parts)


def test_the_earlier_form_is_read_and_the_new_one_written():
    """`earlier_config.json` was written before the fields of the cross-attention moved out of the text config."""
    earlier = json.loads((Path(__file__).parent / "earlier_config.json").read_text())
    config = CrossLMMConfig.from_dict(earlier)
    text = earlier["text_config"]
    assert text["model_type"] == "crosslmm_text"
    assert type(config.text_config) is Qwen2Config
    for name in CROSS_ATTENTION_FIELDS:
        assert getattr(config, name) == text.get(name, getattr(CrossLMMConfig(), name))
    assert config.text_config.hidden_size == text["hidden_size"]
    assert config.text_config.num_hidden_layers == 28  # Qwen2.5-1.5B's, which the earlier form left out
    assert config.text_config.rope_parameters["rope_theta"] == 1e6
    written = json.loads(config.to_json_string())
    assert written["text_config"]["model_type"] == "qwen2"
    assert not set(CROSS_ATTENTION_FIELDS) & set(written["text_config"])
    assert CrossLMMConfig.from_dict(written).to_dict() == config.to_dict()


def test_another_encoders_width_in_the_earlier_form_is_refused():
    with pytest.raises(MISTAKE, match=r"vision encoder's width \(1152\); got 24"):
        CrossLMMConfig(text_config={"cross_attention_hidden_size": 24})


def test_a_mistake_in_a_saved_config_fails_when_it_is_loaded(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    numbers = json.loads(file.read_text())
    numbers["v2v_scope"] = "clip"
    file.write_text(json.dumps(numbers))
    with pytest.raises(MISTAKE, match="`v2v_scope` must be one of"):
        CrossLMMConfig.from_pretrained(tmp_path)
