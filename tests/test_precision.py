"""Tests of chapter `nbs/practice/24_precision.ipynb`."""
import io
import math
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpo_scratch.command import run
from ddpo_scratch.command.architectures import FourBits, configurations, models
from ddpo_scratch.command.cli import prepare
from ddpo_scratch.command.run import plain_reward
from ddpo_scratch.models.families import network_of
from ddpo_scratch.pipelines import load_pipeline
from ddpo_scratch.trainer import ddpo, evaluation
from ddpo_scratch.trainer.checkpoints import state_from_dict, state_to_dict
from ddpo_scratch.trainer.ddpo import DDPOTrainer
from ddpo_scratch.trainer.evaluation import evaluate
from ddpo_scratch.trainer.gradient import Objective, Samples, add_gradient, step_losses
from ddpo_scratch.trainer.lora import save_lora
from ddpo_scratch.trainer.policy import Policy
from ddpo_scratch.trainer.precision import (
    averages_bytes,
    loading_options,
    make_optimizer,
    on_the_cpu,
)
from ddpo_scratch.trainer.presets import make_config, make_prompt_fn
from ddpo_scratch.trainer.rollout import PromptCache
from ddpo_scratch.trainer.trainer import TrainingState, check_run
from helpers import embedded, fake_gpu, flat, opened, redness, sample, train, twin

PROMPTS = ["a fox", "an owl"]

SMALL = dict(num_epochs=1, num_samples_per_epoch=8, samples_per_prompt=1, batch_size=4,
             num_timesteps=3, min_count=8, sample_batch_size=8, img_size=32)


def draw(pipe, mixed_precision="no"):
    return sample(PROMPTS, pipe, 4, 3.0, generators=torch.Generator().manual_seed(0),
                  mixed_precision=mixed_precision)


def gradient(unet):
    return torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])


def test_arithmetic_in_half_and_all_else_in_float32():
    "Under autocast and for models in half precision: nearly the same picture, tensors in float32."
    policy, (latents, _) = draw(embedded())
    exact = policy.decode(latents[-1]).astype(int)
    for kind, convert in (("bf16", None), (torch.bfloat16, lambda pipe: pipe.to(torch.bfloat16)),
                          (torch.bfloat16, lambda pipe: pipe.unet.to(torch.bfloat16)),
                          (torch.float16, lambda pipe: pipe.vae.half())):
        pipe, seen = embedded(), []
        if convert: convert(pipe)
        conv = pipe.unet.conv_out.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
        policy, trajectory = draw(pipe, "no" if convert else kind)
        conv.remove()
        assert {x.dtype for x in trajectory} == {torch.float32}
        assert set(seen) == {torch.float32 if kind == torch.float16 else torch.bfloat16}
        assert 0 < abs(policy.decode(trajectory.latents[-1]) - exact).mean() < 6


def test_the_gradient_in_bf16_points_the_right_way():
    "Float32 gradients of float32 weights, close to the exact ones; scaled and unscaled the same."
    pipe = embedded()
    plain, trajectory = draw(pipe)
    samples = Samples(*trajectory, torch.tensor([1.0, -1.0]), plain.encode(PROMPTS))
    def ask(policy, backward=torch.Tensor.backward):
        pipe.unet.zero_grad()
        add_gradient(policy, samples, Objective(1.0, 10.0), [0, 1], backward=backward)
        return gradient(pipe.unet)
    exact, half = ask(plain), ask(replace(plain, mixed_precision="bf16"))
    assert half.dtype == torch.float32
    assert 0.99 < torch.cosine_similarity(exact, half, dim=0) < 1
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    def scaled(loss): scaler.scale(loss).backward()
    torch.testing.assert_close(ask(plain, scaled) / 1024, exact, rtol=1e-4, atol=1e-6)


