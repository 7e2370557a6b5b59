"""Two processes train as one does on the same samples, though their batches differ: DDP and FSDP2."""

import copy
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import yaml
from test_trainer import TEXT_ONLY
from torch.distributed.fsdp import fully_shard
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from factories import random_model, save_checkpoint, save_training_data, tiny_config
from test_modeling_crosslmm import gradients, labelled
from transformers_crosslmm import CrossLMMForConditionalGeneration
from transformers_crosslmm.training.samples import CrossLMMDataCollator
from transformers_crosslmm.training.trainer import (
    COMPLETE,
    RECIPES,
    last_complete_checkpoint,
    mark_complete,
    parse_recipe,
    train,
)
from two_processes import run_on_two_ranks

LONG = (6, ("video", 9), 5)  # three chunks of the encoder
SHORT = (4, ("video", 2), 7)
IMAGE = (5, ("image", 1), 3, ("video", 2), 4)
BATCHES = {"text": (LONG, TEXT_ONLY), "unequal chunks": (SHORT, LONG), "an image more": (IMAGE, SHORT)}


def give_up_after(seconds: int) -> None:
    """Ranks that wait for each other in different places do so for half an hour otherwise."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), dist.group.WORLD)


# --- one step -------------------------------------------------------------------------------------------------------


def sharded(model):
    """As accelerate does it: every class of `_no_split_modules`, which must exist, and the rest together."""
    names = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= names
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module)
    return fully_shard(model)


def compare_with_one_process(rank: int) -> None:
    give_up_after(60)
    model = random_model(tiny_config()).train()
    parallel = sharded(copy.deepcopy(model))
    used: list[str] = []
    for name, module in parallel.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda *_, name=name: used.append(name))
    for name, layouts in BATCHES.items():
        batches = [labelled(model.config, layout, first_seed=seed) for seed, layout in enumerate(layouts)]
        alone = [gradients(model, batch) for batch in batches]
        used.clear()
        parallel.train()(**batches[rank]).loss.backward()
        orders: list[list[str]] = [[], []]
        dist.all_gather_object(orders, used)
        assert orders[0] == orders[1], f"{name}: ZeRO-3 would wait for ever"  # it gathers weights as they are used
        means = {key: (alone[0][key] + alone[1][key]) / 2 for key in alone[0]}
        largest = max(mean.norm() for mean in means.values())
        for key, parameter in parallel.named_parameters():
            error = (parameter.grad.full_tensor() - means[key]).norm()
            assert error <= 1e-3 * means[key].norm() + 1e-5 * largest, f"{name}: {key}"
        parallel.zero_grad()
        with torch.no_grad():  # evaluation gathers weights just the same
            expected_loss = model.eval()(**batches[rank]).loss
            torch.testing.assert_close(parallel.eval()(**batches[rank]).loss, expected_loss, rtol=1e-4, atol=1e-5)
        model.train()


def test_ranks_with_different_media_stay_in_step_under_fsdp2(tmp_path):
    run_on_two_ranks(compare_with_one_process, tmp_path)


# --- whole runs of the Trainer --------------------------------------------------------------------------------------

STEPS = 4


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A checkpoint with tied embeddings, as the 2B has them, and data of which three in eight have no video; the
    others take one call of the encoder or two."""
    folder = tmp_path_factory.mktemp("run")
    tied = {"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": True}
    save_checkpoint(folder / "model", vision_chunk_size=2, **tied)
    save_training_data(folder)
    (folder / "recipe.yaml").write_text("{report_to: none, use_cpu: true, disable_tqdm: true, logging_steps: 1}")
    return folder


def arguments_of(run_folder, out, **options):
    """Four samples per step, however many processes there are."""
    options = {
        "model": run_folder / "model",
        "train_data": run_folder / "data.jsonl",
        "media_root": run_folder / "media",
        "output_dir": out,
        "learning_rate": 1e-2,
        "max_steps": STEPS,
        "save_steps": 2,
        "global_batch_size": 4,
        "per_device_train_batch_size": 1,
    } | options
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return parse_recipe([str(run_folder / "recipe.yaml"), *words])


def losses(trainer) -> torch.Tensor:
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@pytest.fixture(scope="module")
def alone(run_folder, tmp_path_factory):
    """The losses of one process, and how far they are from themselves when sums come in another order."""
    out = tmp_path_factory.mktemp("alone")
    one_by_one = losses(train(arguments_of(run_folder, out / "1")))
    at_once = losses(train(arguments_of(run_folder, out / "4", per_device_train_batch_size=4)))
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-5, atol=0)
    return one_by_one, torch.maximum((one_by_one - at_once).abs().max(), one_by_one * torch.finfo().eps)


