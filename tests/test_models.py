"""Tests of chapter `nbs/practice/22_models.ipynb`."""
import copy
import re
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch._dynamo.utils import counters
from torch.distributions import MultivariateNormal, Normal

from ddpo_scratch.checks import TRAINABLE
from ddpo_scratch.command.card import model_card
from ddpo_scratch.command.run import run_training
from ddpo_scratch.models.families import FAMILIES, family_of, frozen_parts, network_of
from ddpo_scratch.models.flow import flow_schedule, shift_of, warn_of_much_noise
from ddpo_scratch.pipelines import ddim_scheduler, load_pipeline
from ddpo_scratch.rewards import JPEGCompressibility
from ddpo_scratch.sampling import calculate_log_probs
from ddpo_scratch.trainer.gradient import Objective, Samples, step_losses
from ddpo_scratch.trainer.lora import save_lora
from ddpo_scratch.trainer.policy import Policy
from ddpo_scratch.trainer.presets import PRESETS, make_config, make_prompt_fn
from ddpo_scratch.trainer.trainer import check_run, policy_of
from ddpo_scratch.workshop.twins import TWINS, make_twin
from helpers import (
    TINY,
    as_flags,
    ddpo_train,
    embedded,
    fake_gpu,
    opened,
    redness,
    run_card,
    sample,
    small_rank,
    train,
    twin,
)

PROMPTS = ["a fox", "a picture of an owl"]
WITHOUT_T5 = dict(text_encoder_3=None, tokenizer_3=None)


def plain(folder, name):
    "The pipeline as diffusers alone loads it."
    kind = family_of(make_twin(name)).pipeline
    return kind.from_pretrained(folder, **WITHOUT_T5 if name == "sd3-without-t5" else {})


def with_our_steps(pipe, name):
    "A plain pipeline with the first-order steps that a policy takes, if its own are others."
    if name in ("sd2", "sdxl", "pixart"): pipe.scheduler = ddim_scheduler(pipe.scheduler.config)
    if name == "sana":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, solver_order=1)
    return pipe


def called(name, guidance, negative=None):
    "Arguments of the pipeline's own call, as the models' cards have them."
    own = {"flux-schnell": dict(max_sequence_length=256),
           "sana": dict(use_resolution_binning=False),
           "pixart": dict(use_resolution_binning=False, clean_caption=False)}.get(name, {})
    if name == "qwen-image":
        own = dict(true_cfg_scale=guidance)
        if negative is None and guidance > 1: negative = " "
    else: own["guidance_scale"] = guidance
    return own | ({} if negative is None else dict(negative_prompt=[negative] * 2))


def noise(seed=0): return torch.Generator().manual_seed(seed)


def guidance_of(name): return 1.0 if name == "flux-schnell" else 3.0


@pytest.mark.parametrize("name", TWINS)
def test_same_pictures_as_plain_diffusers(name, twins):
    "Nearly without noise, from the same start, guided or not: within one grey level of `pipe(…)`."
    ours, theirs = opened(twins[name]), with_our_steps(plain(twins[name], name), name)
    height, width = sides = (32, 64) if name == "sana" else (48, 64)  # SANA's are multiples of 32
    for guidance in {1.0, guidance_of(name)}:
        def drawn(prompts, guidance):
            policy, (latents, _) = sample(prompts, ours, 5, guidance, 1e-6, sides, noise(1))
            return policy.decode(latents[-1]).astype(int)
        expected = theirs(prompt=PROMPTS, height=height, width=width, output_type="np",
                          num_inference_steps=5, generator=noise(1),
                          **called(name, guidance)).images
        pictures = drawn(PROMPTS, guidance)
        assert abs(pictures - np.round(expected * 255)).max() <= 1
        assert pictures.shape == (2, *sides, 3) and pictures.std() > 10
        assert abs(pictures - drawn(["a whale", "owl"], guidance)).max() > 1
        if guidance > 1: assert abs(pictures - drawn(PROMPTS, 9.0)).max() > 1


@pytest.mark.parametrize("name", [name for name in TWINS if not name.startswith("flux")])
def test_negative_prompts_as_in_plain_diffusers(name, twins):
    "Guided away from one, or from the empty text, which for XL is not the same as from nothing."
    ours, theirs = opened(twins[name]), with_our_steps(plain(twins[name], name), name)
    drawn = {}
    for negative in (None, "", "a whale, blurred"):
        policy, (latents, _) = sample(PROMPTS, ours, 3, 3.0, 1e-6, (32, 32), noise(1),
                                      negative_prompt=negative)
        drawn[negative] = policy.decode(latents[-1]).astype(int)
        expected = theirs(PROMPTS, height=32, width=32, output_type="np", num_inference_steps=3,
                          generator=noise(1), **called(name, 3.0, negative)).images
        assert abs(drawn[negative] - np.round(expected * 255)).max() <= 1
    assert abs(drawn[None] - drawn["a whale, blurred"]).max() > 1
    assert (abs(drawn[None] - drawn[""]).max() > 1) == (name in ("sdxl", "qwen-image"))


