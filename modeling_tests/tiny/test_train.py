"""The tiny run's parts: its tokenizer, its samples and its labels, each against what a user's call gives."""

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from transformers_crosslmm import TINY_CHECKPOINT, CrossLMMForConditionalGeneration, CrossLMMProcessor
from transformers_crosslmm.processing_crosslmm import CHAT_TEMPLATE
from transformers_crosslmm.tiny.procedural_videos import (
    COLOURS,
    NAMES,
    PLACES,
    TIMED_KINDS,
    Question,
    random_generator,
    random_moments,
    random_timed_video,
    random_video,
    render_frame,
)
from transformers_crosslmm.tiny.train import (
    CLIP_KINDS,
    STILL_KINDS,
    TIMED_LEVELS,
    Curriculum,
    PatchLabelFrames,
    TinyArguments,
    VideoChats,
    build_tokenizer,
    degrade,
    load_frames,
    make_ready_for_times,
    repaint,
    tiny_config,
)
from transformers_crosslmm.training.samples import IGNORED, CrossLMMDataCollator, chat_sample


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def chats(tokenizer):
    arguments = TinyArguments(output_dir="", steps=10, batch_size=2, questions_per_video=3)
    return VideoChats(arguments=arguments, tokenizer=tokenizer, config=tiny_config(tokenizer))


def test_every_answer_is_one_token(tokenizer):
    for word in [*COLOURS, *NAMES, *PLACES, "yes", "no", *map(str, range(1, 9))]:
        assert len(tokenizer.tokenize(word)) == 1, word
        assert len(tokenizer.tokenize(f" {word}")) == 1, word


@pytest.mark.parametrize("text", ["Über 2 Äpfel?", "naïve\n\n\tcafé", "視頻", "<|im_start|x", "top-left-ish 123"])
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("add_timestamps", [False, True], ids=["no times", "times"])
def test_a_training_sample_is_what_the_processor_makes_of_the_same_chat(chats, tokenizer, add_timestamps):
    video = random_video(random_generator(seed=1, split="train", index=0), num_seconds=5)
    size = chats.config.vision_config.image_size
    # At 0.4 frames per second: the last number has a digit more.
    frames = np.stack([render_frame(video, k + 0.5, size=size) for k in range(5)])
    moments = [2.5 * k for k in range(5)]
    questions = [
        Question("colour", "What colour is the seven in frame 2?", "red", ()),
        Question("order", "Which comes first, the red star or the blue two?", "blue two", ()),
    ]
    sample = chats.sample(questions, frames, moments if add_timestamps else None)
    processor = CrossLMMProcessor.from_config(chats.config, tokenizer, add_timestamps=add_timestamps)
    batch = CrossLMMDataCollator(processor)([sample])
    chat = [
        {"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": questions[0].text}]},
        {"role": "assistant", "content": [{"type": "text", "text": questions[0].answer}]},
        {"role": "user", "content": [{"type": "text", "text": questions[1].text}]},
        {"role": "assistant", "content": [{"type": "text", "text": questions[1].answer}]},
    ]
    inputs = processor.apply_chat_template(
        chat,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"do_sample_frames": False, "fps": 0.4, "return_tensors": "pt"},
    )
    assert torch.equal(batch["input_ids"], inputs["input_ids"])
    assert torch.equal(batch["video_num_frames"], inputs["video_num_frames"])
    torch.testing.assert_close(batch["pixel_values_videos"], inputs["pixel_values_videos"])


def test_only_the_answers_and_their_end_are_learned(chats, tokenizer):
    questions = [
        Question("shape", "Name the red thing in frame 1.", "star", ()),
        Question("exists", "A star?", "yes", ()),
    ]
    sample = chats.sample(questions, np.zeros((1, 60, 60, 3), np.uint8))
    learned = [token for token in sample["labels"] if token != IGNORED]
    assert tokenizer.convert_ids_to_tokens(learned) == ["star", "<|im_end|>", "yes", "<|im_end|>"]
    for token, label in zip(sample["input_ids"], sample["labels"], strict=True):
        assert label in (IGNORED, token)


