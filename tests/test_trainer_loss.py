"""Tests of chapter `nbs/practice/15_gradient.ipynb`."""
import copy
from itertools import combinations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal, kl_divergence

from ddpo_scratch.sampling import ddim_schedule
from ddpo_scratch.trainer.loss import (
    StepLoss,
    choose_steps,
    compute_loss,
    gaussian_kl,
    step_loss,
    sum_up,
    trained_steps,
)
from ddpo_scratch.trainer.sampling import (
    encode_prompts,
    make_schedule,
    policy_step,
    sd_sample,
)
from helpers import embedded, fake_gpu, gradient, moved, tiny_pipeline

T, PROMPTS, ETA = 4, ["a fox", "an owl", "a cat"], 1.0


def trajectory(pipe, guidance, seed=0):
    _, xs, log_probs = sd_sample(
        PROMPTS, pipe, 64, 64, guidance, T, ETA, "cpu", torch.Generator().manual_seed(seed))
    return xs, log_probs


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
    "−Σ A ∇log p, with torch.distributions and autograd over all (or the first few) steps at once."
    pipe = tiny_pipeline()
    xs, log_probs = trajectory(pipe, 2.0)
    advantages = torch.tensor([1.0, -0.7, 0.2], dtype=torch.float64)
    embeddings, schedule = (encode_prompts(PROMPTS, pipe, 2.0, "cpu"),
                            ddim_schedule(pipe.scheduler, T, ETA))
    for fraction, steps in ((1.0, T), (0.5, 2), (0.01, 1)):
        loss = compute_loss(
            xs, log_probs, advantages, 10, 1e-4, PROMPTS, pipe, T, 2.0, ETA, "cpu", fraction)
        assert loss == pytest.approx(-0.5 / 3 * steps)
        ours = gradient(pipe)
        reinforce = sum(
            Normal(*policy_step(pipe.unet, xs[i], i, embeddings, schedule, 2.0))
            .log_prob(xs[i + 1]).mean((1, 2, 3)) for i in range(steps))
        (-(reinforce * advantages).mean()).backward()
        theirs = gradient(pipe)
        assert theirs.norm() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_steps_that_are_drawn():
    "Each sample's own, without repetition, all alike; the same again from the same generator."
    def draw(seed):
        return choose_steps(8, 0.5, "random", 4000, torch.Generator().manual_seed(seed))
    drawn = draw(0)
    assert drawn.shape == (4, 4000) and torch.equal(drawn, draw(0))
    assert not torch.equal(drawn, draw(1))
    assert all(len(set(column)) == 4 for column in drawn.T.tolist())
    counts = drawn.flatten().bincount(minlength=8)
    assert (counts - 2000).abs().max() < 6 * (4000 * 0.25) ** 0.5  # of a binomial distribution
    assert choose_steps(8, 0.5, "first", 2).tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert choose_steps(8, 1.0, "5,0", 3).tolist() == [[5, 5, 5], [0, 0, 0]]
    for which, expected in (("first", 4), ("random", 4), ("1", 1), ("0,3,6", 3)):
        assert trained_steps(8, 0.5, which) == len(choose_steps(8, 0.5, which, 2)) == expected


def test_drawn_steps_are_an_unbiased_estimate():
    "All ways to draw two of four steps, each counted twice, average to the whole gradient."
    pipe = tiny_pipeline()
    xs, log_probs = trajectory(pipe, 2.0)
    advantages = torch.tensor([1.0, -0.7, 0.2], dtype=torch.float64)
    arguments = (xs, log_probs + 0.1, advantages, 10, 0.05, PROMPTS, pipe, T, 2.0, ETA, "cpu")
    loss = compute_loss(*arguments)
    whole, ways = gradient(pipe), list(combinations(range(T), 2))
    for first in range(3):  # samples need not draw the same ways
        losses = [compute_loss(*arguments, share=T / 2, steps=torch.tensor([
            ways[i], ways[i - first], ways[i - 2 * first]]).T) for i in range(len(ways))]
        torch.testing.assert_close(gradient(pipe) / len(ways), whole, rtol=1e-9, atol=1e-12)
        assert T / 2 * np.mean(losses) == pytest.approx(loss, rel=1e-9)


# The penalty, against torch's own divergence and finite differences; where policy and reference are
# the same, it must not be felt.
def test_gaussian_kl():
    "Agrees with torch.distributions in float64; 0 where a step has no noise."
    g = torch.Generator().manual_seed(0)
    mean, ref_mean = torch.randn(2, 3, 4, 8, 8, generator=g, dtype=torch.float64)
    for sigma in (0.01, 0.5, 3.0):
        std = torch.tensor(sigma, dtype=torch.float64)
        expected = kl_divergence(Normal(mean, std), Normal(ref_mean, std)).mean((1, 2, 3))
        torch.testing.assert_close(gaussian_kl(mean, ref_mean, std), expected)
    mean.requires_grad_()
    idle = gaussian_kl(mean, ref_mean, torch.zeros((), dtype=torch.float64))
    idle.sum().backward()
    assert (idle == 0).all() and (mean.grad == 0).all()