def test_what_negative_prompts_cannot_do(twins):
    "Refused without guidance, and for a model that is never called without the prompt."
    with pytest.raises(ValueError, match="negative_prompt has no effect without guidance, and cfg"):
        make_config("emoji", negative_prompt="blurred")
    flux = opened(twins["flux-dev"])
    with pytest.raises(ValueError, match="negative_prompt has no effect on this model"):
        sample(PROMPTS, flux, 2, 3.0, 1.0, (32, 32), negative_prompt="blurred")


def test_pixart_has_no_adapters(twins):
    "diffusers has none for its transformer; that is said before anything is drawn."
    with pytest.raises(ValueError, match="no adapters for a PixArtTransformer2DModel: set lora_ra"):
        train(tiny_run(lora_rank=4), opened(twins["pixart"]), lambda: "a fox", redness)


def tiny_run(**changes):
    return make_config("blog", **dict(
        num_epochs=2, num_samples_per_epoch=4, batch_size=2, num_timesteps=3, img_size=32,
        sample_batch_size=3, lr=1e-3, clip_ratio=0.1, eta=0.7, cfg=3.0, beta=0.1, offload=True,
    ) | changes)


@pytest.mark.parametrize("name, lora_rank", [
    *((name, 0) for name in TWINS if name not in ("sd3-without-t5", "flux-schnell")),
    *((name, 4) for name in TWINS if name != "pixart"),
    pytest.param("sd3-without-t5", 0, marks=pytest.mark.slow),
    pytest.param("flux-schnell", 0, marks=pytest.mark.slow)])
def test_training_saving_and_opening_again(name, lora_rank, twins):
    "Ratio 1 at first; what is frozen stays; plain diffusers opens the result and draws the same."
    pipe = opened(twins[name])
    def weights(*parts): return torch.cat([p.detach().flatten() for x in parts
                                           for p in x.parameters()]).clone()
    frozen = weights(*frozen_parts(pipe))
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    prompts = iter(PROMPTS * 4)
    config = tiny_run(lora_rank=lora_rank, cfg=guidance_of(name),
                      lora_alpha=3.0 * lora_rank if lora_rank else None)
    first, second = train(config, pipe, lambda: next(prompts), redness)
    assert first["max_log_ratio"] < 1e-5 and first["grad_norm"] > 0
    assert second["ref_kl"] > first["ref_kl"] >= 0 and first["skipped"] == 0
    assert torch.equal(frozen, weights(*frozen_parts(pipe)))
    assert not any(p.requires_grad for part in frozen_parts(pipe) for p in part.parameters())
    untrained = opened(twins[name])
    with TemporaryDirectory() as room:
        if lora_rank:
            save_lora(pipe, room)
            again = opened(twins[name])
            again.load_lora_weights(room)
            adapted = {key.split(".lora_")[0] for key, _ in network_of(again).named_parameters()
                       if ".lora_" in key}
            assert adapted and all(key.endswith(targets) for key in adapted)
        else:
            pipe.save_pretrained(room)
            again = plain(room, name)
            again.scheduler = pipe.scheduler
    def draw(pipe): return sample(PROMPTS, pipe, 3, 1.0, 0.7, (32, 32), noise())[1].latents[-1]
    torch.testing.assert_close(draw(again), draw(pipe), rtol=0, atol=1e-5)
    assert (draw(untrained) - draw(pipe)).abs().max() > 1e-3


@pytest.mark.parametrize("name", TWINS)
def test_samples_do_not_see_each_other(name, twins):
    "Conditioning by sample, in any order, with and without guidance, and in half precision."
    pipe = opened(twins[name])
    prompts = [*PROMPTS, "a whale"]
    for guidance in {1.0, guidance_of(name)}:
        policy = Policy(pipe, 4, guidance, 0.7, (32, 32))
        cond = policy.encode(prompts)
        assert cond.guided == (guidance > 1 and not name.startswith("flux-"))
        for pick in ([2], [1, 0], slice(1, 3)):
            alone = policy.encode(np.array(prompts)[pick].tolist())
            torch.testing.assert_close(cond[pick].rows, alone.rows)
        x = torch.randn(3, *policy.latent_shape)
        with torch.no_grad():
            mean, _ = policy.step(x, 2, cond)
            one, _ = policy.step(x[1:2], 2, cond[[1]])
            mixed, _ = policy.step(x, torch.tensor([1, 2, 0]), cond)  # a step of its own for each
        torch.testing.assert_close(mean[1:2], one, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mixed[1:2], one, rtol=1e-4, atol=1e-5)
        assert (mixed - mean).abs().amax((1, 2, 3))[[0, 2]].min() > 1e-3
    half = load_pipeline(twins[name], "cpu", torch.bfloat16)
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}
    assert {p.dtype for part in (network_of(half), half.text_encoder)
            for p in part.parameters()} == {torch.bfloat16}
    exact, rough = (sample(prompts, p, 3, 1.0, 0.7, (32, 32), noise())[1].latents[-1]
                    for p in (pipe, half))
    assert rough.dtype == torch.float32 and 0 < (exact - rough).abs().mean() < 0.1 * exact.std()


