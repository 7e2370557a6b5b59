"""The visual memory that generation keeps, and its place in any Transformers cache.

The patches of all media are concatenated and never change; an index says which rows attend to which ranges of them.
Beams, selection, cropping and copies change the index and share the patches.

Shapes: B rows, L tokens of a call, P patches of all media, N patches per frame, G key/value heads, E head width,
        D vision width, C language width.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache as memoize
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from .attention_crosslmm import Dates, Folding, Segments, Span, cut_span, merge_span
from .vision_crosslmm import TokenNorm

LEAST_RUN = 4
"""Fewest consecutive frames with one picture to which inference attends once: merging fewer would not pay."""


@dataclass(frozen=True)
class Medium:
    """One video or image of one row.

    positions: of its placeholders in the sequence, frame by frame.
    patches: its range [first, last) of the packed patches.
    """

    positions: Sequence[int]
    patches: tuple[int, int]

    @property
    def start(self) -> int:
        return self.positions[0]

    def crop(self, length: int) -> "Medium":
        """Returns the medium without the placeholders at positions from `length` on."""
        if self.positions[-1] < length:
            return self
        return Medium([position for position in self.positions if position < length], self.patches)


@dataclass(frozen=True)
class PooledTokens:
    """Pooled tokens still to be written over their placeholders, by one call or by the chunks of a prefill.

    tokens: (n, C). numbers: (B, columns), the index of the token for each position, -1 at other positions.
    start: the position of the first column. is_in_order: each token is used once, in order.
    """

    tokens: torch.Tensor
    numbers: torch.Tensor
    start: int
    is_in_order: bool = True

    @property
    def end(self) -> int:
        return self.start + self.numbers.shape[1]

    def fill(self, inputs_embeds: torch.Tensor, position: int) -> torch.Tensor:
        """Writes the tokens over their placeholders in `inputs_embeds` (B, L, C), whose first column is `position`."""
        first, length = position - self.start, inputs_embeds.shape[1]
        numbers = self.numbers[:, first : first + length].to(inputs_embeds.device)
        numbers = F.pad(numbers, (0, length - numbers.shape[1]), value=-1)  # generated tokens are text
        is_filled = (numbers >= 0)[..., None]
        tokens = self.tokens.to(inputs_embeds)
        if self.is_in_order and first == 0 and length >= self.numbers.shape[1]:
            return inputs_embeds.masked_scatter(is_filled, tokens)
        return torch.where(is_filled, tokens[numbers.clamp(min=0)], inputs_embeds)

    def repeat_rows(self, times: int) -> "PooledTokens":
        """Repeats each row `times` times."""
        return PooledTokens(self.tokens, self.numbers.repeat_interleave(times, dim=0), self.start, is_in_order=False)


@dataclass
class VisualMemory:
    """The media of a batch: their patches, and the media of each row.

    form: "kv" (layers keep T2V keys and values; `states` is dropped after prefill) or "features" (`states` is kept).
    patches_per_frame, tokens_per_frame: N and s x s.
    rows: the media of each row, in the order in which they begin.
    states: (patches from `first_patch` on, D), the original tokens; None once no longer needed.
    norm: normalisation still to be applied to `states` before K and V; None if already applied.
    frame_index: on the CPU, for each frame from `first_patch` on, its frame in `states` if unchanged frames were left
        out; None if `states` has every frame. Patch numbers count all frames, so spans, rows and norm's codes do not
        depend on it.
    num_patches: patches seen so far, whether or not `states` still holds them.
    pooled: tokens still to be written over their placeholders; None after the prompt.
    folding: per layer, the projections for decoding from features.
    is_placeholder: no row has media; one frame keeps distributed ranks in step, with weight zero.
    """

    form: str
    patches_per_frame: int
    tokens_per_frame: int
    rows: list[list[Medium]]
    states: torch.Tensor | None = None
    norm: TokenNorm | None = None
    frame_index: torch.Tensor | None = None
    first_patch: int = 0
    num_patches: int = 0
    pooled: PooledTokens | None = None
    folding: dict[int, Folding] = field(default_factory=dict)
    is_placeholder: bool = False
    _after_media: dict[int, Segments | None] = field(default_factory=dict, repr=False)
    _copies: dict[tuple[str, torch.device], tuple[Any, Any]] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo) -> "VisualMemory":
        """Forks the memory: the fork has its own index and shares the patches."""
        fork = copy.copy(self)
        fork.rows = [list(media) for media in self.rows]
        fork.folding = dict(self.folding)
        fork._after_media, fork._copies = {}, dict(self._copies)
        memo[id(self)] = fork
        return fork

    def append(self, new: "VisualMemory") -> None:
        """Moves the media of another memory of the same rows into this one and leaves the other one empty."""
        assert new.states is not None
        self._copies.clear()  # they lack the new patches, and keep the old ones in memory
        if self.form == "features" and self.states is not None:
            if self.frame_index is not None or new.frame_index is not None:
                num_frames = len(self.states) // self.patches_per_frame
                self.frame_index = torch.cat([self._frames_shown(), num_frames + new._frames_shown()])
            self.states = torch.cat([self.states, new.states])
            self.norm = None if new.norm is None else self.norm.concat(new.norm)
        else:
            self.first_patch, self.states, self.norm = self.num_patches, new.states, new.norm
            self.frame_index = new.frame_index
        for known, media in zip(self.rows, new.rows, strict=True):
            for medium in media:
                start, end = medium.patches
                known.append(Medium(medium.positions, (start + self.num_patches, end + self.num_patches)))
        self.num_patches += new.num_patches
        self.pooled = new.pooled
        self._after_media.clear()
        new.clear()

    @property
    def is_empty(self) -> bool:
        return not any(self.rows) and not self.is_placeholder

    def repeat_rows(self, times: int) -> None:
        """Row i becomes the rows [i x times, (i + 1) x times)."""
        if times > 1:
            self.select([row for row in range(len(self.rows)) for _ in range(times)])
            self.pooled = None if self.pooled is None else self.pooled.repeat_rows(times)

    def end_call(self, length: int) -> None:
        """Drops tensors that later calls do not need, after the cache has seen `length` positions."""
        if self.pooled is not None and length >= self.pooled.end:
            self.pooled = None
        if self.form == "kv" and self.pooled is None:
            self.states = self.norm = self.frame_index = None
            self._copies.clear()

    def whole_frames(self, most: int) -> int:
        """Rounds a number of patches down to whole frames, at least one frame."""
        return max(1, most // self.patches_per_frame) * self.patches_per_frame

    def states_on(self, device: torch.device) -> torch.Tensor | None:
        """`states` on a device; see `_copy_on`."""
        return self._copy_on("states", device)

    def norm_on(self, device: torch.device) -> TokenNorm | None:
        """`norm` on a device; see `_copy_on`."""
        return self._copy_on("norm", device)

    def index_on(self, device: torch.device) -> torch.Tensor | None:
        """`frame_index` on a device; see `_copy_on`."""
        return self._copy_on("frame_index", device)

    def _copy_on(self, name: str, device: torch.device) -> Any:
        """An attribute on a device. The copy for another device is made once and shared by its layers."""
        original = getattr(self, name)
        if original is None or original.device == device:
            return original
        copied_from, copy_there = self._copies.get((name, device), (None, None))
        if copied_from is not original:
            copy_there = original.to(device)
            self._copies[name, device] = original, copy_there
        return copy_there

    def _frames_shown(self) -> torch.Tensor:
        if self.frame_index is not None:
            return self.frame_index
        return torch.arange(len(self.states) // self.patches_per_frame)

    def stored_tokens(self, states: torch.Tensor, start: int, end: int) -> tuple[torch.Tensor, TokenNorm | None]:
        """The patches [start, end), (end - start, D), and the normalisation still to be applied to them. They must be
        whole frames if there is a normalisation or unchanged frames were left out.

        states: those of this memory, on the device of the result.
        """
        start, end, norm = start - self.first_patch, end - self.first_patch, self.norm_on(states.device)
        if self.frame_index is None:
            return states[start:end], None if norm is None else norm.clip_to_tokens(start, end)
        frames = slice(start // self.patches_per_frame, end // self.patches_per_frame)
        shown = self.index_on(states.device)[frames]
        tokens = states.unflatten(0, (-1, self.patches_per_frame))[shown].flatten(0, 1)
        return tokens, None if norm is None else TokenNorm(norm.scale[shown], norm.codes[frames])

    def stored_pieces(
        self, states: torch.Tensor, span: Span, at_once: int
    ) -> Iterator[tuple[torch.Tensor, TokenNorm | None, Dates | None]]:
        """Yields `stored_tokens` of a span, `at_once` patches at a time. For the span of all patches it yields each
        distinct frame once, with its dates; the norm's codes are then those of all dates."""
        if self.frame_index is None or span != ((self.first_patch, self.num_patches),):
            for piece in cut_span(span, at_once):
                yield *self.stored_tokens(states, *piece), None
            return
        shown, norm, step = self.index_on(states.device), self.norm_on(states.device), self.patches_per_frame
        for start, end in cut_span(((0, len(states)),), at_once):
            first, last = start // step, end // step
            own = None if norm is None else TokenNorm(norm.scale[first:last], norm.codes)
            yield states[start:end], own, Dates(shown, first, last, len(states) // step)

    def codes(self, states: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """The codes (frames, D) that dates add to the tokens of the frames in patches [start, end)."""
        start, end = ((patch - self.first_patch) // self.patches_per_frame for patch in (start, end))
        norm = self.norm_on(states.device)
        return states.new_zeros(end - start, states.shape[-1]) if norm is None else norm.codes[start:end].to(states)

    def runs(self) -> tuple[tuple[int, int], ...]:
        """Ranges of patches of at least `LEAST_RUN` consecutive frames that show the same picture."""
        if self.frame_index is None:
            return ()
        counts = self.frame_index.unique_consecutive(return_counts=True)[1].tolist()
        ends = [self.first_patch + self.patches_per_frame * frames for frames in accumulate(counts, initial=0)]
        return tuple(run for run, count in zip(pairwise(ends), counts, strict=True) if count >= LEAST_RUN)

    def tokens(self, states: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """The normalised patches [start, end), from which K and V are projected; see `stored_tokens`."""
        tokens, norm = self.stored_tokens(states, start, end)
        return tokens if norm is None else norm.apply(tokens)

    def select(self, indices: list[int]) -> None:
        """Row i becomes the former row `indices[i]`."""
        rows = [list(self.rows[index]) for index in indices]
        if rows != self.rows:  # beams of one sample have the same media, so reordering them rarely changes anything
            self._after_media.clear()
        self.rows = rows

    def crop(self, length: int) -> None:
        """Removes the media that begin at or after position `length`. A medium that begins before it keeps all its
        patches, and new tokens from `length` on are text."""
        self.rows = [[medium.crop(length) for medium in media if medium.start < length] for media in self.rows]
        self.num_patches = max((medium.patches[1] for media in self.rows for medium in media), default=0)
        if self.states is not None:
            left = max(self.num_patches - self.first_patch, 0)
            frames = num_stored = left // self.patches_per_frame
            if self.frame_index is not None:
                self.frame_index = self.frame_index[:frames]
                num_stored = int(self.frame_index.max()) + 1 if frames else 0
            self.states = self.states[: num_stored * self.patches_per_frame]
            if self.norm is not None:
                self.norm = TokenNorm(self.norm.scale[:num_stored], self.norm.codes[:frames])
        if self.pooled is not None and length <= self.pooled.start:
            self.pooled = None
        self._after_media.clear()
        self._copies.clear()

    def clear(self) -> None:
        self.rows = []
        self.states = self.norm = self.frame_index = self.pooled = None
        self.first_patch = self.num_patches = 0
        self.folding.clear()
        self._after_media.clear()
        self._copies.clear()

    # Positions are Python numbers that differ between calls, so a compiled graph could not be reused.
    @torch.compiler.disable
    def v2v_segments(self, start: int, length: int, scope: str, device: torch.device) -> Segments | None:
        """Groups pooled tokens at positions [start, start + length) by the patches that `scope` allows (Eq. 6)."""
        groups: dict[Span, list[int]] = {}
        for row, media in enumerate(self.rows):
            offset = row * length - start
            for medium in media:
                first, last = medium.patches
                step = len(medium.positions) if scope == "video" else self.tokens_per_frame
                for index in range(0, len(medium.positions), step):
                    block = [p + offset for p in medium.positions[index : index + step] if start <= p < start + length]
                    frame = first + index // self.tokens_per_frame * self.patches_per_frame
                    span = {
                        "video": (first, last),
                        "frame": (frame, frame + self.patches_per_frame),
                        "causal": (first, frame + self.patches_per_frame),
                    }[scope]
                    groups.setdefault((span,), []).extend(block)
        return Segments.build(groups, device)

    @torch.compiler.disable
    def t2v_segments(
        self, start: int, length: int, scope: str, is_token: torch.Tensor | None, device: torch.device
    ) -> Segments | None:
        """Groups text tokens at positions [start, start + length) by the patches of every medium that began before
        them; with scope "causal", text between a medium's frames attends to the frames before it only.

        is_token: (B, length) on the CPU, False at padding; None if there is no padding.
        """
        groups: dict[Span, list[int]] = {}
        for row, media in enumerate(self.rows):
            is_text = torch.ones(length, dtype=torch.bool) if is_token is None else is_token[row].clone()
            for medium in media:
                is_text[[p - start for p in medium.positions if start <= p < start + length]] = False
            columns = is_text.nonzero()[:, 0]
            begins = sorted(self._visible_after(media, scope))
            begun = torch.searchsorted(torch.tensor([position for position, _ in begins]), columns + start)
            span: Span = ()
            known = 0
            counts, lengths = (tensor.tolist() for tensor in begun.unique_consecutive(return_counts=True))
            for count, columns_between in zip(counts, columns.split(lengths), strict=True):
                span, known = merge_span(sorted([*span, *(stretch for _, stretch in begins[known:count])])), count
                groups.setdefault(span, []).extend((columns_between + row * length).tolist())
        return Segments.build(groups, device)

    def _visible_after(self, media: list[Medium], scope: str) -> Iterator[tuple[int, tuple[int, int]]]:
        """Yields (position, patches): text after the position attends to that range of patches."""
        for medium in media:
            first, last = medium.patches
            begins = medium.positions[:: self.tokens_per_frame] if scope == "causal" else [medium.start]
            for position in begins[:-1]:
                yield position, (first, first + self.patches_per_frame)
                first += self.patches_per_frame
            yield begins[-1], (first, last)  # of a medium that was cropped, all remaining patches

    def segments_after_media(self, length: int, device: torch.device) -> Segments | None:
        """Segments of `length` tokens per row after all media: each token attends to all patches of its row."""
        if length not in self._after_media:
            groups: dict[Span, list[int]] = {}
            for row, media in enumerate(self.rows):
                span = merge_span([medium.patches for medium in media])
                groups.setdefault(span, []).extend(range(row * length, (row + 1) * length))
            self._after_media[length] = Segments.build(groups, device)
        return self._after_media[length]


class VisualCacheLayer(CacheLayerMixin):
    """Mixin for the cache layer of every cross-attention layer.

    memory: shared by all these layers; the one with `owns_memory` applies reorder, select and crop to it.
    cross_keys, cross_values: of T2V, (P, G, E), in form "kv".
    """

    memory: VisualMemory
    owns_memory: bool
    cross_keys: torch.Tensor | None
    cross_values: torch.Tensor | None
    _fetched: tuple[torch.Tensor, torch.Tensor] | None

    def hold_memory(self, memory: VisualMemory, *, owns_memory: bool) -> None:
        self.memory, self.owns_memory = memory, owns_memory
        self.cross_keys = self.cross_values = self._fetched = None

    def append_cross(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Appends T2V keys and values (new patches, G, E) to those of earlier patches."""
        if self.cross_keys is not None and self.cross_values is not None:
            keys = torch.cat([self.cross_keys, keys.to(self.cross_keys.device)])
            values = torch.cat([self.cross_values, values.to(self.cross_values.device)])
        self.mark_static(keys, values)
        self.cross_keys, self.cross_values = keys, values
        self._fetched = None  # it lacks the new patches

    def mark_static(self, *tensors: torch.Tensor) -> None:
        """Marks addresses as static, so that CUDA graphs do not copy the tensors in every step."""
        if self.is_compileable and not torch.compiler.is_compiling():
            for tensor in tensors:
                torch._dynamo.mark_static_address(tensor, guard=False)

    @property
    def num_cross_patches(self) -> int:
        return 0 if self.cross_keys is None else self.cross_keys.shape[0]

    def read_cross(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """T2V keys and values on `device`. An offloaded layer drops its prefetched copy here."""
        fetched, self._fetched = self._fetched, None
        return fetched or (self.cross_keys.to(device), self.cross_values.to(device))

    def __deepcopy__(self, memo):
        fork = self.__class__.__new__(self.__class__)
        memo[id(self)] = fork
        shared = ("cross_keys", "cross_values", "_fetched")
        for name, value in self.__dict__.items():
            fork.__dict__[name] = value if name in shared else copy.deepcopy(value, memo)
        return fork

    def __reduce__(self):
        """Pickles the original class, because pickle cannot find a class made at run time by its name."""
        layer_class = type(self).__bases__[1]
        return _revive, (layer_class, self.__dict__)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.owns_memory:
            self.memory.select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self.owns_memory:
            self.memory.select(torch.arange(len(self.memory.rows))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.owns_memory:
            self.memory.select([row for row in range(len(self.memory.rows)) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.owns_memory:
            self.memory.crop(int(self.get_seq_length()))
        if self.cross_keys is not None:
            self.cross_keys = self.cross_keys[: self.memory.num_patches]
            self.cross_values = self.cross_values[: self.memory.num_patches]

    def reset(self) -> None:
        super().reset()
        self.cross_keys = self.cross_values = self._fetched = None
        if self.owns_memory:
            self.memory.clear()

    def offload(self) -> None:
        """Keeps the prefetched copy: self-attention offloads the layer before cross-attention has read it."""
        super().offload()
        if self.cross_keys is not None:
            self.cross_keys, self.cross_values = self.cross_keys.to("cpu"), self.cross_values.to("cpu")

    def prefetch(self) -> None:
        super().prefetch()
        if self.cross_keys is not None and self.cross_keys.device != self.device:
            keys = self.cross_keys.to(self.device, non_blocking=True)
            self._fetched = keys, self.cross_values.to(self.device, non_blocking=True)


@memoize
def _visual_class(layer_class: type) -> type:
    return type(f"Visual{layer_class.__name__}", (VisualCacheLayer, layer_class), {"_layer_type": None})


def _revive(layer_class: type, state: dict) -> VisualCacheLayer:
    layer = _visual_class(layer_class).__new__(_visual_class(layer_class))
    layer.__dict__.update(state)
    return layer


def visual_layer(cache: Cache | None, layer_idx: int) -> VisualCacheLayer | None:
    """The cache layer of a cross-attention layer, or None if the cache has seen no media."""
    if cache is None or layer_idx >= len(cache.layers):
        return None
    layer = cache.layers[layer_idx]
    return layer if isinstance(layer, VisualCacheLayer) else None


def memory_in(cache: Cache | None) -> VisualMemory | None:
    """The memory in a cache, or None if the cache has seen no media."""
    for layer in () if cache is None else getattr(cache, "layers", ()):
        if isinstance(layer, VisualCacheLayer):
            return None if layer.memory.is_empty else layer.memory
    return None


def attach_visual_memory(cache: Cache, new: VisualMemory, layer_indices: list[int], num_layers: int) -> VisualMemory:
    """Adds new media to a cache with layers of any class and returns its memory. A second call changes nothing.

    layer_indices: the layers with cross-attention; a model without any keeps the memory in its first layer.
    """
    known = memory_in(cache)
    if known is not None:
        if new is not known and not new.is_empty:
            known.append(new)
        return known
    while len(cache.layers) < num_layers:
        cache.layers.append(cache.layer_class_to_replicate())
    homes = layer_indices or [0]
    for layer_idx in homes:
        layer = cache.layers[layer_idx]
        if not isinstance(layer, VisualCacheLayer):
            layer = _revive(type(layer), layer.__dict__)
            cache.layers[layer_idx] = layer
        layer.hold_memory(new, owns_memory=layer_idx == homes[0])
    return new


def check_cache(cache: Cache, num_layers: int) -> None:
    """Raises TypeError unless the cache consists of attention layers, ValueError if their number does not fit."""
    if isinstance(cache, EncoderDecoderCache) or not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise TypeError(
            "`cache` must be a Transformers cache with layers (DynamicCache, StaticCache, "
            f"QuantizedCache, ...); got {type(cache).__name__}. Pass a DynamicCache(), or leave it out."
        )
    if not all(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        kinds = sorted({type(layer).__name__ for layer in cache.layers if not isinstance(layer, CacheLayerMixin)})
        raise TypeError(f"`cache` must hold attention layers only; got {', '.join(kinds)}.")
    grows = cache.layer_class_to_replicate is not None
    if len(cache.layers) > num_layers or (len(cache.layers) < num_layers and not grows):
        raise ValueError(
            f"`cache` must have one layer for each of the model's {num_layers}; got {len(cache.layers)}. "
            "Create it from the config of this model."
        )


def cached_length(cache: Cache | None, num_new: int) -> int | torch.Tensor:
    """Tokens that the cache has seen. A static cache counts on its device, and reading the count would stall every
    decode step, so the count stays a tensor if there is one new token."""
    length = 0 if cache is None else cache.get_seq_length()
    return length if num_new == 1 or torch.compiler.is_compiling() else int(length)


def cache_capacity(cache: Cache) -> int:
    """The most tokens that the cache can hold; -1 if it grows."""
    is_sliding = cache.is_sliding
    return max([-1, *[layer.get_max_length() for i, layer in enumerate(cache.layers) if not is_sliding[i]]])


__all__ = ["Medium", "VisualCacheLayer", "VisualMemory", "attach_visual_memory", "memory_in", "visual_layer"]
