"""Tests of chapter `nbs/practice/15_policy.ipynb`."""
import logging
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from torch.distributions import Normal

from ddpo_scratch.pipelines import load_pipeline
from ddpo_scratch.trainer.policy import Policy, check_finite, check_policy
from helpers import embedded, fake_gpu, sample

pipe = embedded()


def test_same_pictures_as_the_pipeline():
    "With and without guidance: within one grey level of StableDiffusionPipeline's own loop."
    prompts = ["a horse", "an owl", "a frog"]
    for guidance, steps, eta in ((4.0, 20, 1.0), (1.0, 12, 0.5)):
        g = torch.Generator().manual_seed(5)
        policy, trajectory = sample(prompts, pipe, steps, guidance, eta, generators=g)
        theirs = pipe(prompts, guidance_scale=guidance, num_inference_steps=steps, eta=eta,
                      generator=torch.Generator().manual_seed(5), output_type="np").images
        ours = policy.decode(trajectory.latents[-1]).astype(int)
        assert abs(ours - np.round(theirs * 255)).max() <= 1
        assert ours.std() > 10


def test_noise_belongs_to_the_sample():
    "One generator a sample: the same latents alone, in a batch, and in another order."
    prompts = ["a horse", "an owl", "a frog"]
    def draw(order):
        generators = [torch.Generator().manual_seed(10 + i) for i in order]
        return sample([prompts[i] for i in order], pipe, 4, 3.0, generators=generators)[1]
    together, log_probs = draw([0, 1, 2])
    for order in ([2], [1, 0]):
        xs, probs = draw(order)
        torch.testing.assert_close(xs, together[:, order], rtol=0, atol=1e-4)
        torch.testing.assert_close(probs, log_probs[:, order], rtol=0, atol=1e-4)
    assert (together[0, 0] - together[0, 1]).abs().max() > 1


