"""Processes a request's text and media for vLLM: tokens with expanded placeholders, and pixels."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers import BatchFeature
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict, MultiModalInput
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import (
    ImageProcessorItems,
    MultiModalDataItems,
    MultiModalDataParser,
    VideoProcessorItems,
)
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
    TimingContext,
)

from ...frames_crosslmm import SAMPLING_KWARGS
from ...processing_crosslmm import CrossLMMProcessor
from .media import most_frames


class VideosWithMetadata(VideoProcessorItems):
    """Videos that keep their metadata, which say when frames were taken and that decoded videos are sampled already.

    vLLM's own lose them in its cache of processed media, and hash only those of files.
    """

    def get(self, index: int) -> Any:
        frames, about = super().get(index), self.metadata[index]
        return (frames, about) if about else frames

    def get_item_for_hash(self, index: int) -> Any:
        return self.data[index], self.metadata[index]


class CrossLMMDataParser(MultiModalDataParser):
    def _parse_image_data(self, data: Any) -> Any:
        """Pictures as they are, upright. vLLM would put transparent ones on white and cut 16 bits to 8."""
        given = [data] if isinstance(data, Image.Image) else data
        if not isinstance(given, list | tuple) or not any(isinstance(item, Image.Image) for item in given):
            return super()._parse_image_data(data)
        return ImageProcessorItems(
            [ImageOps.exif_transpose(item) if isinstance(item, Image.Image) else item for item in given]
        )

    def _parse_video_data(self, data: Any) -> Any:
        items = super()._parse_video_data(data)
        return VideosWithMetadata(items.data, items.metadata) if isinstance(items, VideoProcessorItems) else items


class CrossLMMProcessingInfo(BaseProcessingInfo):
    def get_data_parser(self) -> MultiModalDataParser:
        return CrossLMMDataParser()

    def get_hf_processor(self, **kwargs: object) -> CrossLMMProcessor:
        """The checkpoint's processor, without the options of a request. Raises ValueError if it writes times into
        prompts, which vLLM would leave out."""
        processor = self.ctx.get_hf_processor(CrossLMMProcessor)
        if processor.time_instruction or processor.add_timestamps:
            raise ValueError(
                "In vLLM, `time_instruction` and `add_timestamps` of the processor must be off. Serve the checkpoint "
                "with `crosslmm serve`, or save its processor without them."
            )
        return processor

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None, "video": None}

    def most_frames(self, seq_len: int) -> int:
        processor = self.get_hf_processor()
        frames = most_frames(self.ctx.model_config, processor.video_processor)
        return max(1, min(frames, seq_len // processor.tokens_per_frame))

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        per_frame = self.get_hf_processor().tokens_per_frame
        return {"image": per_frame, "video": per_frame * self.most_frames(seq_len)}


class CrossLMMDummyInputs(BaseDummyInputsBuilder[CrossLMMProcessingInfo]):
    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        processor = self.info.get_hf_processor()
        return processor.image_token * mm_counts.get("image", 0) + processor.video_token * mm_counts.get("video", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        size = self.info.get_hf_processor().video_processor.size
        video = np.zeros((self.info.most_frames(seq_len), size.height, size.width, 3), dtype=np.uint8)
        return {
            "image": [Image.new("RGB", (size.width, size.height))] * mm_counts.get("image", 0),
            "video": [video] * mm_counts.get("video", 0),
        }


class CrossLMMMultiModalProcessor(BaseMultiModalProcessor[CrossLMMProcessingInfo]):
    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """Tokens and media of a request. Raises ValueError if they do not fit, before vLLM's caches know of the media.

        A client's `uuid` is no key of the caches: with one of its choice it would see or replace another's media.
        """
        processor = self.info.get_hf_processor()
        for modality, token in (("image", processor.image_token_id), ("video", processor.video_token_id)):
            media = inputs.mm_data_items[modality].get_all() if modality in inputs.mm_data_items else []
            if any(item is None for item in media):
                raise ValueError(f"Every {modality} must be sent, also if it has a `uuid`.")
            if (marks := inputs.prompt.count(token)) != len(media):
                raise ValueError(f"A prompt needs one mark for each {modality}; got {marks} for {len(media)}.")
        found = super().apply(replace(inputs, mm_uuid_items=None), timing_ctx)
        if len(found["prompt_token_ids"]) >= self.info.ctx.model_config.max_model_len and inputs.cache is not None:
            # vLLM refuses the request, but notes its media as known to the engine: the next about them would fail.
            for known in found["mm_hashes"].values():
                for one in known:
                    inputs.cache.invalidate(one)
        return found

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        """Pixels of the media. Raises ValueError for options of a request that do not choose frames, or come too
        late."""
        options = self.info.ctx.get_merged_mm_kwargs(hf_kwargs)
        if unknown := sorted(options.keys() - set(SAMPLING_KWARGS)):
            raise ValueError(
                f"`mm_processor_kwargs` of a CrossLMM are {', '.join(SAMPLING_KWARGS)}; got {', '.join(unknown)[:80]}."
            )
        given = [video for video in hf_data.get("videos", []) if isinstance(video, tuple)]  # type: ignore[attr-defined]
        if options and any(about.get("do_sample_frames") is False for _, about in given):
            raise ValueError(
                "`mm_processor_kwargs` choose among frames in memory; a decoded video is sampled already. Pass "
                f'`media_io_kwargs={{"video": {{...}}}}` instead; got {", ".join(sorted(options))}.'
            )
        features = self.info.get_hf_processor()(**hf_data, return_tensors="pt", videos_kwargs=options)
        if (shown := features.pop("video_frame_index", None)) is not None:  # vLLM needs unchanged frames too
            features["pixel_values_videos"] = features["pixel_values_videos"][shown]
        return features

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = {"pixel_values": MultiModalFieldConfig.batched("image")}
        if "video_num_frames" in hf_inputs:
            sizes = hf_inputs["video_num_frames"]
            fields["pixel_values_videos"] = MultiModalFieldConfig.flat_from_sizes("video", sizes)
            fields["video_num_frames"] = MultiModalFieldConfig.batched("video", keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        processor = self.info.get_hf_processor()
        image, video, per_frame = processor.image_token_id, processor.video_token_id, processor.tokens_per_frame

        def tokens_of_video(number: int) -> list[int]:
            frames: Any = out_mm_kwargs["video"][number]["video_num_frames"].data
            return [video] * (per_frame * int(frames))

        return [
            PromptReplacement("image", target=[image], replacement=[image] * per_frame),
            PromptReplacement("video", target=[video], replacement=tokens_of_video),
        ]