def test_training_in_half_precision():
    "bf16, fp16, an adapter over a base in bf16: that arithmetic, and float32 weights, which move."
    half, full, norms = torch.bfloat16, torch.float32, {}
    for precision, base, rank, seen in (("bf16", full, 0, half), ("fp16", full, 0, torch.float16),
                                        ("bf16", half, 2, half), ("no", half, 2, half)):
        pipe, arithmetic, scalers = twin("sd2"), set(), []
        pipe.unet.to(base)
        pipe.unet.conv_out.register_forward_hook(lambda m, i, out: arithmetic.add(out.dtype))
        class Scaler(torch.amp.GradScaler):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                scalers.append(self)
        config = make_config(
            "emoji", **SMALL, mixed_precision=precision, lora_rank=rank, clip_ratio=0.5)
        before = {name: p.detach().clone() for name, p in pipe.unet.named_parameters()}
        with patch("torch.amp.GradScaler", Scaler):
            row, = train(config, pipe, make_prompt_fn(config.prompts), redness)
        assert arithmetic == {seen} and scalers[0].is_enabled() == (precision == "fp16")
        weights = {name: p for name, p in pipe.unet.named_parameters() if p.requires_grad}
        assert {p.dtype for p in weights.values()} == {torch.float32}
        assert all("lora_A" in name or not torch.equal(p, before.get(name, torch.zeros_like(p)))
                   for name, p in weights.items())
        assert row["skipped"] == 0
        assert all(map(math.isfinite, row.values())) and 0 < row["grad_norm"]
        norms[precision, rank] = row["grad_norm"]
    assert 0.5 < norms["fp16", 0] / norms["bf16", 0] < 2  # the scaler's factor is gone


def test_a_gradient_that_leaves_the_range_of_fp16():
    "It is computed again with half the scale, and the update is the one of a small scale."
    config = make_config("emoji", **SMALL | dict(batch_size=8), mixed_precision="fp16",
                         clip_ratio=0.5)
    found, scales = [], []
    for start in (2.0**10, 2.0**30):
        pipe = twin("sd2")
        state = TrainingState(config, pipe)
        state.scaler = torch.amp.GradScaler("cpu", init_scale=start)
        row, = train(config, pipe, make_prompt_fn(config.prompts), redness, state=state)
        assert row["skipped"] == 0 < row["grad_norm"] < math.inf
        found.append(row["grad_norm"]), scales.append(state.scaler.get_scale())
    assert found[0] == pytest.approx(found[1], rel=1e-2)
    assert scales[0] == 2.0**10 < scales[1] < 2.0**30


def test_a_gradient_that_never_is_finite_ends_the_run():
    "At a scale of 1 it is the gradient's own fault, and the loop has an end."
    config = make_config("emoji", **SMALL, mixed_precision="fp16", clip_ratio=0.5)
    trainer, calls = DDPOTrainer(config, twin("sd2"), lambda: "a fox", redness), []
    def gradient():
        calls.append(1)
        trainer.state.scaler.scale(torch.ones(()))
        for weight in trainer.state.weights: weight.grad = torch.full_like(weight, math.inf)
        return {"loss": 0.0}
    _, norm = trainer.finite(gradient)
    assert norm == math.inf and len(calls) == 11  # 2¹⁰ … 2⁰


def test_noise_above_the_clip_is_told():
    "A UNet that answers a little differently at every call warns; an exact one does not."
    for noise, told in ((0.1, 1), (0.0, 0)):
        pipe, config = twin("sd2"), make_config("emoji", **SMALL, clip_ratio=1e-4)
        def blur(module, inputs, out): return out + noise * torch.randn_like(out)
        pipe.unet.conv_out.register_forward_hook(blur)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(config, pipe, make_prompt_fn(config.prompts), redness)
        assert sum("clip_ratio is only 0.0001" in str(w.message) for w in caught) == told


def test_policy_and_reference_round_alike():
    "In bf16, before the first update, the divergence from an untrained copy is exactly 0."
    config = make_config("emoji", **SMALL | dict(batch_size=8), mixed_precision="bf16", beta=1.0)
    row, = train(config, twin("sd2"), make_prompt_fn(config.prompts), redness)
    assert row["ref_kl"] == 0


def test_a_precision_that_cannot_be_had():
    "A name that is none; a device that cannot do it, said before anything is sampled."
    with pytest.raises(ValueError, match="mixed_precision must be 'no' or 'bf16'"):
        make_config("emoji", mixed_precision="int8")
    with patch("torch.autocast", side_effect=RuntimeError("no such type here.")):
        with pytest.raises(ValueError, match="bf16 cannot be had on cpu: no such type here"):
            train(make_config("emoji", **SMALL, mixed_precision="bf16"), embedded(),
                  make_prompt_fn("emoji_animal_prompts"), redness)


