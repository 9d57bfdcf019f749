"""Tests of chapter `nbs/tutorial/09_loss.ipynb`."""
import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal

from ddpo_scratch import sampling
from ddpo_scratch.loss import clipped_surrogate, compute_loss
from ddpo_scratch.sampling import (
    calculate_log_probs,
    ddim_schedule,
    encode_prompts,
    predict_noise,
    sd_sample,
    step_distribution,
)
from helpers import embedded, fake_gpu, gradient, moved, tiny_pipeline

T, PROMPTS, ETA = 4, ["a fox", "an owl", "a cat"], 1.0


def trajectory(pipe, guidance, seed=0):
    _, xs, log_probs = sd_sample(
        PROMPTS, pipe, 64, 64, guidance, T, ETA, "cpu", torch.Generator().manual_seed(seed))
    return xs, log_probs


# A UNet in miniature and in float64, where finite differences are worth something. The original
# log-probabilities are shifted so that each sample sits at a chosen ratio.
def test_gradient_against_finite_differences():
    """Central differences along a random direction.

    Inside the clip range, outside on either side; both signs of A; with guidance and without."""
    pipe = tiny_pipeline()
    for guidance in (1.0, 3.0):
        xs, log_probs = trajectory(pipe, guidance)
        v = torch.randn(
            gradient(pipe).numel(), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        v *= 1e-4 / v.norm()
        for ratio in (1.05, 0.95, 1.5, 0.5):
            for sign in (1.0, -1.0):
                advantages = sign * torch.tensor([1.0, 0.3, 2.0], dtype=torch.float64)
                arguments = (xs, log_probs - torch.tensor(ratio).log(), advantages, 10, 0.2,
                             PROMPTS, pipe, T, guidance, ETA, "cpu")
                compute_loss(*arguments)
                analytic = gradient(pipe)
                moved(pipe, v); above = compute_loss(*arguments)
                moved(pipe, -2 * v); below = compute_loss(*arguments)
                moved(pipe, v); gradient(pipe)
                clipped = (ratio == 1.5 and sign > 0) or (ratio == 0.5 and sign < 0)
                if clipped:
                    assert analytic.abs().max() == 0 and above == below
                else:
                    assert analytic.norm() > 1e-3
                    assert (above - below) / 2 == pytest.approx((analytic @ v).item(), rel=1e-4)


def test_gradient_at_ratio_one_is_reinforce():
    "−Σ A ∇log p, with torch.distributions and autograd over all steps at once."
    pipe = tiny_pipeline()
    xs, log_probs = trajectory(pipe, 2.0)
    advantages = torch.tensor([1.0, -0.7, 0.2], dtype=torch.float64)
    loss = compute_loss(xs, log_probs, advantages, 10, 1e-4, PROMPTS, pipe, T, 2.0, ETA, "cpu")
    assert loss == pytest.approx(-0.5 / 3 * T)
    ours = gradient(pipe)
    embeddings, schedule = (encode_prompts(PROMPTS, pipe, 2.0, "cpu"),
                            ddim_schedule(pipe.scheduler, T, ETA))
    reinforce = 0
    for i, n in enumerate(schedule.timesteps):
        output = predict_noise(pipe.unet, xs[i], n, embeddings, 2.0)
        policy = Normal(*step_distribution(output, xs[i], i, schedule))
        reinforce = reinforce + policy.log_prob(xs[i + 1]).mean((1, 2, 3))
    (-(reinforce * advantages).mean()).backward()
    theirs = gradient(pipe)
    assert theirs.norm() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_clipped_surrogate_case_by_case():
    "The piecewise definition, written with ifs."
    g = torch.Generator().manual_seed(0)
    now, old, advantages = 0.3 * torch.randn(3, 500, generator=g, dtype=torch.float64)
    for ours, n, o, a in zip(clipped_surrogate(now, old, advantages, 0.1),
                             now.tolist(), old.tolist(), advantages.tolist()):
        ratio = torch.tensor(n - o, dtype=torch.float64).exp().item()
        if a > 0 and ratio > 1.1: expected = -a * 1.1
        elif a < 0 and ratio < 0.9: expected = -a * 0.9
        else: expected = -a * ratio
        assert ours.item() == pytest.approx(expected, rel=1e-12)


def test_last_step_without_noise_has_no_gradient():
    "With `set_alpha_to_one` the last step's ratio is 1, wherever the weights have moved."
    pipe = tiny_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    with pytest.warns(UserWarning, match="deterministic"):
        xs, log_probs = trajectory(pipe, 1.0)
    assert (log_probs[-1] == 0).all()
    moved(pipe, 0.01 * torch.randn(
        gradient(pipe).numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    advantages = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    def loss_of(last):  # with another last latent
        changed = torch.cat([xs[:-1], last[None]])
        with pytest.warns(UserWarning, match="deterministic"):
            return compute_loss(
                changed, log_probs, advantages, 10, 1e8, PROMPTS, pipe, T, 1.0, ETA, "cpu")
    loss, ours = loss_of(xs[-1]), gradient(pipe)
    assert torch.tensor(loss).isfinite() and ours.isfinite().all() and ours.norm() > 0
    assert loss_of(xs[-1] + 1) == loss and torch.equal(gradient(pipe), ours)


def test_a_step_of_the_loss_stays_on_its_device():
    "All that `compute_loss` calls, on a fake CUDA device; a latent left on the CPU raises."
    pipe = embedded()
    with fake_gpu():
        pipe.to("cuda")
        schedule = sampling.ddim_schedule(pipe.scheduler, T, ETA).to("cuda")
        embeddings = encode_prompts(PROMPTS, pipe, 4.0, "cuda")
        def loss_at(step, device):
            size = pipe.unet.config.sample_size
            x_t, action = torch.empty(2, 3, 4, size, size, device=device)
            output = predict_noise(pipe.unet, x_t, schedule.timesteps[step], embeddings, 4.0)
            mean, std = step_distribution(output, x_t, step, schedule)
            log_probs = calculate_log_probs(action, mean, std).flatten(1).mean(1)
            return clipped_surrogate(log_probs, *torch.empty(2, 3, device=device), 1e-4)
        for step in range(T):
            loss = loss_at(step, "cuda")
            assert loss.device.type == "cuda" and loss.shape == (3,) and loss.requires_grad
        with pytest.raises(RuntimeError): loss_at(0, "cpu")


def test_bad_loss_arguments():
    "What does not belong together is refused before the UNet is called."
    pipe = embedded()
    good = dict(x_t=torch.zeros(T + 1, 3, 4, 8, 8), original_log_probs=torch.zeros(T, 3),
                advantages=torch.zeros(3), clip_advantages=10, clip_ratio=1e-4, prompts=PROMPTS,
                pipe=pipe, num_inference_steps=T, guidance_scale=1.0, eta=1.0, device="cpu")
    calls = []
    pipe.unet.register_forward_pre_hook(lambda *args: calls.append(1))
    def refused(error, match, **change):
        with pytest.raises(error, match=match): compute_loss(**(good | change))
    refused(ValueError, r"x_t must have shape \[5, 3, 4, 8, 8\]", x_t=torch.zeros(T, 3, 4, 8, 8))
    refused(ValueError, r"x_t must have shape \[5, 3, C, h, w\]", x_t=torch.zeros(T + 1, 3))
    refused(ValueError, r"x_t must have shape \[5, 2", prompts=PROMPTS[:2])
    refused(ValueError, r"original_log_probs must have shape \[4, 3\]",
            original_log_probs=torch.zeros(3, T))
    refused(ValueError, r"advantages must have shape \[3\]", advantages=torch.zeros(3, 1))
    refused(TypeError, "advantages must be a tensor of floats, not float",
            advantages=torch.zeros(3).numpy())
    refused(TypeError, "x_t must be a tensor of floats, not list", x_t=[1.0])
    refused(TypeError, "not torch.int64", advantages=torch.zeros(3, dtype=torch.int64))
    refused(ValueError, "clip_ratio must be a number above 0", clip_ratio=0)
    refused(ValueError, "clip_advantages must be a number above 0", clip_advantages=-1)
    refused(ValueError, "deterministic", eta=0)
    refused(ValueError, "at least one prompt", prompts=[])
    assert not calls
