"""Tests of chapter `nbs/practice/14_policy.ipynb`."""
import logging
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from torch.distributions import Normal

from ddpo_scratch.pipelines import load_pipeline
from ddpo_scratch.sampling import ddim_schedule, decoding_fn
from ddpo_scratch.trainer.checks import check_finite
from ddpo_scratch.trainer.sampling import (
    encode_prompts,
    make_schedule,
    policy_step,
    sd_sample,
)
from helpers import embedded, fake_gpu

pipe = embedded()


def test_same_pictures_as_the_pipeline():
    "With and without guidance: within one grey level of StableDiffusionPipeline's own loop."
    prompts = ["a horse", "an owl", "a frog"]
    for guidance, steps, eta in ((4.0, 20, 1.0), (1.0, 12, 0.5)):
        g = torch.Generator().manual_seed(5)
        latents, _, _ = sd_sample(prompts, pipe, 64, 64, guidance, steps, eta, "cpu", g)
        theirs = pipe(prompts, guidance_scale=guidance, num_inference_steps=steps, eta=eta,
                      generator=torch.Generator().manual_seed(5), output_type="np").images
        ours = decoding_fn(latents, pipe).astype(int)
        assert abs(ours - np.round(theirs * 255)).max() <= 1
        assert ours.std() > 10


def test_noise_belongs_to_the_sample():
    "One generator a sample: the same latents alone, in a batch, and in another order."
    prompts = ["a horse", "an owl", "a frog"]
    def draw(order):
        generators = [torch.Generator().manual_seed(10 + i) for i in order]
        return sd_sample([prompts[i] for i in order], pipe, 64, 64, 3.0, 4, 1.0, "cpu", generators)
    _, together, log_probs = draw([0, 1, 2])
    for order in ([2], [1, 0]):
        _, xs, probs = draw(order)
        torch.testing.assert_close(xs, together[:, order], rtol=0, atol=1e-4)
        torch.testing.assert_close(probs, log_probs[:, order], rtol=0, atol=1e-4)
    assert (together[0, 0] - together[0, 1]).abs().max() > 1


def test_trajectory():
    "Shapes, the last latent, and the log-probabilities evaluated again, one sample at a time."
    prompts, g = ["a cat", "a dog"], torch.Generator().manual_seed(0)
    schedule = ddim_schedule(pipe.scheduler, 6, 1.0)
    for guidance in (1.0, 3.0):
        latents, xs, log_probs = sd_sample(prompts, pipe, 48, 80, guidance, 6, 1.0, "cpu", g)
        assert latents.shape == (2, 4, 6, 10) and xs.shape == (7, 2, 4, 6, 10)
        assert log_probs.shape == (6, 2) and torch.equal(latents, xs[-1])
        assert decoding_fn(latents, pipe).shape == (2, 48, 80, 3)
        for b, prompt in enumerate(prompts):
            embeddings = encode_prompts([prompt], pipe, guidance, "cpu")
            for i in range(6):
                with torch.no_grad():
                    mean, std = policy_step(
                        pipe.unet, xs[i, b : b + 1], i, embeddings, schedule, guidance)
                policy = Normal(mean.double(), std.double())
                again = policy.log_prob(xs[i + 1, b : b + 1].double()).mean()
                assert abs((again - log_probs[i, b]).exp() - 1) < 1e-5


def test_guidance_costs_a_second_half_only_when_it_is_on():
    "Rows that the UNet sees: B without guidance, 2B with it."
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        for guidance in (0.0, 1.0, 1.5):
            sd_sample(["a cat"] * 3, pipe, 64, 64, guidance, 2, 1.0, "cpu")
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
        return encode_prompts(prompts, told, 3.0, "cpu").rows["encoder_hidden_states"]
    for _ in range(3): cut = encode(["an owl", long])
    for logger in loggers: logger.removeHandler(handler)
    said, = (record.getMessage() for record in logged)
    assert len(said) < 150 and "reads 32 tokens" in said and "has 122." in said and "\n" not in said
    assert torch.equal(cut, encode(["an owl", "a fox " * 15]))
    assert {logger.getEffectiveLevel() for logger in loggers} == {logging.WARNING}


