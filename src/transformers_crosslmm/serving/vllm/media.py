"""Untrusted videos and images in vLLM, fetched and decoded by the package, under its limits.

A request may name any of vLLM's decoders, so a process that serves a CrossLMM maps all names to the package's decoder.
"""

import asyncio
import os
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from vllm.config import ModelConfig
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.base import MediaIO
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader

from ...asking.allowed_files import open_below
from ...frames_crosslmm import SAMPLING_KWARGS, GivenVideo
from ...video_decoding import VideoError, decode_video
from ...video_processing_crosslmm import CrossLMMVideoProcessor, _resize
from ...video_source import VideoLimits, VideoSource, file_named_by, open_source

CONNECTOR = "crosslmm"
SERVED_LIMITS = {"max_bytes": 2**30, "max_decode_seconds": 120.0}
"""Defaults of a server that are stricter than those of `VideoLimits`."""
VLLM_FRAMES = 32
"""vLLM's default of `num_frames`, which it passes for a request that gives only `fps`."""


def serve_media_safely(model_config: ModelConfig) -> None:
    """Makes this process fetch and decode media with the package only.

    Limits are set by vLLM's `media_io_kwargs={"video": {"limits": {...}}}`, under the names of `VideoLimits`. Requests
    cannot change them.
    """
    multimodal = model_config.multimodal_config
    if multimodal is None:
        return
    said = multimodal.media_io_kwargs.setdefault("video", {})
    processor = CrossLMMVideoProcessor.from_pretrained(model_config.model, revision=model_config.revision)
    limits = VideoLimits(
        **SERVED_LIMITS | said.pop("limits", {}) | {"max_frames": most_frames(model_config, processor)}
    )
    CrossLMMVideoLoader.processor, CrossLMMVideoLoader.limits = processor, limits
    CrossLMMConnector.limits = limits
    said.setdefault("num_frames", -1)
    # Pictures as they are: the processor converts them.
    multimodal.media_io_kwargs.setdefault("image", {}).setdefault("image_mode", None)
    for name in [CONNECTOR, *VIDEO_LOADER_REGISTRY.name2class]:
        VIDEO_LOADER_REGISTRY.register(name)(CrossLMMVideoLoader)
    os.environ["VLLM_MEDIA_CONNECTOR"] = CONNECTOR
    os.environ["VLLM_MAX_IMAGE_PIXELS"] = str(limits.max_pixels)


def most_frames(model_config: ModelConfig, processor: CrossLMMVideoProcessor) -> int:
    """The most frames of a video: those of `limit_mm_per_prompt={"video": {"count": …, "num_frames": …}}`, or the
    processor's limit."""
    limit = model_config.multimodal_config.limit_per_prompt.get("video")
    return getattr(limit, "num_frames", None) or processor.num_frames or processor.max_frames


class CrossLMMVideoLoader(VideoLoader):
    """The package's decoder as vLLM's; each video is decoded in an isolated process.

    processor, limits: of the served checkpoint.
    """

    processor: CrossLMMVideoProcessor
    limits: VideoLimits

    @classmethod
    def load_bytes(
        cls, data: VideoSource, *, num_frames: int = -1, **kwargs: Any
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Decodes sampled frames (T, H, W, 3) at the encoder's size, and their metadata for vLLM.

        data: as `source` of `decode_video`. num_frames: -1 for the checkpoint's own sampling. kwargs: other
        `SAMPLING_KWARGS`. Raises ValueError for unknown ones, and VideoError for a video that cannot be read.
        """
        if unknown := sorted(kwargs.keys() - set(SAMPLING_KWARGS)):
            raise ValueError(f"A video's options are {', '.join(SAMPLING_KWARGS)}; got {', '.join(unknown)[:80]}.")
        is_default = num_frames == -1 or (num_frames == VLLM_FRAMES and "fps" in kwargs)
        asked = kwargs if is_default else kwargs | {"num_frames": num_frames}
        sampling = cls.processor._sampling_of(GivenVideo(data, None, asked), {}, do_sample_frames=True)
        assert sampling is not None
        most = cls.limits.max_frames
        if (count := max(sampling.num_frames or 0, len(sampling.times or ()))) > most:
            raise ValueError(
                f"A video may have {most} frames; got {count}. Ask for fewer, or start the server with more "
                "(`limit_mm_per_prompt`)."
            )
        if sampling.max_frames is not None:
            sampling = replace(sampling, max_frames=min(sampling.max_frames, most))
        try:
            video = decode_video(
                data,
                frame_transform=partial(_resize, size=cls.processor.size, resample=cls.processor.resample),
                limits=cls.limits,
                strict=True,  # a client sees no warnings
                isolated=True,
                **{name: getattr(sampling, name) for name in SAMPLING_KWARGS},
            )
        except StopIteration:
            raise VideoError("It has no frames.") from None
        metadata = {
            "total_num_frames": video.total_num_frames,
            "fps": video.fps,
            "duration": video.duration_seconds,
            "frames_indices": list(video.frame_indices),
            "video_backend": "pyav",
            "do_sample_frames": False,
        }
        return video.frames.permute(0, 2, 3, 1).numpy(), metadata


@MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)
class CrossLMMConnector(MediaConnector):
    """Reads paths, URLs and data URIs with the package: no way out of the allowed folder, no private addresses, no
    list of frames in place of a file, and a limited size."""

    limits = VideoLimits()

    def load_from_url(self, url: str, media_io: MediaIO, *, fetch_timeout: int | None = None) -> Any:
        scheme = url.partition(":")[0].lower()
        if scheme == "file" and self.allowed_local_media_path:
            with (
                open_below(file_named_by(url), [self.allowed_local_media_path]) as named,
                open_source(named, self.limits) as file,
            ):
                return media_io.load_bytes(file.read())
        if scheme not in ("http", "https", "data"):  # vLLM's own words
            return super().load_from_url(url, media_io, fetch_timeout=fetch_timeout)
        if scheme != "data" and self.allowed_media_domains:
            host = urlsplit(url).hostname
            if host not in self.allowed_media_domains:
                raise ValueError(f"URLs must be on {', '.join(self.allowed_media_domains)}; got {host}.")
        limits = self.limits if fetch_timeout is None else replace(self.limits, network_timeout_seconds=fetch_timeout)
        with open_source(url, limits) as file:
            return media_io.load_bytes(file.read())

    async def load_from_url_async(self, url: str, media_io: MediaIO, *, fetch_timeout: int | None = None) -> Any:
        return await asyncio.to_thread(self.load_from_url, url, media_io, fetch_timeout=fetch_timeout)
