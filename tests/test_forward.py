"""Tests of chapter `nbs/practice/31_forward.ipynb`."""
import copy
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from ddpo_scratch.command.plan import make_plan
from ddpo_scratch.trainer.evaluation import evaluate, fresh_prompts
from ddpo_scratch.trainer.forward import (
    AWMTrainer,
    NFTTrainer,
    Noised,
    awm_loss,
    matching_losses,
    nft_loss,
    noised,
    stratified,
)
from ddpo_scratch.trainer.gradient import Objective
from ddpo_scratch.trainer.presets import make_config, make_prompt_fn
from ddpo_scratch.trainer.trainer import TrainingState
from ddpo_scratch.training import TRAINING, noise_sources
from ddpo_scratch.workshop.twins import TWINS
from helpers import (
    Bluish,
    as_flags,
    batch_gradient,
    ddpo_train,
    embedded,
    fake_gpu,
    flat,
    goes_on,
    opened,
    redness,
    rolled_out,
    run_until,
    shaken,
    slope,
    small_rank,
    train,
    twin,
)

TINY = dict(algorithm="nft", num_epochs=2, num_samples_per_epoch=6, samples_per_prompt=3,
            sample_batch_size=4, batch_size=3, num_timesteps=4, timestep_fraction=1.0,
            noise_levels=2, img_size=32, lr=1e-3, clip_ratio=0.05)
KINDS = {"nft": NFTTrainer, "awm": AWMTrainer}


def made(pipe, reward_fn=None, **changes):
    "A trainer whose first epoch has been sampled; what it has kept of each image."
    config = make_config("emoji", **TINY | dict(micro_batch_size=4) | changes)
    return rolled_out(config, pipe, reward_fn or Bluish())


@pytest.mark.parametrize("name", ("sd2", "sd2-v", "sd2-x0", "sd3"))
def test_noise_and_target_are_the_schedulers(name):
    "`add_noise`, `get_velocity`, `scale_noise` of `diffusers`, at each step of the sampler."
    pipe, kind = twin(name.split("-")[0]), {"sd2-v": "v_prediction", "sd2-x0": "sample"}.get(name)
    if kind:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=kind)
    ours, _ = made(pipe, eta=0.25)
    schedule, g = ours.policy.schedule, torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(4, *ours.policy.latent_shape, generator=g) for _ in range(2))
    x_t, target = noised(x_0, noise, torch.arange(4), schedule)
    n, scheduler = schedule.timesteps, copy.deepcopy(pipe.scheduler)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        theirs, velocity = scheduler.scale_noise(x_0, n, noise), noise - x_0
        torch.testing.assert_close(target, velocity)
    else:
        theirs, predicts = scheduler.add_noise(x_0, noise, n), scheduler.config.prediction_type
        velocity = scheduler.get_velocity(x_0, noise, n)
        torch.testing.assert_close(
            target, dict(epsilon=noise, v_prediction=velocity, sample=x_0)[predicts])
    torch.testing.assert_close(x_t, theirs, rtol=1e-5, atol=1e-5)


def test_levels_are_spread():
    "One of each part of the steps; all of them where there are as many; each as often."
    def drawn(steps, count, images=400):
        return stratified(steps, count, noise_sources(0, TRAINING, range(images)))
    assert drawn([0, 1, 2, 5], 4).T.tolist() == [[0, 1, 2, 5]] * 400
    halves = drawn([*range(8)], 2)
    assert halves.shape == (2, 400) and halves[0].max() == 3 and halves[1].min() == 4
    assert 70 < min(halves[0].bincount()) and max(halves[0].bincount()) < 130
    thirds = drawn([*range(8)], 3).flatten().bincount(minlength=8)
    assert thirds.shape == (8,) and 110 < min(thirds) and max(thirds) < 190
    torch.testing.assert_close(drawn([*range(8)], 2, 10), halves[:, :10])


