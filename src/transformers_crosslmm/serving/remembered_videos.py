"""The cache of `crosslmm serve`: several questions about one video share its encoding and its prefill."""

import copy
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache
from transformers.generation import LogitsProcessor, StoppingCriteria

from ..asking.answer_text import AnswerText
from ..asking.conversation import end_token_ids
from ..asking.prefilled import prefill
from ..frames_crosslmm import CrossLMMVideoMetadata
from ..media_crosslmm import CrossLMMEncodedMedia, encode_video, join_media
from ..modeling_crosslmm import CrossLMMForConditionalGeneration
from ..processing_crosslmm import CrossLMMProcessor
from .admission import RefusedError, Visit


@dataclass(frozen=True)
class SampledVideo:
    """A video with the sampling that a request asks for.

    key: digest of its bytes, and the sampling. pixels: (T, 3, S, S) uint8, or None when they are encoded in `media`.
    """

    key: Hashable
    metadata: CrossLMMVideoMetadata
    pixels: torch.Tensor | None = None
    media: CrossLMMEncodedMedia | None = None

    @property
    def num_frames(self) -> int:
        return len(self.metadata.frames_indices or ())


class BoundedCache:
    """A thread-safe cache of tensors by key; the least recently used are dropped first.

    A key must contain everything that its value depends on, because clients share the values.
    """

    def __init__(self, *, max_bytes: int, max_entries: int) -> None:
        self.max_bytes, self.max_entries = max_bytes, max_entries
        self.num_bytes = 0
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Any:
        """The value of a key, or None."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: Hashable, value: Any, num_bytes: int) -> None:
        """Keeps a value, unless it alone exceeds the limit."""
        with self._lock:
            self._drop(key)
            if num_bytes > self.max_bytes or self.max_entries < 1:
                return
            self._entries[key] = value, num_bytes
            self.num_bytes += num_bytes
            while self.num_bytes > self.max_bytes or len(self._entries) > self.max_entries:
                self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.num_bytes = 0

    def _drop(self, key: Hashable) -> None:
        if key in self._entries:
            self.num_bytes -= self._entries.pop(key)[1]


def tensor_bytes(value: Any) -> int:
    """Memory of all tensors in an object, each storage once. Modules are the model's and are not counted."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    left = [value]
    while left:
        item = left.pop()
        if id(item) in seen or isinstance(item, torch.nn.Module):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, Mapping):
            left += item.values()
        elif isinstance(item, list | tuple):
            left += item
        elif hasattr(item, "__dict__") and not isinstance(item, type):
            left += vars(item).values()
    return sum(storages.values())


@dataclass(frozen=True)
class Question:
    """A question for the model: its request, its tokens and the videos in them.

    seed: for drawing tokens. penalties: OpenAI's, of frequency and presence. options: for `generate`.
    """

    visit: Visit
    token_ids: list[int]
    videos: list[SampledVideo]
    seed: int | None
    penalties: tuple[float, float]
    options: dict[str, Any]


class _Wanted(StoppingCriteria):
    """Stops an answer at its stop string. Raises what `Visit.check` raises."""

    def __init__(self, visit: Visit, text: AnswerText) -> None:
        self.visit, self.text = visit, text

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.visit.check()
        return torch.full((len(input_ids),), self.text.is_stopped, device=input_ids.device)


class _Penalties(LogitsProcessor):
    """OpenAI's penalties: the logit of a token that occurs n > 0 times loses n · frequency + presence."""

    def __init__(self, prompt_length: int, frequency: float, presence: float) -> None:
        self.prompt_length, self.frequency, self.presence = prompt_length, frequency, presence

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        written = input_ids[:, self.prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, written, torch.ones_like(written, dtype=scores.dtype))
        return scores - counts * self.frequency - counts.clamp(max=1) * self.presence


class RememberingModel:
    """The model with the cache; it answers one question at a time.

    A video is encoded once, and everything up to the end of the last video is prefilled once. Each question continues
    in a copy of that cache, which shares the visual memory.
    """

    def __init__(
        self, model: CrossLMMForConditionalGeneration, processor: CrossLMMProcessor, cache: BoundedCache, metrics: Any
    ) -> None:
        self.model, self.processor, self.cache, self.metrics = model, processor, cache, metrics
        self.end_token_ids = end_token_ids(model, processor)

    @torch.no_grad()
    def write(self, question: Question, text: AnswerText) -> str:
        """Writes the answer into `text` and returns OpenAI's `finish_reason`. Raises what `Visit.check` raises, and
        RefusedError for what the model refuses."""
        question.visit.check()
        ids = torch.tensor([question.token_ids], device=self.model.device)
        try:
            past = self._prefilled(question) if question.videos else None
            if question.seed is not None:
                torch.manual_seed(question.seed)
            written = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                cache=past,
                streamer=text,
                stopping_criteria=[_Wanted(question.visit, text)],
                logits_processor=[_Penalties(ids.shape[1], *question.penalties)] if any(question.penalties) else [],
                eos_token_id=self.end_token_ids,
                pad_token_id=self.processor.tokenizer.pad_token_id,
                **question.options,
            )
        except ValueError as error:
            raise RefusedError(400, str(error)) from error
        except torch.OutOfMemoryError:
            self.cache.clear()
            torch.cuda.empty_cache()
            raise
        self.metrics.tokens.inc(text.num_tokens)
        return "stop" if text.is_stopped or int(written[0, -1]) in self.end_token_ids else "length"

    def _prefilled(self, question: Question) -> DynamicCache:
        """A copy of the cache that is prefilled up to the end of the last video."""
        video_token_id = self.model.config.video_token_id
        prefix = question.token_ids[: len(question.token_ids) - question.token_ids[::-1].index(video_token_id)]
        key = "prefix", tuple(prefix), tuple(video.key for video in question.videos)
        known = self.cache.get(key)
        self.metrics.lookups.labels("prefix", "hit" if known else "miss").inc()
        if known is None:
            media = [self._encoded(video, question.visit) for video in question.videos]
            question.visit.check()
            known = prefill(self.model, prefix, {"video": join_media(media)})
            self.cache.put(key, known, tensor_bytes(known))
        return copy.deepcopy(known)

    def _encoded(self, video: SampledVideo, visit: Visit) -> CrossLMMEncodedMedia:
        known = self.cache.get(video.key)
        media = (known or video).media
        self.metrics.lookups.labels("video", "miss" if media is None else "hit").inc()
        if media is None:
            assert video.pixels is not None
            [frames] = self.processor.video_processor.stream(
                [video.pixels], do_sample_frames=False, input_data_format="channels_first"
            )
            media = encode_video(self.model, frames, on_progress=lambda done, total: visit.check())
            self.metrics.frames.inc(len(media.last_hidden_state))  # type: ignore[arg-type]
        if known is None:
            self.cache.put(video.key, replace(video, pixels=None, media=media), tensor_bytes(media))
        return media


__all__ = ["BoundedCache", "Question", "RememberingModel", "SampledVideo"]