def test_penalty_and_its_gradient():
    "β times the divergences summed over the steps; central differences; nothing at the reference."
    pipe = tiny_pipeline()
    reference = copy.deepcopy(pipe.unet)
    xs, log_probs = trajectory(pipe, 2.0)
    advantages = torch.tensor([1.0, -0.7, 0.2], dtype=torch.float64)
    arguments = (xs, log_probs, advantages, 10, 0.2, PROMPTS, pipe, T, 2.0, ETA, "cpu", 0.75)
    plain = compute_loss(*arguments)
    without, at_reference = gradient(pipe), {}
    assert compute_loss(*arguments, 0.3, reference, at_reference) == plain
    assert torch.equal(gradient(pipe), without) and at_reference["ref_kl"] == 0

    g = torch.Generator().manual_seed(1)
    away, v = torch.randn(2, without.numel(), generator=g, dtype=torch.float64)
    moved(pipe, 0.01 * away)
    embeddings, schedule = encode_prompts(PROMPTS, pipe, 2.0, "cpu"), ddim_schedule(
        pipe.scheduler, T, ETA)
    divergences = []
    for i in range(3):
        with torch.no_grad():
            policies = [Normal(*policy_step(unet, xs[i], i, embeddings, schedule, 2.0))
                        for unet in (pipe.unet, reference)]
        divergences.append(kl_divergence(*policies).mean())
    plain = compute_loss(*arguments); gradient(pipe)
    metrics = {}
    penalised = compute_loss(*arguments, 0.3, reference, metrics)
    analytic = gradient(pipe)
    assert penalised - plain == pytest.approx(0.3 * sum(divergences).item(), rel=1e-6)
    assert metrics["ref_kl"] == pytest.approx(sum(divergences).item() / 3, rel=1e-6)
    assert not any(p.grad is not None for p in reference.parameters())
    v *= 1e-4 / v.norm()
    moved(pipe, v); above = compute_loss(*arguments, 0.3, reference)
    moved(pipe, -2 * v); below = compute_loss(*arguments, 0.3, reference)
    assert (above - below) / 2 == pytest.approx((analytic @ v).item(), rel=1e-4)