@pytest.mark.parametrize("name", TWINS)
def test_all_stays_on_its_device(name, twins):
    "Sampling, decoding and the loss's forward on a fake CUDA device."
    pipe, guidance = opened(twins[name]), guidance_of(name)
    cond = Policy(pipe, 3, guidance, 0.7, (32, 32)).encode(PROMPTS)
    known = patch.object(Policy, "encode", lambda policy, prompts: cond)
    with fake_gpu(), known if name == "qwen-image" else nullcontext():  # its own call counts words
        pipe.to("cuda")
        policy, trajectory = sample(PROMPTS, pipe, 3, guidance, 0.7, (32, 32))
        assert {x.device.type for x in trajectory} == {"cuda"}
        latents, log_probs = trajectory
        shape = (16, 2, 2) if name == "flux2" else (4, 4, 4)
        assert latents.shape == (4, 2, *shape) and log_probs.shape == (3, 2)
        assert policy.vae.decode(latents[-1]).sample.device.type == "cuda"
        samples = Samples(
            *trajectory, torch.empty(2, device="cuda"), policy.encode(PROMPTS).to("cuda"))
        pairs = torch.arange(2, device="cuda")
        for steps in ([1, 1], [2, 0]):
            steps = torch.tensor(steps, device="cuda")
            loss = step_losses(policy, samples, steps, pairs, Objective(1e-4, 10.0)).loss
            assert loss.device.type == "cuda" and loss.requires_grad


@pytest.mark.parametrize("name, lora_rank", [
    ("sd2", 4), ("sdxl", 4), ("sd3", 4), ("flux-dev", 4), ("flux2", 4), ("sana", 4),
    ("qwen-image", 4), ("pixart", 0),
    *(pytest.param(*names, marks=pytest.mark.slow) for names in (
        ("sdxl", 0), ("sd3-without-t5", 4), ("flux-schnell", 4)))])
def test_blocks_are_one_graph_each(name, lora_rank, twins):
    "Without breaks, with adapter and penalty; made in the first epoch; the same run."
    def run(**changes):
        pipe, prompts, graphs = opened(twins[name]), iter(PROMPTS * 4), []
        config = tiny_run(lora_rank=lora_rank, cfg=guidance_of(name), micro_batch_size=4, **changes)
        rows = train(config, pipe, lambda: next(prompts), redness,
                     on_epoch=lambda row: graphs.append(counters["stats"]["unique_graphs"]))
        return rows, graphs
    plain, _ = run()
    real = ModelMixin.compile_repeated_blocks
    def without_code(network, **options): real(network, backend="eager", **options)
    torch._dynamo.reset()
    counters.clear()
    with patch.object(ModelMixin, "compile_repeated_blocks", without_code):
        rows, graphs = run(compile=True)
    assert graphs[0] == graphs[1] > 1 and not counters["graph_break"]
    for ours, theirs in zip(rows, plain):
        for number in ("reward_mean", "loss", "grad_norm", "ref_kl"):
            assert ours[number] == pytest.approx(theirs[number], rel=1e-3, abs=1e-5)


# The sampling of a flow model: against diffusers where it has no noise, against the formula,
# and against the truth, where that is known.
def walking(velocity, schedule):
    "A policy whose network, after guidance, is this function of (x, t)."
    policy = Policy(None, len(schedule.std), 1.0, 1.0, (8, 8))
    vars(policy).update(
        schedule=schedule, network=None, predict=lambda x, t, cond, network: velocity(x, t))
    return policy


def test_without_noise_it_is_eulers_step():
    "a → 0: `FlowMatchEulerDiscreteScheduler.step`, for fixed and size-dependent shifts."
    for settings, rest in ((dict(shift=1.0), ()), (dict(shift=3.0), ()),
                           (dict(use_dynamic_shifting=True), (None, 0.7)),
                           (dict(use_dynamic_shifting=True), ((1.0, 0.75, 0.5, 0.25), 1.1))):
        ours, theirs = (FlowMatchEulerDiscreteScheduler(**settings) for _ in range(2))
        schedule = flow_schedule(ours, 4, 1e-7, *rest)
        theirs.set_timesteps(4, **dict(zip(("sigmas", "mu"), rest)))
        assert torch.equal(theirs.timesteps, schedule.timesteps)
        for step, t in enumerate(theirs.timesteps):
            x, v = torch.randn(2, 3, 4, 2, 2, generator=noise(step), dtype=torch.float64)
            mean, std = walking(lambda *_: v, schedule).step(x, step, None)
            expected = theirs.step(v.float(), t, x.float()).prev_sample
            torch.testing.assert_close(mean.float(), expected, rtol=1e-5, atol=1e-5)
            assert 0 < std < 1e-6


