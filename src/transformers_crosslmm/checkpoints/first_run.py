"""Runs an untrained network on one synthetic frame and a few words, for the report and for the scale of new weights.
It runs in float32 with one module's weights in memory at a time.
"""

import math
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..configuration_crosslmm import CrossLMMConfig
from ..cross_attention_crosslmm import CrossLMMCrossAttentionBranch
from ..modeling_crosslmm import CrossLMMModel
from ..vision_crosslmm import encode_frames
from .folder import StoredTensor
from .network import names_in_class, network_of

WORDS = "What happens in this video, and what comes after that?"


@torch.no_grad()
def first_run(
    config: CrossLMMConfig, tensors: Mapping[str, StoredTensor], tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """Measures, for one frame and the tokens of a sentence:

    attention_entropy: by layer and branch, the entropy of the attention over the frame's patches, mean over queries
        and heads, divided by that of uniform attention (1.0).
    rms: root mean squares of the projector's input ("pooled") and output ("projected"), and of all word embeddings
        ("words").
    largest_activation: the largest absolute value after any layer of the language model; float16's limit is 65,504.

    Returns {} if loading the checkpoint merges or splits tensors.
    """
    model = _network_to_run(config, tensors)
    if model is None:
        return {}
    entropies: dict[str, dict[str, float]] = {}
    rms: dict[str, float] = {}
    largest = [0.0]
    for name, module in model.named_modules():
        if isinstance(module, CrossLMMCrossAttentionBranch):
            seen: dict[str, Tensor] = {}
            module.q_proj.register_forward_hook(partial(_keep_output, seen, "query"))
            module.k_proj.register_forward_hook(partial(_keep_output, seen, "key"))
            layer, branch = name.split(".")[2], name.split(".")[-1]
            module.register_forward_hook(partial(_keep_entropy, seen, entropies.setdefault(layer, {}), branch))

    def keep_rms(module: nn.Module, args: Any, output: Tensor) -> None:
        rms.update(pooled=round(root_mean_square(args[0]), 4), projected=round(root_mean_square(output), 4))

    def keep_largest(module: nn.Module, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        largest.append(float(states.abs().max()))

    model.multi_modal_projector.register_forward_hook(keep_rms)
    for decoder_layer in model.language_model.layers:
        decoder_layer.register_forward_hook(keep_largest)
    if tokenizer is not None:
        words = torch.tensor(tokenizer(WORDS, add_special_tokens=False)["input_ids"])
    else:  # the middle of any vocabulary is words
        words = config.text_config.vocab_size // 2 + torch.arange(8)
    ids = torch.cat([torch.full((config.tokens_per_frame,), config.video_token_id), words])[None]
    model(input_ids=ids, pixel_values_videos=synthetic_frame(config), use_cache=False)
    rms["words"] = round(root_mean_square(tensors["model.language_model.embed_tokens.weight"].read()), 4)
    return {"attention_entropy": entropies, "rms": rms, "largest_activation": round(max(largest), 1)}


@torch.no_grad()
def pooled_rms(config: CrossLMMConfig, tensors: Mapping[str, StoredTensor]) -> float | None:
    """Root mean square of the frame's pooled tokens, or None. Reads the tensors of the vision encoder only."""
    model = _network_to_run(config, tensors, part="vision_tower.")
    if model is None:
        return None
    return root_mean_square(model.pool(encode_frames(model.vision_tower, synthetic_frame(config)).last_hidden_state))


def synthetic_frame(config: CrossLMMConfig) -> Tensor:
    """A frame of smooth random shades, (1, 3, S, S)."""
    size = config.vision_config.image_size
    shades = torch.rand(1, config.vision_config.num_channels, 6, 6, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(shades * 2 - 1, (size, size), mode="bicubic").clamp(-1, 1)


def root_mean_square(tensor: Tensor) -> float:
    squares = sum(float(rows.float().square().sum(dtype=torch.float64)) for rows in tensor.split(8192))
    return math.sqrt(squares / tensor.numel())


def _network_to_run(
    config: CrossLMMConfig, tensors: Mapping[str, StoredTensor], *, part: str = ""
) -> CrossLMMModel | None:
    """A network that loads each module's weights when the module runs; None if a tensor of `part` is not one tensor on
    disk."""
    config = deepcopy(config)
    for each in (config, config.vision_config, config.text_config):
        each.dtype = torch.float32
    whole = network_of(config).eval()
    in_class = names_in_class(whole)
    stored = {in_class(name): tensor for name, tensor in tensors.items()}
    # Buffers are not on disk; `initialize_weights` computes them from the config.
    for module in whole.modules():
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, torch.empty_like(buffer, device="cpu"))
        module._is_hf_initialized = False
    whole.initialize_weights()
    for name, module in whole.model.named_modules():
        parameters = [key for key, _ in module.named_parameters(recurse=False)]
        own = {key: tensor for key in parameters if (tensor := stored.get(f"model.{name}.{key}")) is not None}
        if len(own) == len(parameters) > 0:
            module.register_forward_pre_hook(partial(_fetch_weights, own))
            module.register_forward_hook(_drop_weights)
        elif parameters and name.startswith(part):
            return None
    return whole.model


def _fetch_weights(stored: dict[str, StoredTensor], module: nn.Module, args: Any) -> None:
    for key, tensor in stored.items():
        # Few rows of an embedding are read; converting all of it to float32 would triple its memory.
        value = tensor.read() if isinstance(module, nn.Embedding) else tensor.read().float()
        setattr(module, key, nn.Parameter(value, requires_grad=False))


def _drop_weights(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    for key, parameter in list(module.named_parameters(recurse=False)):
        placeholder = torch.empty_like(parameter, device="meta", dtype=torch.float32)
        setattr(module, key, nn.Parameter(placeholder, requires_grad=False))
    return output.float()


def _keep_output(seen: dict[str, Tensor], name: str, module: nn.Module, args: Any, output: Tensor) -> None:
    seen[name] = output


def _keep_entropy(
    seen: dict[str, Tensor],
    entropies: dict[str, float],
    name: str,
    branch: CrossLMMCrossAttentionBranch,
    args: Any,
    output: Tensor,
) -> None:
    query = branch.split_heads(seen["query"]).transpose(0, 1)  # (H, Q, E)
    key = branch.split_heads(seen["key"]).transpose(0, 1)
    key = key.repeat_interleave(len(query) // len(key), 0)
    log_weights = (query @ key.mT * branch.scaling).log_softmax(-1)
    entropy = -(log_weights.exp() * log_weights).sum(-1).mean()
    entropies[name] = round(float(entropy) / math.log(key.shape[1]), 4)
