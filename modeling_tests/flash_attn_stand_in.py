"""A `flash_attn` that needs no GPU: the real packages' signatures, their checks, and plain maths inside.

`install(monkeypatch, version)` puts it in the place of FlashAttention 2, 3 or 4 for one test and returns the list of
calls. Each call is checked as the kernels check it: half precision, whole tensors, head counts, int32 cumulative
lengths that cover every token, longest segments as ints, and a causal mask aligned to the last key.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor


@dataclass
class Call:
    """One call of a flash function: lengths of the packed segments, and what was asked for."""

    causal: bool
    query_lengths: list[int]
    key_lengths: list[int]
    heads: int
    key_heads: int
    scale: float | None


def install(monkeypatch, version: int) -> list[Call]:
    from transformers import modeling_flash_attention_utils as flash_utils

    calls: list[Call] = []
    package = ModuleType("flash_attn")
    if version == 2:
        package.flash_attn_func, package.flash_attn_varlen_func = functions_2(calls)
        package.flash_attn_with_kvcache = not_used
        padding = ModuleType("flash_attn.bert_padding")
        padding.pad_input, padding.unpad_input = pad_input, unpad_input
        modules = {"flash_attn": package, "flash_attn.bert_padding": padding}
    elif version == 3:
        interface = ModuleType("flash_attn_interface")
        interface.flash_attn_func, interface.flash_attn_varlen_func = functions_3(calls)
        interface.flash_attn_with_kvcache = not_used
        modules = {"flash_attn_interface": interface}
    else:
        cute = ModuleType("flash_attn.cute")
        cute.flash_attn_func, cute.flash_attn_varlen_func = functions_4(calls)
        package.cute = cute
        modules = {"flash_attn": package, "flash_attn.cute": cute}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    for other in (2, 3, 4):
        is_this = other == version
        monkeypatch.setattr(flash_utils, f"is_flash_attn_{other}_available", lambda *_, is_this=is_this, **__: is_this)
    entry = flash_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[version]
    monkeypatch.setitem(entry, "general_availability_check", lambda *_, **__: True)
    monkeypatch.setitem(entry, "supported_devices", ((lambda: True, "cpu"),))
    # Transformers remembers what it imported; afterwards it shall look again.
    for name in (
        "_loaded_implementation",
        "_flash_fn",
        "_flash_varlen_fn",
        "_flash_with_kvcache_fn",
        "_pad_fn",
        "_unpad_fn",
        "_process_flash_kwargs_fn",
        "_process_with_kvcache_kwargs_fn",
    ):
        monkeypatch.setattr(flash_utils, name, None)
    return calls


def functions_2(calls):
    def flash_attn_func(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        assert dropout_p == 0.0
        return batched(calls, q, k, v, softmax_scale, causal)

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        assert dropout_p == 0.0
        return packed(calls, q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), softmax_scale, causal)

    return flash_attn_func, flash_attn_varlen_func


def functions_3(calls):
    def flash_attn_func(
        q,
        k,
        v,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        return batched(calls, q, k, v, softmax_scale, causal)

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        return packed(calls, q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), softmax_scale, causal)

    return flash_attn_func, flash_attn_varlen_func


def functions_4(calls):
    def flash_attn_func(
        q,
        k,
        v,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
    ):
        return batched(calls, q, k, v, softmax_scale, causal), None

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        seqused_q=None,
        seqused_k=None,
        page_table=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
    ):
        longest = (max_seqlen_q, max_seqlen_k)
        return packed(calls, q, k, v, cu_seqlens_q, cu_seqlens_k, longest, softmax_scale, causal), None

    return flash_attn_func, flash_attn_varlen_func


def not_used(*args, **kwargs):
    raise AssertionError("nothing here uses a paged cache")


def batched(calls, q: Tensor, k: Tensor, v: Tensor, scale, causal: bool) -> Tensor:
    """(B, L, heads, width) each."""
    assert q.ndim == k.ndim == v.ndim == 4
    assert len(q) == len(k) == len(v)
    check_tensors(q, k, v)
    calls.append(Call(causal, [q.shape[1]] * len(q), [k.shape[1]] * len(k), q.shape[2], k.shape[2], scale))
    return torch.stack([attend(*row, scale, causal) for row in zip(q, k, v, strict=True)])


def packed(calls, q, k, v, cu_q: Tensor, cu_k: Tensor, longest: tuple, scale, causal: bool) -> Tensor:
    """(tokens, heads, width) each, in segments that begin and end at the cumulative lengths."""
    assert q.ndim == k.ndim == v.ndim == 3
    check_tensors(q, k, v)
    assert cu_q.shape == cu_k.shape
    lengths = []
    for cumulative, tokens, most in ((cu_q, q, longest[0]), (cu_k, k, longest[1])):
        assert cumulative.dtype == torch.int32
        assert cumulative.is_contiguous()
        bounds = cumulative.tolist()
        assert (bounds[0], bounds[-1]) == (0, len(tokens))
        lengths.append([end - start for start, end in pairwise(bounds)])
        assert min(lengths[-1]) > 0
        assert int(most) == max(lengths[-1])
    calls.append(Call(causal, *lengths, q.shape[1], k.shape[1], scale))
    segments = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
    return torch.cat([attend(*segment, scale, causal) for segment in segments])


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert k.shape == v.shape
    assert q.shape[-1] == k.shape[-1] <= 256
    assert q.shape[-2] % k.shape[-2] == 0
    assert all(tensor.stride(-1) == 1 for tensor in (q, k, v))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
    """One segment in float32: q (L, H, E), k and v (M, G, E)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shared = q.shape[1] // k.shape[1]
    key, value = (tokens.float().repeat_interleave(shared, dim=1) for tokens in (k, v))
    scores = torch.einsum("lhe,mhe->hlm", q.float(), key) * scale
    if causal:
        rows, columns = (torch.arange(len(one), device=q.device) for one in (q, k))
        scores = scores.masked_fill(columns > rows[:, None] + len(k) - len(q), float("-inf"))
    return torch.einsum("hlm,mhe->lhe", scores.softmax(-1), value).to(q.dtype)


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    lengths = attention_mask.sum(-1, dtype=torch.int32)
    indices = attention_mask.flatten().nonzero()[:, 0]
    cumulative = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return hidden_states.flatten(0, 1)[indices], indices, cumulative, int(lengths.max()), lengths


def pad_input(hidden_states, indices, batch, seqlen):
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    padded[indices] = hidden_states
    return padded.unflatten(0, (batch, seqlen))
