"""Checkpoints: composed, warm-started, renamed and given back, all of small models that Transformers makes here."""

import json
import os
import runpy
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from typer.testing import CliRunner

import crosslmm_cli
from factories import VISION, random_model, shake, tiny_config, tiny_tokenizer
from transformers_crosslmm import CrossLMMConfig, CrossLMMForConditionalGeneration
from transformers_crosslmm.checkpoints import folder as checkpoint_folder
from transformers_crosslmm.checkpoints.compose import compose
from transformers_crosslmm.checkpoints.conversion import (
    Conversion,
    ConversionError,
    check_complete,
    renamed_tensors,
    write_checkpoint,
)
from transformers_crosslmm.checkpoints.first_run import first_run
from transformers_crosslmm.checkpoints.folder import (
    SHARD_BYTES,
    UNUSED_WEIGHTS,
    StoredTensor,
    new_folder,
    split_into_shards,
    stored_tensors,
    write_weights,
)
from transformers_crosslmm.checkpoints.llava import (
    convert_crosslmm_weights,
    convert_llava,
    crosslmm_to_llava_next,
    llava_next_config,
    llava_onevision_config,
)
from transformers_crosslmm.checkpoints.name_tables import (
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    read_name_table,
    rename,
    reversed_table,
    transformers_key_mapping,
)
from transformers_crosslmm.checkpoints.name_tables import TEXT as TEXT_TABLE
from transformers_crosslmm.checkpoints.network import expected_shapes
from transformers_crosslmm.checkpoints.new_weights import initial_tensors

CONVERSION = Path(__file__).parents[2] / "conversion"
TEXT = {
    "vocab_size": 271,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory):
    """A SigLIP as it is published: with its text tower."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("siglip")
    text = {"hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(vision_config=dict(VISION), text_config=text | {"vocab_size": 30})
    shake(SiglipModel(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("qwen2")
    shake(Qwen2ForCausalLM(Qwen2Config(**TEXT))).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def composed_folder(tmp_path_factory, vision_folder, text_folder):
    out = tmp_path_factory.mktemp("composed") / "out"
    conversion = compose(vision_folder, text_folder, cross_attention_interval=2)
    write_checkpoint(conversion, out, try_out=True)
    return out


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("llava_onevision")
    config = LlavaOnevisionConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_index=266,
        video_token_index=267,
    )
    shake(LlavaOnevisionForConditionalGeneration(config)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def llava_next_folder(tmp_path, llava_folder):
    """The same weights in LLaVA-NeXT's layout, in two shards, renamed here by hand."""
    folder = tmp_path / "llava_next"
    write_llava_next(folder, llava_folder, LLAVA_NEXT_CONFIG)
    return folder


LLAVA_NEXT_CONFIG = {
    "mm_vision_tower": "google/some-siglip",
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 20,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_spatial_pool_mode": "bilinear",
    "mm_spatial_pool_stride": 2,
    "mm_newline_position": "grid",
}


