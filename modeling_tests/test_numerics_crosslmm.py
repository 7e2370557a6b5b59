"""Numbers in half precision, and how many calls and copies attention makes: measured on the functions themselves."""

import contextlib
import math

import pytest
import torch
from torch import Tensor

from numerics import assert_no_worse_than, distance
from pretend_gpu import pretend_gpus
from transformers_crosslmm import attention_crosslmm
from transformers_crosslmm.attention_crosslmm import (
    Folding,
    Segments,
    attention_piece_by_piece,
    cut_span,
    folded_attention,
    merge_span,
)


def exact_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """(Q, H, E) in float64, segment by segment, head by head."""
    query, key, value = query.double(), key.double(), value.double()
    groups, heads = key.shape[1], query.shape[1]
    outputs, row = [], 0
    for length, span in zip(segments.lengths, segments.spans, strict=True):
        seen = torch.cat([torch.arange(start, end) for start, end in span])
        shared = [head // (heads // groups) for head in range(heads)]
        scores = torch.einsum("qhe,phe->hqp", query[row : row + length], key[seen][:, shared])
        shares = (scores / math.sqrt(query.shape[-1])).softmax(-1)
        outputs.append(torch.einsum("hqp,phe->qhe", shares, value[seen][:, shared]))
        row += length
    return torch.cat(outputs)


def segments_of(lengths: list[int], spans: list[list[tuple[int, int]]]) -> Segments:
    return Segments(torch.arange(sum(lengths)), tuple(lengths), tuple(map(merge_span, spans)))


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the queries of every call of the kernel."""
    shapes = []
    kernel = attention_crosslmm._attention_with_weight

    def counting(query, key, value, scaling):
        shapes.append((tuple(query.shape), tuple(key.shape)))
        return kernel(query, key, value, scaling)

    monkeypatch.setattr(attention_crosslmm, "_attention_with_weight", counting)
    return shapes


# -- how many calls ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 15])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 5, 7, 8, 13, 16, 33, 64])
def test_spans_that_grow_take_a_call_per_doubling(num_frames, before, calls):
    """Three patches a frame and two queries; `before`: patches that all of them see."""
    first = 4
    spans = [[(first, first + before + 3 * (frame + 1))] for frame in range(num_frames)]
    segments = segments_of([2] * num_frames, spans)
    query, key, value = torch.randn(2 * num_frames, 4, 8), *torch.randn(2, first + before + 3 * num_frames, 2, 8)
    found = attention_piece_by_piece(
        lambda start, end: (key[start:end], value[start:end]), query, 8**-0.5, segments, patches_at_once=10**6
    )
    assert distance(found, exact_attention(query, key, value, segments)) < 1e-5
    assert len(calls) <= 2 * math.log2(num_frames) + 2
    assert sum(math.prod((*q[:3], k[2])) for q, k in calls) == 4 * 2 * sum(end - start for ((start, end),) in spans)


@pytest.mark.parametrize("patches_at_once", [6, 9, 30, 10**6])
def test_any_mixture_of_spans_is_attention_over_each(patches_at_once):
    """Growing, alike side by side, several stretches, of unequal length, in any order and cut anywhere."""
    spans = [
        *([(3, 6 + 3 * frame)] for frame in range(9)),
        [(0, 3)], [(3, 6)], [(6, 9)],
        [(0, 6), (12, 33)], [(0, 6), (12, 36)],
        *([(9, 15 + 6 * frame)] for frame in range(5)),
        *([(0, 3 + 3 * frame * frame)] for frame in range(4)),
    ]  # fmt: skip
    lengths = [*[2] * 9, 3, 3, 3, 1, 4, 5, 5, 5, 2, 2, *[1] * 4]
    segments = segments_of(lengths, spans)
    query, key, value = torch.randn(sum(lengths), 4, 8), *torch.randn(2, 42, 2, 8)
    found = attention_piece_by_piece(
        lambda start, end: (key[start:end], value[start:end]),
        query,
        8**-0.5,
        segments,
        patches_at_once=patches_at_once,
    )
    assert distance(found, exact_attention(query, key, value, segments)) < 1e-5


# -- half precision ---------------------------------------------------------------------------------------------------


class Case:
    """One query of four heads over the patches of a long video, as keys and values and as features."""

    def __init__(self, dtype: torch.dtype, *, frames: int, offset: float = 0.0, evenness: float = 1.0):
        """offset: what all scores have on top. evenness: what scores are divided by."""
        generator = torch.Generator().manual_seed(0)
        width, head = 64, 16
        states = 4 + torch.randn(frames * 729, width, generator=generator)
        self.states = states.clamp(max=8.7).to(dtype)
        weights = torch.randn(2, width, 2, head, generator=generator) / width**0.5
        query = torch.randn(1, 4, head, generator=generator) / evenness
        if offset:  # along what all patches have in common
            common = torch.einsum("d,dge->ge", self.states.float().mean(0), weights[0]).repeat_interleave(2, dim=0)
            query = query + common * (offset * head**0.5 / common.square().sum(-1, keepdim=True))
        self.query, self.weights = query.to(dtype), weights.to(dtype)
        self.scaling, self.segments = head**-0.5, segments_of([1], [[(0, len(self.states))]])

    def keys_values(self, states: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        key, value = torch.einsum("pd,ndge->npge", states, weights)
        return key, value

    def exact(self) -> Tensor:
        key, value = self.keys_values(self.states.double(), self.weights.double())
        return exact_attention(self.query, key, value, self.segments)

    def by_keys(self, device: str = "cpu") -> Tensor:
        key, value = (tokens.to(device) for tokens in self.keys_values(self.states, self.weights))
        read = lambda start, end: (key[start:end], value[start:end])  # noqa: E731
        query = self.query.to(device)
        found = attention_piece_by_piece(read, query, self.scaling, self.segments, patches_at_once=40 * 729)
        return found.cpu()

    def by_features(self, device: str = "cpu") -> Tensor:
        weights, states = self.weights.to(device), self.states.to(device)
        folding = Folding.of(lambda tokens: self.keys_values(tokens, weights), states)
        stored = lambda span, at_once: ((states[a:b], None, None) for a, b in cut_span(span, at_once))  # noqa: E731
        query = self.query.to(device)
        return folded_attention(query, stored, folding, self.scaling, self.segments, patches_per_frame=729).cpu()


def formulas(case: Case) -> Tensor:
    """The same in plain operations on the case's own dtype, scores and sums in float32: what "kv" promises."""
    key, value = (tokens.float() for tokens in case.keys_values(case.states, case.weights))
    return exact_attention(case.query, key, value, case.segments).to(case.query.dtype)


CASES = {
    "float16, nearly even over 64 frames": (torch.float16, {"frames": 64, "evenness": 100.0}),
    "bfloat16, nearly even over 64 frames": (torch.bfloat16, {"frames": 64, "evenness": 100.0}),
    "bfloat16, scores around 200": (torch.bfloat16, {"frames": 4, "offset": 200.0}),
    "float16, scores around 200": (torch.float16, {"frames": 4, "offset": 200.0}),
}


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "kind"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_features_and_plain_operations_are_no_worse_than_keys_and_values(dtype, kind, device):
    """On the pretended GPU without a flash kernel, so by plain operations; sums over 46,656 patches of up to 8.7 pass
    what float16 holds, and scores of 200 leave bfloat16 two places behind the point."""
    case = Case(dtype, **kind)
    exact, baseline = case.exact(), formulas(case)
    if "offset" in kind:
        scores = torch.einsum(
            "qhe,phe->hqp", case.query, case.keys_values(case.states, case.weights)[0][:, [0, 0, 1, 1]]
        )
        assert scores.float().mul(case.scaling).mean() == pytest.approx(200, rel=0.05)
    with pretend_gpus(has_flash_kernel=False) if device == "cuda" else contextlib.nullcontext():
        found = {"features": case.by_features(device), "keys": case.by_keys(device)}
    for name, output in found.items():
        assert output.dtype == dtype
        assert output.isfinite().all(), name
        assert_no_worse_than(output, baseline, exact)
