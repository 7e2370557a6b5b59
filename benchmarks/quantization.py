"""What 4 and 8 bits cost a trained model, and whether cross-attention should be left in 16: the tiny checkpoint.

    python benchmarks/quantization.py          # -> benchmarks/quantization.json; some minutes on one core
    python benchmarks/quantization.py --2B     # into the same: bytes of a real size, quantised; 10 GB of memory

Needs bitsandbytes and torchao. Errors are against the same checkpoint in float32: the divergence of the distribution
of an answer's first token (nats, mean over the questions), and how many answers are the same and how many right,
greedily. Questions are those of `procedural_videos` about things that no training video shows.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TorchAoConfig

from transformers_crosslmm import TINY_CHECKPOINT, CrossLMMConfig, CrossLMMForConditionalGeneration, CrossLMMProcessor
from transformers_crosslmm.checkpoints.inspect import count_costs
from transformers_crosslmm.measuring.quality import answer_questions, read_questions
from transformers_crosslmm.quantization_crosslmm import NOT_QUANTIZED
from transformers_crosslmm.tiny.procedural_videos import write_videos

RESULTS = Path(__file__).with_suffix(".json")
NUM_VIDEOS = 60


def quantizations(left: list[str] | None = None) -> dict:
    """Each way; left: names of modules that stay as they are, if not our own choice."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return {
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=left,
        ),
        "int8": TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=left),
        "fp8": TorchAoConfig(Float8WeightOnlyConfig(), modules_to_not_convert=left),
    }


def size_of(model) -> int:
    return sum(tensor_bytes(tensor) for tensor in model.state_dict().values())


def tensor_bytes(tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's
        return sum(getattr(tensor, name).nbytes for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


@torch.no_grad()
def ask(model, processor, questions) -> tuple[torch.Tensor, list[str]]:
    logs, answers = [], []
    for question in questions:
        parts = [{"type": "video", "path": str(question.video)}, {"type": "text", "text": question.question}]
        inputs = processor.apply_chat_template(
            [[{"role": "user", "content": parts}]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"num_frames": 8, "return_tensors": "pt"},
        )
        inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(model.dtype)
        logs.append(F.log_softmax(model(**inputs, logits_to_keep=1).logits[0, -1].float(), dim=-1))
        answers += answer_questions(model, inputs, processor)
    return torch.stack(logs), answers


def tiny() -> dict:
    processor = CrossLMMProcessor.from_pretrained(TINY_CHECKPOINT)
    ways = {"float32": {"dtype": torch.float32}, "bfloat16": {"dtype": torch.bfloat16}}
    ways |= {name: {"quantization_config": config} for name, config in quantizations().items()}
    but_cross_attention = [pattern for pattern in NOT_QUANTIZED if "cross_attention" not in pattern]
    ways |= {
        f"{name}, cross-attention too": {"quantization_config": config}
        for name, config in quantizations(but_cross_attention).items()
    }
    results: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        write_videos(Path(folder) / "videos", num_videos=NUM_VIDEOS, seed=7, split="heldout", size=96, fps=8)
        questions = read_questions(Path(folder) / "videos")
        for name, options in ways.items():
            model = AutoModelForImageTextToText.from_pretrained(
                TINY_CHECKPOINT, **({"dtype": torch.bfloat16} | options)
            ).eval()
            size = size_of(model)
            logs, answers = ask(model, processor, questions)
            if name == "float32":
                truth, same = logs, answers
            results[name] = {
                "weight_bytes": size,
                "divergence": round(F.kl_div(logs, truth, log_target=True, reduction="none").sum(-1).mean().item(), 5),
                "same_answers": sum(a == b for a, b in zip(answers, same, strict=True)),
                "right_answers": sum(a == q.answer for a, q in zip(answers, questions, strict=True)),
                "questions": len(questions),
            }
            print(name, results[name], flush=True)
    return results


def real_size() -> dict:
    """Bytes of the 2B, random weights, as loaded and as `crosslmm info` counts them."""
    results = {}
    config = CrossLMMConfig.from_preset("2B")
    with tempfile.TemporaryDirectory() as folder:
        model = CrossLMMForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        del model
        for name, quantization in quantizations().items():
            model = CrossLMMForConditionalGeneration.from_pretrained(
                folder, dtype=torch.bfloat16, quantization_config=quantization
            )
            counted = count_costs(config, quantization=name).weight_bytes
            tied = model.lm_head.weight.nbytes if config.text_config.tie_word_embeddings else 0
            results[name] = {"loaded": size_of(model) - tied, "counted": counted}
            print(name, results[name], flush=True)
            del model
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--2B", action="store_true", dest="real_size")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    part = "2B" if arguments.real_size else "tiny"
    report[part] = real_size() if arguments.real_size else tiny()
    report["machine"] = f"{platform.machine()}, one thread; torch {torch.__version__}"
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
