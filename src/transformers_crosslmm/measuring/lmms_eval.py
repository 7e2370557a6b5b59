"""CrossLMM as a model of lmms-eval, registered by the entry point `lmms_eval.models`.

lmms_eval --model crosslmm --model_args pretrained=YOU/NAME,num_frames=128 --tasks videomme --batch_size 1
"""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import GenerationConfig, logging
from transformers.image_utils import load_image

from ..asking.conversation import read_video
from ..checkpoints.load import load_model, load_processor
from ..media_crosslmm import CrossLMMEncodedMedia, encode_video, join_media
from ..video_processing_crosslmm import CrossLMMVideoMetadata

try:
    from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest
    from lmms_eval.protocol import ChatMessages
except ImportError as error:
    raise ImportError(
        f"`lmms_eval --model crosslmm` needs packages that are missing ({error}): "
        '`pip install -e ".[eval]"` in your clone, in an environment of its own because lmms-eval needs av < 16.'
    ) from error

logger = logging.get_logger(__name__)

DEFAULT_NEW_TOKENS = 256
"""Longest answer, if a task sets none."""

GENERATION_NAMES = frozenset(GenerationConfig().to_dict()) - {"transformers_version"}


def manifest() -> ModelManifest:
    """The model's manifest, which the entry point returns to lmms-eval."""
    return ModelManifest(model_id="crosslmm", chat_class_path=f"{__name__}.CrossLMM")


class EncodedVideo(NamedTuple):
    """An encoded video with its frames' metadata."""

    media: CrossLMMEncodedMedia
    num_frames: int
    metadata: CrossLMMVideoMetadata