def test_an_update_that_is_not_finite_is_left_out():
    "Two bad gradients: counted, the metrics without them; an epoch of bad ones: the end."
    def trained(bad, **changes):
        pipe, calls = twin("sd2"), []
        def spoil(grad):
            calls.append(1)
            return grad * math.nan if len(calls) in bad else grad
        pipe.unet.conv_out.bias.register_hook(spoil)
        config = make_config("emoji", **SMALL | dict(
            num_samples_per_epoch=48, sample_batch_size=48, timestep_fraction=0.1) | changes)
        return pipe, train(config, pipe, make_prompt_fn(config.prompts), redness)
    pipe, (row,) = trained({2, 5})
    assert row["skipped"] == 2 and all(map(math.isfinite, row.values()))
    assert all(p.isfinite().all() for p in pipe.unet.parameters())
    pipe, (row,) = trained(set(range(2, 13)))
    assert row["skipped"] == 11 and row["loss"] == row["loss"]
    with pytest.raises(ValueError, match="epoch 1: none of its 12 updates was finite.*tenth of lr"):
        trained(set(range(1, 13)))


def test_a_process_that_has_no_part_of_a_batch():
    "In fp16 it has scaled no loss; the gradient is the others', and so is the step."
    pipe = twin("sd2")
    ours = DDPOTrainer(make_config("emoji", **SMALL), pipe, lambda: "a fox", redness)
    state, before = ours.state, flat(pipe)
    state.scaler, state.rollout.batches = torch.amp.GradScaler("cpu", 1024.0), [torch.arange(4)]
    def of_the_others(batch):  # as `sum_gradients` leaves it
        for weight in state.weights: weight.grad = torch.full_like(weight, 1024.0)
        return {"loss": 0.0}
    ours.update(0, of_the_others, lambda: None)
    update, = state.rollout.updates
    assert not update["skipped"] and (flat(pipe) < before).all()
    assert update["grad_norm"] == pytest.approx(len(before) ** 0.5, rel=1e-4)


def errors_after_twenty_steps(optimizer, weights):
    "How far the weights are from AdamW's formula in float64, as a share of their way."
    started = [weight.detach().double() for weight in weights]
    by_hand, m, v = list(started), [0, 0], [0, 0]
    for step in range(1, 21):
        for i, weight in enumerate(weights):
            weight.grad = torch.randn_like(weight) + 0.5
            grad = weight.grad.double()
            m[i], v[i] = 0.9 * m[i] + 0.1 * grad, 0.999 * v[i] + 0.001 * grad**2
            by_hand[i] = (1 - 1e-4) * by_hand[i] - 1e-3 * (m[i] / (1 - 0.9**step)) / (
                (v[i] / (1 - 0.999**step)).sqrt() + 1e-8)
        optimizer.step()
    return [((weight.detach() - ours).norm() / (ours - start).norm()).item()
            for weight, ours, start in zip(weights, by_hand, started)]


def two_weights():
    return [torch.nn.Parameter(torch.randn(80, 80)), torch.nn.Parameter(torch.randn(50))]


def test_adamw_is_its_formula():
    "With and without its one pass over the weights, which GPUs are given."
    config = make_config("emoji", lr=1e-3, weight_decay=0.1)
    for fused in (False, True):
        weights = two_weights()
        optimizer = make_optimizer(weights, config)
        optimizer.param_groups[0]["fused"] = fused
        assert max(errors_after_twenty_steps(optimizer, weights)) < 1e-4
    assert optimizer.defaults["fused"] is None
    with FakeTensorMode(): weights = [torch.nn.Parameter(torch.zeros(3, device="cuda"))]
    assert make_optimizer(weights, config).defaults["fused"]


def test_averages_in_eight_bits():
    "AdamW's steps but for rounding; the bytes that the plan counts on."
    pytest.importorskip("bitsandbytes")
    config = make_config("emoji", use_8bit_adam=True, lr=1e-3, weight_decay=0.1)
    weights = two_weights()
    optimizer = make_optimizer(weights, config)
    errors = errors_after_twenty_steps(optimizer, weights)
    for weight, error, close in zip(weights, errors, (0.05, 1e-4)):
        assert error < close and (error > 1e-4) == (weight.numel() > 4096)
        state = optimizer.state[weight]
        held = sum(x.nbytes for name, x in state.items()
                   if name in ("state1", "state2", "absmax1", "absmax2"))
        assert held == averages_bytes(weight.numel(), True)
    assert averages_bytes(6400, False) == 8 * 6400
    with patch("importlib.util.find_spec", return_value=None):
        with pytest.raises(ValueError, match=r"pip install 'ddpo_scratch\[bitsandbytes\]'"):
            train(config, twin("sd2"), make_prompt_fn(config.prompts), redness)


