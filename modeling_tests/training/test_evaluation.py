"""Evaluation on two processes: batches of different media and lengths, metrics over all samples, and generation."""

import json

import pytest
import torch
from test_sharded_training import give_up_after
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from factories import save_checkpoint, save_training_data
from transformers_crosslmm import CrossLMMForConditionalGeneration, CrossLMMProcessor
from transformers_crosslmm.training.samples import IGNORED, CrossLMMDataCollator
from transformers_crosslmm.training.trainer import CrossLMMTrainer, CrossLMMTrainingArguments
from two_processes import run_on_two_ranks

OPTIONS = {"per_device_eval_batch_size": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    save_checkpoint(folder / "model")
    save_training_data(folder)
    return folder


def parts_of(folder):
    """Model, seven records (an odd number, so that the last batches are unequal), and the collator."""
    processor = CrossLMMProcessor.from_pretrained(folder / "model")
    records = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()][:7]
    collator = CrossLMMDataCollator(processor, media_root=folder / "media")
    return CrossLMMForConditionalGeneration.from_pretrained(folder / "model"), records, collator


def count_right(prediction) -> dict[str, float]:
    """How many tokens of the answers are the likeliest ones, of how many, and which are the likeliest, added up."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    likeliest, labels = logits[:, :-1].argmax(-1), prediction.label_ids[:, 1:]
    learned = labels != IGNORED
    right = (likeliest == labels)[learned]
    return {"right": float(right.sum()), "asked": float(learned.sum()), "sum": float(likeliest[learned].sum())}


def evaluate(folder, out) -> dict[str, float]:
    model, records, collator = parts_of(folder)
    trainer = CrossLMMTrainer(
        model=model,
        args=CrossLMMTrainingArguments(output_dir=str(out), **OPTIONS),
        eval_dataset=records,
        data_collator=collator,
        compute_metrics=count_right,
    )
    return trainer.evaluate()


def evaluate_on_a_rank(rank: int, folder, out, alone) -> None:
    give_up_after(120)
    together = evaluate(folder, out)
    for name in ("eval_right", "eval_asked", "eval_sum"):
        assert together[name] == alone[name], f"{name} on process {rank}"


def test_metrics_are_those_of_one_process_whatever_the_batches_hold(folder, tmp_path):
    alone = evaluate(folder, tmp_path / "alone")
    model, records, collator = parts_of(folder)
    assert alone["eval_asked"] == (collator(records)["labels"][:, 1:] != IGNORED).sum()
    likeliest = 0
    with torch.no_grad():
        for record in records:
            one = collator([record])
            learned = one["labels"][:, 1:] != IGNORED
            likeliest += model.eval()(**one).logits[:, :-1].argmax(-1)[learned].sum()
    assert alone["eval_sum"] == likeliest
    run_on_two_ranks(evaluate_on_a_rank, tmp_path, folder, tmp_path / "out", alone)


def padding_of(processor) -> int:
    tokenizer = processor.tokenizer
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def generate(folder, out) -> list[str]:
    """What `predict_with_generate` answers to each record, whose answer is cut off."""
    model, records, collator = parts_of(folder)
    processor = collator.processor

    def questions(samples):
        batch = collator(samples)
        rows = zip(batch["input_ids"], batch["labels"], strict=True)
        prompts = [row[: (labels != IGNORED).nonzero()[0, 0]] for row, labels in rows]
        length = max(map(len, prompts))
        padded = [torch.cat([row.new_full((length - len(row),), padding_of(processor)), row]) for row in prompts]
        mask = [torch.cat([row.new_zeros(length - len(row)), torch.ones_like(row)]) for row in prompts]
        del batch["labels"]  # of the whole chat
        return batch | {"input_ids": torch.stack(padded), "attention_mask": torch.stack(mask)}

    arguments = Seq2SeqTrainingArguments(
        output_dir=str(out),
        predict_with_generate=True,
        remove_unused_columns=False,
        **OPTIONS,
    )
    trainer = Seq2SeqTrainer(model=model, args=arguments, data_collator=questions, processing_class=processor)
    predicted = torch.as_tensor(trainer.predict(records, max_new_tokens=4).predictions)
    filled = predicted.where(predicted >= 0, padding_of(processor))
    return processor.tokenizer.batch_decode(filled, skip_special_tokens=True)


def generate_on_a_rank(rank: int, folder, out, alone) -> None:
    give_up_after(120)
    answers = generate(folder, out)
    assert answers[: len(alone)] == alone  # Transformers' `Seq2SeqTrainer` keeps what fills the last batches up


def test_generated_answers_are_those_of_one_process(folder, tmp_path):
    alone = generate(folder, tmp_path / "alone")
    assert len(alone) == 7
    assert all("assistant\n" in answer for answer in alone)
    run_on_two_ranks(generate_on_a_rank, tmp_path, folder, tmp_path / "out", alone)