def test_a_placeholder_is_repeated_for_every_token_of_its_medium(tokenizer):
    placeholder = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "and"}, {"type": "video"}]}]
    sample = chat_sample(tokenizer, chat, chat_template=CHAT_TEMPLATE, placeholder_id=placeholder, placeholders=[3, 5])
    marks = "".join("v" if token == placeholder else "." for token in sample["input_ids"])
    assert [len(run) for run in marks.strip(".").split(".") if run] == [3, 5]


def test_a_batch_pads_text_and_joins_videos(chats, tokenizer):
    frames = [np.full((2, 7, 7, 3), 255, np.uint8), np.zeros((3, 7, 7, 3), np.uint8)]
    asked = [Question("exists", "A star?", "yes", ())]
    samples = [
        chats.sample(asked, frames[0]) | {"input_ids": [4, 5, 6], "labels": [IGNORED, 5, 6]},
        chats.sample(asked, frames[1]) | {"input_ids": [9], "labels": [9]},
    ]
    batch = CrossLMMDataCollator(CrossLMMProcessor.from_config(chats.config, tokenizer))(samples)
    padding = tokenizer.pad_token_id
    assert batch["input_ids"].tolist() == [[4, 5, 6], [9, padding, padding]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 5, 6], [9, IGNORED, IGNORED]]
    assert batch["video_num_frames"].tolist() == [2, 3]
    assert batch["pixel_values_videos"].shape == (5, 3, 7, 7)
    assert batch["pixel_values_videos"][:2].eq(1).all()
    assert batch["pixel_values_videos"][2:].eq(-1).all()


def test_the_same_seed_gives_the_same_samples(chats):
    first, again = iter(chats), iter(chats)
    for _ in range(3):
        one, other = next(first), next(again)
        assert one["input_ids"] == other["input_ids"]
        assert torch.equal(one["pixel_values_videos"], other["pixel_values_videos"])


def scenes_with_things(video) -> int:
    return sum(map(bool, video.scenes))


def test_clips_show_more_from_level_to_level(chats):
    rng = np.random.default_rng(0)
    chats.level = 2
    clips = [chats.clip(rng) for _ in range(100)]
    # Things in three scenes at most, or a last stay of four that begins in the second.
    assert max(map(scenes_with_things, clips)) <= 6
    chats.level = 12
    clips = [chats.clip(rng) for _ in range(100)]
    assert {clip.num_seconds for clip in clips} >= {2, 5, 8}
    assert max(map(scenes_with_things, clips)) == 8
    assert Counter(clip.num_seconds for clip in clips)[8] > 60


def test_the_first_level_shows_stills_alone_and_of_two_things(chats):
    rng = np.random.default_rng(3)
    videos = [chats.video(rng) for _ in range(40)]
    assert {tuple(map(len, video.scenes)) for video in videos} == {(2,)}
    chats.level = 2
    lengths = Counter(chats.video(rng).num_seconds == 1 for _ in range(300))
    assert 70 < lengths[True] < 130  # a third of 300, give or take 3.7 standard deviations


def test_questions_about_time_come_one_level_after_the_other(chats):
    video = random_video(np.random.default_rng(2))
    kinds = []
    for chats.level in range(1, 6):
        kinds.append(set(chats.kinds_of(video)))
    assert [sorted(after - before) for before, after in pairwise(kinds)] == [
        ["which_frame"], ["count"], ["order"], []
    ]  # fmt: skip
    assert kinds[-1] == set(CLIP_KINDS)


def test_stills_hold_several_things_and_are_not_asked_about_time(chats):
    rng = np.random.default_rng(1)
    chats.level = 9
    stills = [chats.still(rng) for _ in range(60)]
    assert {len(still.scenes) for still in stills} == {1}
    assert {len(still.scenes[0]) for still in stills} == {2, 3, 4}
    assert {question.kind for still in stills for question in chats.questions(rng, still)} == {
        "colour", "shape", "place", "exists"
    }  # fmt: skip