def test_the_step_is_flow_grpos():
    "Mean and deviation as the paper and its code have them; log-probabilities of a Normal."
    for a, shift, steps in ((0.7, 3.0, 10), (0.3, 1.0, 7), (1.0, 2.0, 1)):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        schedule, levels = flow_schedule(scheduler, steps, a), scheduler.sigmas.double().tolist()
        for step, (t, after) in enumerate(zip(levels, levels[1:])):
            x, v, action = torch.randn(3, 2, 4, 2, 2, generator=noise(step), dtype=torch.float64)
            sigma = a * (t / (1 - (levels[1] if t == 1 else t))) ** 0.5
            dt = after - t
            expected = x + (v + sigma**2 / (2 * t) * (x + (1 - t) * v)) * dt
            mean, std = walking(lambda *_: v, schedule).step(x, step, None)
            torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)  # tables in float32
            assert std.item() == pytest.approx(sigma * (-dt) ** 0.5)
            exact = Normal(expected, sigma * (-dt) ** 0.5).log_prob(action)
            torch.testing.assert_close(
                calculate_log_probs(action, mean, std), exact, rtol=1e-4, atol=1e-4)


def test_coefficients_are_preserved():
    "Flow-CPS: the paper's formula in float64; fresh and predicted noise make up the level's."
    for a, shift, steps in ((0.5, 3.0, 10), (0.0, 1.0, 7), (1.0, 2.0, 4)):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        schedule = flow_schedule(scheduler, steps, a, sampler="cps")
        levels = scheduler.sigmas.double().tolist()
        torch.testing.assert_close(schedule.noise_weight**2 + schedule.std**2,
                                   torch.tensor(levels[1:]) ** 2)
        for step, (t, after) in enumerate(zip(levels, levels[1:])):
            x, v = torch.randn(2, 2, 4, 2, 2, generator=noise(step), dtype=torch.float64)
            angle = a * np.pi / 2
            expected = (1 - after) * (x - t * v) + after * np.cos(angle) * (x + (1 - t) * v)
            mean, std = walking(lambda *_: v, schedule).step(x, step, None)
            torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)
            assert std.item() == pytest.approx(after * np.sin(angle))
    with pytest.raises(ValueError, match="eta = 1.2: with flow_sampler 'cps' at most 1 works"):
        flow_schedule(FlowMatchEulerDiscreteScheduler(), 4, 1.2, sampler="cps")


@pytest.mark.parametrize("name", ("sd2", "sd3"))
def test_noise_in_some_steps(name):
    "The others are the sampler's own, without noise; sampling and loss agree."
    eta, more = (0.8, dict(flow_sampler="cps")) if name == "sd3" else (1.0, {})
    def table(eta, steps=None): return Policy(
        twin(name), 5, 1.0, eta, (32, 32), noisy_steps=steps, **more).schedule
    noisy, quiet, mixed = table(eta), table(0.0), table(eta, (1, 3))
    for step in range(5):
        for column in ("x_0_weight", "noise_weight", "std"):
            expected = getattr(noisy if step in (1, 3) else quiet, column)[step]
            assert getattr(mixed, column)[step] == expected, (step, column)
    assert (mixed.std > 0).tolist() == [False, True, False, True, False]
    config = make_config("emoji", **TINY | dict(
        num_timesteps=5, mixed_sampling=True, which_steps="3,1", timestep_fraction=1.0, eta=eta,
        lr=1e-3), **more)
    for row in train(config, twin(name), lambda: "a fox", redness):
        assert row["max_log_ratio"] < 1e-5 and row["grad_norm"] > 0
    with pytest.raises(ValueError, match="mixed_sampling has no effect, because all steps are"):
        make_config("blog", mixed_sampling=True)
    with pytest.raises(ValueError, match="mixed_sampling means nothing to algorithm 'draft'"):
        make_config("emoji", algorithm="draft", mixed_sampling=True)
    with pytest.raises(ValueError, match="flow_sampler 'cps' is for flow models, and this one has"):
        train(replace(config, flow_sampler="cps"), twin("sd2"), lambda: "a fox", redness)


# Two Gaussians in the plane, and the velocity that a perfect network would have learnt from them:
# the noisier of the two is a mixture of Gaussians too, so what to expect of the clean point and of
# the noise is known in closed form. With any amount of noise, the samples must have the data's mean
# and covariance, the better the more steps there are.
SHARES = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEANS = torch.tensor([[2.0, -1.0], [-1.0, 0.5]], dtype=torch.float64)
COVARIANCES = torch.tensor([[[0.5, 0.2], [0.2, 0.3]], [[0.2, -0.1], [-0.1, 0.4]]],
                           dtype=torch.float64)


