"""Generation where training goes on, and continuous batching: the tokens of evaluation, one sample at a time."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, TrainerCallback

from factories import random_model, save_checkpoint, tiny_config, tiny_processor
from test_modeling_crosslmm import make_sample, model_inputs
from transformers_crosslmm import CrossLMMForConditionalGeneration
from transformers_crosslmm.training.samples import CrossLMMDataCollator
from transformers_crosslmm.training.trainer import CrossLMMTrainer, CrossLMMTrainingArguments

LAYOUTS = {"video": (5, ("video", 3), 4), "text": (9,)}
OPTIONS = {"do_sample": False, "max_new_tokens": 8}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "not-reentrant", "reentrant"])
def test_a_model_in_training_answers_as_in_evaluation_and_goes_on_training(checkpointing, layout):
    model = random_model(tiny_config())
    inputs = model_inputs(make_sample(model.config, *layout, seed=0))
    expected = model.generate(**inputs, **OPTIONS)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    model.train()
    model.model.vision_tower.eval()  # as somebody may have it who freezes it
    assert torch.equal(model.generate(**inputs, **OPTIONS), expected)
    assert {name for name, module in model.named_modules() if not module.training} == {
        name for name, _ in model.named_modules() if name.startswith("model.vision_tower")
    }


def test_a_callback_that_generates_changes_no_loss(tmp_path):
    save_checkpoint(tmp_path / "model")
    records = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": word}]} for word in "bcd"
    ]
    prompt = {"input_ids": torch.tensor([[3, 4, 5]])}
    seen = []

    class Generates(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            answer = model.generate(**prompt, **OPTIONS)
            mode = model.training
            model.eval()
            seen.append(torch.equal(answer, model.generate(**prompt, use_cache=False, **OPTIONS)))
            model.train(mode)

    losses = []
    for callbacks in ([], [Generates()]):
        trainer = CrossLMMTrainer(
            model=CrossLMMForConditionalGeneration.from_pretrained(tmp_path / "model"),
            args=CrossLMMTrainingArguments(
                output_dir=str(tmp_path / "out"),
                max_steps=3,
                learning_rate=1e-2,
                logging_steps=1,
                gradient_checkpointing=True,
                report_to="none",
                use_cpu=True,
                save_strategy="no",
            ),
            train_dataset=records,
            data_collator=CrossLMMDataCollator(tiny_processor()),
            callbacks=callbacks,
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]
    assert seen == [True] * 3


# --- continuous batching --------------------------------------------------------------------------------------------

TEXTS = [[3, 4, 5], [7, 8, 9, 10], [11]]


def continuous(model, texts, **options):
    config = GenerationConfig(eos_token_id=-1, pad_token_id=0, **OPTIONS)
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)  # or it takes whatever memory there is
    return [o.generated_tokens for o in model.generate_batch(texts, config, small, **options).values()]


def test_texts_in_a_continuous_batch_are_answered_one_by_one_and_no_placeholder_is_sampled():
    model = random_model(tiny_config())
    alone = [model.generate(torch.tensor([ids]), **OPTIONS)[0, len(ids) :].tolist() for ids in TEXTS]
    assert continuous(model, TEXTS) == alone
    with torch.no_grad():  # what the model would sample first
        model.lm_head.weight[model.config.video_token_id] = 3 * model.lm_head.weight[[row[0] for row in alone]].sum(0)
    logits = model(torch.tensor(TEXTS[:1])).logits[0, -1]
    assert logits.argmax() == model.config.video_token_id
    assert continuous(model, TEXTS) == alone


def test_media_in_a_continuous_batch_are_refused_by_name():
    model = random_model(tiny_config())
    with pytest.raises(ValueError, match=r"is for text only; got pixel_values_videos\. Use `generate` for"):
        continuous(model, TEXTS, pixel_values_videos=torch.rand(1, 3, 33, 33))
    with pytest.raises(ValueError, match=r"got placeholders in `inputs\[1\]`"):
        continuous(model, [[3], [4, model.config.image_token_id]])
    with pytest.raises(ValueError, match=r"got placeholders in `inputs\[0\]`"):
        continuous(model, [torch.tensor([4, model.config.image_token_id])])