@contextmanager
def quantizing_on_the_cpu():
    "diffusers quantizes on a GPU only, where bitsandbytes does on a CPU, too."
    pytest.importorskip("bitsandbytes")
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer as kind
    with patch.object(kind, "validate_environment"), patch.object(
            kind, "update_device_map", lambda self, device_map: {"": "cpu"}), patch(
            "bitsandbytes.nn.modules.has_avx512bf16", return_value=False):  # it has no gradient
        yield


@pytest.mark.parametrize("name", ("sdxl", "flux-dev"))
def test_frozen_weights_in_four_bits(name, twins, tmp_path):
    "The gradient is that of the weights which the four bits stand for; these stay as they are."
    config = make_config("blog", **SMALL, load_in_4bit=True, lora_rank=2, lr=1e-2, cfg=1.0, eta=0.7)
    part = network_of(opened(twins[name]))
    with quantizing_on_the_cpu():
        pipe = load_pipeline(twins[name], "cpu", **loading_options(
            config, "transformer" if name == "flux-dev" else "unet"))
    network, exact = network_of(pipe), network_of(opened(twins[name]))
    with pytest.raises(ValueError, match="load_in_4bit is False, and the network is in 4 bits"):
        check_run(replace(config, load_in_4bit=False), pipe)
    with pytest.raises(ValueError, match="load_in_4bit is True, and the network is not: give"):
        check_run(config, opened(twins[name]))
    import bitsandbytes
    layers = {path: layer for path, layer in network.named_modules()
              if isinstance(layer, bitsandbytes.nn.Linear4bit)}
    linear = {path: layer for path, layer in part.named_modules()
              if type(layer) is torch.nn.Linear}
    assert layers and layers.keys() == linear.keys()
    for path, layer in layers.items():  # the reference: an ordinary network with these weights
        weight = bitsandbytes.functional.dequantize_4bit(
            layer.weight.data, layer.weight.quant_state)
        original = linear[path].weight
        assert 0.01 < (weight - original).norm() / original.norm() < 0.15
        exact.get_submodule(path).weight.data = weight.float()
    plain = opened(twins[name])
    setattr(plain, "transformer" if name == "flux-dev" else "unet", exact)
    gradients, kept = [], {path: layer.weight.data.clone() for path, layer in layers.items()}
    for one, changes in ((pipe, {}), (plain, dict(load_in_4bit=False))):
        trainer = DDPOTrainer(replace(config, **changes), one, lambda: "a fox", redness)
        torch.manual_seed(0)
        for path, weight in network_of(one).named_parameters():
            if "lora_B" in path: weight.data.normal_(0, 0.1)
        real = trainer.state.optimizer.step
        def step(*rest, one=one, real=real):
            if len(gradients) < 1 + (one is plain): gradients.append(gradient(network_of(one)))
            return real(*rest)
        trainer.state.optimizer.step = step
        trainer.train()
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * gradients[1].abs().max().item())
    assert gradients[0].abs().max() > 0
    for path, layer in network.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            assert torch.equal(layer.weight.data, kept[path.replace(".base_layer", "")])
    save_lora(pipe, tmp_path)
    opened(twins[name]).load_lora_weights(tmp_path)

    held = sum(layer.weight.nbytes + layer.weight.quant_state.absmax.nbytes
               for layer in layers.values())
    planned = [layer for layer in models(replace(config, pipeline=str(twins[name])), configurations(
        str(twins[name])))[0].modules() if isinstance(layer, FourBits)]
    assert len(planned) == len(layers)
    assert held == sum(layer.weight.nbytes + layer.scales.nbytes for layer in planned)