def perfect_velocity(x, timestep):
    "E[ε − x_0 | x_t] of the mixture."
    x, t, logs, clean = x.flatten(1), timestep / 1000, [], []
    for share, mean, covariance in zip(SHARES, MEANS, COVARIANCES):
        noisy = (1 - t) ** 2 * covariance + t**2 * torch.eye(2, dtype=torch.float64)
        logs.append(share.log() + MultivariateNormal((1 - t) * mean, noisy).log_prob(x))
        gain = (1 - t) * torch.linalg.solve(noisy, covariance)
        clean.append(mean + (x - (1 - t) * mean) @ gain)
    x_0 = (torch.stack(logs).softmax(0)[..., None] * torch.stack(clean)).sum(0)
    return ((x - x_0) / t)[..., None, None]


def test_what_flow_cps_tells():
    "Of a step that is trained in vain; of no noise at all."
    config = make_config("emoji", **TINY | dict(num_timesteps=4, eta=0.5), flow_sampler="cps",
                         timestep_fraction=1.0)
    with pytest.warns(UserWarning, match="the last step of flow_sampler 'cps' has no noise"):
        check_run(config, twin("sd3"))
    with pytest.raises(ValueError, match=r"the trained steps \[3\] have no noise"):
        check_run(replace(config, which_steps="3"), twin("sd3"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_run(replace(config, timestep_fraction=0.75), twin("sd3"))
    for steps, says in ((2, "raise draft_steps"), (1, "raise eta")):
        with pytest.raises(ValueError, match=f"beta 0.1 has no effect.*{says}"):
            check_run(make_config("emoji", **TINY | dict(
                algorithm="draft", beta=0.1, num_timesteps=4, eta=0.5 if steps == 2 else 0.0),
                flow_sampler="cps", timestep_fraction=1.0), twin("sd3"))


def test_the_card_names_the_sampler():
    "Without noise a flow model's is plain `diffusers`' own, if that is Euler's; else it is not."
    for name, more, says in (
            ("sd3", dict(algorithm="nft", eta=0.0), "sampling without noise), guidance 1"),
            ("sd3", dict(flow_sampler="cps", eta=0.5, which_steps="1,0", mixed_sampling=True,
                         timestep_fraction=1.0),
             "sampling with noise by Flow-CPS, a = 0.5, noise only in steps 0, 1)"),
            ("sd2", dict(which_steps="0", mixed_sampling=True, timestep_fraction=1.0),
             "(DDIM, eta 1, noise only in steps 0)")):
        config, pipe = make_config("emoji", **TINY | more), twin(name)
        card = model_card(config, pipe, {"prompts": ["a fox"]}, "", False)
        assert says in card, card
        assert ("numbers above are of this:" in card) == (config.eta == 0)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True)
    config = make_config("emoji", **TINY, algorithm="nft", eta=0.0)
    assert "`diffusers` has its own" in model_card(config, pipe, {"prompts": ["a fox"]}, "", False)


def test_too_much_noise_is_told():
    "A warning for what leaves far more noise than a level has, simulated; and what would not."
    for steps, shift in ((10, 1.0), (10, 3.0), (28, 3.0), (4, 1.0), (3, 3.0)):
        def warned(a):
            schedule = flow_schedule(FlowMatchEulerDiscreteScheduler(shift=shift), steps, a)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                warn_of_much_noise(a, schedule)
            return schedule, [str(warning.message) for warning in told]
        assert bool(warned(0.7)[1]) == (steps == 3)  # with a jump from 0.86 to 0.009
        works = float(re.search("take at most ([0-9.]+)[.]$", warned(5.0)[1][0]).group(1))
        assert 0 < works < 1.9
        for a, fine in ((works, True), (works + 0.05, False)):
            schedule, told = warned(a)
            noise_weight, std = schedule.noise_weight[:, None], schedule.std[:, None]
            g, level = noise(), 1 - schedule.x_0_weight
            draw = (noise_weight * torch.randn(100_000, generator=g, dtype=torch.float64)
                    + std * torch.randn(100_000, generator=g, dtype=torch.float64)).std(1)
            excess = (draw**2 - level**2).clamp(min=0).sqrt()
            worst = (excess / (3**0.5 * level).clamp(min=0.4)).max()
            assert bool(told) != fine and (worst < 1.02 if fine else worst > 0.98)


def test_the_walk_ends_in_the_data():
    "For several a and shifts: mean and covariance of 20,000 walks, in few steps and in many."
    mean = (SHARES[:, None] * MEANS).sum(0)
    apart = MEANS - mean
    covariance = (SHARES[:, None, None] * (COVARIANCES + apart[:, :, None] * apart[:, None])).sum(0)
    for shift, a in ((1.0, 0.3), (3.0, 0.7), (3.0, 1.0)):
        missed = []
        for steps in (10, 160):
            schedule = flow_schedule(FlowMatchEulerDiscreteScheduler(shift=shift), steps, a)
            g = noise()
            x = torch.randn(20_000, 2, 1, 1, generator=g, dtype=torch.float64)
            for step in range(steps):
                mu, std = walking(perfect_velocity, schedule).step(x, step, None)
                x = mu + std * torch.randn(x.shape, generator=g, dtype=torch.float64)
            x = x.flatten(1)
            missed.append(max((x.mean(0) - mean).abs().max(),
                              (torch.cov(x.T) - covariance).abs().max()))
        assert missed[1] < 0.04 < 0.1 < missed[0]


def test_shift_grows_with_the_picture():
    "Against the pipelines' own function; none where the configuration says that it is fixed."
    moving = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for patches in (64, 256, 1024, 4096):
        assert shift_of(moving, patches) == pytest.approx(calculate_shift(patches))
    assert shift_of(FlowMatchEulerDiscreteScheduler(shift=3.0), 64) is None
    small, large = (Policy(make_twin("flux-dev"), 4, 1.0, 0.7, (side, side)).schedule
                    for side in (32, 512))
    assert (large.noise[1:] > small.noise[1:]).all() and large.noise[0] == small.noise[0] == 1


def test_other_schedulers_of_flow_models():
    "DPM-Solver and UniPC have the same levels; those that rise, or come twice, are refused."
    flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    for name in ("DPMSolverMultistep", "UniPCMultistep"):
        scheduler = getattr(diffusers, f"{name}Scheduler")(**flow)
        schedule = flow_schedule(scheduler, 6, 0.7)
        level = schedule.noise
        assert (level.diff() < 0).all() and 0.99 < level[0] <= 1 and schedule.std.max() < 1
        torch.testing.assert_close(schedule.timesteps / 1000.0, level, rtol=0, atol=2e-3)
        pipe = make_twin("flux-dev")
        pipe.scheduler = scheduler
        torch.testing.assert_close(Policy(pipe, 6, 1.0, 0.7, (32, 32)).schedule.noise, level)
    for bad in (FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
                diffusers.FlowMatchHeunDiscreteScheduler()):
        with pytest.raises(ValueError, match="do not fall from at most 1 to 0"):
            flow_schedule(bad, 4, 0.7)


def test_euler_becomes_ddim():
    "XL's published configuration: its betas and timesteps, and no clipping of latents."
    xl = EulerDiscreteScheduler.from_config(dict(
        beta_end=0.012, beta_schedule="scaled_linear", beta_start=0.00085, clip_sample=False,
        interpolation_type="linear", num_train_timesteps=1000, prediction_type="epsilon",
        sample_max_value=1.0, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1,
        timestep_spacing="leading", use_karras_sigmas=False))
    ddim = ddim_scheduler(xl.config)
    ddim.set_timesteps(20); xl.set_timesteps(20)
    assert isinstance(ddim, DDIMScheduler) and not ddim.config.clip_sample
    assert ddim.timesteps.tolist() == xl.timesteps.tolist() == list(range(951, 0, -50))
    sigmas = ((1 - ddim.alphas_cumprod) / ddim.alphas_cumprod).sqrt()[ddim.timesteps]
    torch.testing.assert_close(sigmas, xl.sigmas[:-1])
    assert ddim.final_alpha_cumprod == ddim.alphas_cumprod[0] < 1


def test_what_xl_is_told():
    "Zeros for no prompt where the checkpoint says so; six sizes; both encoders side by side."
    pipe = make_twin("sdxl")
    def told(prompts, guidance):
        return Policy(pipe, 1, guidance, 1.0, (48, 64)).encode(prompts).rows
    tokens, vector = (told(PROMPTS, 3.0)[name] for name in (
        "encoder_hidden_states", "added_cond_kwargs"))
    assert tokens.shape == (4, 32, 40) and vector["text_embeds"].shape == (4, 24)
    assert (tokens[:2] == 0).all() and (vector["text_embeds"][:2] == 0).all()
    ids = pipe.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        first, second = (encoder(ids, output_hidden_states=True) for encoder in
                         (pipe.text_encoder, pipe.text_encoder_2))
    both = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
    torch.testing.assert_close(tokens[2:], both)
    torch.testing.assert_close(vector["text_embeds"][2:], second.text_embeds)
    seen = []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"]),
        with_kwargs=True)
    pipe.scheduler = ddim_scheduler(pipe.scheduler.config)
    sample(["a fox"], pipe, 1, size=(48, 64))
    assert seen[0].tolist() == [[48, 64, 0, 0, 48, 64]]
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    empty = told(PROMPTS, 3.0)["encoder_hidden_states"][:2]
    torch.testing.assert_close(empty, told(["", ""], 1.0)["encoder_hidden_states"])


