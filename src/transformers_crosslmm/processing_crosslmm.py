"""Converts chats, texts, videos and images to the inputs of a CrossLMM.

A video becomes `<|video_pad|>` and an image `<|image_pad|>`, s·s of them per frame (an image is one frame).
"""

import math
import re
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, groupby, islice, pairwise
from typing import Any, Literal, Unpack

import numpy as np
from tokenizers import normalizers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin
from transformers.video_processing_utils import VideoProcessorMixin

from .dialect_crosslmm import declare_no_defaults
from .frames_crosslmm import (
    VIDEO_OPTIONS,
    CrossLMMVideoMetadata,
    flatten_videos,
    is_nested,
    picture_pixels,
    source_in,
)
from .media_crosslmm import encode_video, join_media
from .video_processing_crosslmm import CrossLMMVideoProcessor, CrossLMMVideosKwargs
from .video_source import DEFAULT_LIMITS

IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"
VISION_END_TOKEN = "<|vision_end|>"
MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", VISION_END_TOKEN, IMAGE_TOKEN, VIDEO_TOKEN)
"""The special tokens that the chat template writes for roles and media; Qwen2.5's own."""

ESCAPE = "\ue000"
"""Inserted after the first character of a special token that is text. The tokenizer then does not find the special
token, and its normaliser drops the escape before the text is split into tokens. It is a private-use character, so no
ordinary text contains it."""

NO_AUDIO = "CrossLMM does not accept audio; leave `audio` out."

CHAT_TEMPLATE = """\
{%- macro as_text(text) -%}
    {%- set escaped = namespace(text=text) -%}
    {%- if not texts_are_escaped -%}
        {%- for name in ["im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"] -%}
            {%- set escaped.text = escaped.text | replace("<|" + name + "|>", "<\ue000|" + name + "|>") -%}
        {%- endfor -%}
    {%- endif -%}
    {{- escaped.text -}}
{%- endmacro -%}
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- as_text(content) -}}
    {%- elif content -%}
        {%- set run = namespace(text="") -%}
        {%- for part in content -%}
            {%- if part.type == "video" or part.type == "image" -%}
                {{- as_text(run.text) + "<|vision_start|><|" + part.type + "_pad|><|vision_end|>" -}}
                {%- set run.text = "" -%}
            {%- elif part.text -%}
                {%- set run.text = run.text + part.text -%}
            {%- endif -%}
        {%- endfor -%}
        {{- as_text(run.text) -}}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {{- "<|im_start|>" + as_text(message.role) + "\\n" -}}
    {%- if message.role == "assistant" -%}
        {%- generation -%}
            {{- render(message.content) + "<|im_end|>" -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- render(message.content) + "<|im_end|>" -}}
    {%- endif -%}
    {{- "\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""
"""Qwen2.5's ChatML: a system prompt only if given, media at their place in the text, and marks for training on the
assistant's words and `<|im_end|>`. If a program other than the processor renders it, it escapes `MARKS` itself."""

PLACEHOLDER = re.compile(f"({re.escape(IMAGE_TOKEN)}|{re.escape(VIDEO_TOKEN)})({re.escape(VISION_END_TOKEN)})?")


class CrossLMMProcessorKwargs(ProcessingKwargs, total=False):
    """Keyword arguments of Transformers' processors, with the options of `CrossLMMVideoProcessor`."""

    videos_kwargs: CrossLMMVideosKwargs  # type: ignore[misc]  # narrower than in the base class


declare_no_defaults(CrossLMMProcessorKwargs)


