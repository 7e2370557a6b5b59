"""An untrusted video for several conversations: decoded in a separate process, prefilled once, forked for each.

POSIX only, as isolated decoding is.
"""

import copy
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from ..frames_crosslmm import read_file
from ..modeling_crosslmm import CrossLMMForConditionalGeneration
from ..processing_crosslmm import CrossLMMProcessor
from ..video_decoding import VideoLimits
from ..video_processing_crosslmm import VideoStream, _distinct_frames, _resize
from .conversation import VideoConversation

LIMITS = VideoLimits(max_decode_seconds=900.0)
"""Limits of decoding one video in its worker process; if they are exceeded, its questions get the error."""

VIDEO_FAILURES = (ValueError, MemoryError, torch.OutOfMemoryError)
"""Errors of an unusable or too long video or question. Any other error is a fault of program or machine."""


class IsolatedStream(VideoStream):
    """The stream of `CrossLMMVideoProcessor` for an untrusted file, decoded in a separate process under `limits`.

    source: a path, or an open file. sampling: as for `read_video`. Raises ValueError for options that fit no video.
    """

    def __init__(
        self, processor: CrossLMMProcessor, source: Any, *, limits: VideoLimits = LIMITS, **sampling: Any
    ) -> None:
        video_processor = processor.video_processor
        [checked] = video_processor.stream([source], **sampling)
        wanted = video_processor._sampling(**sampling)
        resize = partial(_resize, size=video_processor.size, resample=video_processor.resample)
        read = partial(read_file, source, wanted, resize, 16, strict=False, limits=limits, isolated=True)
        super().__init__(source, partial(_distinct_frames, read, video_processor.skip_unchanged), checked._finish)
        read()  # checks the options; the file is opened when the first frame is requested


@torch.no_grad()
def prefill(model: CrossLMMForConditionalGeneration, token_ids: list[int], media: Any) -> DynamicCache:
    """Creates a cache filled with the tokens and their encoded media (as for `mm_encoder_outputs`)."""
    cache = DynamicCache()
    ids = torch.tensor([token_ids], device=model.device)
    model(input_ids=ids, mm_encoder_outputs=media, cache=cache, use_cache=True, logits_to_keep=1)
    return cache


class PrefilledVideo(VideoConversation):
    """A video with a cache filled up to its end; each `fork` starts a new chat from there and shares the patches.

    Raises ValueError, before encoding, if the expected frames do not fit the context.
    """

    def __init__(
        self, model: CrossLMMForConditionalGeneration, processor: CrossLMMProcessor, video: VideoStream
    ) -> None:
        super().__init__(model, processor, video)
        parts = [{"type": "video", "video": video.source}, {"type": "text", "text": "?"}]
        ids = super()._new_ids({"role": "user", "content": parts})
        video_token_id: Any = processor.video_token_id
        self.prefix = ids[: len(ids) - ids[::-1].index(video_token_id)]
        self.cache, self._media = prefill(model, self.prefix, self._media), None

    def fork(self) -> "PrefilledVideo":
        """Starts a new conversation about the same video."""
        twin = copy.copy(self)
        twin.messages, twin.token_ids, twin.cache = [], [], copy.deepcopy(self.cache)
        return twin

    def _new_ids(self, turn: dict[str, Any]) -> list[int]:
        ids = super()._new_ids(turn)
        if not self.messages and ids[: len(self.prefix)] != self.prefix:
            raise ValueError(
                "A prefilled video needs a chat template that writes the same text up to the end of the video for "
                "every question; this one does not. Use CrossLMM's own."
            )
        return ids


__all__ = ["LIMITS", "VIDEO_FAILURES", "IsolatedStream", "PrefilledVideo", "prefill"]