def test_what_cannot_be():
    "Other classes, guidance for schnell, half a patch, less noise than none."
    flux = make_twin("flux-schnell")
    def refused(pipe, error, match, size=32, guidance=1.0, a=0.7):
        with pytest.raises(error, match=match):
            sample(["a fox"], pipe, 2, guidance, a, (size, size))
    refused(flux, ValueError, "takes none.*set cfg to 1", guidance=3.5)
    refused(flux, ValueError, "multiple of 16", size=40)
    refused(flux, ValueError, "no policy to train", a=-0.1)
    refused(make_twin("sd3"), ValueError, "multiple of 16", size=24)
    most = 16 * make_twin("sd3").transformer.config.pos_embed_max_size
    refused(make_twin("sd3"), ValueError, f"draws at most {most} pixels a side", size=most + 16)
    refused(make_twin("sdxl"), TypeError, "EulerDiscreteScheduler.*ddim_scheduler")
    ddim = make_twin("sd3")
    ddim.scheduler = make_twin("sd2").scheduler
    refused(ddim, TypeError, "flow model.*DDIMScheduler.*FlowMatchEuler")
    other = diffusers.DDPMPipeline(None, DDIMScheduler())
    refused(other, TypeError, "one of StableDiffusionPipeline, StableDiffusionXL.*not a DDPMPipe")
    with pytest.raises(ValueError, match="16 channels and gives 16, where the latents have 64"):
        odd = copy.copy(flux)
        odd.vae.register_to_config(latent_channels=16)
        sample(["a fox"], odd, 2, 1.0, 0.7, (32, 32))
    with pytest.raises(ValueError, match="unknown twin 'sd4'. Known: sd2, sdxl"): make_twin("sd4")


