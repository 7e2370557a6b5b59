"""A video that goes on: frames are added as they come, and questions are asked at any moment.

    live = LiveVideo(model, processor, max_frames=256)
    live.add(frames, times)  # as often as there are new ones
    live.ask("What has changed?").text

Each frame is encoded once, when it comes. With `v2v_scope="causal"` the language model sees it then too, and a
question costs what its own tokens cost. With the other scopes what it makes of a frame or a timestamp depends on later
frames, so the pooled tokens of all frames are prefilled anew with the first question after a new one.

Shapes: T frames in view, t new ones, N patches and s x s pooled tokens per frame, D vision width, C language width.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NoReturn

import torch
from transformers import DynamicCache

from ..cache_crosslmm import Medium, PooledTokens, VisualMemory, memory_in
from ..frames_crosslmm import CrossLMMVideoMetadata, FrameChunk, UnchangedFrames
from ..generation_crosslmm import PREFILL_TOKENS
from ..modeling_crosslmm import CrossLMMForConditionalGeneration
from ..processing_crosslmm import CrossLMMProcessor, timestamp
from ..video_processing_crosslmm import VideoStream
from .conversation import Answer, VideoConversation, end_token_ids

LONGEST_SECONDS = 1e7
"""Frames come before this, 115 days: no timestamp is longer, and `max_frames` of the longest fit."""
QUESTION_TOKENS = 128
"""Positions of the context that no frame takes, for a question and its answer."""


class LiveVideo(VideoConversation):
    """The frames in view, and what the model has made of them. One call at a time; others may share the model.

    max_frames: the most frames in view. One more, and the oldest quarter of them is forgotten at once: their patches
        go, and the pooled tokens of the kept ones are prefilled again, as those of a video that begins with them. So
        memory, and the mean time per frame, stay what they are for ever. None: frames are kept until the context is
        full.
    num_seen, num_forgotten: frames ever added, and those in view no more; `times` are the seconds of the rest.
    An answer equals, up to rounding, that to the same frames given at once with these times. Timestamps and the time
    instruction are written, and unchanged frames encoded and kept once, if the processor says so. A question knows
    nothing of earlier ones: what was true then may have changed.
    Raises ValueError for more frames than the context holds.
    """

    def __init__(
        self, model: CrossLMMForConditionalGeneration, processor: CrossLMMProcessor, max_frames: int | None = None
    ) -> None:
        self.model, self.processor, self.max_frames = model, processor, max_frames
        if max_frames is not None:
            if max_frames < 1:
                raise ValueError(f"`max_frames` must be at least 1; got {max_frames}.")
            self._check_room(max_frames)
        self.messages, self.token_ids, self._media = [], [], None
        self._ends = end_token_ids(model, processor)
        self.num_seen = 0
        self.forget()

    @property
    def times(self) -> list[float]:
        """Seconds of each frame in view."""
        return list(self.video.times or [])

    @property
    def num_forgotten(self) -> int:
        return self.num_seen - self.video.num_frames

    def forget(self) -> None:
        """Begins anew, without a frame; times may then begin anew too."""
        self.video = VideoStream("live", _no_pictures, _no_pictures)
        self.video.metadata = CrossLMMVideoMetadata(total_num_frames=0, frame_times=[])
        skip = self.processor.video_processor.skip_unchanged
        self._unchanged = None if skip is False else UnchangedFrames(skip)
        self._shown: list[int] = []  # for each frame in view, the number of the distinct frame that it shows
        self._original = self._pooled = torch.empty(0)  # of distinct frames, (room, N, D) and (room, s x s, C)
        self._begin_cache()

    @torch.no_grad()
    def add(self, frames: Any, times: Sequence[float]) -> int:
        """Encodes new frames, forgets old ones where they would be too many, and returns how many. Of more new ones
        than `max_frames` only the last are looked at.

        frames: (t, H, W, 3) or (t, 3, H, W), or a list of pictures. times: when each was shown, in seconds, ascending
        and later than all before.
        Raises ValueError for times that are not, for frames that the video processor refuses, and without `max_frames`
        where the context ends.
        """
        moments = [float(time) for time in times]
        if not all(a < b < LONGEST_SECONDS for a, b in pairwise([*(self.times[-1:] or [-1e-9]), *moments])):
            raise ValueError(
                f"`times` must be seconds from 0 to {LONGEST_SECONDS:g}, each later than the one before, that of the "
                f"last frame in view included; got {moments[:8]}. Call `forget` to begin anew."
            )
        if not moments or len(frames) != len(moments):
            raise ValueError(
                f"`add` takes frames, at least one, and as many times; got {len(frames)} and {len(moments)}."
            )
        if self.max_frames is not None:
            frames, moments = frames[-self.max_frames :], moments[-self.max_frames :]
        else:
            self._check_room(self.video.num_frames + len(moments))
        forgotten = self._num_to_forget(len(moments))
        unchanged = copy.copy(self._unchanged)  # so that a failure changes nothing
        if unchanged is not None and forgotten == self.video.num_frames:
            unchanged = UnchangedFrames(unchanged.level)
        first = 0 if unchanged is None else unchanged.num_distinct
        [video] = self.processor.video_processor.stream([frames], do_sample_frames=False, skip_unchanged=False)
        if unchanged is not None:
            video = VideoStream("live", partial(_without, unchanged, video._read), video._finish)
        pixels = video.pixels
        shown = range(len(moments)) if video.frame_index is None else video.frame_index
        encoded = self.model.get_video_features(pixels, return_dict=True) if len(pixels) else None
        self._forget_oldest(forgotten)
        num_distinct = self._num_distinct
        if encoded is not None:
            original = encoded.last_hidden_state.to(self.model.model.language_model.dtype)
            pooled = encoded.pooler_output[0].unflatten(0, (len(pixels), -1))
            self._original = _written(self._original, num_distinct, original, self.max_frames)
            self._pooled = _written(self._pooled, num_distinct, pooled, self.max_frames)
        self._unchanged = unchanged
        self._shown += [num_distinct + number - first for number in shown]
        self._set_times([*self.times, *moments])
        self.num_seen += len(moments)
        if self._is_causal:
            self._prefill()
        return forgotten

    @torch.no_grad()
    def ask(self, question: str, **options: Any) -> Answer:
        """Answers from the frames in view; neither the question nor its answer leaves a trace.

        options: as for `VideoConversation.ask`. What `on_text` raises, like Ctrl-C, ends the answer. Raises ValueError
        before the first frame, and for a question that is empty or too long.
        """
        if not self.video.num_frames:
            raise ValueError("There is no frame to ask about yet; `add` some first.")
        self._prefill()
        try:
            return super().ask(question, **options)
        finally:
            self._forget_behind(len(self._seen_ids))
            self.messages, self.token_ids = [], []

    @property
    def _is_causal(self) -> bool:
        return self.model.config.v2v_scope == "causal"

    def _check_room(self, num_frames: int) -> None:
        if num_frames > (most := most_frames(self.model, self.processor)):
            raise ValueError(
                f"The context of {self.model.config.max_sequence_length} positions holds {most} frames beside a "
                f"question; got {num_frames}. Give `max_frames`, at most {most}."
            )

    @property
    def _num_distinct(self) -> int:
        return self._shown[-1] + 1 if self._shown else 0

    def _num_to_forget(self, num_new: int) -> int:
        """How many of the oldest frames have to go, where new ones would be too many."""
        known = self.video.num_frames
        if self.max_frames is None or known + num_new <= self.max_frames:
            return 0
        return min(known, max(known + num_new - self.max_frames, self.max_frames // 4))

    def _forget_oldest(self, count: int) -> None:
        if not count:
            return
        self._begin_cache()
        known = self._num_distinct
        first = known if count == len(self._shown) else self._shown[count]
        for buffer in (self._original, self._pooled) if first else ():
            for start in range(first, known, first):  # so many at a time: they may be moved by fewer
                part = buffer[start : min(start + first, known)]
                buffer[start - first : start - first + len(part)] = part
        self._shown = [number - first for number in self._shown[count:]]
        self._set_times(self.times[count:])

    def _set_times(self, times: list[float]) -> None:
        self.video.num_frames = len(times)
        duration = times[-1] if times else 0.0
        self.video.metadata = CrossLMMVideoMetadata(total_num_frames=len(times), frame_times=times, duration=duration)

    def _begin_cache(self) -> None:
        self.cache = DynamicCache()
        self._seen_ids: list[int] = []  # the prompt's tokens that the cache has seen

    def _prefill(self) -> None:
        """Lets the language model see all frames: with scope "causal" those that are new, else all of them."""
        parts = [{"type": "video", "video": "live"}, {"type": "text", "text": "?"}]
        prompt = super()._new_ids({"role": "user", "content": parts})
        video_token_id: Any = self.processor.video_token_id
        prompt = prompt[: len(prompt) - prompt[::-1].index(video_token_id)]
        if prompt == self._seen_ids:
            return
        if not self._is_causal:
            self._begin_cache()
        begin, device = len(self._seen_ids), self.model.device
        ids = torch.tensor([prompt[begin:]], device=device)
        try:
            self._remember(prompt, ids == video_token_id)
            for part in ids.split(PREFILL_TOKENS, dim=1):
                self.model.model(input_ids=part, cache=self.cache, use_cache=True)
        except BaseException:  # Ctrl-C among them: layers have seen more or less of it
            self._begin_cache()
            raise
        self._seen_ids = prompt

    def _remember(self, prompt: list[int], is_new: torch.Tensor) -> None:
        """Puts all frames, those that it has seen among them, into the cache's memory, as one video.

        is_new: (1, new tokens of the prompt), where they are placeholders.
        """
        known, model = memory_in(self.cache), self.model.model
        last, (patches, _) = self.video.num_frames, self._original.shape[1:]
        first = distinct = 0
        if known is not None and known.states is not None:
            first, distinct = known.num_patches // patches, len(known.states) // patches
        new = self._original[distinct : self._num_distinct]
        _, norm = model.normalise(new, torch.arange(first, last), is_lazy=True)
        folding = {} if known is None else dict(known.folding)
        if known is not None:
            norm = norm if known.norm is None else known.norm.concat(norm)
            known.clear()
        places = [place for place, token_id in enumerate(prompt) if token_id == self.processor.video_token_id]
        memory = VisualMemory(
            form="features",  # V2V of later frames needs the patches in any case
            patches_per_frame=patches,
            tokens_per_frame=self.processor.tokens_per_frame,
            rows=[[Medium(places, (0, last * patches))]],
            states=self._original[: self._num_distinct].flatten(0, 1),
            norm=norm,
            frame_index=None if self._num_distinct == last else torch.tensor(self._shown),
            num_patches=last * patches,
            pooled=PooledTokens(
                tokens=self._pooled[self._shown[first:last]].flatten(0, 1),
                numbers=torch.where(is_new, is_new.long().cumsum(-1) - 1, -1),
                start=len(self._seen_ids),
            ),
            folding=folding,
        )
        model.attach(memory, self.cache)

    def _new_ids(self, turn: dict[str, Any]) -> list[int]:
        ids = super()._new_ids(turn)
        if ids[: len(self._seen_ids)] != self._seen_ids:
            raise ValueError("The chat template must write the video before the question. Use CrossLMM's own.")
        return ids


def most_frames(model: CrossLMMForConditionalGeneration, processor: CrossLMMProcessor) -> int:
    """The largest `max_frames` that the context has room for."""
    tokens_per_frame = processor.tokens_per_frame
    if processor.add_timestamps:
        longest = timestamp(LONGEST_SECONDS - 0.1)
        tokens_per_frame += len(processor.tokenizer(longest, add_special_tokens=False)["input_ids"])
    return (model.config.max_sequence_length - QUESTION_TOKENS) // tokens_per_frame


def _written(buffer: torch.Tensor, first: int, new: torch.Tensor, room: int | None) -> torch.Tensor:
    """`buffer` with `new` from row `first` on; a larger one, with its rows, where they do not fit."""
    needed = first + len(new)
    if needed > len(buffer):
        larger = new.new_empty(room or max(needed, 2 * len(buffer)), *new.shape[1:])
        if first:
            larger[:first] = buffer[:first]
        buffer = larger
    buffer[first:needed] = new
    return buffer


def _without(unchanged: UnchangedFrames, read: Callable[[], Iterator[FrameChunk]]) -> Iterator[FrameChunk]:
    return map(unchanged, read())


def _no_pictures(*_: Any) -> NoReturn:
    raise ValueError("The pictures of a live video are not kept; keep those that you add.")


__all__ = ["LiveVideo", "most_frames"]
