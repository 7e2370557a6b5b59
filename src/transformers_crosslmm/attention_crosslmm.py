"""Which tokens look at which patches, and the attention that follows it.

Everything is packed: queries are rows of the flattened hidden states, keys are the patches of all media one after the
other, and a segment says which queries see which stretch of keys. No (queries x keys) mask is ever built.

Shapes: Q packed queries, P packed patches, H query heads, G key/value heads, E head width, D vision width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.utils.generic import is_flash_attention_requested

# Stretches [start, end) of the packed patches, ascending and not adjacent.
Span = tuple[tuple[int, int], ...]


def merge_span(pieces: list[tuple[int, int]]) -> Span:
    """Joins stretches that follow each other, so that most spans are one view of the keys."""
    merged: list[tuple[int, int]] = []
    for start, end in pieces:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return tuple(merged)


@dataclass(frozen=True)
class Segments:
    """Queries that look at the same patches, segment by segment.

    queries: (Q,) rows of the flattened (batch x length) hidden states, in segment order.
    lengths: queries of each segment; sums to Q.
    spans: the patches that each segment sees.
    is_dummy: nobody looks; the update counts with weight zero, to keep distributed ranks in step.
    """

    queries: torch.Tensor
    lengths: tuple[int, ...]
    spans: tuple[Span, ...]
    is_dummy: bool = False

    @classmethod
    def dummy(cls, num_patches: int, device: torch.device) -> "Segments":
        """The first row looks at everything, for nothing: its update gets weight zero."""
        return cls(torch.zeros(1, dtype=torch.long, device=device), (1,), (((0, num_patches),),), is_dummy=True)

    @classmethod
    def build(cls, groups: dict[Span, list[int]], device: torch.device) -> "Segments | None":
        """Segments of rows grouped by what they see; None when no row sees anything."""
        groups = {span: rows for span, rows in groups.items() if span and rows}
        if not groups:
            return None
        rows = [row for group in groups.values() for row in group]
        return cls(
            queries=torch.tensor(rows, dtype=torch.long, device=device),
            lengths=tuple(len(group) for group in groups.values()),
            spans=tuple(groups),
        )

    def to(self, device: torch.device) -> "Segments":
        return self if self.queries.device == device else replace(self, queries=self.queries.to(device))

    def reach(self) -> tuple[int, int]:
        """First patch that any query sees, and the one behind the last."""
        stretches = [stretch for span in self.spans for stretch in span]
        return min(start for start, _ in stretches), max(end for _, end in stretches)

    def shifted(self, offset: int) -> "Segments":
        """The same for patches that are counted from another one."""
        if not offset:
            return self
        return replace(
            self, spans=tuple(tuple((start + offset, end + offset) for start, end in span) for span in self.spans)
        )


def take_span(patches: torch.Tensor, span: Span) -> torch.Tensor:
    """The patches of a span along dim 0: a view when the span is one stretch."""
    if len(span) == 1:
        return patches[span[0][0] : span[0][1]]
    return torch.cat([patches[start:end] for start, end in span])


def span_length(span: Span) -> int:
    return sum(end - start for start, end in span)


def packed_attention(
    attention: Callable,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
) -> torch.Tensor:
    """Attention of packed queries over packed keys.

    attention: the implementation that the config names. query (Q, H, E), key and value (P, G, E); returns (Q, H, E).
    Never causal (Eq. 2, 3).
    """
    is_varlen = is_flash_attention_requested(module.config)
    outputs, row = [], 0
    for lengths, spans in _runs(segments, may_differ=is_varlen):
        queries = query[row : row + sum(lengths)]
        row += sum(lengths)
        keys, values = (take_span(tokens, merge_span([s for span in spans for s in span])) for tokens in (key, value))
        key_lengths = [span_length(span) for span in spans]
        extra = {}
        count = len(lengths)
        if is_varlen:
            count = 1
            extra = {
                "cu_seq_lens_q": _cumulative(lengths, query.device),
                "cu_seq_lens_k": _cumulative(key_lengths, query.device),
                "max_length_q": max(lengths),
                "max_length_k": max(key_lengths),
            }
        output, _ = attention(
            module,
            *(tokens.unflatten(0, (count, -1)).transpose(1, 2) for tokens in (queries, keys, values)),
            None,
            dropout=module.attention_dropout if module.training else 0.0,
            scaling=module.scaling,
            is_causal=False,
            **extra,
        )
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _runs(segments: Segments, *, may_differ: bool) -> list[tuple[list[int], list[Span]]]:
    """Runs of segments whose keys lie side by side, so that one call serves them without a copy.

    may_differ: whether segments of different lengths share a call; otherwise a run is a batch.
    """
    runs: list[tuple[list[int], list[Span]]] = []
    for length, span in zip(segments.lengths, segments.spans, strict=True):
        if runs:
            lengths, spans = runs[-1]
            follows = len(span) == len(spans[-1]) == 1 and spans[-1][0][1] == span[0][0]
            is_alike = length == lengths[-1] and span_length(span) == span_length(spans[-1])
            if follows and (may_differ or is_alike):
                lengths.append(length)
                spans.append(span)
                continue
        runs.append(([length], [span]))
    return runs


def _cumulative(lengths, device: torch.device) -> torch.Tensor:
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return torch.tensor(ends, dtype=torch.int32, device=device)


def folded_attention(
    query: torch.Tensor,
    features: torch.Tensor,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    scaling: float,
    segments: Segments,
) -> torch.Tensor:
    """The same attention without keys or values: the key projection moves to the query, the value projection behind.

    query (Q, H, E), features (P, D), key_weight and value_weight (D, G, E); returns (Q, H, E). With k = x W_k and
    v = x W_v: q . k = (W_k q) . x and sum p v = (sum p x) W_v, so one copy of the features serves every layer.
    """
    groups = key_weight.shape[1]
    grouped = query.unflatten(1, (groups, -1))  # (Q, G, H/G, E)
    folded = torch.einsum("qgre,dge->qgrd", grouped, key_weight).flatten(1, 2)  # (Q, H, D)
    outputs, row = [], 0
    for length, span in zip(segments.lengths, segments.spans, strict=True):
        queries = folded[row : row + length].flatten(0, 1)  # (length x H, D)
        stretches = [features[start:end] for start, end in span]
        scores = torch.cat([queries @ stretch.T for stretch in stretches], dim=-1) * scaling
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        parts = weights.split([len(stretch) for stretch in stretches], dim=-1)
        context = torch.stack([part @ stretch for part, stretch in zip(parts, stretches, strict=True)]).sum(0)
        outputs.append(context.unflatten(0, (length, groups, -1)))
        row += length
    context = torch.cat(outputs) if len(outputs) > 1 else outputs[0]  # (Q, G, H/G, D)
    return torch.einsum("qgrd,dge->qgre", context, value_weight).flatten(1, 2)
