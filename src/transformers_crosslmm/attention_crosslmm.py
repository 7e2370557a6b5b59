"""Which tokens attend to which patches, and the attention itself.

Everything is packed: queries are rows of the flattened hidden states, keys are the patches of all media one after the
other, and a segment says which queries attend to which stretch of keys. No (queries x keys) mask is ever built.

Nothing here is causal, so the query heads that share a key head are further rows that attend to the same keys:
`packed_attention` folds them into rows, and kernels see plain multi-head attention without repeated keys or values.

Shapes: Q packed queries, P packed patches, H query heads, G key/value heads, E head width, D vision width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import accumulate, islice

import torch
from torch import nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from transformers.utils.generic import is_flash_attention_requested

from .vision_crosslmm import TokenNorm

# Stretches [start, end) of the packed patches, ascending and not adjacent.
Span = tuple[tuple[int, int], ...]

CHUNK_BYTES = 2**26
"""Most bytes of keys and values, or of scores, that inference makes at once; longer videos go piece by piece."""


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
    """Queries that attend to the same patches, segment by segment.

    queries: (Q,) rows of the flattened (batch x length) hidden states, in segment order.
    lengths: queries of each segment; sums to Q.
    spans: the patches that each segment attends to.
    is_placeholder: the update is multiplied by zero; it only keeps distributed ranks in step.
    """

    queries: torch.Tensor
    lengths: tuple[int, ...]
    spans: tuple[Span, ...]
    is_placeholder: bool = False
    # Not taken over by `replace`: what is kept belongs to these queries, lengths and spans.
    _ends: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _pieces: dict[int, list] = field(default_factory=dict, init=False, repr=False, compare=False)
    _moved: dict[torch.device, "Segments"] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def placeholder(cls, num_patches: int, device: torch.device) -> "Segments":
        """Row 0 attends to all patches, and its update is multiplied by zero."""
        queries = torch.zeros(1, dtype=torch.long, device=device)
        return cls(queries, (1,), (((0, num_patches),),), is_placeholder=True)

    @classmethod
    def build(cls, groups: dict[Span, list[int]], device: torch.device) -> "Segments | None":
        """Segments of rows grouped by the patches they attend to; None when no row attends to any."""
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
        """The same with `queries` on a device. Kept, because every layer there asks for the same."""
        if self.queries.device == device:
            return self
        moved = self._moved.get(device)
        if moved is None:
            moved = replace(self, queries=self.queries.to(device))
            if not torch.compiler.is_compiling():
                self._moved[device] = moved
        return moved

    def ends(self, lengths: list[int]) -> torch.Tensor:
        """Where stretches of these lengths end, 0 first, on the device of the queries. Kept, because layers and steps
        ask for the same again, and every upload makes the GPU wait."""
        ends = self._ends.get(tuple(lengths))
        if ends is None:
            sums = [0, *accumulate(lengths)]
            ends = torch.tensor(sums, dtype=torch.int32, device=self.queries.device)
            if not torch.compiler.is_compiling():  # what a CUDA graph has made must not outlive it
                self._ends[tuple(lengths)] = ends
        return ends

    def patch_range(self) -> tuple[int, int]:
        """The stretch [first, last) of patches that all spans lie in."""
        stretches = [stretch for span in self.spans for stretch in span]
        return min(start for start, _ in stretches), max(end for _, end in stretches)

    @property
    def is_nested(self) -> bool:
        """Whether many spans begin at one patch and end at another, as those of scope "causal" do."""
        return len(self.spans) > 8 and len({span[0][0] for span in self.spans}) < len(self.spans) // 2

    def clip_to_patches(self, first: int, last: int) -> "Segments":
        """The same for the patches [first, last) alone, counted from `first`. A segment that attends to none of them
        has an empty span. Neighbours that attend to the same are one segment."""
        lengths: list[int] = []
        spans: list[Span] = []
        for length, span in zip(self.lengths, self.spans, strict=True):
            seen = tuple((max(a, first) - first, min(b, last) - first) for a, b in span if a < last and first < b)
            if spans and spans[-1] == seen:
                lengths[-1] += length
            else:
                lengths.append(length)
                spans.append(seen)
        return replace(self, lengths=tuple(lengths), spans=tuple(spans))

    def pieces(self, patches_at_once: int) -> list[tuple[int, int, "Segments"]]:
        """All patches of the segments, so many at a time: [first, last) and `clip_to_patches` of it. Kept, because
        every layer asks for the same."""
        if patches_at_once not in self._pieces:
            first, last = self.patch_range()
            starts = range(first, last, patches_at_once)
            ranges = [(start, min(start + patches_at_once, last)) for start in starts]
            self._pieces[patches_at_once] = [(*both, self.clip_to_patches(*both)) for both in ranges]
        return self._pieces[patches_at_once]


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
    outputs = []
    for rows, lengths, spans in _runs(segments, may_differ=is_varlen):
        queries = query[rows]
        span = merge_span([stretch for span in spans for stretch in span])
        keys, values = take_span(key, span), take_span(value, span)
        extra = {}
        count = len(lengths)
        if is_varlen:
            count = 1
            key_lengths = [span_length(span) for span in spans]
            extra = {
                "cu_seq_lens_q": segments.ends(lengths),
                "cu_seq_lens_k": segments.ends(key_lengths),
                "max_length_q": max(lengths),
                "max_length_k": max(key_lengths),
            }
            queries = queries[None].transpose(1, 2)  # such kernels share keys among heads themselves
        else:
            queries = _heads_as_rows(queries, count, key.shape[1])
        output, _ = attention(
            module,
            queries,
            *(tokens.unflatten(0, (count, -1)).transpose(1, 2) for tokens in (keys, values)),
            None,
            dropout=module.attention_dropout if module.training else 0.0,
            scaling=module.scaling,
            is_causal=False,
            **extra,
        )
        outputs.append(output[0] if is_varlen else _rows_as_heads(output.transpose(1, 2), query.shape[1]))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def attention_piece_by_piece(
    keys_values: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]],
    query: torch.Tensor,
    scaling: float,
    segments: Segments,
    *,
    patches_at_once: int,
) -> torch.Tensor:
    """The same attention when the keys and values of all patches would be too many to hold: they are projected for
    some patches at a time, and the results are merged by their log-sum-exp. For inference.

    keys_values: a stretch of patches, [start, end), to two of (end - start, G, E). query (Q, H, E); returns (Q, H, E).
    """
    precise = torch.promote_types(query.dtype, torch.float32)
    merged = query.new_zeros(query.shape, dtype=precise)
    total = query.new_full((*query.shape[:2], 1), -torch.inf, dtype=precise)
    for start, end, clipped in segments.pieces(patches_at_once):
        key, value = keys_values(start, end)
        for batch in _batches(clipped):
            keys, values = (
                take_span(tokens, batch.span).unflatten(0, (batch.count, -1))[:, : batch.keys].transpose(1, 2)
                for tokens in (key, value)
            )
            queries = _heads_as_rows(batch.take(query).flatten(0, 1), batch.count, key.shape[1])
            output, weight = _attention_with_weight(queries, keys, values, scaling)
            output, weight = (_rows_as_heads(tokens, query.shape[1]) for tokens in (output, weight))
            known = batch.take(merged), batch.take(total)
            attended, total_weight = (tokens.flatten(0, 1) for tokens in known)
            new = _merge(attended, total_weight, output, weight)
            for old, tokens in zip(known, new, strict=True):
                old.copy_(tokens.view_as(old))
    return merged.to(query.dtype)


@dataclass(frozen=True)
class Batch:
    """One call of a kernel: `count` blocks of queries, each with a block of keys of its own.

    rows: the packed queries, and span: the patches, that are split into as many blocks as `count` says.
    first_query: the queries of each block before this one take no part. keys: so many patches of each block do.
    """

    rows: slice
    span: Span
    count: int = 1
    first_query: int = 0
    keys: int | None = None

    def take(self, packed: torch.Tensor) -> torch.Tensor:
        """Its rows (count, queries, …) of a packed tensor: a view."""
        return packed[self.rows].unflatten(0, (self.count, -1))[:, self.first_query :]


def _batches(segments: Segments) -> Iterator[Batch]:
    """Batches that together show every query each patch of its span once.

    Spans that grow by equal steps from one start, as the frames of a video with scope "causal", do not take a call
    each: all see what lies before the first step, each sees its own step, and then, for 1, 2, 4, … steps, the second
    half of every pair of such blocks sees the first half. About log2(n) calls serve n segments.
    """
    runs = list(_runs(segments, may_differ=False))
    at = 0
    while at < len(runs):
        rows, lengths, spans = runs[at]
        count = _num_growing(runs, at)
        if count < 3:
            at += 1
            if spans[0]:
                yield Batch(rows, merge_span([stretch for span in spans for stretch in span]), len(lengths))
            continue
        ((start, end),), ((_, next_end),) = spans[0], runs[at + 1][2][0]
        at, row, length, step = at + count, rows.start, lengths[0], next_end - end
        first = end - step  # where the step of the first segment begins
        if start < first:
            yield Batch(slice(row, row + count * length), ((start, first),))
        yield Batch(slice(row, row + count * length), ((first, first + count * step),), count)
        width = 1
        while width < count:
            pairs, rest = divmod(count, 2 * width)
            if pairs:
                whole = 2 * width * pairs
                span = ((first, first + whole * step),)
                yield Batch(slice(row, row + whole * length), span, pairs, width * length, width * step)
            if rest > width:  # a pair whose second half is not whole
                begin = (count - rest) * step + first
                rows = slice(row + (count - rest + width) * length, row + count * length)
                yield Batch(rows, ((begin, begin + width * step),))
            width *= 2


def _num_growing(runs: list[tuple[slice, list[int], list[Span]]], at: int) -> int:
    """How many runs from `at` on are one segment each, of one length, with spans that grow by equal steps."""
    previous, step, first = 0, 0, runs[at]
    for count, (_, lengths, spans) in enumerate(islice(runs, at, None)):
        (start, end), *more = spans[0] or ((0, 0),)
        if more or len(lengths) > 1 or lengths != first[1] or not spans[0] or start != first[2][0][0][0]:
            return count
        if count == 1:
            step = end - previous
            if not 0 < step <= previous - start:
                return 1
        if count > 1 and end - previous != step:
            return count
        previous = end
    return len(runs) - at


def _attention_with_weight(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (B, G, R, E) of R rows, and the log-sum-exp of their scores (B, G, R, 1)."""
    if query.device.type == "cpu":
        output, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scaling)
    elif (
        query.is_cuda
        and query.shape[-1] % 8 == 0
        and can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, False))
    ):  # in half precision, up to a width, and not on every GPU
        output, weight, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scaling)
    else:
        rows = max(1, CHUNK_BYTES // (4 * key.shape[:3].numel()))
        parts = [_plain_attention(some, key, value, scaling) for some in query.split(rows, dim=2)]
        outputs, weights = zip(*parts, strict=True)
        return torch.cat(outputs, dim=2), torch.cat(weights, dim=2)
    return output, weight[..., None]


def _plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain operations, in float32 or better: attention (…, R, E) and log-sum-exp (…, R, 1)."""
    shares, mass, weight = _shares(_product(query, key.mT).mul_(scaling))
    return _product(shares.to(value.dtype), value) / mass, weight


def _product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The matrix product of tensors (…, n, k) and (…, k, m) of one dtype, summed and returned in float32 or better: in
    half precision scores would round, and sums over many patches overflow."""
    precise = torch.promote_types(one.dtype, torch.float32)
    if one.dtype == precise or _is_converted(one):
        return one.to(precise) @ other.to(precise)
    product = torch.bmm(one.flatten(0, -3), other.flatten(0, -3), out_dtype=precise)
    return product.view(*one.shape[:-1], other.shape[-1])


def _is_converted(tensor: torch.Tensor) -> bool:
    """Whether `_product` makes a copy in float32: half precision, and no product that sums in float32."""
    return tensor.dtype.itemsize < 4 and not tensor.is_cuda


def _attention_over_tokens(
    query: torch.Tensor, tokens: torch.Tensor, norm: TokenNorm | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_plain_attention` of (R, D) over tokens (P, D) as keys and values, as if `norm` were applied to them. With m
    the mean over D, q . (x - m(x)) = (q - m(q)) . x, so the queries are centred and the scores scaled instead of the
    tokens, and the result is centred likewise."""
    query, tokens = query[None], tokens[None]
    if norm is None:
        attended, weight = _plain_attention(query, tokens, tokens, scaling)
        return attended[0], weight[0]
    precise, frames = norm.codes.dtype, len(norm.codes)
    scale = norm.scale.flatten()
    exact = query.to(precise)
    centred = (exact - exact.mean(-1, keepdim=True)).to(query.dtype)
    scores = _product(centred, tokens.mT) * (scaling * scale)
    by_frame = scaling * (exact @ norm.codes.mT)  # (1, R, F)
    scores = (scores.unflatten(-1, (frames, -1)) + by_frame[..., None]).flatten(-2)
    shares, mass, weight = _shares(scores)
    context = _product((shares * scale).to(tokens.dtype), tokens)
    context = context - context.mean(-1, keepdim=True)
    codes = shares.unflatten(-1, (frames, -1)).sum(-1) @ norm.codes
    return ((context + codes) / mass)[0], weight[0]


def _shares(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A softmax in parts, of scores (…, P) that it overwrites: the unnormalised share of each patch, their sum (…, 1)
    and the log-sum-exp (…, 1)."""
    highest = scores.detach().amax(-1, keepdim=True)
    shares = scores.sub_(highest).exp_()
    mass = shares.sum(-1, keepdim=True)
    return shares, mass, highest + mass.log()


def _merge(
    one: torch.Tensor, one_weight: torch.Tensor, other: torch.Tensor, other_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two sets of keys together, from the attention over each and its log-sum-exp (…, 1)."""
    weight = torch.logaddexp(one_weight, other_weight)
    return one * (one_weight - weight).exp() + other * (other_weight - weight).exp(), weight


def _heads_as_rows(query: torch.Tensor, count: int, groups: int) -> torch.Tensor:
    """(count x q, H, E) to (count, G, H/G x q, E)."""
    return query.view(count, -1, groups, query.shape[1] // groups, query.shape[2]).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _rows_as_heads(attended: torch.Tensor, heads: int) -> torch.Tensor:
    """(count, G, H/G x q, …) back to (count x q, H, …)."""
    count, groups, _, width = attended.shape
    return attended.reshape(count, groups, heads // groups, -1, width).permute(0, 3, 1, 2, 4).reshape(-1, heads, width)


def _runs(segments: Segments, *, may_differ: bool) -> Iterator[tuple[slice, list[int], list[Span]]]:
    """Runs of segments whose keys lie side by side, so that one call serves them without a copy: the packed queries of
    the run, how many each segment has, and the span of each.

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
    row = 0
    for lengths, spans in runs:
        yield slice(row, row + sum(lengths)), lengths, spans
        row += sum(lengths)


@dataclass(frozen=True)
class Folding:
    """The key and value projections of a branch as tensors: key (G, E, D), value (G, D, E), value_bias (G, E).

    The projections are called, not read, so adapters, quantised and offloaded weights answer for themselves.
    """

    key: torch.Tensor
    value: torch.Tensor
    value_bias: torch.Tensor

    @classmethod
    def of(
        cls, keys_values: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], states: torch.Tensor
    ) -> "Folding":
        """keys_values: tokens (P, D) to keys and values (P, G, E), an affine map. states: of the width and dtype."""
        width = states.shape[-1]
        basis = states.new_zeros(width + 1, width).fill_diagonal_(1)
        key, value = keys_values(basis)  # (D + 1, G, E), the images of the basis and of 0
        key, value, bias = key[:-1] - key[-1], value[:-1] - value[-1], value[-1]
        return cls(key.permute(1, 2, 0).contiguous(), value.permute(1, 0, 2).contiguous(), bias)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.key, self.value, self.value_bias


def folded_attention(
    query: torch.Tensor,
    stored_tokens: Callable[[int, int], tuple[torch.Tensor, TokenNorm | None]],
    folding: Folding,
    scaling: float,
    segments: Segments,
    *,
    patches_per_frame: int,
) -> torch.Tensor:
    """The same attention without keys or values: W_k is folded into the query; W_v is applied to the attention output.

    stored_tokens: a stretch of patches in whole frames, [start, end), to tokens (end - start, D) and the normalisation
    still to be applied to them. query (Q, H, E); returns (Q, H, E). With k = x W_k + b_k and v = x W_v + b_v:
    q . k = (W_k q) . x + q . b_k, whose second term is the same for all patches and so changes no softmax, and
    sum p v = (sum p x) W_v + b_v. One copy of the tokens serves every layer, read twice.
    """
    groups = len(folding.key)
    grouped = query.unflatten(1, (groups, -1))  # (Q, G, H/G, E)
    folded = torch.einsum("qgre,ged->qgrd", grouped, folding.key).flatten(1, 2)  # (Q, H, D)
    outputs, row = [], 0
    for length, span in zip(segments.lengths, segments.spans, strict=True):
        queries = folded[row : row + length].flatten(0, 1)  # (length x H, D)
        # On a CPU tokens in half precision become float32, so they count as well as the scores.
        numbers = max(len(queries), folded.shape[-1] if _is_converted(folded) else 0)
        at_once = max(1, CHUNK_BYTES // (4 * numbers * patches_per_frame)) * patches_per_frame
        pieces = _cut(span, at_once)
        parts = (_attention_over_tokens(queries, *stored_tokens(*piece), scaling) for piece in pieces)
        context, _ = reduce(lambda one, other: _merge(*one, *other), parts)
        outputs.append(context.to(query.dtype).unflatten(0, (length, groups, -1)))
        row += length
    context = torch.cat(outputs) if len(outputs) > 1 else outputs[0]  # (Q, G, H/G, D)
    attended = torch.einsum("qgrd,gde->qgre", context, folding.value)
    return (attended + folding.value_bias[:, None]).flatten(1, 2)


def _cut(span: Span, at_once: int) -> list[tuple[int, int]]:
    """The stretches of a span, cut after every `at_once` patches. Compared, and not counted with `range`: a compiled
    step then serves videos of other lengths too."""
    pieces = []
    for start, end in span:
        while end - start > at_once:
            pieces.append((start, start + at_once))
            start += at_once
        pieces.append((start, end))
    return pieces
