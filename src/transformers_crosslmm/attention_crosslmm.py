"""Which tokens attend to which patches, and the attention itself.

Queries and keys are packed: queries are rows of the flattened hidden states, keys are the concatenated patches of all
media, and a segment lists queries that attend to the same patches. No (queries x keys) mask is built.

The attention is not causal, so query heads that share a key head can be treated as further rows: `packed_attention`
folds grouped query heads into rows, and kernels see plain multi-head attention without repeated keys or values.

Shapes: Q packed queries, P packed patches, H query heads, G key/value heads, E head width, D vision width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import accumulate, islice

import torch
from torch import nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional as F
from transformers.utils.generic import is_flash_attention_requested

from .vision_crosslmm import TokenNorm

# Ranges [start, end) of the packed patches, ascending and not adjacent.
Span = tuple[tuple[int, int], ...]

CHUNK_BYTES = 2**26
"""Most bytes of keys and values, or of scores, that inference computes at once; longer videos are split."""


def merge_span(pieces: list[tuple[int, int]]) -> Span:
    """Merges adjacent ranges, so that most spans are one view of the keys."""
    merged: list[tuple[int, int]] = []
    for start, end in pieces:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return tuple(merged)


@dataclass(frozen=True)
class Segments:
    """Packed queries, grouped into segments that attend to the same patches.

    queries: (Q,) rows of the flattened (batch x length) hidden states, in segment order.
    lengths: queries of each segment; sums to Q.
    spans: the patches that each segment attends to.
    is_placeholder: the update is multiplied by zero; the segment only keeps distributed ranks in step.
    """

    queries: torch.Tensor
    lengths: tuple[int, ...]
    spans: tuple[Span, ...]
    is_placeholder: bool = False
    # Caches for these queries, lengths and spans; `replace` does not copy them.
    _ends: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _pieces: dict[tuple, list] = field(default_factory=dict, init=False, repr=False, compare=False)
    _moved: dict[torch.device, "Segments"] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def placeholder(cls, num_patches: int, device: torch.device) -> "Segments":
        """Builds a segment in which row 0 attends to all patches; its update is multiplied by zero."""
        queries = torch.zeros(1, dtype=torch.long, device=device)
        return cls(queries, (1,), (((0, num_patches),),), is_placeholder=True)

    @classmethod
    def build(cls, groups: dict[Span, list[int]], device: torch.device) -> "Segments | None":
        """Builds segments from rows grouped by the patches they attend to; None if no row attends to any."""
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
        """These segments with `queries` on a device; cached, because every layer on that device needs them."""
        if self.queries.device == device:
            return self
        moved = self._moved.get(device)
        if moved is None:
            moved = replace(self, queries=self.queries.to(device))
            if not torch.compiler.is_compiling():
                self._moved[device] = moved
        return moved

    def ends(self, lengths: list[int]) -> torch.Tensor:
        """Cumulative sums of `lengths`, beginning with 0, on the device of the queries; cached, because layers and
        steps need the same sums and every upload makes the GPU wait."""
        ends = self._ends.get(tuple(lengths))
        if ends is None:
            sums = [0, *accumulate(lengths)]
            ends = torch.tensor(sums, dtype=torch.int32, device=self.queries.device)
            if not torch.compiler.is_compiling():  # a tensor made by a CUDA graph must not outlive the graph
                self._ends[tuple(lengths)] = ends
        return ends

    def patch_range(self) -> tuple[int, int]:
        """The smallest range [first, last) of patches that contains all spans."""
        stretches = [stretch for span in self.spans for stretch in span]
        return min(start for start, _ in stretches), max(end for _, end in stretches)

    @property
    def is_nested(self) -> bool:
        """Whether there are many spans and most share a first patch, as with scope "causal"."""
        return len(self.spans) > 8 and len({span[0][0] for span in self.spans}) < len(self.spans) // 2

    def clip_to_patches(self, first: int, last: int) -> "Segments":
        """Restricts the segments to the patches [first, last), renumbered from 0. A segment that attends to none of
        them has an empty span. Adjacent segments with equal spans are merged."""
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

    def in_frames(self, patches_per_frame: int) -> "Segments":
        """Counts in frames instead of patches; the spans must be whole frames."""
        spans = (tuple((a // patches_per_frame, b // patches_per_frame) for a, b in span) for span in self.spans)
        return replace(self, spans=tuple(spans))

    def in_one_frame(self, num_patches: int) -> "Segments":
        """Replaces every span by the patches of one frame, and keeps empty ones."""
        whole = replace(self, spans=tuple(((0, num_patches),) if span else () for span in self.spans))
        return whole.clip_to_patches(0, num_patches)

    def pieces(
        self, patches_at_once: int, runs: tuple[tuple[int, int], ...] = ()
    ) -> list[tuple[int, int, bool, "Segments"]]:
        """Splits the segments into pieces: each of the runs (ascending), and between them at most `patches_at_once`
        patches: (first, last, whether it is a run, the segments clipped to [first, last)). Cached, because every layer
        needs the same pieces."""
        if (patches_at_once, runs) not in self._pieces:
            begin, last = self.patch_range()
            pieces = []
            for start, end in [*runs, (last, last)]:
                start, end = (min(max(patch, begin), last) for patch in (start, end))
                ranges = [(at, min(at + patches_at_once, start), False) for at in range(begin, start, patches_at_once)]
                ranges += [(start, end, True)] if start < end else []
                pieces += [(*patches, is_run, self.clip_to_patches(*patches)) for *patches, is_run in ranges]
                begin = end
            self._pieces[patches_at_once, runs] = pieces
        return self._pieces[patches_at_once, runs]


def take_span(patches: torch.Tensor, span: Span) -> torch.Tensor:
    """Selects the patches of a span along dim 0: a view if the span is one range."""
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
    """Computes attention of packed queries over packed keys, never causal (Eq. 2, 3).

    attention: the implementation that the config names. query (Q, H, E), key and value (P, G, E); returns (Q, H, E).
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
            queries = queries[None].transpose(1, 2)  # varlen kernels share keys among heads themselves
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
    runs: tuple[tuple[int, int], ...] = (),
    dates: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]] | None = None,
    patches_per_frame: int = 1,
) -> torch.Tensor:
    """Computes the same attention with bounded memory, for inference: projects the keys and values of some patches at
    a time and merges the results by their log-sum-exp.

    keys_values: maps patches [start, end) to keys and values, (end - start, G, E) each. query and result: (Q, H, E).
    runs: ranges of frames that show the same picture, to which queries attend once. With keys k_p + e_t and values
    v_p + u_t of patch p and date t, exp(q . k_p + q . e_t) is a product: the attention over a run is the sum of those
    over the picture and over the dates, and so is its log-sum-exp.
    dates: maps a run [start, end) to e_t and u_t of its frames, (frames, G, E) each, 0 for the first frame.
    """
    result = _nothing_yet(query)
    for start, end, is_run, clipped in segments.pieces(patches_at_once, runs):
        if not is_run:
            _attend_too(result, query, *keys_values(start, end), scaling, clipped)
            continue
        assert dates is not None
        picture, when, size = _nothing_yet(query), _nothing_yet(query), patches_per_frame
        _attend_too(picture, query, *keys_values(start, start + size), scaling, clipped.in_one_frame(size))
        _attend_too(when, query, *dates(start, end), scaling, clipped.in_frames(size))
        result = _merge(*result, picture[0] + when[0], picture[1] + when[1])
    return result[0].to(query.dtype)


