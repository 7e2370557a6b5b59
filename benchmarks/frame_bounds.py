"""Could a decode step leave frames out, with a certificate? How loose bounds of a frame's attention are.

    python benchmarks/frame_bounds.py            # -> benchmarks/frame_bounds.json

A frame of N keys has at most N exp(b) of the softmax, where b bounds q . k from a summary of its keys: the "box" (the
smallest and largest value in each dimension) or the "ball" (their mean and the largest distance from it). Frames are
dropped, the least bound first, as long as the certificate is at most ε: the dropped frames' bounds, over these and
what the kept ones really have. "Oracle" drops by what the frames really have, the most that any bound could reach. The
share of frames dropped, for one head, and for a layer, whose frames are read once for all heads. Attention of T2V in
the steps of answers of the bundled checkpoint; and at a 7B's head width with random keys of 64 frames, independent or
around a centre for each frame, with queries of several sizes.
"""

import json
from collections import defaultdict
from pathlib import Path
from unittest import mock

import torch
from origin import origin

from transformers_crosslmm import TINY_CHECKPOINT, cross_attention_crosslmm
from transformers_crosslmm.asking.conversation import VideoConversation, read_video
from transformers_crosslmm.checkpoints.load import load_model, load_processor

HERE = Path(__file__).resolve().parent
RESULTS, CLIP = HERE / "frame_bounds.json", HERE.parent / "samples" / "shapes.mp4"
EPSILONS = (0.001, 0.01, 0.1)
QUESTIONS = ("In which frame does the red star appear?", "What happens?", "How many frames show a circle?")


def dropped(masses: torch.Tensor, bounds: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Which frames (heads, F) may go. masses, bounds: of each frame's softmax, up to a factor for each head."""
    ascending, order = bounds.sort(-1)
    kept = masses.gather(-1, order)
    kept = kept.flip(-1).cumsum(-1).flip(-1) - kept  # of the frames behind
    largest = ascending.cumsum(-1)
    must_stay = (largest / (largest + kept) > epsilon).cumsum(-1) > 0
    return torch.zeros_like(must_stay).scatter(-1, order, ~must_stay)


def study(query: torch.Tensor, key: torch.Tensor, num_patches: int, scaling: float) -> dict[str, dict[float, tuple]]:
    """query (H, E), key (P, G, E): by bound and ε, the share of frames dropped for a head, and for all heads."""
    heads, groups = len(query), key.shape[1]
    frames = key.unflatten(0, (-1, num_patches)).permute(2, 0, 1, 3).double()  # (G, F, N, E)
    frames = frames.repeat_interleave(heads // groups, 0)
    query = query.double()[:, None] * scaling
    scores = torch.einsum("hxe,hfne->hfn", query, frames)
    low, high, mean = frames.amin(2), frames.amax(2), frames.mean(2)
    radius = (frames - mean[:, :, None]).norm(dim=-1).amax(-1)
    bounds = {
        "box": torch.maximum(query * low, query * high).sum(-1),
        "ball": (query * mean).sum(-1) + query.norm(dim=-1) * radius,
    }
    highest = scores.amax((1, 2))[:, None]
    masses = (scores - highest[..., None]).exp().sum(-1)
    found = {}
    for name, own in {"oracle": masses, **{n: num_patches * (b - highest).exp() for n, b in bounds.items()}}.items():
        found[name] = {}
        for epsilon in EPSILONS:
            gone = dropped(masses, own, epsilon)
            assert ((masses * gone).sum(-1) <= epsilon * masses.sum(-1) * (1 + 1e-9)).all()  # the certificate holds
            found[name][epsilon] = gone.double().mean().item(), gone.all(0).double().mean().item()
    return found


def mean_of(studies: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    total: dict = defaultdict(lambda: defaultdict(list))
    for found in studies:
        for name, shares in found.items():
            for epsilon, both in shares.items():
                total[name][str(epsilon)].append(both)
    return {
        name: {
            e: dict(zip(("head", "layer"), torch.tensor(own).mean(0).tolist(), strict=True)) for e, own in by.items()
        }
        for name, by in total.items()
    }


@torch.no_grad()
def tiny_checkpoint() -> dict:
    model, processor = load_model(TINY_CHECKPOINT), load_processor(TINY_CHECKPOINT)
    model.config.cross_attention_cache = "kv"
    studies, attend = [], cross_attention_crosslmm.packed_attention
    num_patches = model.config.patch_grid_size**2

    def watched(attention, module, query, key, value, segments):
        if len(query) == 1:
            studies.append(study(query[0], key, num_patches, module.scaling))
        return attend(attention, module, query, key, value, segments)

    with mock.patch.object(cross_attention_crosslmm, "packed_attention", watched):
        for question in QUESTIONS:
            conversation = VideoConversation(model, processor, read_video(processor, str(CLIP), num_frames=16))
            conversation.ask(question, max_new_tokens=16)
    return {"steps and layers": len(studies), **mean_of(studies)}


def random_keys(spread: float, size: float) -> dict:
    """spread: of the frames' centres, beside keys of deviation 1. size: the deviation of scores."""
    generator = torch.Generator().manual_seed(0)
    studies = []
    for _ in range(4):
        key = torch.randn(64, 729, 1, 128, generator=generator)
        key += spread * torch.randn(64, 1, 1, 128, generator=generator)
        query = size * torch.randn(7, 128, generator=generator)
        studies.append(study(query, key.flatten(0, 1), 729, 128**-0.5))
    return mean_of(studies)


def main() -> None:
    torch.set_num_threads(1)
    results = origin(__file__) | {
        "tiny checkpoint": tiny_checkpoint(),
    }
    for spread, size in ((0, 1), (0, 4), (1, 1), (1, 4), (3, 4)):
        results[f"random, centres {spread}, scores {size}"] = random_keys(spread, size)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name, found in results.items():
        print(name, found)


if __name__ == "__main__":
    main()
