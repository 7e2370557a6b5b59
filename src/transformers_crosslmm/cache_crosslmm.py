"""What generation keeps of the media it has seen, and how it rides in any Transformers cache.

The patches of all media lie one after the other and never change; an index says which rows see which stretches.
Beams, selection, cropping and copies touch the index and share the patches.

Shapes: B rows, L tokens of this call, P patches of all media, N patches per frame, G key/value heads, E head width.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache as memoize

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from .attention_crosslmm import Segments, Span, merge_span
from .vision_crosslmm import TokenNorm


@dataclass(frozen=True)
class Medium:
    """One video or image of one row.

    positions: where its placeholders stand in the sequence, frame by frame.
    patches: its stretch of the packed patches.
    """

    positions: Sequence[int]
    patches: tuple[int, int]

    @property
    def start(self) -> int:
        return self.positions[0]


@dataclass
class VisualMemory:
    """The media of a batch: their patches, and which row has which.

    form: "kv" (layers keep T2V keys and values; `states` goes after prefill) or "features" (`states` stays).
    patches_per_frame, tokens_per_frame: N and s x s.
    rows: the media of each row, in the order in which they begin.
    states: (patches from `first_patch` on, D), the original tokens; None once no longer needed.
    norm: what makes of them what K and V are made of; None where they are that already.
    num_patches: patches seen so far, whether or not `states` still holds them.
    prefilling: placeholders of known media are still to come (chunked prefill).
    folding: per layer, the key and value projections as (G, E, D) and (G, D, E), for decoding from features.
    """

    form: str
    patches_per_frame: int
    tokens_per_frame: int
    rows: list[list[Medium]]
    states: torch.Tensor | None = None
    norm: TokenNorm | None = None
    first_patch: int = 0
    num_patches: int = 0
    prefilling: bool = False
    folding: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _seen_by_all: dict[int, Segments | None] = field(default_factory=dict)

    def __deepcopy__(self, memo) -> "VisualMemory":
        """A fork: an index of its own over the same patches."""
        fork = copy.copy(self)
        fork.rows = [list(media) for media in self.rows]
        fork.folding = dict(self.folding)
        fork._seen_by_all = {}
        memo[id(self)] = fork
        return fork

    def append(self, rows: list[list[Medium]], states: torch.Tensor, norm: TokenNorm | None = None) -> None:
        """Adds the media of this call; their `patches` count from 0 within `states` (patches, D).

        norm: given with states that are kept already if, and only if, it was given with these.
        """
        if self.form == "features" and self.states is not None:
            self.states = torch.cat([self.states, states])
            self.norm = None if norm is None else self.norm.followed_by(norm)
        else:
            self.first_patch, self.states, self.norm = self.num_patches, states, norm
        for known, new in zip(self.rows, rows, strict=True):
            for medium in new:
                start, end = medium.patches
                known.append(Medium(medium.positions, (start + self.num_patches, end + self.num_patches)))
        self.num_patches += states.shape[0]
        self._seen_by_all.clear()

    def drop_states(self) -> None:
        """After prefill the keys and values of the layers are all that "kv" needs."""
        if self.form == "kv" and not self.prefilling and self.states is not None:
            self.states = self.norm = None

    def whole_frames(self, most: int) -> int:
        """The patches, about `most`, of whole frames; of one at least."""
        return max(1, most // self.patches_per_frame) * self.patches_per_frame

    def tokens(self, states: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """What K and V of the patches [start, end) are made of: (end - start, D).

        states: those of the memory, on the device where they are wanted.
        """
        start, end = start - self.first_patch, end - self.first_patch
        if self.norm is None:
            return states[start:end]
        return self.norm.between(start, end).to(states.device).applied(states[start:end])

    def select(self, indices: list[int]) -> None:
        """Row i becomes the former row `indices[i]`."""
        rows = [list(self.rows[index]) for index in indices]
        if rows != self.rows:  # beams of one sample see the same, so their reordering mostly changes nothing
            self._seen_by_all.clear()
        self.rows = rows

    def crop(self, length: int) -> None:
        """Forgets the media that begin at or after `length` positions."""
        self.rows = [[medium for medium in media if medium.start < length] for media in self.rows]
        self.num_patches = max((medium.patches[1] for media in self.rows for medium in media), default=0)
        if self.states is not None:
            left = max(self.num_patches - self.first_patch, 0)
            self.states = self.states[:left]
            self.norm = None if self.norm is None else self.norm.between(0, left)
        self._seen_by_all.clear()

    def clear(self) -> None:
        self.rows = []
        self.states = self.norm = None
        self.first_patch = self.num_patches = 0
        self.prefilling = False
        self.folding.clear()
        self._seen_by_all.clear()

    # Positions are Python numbers that differ from call to call: a graph of them could not be used twice.
    @torch.compiler.disable
    def v2v_segments(self, start: int, length: int, scope: str, device: torch.device) -> Segments | None:
        """Pooled tokens at positions [start, start + length) with the patches that `scope` lets them see (Eq. 6)."""
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
        self, start: int, length: int, is_token: torch.Tensor | None, device: torch.device
    ) -> Segments | None:
        """Text among positions [start, start + length) with the patches of every medium that began before it.

        is_token: (B, length) on the CPU, False at padding, None when there is none.
        """
        groups: dict[Span, list[int]] = {}
        for row, media in enumerate(self.rows):
            is_text = torch.ones(length, dtype=torch.bool) if is_token is None else is_token[row].clone()
            for medium in media:
                inside = [p - start for p in medium.positions if start <= p < start + length]
                is_text[inside] = False
            columns = is_text.nonzero()[:, 0]
            began = torch.tensor([medium.start - start for medium in media], dtype=torch.long)
            visible = torch.searchsorted(began, columns)
            for count in range(1, len(media) + 1):
                span = merge_span([medium.patches for medium in media[:count]])
                groups.setdefault(span, []).extend((columns[visible == count] + row * length).tolist())
        return Segments.build(groups, device)

    def segments_after_media(self, length: int, device: torch.device) -> Segments | None:
        """`length` tokens per row behind all media: each sees all of its row's patches. No look at the tokens."""
        if length not in self._seen_by_all:
            groups: dict[Span, list[int]] = {}
            for row, media in enumerate(self.rows):
                span = merge_span([medium.patches for medium in media])
                groups.setdefault(span, []).extend(range(row * length, (row + 1) * length))
            self._seen_by_all[length] = Segments.build(groups, device)
        return self._seen_by_all[length]


