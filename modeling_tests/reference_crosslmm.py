"""CrossLMM as plain tensor arithmetic, to be read beside the paper (arXiv 2505.17020).

Slow and literal on purpose: one sample at a time, no batch, no padding, no cache, no attention kernel, no resampling
routine, nothing from Transformers and nothing from `src`. Every function is a formula over tensors and works in
whatever dtype the weights have; float64 weights give the exact value that other implementations are measured against.

`weights` is a state dict (the package's names; SigLIP's and Qwen2's parts named as in Transformers), `config` the
nested dict of numbers that `config.to_dict()` returns. Language models are Qwen2, Llama, Mistral, Qwen3, Qwen3-MoE
and SmolLM3. What the paper leaves open is decided in docs/decisions.md.

Shapes: T frames of one medium, g patches along a side of a frame, N = g·g patches per frame, D vision width,
        s pooled tokens along a side, L language tokens (pooled visual + text), H LLM width,
        A query heads, G key/value heads, E width of a head.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Trace:
    """What the network computed for one sample, first to last; media in prompt order."""

    original: list[Tensor] = field(default_factory=list)
    """X of each medium, (T, N, D): Eq. 1's V."""
    pooled: list[Tensor] = field(default_factory=list)
    """Projected pooled tokens of each medium, (T·s·s, H)."""
    hidden_states: list[Tensor] = field(default_factory=list)
    """(L, H) each: the spliced embeddings, then the output of every decoder layer (before the final norm)."""
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    """(L, V)."""


def crosslmm(
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    token_ids: Tensor,
    media: Sequence[tuple[str, Tensor]] = (),
) -> Trace:
    """Run one sample.

    token_ids: (L,), placeholders already expanded to s·s per frame.
    media: ("video" or "image", frames (T, 3, S, S)), in the order in which they stand in the prompt.
    Raises ValueError if the placeholders are not exactly what the media need.
    """
    text_config = {**config, **config["text_config"]}
    trace = Trace()
    for _, frames in media:
        original = vision_tower(weights, config, frames)  # (T, N, D)
        pooled = pool(original, size=config["pooled_grid_size"], mode=config["pooling_mode"])  # (T, s·s, D)
        trace.original.append(original)
        trace.pooled.append(projector(weights, pooled).flatten(0, 1))  # (T·s·s, H)

    positions = placeholder_positions(config, token_ids, media)  # of each medium, (T·s·s,)
    hidden = weights["model.language_model.embed_tokens.weight"][token_ids]  # (L, H)
    for where, tokens in zip(positions, trace.pooled, strict=True):
        hidden = hidden.index_copy(0, where, tokens)
    trace.hidden_states.append(hidden)

    sources = [key_value_source(text_config, original) for original in trace.original]
    for layer in range(text_config["num_hidden_layers"]):
        hidden = decoder_layer(weights, text_config, layer, hidden, sources, positions)
        trace.hidden_states.append(hidden)

    hidden = rms_norm(hidden, weights["model.language_model.norm.weight"], text_config["rms_norm_eps"])
    tied = config["tie_word_embeddings"]
    head = weights["model.language_model.embed_tokens.weight" if tied else "lm_head.weight"]
    trace.logits = hidden @ head.T  # (L, V)
    return trace


# -- vision: Eq. 1 ----------------------------------------------------------------------------------------------------


def vision_tower(weights: Mapping[str, Tensor], config: Mapping[str, Any], frames: Tensor) -> Tensor:
    """V = {F(v_i)}: (T, 3, S, S) -> (T, N, D) (Eq. 1): SigLIP, the state after `vision_feature_layer`'s block.

    States are counted as in `hidden_states`: 0 is the embedding, k what block k leaves, -1 the last block's.
    """
    vision = config["vision_config"]
    depth = vision["num_hidden_layers"]
    wanted = config["vision_feature_layer"]
    blocks = wanted if wanted >= 0 else depth + 1 + wanted

    hidden = patch_embedding(weights, frames, patch=vision["patch_size"])  # (T, N, D)
    for block in range(blocks):
        name = f"model.vision_tower.encoder.layers.{block}"
        eps = vision["layer_norm_eps"]
        normed = layer_norm(hidden, eps) * weights[f"{name}.layer_norm1.weight"] + weights[f"{name}.layer_norm1.bias"]
        hidden = hidden + vision_self_attention(weights, f"{name}.self_attn", normed, vision["num_attention_heads"])
        normed = layer_norm(hidden, eps) * weights[f"{name}.layer_norm2.weight"] + weights[f"{name}.layer_norm2.bias"]
        inner = gelu_tanh(linear(weights, f"{name}.mlp.fc1", normed))
        hidden = hidden + linear(weights, f"{name}.mlp.fc2", inner)
    return hidden