def test_parts_that_a_pipeline_needs(twins):
    "`load_pipeline` says at once which are missing or unknown; T5 and its tokenizer go together."
    for name, parts, match in (
            ("sd2", dict(vae=None), "vae cannot be left out of a StableDiffusionPipeline"),
            ("sdxl", dict(text_encoder_2=None, tokenizer=None), "text_encoder_2, tokenizer"),
            ("sd3", dict(tokenizer_3=None), "tokenizer_3 .*tokenizer_3 only"),
            ("sd3", dict(text_encoder=None) | WITHOUT_T5, "^text_encoder cannot be left out"),
            ("flux-dev", dict(text_encoder_3=None), "has no text_encoder_3. It has scheduler"),
            ("sd2", dict(guidance=3), "has no guidance. It has vae, ")):
        with pytest.raises(ValueError, match=match): load_pipeline(twins[name], "cpu", **parts)
    with pytest.raises(ValueError, match="has no torch_dtype.*variant"):
        load_pipeline(twins["sd2"], "cpu", torch_dtype=torch.float16)
    load_pipeline(twins["sd2"], "cpu", use_safetensors=True, local_files_only=True)
    assert load_pipeline(twins["sd3"], "cpu", **WITHOUT_T5).text_encoder_3 is None
    other = make_twin("sd2", seed=1).vae
    assert load_pipeline(twins["sd2"], "cpu", vae=other, image_encoder=None).vae is other
    half = load_pipeline("emoji_flow", "cpu", torch.bfloat16)
    assert half.unet.dtype == half.text_encoder.dtype == torch.bfloat16
    assert half.vae.dtype == torch.float32


def test_schnell_reads_256_tokens():
    "As its card says; dev 512."
    for name, count in (("flux-schnell", 256), ("flux-dev", 512)):
        cond = Policy(make_twin(name), 4, 1.0, 0.7, (32, 32)).encode(PROMPTS)
        assert cond.rows["encoder_hidden_states"].shape[:2] == (2, count)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("sdxl", "sd3-without-t5", "flux-dev"))
def test_the_command(name, twins):
    "A run of an adapter in 16 bits, stopped and resumed; the card's own code opens the result."
    flags = ["--pipeline", twins[name], "--preset", "blog", "--reward", "jpeg_compressibility",
             "--prompts", "emoji_animal_prompts", *(
                 f"--{key}={value}" for key, value in dict(
                     img_size=32, num_epochs=2, num_samples_per_epoch=4, batch_size=2, eta=0.7,
                     num_timesteps=3, num_eval_samples=3, lora_rank=2, clip_ratio=0.1, save_every=1,
                     mixed_precision="fp16" if name == "sd3-without-t5" else "bf16", device="cpu",
                     cfg=3.0).items())]
    with TemporaryDirectory() as room:
        def command(*rest):
            done = ddpo_train(room, *rest)
            assert done.returncode == 0, done.stderr
            return done.stdout
        assert "  in all\n" in command(*flags, "--plan")
        printed = command(*flags, "--name", "a")
        steps = dict(sdxl="50 steps without noise, guidance 5.0").get(name, "28 steps without")
        assert steps in printed and "fresh images: reward" in printed
        assert "going on from" in command("--resume", "runs/a", "--num_epochs", "3")
        found = run_card(f"{room}/runs/a/lora", twins[name])
    assert found["picture"].size == (32, 32)
    trained_with = opened(twins[name]).scheduler.config
    for key in ("clip_sample", "set_alpha_to_one", "steps_offset", "prediction_type", "shift"):
        assert found["pipe"].scheduler.config.get(key) == trained_with.get(key)
    assert any("lora" in key for key, _ in network_of(found["pipe"]).named_parameters())