@pytest.mark.parametrize("advantage", (-20.0, -1.5, 0.0, 0.7, 3.0))
def test_both_are_one_gradient_and_a_trust_region(advantage):
    "NFT is 2A⟨e, δ⟩ + cβ‖δ‖², and AWM is A‖e + δ‖², at first 2A⟨e, δ⟩, in float64; e is the error."
    g = torch.Generator().manual_seed(0)
    old, target, change = (torch.randn(3, 4, 5, 5, generator=g, dtype=torch.float64)
                           for _ in range(3))
    advantages, objective = torch.full((3,), advantage).double(), Objective(1e9, 5.0)
    within = max(-5.0, min(5.0, advantage))
    for beta in (0.1, 1.0):
        new = (old + 0.3 * change).requires_grad_()
        loss, clipped = nft_loss(beta, new, old, target, advantages, objective)
        change_by = new - old
        expected = (2 * within * ((old - target) * change_by).flatten(1).mean(1)
                    + 5 * beta * (change_by**2).flatten(1).mean(1))
        torch.testing.assert_close(loss, expected)
        assert clipped.all() == (advantage == -20)
    new = old.clone().requires_grad_()
    slopes = [torch.autograd.grad(loss_of(new, old, target, advantages, objective)[0].sum(), new)[0]
              for loss_of in (lambda *args: nft_loss(0.3, *args), awm_loss)]
    torch.testing.assert_close(slopes[0], 2 * within * (old - target) / 100)
    torch.testing.assert_close(slopes[1], slopes[0])
    assert (slopes[0].abs().max() > 1e-3) == (advantage != 0)  # old and new may be the same


def loss_by_hand(pipe, old, kept, advantages, config):
    "With the pipeline's own UNet, image by image and level by level; the papers' own form."
    x_t, target, _, steps = kept
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(config.num_timesteps)
    ids = pipe.tokenizer(["a fox"] * 3 + ["an owl"] * 3, padding="max_length",
                         return_tensors="pt").input_ids
    words, total, most = pipe.text_encoder(ids)[0], 0.0, config.clip_advantages
    for k in range(config.noise_levels):
        for i in range(6):
            asked = (x_t[k, i:i + 1], scheduler.timesteps[steps[k, i]])
            new = pipe.unet(*asked, encoder_hidden_states=words[i:i + 1]).sample
            with torch.no_grad():
                before = old.unet(*asked, encoder_hidden_states=words[i:i + 1]).sample
            A, beta, v = advantages[i].clamp(-most, most), config.nft_beta, target[k, i:i + 1]
            if config.algorithm == "nft":
                r = 0.5 + 0.5 * A / most
                positive = (1 - beta) * before + beta * new
                negative = (1 + beta) * before - beta * new
                loss = r * ((positive - v) ** 2).mean() + (1 - r) * ((negative - v) ** 2).mean()
                total = total + loss * most / beta
            else:
                rho = (((before - v) ** 2).mean() - ((new - v) ** 2).mean()).exp()
                near = rho.clamp(1 - config.clip_ratio, 1 + config.clip_ratio)
                total = total - torch.minimum(A * rho, A * near)
            if config.beta: total = total + config.beta * ((new - before) ** 2).mean()
    return total / 6


@pytest.mark.parametrize("algorithm", KINDS)
@pytest.mark.parametrize("beta", (0.0, 2.0))
def test_the_gradient_is_the_papers(algorithm, beta):
    "Against another implementation in float64, and against finite differences of its loss."
    pipe = twin("sd2").to(torch.float64)
    old = copy.deepcopy(pipe)
    more = dict(nft_beta=0.5) if algorithm == "nft" else {}
    ours, kept = made(pipe, algorithm=algorithm, beta=beta, clip_advantages=1.0, clip_ratio=1e-3,
                      cfg=3.0, **more)  # of the images that are sampled
    shaken(pipe)
    found, measured = batch_gradient(ours, kept, torch.arange(6))
    settings = old, kept, ours.state.rollout.advantages.double(), ours.config
    value = loss_by_hand(pipe, *settings)
    theirs = torch.cat([g.flatten() for g in torch.autograd.grad(value, ours.state.weights)])
    assert (found - theirs).norm() < 1e-5 * theirs.norm()
    assert measured["policy_change"] > 1e-4 and (measured["ref_kl"] > 1e-4) == (beta > 0)
    assert 0 < measured["clip_fraction"] < 1
    rise = slope(lambda p: loss_by_hand(p, *settings), pipe, found / found.norm(), 1e-5)
    assert rise == pytest.approx(found.norm().item(), rel=2e-2) and rise > 0


def test_micro_batches_and_batches_of_sampling_change_nothing():
    "Guided, with a penalty; pairs one by one."
    def whole(**changes):
        pipe = twin("sd2").to(torch.float64)
        ours, kept = made(pipe, **dict(cfg=3.0, beta=0.5, micro_batch_size=12) | changes)
        shaken(pipe)
        return batch_gradient(ours, kept, torch.arange(6))
    for algorithm in KINDS:
        found, measured = whole(algorithm=algorithm)
        for changes in (dict(micro_batch_size=1), dict(micro_batch_size=5),
                        dict(sample_batch_size=6), dict(gradient_checkpointing=True)):
            theirs, same = whole(algorithm=algorithm, **changes)
            assert (found - theirs).norm() < 1e-6 * found.norm(), changes
            assert same == pytest.approx(measured, rel=1e-6)


