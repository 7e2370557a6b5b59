"""Untrusted videos of requests, by path, URL or data URI, decoded in isolated processes."""

import hashlib
import os
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, BinaryIO

import torch

from ..asking.allowed_files import SHORTAGES, NotAllowedError, open_below
from ..frames_crosslmm import SAMPLING_KWARGS, CrossLMMVideoMetadata, FrameSampling, frame_chunk
from ..processing_crosslmm import CrossLMMProcessor
from ..video_decoding import VideoError, VideoLimits, decode_video, open_source
from ..video_processing_crosslmm import _resize
from ..video_source import OnWait, file_named_by
from .admission import RefusedError, ServerSettings, Visit, busy
from .chat_request import shortened
from .remembered_videos import BoundedCache, SampledVideo


class VideoReader:
    """Decodes the videos of requests, unless they are in the cache."""

    def __init__(self, settings: ServerSettings, processor: CrossLMMProcessor, cache: BoundedCache) -> None:
        self.processor, self.cache = processor.video_processor, cache
        self.folders = [folder.resolve(strict=True) for folder in settings.allowed_folders]
        self.max_frames = settings.max_frames or self.processor.max_frames
        self.limits = VideoLimits(
            max_bytes=settings.max_video_bytes,
            max_frames=self.max_frames,
            max_decode_seconds=settings.decode_seconds,
            max_memory_bytes=settings.decoder_bytes,
            allow_private_addresses=settings.allow_private_urls,
        )

    def sampling(self, asked: dict[str, Any]) -> FrameSampling:
        """A request's options (`SAMPLING_KWARGS`) with the checkpoint's defaults. Raises RefusedError."""
        try:
            sampling = self.processor._sampling(**asked)
        except ValueError as error:
            raise RefusedError(400, f"`chat_template_kwargs`: {error}", code="invalid_value") from error
        self.check_frames(max(sampling.num_frames or 0, asked["max_frames"] or 0, len(sampling.times or ())))
        if sampling.max_frames is not None:
            sampling = replace(sampling, max_frames=min(sampling.max_frames, self.max_frames))
        return sampling

    def check_frames(self, count: int) -> None:
        """Raises RefusedError if a request has too many frames."""
        if count > self.max_frames:
            raise RefusedError(
                400,
                f"The videos of a request may have {self.max_frames} frames together; got {count}. Ask for fewer.",
                code="invalid_value",
            )

    def read(self, url: str, sampling: FrameSampling, visit: Visit) -> SampledVideo:
        """Decodes a video, or takes it from the cache if its bytes and the sampling are the same. Raises RefusedError,
        and what `Visit.check` raises."""
        try:
            with self._opened(url, visit.check) as file:
                version = _version(file)
                digest = hashlib.sha256()
                while piece := file.read(2**20):
                    visit.check()
                    digest.update(piece)
                key = digest.hexdigest(), repr(sampling)
                known = self.cache.get(key)
                if known is not None:
                    return known
                pixels, metadata = self._decoded(file, sampling, visit)
                if _version(file) != version:
                    raise RefusedError(400, "The video changed while it was read. Ask again when it is complete.")
        except ValueError as error:
            raise _refused(error) from error
        return SampledVideo(key, metadata, pixels)

    @contextmanager
    def _opened(self, url: str, on_wait: OnWait) -> Iterator[BinaryIO]:
        """Opens a URL, or a file in the allowed folders. Raises RefusedError for other files."""
        scheme, shown = url.partition(":")[0].lower() if ":" in url else "", shortened(url)
        if scheme in ("http", "https", "data"):
            with open_source(url, self.limits, on_wait) as file:
                yield file
            return
        if scheme == "file":
            url = file_named_by(url)
        elif not url.startswith("/"):
            raise RefusedError(
                400,
                f"A video must be an absolute path, or a URL of scheme http, https, file or data; got {shown}.",
                code="invalid_value",
            )
        try:
            named = open_below(url, self.folders)
        except NotAllowedError as error:
            raise RefusedError(
                403,
                f"Videos by path must be in a folder that this server allows; {shown} is not. Send it as a data: URL, "
                "or start the server with its folder (`--allowed-folder`).",
                code="path_not_allowed",
            ) from error
        with named, open_source(named, self.limits) as file:
            yield file

    def _decoded(
        self, file: BinaryIO, sampling: FrameSampling, visit: Visit
    ) -> tuple[torch.Tensor, CrossLMMVideoMetadata]:
        """The sampled frames, (T, 3, S, S) uint8, and their metadata."""

        def resized(frame: torch.Tensor) -> torch.Tensor:
            visit.check()
            return _resize(frame, size=self.processor.size, resample=self.processor.resample)

        try:
            video = decode_video(
                file,
                frame_transform=resized,
                limits=self.limits,
                strict=True,  # a client sees no warnings
                isolated=True,
                on_wait=visit.check,
                **{name: getattr(sampling, name) for name in SAMPLING_KWARGS},
            )
        except StopIteration:
            raise VideoError("It has no frames.") from None
        return video.frames, frame_chunk(video, None).metadata


def _refused(error: ValueError) -> RefusedError:
    """The error for a video that cannot be read, with a remedy for the client instead of the program's."""
    if isinstance(error.__cause__, OSError) and error.__cause__.errno in SHORTAGES:
        return busy("open files or processes")
    reason, _, is_limit = str(error).partition(" Pass `limits=")
    reason = reason.removesuffix(" Without `strict=True` it is marked in `valid` instead.")
    remedy = " That is a limit of this server." if is_limit else ""
    return RefusedError(400, f"The video cannot be read: {reason}{remedy}", code="invalid_video")


def _version(file: Any) -> Hashable:
    """A value that changes when a file on disk is written to. None for a source in memory."""
    try:
        about = os.fstat(file.fileno())
    except OSError:
        return None
    return about.st_size, about.st_mtime_ns


__all__ = ["VideoReader"]
