"""What a training step keeps for its backward pass per frame of video, with and without gradient checkpointing.

    python benchmarks/training_memory.py               # -> training_memory.json, docs/images/training_memory.png
    python benchmarks/training_memory.py "2B, mixed"   # this way alone is measured again

Counted: full-size models on the meta device, in which everything trains, or what `adapt` trains. `saved_tensors_hooks`
sees every tensor that autograd saves; storages count once, weights not at all, and attention keeps what a flash kernel
keeps. What a backward pass makes for the moment (one layer and one chunk of frames at a time) comes on top.

Measured, to see whether the count is right: the same steps on a CPU, with the widths of `memory_curve.py` and its few
layers, each in a process of its own. Resident memory between forward and backward is what is kept, and stands beside
what the same small model is counted to keep; the peaks of the backward pass, first through the language model and then
through the encoder, have what it makes for the moment as well.
"""

import copy
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from memory_curve import NORMALISED, forget_peak, in_child, memory, prepare
from memory_curve import model_of as shallow_model_of
from origin import origin
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface

from transformers_crosslmm import CrossLMMConfig, CrossLMMForConditionalGeneration
from transformers_crosslmm.cache_crosslmm import Medium, VisualMemory
from transformers_crosslmm.modeling_crosslmm import VisualContext
from transformers_crosslmm.training.trainer import PARTS, train_only

HERE = Path(__file__).resolve().parent
RESULTS, CHART = HERE / "training_memory.json", HERE.parent / "docs" / "images" / "training_memory.png"
FRAMES = (32, 64, 128)
TEXT_TOKENS = 64
ADAPT = ("projector", "v2v", "t2v")  # recipes/adapt.yaml
WAYS = {
    "plain": {"checkpointing": False},
    "checkpointing": {},
    "checkpointing, visual_norm and visual_time": {"flavour": "recommended"},
    "checkpointing, mixed": {"mixed": True},
    "checkpointing, mixed, adapt": {"mixed": True, "parts": ADAPT},
}
MEASURED_FRAMES = (16, 32, 48)
MEASURED_WAYS = {
    f"{preset}, {name}": {"preset": preset, **way}
    for preset in ("2B", "7B")
    for name, way in {
        "bfloat16": {},
        "bfloat16, visual_norm and visual_time": {"text": NORMALISED},
        "mixed": {"mixed": True},
        "mixed, adapt": {"mixed": True, "parts": ADAPT},
    }.items()
}


class FlashSaves(torch.autograd.Function):
    """Keeps what a flash kernel keeps: its inputs, its output and a log-sum-exp per row. (On the meta device sdpa is
    plain matrix products, whose probabilities a GPU never stores.)"""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output


def kept_as_by_kernels(module, query, key, value, attention_mask, **kwargs):
    return FlashSaves.apply(query, key, value).transpose(1, 2), None


AttentionInterface.register("kept_as_by_kernels", kept_as_by_kernels)


class SavedBytes(saved_tensors_hooks):
    """Bytes of the storages that autograd saves, those of `known` tensors apart."""

    def __init__(self, known):
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice
        super().__init__(self.note, lambda tensor: tensor)

    def __enter__(self) -> "SavedBytes":
        super().__enter__()
        return self

    def note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.storages[storage._cdata] = storage
        return tensor

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def dtype_of(mixed: bool) -> torch.dtype:
    return torch.float32 if mixed else torch.bfloat16


def model_of(
    config: CrossLMMConfig,
    *,
    checkpointing: bool = True,
    mixed: bool = False,
    parts: Sequence[str] = PARTS,
) -> CrossLMMForConditionalGeneration:
    """mixed: float32 weights, for bfloat16 by autocast, as `crosslmm train` has it; otherwise all is bfloat16."""
    with torch.device("meta"):
        model = CrossLMMForConditionalGeneration._from_config(
            copy.deepcopy(config), dtype=dtype_of(mixed), attn_implementation="kept_as_by_kernels"
        ).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    train_only(model, parts)
    return model


def saved_by_step(model: CrossLMMForConditionalGeneration, num_frames: int) -> dict[str, int]:
    """Bytes that the network keeps, and what the head and the loss keep on top. A model in float32 is counted as under
    autocast: what checkpointing keeps is the stream, in float32, but for the original tokens, in bfloat16.

    As `forward` does it, part by part: on the meta device nobody can look where the placeholders are.
    """
    base, config = model.model, model.config
    size, tokens = config.vision_config.image_size, num_frames * config.tokens_per_frame
    pixels = torch.empty(num_frames, 3, size, size, dtype=model.dtype, device="meta")
    with SavedBytes(model.parameters()) as saved:
        saved.note(pixels)  # the batch is there to the end of the step, whether autograd wants it or not
        encoded = base.get_video_features(pixels, return_dict=True)
        states, _ = base.normalise(encoded.last_hidden_state, torch.arange(num_frames), is_lazy=False)
        memory = VisualMemory(
            "kv",
            config.patch_grid_size**2,
            config.tokens_per_frame,
            rows=[[Medium(range(tokens), (0, len(states)))]],
            num_patches=len(states),
        )
        length = tokens + TEXT_TOKENS
        context = VisualContext(
            memory,
            memory.v2v_segments(0, length, config.v2v_scope, states.device),
            memory.t2v_segments(0, length, None, states.device),
        )
        text = base.get_input_embeddings()(torch.zeros(1, TEXT_TOKENS, dtype=torch.long, device="meta"))
        hidden = base.language_model(
            inputs_embeds=torch.cat([encoded.pooler_output[0][None], text], dim=1),
            visual_states=states,
            visual_context=context,
            use_cache=False,
        ).last_hidden_state
    with SavedBytes([*model.parameters(), hidden]) as head:
        logits = model.lm_head(hidden)
        labels = torch.zeros(1, length, dtype=torch.long, device="meta")
        model.loss_function(logits=logits, labels=labels, vocab_size=config.text_config.vocab_size)
    network = saved.total - (states.numel() * 2 if states.dtype == torch.float32 else 0)
    return {"network": network, "head and loss": head.total}


