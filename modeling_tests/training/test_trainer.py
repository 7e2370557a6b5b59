"""Training mechanics: which gradients flow when, what checkpointing and precision change, and ranks without video."""

import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from factories import random_model, tiny_config
from test_modeling_crosslmm import gradients, labelled
from transformers_crosslmm import CrossLMMForConditionalGeneration, CrossLMMModel
from two_processes import run_on_two_ranks

BOTH = (6, ("video", 3), 5, ("image", 1), 4)
TEXT_ONLY = (23,)


def is_behind_a_gate(name: str) -> bool:
    return "cross_attention" in name and not name.endswith("gate.weight")


# -- what learns when -------------------------------------------------------------------------------------------------


def test_gates_learn_at_step_one_and_what_lies_behind_them_after():
    """A composed model begins at gate 0; the last block's V2V is read by nobody, so it never learns."""
    torch.manual_seed(1)
    model = CrossLMMForConditionalGeneration(tiny_config()).train()
    inputs = labelled(model.config, BOTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = gradients(model, inputs)
    optimizer.step()
    second = gradients(model, inputs)

    assert first.keys() == second.keys() == dict(model.named_parameters()).keys()
    for name in first:
        if "layers.4.cross_attention.v2v" in name:
            assert not first[name].any(), name
            assert not second[name].any(), name
        elif is_behind_a_gate(name):
            assert not first[name].any(), name
            assert second[name].any(), name
        else:
            assert first[name].any(), name


def test_frozen_modules_let_gradients_through_to_those_before_them():
    """Stage 1 of the paper's training: only the projector and V2V learn."""
    model = random_model(tiny_config()).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("multi_modal_projector" in name or ".v2v." in name)
    grads = gradients(model, labelled(model.config, BOTH))
    assert all(grads[name].any() for name in grads if ".layers.4." not in name)
    assert any("multi_modal_projector" in name for name in grads)


# -- gradient checkpointing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layouts", [(BOTH,), (TEXT_ONLY,), (BOTH, TEXT_ONLY)], ids=["media", "text", "mixed"])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_checkpointing_changes_no_gradient(use_reentrant, layouts):
    model = random_model(tiny_config()).train()
    inputs = labelled(model.config, *layouts)
    plain = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = gradients(model, inputs)
    assert checkpointed.keys() == plain.keys()
    for name, expected in plain.items():  # equal up to the order in which images and videos add theirs
        torch.testing.assert_close(checkpointed[name], expected, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_checkpointing_runs_every_layer_again(use_reentrant):
    """Guards the test above: checkpointing that is not on changes no gradient either."""
    model = random_model(tiny_config()).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    for layer in (*model.model.language_model.layers, *model.model.vision_tower.encoder.layers):
        layer.self_attn.q_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(model, labelled(model.config, BOTH))
    calls_of_encoder = 2 * 2  # two blocks; images and videos apart
    # A chunk of frames is run again, and then block by block; without reentrance it stops before the last block.
    assert len(calls) == 2 * 5 + 3 * calls_of_encoder - (0 if use_reentrant else 2)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["none", "reentrant", "not-reentrant"])
def test_a_frozen_encoder_runs_once_and_never_backwards(checkpointing):
    """Transformers' checkpointing has every embedding ask for gradients, that of the patches too."""
    model = random_model(tiny_config()).train()
    model.model.vision_tower.requires_grad_(False)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    forwards, backwards = [], []
    for layer in model.model.vision_tower.encoder.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
        layer.mlp.fc1.register_full_backward_hook(lambda *_: backwards.append(1))
    grads = gradients(model, labelled(model.config, BOTH))
    assert (len(forwards), len(backwards)) == (2 * 2, 0)  # two blocks; images and videos apart
    assert any("multi_modal_projector" in name for name in grads)


def test_a_frozen_encoder_lets_gradients_through_to_the_pixels():
    model = random_model(tiny_config()).train().requires_grad_(False)
    inputs = labelled(model.config, (6, ("video", 3), 5))
    inputs["pixel_values_videos"].requires_grad_()
    model(**inputs).loss.backward()
    assert inputs["pixel_values_videos"].grad.any()


def test_checkpointing_works_on_a_frozen_model_with_adapters():
    peft = pytest.importorskip("peft")
    grads = {}
    for checkpointing in (None, True, False):
        model = random_model(tiny_config()).train()
        torch.manual_seed(3)
        config = peft.LoraConfig(
            r=2, target_modules=r".*(cross_attention|self_attn).*(q|v)_proj", init_lora_weights=False
        )
        model = peft.get_peft_model(model, config)
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        grads[checkpointing] = gradients(model, labelled(model.config, BOTH))
    assert len(grads[None]) == 2 * 2 * (5 + 2 * 3 + 2)  # A and B of q and v: layers, branches, encoder blocks
    assert all("lora_" in name for name in grads[None])
    for checkpointing in (True, False):
        assert grads[checkpointing].keys() == grads[None].keys()
        for name, expected in grads[None].items():
            torch.testing.assert_close(grads[checkpointing][name], expected, msg=name)


def test_a_checkpointed_model_makes_no_cache_in_training_and_one_afterwards():
    model = random_model(tiny_config())
    model.gradient_checkpointing_enable()
    inputs = labelled(model.config, BOTH)
    assert model.train()(**inputs, use_cache=True).past_key_values is None
    assert model.eval()(**inputs, use_cache=True).past_key_values.get_seq_length() == inputs["input_ids"].shape[1]


# -- precision --------------------------------------------------------------------------------------------------------


def with_gates_at(model, value: float):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.fill_(value)
    return model


@pytest.mark.parametrize("load", ["from_pretrained", "_from_config"])
def test_a_bfloat16_model_moves_its_gates_by_small_steps(load, tmp_path):
    """At 0.01 bfloat16 numbers are 6e-5 apart: Adam at 1e-5 would leave such gates where they are."""
    if load == "from_pretrained":
        with_gates_at(random_model(tiny_config()), 0.01).save_pretrained(tmp_path)
        model = CrossLMMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    else:
        model = CrossLMMForConditionalGeneration._from_config(tiny_config(), dtype=torch.bfloat16)
        with_gates_at(model, 0.01)
    model.train()
    gates = {name: p for name, p in model.named_parameters() if name.endswith("gate.weight")}
    assert len(gates) == 6
    assert {p.dtype for p in gates.values()} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if name not in gates} == {torch.bfloat16}

    optimizer = torch.optim.AdamW(gates.values(), lr=1e-5, weight_decay=0.0)
    model(**labelled(model.config, BOTH)).loss.backward()
    optimizer.step()
    for name, gate in gates.items():
        if "layers.4.cross_attention.v2v" not in name:
            assert abs(gate.item() - 0.01) == pytest.approx(1e-5, rel=0.01), name


