"""Model cards: what the Hub reads, what people run, and numbers that come from configs and results alone."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from factories import mp4_of, random_frames, random_model, tiny_config, tiny_tokenizer
from transformers_crosslmm import TINY_CHECKPOINT, CrossLMMConfig, CrossLMMForConditionalGeneration, CrossLMMProcessor
from transformers_crosslmm.checkpoints.model_card import (
    PAPER_DATA,
    PAPER_SCORES,
    counted_costs,
    is_hub_name,
    main,
    model_card,
    preset_card,
    results_of,
)
from transformers_crosslmm.configuration_crosslmm import PRESETS

CARDS = Path(__file__).parents[2] / "model_cards"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_cards_metadata_says_what_the_hub_asks_for(preset):
    card = ModelCard(str(preset_card(preset)))
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "video-text-to-text")
    vision, text = data.base_model
    assert vision.startswith("google/siglip2-")
    assert text.startswith("Qwen/Qwen2.5-")
    assert all(is_hub_name(name) for name in data.datasets)
    assert len(data.datasets) == len(PAPER_DATA)
    yaml.safe_load(data.to_yaml())


@pytest.mark.parametrize("preset", PRESETS)
def test_the_papers_scores_are_words_of_the_card_and_no_metadata_that_a_leaderboard_reads(preset):
    card = ModelCard(str(preset_card(preset)))
    assert card.data.eval_results is None
    assert "model-index" not in str(card)
    tokens = CrossLMMConfig.from_preset(preset).tokens_per_frame
    [results] = re.findall(r"^## Results\n(.*?)^## ", card.text, re.M | re.S)
    assert "reproduced" in results
    for score in PAPER_SCORES[preset, tokens]:
        assert f"| {score} |" in results


def test_a_card_of_somebodys_weights_claims_no_results_of_the_paper():
    card = model_card(tiny_config(), title="mine", repo="me/mine")
    assert "Nothing has been measured for this checkpoint" in card.text
    assert "Table 1" not in card.text


def test_results_appear_with_their_command_commit_and_machine():
    results = {
        "rows": [{"name": "questions about colour", "value": "97.5 %"}],
        "command": "measure it",
        "commit": "abc1234",
        "machine": "a laptop",
    }
    text = model_card(tiny_config(), title="mine", repo="me/mine", results=results).text
    for words in ("| questions about colour | 97.5 % |", "`measure it`", "commit abc1234", "a laptop"):
        assert words in text


def test_the_first_line_of_untrained_weights_says_so():
    card = model_card(tiny_config(untrained=True), title="mine", repo="me/mine", first_line="The best model there is.")
    assert card.text.strip().startswith("**Untrained.**")
    assert "The best model" not in card.text


@pytest.mark.parametrize("preset", PRESETS)
def test_a_card_names_limits_risks_licences_and_data(preset):
    text = preset_card(preset).text
    for heading in ("Use", "Size and cost", "Results", "Training data", "Limits", "Risks", "Licences", "Citation"):
        assert f"\n## {heading}\n" in text
    for word in ("appendix D", "surveillance", "privacy", "CapsFusion", "LongVid", "unverified against the authors'"):
        assert word in text
    assert text.count("| Apache-2.0 |") == 3


def test_counted_costs_are_those_of_the_network():
    """Against what PyTorch counts in a real forward pass, and against the memory of a real cache."""
    config = tiny_config(text_config={"v2v_scope": "frame"})
    costs = counted_costs(config)
    model = random_model(tiny_config(text_config={"v2v_scope": "frame"}))
    assert costs.parameters == sum(parameter.numel() for parameter in model.parameters())
    projector = sum(parameter.numel() for parameter in model.model.multi_modal_projector.parameters())
    assert costs.projector == projector
    cross = [parameter.numel() for name, parameter in model.named_parameters() if ".cross_attention." in name]
    assert costs.cross_attention == sum(cross)
    # 25 patches of width 20; T2V in layers 0, 2, 4 with 2 key heads of 8; 9 tokens in 5 layers; 2 bytes a number.
    assert costs.features_bytes == 25 * 20 * 2
    assert costs.kv_bytes == 3 * 25 * 2 * (2 * 8) * 2
    assert costs.language_bytes == 5 * 9 * 2 * (2 * 8) * 2


def test_counted_multiply_accumulates_are_the_papers():
    """What each further frame costs in Figure 4 and Table 6, within the 0.8 % to which any reading of them agrees."""
    for preset, at_32, at_256 in (("7B", 13.17, 102.42), ("2B", 10.93, 86.82)):
        config = CrossLMMConfig.from_preset(preset)
        t2v_scores = 7 * 2 * 64 * 729 * config.text_config.hidden_size  # of 64 text tokens; the card leaves them out
        counted = (counted_costs(config).macs_per_frame + t2v_scores) / 1e12
        assert counted == pytest.approx((at_256 - at_32) / (256 - 32), rel=0.008)


def test_the_cards_in_the_repository_are_what_the_config_says(tmp_path):
    made = tmp_path / "model_cards"
    made.mkdir()
    kept = CARDS.parent / "benchmarks" / "tiny_checkpoint.json"
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / kept.name).write_text(kept.read_text())
    main(str(made))
    cards = sorted(path.name for path in made.iterdir())
    assert cards == sorted(path.name for path in CARDS.glob("crosslmm-*.md"))
    for name in cards:
        assert (CARDS / name).read_text() == (made / name).read_text(), (
            f"model_cards/{name} is out of date: python -m transformers_crosslmm.checkpoints.model_card model_cards"
        )


@pytest.fixture
def random_checkpoint(tmp_path):
    tokenizer = tiny_tokenizer()
    ids = {f"{kind}_token_id": tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video")}
    model = random_model(tiny_config(text_config={"vocab_size": 271}, **ids))
    model.save_pretrained(tmp_path / "checkpoint")
    CrossLMMProcessor.from_config(model.config, tokenizer).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("which", ["random", "tiny"])
def test_the_usage_code_of_a_card_runs(which, random_checkpoint, tmp_path, capsys):
    if which == "tiny" and not (TINY_CHECKPOINT / "config.json").is_file():
        pytest.skip("the tiny checkpoint is not there")
    folder = random_checkpoint if which == "random" else TINY_CHECKPOINT
    card = model_card(CrossLMMConfig.from_pretrained(folder), title="mine", repo=str(folder), with_code=True)
    video = tmp_path / "video.mp4"
    video.write_bytes(mp4_of(random_frames(10), fps=5))
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    namespace = {}
    exec(code.replace("video.mp4", str(video)), namespace)
    assert isinstance(namespace["model"], CrossLMMForConditionalGeneration)
    assert namespace["output"].shape[1] > namespace["inputs"]["input_ids"].shape[1]
    assert namespace["inputs"]["video_num_frames"].tolist() == [8]
    assert capsys.readouterr().out.endswith("\n")


def test_a_hub_name_is_no_path(tmp_path):
    assert is_hub_name("google/siglip2-so400m-patch14-384")
    for path in ("./a/b", "/a/b", "a/b/c", "folder", "~/x"):
        assert not is_hub_name(path), path


def test_results_of_the_repository_have_the_form_that_cards_read():
    path = CARDS.parent / "benchmarks" / "tiny_checkpoint.json"
    if not path.is_file():
        pytest.skip("there are no results of the tiny checkpoint")
    results = results_of(json.loads(path.read_text()))
    assert {"rows", "command", "commit", "machine"} == results.keys()
    assert [row["name"].split(" (")[0] for row in results["rows"]][:3] == ["colour", "shape", "place"]
    assert all(row["value"].endswith("%") for row in results["rows"])
