"""Tests of chapter `nbs/tutorial/03_sampling.ipynb`."""
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from torch.distributions import Normal

from ddpo_scratch.sampling import (
    calculate_log_probs,
    ddim_schedule,
    decoding_fn,
    encode_prompts,
    predict_noise,
    sd_sample,
    step_distribution,
)
from helpers import embedded, fake_gpu, twin

pipe = embedded()


# The step is held against two strangers: `scheduler.step`, wherever that one lands on the next
# step's noise level, and the paper's formula written out in NumPy, everywhere.
SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
          set_alpha_to_one=False, steps_offset=1)
OTHERS = (
    {}, {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}, {"clip_sample": True},
    {"set_alpha_to_one": True, "steps_offset": 0}, {"beta_schedule": "linear"},
    {"timestep_spacing": "trailing"}, {"timestep_spacing": "linspace"},
    {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True,
     "prediction_type": "v_prediction"})


def quiet_schedule(scheduler, steps, eta):
    "The tables, without the warning of a last step that has no noise."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ddim_schedule(scheduler, steps, eta)


def test_step_is_the_schedulers():
    "Mean and deviation against diffusers, at every timestep whose successor is 1000 // T below."
    g, compared = torch.Generator().manual_seed(0), 0
    for other in OTHERS:
        scheduler = DDIMScheduler(**SD | other)
        for steps, eta in ((50, 1.0), (7, 0.3)):
            schedule = quiet_schedule(scheduler, steps, eta)
            next_t = [*schedule.timesteps[1:].tolist(), -1]
            for i, t in enumerate(schedule.timesteps):
                x, output = torch.randn(2, 2, 4, 8, 8, generator=g)
                theirs_t = int(t) - 1000 // steps
                mean, std = step_distribution(output, x, i, schedule)
                if max(theirs_t, -1) != next_t[i] or schedule.signal[i] == 0:
                    continue
                compared += 1
                theirs = scheduler.step(output, t, x, eta, variance_noise=0).prev_sample
                torch.testing.assert_close(mean, theirs, rtol=1e-4, atol=1e-4)
                deviation = eta * scheduler._get_variance(t, theirs_t).clamp(min=0).sqrt()
                torch.testing.assert_close(std.squeeze(), deviation, rtol=1e-3, atol=1e-4)
    assert compared > 7 * 50


def alphas_bar(other):
    "ᾱ in float64 from the betas up."
    ends = np.array([0.00085, 0.012])
    if other.get("beta_schedule") == "linear":
        betas = np.linspace(*ends, 1000)
    else:
        betas = np.linspace(*ends**0.5, 1000) ** 2
    root = np.cumprod(1 - betas) ** 0.5
    if other.get("rescale_betas_zero_snr"):  # Lin et al. 2023, algorithm 1
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root**2


def test_step_is_the_papers():
    "Eq. 12 and 16 of the DDIM paper in float64; a step lands where the next one starts."
    rng = np.random.default_rng(0)
    for other in OTHERS:
        bar, scheduler = alphas_bar(other), DDIMScheduler(**SD | other)
        last = 1.0 if other.get("set_alpha_to_one") else bar[0]
        for steps, eta in ((50, 0.2), (50, 1.0), (8, 1.0), (7, 0.9)):
            schedule = quiet_schedule(scheduler, steps, eta)
            assert len(schedule.timesteps) == steps
            for i, t in enumerate(schedule.timesteps.tolist()):
                a, after = bar[t], bar[schedule.timesteps[i + 1]] if i + 1 < steps else last
                var = eta**2 * (1 - after) / (1 - a) * (1 - a / after)
                x, out = rng.standard_normal((2, 1, 4, 8, 8))
                if other.get("prediction_type") == "v_prediction":
                    x_0, eps = a**0.5 * x - (1 - a)**0.5 * out, a**0.5 * out + (1 - a)**0.5 * x
                elif other.get("prediction_type") == "sample":
                    x_0, eps = out, (x - a**0.5 * out) / (1 - a)**0.5
                else:
                    x_0, eps = (x - (1 - a)**0.5 * out) / a**0.5, out
                if other.get("clip_sample"):
                    x_0 = x_0.clip(-1, 1)
                expected = after**0.5 * x_0 + max(0, 1 - after - var)**0.5 * eps
                out, x = torch.from_numpy(out).float(), torch.from_numpy(x).float()
                mean, std = step_distribution(out, x, i, schedule)
                np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-3, atol=2e-4)
                np.testing.assert_allclose(std.item(), var**0.5, rtol=1e-3, atol=1e-6)