def growth(values: dict[int, float]) -> float:
    """Per frame, from the fewest to the most."""
    (first, least), *_, (last, most) = values.items()
    return (most - least) / (last - first)


def count(preset: str) -> dict:
    results = {}
    for name, way in WAYS.items():
        way = dict(way)
        model = model_of(CrossLMMConfig.from_preset(preset, flavour=way.pop("flavour", "paper")), **way)
        counts = {frames: saved_by_step(model, frames) for frames in FRAMES}
        network, head = ({frames: count[part] for frames, count in counts.items()} for part in counts[FRAMES[0]])
        results[name] = {
            "gigabytes": {frames: round(size / 1e9, 3) for frames, size in network.items()},
            "megabytes_per_frame": round(growth(network) / 1e6, 2),
            "head_and_loss_megabytes_per_frame": round(growth(head) / 1e6, 2),
        }
    return results


def step(model: CrossLMMForConditionalGeneration, num_frames: int, *, mixed: bool) -> dict[str, float]:
    """MB over what the process held before: between forward and backward, and at most while the language model and
    while the encoder run backwards."""
    config, held = model.config, memory("VmRSS")
    tokens, size = num_frames * config.tokens_per_frame, config.vision_config.image_size
    ids = torch.cat([torch.full((tokens,), config.video_token_id), torch.arange(10, 10 + TEXT_TOKENS)])[None]
    pixels = torch.full((num_frames, 3, size, size), 0.5, dtype=model.dtype)
    points = {}

    def note(what: str, field: str = "VmHWM") -> None:
        if what not in points:
            points[what] = round(memory(field) - held, 1)
            forget_peak()

    def begin_with_the_encoder(module, pixels, encoded):  # when the first gradient of a chunk is there
        if encoded.last_hidden_state.requires_grad:
            encoded.last_hidden_state.register_hook(lambda _: note("language model"))

    hook = model.model.vision_tower.register_forward_hook(begin_with_the_encoder)
    with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
        loss = model(input_ids=ids, labels=ids, pixel_values_videos=pixels).loss
    note("kept", "VmRSS")
    loss.backward()
    note("encoder" if "language model" in points else "language model")
    hook.remove()
    model.zero_grad()
    return points


def measure(
    preset: str,
    *,
    text: dict | None = None,
    mixed: bool = False,
    parts: Sequence[str] = PARTS,
) -> dict:
    model = shallow_model_of(preset, text or {}, dtype_of(mixed)).train()
    model.activation_checkpointing_enable()
    train_only(model, parts)
    once = partial(step, model, mixed=mixed)
    once(2)  # what is made once is made before
    points = {frames: in_child(partial(once, frames)) for frames in MEASURED_FRAMES}
    shadow = model_of(model.config, mixed=mixed, parts=parts)
    counted = {frames: sum(saved_by_step(shadow, frames).values()) / 1e6 for frames in MEASURED_FRAMES}
    return {
        "megabytes": points,
        "counted_megabytes_per_frame": round(growth(counted), 2),
        "megabytes_per_frame": {
            what: round(growth({frames: point[what] for frames, point in points.items()}), 2)
            for what in points[MEASURED_FRAMES[0]]
        },
    }


def draw(sizes: dict) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.2, 4.4))
    for (preset, ways), colour in zip(sizes.items(), ("#4f46e5", "#d97706"), strict=True):
        for name, style in (("plain", "--"), ("checkpointing", "-")):
            line = ways[name]
            label = f"{preset}, {name}"
            points = line["gigabytes"]
            axes.plot(
                [int(frames) for frames in points], list(points.values()), style, color=colour, marker="o", label=label
            )
    axes.set(xlabel="frames", yscale="log", xticks=FRAMES)
    axes.set_title("GB kept for the backward pass", loc="left", fontsize=12, fontweight="bold")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(labelsize=11)
    axes.legend(fontsize=11, loc="center right")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(CHART, dpi=140)


def main() -> None:
    prepare()
    about = origin(__file__)
    kept = json.loads(RESULTS.read_text())
    if not sys.argv[1:]:
        kept = {"about": about, "sizes": {preset: count(preset) for preset in ("2B", "7B")}, "measured": {}}
        draw(kept["sizes"])
    for name in sys.argv[1:] or MEASURED_WAYS:
        kept["measured"][name] = {"about": about, **measure(**MEASURED_WAYS[name])}
        print(name, json.dumps(kept["measured"][name]), flush=True)
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