def test_nothing_that_is_not_a_number_becomes_a_picture():
    "A NaN weight is found in the trajectory, with step and prompt; an overflow of the VAE, too."
    broken = embedded()
    with torch.no_grad():
        broken.unet.conv_out.weight[0, 0, 0, 0] = torch.nan
    latents, xs, _ = sd_sample(["a fox", "an owl"], broken, 64, 64, 1.0, 3, 1.0, "cpu")
    with pytest.raises(ValueError, match="picture 0, prompt 'a fox', are NaN .* step 1 of 3"):
        check_finite(xs, ["a fox", "an owl"])
    _, xs, _ = sd_sample(["a fox", "an owl"], pipe, 64, 64, 1.0, 3, 1.0, "cpu")
    check_finite(xs, ["a fox", "an owl"])
    xs[2:, 1, 3, 0, 0] = -torch.inf
    with pytest.raises(ValueError, match="picture 1, prompt 'an owl', are NaN .* step 2 of 3"):
        check_finite(xs, ["a fox", "an owl"])
    with pytest.raises(ValueError, match=r"images \[1\] of the batch"):
        decoding_fn(xs[-1], pipe)


def test_sampling_stays_on_its_device():
    "Text encoder, loop and VAE on a fake CUDA device: a tensor on the wrong one raises."
    fake, prompts = embedded(), ["a fox", "an owl"]
    with fake_gpu():
        fake.to("cuda")
        for guidance in (1.0, 5.0):
            tensors = sd_sample(prompts, fake, 64, 64, guidance, 3, 1.0, "cuda")
            assert {x.device.type for x in tensors} == {"cuda"}
            assert tensors[1].shape == (4, 2, 4, 8, 8)
        assert fake.vae.decode(tensors[0]).sample.device.type == "cuda"
        with pytest.raises(RuntimeError):
            sd_sample(["a fox"], fake, 64, 64, 1.0, 3, 1.0, "cpu")


def test_the_scheduler_is_taken_as_it_is_now():
    "What is changed after a sampling counts from the next one on."
    own, xs = embedded(), torch.Generator().manual_seed
    before = sd_sample(["a fox"], own, 64, 64, 1.0, 3, 1.0, "cpu", xs(0))[0]
    own.scheduler.register_to_config(prediction_type="v_prediction")
    after = sd_sample(["a fox"], own, 64, 64, 1.0, 3, 1.0, "cpu", xs(0))[0]
    assert make_schedule(own, 3, 1.0, 8, 8).prediction_type == "v_prediction"
    fresh = embedded()
    fresh.scheduler = DDIMScheduler.from_config(
        fresh.scheduler.config, prediction_type="v_prediction")
    assert torch.equal(after, sd_sample(["a fox"], fresh, 64, 64, 1.0, 3, 1.0, "cpu", xs(0))[0])
    assert (after - before).abs().max() > 0.1


GOOD = dict(prompts=["a fox"], pipe=pipe, height=64, width=64, guidance_scale=1.0,
            num_inference_steps=2, eta=1.0, device="cpu")


def refused(error, match, **change):
    with pytest.raises(error, match=match):
        sd_sample(**(GOOD | change))


def test_bad_arguments():
    "Each is refused before the UNet is called."
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda *args: calls.append(1))
    try:
        refused(ValueError, "at least one prompt", prompts=[])
        refused(TypeError, "list of strings", prompts="a fox")
        refused(TypeError, "prompt 1 is a int", prompts=["a fox", 7])
        refused(TypeError, "not a str", pipe="emoji")
        refused(ValueError, "height must be a positive multiple of 8", height=60)
        refused(ValueError, "width must be a positive multiple of 8", width=0)
        refused(ValueError, "deterministic", eta=0)
        refused(ValueError, "eta must be above 0, not -1", eta=-1)
        refused(ValueError, "At most 1.0", eta=3.0)
        refused(ValueError, "num_inference_steps must be a whole number of at least 1",
                num_inference_steps=0)
        refused(ValueError, "beyond the scheduler's 1000", num_inference_steps=1000)
        refused(ValueError, "finite", guidance_scale=math.nan)
        refused(ValueError, "2 generators came with 1 prompts", generator=[torch.Generator()] * 2)
    finally:
        hook.remove()
    assert not calls


def test_other_models_are_refused():
    "Another scheduler, an inpainting UNet of nine channels."
    other = embedded()
    other.scheduler = PNDMScheduler.from_config(other.scheduler.config)
    refused(TypeError, "PNDMScheduler.*ddim_scheduler", pipe=other)
    inpainting = embedded()
    inpainting.unet = UNet2DConditionModel.from_config(inpainting.unet.config, in_channels=9)
    refused(ValueError, "takes 9 channels and gives 4.*latents have 4", pipe=inpainting)