def test_each_latent_may_have_a_step_of_its_own():
    "A tensor of steps gives what each latent's own step gives, for every kind of prediction."
    g = torch.Generator().manual_seed(0)
    for other in OTHERS:
        schedule = quiet_schedule(DDIMScheduler(**SD | other), 9, 1.0)
        x, output = torch.randn(2, 3, 4, 8, 8, generator=g)
        mean, std = step_distribution(output, x, torch.tensor([8, 0, 4]), schedule)
        for i, step in enumerate((8, 0, 4)):
            ours = step_distribution(output[i:i + 1], x[i:i + 1], step, schedule)
            assert torch.equal(mean[i:i + 1], ours[0]) and torch.equal(std[i:i + 1], ours[1])


def test_any_number_of_steps():
    "Every spacing, many T: T falling timesteps, finite tables, noise in all steps but an idle one."
    for spacing, most in (("leading", 999), ("trailing", 999), ("linspace", 1000)):
        scheduler = DDIMScheduler(**SD | dict(timestep_spacing=spacing))
        for steps in range(1, most + 1, 7):
            schedule = quiet_schedule(scheduler, steps, 0.999)
            t = schedule.timesteps
            assert len(t) == steps and (t.diff() < 0).all() and 0 <= t.min() and t.max() < 1000
            assert all(table.isfinite().all() for table in schedule[:6])
            assert (schedule.std[:-1] > 0).all() and (schedule.std[-1] > 0) == (t[-1] > 0)


def test_a_start_without_signal():
    "Zero terminal SNR, T from 1 to 1000: all finite; at η = 1 the first step forgets ε̂ exactly."
    zero = SD | dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler = DDIMScheduler(**zero, prediction_type="v_prediction")
    for steps in [*range(1, 101), 103, 201, 206, 223, 500, 999]:
        schedule = quiet_schedule(scheduler, steps, 1.0)
        assert len(schedule.timesteps) == steps and schedule.timesteps[0] == 999
        assert all(table.isfinite().all() for table in schedule[:6])
        assert schedule.signal[0] == 0 and schedule.noise_weight[0] == 0 and schedule.noise[0] == 1
        variance = 1 - schedule.x_0_weight[0].double() ** 2
        torch.testing.assert_close(schedule.std[0].double() ** 2, variance, rtol=1e-5, atol=1e-7)
    v_model = embedded()
    v_model.scheduler = scheduler
    latents, _, log_probs = sd_sample(["a fox"], v_model, 64, 64, 1.0, 20, 1.0, "cpu")
    assert latents.isfinite().all() and log_probs.isfinite().all()
    with pytest.raises(ValueError, match="says nothing about x_0.*v_prediction"):
        ddim_schedule(DDIMScheduler(**zero), 20, 1.0)
    with pytest.raises(ValueError, match="'flow_prediction' is not that of a diffusion model"):
        ddim_schedule(DDIMScheduler(**SD, prediction_type="flow_prediction"), 20, 1.0)


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
        assert latents.shape == (2, 4, 12, 20) and xs.shape == (7, 2, 4, 12, 20)
        assert log_probs.shape == (6, 2) and torch.equal(latents, xs[-1])
        assert decoding_fn(latents, pipe).shape == (2, 48, 80, 3)
        for b, prompt in enumerate(prompts):
            embeddings = encode_prompts([prompt], pipe, guidance, "cpu")
            for i in range(6):
                with torch.no_grad():
                    x_t, n = xs[i, b : b + 1], schedule.timesteps[i]
                    output = predict_noise(pipe.unet, x_t, n, embeddings, guidance)
                mean, std = step_distribution(output, x_t, i, schedule)
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


def test_nothing_that_is_not_a_number_becomes_a_picture():
    "A NaN weight, or an infinite latent, is found when it is decoded."
    broken = embedded()
    with torch.no_grad():
        broken.unet.conv_out.weight[0, 0, 0, 0] = torch.nan
    latents, _, _ = sd_sample(["a fox", "an owl"], broken, 64, 64, 1.0, 3, 1.0, "cpu")
    with pytest.raises(ValueError, match=r"images \[0, 1\] of the batch .* learning rate"):
        decoding_fn(latents, pipe)
    latents, _, _ = sd_sample(["a fox", "an owl"], pipe, 64, 64, 1.0, 3, 1.0, "cpu")
    latents[1, 3, 0, 0] = -torch.inf
    with pytest.raises(ValueError, match=r"images \[1\] of the batch"):
        decoding_fn(latents, pipe)