def test_four_bits_are_refused_where_they_cannot_be(tmp_path):
    "Without an adapter; by the command on a CPU, before anything is loaded or written."
    with pytest.raises(ValueError, match="load_in_4bit is for frozen weights"):
        make_config("emoji", load_in_4bit=True)
    pytest.importorskip("bitsandbytes")
    argv = ["--lora_rank=2", "--load_in_4bit", "--device=cpu"]
    with pytest.raises(ValueError, match="load_in_4bit needs a GPU"):
        prepare(argv, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_eight_bits_are_resumed_bit_by_bit():
    "After a saved and loaded state the next epoch is the same; the file holds plain values."
    pytest.importorskip("bitsandbytes")
    config = make_config("emoji", **SMALL | dict(num_epochs=2), use_8bit_adam=True)
    def prompts(): return "a fox"
    pipe, saved = twin("sd2"), []
    state = TrainingState(config, pipe)
    def on_epoch(row):
        if row["epoch"] == 1:
            buffer = io.BytesIO()
            torch.save((state_to_dict(state), pipe.unet.state_dict()), buffer)
            saved.append(buffer)
    whole = train(config, pipe, prompts, redness, on_epoch, state=state)
    again = twin("sd2")
    state = TrainingState(config, again)
    saved[0].seek(0)
    remembered, weights = torch.load(saved[0], weights_only=True)
    again.unet.load_state_dict(weights)
    state_from_dict(state, remembered)
    resumed = train(config, again, prompts, redness, state=state)
    for ours, theirs in zip(whole, resumed, strict=True):
        assert {k: v for k, v in ours.items() if k != "seconds"} == {
            k: v for k, v in theirs.items() if k != "seconds"}
    assert all(map(torch.equal, pipe.unet.parameters(), again.unet.parameters()))


def test_the_loss_with_the_text_encoder_elsewhere():
    "UNet and trajectories on a fake CUDA device, VAE and text encoder still on the CPU."
    fake = embedded()
    with fake_gpu():
        for module, place in ((fake.unet, "cuda"), (fake.text_encoder, "cpu")):
            module.to(place)
        policy = Policy(fake, 4, 3.0, 1.0, (64, 64))
        cache = PromptCache(policy)
        cache.read(PROMPTS)
        latents = torch.zeros(5, 2, *policy.latent_shape, device="cuda")
        samples = Samples(latents, torch.zeros(4, 2).cuda(), torch.ones(2).cuda(), cache(PROMPTS))
        steps = torch.tensor([3, 0], device="cuda")
        parts = step_losses(policy, samples, steps, torch.arange(2).cuda(), Objective(1e-4, 10.0))
        assert {x.device.type for x in parts} == {"cuda"}
        words = policy.encode(["a fox"]).rows
        assert words["encoder_hidden_states"].device.type == "cpu"


class Somewhere(torch.nn.Module):
    "A module that notes where it is sent."
    def __init__(self):
        super().__init__()
        self.device = torch.device("cuda")

    def to(self, place):
        self.device = torch.device(place)


def test_what_is_offloaded_comes_back():
    "Also after an error; only when it is asked for; and it changes no number."
    one, two = Somewhere(), Somewhere()
    with pytest.raises(RuntimeError, match="in between"), on_the_cpu(True, one, two):
        assert one.device.type == two.device.type == "cpu"
        raise RuntimeError("in between")
    assert one.device.type == two.device.type == "cuda"
    with on_the_cpu(False, one): assert one.device.type == "cuda"
    rows = []
    for offload in (False, True):
        pipe, config = twin("sd2"), make_config("emoji", **SMALL, offload=offload)
        rows += train(config, pipe, lambda: "a fox", redness)
    assert {**rows[0], "seconds": 0} == {**rows[1], "seconds": 0}


@pytest.mark.parametrize("name", ("sd2", "sdxl", "sd3", "flux-dev"))
def test_text_encoders_leave_when_they_have_read(name):
    "Out of sampling, updates, evaluation and pipe(prompt); the VAE out of updates; and all return."
    pipe, away, seen = twin(name), set(), set()
    names = {id(module): part for part, module in pipe.components.items()}
    readers = {part for part in pipe.components if part.startswith("text_encoder")}
    @contextmanager
    def on_the_cpu(when, *modules):
        gone = {names[id(module)] for module in modules if when} - away
        away.update(gone)
        yield
        away.difference_update(gone)
    def called(part):
        return lambda *_: seen.add(
            (part, "update" if torch.is_grad_enabled() else "", tuple(sorted(away))))
    for part in readers: pipe.components[part].register_forward_pre_hook(called("read"))
    network_of(pipe).register_forward_pre_hook(called("network"))
    pipe.vae.decoder.register_forward_pre_hook(called("decoding"))
    config = make_config("emoji", **SMALL | dict(num_eval_samples=2), offload=True,
                         cfg=1.0 if name == "flux-dev" else 3.0)
    with ExitStack() as stack:
        for module in (ddpo, evaluation, run):
            stack.enter_context(patch.object(module, "on_the_cpu", on_the_cpu))
        evaluate(config, pipe, ["a fox", "an owl"], redness)
        plain_reward(config, pipe, ["a fox", "an owl"], redness)
        train(config, pipe, lambda: "a fox", redness)
    readers = tuple(sorted(readers))
    assert seen == {("read", "", ()), ("network", "", readers), ("decoding", "", readers),
                    ("network", "update", (*readers, "vae"))} and not away