def begin_as_launched(kind: str, run_folder, out):
    """`arguments_of` a process that `accelerate launch --config_file` started; where it counts on GPUs, on the CPU."""
    options = {}
    config = yaml.safe_load((RECIPES / "accelerate" / f"{kind}.yaml").read_text())
    if kind == "fsdp2":
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ |= {name.upper(): str(value) for name, value in config["fsdp_config"].items()}
    elif kind.startswith("zero"):
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled now; gloo does as well
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        names = {"gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"}
        for name, value in config["deepspeed_config"].items():
            os.environ[names.get(name, f"ACCELERATE_DEEPSPEED_{name.removesuffix('_flag').upper()}")] = str(value)
        options = {"use_cpu": False, "ddp_backend": "gloo"}
    arguments = arguments_of(run_folder, out, **options)
    if kind == "fsdp2":
        from accelerate.state import DistributedType, PartialState

        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return arguments


def whole_weights(trainer) -> dict[str, torch.Tensor]:
    """The weights that the processes learned, put together on the first."""
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)


def train_on_two_ranks(rank: int, kind: str, run_folder, out, alone) -> None:
    give_up_after(120)
    has_video = []
    collate = CrossLMMDataCollator.__call__

    def note(self, samples):
        batch = collate(self, samples)
        has_video.append("pixel_values_videos" in batch)
        return batch

    CrossLMMDataCollator.__call__ = note
    arguments = begin_as_launched(kind, run_folder, out)
    assert (arguments.world_size, arguments.gradient_accumulation_steps) == (2, 2)
    trainer = train(arguments)

    model = trainer.model_wrapped
    assert type(model).__name__.startswith({"ddp": "Distributed", "fsdp2": "FSDP"}.get(kind, "DeepSpeed"))
    assert not kind.startswith("zero") or model.zero_optimization_stage() == int(kind[-1])
    on_both = [None, None]
    dist.all_gather_object(on_both, has_video)
    assert len(has_video) == 2 * STEPS
    assert {(True, False), (False, True)} & set(zip(*on_both, strict=True))
    expected, rounding = alone
    if rank == 0:
        assert ((losses(trainer) - expected).abs() <= 4 * rounding).all(), f"{losses(trainer)} is not {expected}"

    # What was saved is what was trained, and is a checkpoint like any other.
    learned = whole_weights(trainer)
    inputs = labelled(trainer.model.config, LONG)
    with torch.no_grad():
        model.eval()
        logits = model(**inputs).logits
    unset_hf_deepspeed_config()  # or ZeRO-3 would share out this one, too
    saved = CrossLMMForConditionalGeneration.from_pretrained(out)
    torch.testing.assert_close(logits, saved(**inputs).logits)
    if rank == 0:
        for name, tensor in saved.state_dict().items():
            assert torch.equal(learned[name], tensor), name

    # And goes on as before.
    dist.barrier()
    if rank == 0:
        (out / f"checkpoint-{STEPS}" / COMPLETE).unlink()
    dist.barrier()
    again = train(begin_as_launched(kind, run_folder, out))
    assert torch.equal(losses(again), losses(trainer))
    weights = whole_weights(again)
    if rank == 0:
        for name, tensor in learned.items():
            assert torch.equal(weights[name], tensor), name
    assert last_complete_checkpoint(out) == str(out / f"checkpoint-{STEPS}")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_processes_train_as_one_does_on_the_same_samples(kind, run_folder, alone, tmp_path):
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed", reason="in an environment of its own: docs/scale.md")
    run_on_two_ranks(train_on_two_ranks, tmp_path, kind, run_folder, tmp_path / "out", alone)


def begin_in_folders_of_their_own(rank: int, run_folder, out) -> None:
    give_up_after(60)
    if rank == 0:
        (out / "0" / "checkpoint-2").mkdir(parents=True)
        mark_complete(out / "0" / "checkpoint-2")
    dist.barrier()
    with pytest.raises(ValueError, match=r"process 0 at checkpoint-2, process 1 at the beginning.*machines share"):
        train(arguments_of(run_folder, out / str(rank)))


def test_machines_that_do_not_share_the_output_do_not_begin_at_different_checkpoints(run_folder, tmp_path):
    run_on_two_ranks(begin_in_folders_of_their_own, tmp_path, run_folder, tmp_path)


def train_in_parts_of_sequences(rank: int, run_folder, out) -> None:
    from accelerate import ParallelismConfig

    give_up_after(60)
    arguments = begin_as_launched("fsdp2", run_folder, out)
    arguments.parallelism_config = ParallelismConfig(cp_size=2)
    with pytest.raises(ValueError, match=r"cp_size=2.*Set it to 1"):
        train(arguments)


def test_the_trainers_own_context_parallelism_is_refused(run_folder, tmp_path):
    run_on_two_ranks(train_in_parts_of_sequences, tmp_path, run_folder, tmp_path / "out")