class CrossLMM(lmms):
    """`--model crosslmm`, with `--model_args`:

    pretrained: folder or name of a checkpoint.
    num_frames, or fps and max_frames: the frame sampling; by default the checkpoint's own.
    attn_implementation: as in `from_pretrained`.
    system_prompt: text, or a file with it, that begins every chat.

    Tasks are chats with videos (whole or a time range), images and text in any order and number. A video of several
    consecutive questions is encoded once. A task's generation options that `generate` knows are passed on;
    temperature 0 is greedy, and an answer ends before the first of `until`.
    A file that cannot be read ends the evaluation, because an empty answer would count as wrong.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        attn_implementation: str | None = None,
        system_prompt: str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"`--batch_size` must be a positive number; got {batch_size!r}.")
        if num_frames is not None and fps is not None:
            raise ValueError(f"`num_frames` and `fps` exclude each other; got {num_frames} and {fps}. Pass one.")
        self.batch_size = int(batch_size)
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self._world_size > 1 and torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        elif device == "cuda" and not torch.cuda.is_available():  # lmms-eval's default
            device = None
        self.processor = load_processor(pretrained)
        self.model = load_model(pretrained, device=device)
        if attn_implementation is not None:
            self.model.set_attn_implementation(attn_implementation)
        self.sampling = {
            name: value
            for name, value in (("num_frames", num_frames), ("fps", fps), ("max_frames", max_frames))
            if value is not None
        }
        self.system_prompt = None if system_prompt is None else self._resolve_system_prompt(system_prompt)
        self._videos: dict[str, EncodedVideo] = {}

    @property
    def device(self) -> torch.device:
        return self.model.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers all requests, in order; those with equal generation options are batched."""
        by_options: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_options.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append(index)
        answers: dict[int, GenerationResult] = {}
        with tqdm(total=len(requests), desc="CrossLMM answers", disable=self.rank != 0) as progress:
            for indices in by_options.values():
                for start in range(0, len(indices), self.batch_size):
                    batch = indices[start : start + self.batch_size]
                    asked = [requests[index] for index in batch]
                    for index, request, answer in zip(batch, asked, self._answer(asked), strict=True):
                        answers[index] = answer
                        key = (request.args[0], request.args[2])
                        self.cache_hook.add_partial("generate_until", key, answer.text)
                        progress.update()
        return [answers[index] for index in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "CrossLMM is a chat model, which lmms-eval does not score by likelihood. Use the task's generating "
            "variant: perceptiontest_val_mc, not perceptiontest_val_mcppl."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(
            "Tasks of several rounds are not supported; none of the paper's video benchmarks needs them."
        )

    @torch.no_grad()
    def _answer(self, requests: list[Instance]) -> list[GenerationResult]:
        chats = [self._chat(request) for request in requests]
        options, until = _generation_options(requests[0].args[2])
        inputs = self._inputs(chats)
        tokenizer = self.processor.tokenizer
        output = self.model.generate(
            **inputs,
            **options,
            pad_token_id=tokenizer.pad_token_id,
            **({"stop_strings": until, "tokenizer": tokenizer} if until else {}),
        )
        given = inputs["input_ids"].shape[1]
        results = []
        for row, mask in zip(output[:, given:], inputs["attention_mask"], strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True)
            for end in until:
                text = text.split(end)[0]
            written = int((row != tokenizer.pad_token_id).sum())
            results.append(GenerationResult(text.strip(), TokenCounts(int(mask.sum()), written)))
        return results

    def _chat(self, request: Instance) -> list[dict[str, Any]]:
        """A request's messages, validated by lmms-eval, in the processor's format; videos with their time range."""
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        if self.system_prompt:
            messages = self._apply_system_prompt(messages, self.system_prompt)
        return [
            {
                "role": message.role,
                "content": [_part(part, where=f"{task}, document {doc_id}") for part in message.content],
            }
            for message in ChatMessages(messages=messages).messages
        ]

    def _inputs(self, chats: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """Inputs of `generate` for a batch of chats: left-padded texts, encoded videos, images as pixels."""
        parts = [part for chat in chats for message in chat for part in message["content"]]
        videos = [self._encoded(part) for part in parts if part["type"] == "video"]
        images = [load_image(part["image"]) for part in parts if part["type"] == "image"]
        wanted = {_key(part) for part in parts if part["type"] == "video"}
        self._videos = {key: video for key, video in self._videos.items() if key in wanted}
        texts = [
            self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats
        ]
        expanded, _ = self.processor._expand(
            texts,
            [video.num_frames for video in videos],
            [video.metadata for video in videos],
            say_times=self.processor.time_instruction,
        )
        encoded = self.processor.tokenizer(expanded, padding=True, padding_side="left", return_tensors="pt")
        inputs = {name: encoded[name].to(self.device) for name in ("input_ids", "attention_mask")}
        if images:
            pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
            inputs["pixel_values"] = pixels.to(self.device)
        if videos:
            inputs["mm_encoder_outputs"] = {"video": _shared(videos)}
        return inputs

    def _encoded(self, part: Mapping[str, Any]) -> EncodedVideo:
        """The encoded video of a message part, reused from the last batch if it is the same."""
        key = _key(part)
        if key in self._videos:
            return self._videos[key]
        bounds = {name: part[name] for name in ("start_seconds", "end_seconds") if part[name] is not None}
        try:
            stream = read_video(self.processor, part["video"], **self.sampling, **bounds)
            media = encode_video(self.model, stream)
        except (ValueError, OSError) as error:
            raise ValueError(f"The video {key} cannot be read. {error}") from error
        video = EncodedVideo(media, stream.num_frames, stream.metadata)
        if isinstance(part["video"], str):
            self._videos[key] = video
        return video


def _part(part: Any, *, where: str) -> dict[str, Any]:
    """Converts a message part of lmms-eval to the processor's format; videos with their time range."""
    if part.type == "text":
        return {"type": "text", "text": part.text}
    if part.type == "image":
        return {"type": "image", "image": part.url}
    if part.type == "video":
        source, start, end = part.url, part.start_time, part.end_time
        if isinstance(source, Mapping):
            start, end = source.get("video_start", start), source.get("video_end", end)
            source = next(source[name] for name in ("path", "url", "video") if source.get(name) is not None)
        return {"type": "video", "video": source, "start_seconds": start, "end_seconds": end}
    raise ValueError(f"CrossLMM accepts text, images and video; {where} has {part.type!r}. Leave the task out.")


def _key(part: Mapping[str, Any]) -> str:
    bounds = [part["start_seconds"], part["end_seconds"]]
    source = part["video"] if isinstance(part["video"], str) else f"<{type(part['video']).__name__}>"
    return source if bounds == [None, None] else f"{source} {bounds}"


def _shared(videos: list[EncodedVideo]) -> CrossLMMEncodedMedia:
    """The videos of a batch in the order of their placeholders; a video in several rows is stored once."""
    distinct = {id(video.media): video.media for video in videos}
    numbers = {key: number for number, key in enumerate(distinct)}
    return replace(
        join_media(distinct.values()),
        pooler_output=tuple(video.media.pooler_output[0] for video in videos),  # type: ignore[index,arg-type]
        media_index=tuple(numbers[id(video.media)] for video in videos),
    )


def _generation_options(task_options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Converts a task's options to options of `generate`, and the strings before which an answer ends."""
    given = {name: value for name, value in task_options.items() if value is not None}
    until = given.pop("until", [])
    until = [end for end in ([until] if isinstance(until, str) else until) if end]
    new_tokens = given.pop("max_gen_toks", DEFAULT_NEW_TOKENS)
    unknown = sorted(set(given) - GENERATION_NAMES)
    if unknown:
        logger.warning_once(f"`generate` does not know a task's options {', '.join(unknown)}; they are left out.")
    options = {"max_new_tokens": new_tokens} | {name: given[name] for name in given if name in GENERATION_NAMES}
    options["do_sample"] = options.get("temperature") != 0 and options.get("do_sample", "temperature" in options)
    if not options["do_sample"]:
        options |= {"temperature": None, "top_p": None, "top_k": None}
    return options, until