def test_a_bare_cast_is_what_was_asked_for():
    model = random_model(tiny_config()).to(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.train()(**labelled(model.config, BOTH)).loss.backward()


def test_autocast_trains_float32_parameters():
    model = random_model(tiny_config()).train()
    inputs = labelled(model.config, BOTH)
    exact = gradients(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = gradients(model, inputs)
    assert {grad.dtype for grad in rough.values()} == {torch.float32}
    largest = max(grad.norm() for grad in exact.values())
    for name, grad in exact.items():
        assert (rough[name] - grad).norm() <= 0.1 * grad.norm() + 1e-3 * largest, name


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_num_items_in_batch_makes_accumulated_steps_one_batch():
    """Micro-batches with different numbers of labels, each summed and divided by the number of all."""
    model = random_model(tiny_config()).train()
    layouts = (6, ("video", 2), 3), (4, ("video", 2), 19)
    whole = labelled(model.config, *layouts)
    together = gradients(model, whole)
    count = (whole["labels"][:, 1:] != -100).sum()
    model.zero_grad()
    for seed, layout in enumerate(layouts):
        model(**labelled(model.config, layout, first_seed=seed), num_items_in_batch=count).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, together[name], rtol=1e-3, atol=1e-6, msg=name)


# -- ranks without video ----------------------------------------------------------------------------------------------


def test_a_batch_that_ends_in_a_video_touches_every_parameter():
    """No text looks at it, and another rank's text may."""
    model = random_model(tiny_config()).train()
    assert gradients(model, labelled(model.config, (6, ("video", 2)))).keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_text_only_batches_touch_every_parameter_in_training_only(training):
    model = random_model(tiny_config()).train(training)
    inputs = labelled(model.config, TEXT_ONLY)
    grads = gradients(model, inputs)
    unused = dict(model.named_parameters()).keys() - grads.keys()
    if training:
        assert not unused
    else:
        assert all("cross_attention" in name or "vision_tower" in name or "projector" in name for name in unused)
        assert len(unused) > 50


def test_the_pass_that_keeps_ranks_in_step_changes_neither_loss_nor_gradients():
    model = random_model(tiny_config())
    inputs = labelled(model.config, TEXT_ONLY)
    losses = [model.train(mode)(**inputs).loss for mode in (True, False)]
    assert torch.equal(*losses)
    with_pass, without = gradients(model.train(), inputs), gradients(model.eval(), inputs)
    for name, grad in with_pass.items():
        assert torch.equal(grad, without.get(name, torch.zeros_like(grad))), name


def train_two_steps(rank: int) -> None:
    """Rank 0 has a video, rank 1 only text; both must end with the mean of their gradients."""
    for find_unused in (False, True):
        model = random_model(tiny_config()).train()
        batches = [labelled(model.config, BOTH), labelled(model.config, TEXT_ONLY)]
        alone = [gradients(copy.deepcopy(model), batch) for batch in batches]
        parallel = DistributedDataParallel(model, find_unused_parameters=find_unused)
        for _ in range(2):  # what went wrong in one step DDP notices when the next begins
            model.zero_grad()
            parallel(**batches[rank]).loss.backward()
        for name, parameter in model.named_parameters():
            expected = (alone[0][name] + alone[1][name]) / 2
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_a_rank_without_video_stays_in_step_under_ddp(tmp_path):
    run_on_two_ranks(train_two_steps, tmp_path)


def test_the_base_model_alone_does_the_same():
    """TRL calls the base model and takes the loss itself."""
    model = random_model(tiny_config()).train()
    assert isinstance(model.base_model, CrossLMMModel)
    inputs = labelled(model.config, TEXT_ONLY)
    del inputs["labels"]
    model.base_model(**inputs).last_hidden_state.sum().backward()
    assert all(parameter.grad is not None for parameter in model.base_model.parameters())