class VisualCacheLayer(CacheLayerMixin):
    """Mixed into the cache layer of every cross-attention layer.

    memory: shared by all of them; `owns_memory` is True on one, which carries the index operations.
    cross_keys, cross_values: (P, G, E), T2V's, in form "kv".
    """

    memory: VisualMemory
    owns_memory: bool
    cross_keys: torch.Tensor | None
    cross_values: torch.Tensor | None
    _fetched: tuple[torch.Tensor, torch.Tensor] | None

    def carry(self, memory: VisualMemory, *, owns_memory: bool) -> None:
        self.memory, self.owns_memory = memory, owns_memory
        self.cross_keys = self.cross_values = self._fetched = None

    def append_cross(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self.cross_keys is not None and self.cross_values is not None:
            keys = torch.cat([self.cross_keys, keys.to(self.cross_keys.device)])
            values = torch.cat([self.cross_values, values.to(self.cross_values.device)])
        self.stay(keys, values)
        self.cross_keys, self.cross_values = keys, values
        self._fetched = None  # a copy of what was here before

    def stay(self, *tensors: torch.Tensor) -> None:
        """They stay where they are for as long as they are read, so CUDA graphs need no copy of them per step."""
        if self.is_compileable and not torch.compiler.is_compiling():
            for tensor in tensors:
                torch._dynamo.mark_static_address(tensor, guard=False)

    @property
    def num_cross_patches(self) -> int:
        return 0 if self.cross_keys is None else self.cross_keys.shape[0]

    def read_cross(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """T2V keys and values on `device`. An offloaded layer holds its copy there until it is read."""
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
        """A class that is made on the fly has no name to be found by."""
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
        """Self-attention offloads its layer before cross-attention has read it; what was fetched stays until then."""
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
    """The cache layer of a cross-attention layer, if the cache has seen media."""
    if cache is None or layer_idx >= len(cache.layers):
        return None
    layer = cache.layers[layer_idx]
    return layer if isinstance(layer, VisualCacheLayer) else None


def visual_memory(cache: Cache | None, layer_indices: list[int]) -> VisualMemory | None:
    """The memory in a cache, or None when it has seen no media."""
    layer = visual_layer(cache, layer_indices[0]) if layer_indices else None
    return layer.memory if layer is not None and any(layer.memory.rows) else None


def attach_visual_memory(cache: Cache, memory: VisualMemory, layer_indices: list[int], num_layers: int) -> None:
    """Puts the memory into a cache, whichever kind its layers are."""
    while len(cache.layers) < num_layers:
        cache.layers.append(cache.layer_class_to_replicate())
    for layer_idx in layer_indices:
        layer = cache.layers[layer_idx]
        if not isinstance(layer, VisualCacheLayer):
            layer = _revive(type(layer), layer.__dict__)
            cache.layers[layer_idx] = layer
        layer.carry(memory, owns_memory=layer_idx == layer_indices[0])


def check_cache(cache: Cache, num_layers: int) -> None:
    """Raises TypeError unless the cache is a list of layers that can carry the memory of a video, and ValueError if
    these are another model's."""
    if isinstance(cache, EncoderDecoderCache) or not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise TypeError(
            "`past_key_values` must be a Transformers cache made of layers (DynamicCache, StaticCache, "
            f"QuantizedCache, ...); got {type(cache).__name__}. Pass a DynamicCache(), or leave it out."
        )
    if not all(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        kinds = sorted({type(layer).__name__ for layer in cache.layers if not isinstance(layer, CacheLayerMixin)})
        raise TypeError(f"`past_key_values` must hold attention layers only; got {', '.join(kinds)}.")
    grows = cache.layer_class_to_replicate is not None
    if len(cache.layers) > num_layers or (len(cache.layers) < num_layers and not grows):
        raise ValueError(
            f"`past_key_values` must have one layer for each of the model's {num_layers}; got {len(cache.layers)}. "
            "Make it from the config of this model."
        )


def cached_length(cache: Cache | None, num_new: int) -> int | torch.Tensor:
    """Tokens that the cache has seen. A static cache counts on its device; asking it would stop every decode step, so
    the count of one that goes on by a single token stays a tensor."""
    length = 0 if cache is None else cache.get_seq_length()
    return length if num_new == 1 or torch.compiler.is_compiling() else int(length)


def cache_capacity(cache: Cache) -> int:
    """Most tokens that the cache can hold, -1 if it grows."""
    is_sliding = cache.is_sliding
    return max((layer.get_max_length() for i, layer in enumerate(cache.layers) if not is_sliding[i]), default=-1)


__all__ = ["Medium", "VisualCacheLayer", "VisualMemory", "attach_visual_memory", "visual_layer", "visual_memory"]