def test_metrics_are_counted_by_hand():
    "Ratios from torch.distributions; who is clipped, with ifs; the k1 estimator as its formula."
    pipe, metrics, ratios, clipped = tiny_pipeline(), {}, [], 0
    xs, log_probs = trajectory(pipe, 1.0)
    log_probs = log_probs + 0.1 * torch.randn(
        log_probs.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    advantages = torch.tensor([1.0, -0.7, 0.0], dtype=torch.float64)
    compute_loss(xs, log_probs, advantages, 10, 0.05, PROMPTS, pipe, T, 1.0, ETA, "cpu",
                 metrics=metrics)
    embeddings, schedule = encode_prompts(PROMPTS, pipe, 1.0, "cpu"), ddim_schedule(
        pipe.scheduler, T, ETA)
    for i in range(T):
        with torch.no_grad():
            policy = Normal(*policy_step(pipe.unet, xs[i], i, embeddings, schedule, 1.0))
        now = policy.log_prob(xs[i + 1]).mean((1, 2, 3))
        for a, ratio in zip(advantages.tolist(), (now - log_probs[i]).exp().tolist()):
            ratios.append(ratio)
            clipped += (a > 0 and ratio > 1.05) or (a < 0 and ratio < 0.95)
    ratios = np.array(ratios)
    assert 0 < clipped < 2 * T and metrics["clip_fraction"] == pytest.approx(clipped / (3 * T))
    assert metrics["approx_kl"] == pytest.approx(-np.log(ratios).mean(), rel=1e-5)
    assert metrics["max_log_ratio"] == pytest.approx(np.abs(np.log(ratios)).max())
    assert "ref_kl" not in metrics


def test_approx_kl_is_the_divergence():
    "Of a policy whose mean has moved by a tenth of σ: as `gaussian_kl` and torch have it."
    g, sigma = torch.Generator().manual_seed(0), torch.tensor(0.7, dtype=torch.float64)
    old = torch.randn(4096, 4, 8, 8, generator=g, dtype=torch.float64)
    move = 0.1 * sigma * torch.randn(old.shape, generator=g, dtype=torch.float64).sign()
    new = old + move
    action = old + sigma * torch.randn(old.shape, generator=g, dtype=torch.float64)
    log_ratio = (Normal(new, sigma).log_prob(action) - Normal(old, sigma).log_prob(action)
                 ).mean((1, 2, 3))
    none = torch.zeros(len(log_ratio), dtype=torch.float64)
    _, metrics = sum_up([StepLoss(none, log_ratio, none.bool(), none)], len(log_ratio))
    true = kl_divergence(Normal(old, sigma), Normal(new, sigma)).mean().item()
    assert gaussian_kl(new, old, sigma).mean().item() == pytest.approx(true)
    assert metrics["approx_kl"] == pytest.approx(true, rel=0.1)


# A scheduler whose last step has no noise: the policy may move as far as it likes, the ratio of
# that step stays 1 and its gradient 0.
def test_last_step_without_noise_neither_explodes_nor_pulls():
    "With `set_alpha_to_one` losses after an update are finite; only the last step has no gradient."
    pipe = tiny_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    with pytest.warns(UserWarning, match="deterministic"):
        xs, log_probs = trajectory(pipe, 1.0)
    assert (log_probs[-1] == 0).all()
    moved(pipe, 0.01 * torch.randn(
        gradient(pipe).numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    embeddings, schedule = (encode_prompts(PROMPTS, pipe, 1.0, "cpu"),
                            ddim_schedule(pipe.scheduler, T, ETA))
    advantages = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    losses = []
    for step in range(T):
        losses.append(step_loss(step, xs[step], xs[step + 1], log_probs[step], advantages, 1e-2,
                                embeddings, pipe.unet, schedule, 1.0).loss.mean())
        losses[-1].backward()
        assert (gradient(pipe).norm() == 0) == (step == T - 1)
    assert torch.stack(losses).isfinite().all() and losses[-1].item() == pytest.approx(-0.5 / 3)


def test_loss_forward_stays_on_its_device():
    "Every step's loss on a fake CUDA device; trajectories left on the CPU raise."
    pipe = embedded()
    with fake_gpu():
        pipe.to("cuda")
        schedule = make_schedule(pipe, T, ETA, 8, 8, "cuda")
        def loss_at(step, device):
            xs, log_probs, advantages = (
                torch.empty(*shape, device=device)
                for shape in ((T + 1, 3, 4, 8, 8), (T, 3), (3,)))
            embeddings = encode_prompts(PROMPTS, pipe, 4.0, "cuda")
            return step_loss(step, xs[0], xs[1], log_probs[0], advantages, 1e-4, embeddings,
                             pipe.unet, schedule, 4.0, 0.1, pipe.unet).loss
        for step in (*range(T), torch.tensor([2, 0, 2], device="cuda")):
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
    refused(ValueError, r"x_t must have shape \[5, 3, C, h, w\]", x_t=torch.zeros(T, 3, 4, 8, 8))
    refused(ValueError, r"x_t must have shape \[5, 2", prompts=PROMPTS[:2])
    refused(ValueError, r"original_log_probs must have shape \[4, 3\]",
            original_log_probs=torch.zeros(3, T))
    refused(ValueError, r"advantages must have shape \[3\]", advantages=torch.zeros(3, 1))
    refused(TypeError, "advantages must be a tensor of floats, not ndarray",
            advantages=torch.zeros(3).numpy())
    refused(TypeError, "not torch.int64", advantages=torch.zeros(3, dtype=torch.int64))
    refused(ValueError, "clip_ratio must be a number above 0", clip_ratio=0)
    refused(ValueError, "timestep_fraction must be above 0 and at most 1", timestep_fraction=1.2)
    refused(ValueError, "timestep_fraction", timestep_fraction=0)
    refused(ValueError, "steps and timestep_fraction: give one of the two",
            steps=torch.zeros(1, 3, dtype=torch.long), timestep_fraction=0.5)
    refused(TypeError, "steps must be a tensor of whole numbers, not torch.float32",
            steps=torch.zeros(1, 3))
    refused(ValueError, r"steps must have shape \[S, 3\]",
            steps=torch.zeros(3, dtype=torch.long))
    refused(ValueError, r"steps must have shape \[S, 3\]",
            steps=torch.zeros(0, 3, dtype=torch.long))
    refused(ValueError, "from 0 to 3, not 4", steps=torch.full((1, 3), 4))
    refused(ValueError, "from 0 to 3, not -1", steps=torch.full((1, 3), -1))
    refused(ValueError, "clip_advantages must be a number above 0", clip_advantages=-1)
    refused(ValueError, "kl_coef must be a number of at least 0", kl_coef=-0.1)
    refused(ValueError, "kl_coef is 0.1, and there is nothing to stay close to", kl_coef=0.1)
    refused(ValueError, "deterministic", eta=0)
    refused(ValueError, "at least one prompt", prompts=[])
    assert not calls