def _nothing_yet(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Creates the attention (Q, H, E) over no keys and its log-sum-exp (Q, H, 1), which is finite, because merging two
    infinite ones would give NaN."""
    precise = torch.promote_types(query.dtype, torch.float32)
    total = query.new_full((*query.shape[:2], 1), torch.finfo(precise).min / 4, dtype=precise)
    return query.new_zeros(query.shape, dtype=precise), total


def _attend_too(
    result: tuple[torch.Tensor, torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    segments: Segments,
) -> None:
    """Merges attention over more keys and values into a result and its log-sum-exp, in place."""
    for batch in _batches(segments):
        keys, values = (
            take_span(tokens, batch.span).unflatten(0, (batch.count, -1))[:, : batch.keys].transpose(1, 2)
            for tokens in (key, value)
        )
        queries = _heads_as_rows(batch.take(query).flatten(0, 1), batch.count, key.shape[1])
        output, weight = _attention_with_weight(queries, keys, values, scaling)
        output, weight = (_rows_as_heads(tokens, query.shape[1]) for tokens in (output, weight))
        known = tuple(map(batch.take, result))
        attended, total_weight = (tokens.flatten(0, 1) for tokens in known)
        new = _merge(attended, total_weight, output, weight)
        for old, tokens in zip(known, new, strict=True):
            old.copy_(tokens.view_as(old))


@dataclass(frozen=True)
class Batch:
    """One call of a kernel: `count` blocks of queries, each with a block of keys of its own.

    rows: the packed queries, and span: the patches; both are split into `count` blocks of equal size.
    first_query: index, within each block, of the first query used. keys: patches used of each block; None for all.
    """

    rows: slice
    span: Span
    count: int = 1
    first_query: int = 0
    keys: int | None = None

    def take(self, packed: torch.Tensor) -> torch.Tensor:
        """Selects this batch's rows of a packed tensor, as a view (count, queries, …)."""
        return packed[self.rows].unflatten(0, (self.count, -1))[:, self.first_query :]


def _batches(segments: Segments) -> Iterator[Batch]:
    """Yields batches in which, together, every query attends to each patch of its span once.

    n spans that grow by equal steps from one start (the frames of a video with scope "causal") take about 2·log2(n)
    calls instead of n: all attend to the patches before the first step, each attends to its own step, and then, for
    blocks of 1, 2, 4, … steps, the second half of every pair of blocks attends to the first half.
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
            if rest > width:  # the last pair has an incomplete second half
                begin = (count - rest) * step + first
                rows = slice(row + (count - rest + width) * length, row + count * length)
                yield Batch(rows, ((begin, begin + width * step),))
            width *= 2


def _num_growing(runs: list[tuple[slice, list[int], list[Span]]], at: int) -> int:
    """Counts the runs from `at` on that are one segment each, of equal length, with spans that grow by equal steps."""
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
    """Computes attention (B, G, R, E) of R rows, and the log-sum-exp of their scores (B, G, R, 1)."""
    if query.device.type == "cpu":
        output, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scaling)
    elif (
        query.is_cuda
        and query.shape[-1] % 8 == 0
        and can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, False))
    ):  # half precision and limited head width, on GPUs that support it
        output, weight, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scaling)
    else:
        rows = max(1, CHUNK_BYTES // (4 * key.shape[:3].numel()))
        parts = [_plain_attention(some, key, value, scaling) for some in query.split(rows, dim=2)]
        outputs, weights = zip(*parts, strict=True)
        return torch.cat(outputs, dim=2), torch.cat(weights, dim=2)
    return output, weight[..., None]


def _plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention (…, R, E) and log-sum-exp (…, R, 1) in plain operations, in float32 or better.

    bias: added to the scores.
    """
    scores = _product(query, key.mT).mul_(scaling)
    shares, mass, weight = _shares(scores if bias is None else scores + bias)
    return _product(shares.to(value.dtype), value) / mass, weight


def _product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Multiplies matrices (…, n, k) and (…, k, m) of one dtype; sums and returns in float32 or better, because in half
    precision scores would be rounded and sums over many patches would overflow."""
    precise = torch.promote_types(one.dtype, torch.float32)
    if one.dtype == precise or _is_converted(one):
        return one.to(precise) @ other.to(precise)
    product = torch.bmm(one.flatten(0, -3), other.flatten(0, -3), out_dtype=precise)
    return product.view(*one.shape[:-1], other.shape[-1])


def _is_converted(tensor: torch.Tensor) -> bool:
    """Whether `_product` copies the tensor to float32: half precision, on a device without such a product."""
    return tensor.dtype.itemsize < 4 and not tensor.is_cuda


@dataclass(frozen=True)
class Dates:
    """Dates of distinct frames that are shown more than once.

    shown: (T,), the frame that each date shows. first, last, total: the tokens belong to the frames [first, last) of
    `total`.
    """

    shown: torch.Tensor
    first: int
    last: int
    total: int

    def log_sum_exp(self, by_date: torch.Tensor) -> torch.Tensor:
        """Reduces (…, T) to (…, total), over the dates of each frame."""
        shown = self.shown.expand_as(by_date)
        highest = by_date.new_zeros(*by_date.shape[:-1], self.total)
        highest = highest.scatter_reduce(-1, shown, by_date, "amax", include_self=False)
        return highest + torch.zeros_like(highest).scatter_add(-1, shown, self._below(by_date, highest)).log()

    def spread(self, shares: torch.Tensor, by_date: torch.Tensor, by_frame: torch.Tensor) -> torch.Tensor:
        """Divides the shares of frames [first, last) among their dates: (…, T)."""
        shares = F.pad(shares, (self.first, self.total - self.last))
        return shares[..., self.shown] * self._below(by_date, by_frame)

    def _below(self, by_date: torch.Tensor, by_frame: torch.Tensor) -> torch.Tensor:
        return (by_date - by_frame[..., self.shown]).exp()


def _attention_over_tokens(
    query: torch.Tensor, tokens: torch.Tensor, norm: TokenNorm | None, dates: Dates | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes `_plain_attention` of (R, D) over tokens (P, D) as keys and values, as if `norm` were applied to them.
    With m the mean over D, q . (x - m(x)) = (q - m(q)) . x, so the queries are centred and the scores scaled instead
    of the tokens; the result is centred in the same way.

    dates: if given, tokens count once for each of their dates, and the codes of `norm` are those of all dates.
    """
    query, tokens = query[None], tokens[None]
    if norm is None:
        bias = None
        if dates is not None:
            counts = dates.log_sum_exp(query.new_zeros(dates.shown.shape, dtype=torch.float32))
            bias = counts[dates.first : dates.last].repeat_interleave(tokens.shape[1] // (dates.last - dates.first))
        attended, weight = _plain_attention(query, tokens, tokens, scaling, bias)
        return attended[0], weight[0]
    precise, frames = norm.codes.dtype, len(norm.scale)
    scale = norm.scale.flatten()
    exact = query.to(precise)
    centred = (exact - exact.mean(-1, keepdim=True)).to(query.dtype)
    scores = _product(centred, tokens.mT) * (scaling * scale)
    by_date = by_frame = scaling * (exact @ norm.codes.mT)  # (1, R, T)
    if dates is not None:
        by_frame = dates.log_sum_exp(by_date)
    own = by_frame if dates is None else by_frame[..., dates.first : dates.last]
    scores = (scores.unflatten(-1, (frames, -1)) + own[..., None]).flatten(-2)
    shares, mass, weight = _shares(scores)
    context = _product((shares * scale).to(tokens.dtype), tokens)
    context = context - context.mean(-1, keepdim=True)
    frame_shares = shares.unflatten(-1, (frames, -1)).sum(-1)
    if dates is not None:
        frame_shares = dates.spread(frame_shares, by_date, by_frame)
    return ((context + frame_shares @ norm.codes) / mass)[0], weight[0]


def _shares(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the parts of a softmax and overwrites `scores` (…, P): the unnormalised share of each patch, the sum of
    the shares (…, 1) and the log-sum-exp (…, 1)."""
    highest = scores.detach().amax(-1, keepdim=True)
    shares = scores.sub_(highest).exp_()
    mass = shares.sum(-1, keepdim=True)
    return shares, mass, highest + mass.log()


def _merge(
    one: torch.Tensor, one_weight: torch.Tensor, other: torch.Tensor, other_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges the attention over two sets of keys, each given with its log-sum-exp (…, 1)."""
    weight = torch.logaddexp(one_weight, other_weight)
    return one * (one_weight - weight).exp() + other * (other_weight - weight).exp(), weight


def _heads_as_rows(query: torch.Tensor, count: int, groups: int) -> torch.Tensor:
    """Folds query heads into rows: (count x q, H, E) to (count, G, H/G x q, E)."""
    return query.view(count, -1, groups, query.shape[1] // groups, query.shape[2]).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _rows_as_heads(attended: torch.Tensor, heads: int) -> torch.Tensor:
    """Reverses `_heads_as_rows`: (count, G, H/G x q, …) to (count x q, H, …)."""
    count, groups, _, width = attended.shape
    return attended.reshape(count, groups, heads // groups, -1, width).permute(0, 3, 1, 2, 4).reshape(-1, heads, width)


def _runs(segments: Segments, *, may_differ: bool) -> Iterator[tuple[slice, list[int], list[Span]]]:
    """Yields runs of segments whose keys are adjacent, so that one call can serve a run without copying keys: the
    packed queries of the run, the number of queries of each segment, and the span of each segment.

    may_differ: whether segments of different lengths can share a run; otherwise a run is a batch of equal sizes.
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

    `of` calls the projection modules instead of reading weights, so adapters, quantisation and offloading still apply.
    """

    key: torch.Tensor
    value: torch.Tensor
    value_bias: torch.Tensor

    @classmethod
    def of(
        cls, keys_values: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], states: torch.Tensor
    ) -> "Folding":
        """keys_values: an affine map of tokens (P, D) to keys and values (P, G, E). states: gives width and dtype."""
        width = states.shape[-1]
        basis = states.new_zeros(width + 1, width).fill_diagonal_(1)
        key, value = keys_values(basis)  # (D + 1, G, E), the images of the basis and of 0
        key, value, bias = key[:-1] - key[-1], value[:-1] - value[-1], value[-1]
        return cls(key.permute(1, 2, 0).contiguous(), value.permute(1, 0, 2).contiguous(), bias)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.key, self.value, self.value_bias


def folded_attention(
    query: torch.Tensor,
    stored_tokens: Callable[[Span, int], Iterator[tuple[torch.Tensor, TokenNorm | None, Dates | None]]],
    folding: Folding,
    scaling: float,
    segments: Segments,
    *,
    patches_per_frame: int,
) -> torch.Tensor:
    """Computes attention without keys or values: W_k is folded into the query; W_v is applied to the attention output.

    stored_tokens: maps a span of whole frames, and the number of patches at once, to pieces: tokens (patches, D), the
    normalisation still to be applied to them, and their dates if they have several. query and result: (Q, H, E). With
    k = x W_k + b_k and v = x W_v + b_v: q . k = (W_k q) . x + q . b_k, whose second term is the same for all
    patches and so does not change the softmax, and sum p v = (sum p x) W_v + b_v. All layers share one copy of the
    tokens; each reads it twice.
    """
    groups = len(folding.key)
    grouped = query.unflatten(1, (groups, -1))  # (Q, G, H/G, E)
    folded = torch.einsum("qgre,ged->qgrd", grouped, folding.key).flatten(1, 2)  # (Q, H, D)
    outputs, row = [], 0
    for length, span in zip(segments.lengths, segments.spans, strict=True):
        queries = folded[row : row + length].flatten(0, 1)  # (length x H, D)
        # On a CPU, tokens in half precision are converted to float32, so their size counts too.
        numbers = max(len(queries), folded.shape[-1] if _is_converted(folded) else 0)
        at_once = max(1, CHUNK_BYTES // (4 * numbers * patches_per_frame)) * patches_per_frame
        parts = (_attention_over_tokens(queries, *piece, scaling) for piece in stored_tokens(span, at_once))
        context, _ = reduce(lambda one, other: _merge(*one, *other), parts)
        outputs.append(context.to(query.dtype).unflatten(0, (length, groups, -1)))
        row += length
    context = torch.cat(outputs) if len(outputs) > 1 else outputs[0]  # (Q, G, H/G, D)
    attended = torch.einsum("qgrd,gde->qgre", context, folding.value)
    return (attended + folding.value_bias[:, None]).flatten(1, 2)


def cut_span(span: Span, at_once: int) -> list[tuple[int, int]]:
    """Cuts the ranges of a span after every `at_once` patches. The loop compares instead of using `range`, so that a
    compiled step also serves videos of other lengths."""
    pieces = []
    for start, end in span:
        while end - start > at_once:
            pieces.append((start, start + at_once))
            start += at_once
        pieces.append((start, end))
    return pieces