def test_trajectory():
    "Shapes; and the log-probabilities evaluated again, one sample and one step at a time."
    prompts, g = ["a cat", "a dog"], torch.Generator().manual_seed(0)
    for guidance in (1.0, 3.0):
        policy, (xs, log_probs) = sample(prompts, pipe, 6, guidance, 1.0, (48, 80), g)
        factor = pipe.vae_scale_factor
        assert xs.shape == (7, 2, 4, 48 // factor, 80 // factor) and log_probs.shape == (6, 2)
        assert policy.decode(xs[-1]).shape == (2, 48, 80, 3)
        for b, prompt in enumerate(prompts):
            cond = policy.encode([prompt])
            assert len(cond) == 1 and cond.guided == (guidance > 1)
            for step in range(6):
                with torch.no_grad(): mean, std = policy.step(xs[step, b:b + 1], step, cond)
                again = Normal(mean.double(), std.double()).log_prob(
                    xs[step + 1, b:b + 1].double()).mean()
                assert abs((again - log_probs[step, b]).exp() - 1) < 1e-5


def test_each_latent_may_have_a_step_of_its_own():
    "As one by one; and another network's answer where one is given."
    policy, (xs, _) = sample(["a cat", "a dog", "a fox"], pipe, 5, 2.0)
    cond, steps = policy.encode(["a cat", "a dog", "a fox"]), torch.tensor([4, 0, 2])
    other = embedded().unet
    with torch.no_grad():
        for weight in other.parameters(): weight += 0.01
        for network in (None, other):
            mean, std = policy.step(xs[steps, torch.arange(3)], steps, cond, network)
            for i, step in enumerate(steps.tolist()):
                one, one_std = policy.step(xs[step, i:i + 1], step, cond[[i]], network)
                torch.testing.assert_close(mean[i:i + 1], one, rtol=0, atol=1e-4)
                assert torch.equal(std[i:i + 1], one_std)
    assert (mean - policy.step(xs[steps, torch.arange(3)], steps, cond)[0]).abs().max() > 0.01


def test_guidance_costs_a_second_half_only_when_it_is_on():
    "Rows that the UNet sees: B without guidance, 2B with it."
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        for guidance in (0.0, 1.0, 1.5):
            sample(["a cat"] * 3, pipe, 2, guidance)
    finally:
        hook.remove()
    assert rows == [3, 3, 3, 3, 6, 6]


def test_long_prompts_are_told_once():
    "One short warning for each tokenizer, none from the libraries; prompts are cut where it says."
    long, told, logged = "a fox " * 60, load_pipeline("emoji", "cpu"), []
    handler = logging.Handler()
    handler.emit = logged.append
    loggers = [logging.getLogger(name) for name in (
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
        "transformers.tokenization_utils_base", "ddpo_scratch")]
    for logger in loggers: logger.addHandler(handler)
    def encode(prompts):
        policy = Policy(told, 5, 3.0, 1.0, (64, 64))
        return policy.encode(prompts).rows["encoder_hidden_states"]
    for _ in range(3): cut = encode(["an owl", long])
    for logger in loggers: logger.removeHandler(handler)
    said, = (record.getMessage() for record in logged)
    assert len(said) < 150 and "reads 32 tokens" in said and "has 122." in said and "\n" not in said
    assert torch.equal(cut, encode(["an owl", "a fox " * 15]))
    assert {logger.getEffectiveLevel() for logger in loggers} == {logging.WARNING}


def test_a_latent_that_is_not_finite_is_named():
    "A NaN weight is found in the trajectory, with step and prompt."
    broken, prompts = embedded(), ["a fox", "an owl"]
    with torch.no_grad(): broken.unet.conv_out.weight[0, 0, 0, 0] = torch.nan
    _, (xs, _) = sample(prompts, broken, 3)
    with pytest.raises(ValueError, match="image 0, prompt 'a fox', are NaN .* step 1 of 3"):
        check_finite(xs, prompts)
    _, (xs, _) = sample(prompts, pipe, 3)
    check_finite(xs, prompts)
    xs[2:, 1, 3, 0, 0] = -torch.inf
    with pytest.raises(ValueError, match="image 1, prompt 'an owl', are NaN .* step 2 of 3"):
        check_finite(xs, prompts)


def test_sampling_stays_on_its_device():
    "Text encoder, steps and VAE on a fake CUDA device: a tensor on the wrong one raises."
    fake, prompts = embedded(), ["a fox", "an owl"]
    with fake_gpu():
        fake.to("cuda")
        for guidance in (1.0, 5.0):
            policy, trajectory = sample(prompts, fake, 3, guidance)
            assert {x.device.type for x in trajectory} == {"cuda"}
            assert trajectory.latents.shape == (4, 2, *policy.latent_shape)
        assert fake.vae.decode(trajectory.latents[-1]).sample.device.type == "cuda"
        with pytest.raises(RuntimeError): policy.sample(policy.encode(prompts).to("cpu"))


def test_the_scheduler_is_taken_when_a_policy_is_first_used():
    "Another configuration counts for the next policy."
    own, seed = embedded(), torch.Generator().manual_seed
    policy, (before, _) = sample(["a fox"], own, 3, generators=seed(0))
    own.scheduler.register_to_config(prediction_type="v_prediction")
    assert policy.schedule.prediction_type == "epsilon"
    policy, (after, _) = sample(["a fox"], own, 3, generators=seed(0))
    assert policy.schedule.prediction_type == "v_prediction"
    fresh = embedded()
    fresh.scheduler = DDIMScheduler.from_config(
        fresh.scheduler.config, prediction_type="v_prediction")
    assert torch.equal(after, sample(["a fox"], fresh, 3, generators=seed(0))[1].latents)
    assert (after - before).abs().max() > 0.1


def refused(error, match, pipe=pipe, steps=2, guidance_scale=1.0, eta=1.0, size=(64, 64)):
    with pytest.raises(error, match=match):
        policy = Policy(pipe, steps, guidance_scale, eta, size)
        check_policy(policy)
        policy.schedule


def test_bad_policies():
    "Each is refused before the UNet is called."
    refused(TypeError, "not a str", pipe="emoji")
    refused(ValueError, "img_size's height must be a positive multiple of 4", size=(62, 64))
    refused(ValueError, "img_size must be a positive multiple of 4", size=(0, 0))
    refused(ValueError, "eta must be above 0, not -1", eta=-1)
    refused(ValueError, "At most 1.0", eta=3.0)
    refused(ValueError, "num_inference_steps must be a whole number of at least 1", steps=0)
    refused(ValueError, "beyond the scheduler's 1000", steps=1000)
    refused(ValueError, "finite", guidance_scale=math.nan)
    refused(TypeError, "size is height and width", size=64)


def test_other_models_are_refused():
    "Another scheduler, an inpainting UNet of nine channels."
    other = embedded()
    other.scheduler = PNDMScheduler.from_config(other.scheduler.config)
    refused(TypeError, "PNDMScheduler.*ddim_scheduler", pipe=other)
    inpainting = embedded()
    inpainting.unet = UNet2DConditionModel.from_config(inpainting.unet.config, in_channels=9)
    refused(ValueError, "takes 9 channels and gives 4.*latents have 4", pipe=inpainting)
