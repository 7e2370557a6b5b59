"""The original tokens of videos and images in vLLM's paged cache, and the cross-attention's segments of a step.

A slot of the cache belongs to one token of one request. The slots of a frame's placeholders share its patches, already
normalised and with the frame's code. vLLM moves, shares and evicts these slots like those of self-attention, so
nothing here is kept per request.

A slot has two more integers: the number of the placeholder within its medium, counted from 1 (0 for text), and the
number of placeholders of the medium.

Shapes: R requests, T tokens of a step, S slots, N patches per frame, D vision width, H query heads, G key/value heads,
        E head width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec

from ...attention_crosslmm import CHUNK_BYTES, Segments
from ...cache_crosslmm import Medium, VisualMemory
from ...configuration_crosslmm import CrossLMMConfig

NUM_INTEGERS = 2


@dataclass(frozen=True)
class RowLayout:
    """The layout of a placeholder's row: [pooled token | integers | patches]. A slot has integers and patches.

    share: the most patches of one placeholder. integers: elements of a row for `NUM_INTEGERS` 32-bit integers.
    """

    pooled_width: int
    patch_width: int
    patches_per_frame: int
    tokens_per_frame: int
    dtype: torch.dtype

    @property
    def share(self) -> int:
        return -(-self.patches_per_frame // self.tokens_per_frame)

    @property
    def integers(self) -> int:
        return NUM_INTEGERS * 4 // self.dtype.itemsize

    @property
    def slot_width(self) -> int:
        return self.integers + self.share * self.patch_width

    def rows(self, pooled: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Rows of one medium: pooled (F x s x s, C), patches (F, N, D)."""
        padded = patches.new_zeros(len(patches), self.tokens_per_frame * self.share, self.patch_width)
        padded[:, : self.patches_per_frame] = patches
        numbers = torch.arange(1, len(pooled) + 1, dtype=torch.int32, device=pooled.device)
        integers = torch.stack([numbers, torch.full_like(numbers, len(pooled))], dim=1).view(self.dtype)
        return torch.cat([pooled, integers, padded.view(len(pooled), -1)], dim=1)

    def integers_of(self, slots: torch.Tensor) -> torch.Tensor:
        """The integers of slots (…, slot_width): (…, NUM_INTEGERS)."""
        return slots[..., : self.integers].view(torch.int32)

    def patches_of(self, slots: torch.Tensor) -> torch.Tensor:
        """The patches of the slots of whole frames, in order: (S, slot_width) to (P, D)."""
        frames = slots[:, self.integers :].reshape(-1, self.tokens_per_frame * self.share, self.patch_width)
        return frames[:, : self.patches_per_frame].flatten(0, 1)

    def is_patch(self, numbers: torch.Tensor) -> torch.Tensor:
        """Which of the `share` places of slots have patches, (…, share), from the placeholders' numbers."""
        first = (numbers - 1) % self.tokens_per_frame * self.share
        return first[..., None] + torch.arange(self.share, device=numbers.device) < self.patches_per_frame


@dataclass(frozen=True)
class Looking:
    """Arguments of a cross-attention branch: tokens of a step and the contiguous patches that they attend to."""

    states: torch.Tensor
    segments: Segments
    memory: VisualMemory


