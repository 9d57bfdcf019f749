"""Tests of chapter `nbs/practice/16_gradient.ipynb`."""
import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal, kl_divergence

from ddpo_scratch.loss import compute_loss
from ddpo_scratch.trainer.gradient import (
    Objective,
    Samples,
    StepLoss,
    add_gradient,
    gaussian_kl,
    step_losses,
    summed_up,
)
from ddpo_scratch.trainer.policy import Policy
from helpers import embedded, fake_gpu, gradient, moved, tiny_pipeline

T, PROMPTS = 4, ["a fox", "an owl", "a cat"]
ADVANTAGES = torch.tensor([1.0, -0.7, 0.2], dtype=torch.float64)
ALL, PLAIN = [*range(T)], Objective(clip_ratio=1e-4, clip_advantages=10.0)


def drawn(pipe, guidance, advantages=ADVANTAGES, shift=0.0):
    "A policy and a batch from it, whose original log-probabilities are shifted."
    policy = Policy(pipe, T, guidance, 1.0, (64, 64))
    cond = policy.encode(PROMPTS)
    latents, log_probs = policy.sample(cond, torch.Generator().manual_seed(0))
    return policy, Samples(latents, log_probs + shift, advantages, cond)


def densities(policy, samples, step, network=None):
    "Of a step of all samples, as torch has them."
    with torch.no_grad():
        return Normal(*policy.step(samples.latents[step], step, samples.cond, network))


@pytest.mark.parametrize("guidance", (1.0, 3.0))
def test_the_gradient_is_the_tutorials(guidance):
    "In calls of any size, filled up or not; some ratios are clipped; and the same loss."
    pipe = tiny_pipeline()
    policy, samples = drawn(pipe, guidance)
    shift = 0.05 * torch.randn(T, 3, generator=torch.Generator().manual_seed(2)).double()
    samples = samples._replace(log_probs=samples.log_probs + shift)
    loss = compute_loss(samples.latents, samples.log_probs, ADVANTAGES, 0.5, 0.03, PROMPTS, pipe,
                        T, guidance, 1.0, "cpu")
    theirs = gradient(pipe)
    for size, equal in ((None, False), (1, False), (5, False), (5, True), (12, False), (99, True)):
        found = add_gradient(policy, samples, Objective(0.03, 0.5), ALL, size, equal)
        assert found["loss"] == pytest.approx(loss, rel=1e-9) and 0 < found["clip_fraction"] < 1
        torch.testing.assert_close(gradient(pipe), theirs, rtol=1e-9, atol=1e-12)


def test_steps_add_up():
    "The gradients of the steps one by one, in any order, are that of all; the loss's, too."
    pipe = tiny_pipeline()
    policy, samples = drawn(pipe, 2.0, shift=0.01)
    whole, all_of_it = add_gradient(policy, samples, Objective(0.5, 10.0), [2, 0, 3, 1]), gradient(
        pipe)
    losses = [add_gradient(policy, samples, Objective(0.5, 10.0), [step])["loss"] for step in ALL]
    torch.testing.assert_close(gradient(pipe), all_of_it, rtol=1e-9, atol=1e-12)
    assert sum(losses) == pytest.approx(whole["loss"], rel=1e-9)


def test_gradient_at_ratio_one_is_reinforce():
    "−Σ A ∇log p, with torch.distributions and autograd over all, or the first, steps at once."
    pipe = tiny_pipeline()
    policy, samples = drawn(pipe, 2.0)
    for steps in (ALL, [0, 1], [0]):
        assert add_gradient(policy, samples, PLAIN, steps)["loss"] == pytest.approx(
            -0.5 / 3 * len(steps))
        ours = gradient(pipe)
        reinforce = sum(Normal(*policy.step(samples.latents[step], step, samples.cond)).log_prob(
            samples.latents[step + 1]).mean((1, 2, 3)) for step in steps)
        (-(reinforce * ADVANTAGES).mean()).backward()
        theirs = gradient(pipe)
        assert theirs.norm() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


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
    pipe, steps = tiny_pipeline(), [0, 1, 2]
    reference = copy.deepcopy(pipe.unet)
    policy, samples = drawn(pipe, 2.0)
    free, tied = Objective(0.2, 10.0), Objective(0.2, 10.0, 0.3, reference)
    plain = add_gradient(policy, samples, free, steps)
    without, at_reference = gradient(pipe), add_gradient(policy, samples, tied, steps)
    assert at_reference["loss"] == plain["loss"] and at_reference["ref_kl"] == plain["ref_kl"] == 0
    assert torch.equal(gradient(pipe), without)

    g = torch.Generator().manual_seed(1)
    away, v = torch.randn(2, without.numel(), generator=g, dtype=torch.float64)
    moved(pipe, 0.01 * away)
    divergences = [kl_divergence(
        densities(policy, samples, step), densities(policy, samples, step, reference)).mean()
        for step in steps]
    plain = add_gradient(policy, samples, free, steps)["loss"]; gradient(pipe)
    penalized = add_gradient(policy, samples, tied, steps)
    analytic = gradient(pipe)
    assert penalized["loss"] - plain == pytest.approx(0.3 * sum(divergences).item(), rel=1e-6)
    assert penalized["ref_kl"] == pytest.approx(sum(divergences).item() / 3, rel=1e-6)
    assert not any(p.grad is not None for p in reference.parameters())
    v *= 1e-4 / v.norm()
    moved(pipe, v); above = add_gradient(policy, samples, tied, steps)["loss"]
    moved(pipe, -2 * v); below = add_gradient(policy, samples, tied, steps)["loss"]
    assert (above - below) / 2 == pytest.approx((analytic @ v).item(), rel=1e-4)