class Parrot(torch.nn.Module):
    """Says what it was told to: the labels, or nothing but the first token."""

    def __init__(self, vocab_size: int, *, is_right: bool):
        super().__init__()
        self.vocab_size, self.is_right = vocab_size, is_right

    def forward(self, input_ids, **inputs):
        said = input_ids.roll(-1, dims=1) if self.is_right else torch.zeros_like(input_ids)
        return SimpleNamespace(logits=torch.nn.functional.one_hot(said, self.vocab_size).float())


def steps_at_each_level(chats, tokenizer, *, is_right: bool, steps: int, of: int = 150) -> Counter:
    collator = CrossLMMDataCollator(CrossLMMProcessor.from_config(chats.config, tokenizer))
    curriculum = Curriculum(chats, collator, steps=of, every=5, num_videos=12)
    model = Parrot(len(tokenizer), is_right=is_right)
    levels = Counter()
    for step in range(1, steps + 1):
        levels[chats.time_level if chats.with_times else chats.level] += 1
        curriculum.on_step_end(None, SimpleNamespace(global_step=step), None, model=model)
    return levels


def test_the_level_goes_up_when_the_answers_are_right(chats, tokenizer):
    assert steps_at_each_level(chats, tokenizer, is_right=True, steps=20) == {1: 5, 2: 5, 3: 5, 4: 5}


def test_the_level_goes_up_after_a_fifteenth_of_the_steps_where_they_are_wrong(chats, tokenizer):
    assert steps_at_each_level(chats, tokenizer, is_right=False, steps=30) == {1: 10, 2: 10, 3: 10}


def test_kinds_that_are_mistaken_are_asked_more(chats):
    rng = np.random.default_rng(5)
    videos = [random_video(rng) for _ in range(60)]
    chats.level = 9
    chats.mistakes = dict.fromkeys(CLIP_KINDS, 0.1) | {"place": 0.9}
    kinds = Counter(question.kind for video in videos for question in chats.questions(rng, video))
    assert kinds["place"] == max(kinds.values())
    assert set(kinds) == set(CLIP_KINDS)


def test_no_thing_and_no_kind_comes_up_in_two_questions_of_a_chat(chats):
    rng = np.random.default_rng(6)
    chats.level = 9
    for _ in range(40):
        questions = chats.questions(rng, random_video(rng))
        things = [thing for question in questions for thing in question.things]
        assert things
        assert len(set(things)) == len(things)
        assert len({question.kind for question in questions}) == len(questions)


def test_vision_never_learns_which_colour_goes_with_which_name():
    samples = iter(PatchLabelFrames(seed=0, size=60, grid=5, videos_per_round=3))
    things = 0
    for _ in range(24):
        sample = next(samples)
        thing = sample["names"] != len(NAMES)
        things += thing.sum()
        # Of what covers a patch either the colour is asked or the name.
        assert ((sample["colours"] == IGNORED)[thing] ^ (sample["names"] == IGNORED)[thing]).all()
        assert (sample["colours"][~thing] == len(COLOURS)).all()
    assert things > 100


def test_repainted_things_are_far_from_every_colour_of_the_palette():
    rng = random_generator(seed=2, split="train", index=0)
    plain = random_video(rng)
    painted = repaint(rng, plain, share=1.0)
    for before, after in zip(plain.scenes, painted.scenes, strict=True):
        for a, b in zip(before, after, strict=True):
            assert (a.thing, a.place, a.start, a.end) == (b.thing, b.place, b.start, b.end)
            assert min(sum(abs(x - y) for x, y in zip(b.rgb, rgb, strict=True)) for rgb in COLOURS.values()) > 90


def test_degraded_frames_stay_recognisable():
    rng = np.random.default_rng(4)
    frames = np.stack([np.full((60, 60, 3), level, np.uint8) for level in (60, 128, 190)])
    for _ in range(20):
        changed = degrade(rng, frames)
        assert changed.dtype == np.uint8
        # Contrast within 10 %, brightness and tint within 15 levels, noise within 8.
        assert np.abs(changed.astype(float) - frames).max() <= 0.1 * 68 + 15 + 8 + 1