class PagedSlots:
    """The placeholders' slots of the decoding requests of a step, in order and without the text between them.

    rows: (R, q) tokens of the step; is_query: (R, q), False where a request has fewer tokens than others.
    pages: (blocks, slots of a block, slot_width). slots: (R, S). numbers: (R, S), 0 for padding.
    reach: for each chunk of slots, its start and the number of requests with slots in it. Requests are sorted by their
        number of slots, descending.
    """

    def __init__(
        self,
        layout: RowLayout,
        pages: torch.Tensor,
        slots: torch.Tensor,
        numbers: torch.Tensor,
        rows: torch.Tensor,
        is_query: torch.Tensor,
        most: int,
    ) -> None:
        """slots, numbers: of all tokens of each request. most: the most placeholders that a request can have."""
        is_visual = numbers > 0
        counts = is_visual.sum(1)
        # Reading the counts from a GPU would synchronise.
        known = sorted(counts.tolist(), reverse=True) if counts.device.type == "cpu" else [most] * len(counts)
        order = counts.argsort(descending=True, stable=True)
        visual_first = is_visual[order].to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : known[0]]
        self.layout, self.pages = layout, pages
        self.slots = slots[order].gather(1, visual_first)
        self.numbers = numbers[order].gather(1, visual_first)
        self.rows, self.is_query = rows[order], is_query[order]
        self.at_once = max(1, CHUNK_BYTES // (len(counts) * layout.slot_width * layout.dtype.itemsize))
        starts = range(0, known[0], self.at_once)
        self.reach = [(start, sum(count > start for count in known)) for start in starts]

    def chunks(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yields chunks of slots: the number r of first requests with slots in it, their patches (r, P, D), and which
        of these are not padding (r, P)."""
        for start, count in self.reach:
            slots = self.slots[:count, start : start + self.at_once]
            numbers = self.numbers[:count, start : start + self.at_once]
            is_patch = self.layout.is_patch(numbers) & (numbers > 0)[..., None]
            size = self.pages.shape[1]
            found = self.pages[slots // size, slots % size][..., self.layout.integers :]
            yield count, found.unflatten(-1, (-1, self.layout.patch_width)).flatten(1, 2), is_patch.flatten(1)

    def attend(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attention of folded queries (R, Q, D) over the patches as keys and values, merged chunk by chunk in at least
        float32. It is 0 for requests without patches."""
        query = query.to(torch.promote_types(query.dtype, torch.float32))
        context = torch.zeros_like(query)
        mass = query.new_zeros(*query.shape[:2], 1)
        highest = torch.full_like(mass, torch.finfo(query.dtype).min)
        for count, patches, is_patch in self.chunks():
            patches = patches.to(query.dtype)
            scores = (query[:count] @ patches.mT * scaling).masked_fill_(~is_patch[:, None], -torch.inf)
            new_highest = torch.maximum(highest[:count], scores.amax(-1, keepdim=True))
            shares = (scores - new_highest).exp_()
            kept = (highest[:count] - new_highest).exp_()
            context[:count] = context[:count] * kept + shares @ patches
            mass[:count] = mass[:count] * kept + shares.sum(-1, keepdim=True)
            highest[:count] = new_highest
        return context / mass.clamp(min=torch.finfo(query.dtype).tiny)


@dataclass(frozen=True)
class Step:
    """The cross-attention of a step: V2V of pooled tokens, T2V of prefilled text, and T2V of decoded text."""

    v2v: Looking | None
    t2v: Looking | None
    paged: PagedSlots | None


class VisualCache(nn.Module, AttentionLayerBase):
    """The layer of vLLM's cache with the original tokens, shared by all layers with cross-attention.

    name: vLLM's name of the layer.
    rows, places: media of the next step, see `take_media`.
    step: of the current forward call, None without media.
    folding: per layer, the projections for decoding from patches.
    """

    num_heads = 1

    def __init__(self, config: CrossLMMConfig, vllm_config: VllmConfig, name: str) -> None:
        super().__init__()
        self.name, self.scope = name, config.v2v_scope
        self.layout = RowLayout(
            pooled_width=config.text_config.hidden_size,
            patch_width=config.vision_config.hidden_size,
            patches_per_frame=config.patch_grid_size**2,
            tokens_per_frame=config.tokens_per_frame,
            dtype=vllm_config.model_config.dtype,
        )
        self.kv_cache = torch.tensor([])
        self.step: Step | None = None
        self.folding: dict = {}
        self._most_placeholders = 0
        self.rows: list[torch.Tensor] = []
        self.places = torch.empty(0, dtype=torch.long)
        speculative = vllm_config.speculative_config
        self._most_decoded = 1 + (speculative.num_speculative_tokens if speculative else 0)
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return VisualCacheBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> FullAttentionSpec:
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.layout.slot_width,
            head_size_v=0,
            dtype=self.layout.dtype,
        )

    def take_media(self, rows: list[torch.Tensor], is_placeholder: torch.Tensor) -> None:
        """Takes the rows of placeholders in the next step. is_placeholder: (T,) on the CPU.

        rows: for each medium a slice of the rows of the whole medium.
        """
        self.rows, self.places = rows, is_placeholder.nonzero()[:, 0]

    def begin_step(self) -> None:
        """Writes the slots of the step's tokens and builds the cross-attention's segments."""
        rows, places = self.rows, self.places
        self.step, self.rows, self.places = None, [], places[:0]
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM profiles a forward call without requests
            return
        common: CommonAttentionMetadata = metadata[self.name]
        starts = common.query_start_loc_cpu.numpy().tolist()
        pages = self.kv_cache[:, 0]
        self._write(pages, common.slot_mapping[: starts[-1]], rows, places)

        lengths = np.diff(starts)
        holds_media = np.zeros(len(lengths), dtype=bool)
        holds_media[np.searchsorted(starts, places.numpy(), side="right") - 1] = True
        is_read = holds_media | (lengths > self._most_decoded)
        v2v = self._pooled_tokens(rows, places)
        t2v = self._text_being_read(pages, common, starts, np.flatnonzero(is_read))
        paged = self._text_being_written(pages, common, starts, np.flatnonzero(~is_read & (lengths > 0)))
        if v2v or t2v or paged:
            self.step = Step(v2v, t2v, paged)

    def _write(self, pages: torch.Tensor, slots: torch.Tensor, rows: list[torch.Tensor], places: torch.Tensor) -> None:
        """Writes the slots of a step. Slots of text get the integer 0, because slots are reused."""
        blocks, within = slots // pages.shape[1], slots % pages.shape[1]
        self.layout.integers_of(pages)[blocks, within] = 0
        if rows:
            places = places.to(slots.device)
            written = torch.cat([some[:, self.layout.pooled_width :] for some in rows])
            pages[blocks[places], within[places]] = written

    def _memory(self, media: list[Medium], states: torch.Tensor) -> VisualMemory:
        return VisualMemory(
            form="features",
            patches_per_frame=self.layout.patches_per_frame,
            tokens_per_frame=self.layout.tokens_per_frame,
            rows=[media],
            states=states,
            num_patches=len(states),
            folding=self.folding,
        )

    def _media(self, integers: np.ndarray) -> list[Medium]:
        """The media of a request that are complete in the cache, from its tokens' integers (S, NUM_INTEGERS). With
        scope "causal" also the complete frames of an incomplete medium."""
        positions = np.flatnonzero(integers[:, 0])
        begins = np.flatnonzero(integers[positions, 0] == 1).tolist()
        media, patch = [], 0
        for begin, end in pairwise([*begins, len(positions)]):
            frames = (end - begin) // self.layout.tokens_per_frame
            is_whole = end - begin == integers[positions[begin], 1]
            if frames and (is_whole or self.scope == "causal"):
                last = patch + frames * self.layout.patches_per_frame
                end = begin + frames * self.layout.tokens_per_frame
                media.append(Medium(positions[begin:end].tolist(), (patch, last)))
                patch = last
        return media

    def _pooled_tokens(self, rows: list[torch.Tensor], places: torch.Tensor) -> Looking | None:
        """V2V of the step's pooled tokens over all patches of their media, also if the step ends within a medium:
        `rows` are views into the rows of the whole medium."""
        found, states, done = [], [], 0
        for some in rows:
            first, last, size = self._stretch(some)
            whole = some.as_strided(
                (size, some.shape[1]), some.stride(), some.storage_offset() - first * some.stride(0)
            )
            patches = self.layout.patches_of(whole[:, self.layout.pooled_width :])
            memory = self._memory([Medium(range(size), (0, len(patches)))], patches)
            segments = memory.v2v_segments(first, last - first, self.scope, torch.device("cpu"))
            found.append((segments, places[done : done + len(some)]))
            states.append(patches)
            done += len(some)
        return self._join(found, states)

    def _stretch(self, rows: torch.Tensor) -> tuple[int, int, int]:
        """The range [first, last) of the placeholders of rows in their medium, and the medium's number of them."""
        (first, size), (last, _) = self.layout.integers_of(rows[[0, -1], self.layout.pooled_width :]).tolist()
        if last - first + 1 != len(rows) or rows.storage_offset() < (first - 1) * rows.stride(0):
            raise RuntimeError("The rows of a medium must be views of the encoder's output; vLLM has copied some.")
        return first - 1, last, size

    def _text_being_read(
        self, pages: torch.Tensor, common: CommonAttentionMetadata, starts: list[int], requests: np.ndarray
    ) -> Looking | None:
        """T2V of requests in prefill: text tokens with the media that begin before each."""
        found, states = [], []
        integers_there = self.layout.integers_of(pages)
        for request in requests.tolist():
            first, last = starts[request], starts[request + 1]
            length = int(common.seq_lens_cpu_upper_bound[request])
            blocks = common.block_table_tensor[request, : -(-length // pages.shape[1])].long()
            integers = integers_there[blocks].flatten(0, 1)[:length].cpu().numpy()
            is_text = integers[:, 0] == 0
            self._most_placeholders = max(self._most_placeholders, length - int(is_text.sum()))
            media = self._media(integers)
            begun = length - (last - first)
            memory = self._memory(media, torch.empty(0))
            segments = memory.t2v_segments(
                begun, last - first, self.scope, torch.from_numpy(is_text[begun:])[None], torch.device("cpu")
            )
            if segments is not None:
                slots = torch.tensor([p for medium in media for p in medium.positions], device=pages.device)
                found_there = pages[blocks[slots // pages.shape[1]], slots % pages.shape[1]]
                states.append(self.layout.patches_of(found_there))
                found.append((segments, torch.arange(first, last)))
        return self._join(found, states)

    def _join(self, found: list[tuple[Segments | None, torch.Tensor]], states: list[torch.Tensor]) -> Looking | None:
        """Joins segments, each over the patches of one request or medium, to segments over all patches. Each comes
        with the step's tokens that its queries index."""
        starts = [0, *accumulate(map(len, states))]
        parts = [(*both, start) for both, start in zip(found, starts, strict=False) if both[0] is not None]
        if not parts:
            return None
        joined = torch.cat(states) if len(states) > 1 else states[0]
        segments = Segments(
            queries=torch.cat([tokens[part.queries] for part, tokens, _ in parts]).to(joined.device),
            lengths=tuple(length for part, *_ in parts for length in part.lengths),
            spans=tuple(
                tuple((a + start, b + start) for a, b in span) for part, _, start in parts for span in part.spans
            ),
        )
        return Looking(joined, segments, self._memory([], joined))

    def _text_being_written(
        self, pages: torch.Tensor, common: CommonAttentionMetadata, starts: list[int], requests: np.ndarray
    ) -> PagedSlots | None:
        """T2V of decoding requests, which get a few tokens after all their media; without a loop or a GPU
        synchronisation."""
        if not self._most_placeholders or not len(requests):
            return None
        device = pages.device
        begins, ends = np.array(starts)[requests], np.array(starts)[requests + 1]
        columns = np.arange((ends - begins).max())
        rows = np.minimum(begins[:, None] + columns, ends[:, None] - 1)
        is_query = begins[:, None] + columns < ends[:, None]
        chosen = torch.from_numpy(requests).to(device, non_blocking=True)
        positions = torch.arange(common.max_seq_len, device=device)
        blocks = common.block_table_tensor[chosen][:, positions // pages.shape[1]].long()
        slots = blocks * pages.shape[1] + positions % pages.shape[1]
        numbers = self.layout.integers_of(pages)[blocks, positions % pages.shape[1], 0]
        numbers = numbers * (positions < common.seq_lens[chosen][:, None])
        most = min(self._most_placeholders, common.max_seq_len)
        rows, is_query = (torch.from_numpy(one).to(device, non_blocking=True) for one in (rows, is_query))
        return PagedSlots(self.layout, pages, slots, numbers, rows, is_query, most)


class VisualCacheMetadataBuilder(AttentionMetadataBuilder):
    """Passes on vLLM's own metadata. The cross-attention's shapes change from step to step, so it runs outside of CUDA
    graphs; the other parts of a layer run in them."""

    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CommonAttentionMetadata:
        return common_attn_metadata


class VisualCacheBackend(AttentionBackend):
    """A backend for the cache only: it has no attention implementation (`get_impl_cls`)."""

    @staticmethod
    def get_name() -> str:
        return "CROSSLMM_VISUAL_CACHE"

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        return VisualCacheMetadataBuilder

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False