def write_llava_next(folder, llava_folder, mm_config):
    folder.mkdir()
    tensors = {}
    for name, tensor in load_file(llava_folder / "model.safetensors").items():
        if name.startswith("vision_tower."):
            name = name.replace("vision_tower.", "model.vision_tower.vision_tower.vision_model.", 1)
            name = name.replace("vision_model.vision_model.", "vision_model.")
        elif name.startswith("multi_modal_projector."):
            number = {"linear_1": "0", "linear_2": "2"}[name.split(".")[1]]
            name = f"model.mm_projector.{number}.{name.split('.')[2]}"
        elif name == "image_newline":
            name = "model.image_newline"
        else:
            name = name.removeprefix("language_model.")
        tensors[name] = tensor
    weight_map = {}
    names = sorted(tensors)
    for number, part in enumerate((names[:40], names[40:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {**TEXT, **mm_config, "model_type": "qwen2", "architectures": ["LlavaQwenForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(folder)
    return tensors


def weights(folder):
    return {name: tensor.read() for name, tensor in stored_tensors(folder).items()}


def run(*words: str) -> str:
    """What the command prints."""
    result = CliRunner().invoke(crosslmm_cli.app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


# Composing


def test_a_composition_takes_every_weight_of_its_backbones(composed_folder, vision_folder, text_folder):
    ours, vision, text = weights(composed_folder), weights(vision_folder), weights(text_folder)
    for name, tensor in text.items():
        name = name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)
        assert torch.equal(ours[name], tensor), name
    blocks = [name for name in vision if name.startswith(("vision_model.embeddings", "vision_model.encoder"))]
    built = [name for name in blocks if ".layers.2." not in name]  # of three blocks, the last is not read
    assert len(built) < len(blocks)
    for name in built:
        assert torch.equal(ours[name.replace("vision_model.", "model.vision_tower.", 1)], vision[name]), name
    assert not [name for name in ours if "vision_tower.encoder.layers.2." in name or "vision_tower.head" in name]


def test_new_queries_and_outputs_are_the_self_attentions_head_by_head_without_its_bias(composed_folder, text_folder):
    ours, text = weights(composed_folder), weights(text_folder)
    head_dim = TEXT["hidden_size"] // TEXT["num_attention_heads"]
    for layer in (0, 2, 4):
        self_attention = f"model.layers.{layer}.self_attn"
        assert text[f"{self_attention}.q_proj.bias"].abs().min() > 0
        for branch in ("v2v", "t2v"):
            new = f"model.language_model.layers.{layer}.cross_attention.{branch}"
            for head in range(TEXT["num_attention_heads"]):
                own = slice(head * head_dim, (head + 1) * head_dim)
                query, output = ours[f"{new}.q_proj.weight"], ours[f"{new}.o_proj.weight"]
                assert torch.equal(query[own], text[f"{self_attention}.q_proj.weight"][own])
                assert torch.equal(output[:, own], text[f"{self_attention}.o_proj.weight"][:, own])
            assert f"{new}.q_proj.bias" not in ours


def test_other_new_weights_are_as_documented(composed_folder, text_folder):
    ours, text = weights(composed_folder), weights(text_folder)
    drawn = []
    for layer in (0, 2, 4):
        new = f"model.language_model.layers.{layer}.cross_attention"
        assert torch.equal(ours[f"{new}.input_layernorm.weight"], text[f"model.layers.{layer}.input_layernorm.weight"])
        for branch in ("v2v", "t2v"):
            assert torch.equal(ours[f"{new}.{branch}.gate.weight"], torch.zeros(1))
            drawn += [ours[f"{new}.{branch}.k_proj.weight"], ours[f"{new}.{branch}.v_proj.weight"]]
    for tensor in drawn:
        # Of n draws, mean and deviation lie within five standard errors of 0 and 0.02.
        n = tensor.numel()
        assert abs(tensor.mean()) < 5 * 0.02 / n**0.5
        assert abs(tensor.std() - 0.02) < 5 * 0.02 / (2 * n) ** 0.5
    assert len({tuple(tensor.flatten()[:3].tolist()) for tensor in drawn}) == len(drawn), "each has draws of its own"
    for linear in ("linear_1", "linear_2"):
        assert not ours[f"model.multi_modal_projector.{linear}.bias"].any()


def test_a_composition_is_its_language_model_on_the_pooled_tokens(composed_folder, vision_folder, text_folder):
    model = CrossLMMForConditionalGeneration.from_pretrained(composed_folder).eval()
    frames = torch.randn(2, 3, 33, 33)
    with torch.no_grad():
        encoder = SiglipVisionModel.from_pretrained(vision_folder).eval()
        grid = encoder(frames, output_hidden_states=True).hidden_states[-2].unflatten(1, (5, 5)).permute(0, 3, 1, 2)
        pooled = F.interpolate(grid, (3, 3), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
        ours = weights(composed_folder)
        first, second = (
            [ours[f"model.multi_modal_projector.{linear}.{part}"] for part in ("weight", "bias")]
            for linear in ("linear_1", "linear_2")
        )
        tokens = F.linear(F.gelu(F.linear(pooled, *first)), *second).flatten(0, 1)
        text_model = Qwen2ForCausalLM.from_pretrained(text_folder).eval()
        before, after = torch.arange(7), torch.arange(20, 31)
        embed = text_model.get_input_embeddings()
        embeddings = torch.cat([embed(before), tokens, embed(after)])[None]
        expected = text_model(inputs_embeds=embeddings).logits
        placeholders = torch.full((18,), model.config.video_token_id)
        logits = model(
            input_ids=torch.cat([before, placeholders, after])[None], pixel_values_videos=frames, use_cache=False
        ).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_composition_loads_by_its_folder_with_its_processor(composed_folder):
    model, info = AutoModelForImageTextToText.from_pretrained(composed_folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.untrained
    assert model.config.weight_layout == 1
    processor = AutoProcessor.from_pretrained(composed_folder)
    assert processor.tokens_per_frame == model.config.tokens_per_frame == 9
    assert processor.video_token_id == model.config.video_token_id
    assert model.generation_config.suppress_tokens == [model.config.image_token_id, model.config.video_token_id]


def test_new_weights_depend_on_the_seed_and_on_nothing_else(vision_folder, text_folder):
    def drawn(**options):
        tensors = compose(vision_folder, text_folder, **options).tensors
        return tensors["model.language_model.layers.4.cross_attention.v2v.k_proj.weight"].read()

    assert torch.equal(drawn(seed=5), drawn(seed=5, cross_attention_interval=2))
    assert not torch.equal(drawn(seed=5), drawn(seed=6))


def test_the_command_takes_config_fields_by_name(tmp_path, vision_folder, text_folder):
    parts = ("--vision", vision_folder, "--text", text_folder, "--dtype", "bfloat16")
    sizes = ("--pooled-grid-size", "2", "--projector-hidden-size", "37", "--gate-init", "0.5")
    layers = ("--cross-attention-layers", "[1,3]", "--use-t2v", "false", "--v2v-scope=frame")
    printed = run("compose", *parts, *sizes, *layers, "--out", tmp_path / "out")
    model = CrossLMMForConditionalGeneration.from_pretrained(tmp_path / "out")
    config = model.config
    assert (config.pooled_grid_size, config.projector_hidden_size, config.v2v_scope) == (2, 37, "frame")
    assert config.cross_attention_layer_indices == [1, 3]
    block = model.model.language_model.layers[3].cross_attention
    assert block.t2v is None
    assert block.v2v.q_proj.weight.dtype == torch.bfloat16
    in_file = {name: tensor.dtype for name, tensor in stored_tensors(tmp_path / "out").items()}
    assert {name for name, dtype in in_file.items() if dtype != torch.bfloat16} == {
        f"model.language_model.layers.{layer}.cross_attention.v2v.gate.weight" for layer in (1, 3)
    }
    assert block.v2v.gate.weight.dtype == torch.float32
    assert block.v2v.gate.weight.item() == 0.5
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert f"{report['tensors_initialised']} initialised" in printed
    assert all(name in printed for name in report["left_out"])
    assert "entropy of the attention at layer 3" in printed
    assert {"text_model.head.weight", "logit_scale"} < set(report["left_out"])


def test_a_preset_brings_its_own_fields_and_says_where_the_backbones_differ(vision_folder, text_folder):
    conversion = compose(vision_folder, text_folder, preset="7B-16", flavour="recommended", long_context=True)
    config = conversion.config
    assert (config.pooled_grid_size, config.visual_time, config.visual_norm) == (4, "sinusoidal", "layernorm")
    assert config.max_sequence_length == 131_072
    assert "preset 7B-16 has text_config.hidden_size 3584, this backbone 48" in conversion.notes


def test_tied_embeddings_stay_tied(tmp_path, vision_folder):
    shake(Qwen2ForCausalLM(Qwen2Config(**{**TEXT, "tie_word_embeddings": True}))).save_pretrained(tmp_path / "text")
    conversion = compose(vision_folder, tmp_path / "text")
    assert "lm_head.weight" not in conversion.tensors
    report = write_checkpoint(conversion, tmp_path / "out")
    assert any("--tokenizer" in note for note in report["notes"])  # this backbone came without one
    model, info = CrossLMMForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_marks_that_a_tokenizer_lacks_get_free_rows_of_the_embeddings(tmp_path, vision_folder, text_folder):
    vocabulary = {token: token_id for token, token_id in tiny_tokenizer().get_vocab().items() if token_id < 259}
    old = Qwen2Tokenizer(vocab=vocabulary, merges=[("<", "|"), ("|", ">"), ("i", "m")], eos_token="<|im_end|>")
    old.save_pretrained(tmp_path / "tokenizer")
    conversion = compose(vision_folder, text_folder, tokenizer=tmp_path / "tokenizer")
    ids = {conversion.config.image_token_id, conversion.config.video_token_id}
    assert len(ids) == 2
    assert max(ids) < TEXT["vocab_size"]
    write_checkpoint(conversion, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert {processor.image_token_id, processor.video_token_id} == ids


def test_mistakes_are_told_before_anything_is_written(tmp_path, vision_folder, text_folder):
    with pytest.raises(StrictDataclassError, match="`pooled_grid_size` must lie between 1 and"):
        compose(vision_folder, text_folder, pooled_grid_size=6)
    with pytest.raises(ValueError, match=r"Config fields that can be set are .*; got 'pooled'"):
        compose(vision_folder, text_folder, pooled=3)
    changed = json.loads((text_folder / "config.json").read_text()) | {"vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    (tmp_path / "model.safetensors").symlink_to(text_folder / "model.safetensors")
    with pytest.raises(ConversionError, match=r"contradict the config:\n.*embed_tokens\.weight: \(271, 48\), not"):
        compose(vision_folder, tmp_path)
    with pytest.raises(FileNotFoundError, match="neither"):
        compose("no/such-folder-or-name", text_folder)
    with pytest.raises(ValueError, match="Name both, or a preset"):
        compose(vision_folder)


# Writing


def test_nothing_is_overwritten_without_force_and_only_checkpoints_with_it(tmp_path, vision_folder, text_folder):
    arguments = ["compose", "--vision", str(vision_folder), "--text", str(text_folder), "--out", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("dear")
    for force, message in (([], "exists and is not overwritten"), (["--force"], "has no config.json")):
        result = CliRunner().invoke(crosslmm_cli.app, arguments + force)
        assert result.exit_code == 1
        assert message in result.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "diary.txt"]

    (tmp_path / "out" / "config.json").write_text("{}")
    run(*arguments, "--force")
    assert CrossLMMConfig.from_pretrained(tmp_path / "out").untrained
    assert not (tmp_path / "out" / "diary.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def fill_in_shards(folder, conversion, save):
    """Writes three shards of which `save` stops the second."""
    calls = []

    def stopping(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            save()
        save_file(tensors, path)

    checkpoint_folder.save_tensors = stopping
    write_checkpoint(conversion, folder, shard_bytes=conversion.num_bytes // 3 + 1)


def test_a_failure_half_way_leaves_nothing(tmp_path, vision_folder, text_folder, monkeypatch):
    monkeypatch.setattr(checkpoint_folder, "save_tensors", checkpoint_folder.save_tensors)

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_in_shards(tmp_path / "out", compose(vision_folder, text_folder), interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_nothing_that_loads(tmp_path, vision_folder, text_folder):
    conversion = compose(vision_folder, text_folder)
    child = os.fork()
    if child == 0:
        fill_in_shards(tmp_path / "out", conversion, lambda: os.kill(os.getpid(), signal.SIGKILL))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (remains,) = tmp_path.iterdir()
    assert list(remains.glob("*.safetensors")), "it was killed while writing"
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        CrossLMMForConditionalGeneration.from_pretrained(remains)


def test_a_full_disk_is_told_before_writing_and_while_writing(tmp_path, composed_folder, monkeypatch):
    tensors = stored_tensors(composed_folder)
    with (
        pytest.raises(OSError, match=r"1000000.0 GB will be written, .* are free. Make room"),
        new_folder(tmp_path / "out", force=False, num_bytes=10**15),
    ):
        pytest.fail("nothing may be written")

    def full(*args, **kwargs):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint_folder, "save_file", full)
    with pytest.raises(OSError, match=r"No space left.*Is the disk full"):
        write_weights(tmp_path, tensors)
    assert list(tmp_path.iterdir()) == []


def test_shards_hold_every_tensor_once_and_no_more_than_they_may(tmp_path, composed_folder):
    tensors = stored_tensors(composed_folder)
    largest = max(tensor.num_bytes for tensor in tensors.values())
    shards = split_into_shards(tensors, largest)
    assert [name for shard in shards for name in shard] == list(tensors)
    assert len(shards) > 3
    assert max(sum(tensors[name].num_bytes for name in shard) for shard in shards) <= largest
    write_weights(tmp_path, tensors, largest)
    for name, tensor in stored_tensors(tmp_path).items():
        assert torch.equal(tensor.read(), tensors[name].read()), name


def test_a_cut_off_or_incomplete_checkpoint_is_told(tmp_path, llava_next_folder):
    second = llava_next_folder / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-8])
    with pytest.raises(ValueError, match="must be a complete safetensors file"):
        stored_tensors(llava_next_folder)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors, which .* lacks"):
        stored_tensors(llava_next_folder)
    with pytest.raises(FileNotFoundError, match="has neither"):
        stored_tensors(tmp_path)


# From LLaVA


def test_a_converted_llava_onevision_gives_its_logits_on_its_own_pooled_tokens(tmp_path, llava_folder):
    conversion = convert_llava(llava_folder)
    assert conversion.config.pooled_grid_size == 3  # half of 5, rounded up, as LLaVA does
    write_checkpoint(conversion, tmp_path / "out")
    ours = CrossLMMForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    theirs = LlavaOnevisionForConditionalGeneration.from_pretrained(llava_folder).eval()
    frames = torch.randn(2, 3, 33, 33)
    with torch.no_grad():
        encoded = theirs.get_video_features(frames[None])
        tokens = encoded.pooler_output[0, :-1]  # the last one is its newline
        assert tokens.shape == (2 * 9, 48)
        patches = ours.model.get_video_features(frames).last_hidden_state
        torch.testing.assert_close(patches, encoded.hidden_states[-1])
        embed = theirs.get_input_embeddings()
        before, after = torch.arange(6), torch.arange(30, 41)
        expected = theirs(inputs_embeds=torch.cat([embed(before), tokens, embed(after)])[None]).logits
        logits = ours(
            input_ids=torch.cat([before, torch.full((18,), ours.config.video_token_id), after])[None],
            mm_encoder_outputs={
                "video": BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=(tokens,))
            },
            use_cache=False,
        ).logits
    assert (logits - expected).abs().max() < 1e-4
    # And unpooled, its projector is ours.
    ours.config.pooled_grid_size = 5
    with torch.no_grad():
        every_patch = ours.model.get_video_features(frames).pooler_output[0]
        expected_patches = theirs.model.multi_modal_projector(encoded.hidden_states[-1]).flatten(0, 1)
    torch.testing.assert_close(every_patch, expected_patches, atol=1e-4, rtol=1e-4)


def test_a_converted_llava_writes_no_marks_around_media_because_llava_never_saw_any(tmp_path, llava_folder):
    write_checkpoint(convert_llava(llava_folder), tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == "<|im_start|>user\n<|video_pad|>\nWhat?<|im_end|>\n<|im_start|>assistant\n"


def test_both_llava_formats_give_the_same_checkpoint(tmp_path, llava_folder, llava_next_folder):
    SiglipVisionConfig(**{**VISION, "num_hidden_layers": 4}).save_pretrained(tmp_path / "encoder")
    from_transformers = convert_llava(llava_folder)
    from_llava_next = convert_llava(llava_next_folder, vision=tmp_path / "encoder")
    assert from_llava_next.config.vision_feature_layer == -2  # of four blocks: the same three
    assert list(from_llava_next.tensors) == list(from_transformers.tensors)
    for name, tensor in from_transformers.tensors.items():
        assert torch.equal(tensor.read(), from_llava_next.tensors[name].read()), name
    assert "model.image_newline" in from_llava_next.left_out
    assert "image_newline" in from_transformers.left_out


@pytest.mark.parametrize(("mode", "grid"), [("bilinear", 3), ("average", 2)])
def test_pool_mode_and_select_layer_are_carried_over(tmp_path, llava_folder, mode, grid):
    changed = LLAVA_NEXT_CONFIG | {"mm_spatial_pool_mode": mode, "mm_vision_select_layer": -3}
    write_llava_next(tmp_path / "next", llava_folder, changed)
    SiglipVisionConfig(**{**VISION, "num_hidden_layers": 5}).save_pretrained(tmp_path / "encoder")
    config = convert_llava(tmp_path / "next", vision=tmp_path / "encoder").config
    assert (config.pooling_mode, config.pooled_grid_size, config.vision_feature_layer) == (mode, grid, -3)
    assert config.num_vision_blocks == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_spatial_pool_mode": "max"}, "must be one of 'bilinear', 'average'.*'max'.*--pooling-mode"),
        ({"mm_projector_type": "linear"}, "`mm_projector_type` must be 'mlp2x_gelu'"),
        ({"mm_vision_tower": "openai/clip-vit-large"}, "`mm_vision_tower` must be one of .*, whose sizes are known"),
        ({"mm_vision_tower": "google/siglip-so400m-patch14-384"}, "the checkpoint does not:"),
    ],
    ids=["max pooling", "linear projector", "unknown encoder", "another encoder"],
)
def test_a_llava_that_does_not_fit_is_refused(tmp_path, llava_folder, change, message):
    write_llava_next(tmp_path / "next", llava_folder, LLAVA_NEXT_CONFIG | change)
    SiglipVisionConfig(**{**VISION, "num_hidden_layers": 4}).save_pretrained(tmp_path / "encoder")
    vision = None if "mm_vision_tower" in change else tmp_path / "encoder"
    with pytest.raises(ConversionError, match=message):
        convert_llava(tmp_path / "next", vision=vision)


def test_bin_files_are_read_and_never_run(tmp_path, llava_folder, llava_next_folder):
    SiglipVisionConfig(**{**VISION, "num_hidden_layers": 4}).save_pretrained(tmp_path / "encoder")
    expected = convert_llava(llava_next_folder, vision=tmp_path / "encoder").tensors
    expected = {name: tensor.read() for name, tensor in expected.items()}
    tensors = weights(llava_next_folder)
    for path in [*llava_next_folder.glob("*.safetensors"), llava_next_folder / "model.safetensors.index.json"]:
        path.unlink()
    for zipped in (True, False):
        torch.save(tensors, llava_next_folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        converted = convert_llava(llava_next_folder, vision=tmp_path / "encoder").tensors
        for name, tensor in expected.items():
            assert torch.equal(converted[name].read(), tensor), name

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save({"model.norm.weight": Attack()}, llava_next_folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must be complete and have tensors only"):
        convert_llava(llava_next_folder, vision=tmp_path / "encoder")
    assert not (tmp_path / "attacked").exists()


def absent(shape, dtype=torch.bfloat16):
    return StoredTensor(tuple(shape), dtype, partial(pytest.fail, "no weight may be read"))


QWEN2_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
LLAVA_SIZES = {
    "0.5B": {
        "vocab_size": 152_000,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "7B": {**QWEN2_7B, "vocab_size": 152_128, "num_key_value_heads": 4, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("size", LLAVA_SIZES)
def test_every_name_and_shape_of_a_full_size_llava_onevision_fits(tmp_path, size):
    """In three forms: Transformers' class, what the Hub holds of it, and LLaVA-NeXT's; without a single weight."""
    text = LLAVA_SIZES[size]
    theirs = LlavaOnevisionConfig(
        text_config={**text, "model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    theirs.save_pretrained(tmp_path)
    with torch.device("meta"):
        in_class = {
            name: absent(tensor.shape)
            for name, tensor in LlavaOnevisionForConditionalGeneration(theirs).state_dict().items()
            if not (name == "lm_head.weight" and text["tie_word_embeddings"])
        }
    config = llava_onevision_config(tmp_path, {})
    assert config.pooled_grid_size == 14
    assert config.num_vision_blocks == 26

    def legacy(name):
        if name == "lm_head.weight":
            return "language_model.lm_head.weight"
        name = name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.", 1)
        return name.replace("language_model.", "language_model.model.", 1)

    def llava_next(name):
        name = legacy(name).removeprefix("language_model.")
        if name.startswith("vision_tower."):
            return "model.vision_tower." + name
        if name.startswith("multi_modal_projector."):
            number = {"linear_1": 0, "linear_2": 2}[name.split(".")[1]]
            return f"model.mm_projector.{number}.{name.split('.')[2]}"
        return "model.image_newline" if name == "image_newline" else name

    raw = {**text, **LLAVA_NEXT_CONFIG, "mm_vision_tower": "google/siglip-so400m-patch14-384", "rope_theta": 1e6}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    next_config = llava_next_config(tmp_path, {}, vision=None, in_weights={})
    assert next_config.text_config.rope_parameters["rope_theta"] == 1e6
    assert (next_config.vision_feature_layer, next_config.vision_config.num_hidden_layers) == (-2, 27)

    for table, own_config, names in (
        (LLAVA_ONEVISION, config, {name: name for name in in_class}),
        (LLAVA_ONEVISION, config, {legacy(name): name for name in in_class}),
        (LLAVA_NEXT, next_config, {llava_next(name): name for name in in_class}),
    ):
        stored = {name: in_class[origin] for name, origin in names.items()}
        ours, left_out = renamed_tensors(stored, table, own_config)
        assert sorted(name.rsplit(".", 1)[-1] for name in left_out if "layernorm" not in name) == ["image_newline"]
        tensors = ours | initial_tensors(own_config, ours, dtype=torch.bfloat16, seed=0)
        check_complete(tensors, own_config)
        cross = [name for name in tensors if ".cross_attention." in name]
        assert len(cross) == (text["num_hidden_layers"] // 4) * 11
        assert set(tensors) - set(ours) == set(cross)


@pytest.mark.parametrize("preset", ["2B", "7B", "7B-16"])
def test_writing_a_paper_size_holds_no_more_than_a_shard(preset):
    config = CrossLMMConfig.from_preset(preset)
    tensors = {name: absent(shape) for name, shape in expected_shapes(config).items()}
    conversion = Conversion(config=config, tensors=tensors, sources={})
    assert conversion.num_bytes > {"2B": 4.0e9, "7B": 16.2e9, "7B-16": 17.4e9}[preset]
    assert conversion.peak_bytes() <= SHARD_BYTES < conversion.num_bytes / 2


# From and to the authors' form

THEIR_NAMES = {
    "model.xattn.*.shared_norm.weight": "model.language_model.layers.*.cross_attention.input_layernorm.weight",
    "model.xattn.*.visual.*.gamma": "model.language_model.layers.*.cross_attention.*.gate.weight",
    "model.xattn.*.visual.*.to_*.weight": "model.language_model.layers.*.cross_attention.*.*_proj.weight",
    "model.momentum": None,
}


@pytest.fixture
def their_checkpoint(tmp_path):
    """A trained CrossLMM as its authors might have saved it: LLaVA-NeXT's layout, new blocks under names of theirs."""
    config = tiny_config(
        text_config={"cross_attention_interval": None, "cross_attention_layers": [1, 3], "vocab_size": 271},
        projector_hidden_size=31,
    )
    model = random_model(config)
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.clone() if "gate.weight" in name else tensor.bfloat16()
        if name.startswith("model.vision_tower."):
            name = name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
        elif name.startswith("model.multi_modal_projector."):
            number = {"linear_1": "0", "linear_2": "2"}[name.split(".")[2]]
            name = f"model.mm_projector.{number}.{name.split('.')[3]}"
        elif ".cross_attention." in name:
            layer, part = name.split(".")[3], name.split(".cross_attention.")[1]
            if part.startswith("input_layernorm"):
                name = f"model.xattn.{layer}.shared_norm.weight"
            elif part.endswith("gate.weight"):
                name = f"model.xattn.{layer}.visual.{part[:3]}.gamma"
            else:
                name = f"model.xattn.{layer}.visual.{part[:3]}.to_{part[4]}.weight"
        else:
            name = name.replace("model.language_model.", "model.")
        tensors[name] = tensor
    tensors["model.image_newline"] = torch.randn(48)
    tensors["model.momentum"] = torch.randn(3)
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    text = config.text_config.to_dict()
    raw = {name: text[name] for name in TEXT} | LLAVA_NEXT_CONFIG | {"mm_vision_tower": "", "pooled_grid_size": 3}
    raw["vision_config"] = {name: getattr(config.vision_config, name) for name in VISION}
    (folder / "config.json").write_text(json.dumps(raw))
    tiny_tokenizer().save_pretrained(folder)
    (tmp_path / "names.json").write_text(json.dumps(THEIR_NAMES))
    return folder, tmp_path / "names.json", model


def test_a_foreign_crosslmm_converts_and_goes_back_bit_for_bit(tmp_path, their_checkpoint):
    folder, names, trained = their_checkpoint
    run("convert", folder, "--name-table", names, "--out", tmp_path / "ours")
    model, info = CrossLMMForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.cross_attention_layers == [1, 3]
    assert model.config.projector_hidden_size == 31
    assert not model.config.untrained
    for name, tensor in trained.state_dict().items():
        kept = tensor if "gate.weight" in name else tensor.bfloat16()
        assert torch.equal(model.state_dict()[name], kept), name

    run("convert", tmp_path / "ours", "--reverse", "--name-table", names, "--out", tmp_path / "back")
    theirs, back = weights(folder), weights(tmp_path / "back")
    assert theirs.keys() == back.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == back[name].dtype, name
        assert torch.equal(tensor, back[name]), name
    printed = run("convert", tmp_path / "back", "--name-table", names, "--out", tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "ours" / "config.json").read_text()
    assert "model.momentum" in printed


def test_convert_begins_from_a_llava_and_says_that_it_is_untrained(tmp_path, llava_folder):
    run("convert", llava_folder, "--pooled-grid-size", "2", "--dtype", "bfloat16", "--out", tmp_path / "ours")
    config = CrossLMMConfig.from_pretrained(tmp_path / "ours")
    assert (config.untrained, config.pooled_grid_size, config.dtype) == (True, 2, torch.bfloat16)
    report = convert_llava(llava_folder, pooled_grid_size=2, dtype="float16").report()
    assert any("65,504" in note for note in report["notes"])


def test_convert_never_takes_a_trained_crosslmm_for_a_llava(tmp_path, their_checkpoint):
    folder, names, _ = their_checkpoint
    out = tmp_path / "ours"
    nameless = CliRunner().invoke(crosslmm_cli.app, ["convert", str(folder), "--out", str(out)])
    assert nameless.exit_code == 1
    listed = nameless.stderr.splitlines()  # its blocks have names that no table knows
    assert sum(line.startswith("  ") and "xattn" in line for line in listed) == 2 * (1 + 2 * 5)
    other_type = ["convert", str(folder), "--name-table", str(names), "--dtype", "float16", "--out", str(out)]
    refused = CliRunner().invoke(crosslmm_cli.app, other_type)
    assert refused.exit_code == 1
    assert "a trained CrossLMM keeps its own" in refused.stderr
    assert not out.exists()

    run("convert", folder, "--name-table", names, "--out", out)
    (out / UNUSED_WEIGHTS).unlink()
    run("convert", out, "--reverse", "--out", tmp_path / "our_names")
    run("convert", tmp_path / "our_names", "--out", tmp_path / "again")  # without a table: the weights tell
    again = weights(tmp_path / "again")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights(out).items())
    assert not CrossLMMConfig.from_pretrained(tmp_path / "again").untrained


WRONG_USAGE = {
    "compose --out new --pooled 3": "No such option: --pooled. Config fields are --cross-attention-cache,",
    "compose --out new --gate-init": "--gate-init needs a value",
    "compose --out new more": "No such option: more.",
    "compose --out new --preset 3B": "'3B' is not one of '2B', '7B', '7B-16'",
    "convert old --out new --reverse --gate-init 1": "--reverse changes nothing but the layout",
    "convert old": "Missing option '--out'",
}


@pytest.mark.parametrize(("words", "message"), WRONG_USAGE.items(), ids=WRONG_USAGE)
def test_wrong_words_are_wrong_usage(words, message):
    result = CliRunner(env={"COLUMNS": "1000"}).invoke(crosslmm_cli.app, words.split())
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("script", sorted(CONVERSION.glob("*.py")), ids=lambda script: script.stem)
def test_a_script_is_the_command(script, monkeypatch, capsys):
    command = "compose" if "compose" in script.stem else "convert"
    monkeypatch.setattr("sys.argv", [str(script), "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    assert f"Usage: crosslmm {command} " in capsys.readouterr().out


def test_names_without_a_match_are_all_listed(tmp_path, their_checkpoint):
    folder, _, _ = their_checkpoint
    with pytest.raises(ConversionError) as unknown:
        convert_crosslmm_weights(folder)
    # The catch-all row takes them for parts of the language model, which then lacks a place for them.
    theirs = [name for name in stored_tensors(folder) if "xattn" in name or "momentum" in name]
    assert theirs
    for name in theirs:
        assert name.replace("model.", "model.language_model.", 1) in str(unknown.value)
    with pytest.raises(ConversionError) as missing:
        convert_crosslmm_weights(folder, name_table=THEIR_NAMES, cross_attention_layers=[1, 3, 4])
    assert "model.language_model.layers.4.cross_attention.t2v.q_proj.weight" in str(missing.value)
    save_file(load_file(folder / "model.safetensors") | {"ema.beta": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ConversionError, match=r"The name table has no row for.*\n  ema.beta\n.*--name-table"):
        convert_crosslmm_weights(folder, name_table=THEIR_NAMES)


def test_ours_goes_to_llava_next_and_comes_back_the_same(tmp_path, composed_folder):
    crosslmm_to_llava_next(composed_folder, tmp_path / "next")
    write_checkpoint(convert_crosslmm_weights(tmp_path / "next"), tmp_path / "back")
    ours, back = weights(composed_folder), weights(tmp_path / "back")
    assert ours.keys() == back.keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in ours.items())
    assert (composed_folder / "config.json").read_text() == (tmp_path / "back" / "config.json").read_text()


def test_a_name_table_with_uneven_rows_is_refused(tmp_path):
    (tmp_path / "names.json").write_text('{"a.*.b.*": "model.*"}')
    with pytest.raises(ValueError, match=r"equally many `\*`.*'a\.\*\.b\.\*'"):
        read_name_table(tmp_path / "names.json")


def test_two_tensors_of_one_name_and_an_untied_head_are_refused(tmp_path, vision_folder, text_folder):
    config = compose(vision_folder, text_folder).config
    one = absent((3,))
    with pytest.raises(ConversionError, match=r"Two tensors become model\.language_model\.norm\.weight"):
        renamed_tensors({"model.norm.weight": one, "norm.weight": one}, TEXT_TABLE, config)
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = True
    values = iter([torch.zeros(2), torch.ones(2)])
    differing = {
        name: StoredTensor((2,), torch.float32, partial(next, values))
        for name in ("lm_head.weight", "model.embed_tokens.weight")
    }
    with pytest.raises(ConversionError, match=r"ties lm_head\.weight to the embeddings, but they differ"):
        renamed_tensors(differing, TEXT_TABLE, config)


@pytest.mark.parametrize("preset", ["2B", "7B"])
def test_the_llava_next_table_read_backwards_is_its_inverse(preset):
    names = list(expected_shapes(CrossLMMConfig.from_preset(preset)))
    back = [rename(name, reversed_table(LLAVA_NEXT)) for name in names]
    assert len(set(back)) == len(names)
    assert [rename(name, LLAVA_NEXT) for name in back] == names


def test_transformers_loads_a_foreign_folder_through_a_key_mapping(tmp_path, llava_folder, llava_next_folder):
    SiglipVisionConfig(**{**VISION, "num_hidden_layers": 4}).save_pretrained(tmp_path / "encoder")
    conversion = convert_llava(llava_next_folder, vision=tmp_path / "encoder")
    model, info = CrossLMMForConditionalGeneration.from_pretrained(
        llava_next_folder,
        config=conversion.config,
        key_mapping=transformers_key_mapping(llava_next_folder, LLAVA_NEXT),
        output_loading_info=True,
    )
    assert info["missing_keys"] == set(conversion.initialised)
    for name, tensor in conversion.tensors.items():
        if name not in conversion.initialised:
            assert torch.equal(model.state_dict()[name], tensor.read()), name


# The entropy of the attention


def test_the_reported_entropy_is_that_of_the_models_attention(tmp_path):
    model = random_model(tiny_config(text_config={"vocab_size": 271}))
    block = model.model.language_model.layers[2].cross_attention
    with torch.no_grad():
        block.t2v.k_proj.weight.zero_()  # all keys alike: attention is uniform
    model.save_pretrained(tmp_path)
    config = CrossLMMConfig.from_pretrained(tmp_path)
    entropies = first_run(config, stored_tensors(tmp_path), None)["attention_entropy"]
    assert set(entropies) == {"0", "2", "4"}
    assert entropies["2"]["t2v"] == 1.0

    # The first layer by hand, on the same frame and text.
    shades = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    frame = F.interpolate(shades, (33, 33), mode="bicubic").clamp(-1, 1)
    layer = model.model.language_model.layers[0]
    with torch.no_grad():
        media = model.model.get_video_features(frame)
        embeddings = model.get_input_embeddings()(271 // 2 + torch.arange(8))
        hidden = torch.cat([media.pooler_output[0], embeddings])[None]
        positions = torch.arange(hidden.shape[1])[None]
        rotary = model.model.language_model.rotary_emb(hidden, positions)
        mask = torch.full((1, 1, 17, 17), float("-inf")).triu(1)
        attended, _ = layer.self_attn(
            layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=mask, past_key_values=None
        )
        normed = layer.cross_attention.input_layernorm(hidden + attended)[0]
        for name, rows in (("v2v", normed[:9]), ("t2v", normed[9:])):
            branch = getattr(layer.cross_attention, name)
            query, key = (
                branch.q_proj(rows).view(-1, 2, 3, 8),
                branch.k_proj(media.last_hidden_state[0]).view(-1, 2, 8),
            )
            weights_of = (torch.einsum("qghe,pge->ghqp", query, key) / 8**0.5).softmax(-1)
            entropy = -(weights_of * weights_of.log()).sum(-1).mean() / torch.tensor(25.0).log()
            assert 0.2 < entropy < 0.98
            assert entropies["0"][name] == pytest.approx(entropy.item(), abs=2e-4)