def test_an_adapter_of_the_embedded_flow_model():
    "The run knows the model by its name; the card's code opens the adapter and draws."
    config = make_config("emoji", pipeline="emoji_flow", eta=0.7, num_epochs=1, lora_rank=2,
                         num_samples_per_epoch=4, samples_per_prompt=1, num_timesteps=3,
                         num_eval_samples=3, eval_rewards=None, reward="jpeg_compressibility")
    with TemporaryDirectory() as room:
        run_training(config, embedded("emoji_flow"), make_prompt_fn(config.prompts),
                     JPEGCompressibility(), f"{room}/a")
        assert "pipeline: emoji_flow\n" in (Path(room) / "a" / "config.yaml").read_text("utf-8")
        assert 'load_pipeline("emoji_flow")' in Path(f"{room}/a/lora/README.md").read_text("utf-8")
        assert run_card(f"{room}/a/lora")["picture"].size == (64, 64)


def test_every_family_may_be_loaded():
    "The list of the tutorial's checks and the families are the same."
    assert TRAINABLE == tuple(FAMILIES)


def test_sana_is_not_computed_in_fp16(twins):
    "In autocast its linear attention would leave the range; bf16 is fine."
    config = tiny_run(lora_rank=4, micro_batch_size=2, beta=0.0)
    with pytest.raises(ValueError, match="leaves fp16's range: set mixed_precision to bf16"):
        check_run(replace(config, mixed_precision="fp16"), opened(twins["sana"]))
    check_run(replace(config, mixed_precision="bf16"), opened(twins["sana"]))
    with pytest.raises(ValueError, match="img_size must be a positive multiple of 32 pixels"):
        check_run(replace(config, img_size=48), opened(twins["sana"]))


@pytest.mark.parametrize("preset, name", [
    ("sd35", "sd3"), ("flux", "flux-dev"), ("flux2", "flux2"), ("qwen_image", "qwen-image"),
    ("sana", "sana")])
def test_presets_do_not_add_too_much_noise(preset, name):
    "No warning, and at most 0.3 standard deviations of a latent in the last step."
    config = replace(PRESETS[preset], load_in_4bit=False)
    pipe = twin(name)
    if name == "flux-dev": pipe.scheduler.register_to_config(shift=3.0)
    policy = policy_of(config, pipe, config.sizes[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        if config.flow_sampler == "sde": warn_of_much_noise(config.eta, policy.schedule_of(
            config.eta))
    assert policy.schedule.std[-1] <= 0.3
    assert (policy.schedule.std[config.trained_steps] > 0).all()


@pytest.mark.parametrize("name", ("flux2", "qwen-image"))
def test_the_template_counts(name):
    "A prompt of exactly as many tokens as are read is not cut; one more is."
    pipe = twin(name)
    tokenizer, limit = family_of(pipe).reads(pipe)
    for more in (0, 1):
        prompt = "a" * (limit + more)
        assert len(tokenizer(prompt).input_ids) == limit + more
        if name == "flux2":
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True,
                enable_thinking=False)
            assert len(tokenizer(text).input_ids) == 512 + more
        else:
            words, _ = pipe.encode_prompt([prompt], max_sequence_length=1024)
            assert words.shape[1] == 256 + more


@pytest.mark.parametrize("name", [
    "flux2", *(pytest.param(name, marks=pytest.mark.slow)
               for name in ("qwen-image", "sana", "pixart"))])
def test_the_cards_of_the_newer_families(name, twins, tmp_path):
    "Their code runs, also with a negative prompt; the command says what pipe(prompt) does."
    done = ddpo_train(tmp_path, *as_flags(TINY | dict(
        pipeline=twins[name], lora_rank=small_rank(name), cfg=2.0, eta=0.3, num_eval_samples=3,
        micro_batch_size=4, negative_prompt="a whale", prompts="emoji_animal_prompts",
        reward="jpeg_compressibility", mixed_precision="no", num_epochs=1)), "--preset=emoji",
        "--name=a")
    assert done.returncode == 0, done.stderr
    says = "guidance 4.0 away from ' '" if name == "qwen-image" else "guidance 4."
    assert f"without noise, {says}" in done.stdout, done.stdout
    part = "lora" if small_rank(name) else "pipeline"
    found = run_card(tmp_path / "runs/a" / part, twins[name] if small_rank(name) else None)
    assert found["picture"].size == (32, 32)
