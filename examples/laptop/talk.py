"""Ordinary questions with the answers that the language model itself gives, to be learned beside videos.

    python examples/laptop/talk.py --text runs/laptop/text --output runs/laptop/talk.json

Narrow data teaches a model to speak of its videos whatever it is asked. A tenth of such chats keeps it from that.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = [
    *(f"What is the capital of {name}?" for name in ("Italy", "Japan", "Spain", "Egypt", "Canada", "Greece")),
    *(f"What is {a} plus {b}?" for a, b in ((1, 2), (2, 3), (5, 5), (7, 1))),
    *(f"What does a {name} do? Answer in one sentence." for name in ("baker", "doctor", "teacher", "farmer", "pilot")),
    *(f"What is {name}? Answer in one sentence." for name in ("gravity", "a verb", "rain", "music", "a democracy")),
    *(f"Write one short sentence about {name}." for name in ("the sea", "a dog", "winter", "a train", "bread")),
    *(f"Name an animal that lives in {name}." for name in ("the desert", "the sea", "the forest", "Africa")),
    *(f"What is the opposite of {name}?" for name in ("hot", "big", "early", "happy", "dark", "fast")),
    *(f"How do you say {name} politely?" for name in ("no", "goodbye", "thank you")),
    *(f"Give me one tip for {name}." for name in ("sleeping better", "learning a language", "cooking rice")),
    "Hello!",
    "Who are you?",
    "How are you today?",
    "What can you help me with?",
    "Tell me a fun fact in one sentence.",
    "How many days are there in a week?",
    "How many legs does a spider have?",
    "Which planet is the largest?",
    "Who wrote Romeo and Juliet?",
    "What do bees make?",
    "At what temperature does water boil?",
    "In which season do leaves fall?",
    "Why is the sky blue? Answer in one sentence.",
    "What should I drink when I am thirsty?",
    "Which language is spoken in Brazil?",
    "Is the sun a star?",
    "Can fish fly?",
    "Is ice warmer than steam?",
    "Thank you for your help.",
]


@torch.no_grad()
def answers_of(text: str, questions: list[str], *, max_new_tokens: int = 48) -> list[str | None]:
    """The model's own words, greedily chosen; None where it does not come to an end within `max_new_tokens`."""
    model = AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(text)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answers: list[str | None] = []
    for question in questions:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end)[0]
        words = tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        answers.append(words if ids[-1] == end and words else None)
        print(f"{question} {answers[-1]}", flush=True)
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description="Asks the language model ordinary questions.")
    parser.add_argument("--text", required=True, help="folder or name of the language model")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    pairs = zip(QUESTIONS, answers_of(arguments.text, QUESTIONS), strict=True)
    talk = [{"question": question, "answer": answer} for question, answer in pairs if answer is not None]
    arguments.output.write_text(json.dumps(talk, indent=1) + "\n")


if __name__ == "__main__":
    main()