def test_metrics_are_counted_by_hand():
    "Ratios from torch.distributions; who is clipped, with ifs; the k1 estimator as its formula."
    shift = 0.1 * torch.randn(T, 3, generator=torch.Generator().manual_seed(2)).double()
    policy, samples = drawn(
        tiny_pipeline(), 1.0, torch.tensor([1.0, -0.7, 0.0], dtype=torch.float64), shift)
    metrics, ratios, clipped = add_gradient(policy, samples, Objective(0.05, 10.0), ALL, 5), [], 0
    for step in ALL:
        now = densities(policy, samples, step).log_prob(samples.latents[step + 1]).mean((1, 2, 3))
        for a, ratio in zip(samples.advantages.tolist(),
                            (now - samples.log_probs[step]).exp().tolist()):
            ratios.append(ratio)
            clipped += (a > 0 and ratio > 1.05) or (a < 0 and ratio < 0.95)
    ratios = np.array(ratios)
    assert 0 < clipped < 2 * T and metrics["clip_fraction"] == pytest.approx(clipped / (3 * T))
    assert metrics["approx_kl"] == pytest.approx(-np.log(ratios).mean(), rel=1e-5)
    assert metrics["max_log_ratio"] == pytest.approx(np.abs(np.log(ratios)).max())
    assert metrics["ref_kl"] == 0


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
    metrics = summed_up(StepLoss(none, log_ratio, none.bool(), none), len(log_ratio))
    true = kl_divergence(Normal(old, sigma), Normal(new, sigma)).mean().item()
    assert gaussian_kl(new, old, sigma).mean().item() == pytest.approx(true)
    assert metrics["approx_kl"] == pytest.approx(true, rel=0.1)


# A scheduler whose last step has no noise: the policy may move as far as it likes, the ratio of
# that step stays 1 and its gradient 0.
def test_last_step_without_noise_has_no_gradient():
    "With `set_alpha_to_one` losses after an update are finite; only the last step has no gradient."
    pipe = tiny_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    with pytest.warns(UserWarning, match="deterministic"):
        policy, samples = drawn(pipe, 1.0, torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64))
    assert (samples.log_probs[-1] == 0).all()
    moved(pipe, 0.01 * torch.randn(
        gradient(pipe).numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    losses = []
    for step in ALL:
        losses.append(add_gradient(policy, samples, Objective(1e-2, 10.0), [step])["loss"])
        assert (gradient(pipe).norm() == 0) == (step == T - 1)
    assert np.isfinite(losses).all() and losses[-1] == pytest.approx(-0.5 / 3)


def test_step_losses_stay_on_their_device():
    "Every step's loss on a fake CUDA device; trajectories left on the CPU raise."
    pipe = embedded()
    with fake_gpu():
        pipe.to("cuda")
        policy = Policy(pipe, T, 4.0, 1.0, (64, 64))
        cond = policy.encode(PROMPTS)
        def loss_at(steps, device):
            samples = Samples(
                torch.empty(T + 1, 3, *policy.latent_shape, device=device),
                torch.empty(T, 3, device=device), torch.empty(3, device=device), cond)
            steps, pairs = torch.tensor(steps, device=device), torch.arange(3, device=device)
            objective = Objective(1e-4, 10.0, 0.1, pipe.unet)
            return step_losses(policy, samples, steps, pairs, objective).loss
        for steps in ([0, 0, 0], [3, 3, 3], [2, 0, 2]):
            loss = loss_at(steps, "cuda")
            assert loss.device.type == "cuda" and loss.shape == (3,) and loss.requires_grad
        with pytest.raises(RuntimeError): loss_at([0, 0, 0], "cpu")