def test_the_old_policy_samples():
    "Its weights draw the images and predict; the trained ones come back, after an error, too."
    pipe = twin("sd2")
    old = flat(pipe)
    config = make_config("emoji", **TINY, old_decay=0.5)
    ours = NFTTrainer(config, pipe, lambda: "a fox", Bluish())
    shaken(pipe)
    new = flat(pipe)
    seen, real = [], ours.policy.network.forward
    def watched(*args, **kwargs):
        seen.append(flat(pipe))
        return real(*args, **kwargs)
    ours.policy.network.forward = watched
    ours.roll_out(0, lambda: None)
    assert len(seen) == 2 * (4 + 2) and all(torch.equal(weights, old) for weights in seen)
    assert torch.equal(flat(pipe), new)
    def broken(): raise ZeroDivisionError
    ours.state.rollout.samples.clear()
    with pytest.raises(ZeroDivisionError): ours.roll_out(0, broken)
    assert torch.equal(flat(pipe), new)


def test_averages_of_the_weights():
    "Of a run's updates, and of its epochs, by their formula; the last weights give way to one."
    for algorithm in ("ddpo", "nft"):
        pipe, seen = twin("sd2"), []
        more = dict(old_decay=0.15) if algorithm == "nft" else dict(noise_levels=4)
        config = make_config("emoji", **TINY | dict(
            algorithm=algorithm, num_epochs=4, ema_decay=0.3) | more)
        state = TrainingState(config, pipe)
        train(config, pipe, lambda: "a fox", Bluish(), state=state, on_batch=lambda: seen.append(
            (flat(pipe), len(state.rollout.updates), len(state.history))))
        updates = [weights for weights, done, _ in seen if done]
        def averaged(values, share):
            found = values[0]
            for i, value in enumerate(values[1:], 1):
                decay = share(i)
                found = decay * found + (1 - decay) * value
            return found
        assert len(updates) == 8
        by_hand = averaged(updates, lambda i: min((1 + i) / (10 + i), 0.3))
        torch.testing.assert_close(flat(pipe), by_hand, rtol=0, atol=1e-6)
        assert (flat(pipe) - updates[-1]).abs().max() > 1e-4
        if algorithm == "nft":
            old = torch.cat([x.flatten() for x in state.old.shadow_params])
            by_hand = averaged(updates[1::2], lambda i: 0.15)
            torch.testing.assert_close(old, by_hand, rtol=0, atol=1e-6)


def test_sampling_without_noise():
    "Needs no eta, which DDPO refuses; other values that are refused."
    for name, eta in (("sd2", 0), ("sd3", 0.0)):
        ours, kept = made(twin(name), eta=eta, cfg=1.0)
        assert not ours.policy.schedule.std.any()
        batch_gradient(ours, kept, torch.arange(6))
    for changes, match in ((dict(algorithm="ddpo", noise_levels=4, eta=0.0), "eta must be above 0"),
                           (dict(eta=-0.1), "eta must be a number of at least 0"),
                           (dict(noise_levels=0), "noise_levels must be a whole number of at leas"),
                           (dict(nft_beta=0), "nft_beta must be a number above 0"),
                           (dict(old_decay=1.0), "old_decay must be at least 0"),
                           (dict(algorithm="awm", nft_beta=0.5), "nft_beta means nothing to algor"),
                           (dict(algorithm="ddpo"), "noise_levels means nothing to algorithm"),
                           (dict(draft_steps=2), "draft_steps means nothing to algorithm 'nft'")):
        with pytest.raises(ValueError, match=match): make_config("emoji", **TINY | changes)


@pytest.mark.parametrize("name", ("sd2", "sd3"))
def test_all_stays_on_its_device(name):
    "Noised images, losses and penalty on a fake CUDA device."
    (ours, _), batch = made(twin(name), beta=0.1, eta=0.25, cfg=1.0), torch.arange(3)
    with fake_gpu():
        ours.pipe.to("cuda")
        ours.state.reference.to("cuda")
        vars(ours.policy).pop("schedule", None)  # of the CPU
        trajectory = ours.policy.sample(
            ours.cache(["a fox"] * 3), noise_sources(0, TRAINING, range(3)))
        kept = ours.kept(0, batch, trajectory)
        images = Noised(*kept, torch.ones(3, device="cuda"), ours.cache(["a fox"] * 3))
        pairs = torch.arange(3, device="cuda")
        for loss_of in (lambda *args: nft_loss(0.5, *args), awm_loss):
            loss = matching_losses(ours.policy, images, loss_of, 0 * pairs, pairs,
                                   ours.objective).loss
            assert loss.device.type == "cuda" and loss.requires_grad and loss.shape == (3,)