class CrossLMMProcessor(ProcessorMixin):
    """Combines Transformers' SigLIP image processor, a Qwen2 tokenizer and `CrossLMMVideoProcessor`.

    pooled_grid_size, pooling_mode: as in the model's config; patch_size: pixels along a side of the vision tower's
        patches. `from_config` reads them from the config.
    time_instruction, add_timestamps: the defaults of these keyword arguments of calls.

    The tokenizer must have the marks of ChatML and of media (`MARKS`) as special tokens, as every Qwen2.5 tokenizer
    does. The processor gives it a normaliser that drops `ESCAPE`, so that text in chats cannot write those marks, and
    left padding as the default.
    """

    valid_processor_kwargs = CrossLMMProcessorKwargs  # type: ignore[assignment]
    skip_tensor_conversion = [*ProcessorMixin.skip_tensor_conversion, "mm_encoder_outputs"]

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        video_processor: CrossLMMVideoProcessor,
        chat_template: str | dict[str, str] | None = None,
        pooled_grid_size: int = 3,
        pooling_mode: Literal["bilinear", "average"] = "bilinear",
        patch_size: int = 14,
        time_instruction: bool = False,
        add_timestamps: bool = False,
    ) -> None:
        super().__init__(
            image_processor,
            tokenizer,
            video_processor,
            chat_template=CHAT_TEMPLATE if chat_template is None else chat_template,
        )
        self.pooled_grid_size = pooled_grid_size
        self.pooling_mode = pooling_mode
        self.patch_size = patch_size
        self.time_instruction = time_instruction
        self.add_timestamps = add_timestamps
        size = video_processor.size
        if not 1 <= pooled_grid_size <= min(size.height, size.width) // patch_size:
            raise ValueError(
                f"`pooled_grid_size` must lie between 1 and the patch grid, {size.height // patch_size}×"
                f"{size.width // patch_size} for frames of {size.height}×{size.width} and `patch_size` {patch_size}; "
                f"got {pooled_grid_size}."
            )
        if pooling_mode not in ("bilinear", "average"):
            raise ValueError(f'`pooling_mode` must be "bilinear" or "average"; got {pooling_mode!r}.')
        self.image_token, self.video_token = IMAGE_TOKEN, VIDEO_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.video_token_id = tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
        tokenizer.padding_side = "left"  # for generation; Transformers' own pipelines read it from the tokenizer
        tokenizer.init_kwargs["padding_side"] = "left"  # the value that is saved
        self._make_marks_escapable()

    @classmethod
    def from_config(
        cls,
        config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | dict[str, str] | None = None,
        time_instruction: bool = False,
        add_timestamps: bool = False,
        **video_defaults: Any,
    ) -> "CrossLMMProcessor":
        """Creates the processor of a model with this `CrossLMMConfig`.

        video_defaults: attributes of the video processor, such as `num_frames`; `image_mean`, `image_std` and
        `resample` also apply to images. Raises ValueError if tokenizer and config have different ids for the
        placeholders.
        """
        size = {"height": config.vision_config.image_size, "width": config.vision_config.image_size}
        for_both = {
            name: video_defaults[name] for name in ("image_mean", "image_std", "resample") & video_defaults.keys()
        }
        processor = cls(
            SiglipImageProcessorPil(size=size, **for_both),
            tokenizer,
            CrossLMMVideoProcessor(size=size, **video_defaults),
            chat_template=chat_template,
            pooled_grid_size=config.pooled_grid_size,
            pooling_mode=config.pooling_mode,
            patch_size=config.vision_config.patch_size,
            time_instruction=time_instruction,
            add_timestamps=add_timestamps,
        )
        for name in ("image_token_id", "video_token_id"):
            if getattr(config, name) != getattr(processor, name):
                raise ValueError(
                    f"`{name}` of the config is {getattr(config, name)}, of the tokenizer {getattr(processor, name)}. "
                    "Create the config with the tokenizer's ids."
                )
        return processor

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Saves as in Transformers. The tokenizer is saved as a `TokenizersBackend`, which reads tokenizer.json; its
        own class would build a new normaliser, without the step that drops `ESCAPE`."""
        own_class = type(self.tokenizer)
        self.tokenizer.__class__ = type("TokenizersBackend", (own_class,), {})
        try:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        finally:
            self.tokenizer.__class__ = own_class

    @property
    def tokens_per_frame(self) -> int:
        """The number of placeholders per frame of a video and per image."""
        return self.pooled_grid_size**2

    def _get_num_multimodal_tokens(
        self,
        image_sizes: Sequence[Sequence[int]] | None = None,
        video_sizes: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> MultiModalData:
        """Counts the placeholders of media of these sizes, (height, width) or (frames, height, width), for vLLM, which
        needs them before it has the media. Every frame has `tokens_per_frame`, at any size."""
        images, videos = image_sizes or (), video_sizes or ()
        return MultiModalData(
            num_image_tokens=[self.tokens_per_frame for _ in images] if image_sizes is not None else None,
            num_image_patches=[1 for _ in images] if image_sizes is not None else None,  # rows of `pixel_values`
            num_video_tokens=[self.tokens_per_frame * size[0] for size in videos] if video_sizes is not None else None,
        )

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Checks as in Transformers, which without torchvision cannot find the video processor's base class."""
        if argument_name != "video_processor":
            return super().check_argument_for_proper_class(argument_name, argument)
        if not isinstance(argument, VideoProcessorMixin):
            raise TypeError(f"`video_processor` must be a CrossLMMVideoProcessor; got {type(argument).__name__}.")
        return VideoProcessorMixin

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        *,
        time_instruction: bool | None = None,
        add_timestamps: bool | None = None,
        encode_with: PreTrainedModel | None = None,
        **kwargs: Unpack[CrossLMMProcessorKwargs],
    ) -> BatchFeature:
        """Creates model inputs from texts in which each `<|video_pad|>` and `<|image_pad|>` marks the next medium.

        text: a string or a list of strings. images, videos: one, a flat list, or a list per text; see
        `CrossLMMVideoProcessor` for the forms of a video. Options of the tokenizer and of the two processors are
        passed by name, or in `text_kwargs`, `images_kwargs` and `videos_kwargs`.
        time_instruction: whether to write after each video its length, number of frames and their seconds.
        add_timestamps: whether to write the time before each frame of a video, `<1.2 seconds>`. Frames without known
        times are refused, unless they are not sampled (`do_sample_frames=False`) and `fps` gives their rate.
        For both, None means the processor's own setting.
        encode_with: the model to be used for generation. It encodes the videos while they are decoded, without
        gradients and without holding all pixels of a video; the result is `mm_encoder_outputs` instead of pixels.

        Returns `input_ids` and `attention_mask` with the placeholders expanded; for videos, `pixel_values_videos`
        (frames of all videos, 3, S, S), `video_num_frames` (videos,) and, with `skip_unchanged`, `video_frame_index`,
        or, with `encode_with`, `mm_encoder_outputs` {"video": encoded}; for images, `pixel_values` (images, 3, S, S);
        with `return_metadata=True`, a `CrossLMMVideoMetadata` per video in `video_metadata`.

        Raises ValueError, before decoding, if the numbers of placeholders and media differ; if truncation would cut
        placeholders; and if times are to be written but not known.
        """
        if kwargs.pop("audio", None) is not None:  # type: ignore[typeddict-item]  # `apply_chat_template` passes None
            raise ValueError(NO_AUDIO)
        if images is None and text is None and videos is None:
            raise ValueError("Nothing to process: pass `text`, `images` or `videos`.")
        texts = None if text is None else _as_texts(text)
        flat_images, images_per_sample = _flatten_images(images)
        flat_videos = [] if videos is None else flatten_videos(videos)
        videos_per_sample = [len(sample or []) for sample in videos] if is_nested(videos) else None
        if texts is not None:
            _check_counts("image", IMAGE_TOKEN, texts, len(flat_images), images_per_sample)
            _check_counts("video", VIDEO_TOKEN, texts, len(flat_videos), videos_per_sample)

        options: dict[str, Any] = self._merge_kwargs(
            self.valid_processor_kwargs,  # type: ignore[arg-type]
            tokenizer_init_kwargs=self.tokenizer.init_kwargs,
            **kwargs,
        )
        text_options = options["text_kwargs"]
        begin = self.tokenizer.bos_token
        if texts is not None and begin is not None and all(text.startswith(begin) for text in texts):
            text_options.setdefault("add_special_tokens", False)  # a chat template has written the bos token
        return_tensors = text_options.pop("return_tensors", None)
        return_mm_token_type_ids = text_options.pop("return_mm_token_type_ids", False)
        return_offsets = text_options.pop("return_text_replacement_offsets", False)

        media: dict[str, Any] = {}
        metadata: list[CrossLMMVideoMetadata] = []
        num_frames: list[int] = []
        if flat_images:
            media |= self._image_inputs(flat_images, options)
        if flat_videos:
            in_one_sample = [flat_videos]  # see `is_nested`
            video_options = options["videos_kwargs"] | {"return_metadata": True, "return_tensors": "pt"}
            if encode_with is None:
                media |= self.video_processor(in_one_sample, **video_options)
                metadata, num_frames = media.pop("video_metadata"), media["video_num_frames"].tolist()
                height, width = media["pixel_values_videos"].shape[-2:]
                patch_grid = (height // self.patch_size, width // self.patch_size)
            else:
                chunk_size = encode_with.config.vision_chunk_size
                streams = self.video_processor.stream(in_one_sample, chunk_size=chunk_size, **video_options)
                encoded_videos = join_media([encode_video(encode_with, stream) for stream in streams])
                media["mm_encoder_outputs"] = {"video": encoded_videos}
                metadata, num_frames = [s.metadata for s in streams], [s.num_frames for s in streams]
                patch_grid = (encode_with.config.patch_grid_size,) * 2
            for video in metadata:
                video.patch_grid = patch_grid
                video.pooled_grid = (self.pooled_grid_size, self.pooled_grid_size)
                video.pooling_mode = self.pooling_mode

        encoded = BatchFeature()
        if texts is not None:
            expanded, offsets = self._expand(
                texts,
                num_frames,
                metadata,
                say_times=time_instruction,
                add_timestamps=add_timestamps,
                count_by_fps=options["videos_kwargs"].get("fps"),
            )
            encoded.update(self.tokenizer(expanded, **text_options))
            self._check_special_mm_tokens(expanded, encoded, modalities=["image", "video"])
            if return_offsets:
                encoded["text_replacement_offsets"] = offsets
            if return_mm_token_type_ids:
                encoded["mm_token_type_ids"] = self.create_mm_token_type_ids(encoded["input_ids"])
            self._locate_frames(texts, num_frames, metadata, encoded["input_ids"])
        if metadata and options["videos_kwargs"].get("return_metadata", self.video_processor.return_metadata):
            media["video_metadata"] = metadata
        return BatchFeature(
            {**encoded, **media}, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion
        )

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        load_audio_from_video: bool = False,
        sanitize_control_tokens: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Renders one chat or a list of chats as text, ids (`tokenize`) or model inputs (`return_dict`).

        Content is a string or a list of parts `{"type": "text", "text": …}`, `{"type": "video", "video" | "path" |
        "url" | "base64" | "bytes" | "array": …}`, the same with "image"; keys that are None count as absent. A video
        part can have sampling options of its own (`VIDEO_OPTIONS`), which override `processor_kwargs`.
        sanitize_control_tokens: which tokens are ordinary characters in a chat's texts. None: `MARKS`, the tokenizer's
        own special tokens (end, padding and so on) and tokens that the chat template writes; others, such as those
        added by a user, stay tokens. True: all special tokens too. False: none. What is not special, such as
        `<think>`, stays a token in the assistant's texts, because the assistant writes it.
        load_audio_from_video: has no effect; servers set it for every model.
        """
        if not isinstance(conversation, list | tuple) or not conversation:
            raise ValueError("A chat is a list of messages, at least one; a batch is a list of chats.")
        if "audio" in {**kwargs, **(kwargs.get("processor_kwargs") or {})}:
            raise ValueError(NO_AUDIO)
        everywhere, elsewhere = self._tokens_to_escape(chat_template, sanitize_control_tokens)
        own, others = TextEscape(everywhere), TextEscape(everywhere | elsewhere)

        def escaped(message: Mapping[str, Any]) -> dict[str, Any]:
            return (own if message.get("role") == "assistant" else others).message(message)

        if isinstance(conversation[0], Mapping):
            conversation = [escaped(message) for message in conversation]
        else:
            conversation = [[escaped(message) for message in getattr(chat, "messages", chat)] for chat in conversation]
        if "texts_are_escaped" in self._template_text(chat_template):  # other templates lack this variable
            kwargs["texts_are_escaped"] = True
        options = kwargs.get("processor_kwargs") or {}
        if kwargs.get("tokenize") and "add_special_tokens" not in options.get("text_kwargs", {}):
            # As in a tokenizer's own `apply_chat_template`: the template writes all special tokens.
            kwargs["processor_kwargs"] = {"add_special_tokens": False} | options
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def _template_text(self, chat_template: str | None) -> str:
        """The chat template with this name, the default one, or the given text itself."""
        named = (self.chat_template or {}) if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        return named.get(chat_template or "default", chat_template) or ""

    def _tokens_to_escape(
        self, chat_template: str | None, sanitize_control_tokens: bool | None
    ) -> tuple[set[str], set[str]]:
        """The tokens to escape in all texts, and those to escape in texts that are not the assistant's; see
        `apply_chat_template`. Looked up for each call, to include tokens added later."""
        if sanitize_control_tokens is False:
            return set(), set()
        added = self.tokenizer.added_tokens_decoder.values()
        written = self._template_text(chat_template)
        special = {
            *MARKS,
            *(value for value in self.tokenizer.special_tokens_map.values() if isinstance(value, str)),
            *(t.content for t in added if t.special and (sanitize_control_tokens or t.content in written)),
        }
        return special, {token.content for token in added if token.content in written}

    def _make_marks_escapable(self) -> None:
        """Adds a normaliser to the tokenizer that drops `ESCAPE` after the search for special tokens."""
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"CrossLMM needs a tokenizer with a `tokenizers` backend; got {type(self.tokenizer).__name__}."
            )
        added = self.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        missing = [mark for mark in MARKS if mark not in special]
        if missing:
            raise ValueError(
                f"The tokenizer must have the special tokens {', '.join(MARKS)}; it lacks {', '.join(missing)}. Use a "
                "Qwen2.5 tokenizer, or add them with `add_special_tokens` and give the model their ids."
            )
        backend = self.tokenizer.backend_tokenizer
        if backend.normalizer is None or backend.normalizer.normalize_str(ESCAPE):
            drop = normalizers.Replace(ESCAPE, "")
            steps = [drop] if backend.normalizer is None else [drop, backend.normalizer]
            backend.normalizer = normalizers.Sequence(steps)
        escaped_ids = self.tokenizer(TextEscape(MARKS).value("".join(MARKS)), add_special_tokens=False)["input_ids"]
        written = [mark for mark in MARKS if self.tokenizer.convert_tokens_to_ids(mark) in escaped_ids]
        if written:
            raise ValueError(
                f"The tokenizer finds {', '.join(written)} in normalised text, so a chat's text could write them. "
                "Add them with `normalized=False`."
            )

    def _image_inputs(self, images: list[Any], options: dict[str, Any]) -> BatchFeature:
        image_options = options["images_kwargs"]
        reading = {
            "layout": image_options.get("input_data_format"),
            "do_rescale": image_options.get("do_rescale", self.image_processor.do_rescale),
            "limits": options["videos_kwargs"].get("limits") or self.video_processor.limits or DEFAULT_LIMITS,
        }
        arrays = [picture_pixels(image, **reading).numpy() for image in images]
        fixed = {"return_tensors": "pt", "input_data_format": "channels_first"}
        return self.image_processor(arrays, **image_options | fixed)

    def _expand(
        self,
        texts: list[str],
        num_frames: list[int],
        metadata: list[CrossLMMVideoMetadata],
        *,
        say_times: bool | None = None,
        add_timestamps: bool | None = None,
        count_by_fps: float | None = None,
    ) -> tuple[list[str], list[list[dict[str, Any]]]]:
        """Expands placeholders to one per token; returns the texts and, for each, the replaced `span` and `new_span`.

        say_times, add_timestamps: None for the processor's own setting.
        """
        say_times = self.time_instruction if say_times is None else say_times
        add_timestamps = self.add_timestamps if add_timestamps is None else add_timestamps
        videos = iter(zip(num_frames, metadata, strict=True))
        expanded, offsets = [], []
        for text in texts:
            pieces: list[str] = []
            replaced: list[dict[str, Any]] = []
            length = last = 0
            for match in PLACEHOLDER.finditer(text):
                token, end_mark = match.group(1), match.group(2) or ""
                if token == IMAGE_TOKEN:
                    replacement = token * self.tokens_per_frame + end_mark
                else:
                    frames, video = next(videos)
                    stamps = _timestamps(frames, video, count_by_fps) if add_timestamps else [""] * frames
                    replacement = "".join(stamp + token * self.tokens_per_frame for stamp in stamps) + end_mark
                    replacement += _time_instruction(frames, video) if say_times else ""
                pieces += [text[last : match.start()], replacement]
                length += match.start() - last + len(replacement)
                last = match.end()
                replaced.append({"span": match.span(), "new_span": (length - len(replacement), length)})
            expanded.append("".join([*pieces, text[last:]]))
            offsets.append(replaced)
        return expanded, offsets

    def _locate_frames(
        self,
        texts: list[str],
        num_frames: list[int],
        metadata: list[CrossLMMVideoMetadata],
        input_ids: list[list[int]],
    ) -> None:
        videos = iter(zip(num_frames, metadata, strict=True))
        for row, (text, ids) in enumerate(zip(texts, input_ids, strict=True)):
            positions = [position for position, token_id in enumerate(ids) if token_id == self.video_token_id]
            starts = iter(positions[:: self.tokens_per_frame])
            for _ in range(text.count(VIDEO_TOKEN)):
                frames, video = next(videos)
                video.sample_index = row
                video.token_spans = [(start, start + self.tokens_per_frame) for start in islice(starts, frames)]


def _timestamps(num_frames: int, video: CrossLMMVideoMetadata, count_by_fps: float | None) -> list[str]:
    times = video.frame_times
    if times is None and count_by_fps is not None:
        if not 0 < count_by_fps < math.inf:
            raise ValueError(f"`fps` must be a positive number; got {count_by_fps}.")
        warnings.warn(
            f"The times of {num_frames} frames are not known; they are counted by `fps`={count_by_fps:g}. Pass "
            "`video_metadata` with `fps` to set the true rate.",
            stacklevel=4,
        )
        times = [number / count_by_fps for number in range(num_frames)]
    if times is None:
        raise ValueError(
            "`add_timestamps` needs the time of each frame; got frames without a frame rate. Pass "
            "`video_metadata` with `fps`, or leave the timestamps out."
        )
    return [timestamp(seconds) for seconds in times]


def timestamp(seconds: float) -> str:
    """What `add_timestamps` writes before a frame."""
    return f"<{seconds:.1f} seconds>"


class TextEscape:
    """Escapes these tokens in a chat's texts, also where a token spans neighbouring texts."""

    def __init__(self, tokens: Iterable[str]) -> None:
        longest_first = sorted(tokens, key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) matches nothing

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Drops entries that are None from a message, checks its parts and escapes its texts."""
        return {
            key: self._content(value) if key == "content" and isinstance(value, list | tuple) else self.value(value)
            for key, value in message.items()
            if value is not None
        }

    def value(self, value: Any) -> Any:
        """Escapes all strings in a value."""
        if isinstance(value, str):
            return self._texts([value])[0]
        if isinstance(value, Mapping):
            return {key: self.value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        return value

    def _content(self, parts: Sequence[Any]) -> list[dict[str, Any]]:
        prepared: list[dict[str, Any]] = []
        for is_text, run in groupby(map(_prepared_part, parts), key=lambda part: part["type"] == "text"):
            if is_text:  # escaped together, because a token can span two parts
                prepared += [{"type": "text", "text": text} for text in self._texts([part["text"] for part in run])]
            else:
                prepared += map(_media_part, run)
        return prepared

    def _texts(self, texts: list[str]) -> list[str]:
        joined = _checked("".join(texts))
        places = [match.start() + 1 for match in self._tokens.finditer(joined)]
        pieces = [joined[start:end] for start, end in pairwise([0, *places, len(joined)])]
        ends = [end + bisect_left(places, end) for end in accumulate(map(len, texts))]
        escaped = ESCAPE.join(pieces)
        return [escaped[start:end] for start, end in pairwise([0, *ends])]


def _time_instruction(num_frames: int, video: CrossLMMVideoMetadata) -> str:
    if video.frame_times is None or video.duration is None:
        raise ValueError(
            "`time_instruction` needs the time of each frame; got frames without a frame rate. Pass "
            "`video_metadata` with `fps`, or leave the instruction out."
        )
    moments = ", ".join(f"{seconds:.1f}" for seconds in video.frame_times)
    return f"\nThe video lasts {video.duration:.1f} seconds. Seen of it: {num_frames} frames, at seconds {moments}.\n"


def _prepared_part(part: Any) -> dict[str, Any]:
    """Converts a message part to {"type": "text", "text": …} or {"type": …, source: …, option: …}, without None.

    Raises ValueError for anything else, so that no option is ignored.
    """
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise ValueError(f"A part of a message is a string or an object; got {type(part).__name__}.")
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.pop("type", None) or next((name for name in ("text", "video", "image") if name in part), None)
    if kind in ("image_url", "video_url"):  # OpenAI's names
        source = part.pop(kind, {})
        part |= dict(source) if isinstance(source, Mapping) else {"url": source}
        kind = kind.removesuffix("_url")
        if kind == "image":
            part.pop("detail", None)  # the resolution; here there is only one
    if kind == "text":
        text = part.get("text", "")
        if not isinstance(text, str):
            raise ValueError(f"The `text` of a part of a message must be a string; got {type(text).__name__}.")
        return {"type": "text", "text": text}
    if kind not in ("video", "image"):
        raise ValueError(f"The `type` of a part of a message must be text, image or video; got {repr(kind)[:40]}.")
    if part.pop("text", ""):
        raise ValueError(f"A part of a message is text or {kind}; got both. Split it into parts.")
    source_in(part, kind, VIDEO_OPTIONS if kind == "video" else ())
    return {"type": kind} | part


def _media_part(part: dict[str, Any]) -> dict[str, Any]:
    """Moves a part's source and options under the key where Transformers looks for the source."""
    kind = part["type"]
    said = {key: value for key, value in part.items() if key != "type"}
    return {"type": kind, kind: said} if said else part


def _as_texts(text: Any) -> list[str]:
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list | tuple) or not all(isinstance(sample, str) for sample in texts):
        raise ValueError(f"`text` must be a string or a list of strings; got {type(text).__name__}.")
    return list(map(_checked, texts))