def patch_embedding(weights: Mapping[str, Tensor], frames: Tensor, *, patch: int) -> Tensor:
    """(T, 3, S, S) -> (T, N, D): one linear map of each patch's pixels, plus the patch's learned position.

    Patches go row by row from the top left; pixels past the last whole patch are dropped.
    """
    num_frames, channels, side, _ = frames.shape
    grid = side // patch
    kernel = weights["model.vision_tower.embeddings.patch_embedding.weight"]  # (D, 3, p, p)
    whole = frames[:, :, : grid * patch, : grid * patch].to(kernel.dtype)
    patches = whole.reshape(num_frames, channels, grid, patch, grid, patch)  # (T, 3, row, p, column, p)
    patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(num_frames, grid * grid, -1)  # (T, N, 3·p·p)
    embedded = patches @ kernel.flatten(1).T + weights["model.vision_tower.embeddings.patch_embedding.bias"]
    return embedded + weights["model.vision_tower.embeddings.position_embedding.weight"]


def vision_self_attention(weights: Mapping[str, Tensor], name: str, hidden: Tensor, heads: int) -> Tensor:
    """Every patch of a frame looks at every patch of the same frame: (T, N, D) -> (T, N, D)."""
    outputs = []
    for frame in hidden:  # (N, D)
        query, key, value = (linear(weights, f"{name}.{part}", frame) for part in ("q_proj", "k_proj", "v_proj"))
        outputs.append(attention(query, key, value, query_heads=heads, key_heads=heads))
    return linear(weights, f"{name}.out_proj", torch.stack(outputs))


# -- token merge and projector: section 3.1 ---------------------------------------------------------------------------


def pool(original: Tensor, *, size: int, mode: str) -> Tensor:
    """(T, N, D) -> (T, s·s, D): the same weighting of rows, then of columns; D is kept and not mixed."""
    num_frames, patches, width = original.shape
    grid = math.isqrt(patches)
    matrix = {"bilinear": bilinear_matrix, "average": average_matrix}[mode](grid, size).to(original.dtype)  # (s, g)
    squares = original.reshape(num_frames, grid, grid, width)  # (T, row, column, D)
    pooled = torch.einsum("ig,jh,tghd->tijd", matrix, matrix, squares)  # (T, s, s, D)
    return pooled.reshape(num_frames, size * size, width)


def bilinear_matrix(grid: int, size: int) -> Tensor:
    """(s, g): each output reads the two patches around its own middle, the nearer one more; no antialias.

    Output i covers the patches from i·g/s to (i+1)·g/s; its middle, counted between patch middles, is at
    (i + ½)·g/s - ½. g = 27, s = 3: 4, 13, 22, so one patch each; s = 4: 2.875, so ⅛ of patch 2 and ⅞ of patch 3.
    """
    matrix = torch.zeros(size, grid, dtype=torch.float64)
    for i in range(size):
        middle = max((i + 0.5) * grid / size - 0.5, 0.0)
        low = math.floor(middle)
        share = middle - low
        matrix[i, low] += 1 - share
        matrix[i, min(low + 1, grid - 1)] += share
    return matrix