# --- times ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def timed_chats(tokenizer):
    arguments = TinyArguments(output_dir="", batch_size=8, questions_per_video=4)
    return VideoChats(arguments=arguments, tokenizer=tokenizer, config=tiny_config(tokenizer), with_times=True)


def test_a_time_is_one_token_before_a_frame_and_in_an_answer(tokenizer):
    assert tokenizer.tokenize("<12.3 seconds>") == ["<", "12.3", "Ġseconds>"]
    assert tokenizer.tokenize("0.0 seconds") == ["0.0", "Ġseconds"]
    assert tokenizer.tokenize("in frame 3.") == ["in", "Ġframe", "Ġ3", "."]


def test_when_is_answered_by_the_time_before_the_first_frame_that_shows_the_thing(timed_chats):
    rng = np.random.default_rng(8)
    asked = 0
    while asked < 30:
        video = random_timed_video(rng)
        moments = random_moments(rng, video)
        stamps = [f"{seconds:.1f} seconds" for seconds in moments]
        for question in timed_chats.questions(rng, video, moments):
            if question.kind == "when":
                first = next(
                    k for k, scene in enumerate(video.scenes) if {a.thing for a in scene} & {*question.things}
                )
                assert question.answer == stamps[first]
                asked += 1
    sample = timed_chats.sample([question], np.zeros((len(stamps), 4, 4, 3), np.uint8), moments)
    text = timed_chats.tokenizer.decode(sample["input_ids"])
    assert "".join(f"<{stamp}><|video_pad|>" for stamp in stamps) in text


def test_with_times_the_number_of_frames_grows_when_when_is_answered(timed_chats, tokenizer):
    rng = np.random.default_rng(4)
    scenes = []
    for timed_chats.time_level in range(len(TIMED_LEVELS)):
        scenes.append({v.num_scenes for v in (timed_chats.video(rng) for _ in range(150)) if v.is_timed})
    assert scenes == [{2, 3, 4}, set(range(2, 9)), set(range(8, 17))]
    timed_chats.time_level = 0
    assert steps_at_each_level(timed_chats, tokenizer, is_right=True, steps=20) == {0: 5, 1: 5, 2: 10}
    timed_chats.time_level = 0
    assert steps_at_each_level(timed_chats, tokenizer, is_right=False, steps=35, of=60) == {0: 10, 1: 10, 2: 15}


def test_times_are_asked_for_often_until_they_are_known_and_none_twice_in_a_chat(timed_chats):
    rng = np.random.default_rng(7)
    most = []
    for timed_chats.time_level in range(len(TIMED_LEVELS)):
        chats = [timed_chats.questions(rng, v, random_moments(rng, v)) for v in map(random_timed_video, [rng] * 30)]
        most.append(max(map(len, chats)))
        for questions in chats:
            answers = [q.answer for q in questions if q.kind in ("frame_time", "when", "count")]
            assert len(answers) == len(set(answers))
    assert most == [8, 8, 6]


def test_a_frame_is_asked_for_the_time_before_it(timed_chats, tokenizer):
    question = Question("when", "When does the red star first appear?", "10.3 seconds", ())
    said = [0.2, 10.3, 27.0]
    plain = timed_chats.sample([question], np.zeros((3, 4, 4, 3), np.uint8), said)
    sample = timed_chats.with_copies(plain)
    length = len(plain["input_ids"])
    assert len(sample["input_ids"]) % 16 == len(sample["labels"]) % 16 == 0
    assert sample["input_ids"][:length] == plain["input_ids"]
    assert set(sample["input_ids"][length:]) <= {tokenizer.pad_token_id}
    asked = {
        place: tokenizer.convert_ids_to_tokens(sample["labels"][place + 1])
        for place, token in enumerate(sample["input_ids"])
        if token == timed_chats.config.video_token_id
    }
    assert list(asked.values()) == ["0.2", "10.3", "27.0"]
    differs = [i for i in range(length) if plain["labels"][i] != sample["labels"][i]]
    assert differs == [place + 1 for place in asked]