def test_a_last_step_without_noise():
    "Warned of, log-probability 0 with gradient 0, and the other steps untouched; η may exceed 1."
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    with pytest.warns(UserWarning, match=r"timestep \[1\].*deterministic"):
        schedule = ddim_schedule(scheduler, 10, 1.0)
    assert schedule.std[-1] == 0 and (schedule.std[:-1] > 0).all()
    mean = torch.randn(1, 4, 8, 8, requires_grad=True)
    log_prob = calculate_log_probs(mean.detach() + 0.1, mean, schedule.std[-1])
    log_prob.sum().backward()
    assert (log_prob == 0).all() and (mean.grad == 0).all()
    assert quiet_schedule(scheduler, 100, 1.001).std.isfinite().all()


class Elsewhere:
    "Stands where `add_noise` leaves a tensor on a GPU: only a copy to the CPU can be used."

    def __init__(self, values):
        self.values = values

    def cpu(self):
        return self.values


def test_tables_are_made_on_the_cpu():
    "diffusers' `add_noise` moves the scheduler's table to the samples' device; ours do not mind."
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    expected = ddim_schedule(pipe.scheduler, 5, 1.0)
    for name in ("alphas_cumprod", "final_alpha_cumprod"):
        setattr(scheduler, name, Elsewhere(getattr(scheduler, name)))
    for ours, theirs in zip(ddim_schedule(scheduler, 5, 1.0)[:6], expected[:6]):
        assert torch.equal(ours, theirs)


def test_sampling_stays_on_its_device():
    "Text encoder, loop and VAE on a fake CUDA device: a tensor on the wrong one raises."
    fake, prompts = embedded(), ["a fox", "an owl"]
    with fake_gpu():
        fake.to("cuda")
        for guidance in (1.0, 5.0):
            tensors = sd_sample(prompts, fake, 64, 64, guidance, 3, 1.0, "cuda")
            assert {x.device.type for x in tensors} == {"cuda"}
            assert tensors[1].shape == (4, 2, 4, 16, 16)
        assert fake.vae.decode(tensors[0]).sample.device.type == "cuda"
        with pytest.raises(RuntimeError):
            sd_sample(["a fox"], fake, 64, 64, 1.0, 3, 1.0, "cpu")


def test_the_scheduler_is_taken_as_it_is_now():
    "What is changed after a sampling counts from the next one on."
    own, xs = embedded(), torch.Generator().manual_seed
    before = sd_sample(["a fox"], own, 64, 64, 1.0, 3, 1.0, "cpu", xs(0))[0]
    own.scheduler.register_to_config(prediction_type="v_prediction")
    after = sd_sample(["a fox"], own, 64, 64, 1.0, 3, 1.0, "cpu", xs(0))[0]
    assert ddim_schedule(own.scheduler, 3, 1.0).prediction_type == "v_prediction"
    fresh = embedded()
    fresh.scheduler = DDIMScheduler.from_config(
        fresh.scheduler.config, prediction_type="v_prediction")
    assert torch.equal(after, sd_sample(["a fox"], fresh, 64, 64, 1.0, 3, 1.0, "cpu", xs(0))[0])
    assert (after - before).abs().max() > 0.1


def test_a_megapixel_is_decoded_at_a_time():
    "Of any shape: sixteen latents of 256×64 are pictures of 1024×256, four to a megapixel."
    sizes, shapes = [], (
        (16, 4, 256, 64), (16, 4, 64, 256), (3, 4, 512, 512), (20, 4, 128, 128))
    for shape in shapes:
        def decode(part):
            sizes.append(len(part))
            return SimpleNamespace(sample=torch.zeros(len(part), 3, 8, 8))
        own = embedded()
        own.vae.decode = decode
        decoding_fn(torch.zeros(shape), own)
    assert sizes == [4] * 4 + [4] * 4 + [1] * 3 + [4] * 5


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
        refused(ValueError, "height must be a positive multiple of 4", height=62)
        refused(ValueError, "width must be a positive multiple of 4", width=0)
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
    half = embedded()
    half.unet.half()
    refused(ValueError, "UNet is in torch.float16.*DDPOTrainer", pipe=half)
    refused(TypeError, "not a StableDiffusion3Pipeline. DDPOTrainer", pipe=twin("sd3"))