def average_matrix(grid: int, size: int) -> Tensor:
    """(s, g): output i is the mean of the patches that its share, from i·g/s to (i+1)·g/s, touches."""
    matrix = torch.zeros(size, grid, dtype=torch.float64)
    for i in range(size):
        first = i * grid // size
        end = -(-(i + 1) * grid // size)  # rounded up
        matrix[i, first:end] = 1 / (end - first)
    return matrix


def projector(weights: Mapping[str, Tensor], pooled: Tensor) -> Tensor:
    """Φ: R^D → R^{d_h} → R^{D'}: (…, D) -> (…, H), two layers with a GELU between."""
    inner = gelu(linear(weights, "model.multi_modal_projector.linear_1", pooled))
    return linear(weights, "model.multi_modal_projector.linear_2", inner)


def placeholder_positions(
    config: Mapping[str, Any], token_ids: Tensor, media: Sequence[tuple[str, Tensor]]
) -> list[Tensor]:
    """Where in the prompt the pooled tokens of each medium stand: frame-major, row-major, (T·s·s,) each."""
    unused = {
        "video": (token_ids == config["video_token_id"]).nonzero().flatten(),
        "image": (token_ids == config["image_token_id"]).nonzero().flatten(),
    }
    positions = []
    for kind, frames in media:
        needed = len(frames) * config["pooled_grid_size"] ** 2
        if len(unused[kind]) < needed:
            raise ValueError(f"A {kind} needs {needed} placeholders; {len(unused[kind])} are left in the prompt.")
        positions.append(unused[kind][:needed])
        unused[kind] = unused[kind][needed:]
    if left := sum(len(rest) for rest in unused.values()):
        raise ValueError(f"{left} placeholders in the prompt have no medium.")
    starts = [int(where[0]) for where in positions]
    if starts != sorted(starts):
        raise ValueError("`media` must stand in the order of the prompt.")
    return positions


# -- language model ---------------------------------------------------------------------------------------------------


def decoder_layer(
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    layer: int,
    hidden: Tensor,
    sources: list[Tensor],
    positions: list[Tensor],
) -> Tensor:
    """(L, H) -> (L, H): the language model's layer, with the dual cross-attention before the MLP where it has one."""
    name = f"model.language_model.layers.{layer}"
    eps = config["rms_norm_eps"]

    normed = rms_norm(hidden, weights[f"{name}.input_layernorm.weight"], eps)
    attended = causal_self_attention(weights, f"{name}.self_attn", config, layer, normed)
    hidden = hidden + attended  # (Eq. 4), pre-norm

    if layer in cross_attention_layers(config) and (config["use_v2v"] or config["use_t2v"]):
        hidden = dual_cross_attention(weights, f"{name}.cross_attention", config, hidden, sources, positions)

    normed = rms_norm(hidden, weights[f"{name}.post_attention_layernorm.weight"], eps)
    if f"{name}.mlp.experts.gate_up_proj" in weights:
        return hidden + mixture_of_experts(weights, f"{name}.mlp", config, normed)
    gated = silu(linear(weights, f"{name}.mlp.gate_proj", normed)) * linear(weights, f"{name}.mlp.up_proj", normed)
    return hidden + linear(weights, f"{name}.mlp.down_proj", gated)


def mixture_of_experts(weights: Mapping[str, Tensor], name: str, config: Mapping[str, Any], hidden: Tensor) -> Tensor:
    """Qwen3-MoE: the k likeliest experts of each token, weighted by their share of these k's likelihood: (L, H)."""
    powers = torch.exp(hidden @ weights[f"{name}.gate.weight"].T)  # (L, experts)
    outputs = []
    for token, likelihood in zip(hidden, powers, strict=True):
        best = sorted(range(len(likelihood)), key=lambda expert: -likelihood[expert].item())
        best = best[: config["num_experts_per_tok"]]
        output = torch.zeros_like(token)
        for expert in best:
            gate, up = (weights[f"{name}.experts.gate_up_proj"][expert] @ token).chunk(2)
            output = output + likelihood[expert] * (weights[f"{name}.experts.down_proj"][expert] @ (silu(gate) * up))
        outputs.append(output / sum(likelihood[expert] for expert in best))
    return torch.stack(outputs)


def cross_attention_layers(config: Mapping[str, Any]) -> list[int]:
    """The layers named one by one, or every K-th from layer 0 on (Figure 2), K = 4 unless given."""
    if config.get("cross_attention_layers") is not None:
        return list(config["cross_attention_layers"])
    interval = config.get("cross_attention_interval") or 4
    return [layer for layer in range(config["num_hidden_layers"]) if layer % interval == 0]


def causal_self_attention(
    weights: Mapping[str, Tensor], name: str, config: Mapping[str, Any], layer: int, hidden: Tensor
) -> Tensor:
    """Each token looks at itself and at those before it, pooled visual and text alike: (L, H) -> (L, H).

    What some models have and others do not: a norm of queries and keys in each head (Qwen3), a window beyond which a
    token sees nothing (Mistral, `layer_types`), layers without positions (SmolLM3).
    """
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    query = linear(weights, f"{name}.q_proj", hidden)  # (L, A·E)
    key = linear(weights, f"{name}.k_proj", hidden)  # (L, G·E)
    value = linear(weights, f"{name}.v_proj", hidden)  # (L, G·E)
    if f"{name}.q_norm.weight" in weights:
        eps = config["rms_norm_eps"]
        query = rms_norm(query.unflatten(-1, (heads, -1)), weights[f"{name}.q_norm.weight"], eps).flatten(-2)
        key = rms_norm(key.unflatten(-1, (key_heads, -1)), weights[f"{name}.k_norm.weight"], eps).flatten(-2)
    if config.get("no_rope_layers") is None or config["no_rope_layers"][layer]:  # 1 where a layer has positions
        query, key = rotate(query, heads, config), rotate(key, key_heads, config)
    kinds = config.get("layer_types")
    is_sliding = kinds[layer] == "sliding_attention" if kinds else bool(config.get("sliding_window"))
    window = config["sliding_window"] if is_sliding else len(hidden)
    length = range(len(hidden))
    visible = torch.tensor([[here - window < there <= here for there in length] for here in length])  # (L, L)
    context = attention(query, key, value, query_heads=heads, key_heads=key_heads, visible=visible)
    return linear(weights, f"{name}.o_proj", context)


def rotate(states: Tensor, heads: int, config: Mapping[str, Any]) -> Tensor:
    """RoPE: (L, heads·E) -> same. In each head, pair j (coordinates j and j + E/2) turns by position·θ^(-2j/E).

    Angles are computed in float32 at least: lower precisions cannot tell late positions apart.
    """
    rope = config["rope_parameters"]
    if rope.get("rope_type", "default") != "default":
        raise NotImplementedError(f"The reference knows plain RoPE only; got rope_type={rope['rope_type']!r}.")
    length = len(states)
    states = states.reshape(length, heads, -1)  # (L, heads, E)
    half = states.shape[-1] // 2
    precision = torch.promote_types(states.dtype, torch.float32)
    pair = torch.arange(half, dtype=precision)
    frequency = rope["rope_theta"] ** (-pair / half)  # (E/2,)
    angle = torch.arange(length, dtype=precision)[:, None, None] * frequency  # (L, 1, E/2)
    cos, sin = angle.cos().to(states.dtype), angle.sin().to(states.dtype)
    first, second = states[..., :half], states[..., half:]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.reshape(length, -1)


# -- dual cross-attention: Eq. 5-10 -----------------------------------------------------------------------------------


def key_value_source(config: Mapping[str, Any], original: Tensor) -> Tensor:
    """What W_k and W_v of every layer are applied to: X, LN(X) or LN(X) + E(t): (T, N, D) -> (T, N, D).

    The paper has X alone (Eq. 6); t counts the frames of a medium from 0.
    """
    source = original
    if config["visual_norm"] == "layernorm":
        source = layer_norm(source, 1e-6)
    if config["visual_time"] == "sinusoidal":
        num_frames, _, width = original.shape
        precision = torch.promote_types(original.dtype, torch.float32)
        pair = torch.arange(width // 2, dtype=precision)
        frequency = 10000 ** (-2 * pair / width)  # f_j, (D/2,)
        angle = torch.arange(num_frames, dtype=precision)[:, None] * frequency  # t·f_j, (T, D/2)
        time = torch.cat([angle.sin(), angle.cos()], dim=-1)  # all sines first, (T, D)
        source = source + time[:, None, :].to(source.dtype)
    return source


def dual_cross_attention(
    weights: Mapping[str, Tensor],
    name: str,
    config: Mapping[str, Any],
    hidden: Tensor,
    sources: list[Tensor],
    positions: list[Tensor],
) -> Tensor:
    """I' -> I' plus what V2V adds to visual rows and T2V to text rows, both computed from the same I': (L, H)."""
    normed = rms_norm(hidden, weights[f"{name}.input_layernorm.weight"], config["rms_norm_eps"])
    update = torch.zeros_like(hidden)  # rows with nothing to look at stay exactly 0
    if config["use_v2v"]:
        for rows, keys in visual_scopes(config["v2v_scope"], sources, positions):
            update[rows] = gated_look(weights, f"{name}.v2v", config, normed[rows], keys)  # (Eq. 5-7)
    if config["use_t2v"]:
        for rows, keys in text_scopes(config["v2v_scope"], len(hidden), sources, positions):
            update[rows] = gated_look(weights, f"{name}.t2v", config, normed[rows], keys)  # (Eq. 8-10)
    return hidden + update


def visual_scopes(scope: str, sources: list[Tensor], positions: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs (rows of one frame's pooled tokens, the patches (M, D) that they look at), each within its own medium."""
    pairs = []
    for source, where in zip(sources, positions, strict=True):
        num_frames = len(source)
        for frame, rows in enumerate(where.reshape(num_frames, -1)):  # (s·s,)
            seen = {
                "video": source,  # Eq. 6: K, V from all T×N original tokens
                "frame": source[frame : frame + 1],
                "causal": source[: frame + 1],
            }[scope]
            pairs.append((rows, seen.flatten(0, 1)))
    return pairs


def text_scopes(
    scope: str, length: int, sources: list[Tensor], positions: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Pairs (a text row, the patches (M, D) of every medium that began before it), none for rows that see nothing.

    In scope "causal" text between the frames of a medium sees the frames before it only.
    """
    visual = {int(row) for where in positions for row in where}
    pairs = []
    for row in range(length):
        if row in visual:
            continue
        seen = []
        for source, where in zip(sources, positions, strict=True):
            begins = where.reshape(len(source), -1)[:, 0]  # of each frame
            num_begun = int((begins < row).sum())
            if num_begun:
                seen.append(source[:num_begun] if scope == "causal" else source)
        if seen:
            pairs.append((torch.tensor([row]), torch.cat([source.flatten(0, 1) for source in seen])))
    return pairs


def gated_look(
    weights: Mapping[str, Tensor], name: str, config: Mapping[str, Any], rows: Tensor, patches: Tensor
) -> Tensor:
    """γ · W_o Attn(W_q I', W_k V, W_v V), γ = tanh(g) (Figure 3): rows (R, H), patches (M, D) -> (R, H)."""
    query = linear(weights, f"{name}.q_proj", rows)  # (R, A·E)    (Eq. 5, 8)
    key = linear(weights, f"{name}.k_proj", patches)  # (M, G·E)   (Eq. 6, 9)
    value = linear(weights, f"{name}.v_proj", patches)  # (M, G·E) (Eq. 6, 9)
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    context = attention(query, key, value, query_heads=heads, key_heads=key_heads)  # no causal mask
    gamma = torch.tanh(weights[f"{name}.gate.weight"])  # (1,)
    return gamma * linear(weights, f"{name}.o_proj", context)  # (Eq. 7, 10)


# -- the formulas underneath ------------------------------------------------------------------------------------------


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_heads: int,
    key_heads: int,
    visible: Tensor | None = None,
) -> Tensor:
    """Softmax(Q Kᵀ / √E) V in each head (Eq. 2, 3): (R, A·E), (M, G·E), (M, G·E) -> (R, A·E).

    A/G neighbouring query heads share one key/value head. visible: (R, M), which keys a row may look at.
    """
    width = query.shape[-1] // query_heads
    contexts = []
    for head in range(query_heads):
        shared = head // (query_heads // key_heads)
        q = query[:, head * width : (head + 1) * width]  # (R, E)
        k = key[:, shared * width : (shared + 1) * width]  # (M, E)
        v = value[:, shared * width : (shared + 1) * width]  # (M, E)
        scores = q @ k.T / math.sqrt(width)  # (R, M)
        if visible is not None:
            scores = scores.masked_fill(~visible, -math.inf)
        powers = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
        contexts.append(powers / powers.sum(dim=-1, keepdim=True) @ v)  # (R, E)
    return torch.cat(contexts, dim=-1)


def linear(weights: Mapping[str, Tensor], name: str, states: Tensor) -> Tensor:
    """W x + b, without b where the weights have none: (…, in) -> (…, out)."""
    product = states @ weights[f"{name}.weight"].T
    return product + weights[f"{name}.bias"] if f"{name}.bias" in weights else product


def layer_norm(states: Tensor, eps: float) -> Tensor:
    """(x - mean) / √(variance + eps) over the last axis, without scale and shift."""
    centred = states - states.mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + eps)


def rms_norm(states: Tensor, scale: Tensor, eps: float) -> Tensor:
    """scale · x / √(mean(x²) + eps) over the last axis."""
    return scale * states / torch.sqrt(states.square().mean(dim=-1, keepdim=True) + eps)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    """x·Φ(x), with the normal distribution itself."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x: Tensor) -> Tensor:
    """SigLIP's "gelu_pytorch_tanh": x·Φ(x), with Φ approximated by a tanh of a cubic."""
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