def test_before_times_pooled_tokens_become_as_long_as_words_and_times_alike(timed_chats, tokenizer):
    torch.manual_seed(0)
    model = CrossLMMForConditionalGeneration(timed_chats.config)
    rows = model.get_input_embeddings().weight
    met = tokenizer.vocab["red"]
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(200)
        rows.add_(30)  # all words but one have become one word
        rows[met] = torch.randn(rows.shape[1])
    kept = rows[met].clone()
    make_ready_for_times(model, timed_chats, tokenizer)
    with torch.no_grad():
        [pooled] = model.get_video_features(next(iter(timed_chats))["pixel_values_videos"]).pooler_output
    lengths = [float(each.detach().norm(dim=-1).mean()) for each in (pooled, rows)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.3)
    assert not [p for p in model.model.multi_modal_projector.parameters() if p.requires_grad]
    assert torch.equal(rows[met], kept)
    assert torch.cosine_similarity(rows[tokenizer.vocab["<"]], rows[tokenizer.vocab["9"]], dim=0) < 0.5
    time = {word: rows[tokenizer.vocab[word]] for word in ("12.3", "12.4", "27.3", "27.4", "5.0")}
    # The step from one tenth to the next is the same everywhere, and no two times are one.
    assert torch.allclose(time["12.4"] - time["12.3"], time["27.4"] - time["27.3"], atol=1e-5)
    assert torch.cosine_similarity(time["12.3"], time["12.4"], dim=0).item() == pytest.approx(2 / 3, abs=1e-4)
    assert torch.cosine_similarity(time["12.3"], time["5.0"], dim=0).item() == pytest.approx(0, abs=1e-4)


def test_the_words_of_a_checkpoint_keep_their_rows_in_another_tokenizer(timed_chats, tokenizer):
    model = load_frames(str(TINY_CHECKPOINT), timed_chats.config, tokenizer)
    saved = CrossLMMForConditionalGeneration.from_pretrained(TINY_CHECKPOINT, dtype=torch.float32)
    old = CrossLMMProcessor.from_pretrained(TINY_CHECKPOINT).tokenizer.vocab
    rows, before = (m.get_input_embeddings().weight for m in (model, saved))
    for word in ("Ġred", "Ġseven", "<|im_end|>", "Ġ7"):
        assert torch.equal(rows[tokenizer.vocab[word]], before[old[word]])
    assert model.lm_head.weight is rows
    assert torch.equal(
        model.model.language_model.layers[3].self_attn.q_proj.weight,
        saved.model.language_model.layers[3].self_attn.q_proj.weight,
    )


def test_with_times_a_half_is_timed_and_the_rest_is_as_before(timed_chats):
    rng = np.random.default_rng(4)
    timed_chats.time_level = len(TIMED_LEVELS) - 1
    videos = [timed_chats.video(rng) for _ in range(300)]
    sorts = Counter("timed" if video.is_timed else "still" if video.num_scenes == 1 else "clip" for video in videos)
    # 150, 30 and 120, give or take four standard deviations.
    assert 115 < sorts["timed"] < 185
    assert 9 < sorts["still"] < 51
    kinds = {video.is_timed: timed_chats.kinds_of(video, with_times=True) for video in videos if video.num_scenes > 1}
    assert kinds == {True: TIMED_KINDS, False: (*CLIP_KINDS, "when")}
    assert {timed_chats.kinds_of(video, with_times=True) for video in videos if video.num_scenes == 1} == {STILL_KINDS}
    said = Counter(timed_chats.says_times(rng, video) for video in videos if not video.is_timed)
    assert said[True] > said[False] > 0


def test_half_of_a_batch_is_short_and_half_is_long_and_nothing_is_lost(timed_chats):
    samples = [{"input_ids": [0] * length} for length in np.random.default_rng(0).permutation(32)]
    lengths = [len(s["input_ids"]) for s in timed_chats.paired(np.random.default_rng(1), samples)]
    assert sorted(lengths) == list(range(32))
    for start in range(0, 32, 8):
        short, long = lengths[start : start + 4], lengths[start + 4 : start + 8]
        assert max(short) - min(short) == max(long) - min(long) == 3
        assert max(short) < min(long)
