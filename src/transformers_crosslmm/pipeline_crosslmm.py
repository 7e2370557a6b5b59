"""The pipeline "video-text-to-text": answers questions about videos."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info
from transformers import ImageTextToTextPipeline
from transformers.feature_extraction_utils import BatchFeature
from transformers.pipelines.base import Pipeline
from transformers.pipelines.image_text_to_text import ReturnType
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator
from transformers.utils.chat_template_utils import Chat, is_valid_message

from .frames_crosslmm import flatten_videos, is_nested
from .media_crosslmm import CrossLMMEncodedMedia, join_media, join_pixels


class Question(Chat):
    """A chat of one turn with videos and a question; the result is the answer's text, not a longer chat."""

    def __init__(self, videos: list[Any], text: str) -> None:
        parts = [{"type": "video", "video": video} for video in videos]
        super().__init__([{"role": "user", "content": [*parts, {"type": "text", "text": text}]}])  # type: ignore[arg-type]
        self.text = text


class VideoTextToTextPipeline(ImageTextToTextPipeline):
    """`pipeline("video-text-to-text", model=folder)`: answers chats, and questions about videos.

    Videos can be long: they are encoded while they are decoded (not with `num_workers`, whose processes only decode).

        pipe([{"role": "user", "content": [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text": "Why?"}]}])
        pipe([chat, chat], batch_size=2)
        pipe(videos="clip.mp4", text="Why?")
        pipe(videos=["a.mp4", "b.mp4"], text=["Why?", "When?"])  # one question per video
        pipe(videos=["a.mp4", "b.mp4"], text="Which is longer?")  # one question about both

    Parameters are those of `ImageTextToTextPipeline`: `max_new_tokens`, `generate_kwargs` (for example a streamer),
    `processor_kwargs` (`{"num_frames": 8}`), `return_full_text`, `return_tensors`, `continue_final_message`, …

    Returns, for one input, a list with `{"input_text", "generated_text"}` per returned sequence, and for several
    inputs a list of such lists. `generated_text` is the chat with the answer for a chat, and the answer for a
    question, unless `return_full_text` is set.
    """

    _load_video_processor = False  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The parent's __init__ would check the class name against Transformers' models and log an error.
        Pipeline.__init__(self, *args, **kwargs)

    def _sanitize_parameters(self, generate_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        # A copy, because the parent writes `max_new_tokens` and stop strings into the caller's dict.
        return super()._sanitize_parameters(generate_kwargs=generate_kwargs and dict(generate_kwargs), **kwargs)

    def __call__(  # type: ignore[override]
        self, videos: Any = None, text: Any = None, *, images: None = None, **kwargs: Any
    ) -> Any:
        """Answers chats (first argument or `text`), or questions `text` about `videos`.

        videos: one or several for one question; one, or a list, for each of several questions. Inputs can also be
        mappings with "videos" and "text", and lists, generators and datasets of chats, questions and such mappings.
        Raises ValueError if the numbers of videos and questions differ.
        """
        if images is not None:
            raise ValueError(
                "`images` is not an argument of this pipeline. Put images into a chat, as parts of a message, or use "
                'the pipeline "image-text-to-text".'
            )
        if _is_nothing(videos) and _is_nothing(text):
            raise ValueError("Nothing to answer: pass a chat, or `videos` and `text`.")
        if videos is not None and text is not None:
            return Pipeline.__call__(self, _questions(videos, text), **kwargs)
        if isinstance(videos, str):
            raise ValueError("A question is missing: pass `text` along with `videos`, or a chat.")
        inputs = text if videos is None else videos
        if isinstance(inputs, list | tuple) and not is_valid_message(inputs[0]):
            inputs = [_as_chat(item) for item in inputs]
        elif isinstance(inputs, str | Mapping | bytes | np.ndarray | torch.Tensor | os.PathLike):
            inputs = _as_chat(inputs)
        return Pipeline.__call__(self, inputs, **kwargs)

    def preprocess(self, inputs: Any = None, *args: Any, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """Prepares the model inputs of one input of `__call__`: a chat, a question, or a mapping."""
        if get_worker_info() is None:
            kwargs["processor_kwargs"] = {"encode_with": self.model} | (kwargs.get("processor_kwargs") or {})
        return super().preprocess(_as_chat(inputs), *args, **kwargs)

    def _ensure_tensor_on_device(self, inputs: Any, device: torch.device) -> Any:
        """Moves inputs to the device, except encoded media: they are already there and would lose their class."""
        if isinstance(inputs, CrossLMMEncodedMedia):
            return inputs
        return super()._ensure_tensor_on_device(inputs, device)

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterable[Any]:
        """Iterates with our `_collate`; Transformers' own pads frames like tokens and keeps one frame per video."""
        if batch_size == 1:
            return super().get_iterator(
                inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params
            )
        as_dataset = PipelineDataset if hasattr(inputs, "__len__") else PipelineIterator
        loader = DataLoader(
            as_dataset(inputs, self.preprocess, preprocess_params),
            num_workers=num_workers,
            batch_size=batch_size,
            collate_fn=self._collate,
        )
        outputs = PipelineIterator(loader, self.forward, forward_params, loader_batch_size=batch_size)
        return PipelineIterator(outputs, self.postprocess, postprocess_params)

    def _collate(self, items: list[BatchFeature]) -> BatchFeature:
        """Batches inputs: pads texts on the left, for generation, and concatenates media."""
        rows = [{name: item[name][0] for name in ("input_ids", "attention_mask")} for item in items]
        batch = dict(self.tokenizer.pad(rows, padding=True, padding_side="left", return_tensors="pt"))
        batch |= join_pixels(items)
        encoded = [item["mm_encoder_outputs"]["video"] for item in items if "mm_encoder_outputs" in item]
        if encoded:
            batch["mm_encoder_outputs"] = {"video": join_media(encoded)}
        return BatchFeature(batch | {"text": [item["text"] for item in items]})

    def _forward(self, model_inputs: Any, generate_kwargs: dict[str, Any] | None = None) -> Any:  # type: ignore[override]
        """Generates as in Transformers, with the sequences grouped by input: (inputs, sequences, tokens)."""
        outputs = super()._forward(model_inputs, generate_kwargs)
        sequences = outputs["generated_sequence"]
        grouped = sequences.reshape(len(outputs["input_ids"]), -1, sequences.shape[-1])
        return outputs | {"generated_sequence": grouped}

    def postprocess(  # type: ignore[override]
        self, model_outputs: dict[str, Any], return_type: ReturnType | None = None, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """Creates the records of one input, one per returned sequence; see the class."""
        prompt = model_outputs["prompt_text"]
        if return_type is None:
            return_type = ReturnType.NEW_TEXT if isinstance(prompt, Question) else ReturnType.FULL_TEXT
        if isinstance(prompt, Question):
            prompt = prompt.text
        elif (last := prompt.messages[-1])["role"] == "assistant" and isinstance(last["content"], str):
            # The parent can append a continuation only to a list of parts.
            last = last | {"content": [{"type": "text", "text": last["content"]}]}
            prompt = Chat([*prompt.messages[:-1], last])  # type: ignore[arg-type]
        [sequences] = model_outputs["generated_sequence"]
        records_of = {
            "prompt_text": [prompt] * len(sequences),
            "generated_sequence": sequences,
            "input_ids": model_outputs["input_ids"].expand(len(sequences), -1),
        }
        return super().postprocess(records_of, return_type=return_type, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves model and processor, so that `pipeline("video-text-to-text", model=save_directory)` loads them.

        Only a model loaded as remote code gets `custom_pipelines` and the pipeline's file, because a folder with that
        key in its config needs `trust_remote_code` even if this package is installed.
        """
        if self.model.is_remote_code():
            super().save_pretrained(save_directory, **kwargs)
        else:
            vars(self.model.config).pop("custom_pipelines", None)
            self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


def _is_nothing(inputs: Any) -> bool:
    return inputs is None or (isinstance(inputs, list | tuple | Mapping) and len(inputs) == 0)


def _questions(videos: Any, text: Any) -> Question | list[Question]:
    if isinstance(text, str):
        return Question(flatten_videos(videos), text)
    if not isinstance(text, list | tuple) or not all(isinstance(question, str) for question in text):
        raise ValueError("With `videos`, `text` is a question or a list of questions. Put a chat's videos into it.")
    groups = [list(group or []) for group in videos] if is_nested(videos) else [[v] for v in flatten_videos(videos)]
    if len(text) != len(groups):
        raise ValueError(
            f"{len(text)} questions for {len(groups)} videos. Pass one video per question, or a list of videos per "
            "question."
        )
    return [Question(group, question) for group, question in zip(groups, text, strict=True)]


def _as_chat(item: Any) -> Chat:
    """Converts one input to a chat: a chat, its messages, a question, or {"videos": …, "text": …}."""
    if isinstance(item, Chat):
        return item
    if isinstance(item, str):
        return Question([], item)
    if isinstance(item, Mapping) and "text" in item:
        videos = item.get("videos")
        return Question([] if videos is None else flatten_videos(videos), item["text"])
    if isinstance(item, list | tuple) and item and is_valid_message(item[0]):
        return Chat(item)  # type: ignore[arg-type]
    raise ValueError(
        'One input is a chat (a list of messages with "role" and "content"), a question, or a mapping with "videos" '
        f'and "text"; got {type(item).__name__}.'
    )
