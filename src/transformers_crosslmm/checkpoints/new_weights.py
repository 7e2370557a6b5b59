"""Initial values of tensors that no backbone has: cross-attention, projector, and embeddings of new tokens
(docs/decisions.md, C1)."""

import math
import zlib
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial

import torch
from torch import Tensor

from ..configuration_crosslmm import CrossLMMConfig
from .conversion import check_complete
from .first_run import pooled_rms, root_mean_square
from .folder import StoredTensor
from .name_tables import NEW_IN_LAYER
from .network import expected_shapes

INIT_STD = 0.02
GELU_RMS = 0.6521
"""Root mean square of GELU of a standard normal variable."""

NEW_ROW_SPREAD = 0.1
"""Standard deviation of a new token's embedding around the mean embedding, relative to that of the whole table."""

EMBEDDINGS = "model.language_model.embed_tokens.weight"


def with_new_weights(
    config: CrossLMMConfig, taken_over: Mapping[str, StoredTensor], *, dtype: str | None, seed: int
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Adds the missing tensors; returns all tensors in one type (except the gates), and the names of the new ones.

    dtype: None for that of the word embeddings. Raises ConversionError if tensors and config do not fit.
    """
    stored_dtype = getattr(torch, dtype) if dtype else taken_over[EMBEDDINGS].dtype
    taken_over = {name: _in_dtype(tensor, stored_dtype) for name, tensor in taken_over.items()}
    initial = initial_tensors(config, taken_over, dtype=stored_dtype, seed=seed)
    tensors = {**taken_over, **initial}
    check_complete(tensors, config)
    config.dtype = stored_dtype
    config.untrained = True
    return {name: tensors[name] for name in expected_shapes(config)}, list(initial)


def initial_tensors(
    config: CrossLMMConfig, taken_over: Mapping[str, StoredTensor], *, dtype: torch.dtype, seed: int
) -> dict[str, StoredTensor]:
    """Initial values of the tensors that the backbones do not have.

    Norm, queries and output projection of the cross-attention are copies of the same layer's self-attention, without
    biases, with its query norm folded in. Keys and values are drawn from normal(0, 0.02); gates are `gate_init`, in
    float32. The projector is drawn so that its output has the root mean square of the word embeddings.
    """
    initial: dict[str, StoredTensor] = {}
    deviations = _projector_deviations(config, taken_over)
    for name, shape in expected_shapes(config).items():
        if name in taken_over:
            continue
        block = NEW_IN_LAYER.fullmatch(name)
        layer, part = block.groups() if block else ("", "")
        projection = part.split(".")[-2] if block else ""
        draw = partial(_drawn, shape, dtype, f"{seed} {name}")
        if projection == "gate":
            gate = partial(torch.full, shape, config.gate_init, dtype=torch.float32)
            initial[name] = StoredTensor(shape, torch.float32, gate)
        elif projection == "input_layernorm":
            if (norm := taken_over.get(f"{layer}.{part}")) is not None:
                initial[name] = norm
        elif projection in ("q_proj", "o_proj"):
            initial[name] = _of_self_attention(taken_over, layer, projection, shape) or StoredTensor(
                shape, dtype, partial(draw, lambda: INIT_STD)
            )
        elif block:
            initial[name] = StoredTensor(shape, dtype, partial(draw, lambda: INIT_STD))
        elif name.startswith("model.multi_modal_projector.linear_"):
            linear, kind = name.split(".")[2:]
            values = partial(torch.zeros, shape, dtype=dtype) if kind == "bias" else partial(draw, deviations[linear])
            initial[name] = StoredTensor(shape, dtype, values)
    return initial


def _of_self_attention(
    taken_over: Mapping[str, StoredTensor], layer: str, projection: str, shape: tuple[int, ...]
) -> StoredTensor | None:
    """A copy of the layer's own projection; None if it has none of this shape (some merge q, k and v).

    If the layer normalises its queries, the scale of `q_proj` is arbitrary. The cross-attention has no query norm, so
    its copy is scaled to unit output and multiplied by the norm's weights.
    """
    own = taken_over.get(f"{layer}.self_attn.{projection}.weight")
    if own is None or own.shape != shape:
        return None
    query_norm = taken_over.get(f"{layer}.self_attn.q_norm.weight")
    if projection == "o_proj" or query_norm is None:
        return own
    input_norm = taken_over[f"{layer}.input_layernorm.weight"]

    def read() -> Tensor:
        weight, scale = query_norm.read().float(), input_norm.read().float()
        groups = own.read().float().view(-1, len(weight), shape[1])  # one norm per head, or one for all heads
        size = (groups * scale).square().sum(-1).mean(-1).sqrt()  # RMS of a group's output for white noise
        return (groups * weight[:, None] / size[:, None, None]).view(shape).to(own.dtype)

    return StoredTensor(shape, own.dtype, read)


def _projector_deviations(
    config: CrossLMMConfig, taken_over: Mapping[str, StoredTensor]
) -> dict[str, Callable[[], float]]:
    """The deviation of each linear layer's weights, as functions, because the first of them runs the encoder."""

    @cache
    def first() -> float:
        size = pooled_rms(config, taken_over)
        return INIT_STD if size is None else 1 / (size * math.sqrt(config.vision_config.hidden_size))

    def second() -> float:
        width = config.projector_hidden_size or config.text_config.hidden_size
        return root_mean_square(taken_over[EMBEDDINGS].read()) / (GELU_RMS * math.sqrt(width))

    return {"linear_1": first, "linear_2": second}


def _drawn(shape: tuple[int, ...], dtype: torch.dtype, key: str, deviation: Callable[[], float]) -> Tensor:
    """Draws a normal tensor that depends on `key`, the seed and the tensor's name, and on no other draw."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.empty(shape).normal_(0.0, deviation(), generator=generator).to(dtype)


def _in_dtype(tensor: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    return StoredTensor(tensor.shape, dtype, lambda: tensor.read().to(dtype))


def with_new_rows(table: StoredTensor, num_rows: int, new_rows: Collection[int], *, key: str) -> StoredTensor:
    """Resizes an embedding table or head to `num_rows` rows, and initialises `new_rows` and the rows added.

    A new row is the mean row, so that no logit stands out, plus a little noise, so that no two rows are equal.
    """

    def read() -> Tensor:
        old = table.read()
        mean = sum(rows.float().sum(0) for rows in old.split(8192)) / len(old)
        spread = math.sqrt(max(root_mean_square(old) ** 2 - float(mean.square().mean()), 0.0))
        resized = old.new_empty(num_rows, old.shape[1])
        resized[: len(old)] = old
        for row in sorted({*new_rows, *range(len(old), num_rows)}):
            noise = _drawn(mean.shape, torch.float32, f"{key} {row}", lambda: NEW_ROW_SPREAD * spread)
            resized[row] = mean + noise
        return resized

    return StoredTensor((num_rows, table.shape[1]), table.dtype, read)