def _checked(text: str) -> str:
    """Raises ValueError for half a surrogate pair, such as JSON can hold: tokenizers would raise TypeError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"A text must be Unicode; character {error.start} is half a surrogate pair. Leave it out, or decode the "
            'text with `errors="replace"`.'
        ) from None
    return text


def _flatten_images(images: Any) -> tuple[list[Any], list[int] | None]:
    """Flattens images to a list; also returns the number per sample if they are given per sample."""
    if images is None:
        return [], None
    if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
        images = list(images)
    if not isinstance(images, list | tuple):
        images = [images]
    counts = None
    if images and all(sample is None or isinstance(sample, list | tuple) for sample in images):
        counts = [len(sample or []) for sample in images]
        images = [image for sample in images for image in sample or []]
    return list(images), counts


def _check_counts(kind: str, token: str, texts: list[str], num_media: int, per_sample: list[int] | None) -> None:
    """Raises ValueError unless there is one placeholder per medium: in total or, for media per text, in each text."""
    if per_sample is not None and len(per_sample) != len(texts):
        raise ValueError(
            f"`{kind}s` has {len(per_sample)} lists for {len(texts)} texts. Pass one list per text, empty if the text "
            f"has no {kind}, or a flat list."
        )
    placeholders = [text.count(token) for text in texts]
    if sum(placeholders) != num_media or (per_sample is not None and placeholders != per_sample):
        counts = f"; per text {placeholders} and {per_sample}" if per_sample is not None else ""
        raise ValueError(
            f"`text` has {sum(placeholders)} {token} for {num_media} {kind}s{counts}. Write one {token} for each "
            f"{kind}, in order, or use `apply_chat_template`."
        )