@pytest.mark.parametrize("name", TWINS)
def test_every_family(name):
    "With an adapter, a penalty, averages: finite numbers, weights that move."
    for algorithm in KINDS:
        pipe = twin(name)
        config = make_config("emoji", **TINY | dict(
            algorithm=algorithm, lora_rank=small_rank(name), beta=0.1, old_decay=0.5,
            ema_decay=0.5, eta=0.0,
            cfg=1.0 if name == "flux-schnell" else 2.0))
        state = TrainingState(config, pipe)
        before = [weight.detach().clone() for weight in state.weights]
        history = train(config, pipe, lambda: "a fox", Bluish(), eval_rewards={"red": redness},
                        state=state)
        assert {"policy_change", "clip_fraction", "eval_red", "ref_kl"} <= {*history[-1]}
        assert all(np.isfinite([*row.values()]).all() for row in history)
        assert any((weight - old).abs().max() > 1e-4 for weight, old in zip(state.weights, before))


def test_a_run_goes_on_after_any_batch():
    "While an old policy samples, and while it is trained: the same weights to the last bit."
    kinds = (dict(old_decay=0.4, ema_decay=0.5),
             dict(algorithm="awm", lora_rank=2, beta=0.1, mixed_precision="bf16", old_decay=0.4))
    for kind in kinds:
        config = make_config("emoji", **TINY | dict(num_epochs=3) | kind)
        prompt_fn = make_prompt_fn("emoji_animal_prompts")
        goes_on(partial(run_until, config, prompt_fn, Bluish()), (5, 7, 8, 9))


def test_the_plan_counts_the_levels():
    "K calls with a gradient and K more without; K times three latents; averages of the weights."
    few = dict(num_samples_per_epoch=4, samples_per_prompt=1, batch_size=4, micro_batch_size=4)
    ddpo = make_plan(make_config("emoji", **few, timestep_fraction=1.0))
    two, four = (make_plan(make_config("emoji", algorithm="nft", noise_levels=count, **few))
                 for count in (2, 4))
    step = ddpo.sampling / 8
    assert two.sampling == pytest.approx(10 * step) and four.sampling == pytest.approx(12 * step)
    assert two.training == pytest.approx(ddpo.training / 4)
    assert four.trajectories == 2 * two.trajectories
    assert two.trajectories == pytest.approx(ddpo.trajectories * 6 / 9)
    both = make_plan(make_config("emoji", algorithm="awm", ema_decay=0.9, old_decay=0.5, **few))
    assert both.resident["averages of the weights"] == 8 * two.trained


def test_the_command(twins, tmp_path):
    "A whole run, which goes on; its card; an average is what is saved."
    flags = as_flags(TINY | dict(pipeline=twins["sd2"], reward="animal", num_eval_samples=3,
                                 ema_decay=0.5, old_decay=0.5, name="x"))
    done = ddpo_train(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    more = ddpo_train(tmp_path, "--resume=runs/x", "--num_epochs=3")
    assert more.returncode == 0, more.stderr
    folder = tmp_path / "runs" / "x"
    state = torch.load(folder / "checkpoints" / "00003" / "state.pt", weights_only=True)["state"]
    average = torch.cat([x.flatten() for x in state["averages"]["average"]["shadow_params"]])
    for place in (folder, folder / "checkpoints" / "00003"):
        assert torch.equal(flat(opened(str(place / "pipeline"))), average), place
    assert not torch.equal(torch.cat([x.flatten() for x in state["weights"]]), average)
    card = (tmp_path / "runs" / "x" / "pipeline" / "README.md").read_text("utf-8")
    assert "Trained with DiffusionNFT (Zheng et al. 2025" in card and "- nft\n" in card
    columns, *rows = (tmp_path / "runs" / "x" / "metrics.csv").read_text("utf-8").splitlines()
    assert len(rows) == 3 and columns == (
        "epoch,reward_mean,reward_std,eval_right_animal,loss,grad_norm,policy_change,"
        "clip_fraction,lr,skipped,seconds")


@pytest.mark.slow
def test_the_reward_rises():
    "Of fresh images of the embedded model, after eight updates."
    config = make_config("emoji", algorithm="nft", num_epochs=2, num_eval_samples=96)
    pipe, prompt_fn, reward = embedded(), make_prompt_fn(config.prompts), Bluish()
    prompts = fresh_prompts(config, prompt_fn)
    _, before = evaluate(config, pipe, prompts, reward)
    train(config, pipe, prompt_fn, reward)
    _, after = evaluate(config, pipe, prompts, reward)
    assert after.mean() > before.mean() + before.std() / 2
