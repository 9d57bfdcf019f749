"""Tests of chapter `nbs/practice/30_draft.ipynb`."""
import copy

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

from ddpo_scratch.animals import AnimalReward, RightAnimal
from ddpo_scratch.command.plan import make_plan
from ddpo_scratch.pipelines import is_flow
from ddpo_scratch.rewards import MLP, AestheticReward, JPEGCompressibility
from ddpo_scratch.scorers.names import WeightedSum
from ddpo_scratch.scorers.scorers import CLIPScore, clip_pixels
from ddpo_scratch.trainer.ddpo import DDPOTrainer
from ddpo_scratch.trainer.draft import DRaFTTrainer, decoded, views
from ddpo_scratch.trainer.evaluation import evaluate, fresh_prompts
from ddpo_scratch.trainer.policy import Policy, Ruined
from ddpo_scratch.trainer.presets import make_config, make_prompt_fn
from ddpo_scratch.trainer.trainer import TrainingState
from ddpo_scratch.training import TRAINING, noise_sources
from ddpo_scratch.workshop.twins import TWINS
from helpers import (
    Bluish,
    as_flags,
    ddpo_train,
    embedded,
    fake_gpu,
    goes_on,
    last_line,
    redness,
    run_until,
    shaken,
    slope,
    small_rank,
    train,
    twin,
)

TINY = dict(algorithm="draft", draft_views=0, num_epochs=2, num_samples_per_epoch=6, batch_size=3,
            num_timesteps=3, img_size=32, lr=1e-3, samples_per_prompt=1)


def made(pipe, reward_fn=None, prompts=("a fox", "an owl", "a cat"), **changes):
    "A trainer whose epoch has begun."
    config = make_config("emoji", **TINY | dict(micro_batch_size=3) | changes)
    names = iter(list(prompts) * 100)
    ours = DRaFTTrainer(config, pipe, lambda: next(names), reward_fn or Bluish())
    ours.draw_prompts()
    return ours


def gradient_of(ours, part=(0, 1, 2)):
    "Of these samples: all weights' in one vector, and what was measured."
    for weight in ours.state.weights: weight.grad = None
    _, measured, _ = ours.part_gradient(0, torch.tensor(part), 1.0, ours.config.draft_steps)
    return torch.cat([weight.grad.flatten() for weight in ours.state.weights]), measured


def loss_by_hand(pipe, before, steps, trained, copies=1, beta=0.0, reference=None):
    "By `diffusers`' own step: the network `before` first, `pipe`'s in the last steps."
    noise = noise_sources(0, TRAINING, range(3))
    scheduler, x, found = DDIMScheduler.from_config(pipe.scheduler.config), None, []
    scheduler.set_timesteps(steps)
    ids = pipe.tokenizer(["a fox", "an owl", "a cat"], padding="max_length",
                         return_tensors="pt").input_ids
    words = pipe.text_encoder(ids)[0]
    def draw(): return torch.stack([torch.randn(4, 4, 4, generator=g, dtype=torch.float64)
                                    for g in noise])
    def step_of(unet, x, t, noise): return scheduler.step(
        unet(x, t, encoder_hidden_states=words).sample, t, x, eta=1.0,
        variance_noise=noise).prev_sample
    def penalty(x, t):
        if not beta: return 0.0
        means = [step_of(unet, x.detach(), t, 0 * x) for unet in (pipe.unet, reference.unet)]
        variance = scheduler._get_variance(t, t - 1000 // steps)
        return beta * ((means[0] - means[1]) ** 2 / (2 * variance)).mean()
    def worth(x):
        images = (pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        return Bluish().differentiable(images, []).mean()
    x, loss = draw(), 0.0
    for i, t in enumerate(scheduler.timesteps):
        is_trained = i >= steps - trained
        if is_trained: loss = loss + penalty(x, t)
        x = step_of(pipe.unet if is_trained else before.unet, x, t, draw())
    found.append(loss - worth(x))
    for _ in range(copies - 1):
        alpha = scheduler.alphas_cumprod[t].double()
        again = alpha.sqrt() * x.detach() + (1 - alpha).sqrt() * draw()
        found.append(penalty(again, t) - worth(step_of(pipe.unet, again, t, draw())))
    return sum(found) / copies


@pytest.mark.parametrize("trained, copies, beta", (
    (1, 1, 0.0), (2, 1, 0.0), (3, 1, 0.0), (1, 3, 0.0), (2, 1, 3.0), (1, 2, 3.0)))
def test_the_gradient_is_that_of_the_last_steps(trained, copies, beta):
    "Against another implementation in float64, and against finite differences of its loss."
    pipe = twin("sd2").to(torch.float64)
    pipe.scheduler = DDIMScheduler.from_config(  # so that theirs lands where the next step begins
        pipe.scheduler.config, timestep_spacing="leading", rescale_betas_zero_snr=False)
    reference = copy.deepcopy(pipe)
    trainer = made(pipe, draft_steps=trained, draft_copies=copies, beta=beta)
    weights = trainer.state.weights
    shaken(pipe)
    ours, measured = gradient_of(trainer)
    before = copy.deepcopy(pipe)
    settings = before, 3, trained, copies, beta, reference
    value = loss_by_hand(pipe, *settings)
    theirs = torch.cat([g.flatten() for g in torch.autograd.grad(value, weights)])
    assert measured["loss"] == pytest.approx(value.item(), rel=1e-5)
    assert (measured["ref_kl"] > 1e-6) == (beta > 0)
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()
    if copies > 1 or beta: return  # the latents that are held there would move, too
    rise = slope(lambda p: loss_by_hand(p, *settings), pipe, ours / ours.norm(), 1e-3)
    assert rise == pytest.approx(ours.norm().item(), rel=1e-2) and rise > 0


def test_micro_batches_and_checkpointing_change_nothing():
    "Samples one by one, guided, with a penalty and views; less memory."
    def whole(**changes):
        settings = dict(cfg=3.0, beta=0.5, draft_views=2) | changes
        trainer = made(twin("sd2").to(torch.float64), **settings)
        shaken(trainer.pipe)
        for weight in trainer.state.weights: weight.grad = None
        measured = trainer.batch_gradient(0, torch.arange(3))
        return torch.cat([w.grad.flatten() for w in trainer.state.weights]), measured
    for kind in (dict(draft_steps=2), dict(draft_copies=2)):
        ours, measured = whole(**kind)
        assert measured["ref_kl"] > 0
        for changes in (dict(micro_batch_size=1), dict(gradient_checkpointing=True)):
            theirs, same = whole(**kind, **changes)
            assert (ours - theirs).norm() < 1e-6 * ours.norm(), changes
            assert same == pytest.approx(measured, rel=1e-6)


def test_random_truncation():
    "A number of steps for each update, the same after a stop; every number comes up."
    ours, seen = made(twin("sd2"), draft_steps=3, draft_random=True), []
    for _ in range(40):
        seen.append(ours.trained_steps())
        assert ours.trained_steps() == seen[-1]
        ours.state.rollout.updates.append({})
    assert {*seen} == {1, 2, 3}
    assert made(twin("sd2"), draft_steps=3).trained_steps() == 3


def test_views():
    "A mean over random ones; an image's do not depend on its neighbours; they have a gradient."
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    def shown(which): return views(images[which], noise_sources(0, TRAINING, which), 5)
    whole = shown([0, 1, 2])
    assert whole.shape == (15, 3, 16, 16) and 0 <= whole.min() and whole.max() <= 1
    torch.testing.assert_close(whole[5:10], shown([1]), rtol=0, atol=1e-6)
    assert len({*whole.flatten(1).mean(1).tolist()}) == 15
    images.requires_grad_()
    shown([0, 1, 2]).sum().backward()
    assert (images.grad.flatten(1).abs().mean(1) > 0.5).all()
    flat_ones = torch.full((64, 3, 16, 16), 0.5)
    grey = views(flat_ones, noise_sources(1, TRAINING, range(64)), 4)
    assert abs(grey.mean() - 0.5) < 0.01 and 0.04 < grey.std() < 0.12
    reward = Bluish()
    made(twin("sd2"), reward, draft_views=4).part_gradient(0, torch.arange(2), 1.0, 1)
    (shape, prompts), = reward.asked
    assert shape[0] == 8 and prompts == ["a fox"] * 4 + ["an owl"] * 4


def test_decoding_is_the_tutorials():
    "Except for the rounding."
    pipe = embedded()
    policy = Policy(pipe, 4, 1.0, 1.0, (64, 64))
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    ours = decoded(policy, latents).detach().permute(0, 2, 3, 1).numpy()
    assert np.abs(255 * ours - policy.decode(latents)).max() <= 0.501


def small_clip():
    torch.manual_seed(0)
    return open_clip.CLIP(
        768, open_clip.CLIPVisionCfg(layers=1, width=64, head_width=32, patch_size=32,
                                     image_size=224),
        open_clip.CLIPTextCfg(width=64, heads=2, layers=1)).eval()


def slopes(worth, images, far):
    "Along the smoothed gradient: by the gradient, and by finite differences."
    images = images.clone().requires_grad_()
    slope, = torch.autograd.grad(worth(images).sum(), images)
    direction = F.interpolate(F.adaptive_avg_pool2d(slope, 4), images.shape[-2:], mode="bilinear")
    direction /= direction.abs().max()
    with torch.no_grad():
        apart = worth(images + far * direction) - worth(images - far * direction)
    return (slope * direction).sum().item(), (apart.sum() / (2 * far)).item()


def test_rewards_have_the_gradient_of_their_values():
    "The real classes, with weights of their own: aesthetic, CLIP score, the animal classifier."
    images = 0.3 + 0.4 * torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(images, (90, 70), mode="bicubic").clamp(0.1, 0.9)
    aesthetic, clip_score = AestheticReward("cpu"), CLIPScore("cpu", model="ViT-B-32")
    aesthetic.clip_model, aesthetic.aesthetic_model = small_clip(), MLP(768).eval()
    aesthetic.preprocess, aesthetic.loaded = open_clip.image_transform(224, is_train=False), True
    clip_score.clip_model, clip_score.loaded = small_clip(), True
    clip_score.clip_model.visual.preprocess_cfg = dict(
        size=224, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD,
        interpolation="bicubic", resize_mode="shortest")
    clip_score.tokenizer = open_clip.get_tokenizer("ViT-B-32")
    prompts = ["a fox", "an owl"]
    for reward, far in ((aesthetic, 0.01), (AnimalReward("cpu").ready(), 2e-4),
                        (clip_score, 0.03)):  # which rounds to levels of 0.004
        def worth(x): return reward.differentiable(x, prompts)
        for p in reward.parameters(): p.requires_grad_(False)
        torch.testing.assert_close(worth(images), reward(images, prompts), rtol=0.02, atol=0.02)
        along, apart = slopes(worth, images, far)
        assert along == pytest.approx(apart, rel=0.1) and along > 0, type(reward)


def test_clips_pixels_keep_their_values():
    "With a gradient to the last bits the same pixels; the gradient is not that of the rounding, 0."
    x = torch.rand(1, 3, 50, 40, generator=torch.Generator().manual_seed(0))
    args = 32, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    plain, y = clip_pixels(x, *args), clip_pixels(x.requires_grad_(), *args)
    torch.testing.assert_close(y, plain, rtol=0, atol=1e-5)
    y.sum().backward()
    assert x.grad.abs().sum() > 1


def test_rewards_without_a_gradient_are_refused(tmp_path):
    "Before anything is drawn, with the list of those that have one."
    pipe = twin("sd2")
    for reward in (JPEGCompressibility(), RightAnimal("cpu"), redness, WeightedSum(
            {"a": Bluish(), "b": redness}, {"a": 1.0, "b": 1.0})):
        with pytest.raises(ValueError, match="has no gradient.*clip_score, pickscore and HPSScore"):
            made(pipe, reward)
    done = ddpo_train(tmp_path, "--algorithm=draft", "--reward=jpeg_compressibility")
    assert "JPEGCompressibility has no gradient" in last_line(done)
    assert not (tmp_path / "runs").exists()
    for changes, match in ((dict(draft_steps=4), "draft_steps 4 is more than the 3 steps"),
                           (dict(draft_steps=2, draft_copies=2), "set one of them to 1"),
                           (dict(draft_views=-1), "draft_views must be a whole number of at lea"),
                           (dict(draft_random=True), "up to draft_steps, which is 1"),
                           (dict(which_steps="0"), "which_steps means nothing to algorithm 'dr"),
                           (dict(samples_per_prompt=2), "samples_per_prompt means nothing to"),
                           (dict(algorithm="ddpo", draft_views=2), "draft_views means nothing to"),
                           (dict(algorithm="ppo"), "algorithm must be 'ddpo' or 'draft' or 'nft'")):
        with pytest.raises(ValueError, match=match): make_config("emoji", **TINY | changes)


def test_what_a_reward_returns_is_checked():
    "No gradient, alone or in a sum; a wrong shape; NaN. Another device is no fault."
    class Other(Bluish):
        def __init__(self, change): self.asked, self.change = [], change
        def differentiable(self, images, prompts):
            return self.change(super().differentiable(images, prompts))
    for change, match in ((torch.Tensor.detach, "rewards without a gradient"),
                          (torch.Tensor.sum, r"tensor of 3 rewards, not one of shape \[\]"),
                          (torch.Tensor.tolist, "tensor of 3 rewards, not a list"),
                          (lambda x: x * torch.nan, "prompt 'a fox', is nan")):
        broken = Other(change)
        for reward in (broken, WeightedSum({"a": Bluish(), "b": broken}, {"a": 1.0, "b": 1.0})):
            ours = made(twin("sd2"), reward, beta=0.1)
            if reward is not broken: reward.units.update(a=(0.0, 1.0), b=(0.0, 1.0))
            with pytest.raises(ValueError, match=match): gradient_of(ours)
    pipe = twin("sd2")
    with torch.no_grad(): pipe.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(Ruined, match="prompt 'a fox' are NaN or infinite"): gradient_of(made(pipe))


def test_what_follows_from_a_setting():
    "The size of a call is measured; units of a sum are of many images; defaults of an adapter."
    ours = made(twin("sd2"), micro_batch_size=None)
    ours.train()
    assert ours.state.micro_batch_size in (1, 3)
    two = {}
    for size in (1, 3):
        reward = WeightedSum({"a": Bluish(), "b": Bluish()}, {"a": 1.0, "b": 1.0})
        made(twin("sd2"), reward, sample_batch_size=size).take_units(0)
        two[size] = reward.units["a"]
    assert two[1] == pytest.approx(two[3], rel=1e-4) and two[1][1] < 0.5
    assert make_config("emoji", algorithm="draft").lr == 1e-4
    assert make_config("emoji", algorithm="draft", lora_rank=4).lr == 5e-4
    assert make_config("sd35", algorithm="draft").samples_per_prompt == 1
    certain = DDIMScheduler.from_config(twin("sd2").scheduler.config, set_alpha_to_one=True)
    pipe = twin("sd2")
    pipe.scheduler = certain
    with pytest.warns(UserWarning, match="has no noise"):
        with pytest.raises(ValueError, match="beta 0.1 has no effect: the last steps have no"):
            made(pipe, beta=0.1)


def test_the_steps_before_are_not_trained():
    "Without steps of its own memory: the graph holds K calls of the network."
    pipe, calls = twin("sd2"), []
    pipe.unet.register_forward_hook(
        lambda module, args, output: calls.append(output[0].requires_grad))
    gradient_of(made(pipe, draft_steps=2))
    assert calls == [False, True, True]
    assert all(p.grad is None for part in (pipe.vae, pipe.text_encoder) for p in part.parameters())


@pytest.mark.parametrize("name", ("sd2", "sd3"))
def test_all_stays_on_its_device(name):
    "Last steps, penalty, copies, views and rewards on a fake CUDA device."
    ours = made(twin(name), draft_copies=2, draft_views=2, beta=0.1, eta=0.25)
    with fake_gpu():
        ours.pipe.to("cuda")
        ours.state.reference.to("cuda")
        vars(ours.policy).pop("schedule", None)  # of the CPU
        cond = ours.policy.encode(["a fox", "an owl"]).to("cuda")
        noise = noise_sources(0, TRAINING, range(2))
        for latents, ref_kl in ours.last_latents(cond, noise, 1):
            images = decoded(ours.policy, latents)
            reward = ours.rewards(images, ["a fox", "an owl"], noise)["reward"]
            loss = (0.1 * ref_kl - reward).mean()
            assert loss.device.type == "cuda" and loss.requires_grad and reward.shape == (2,)


@pytest.mark.parametrize("name", TWINS)
def test_every_family(name):
    "With an adapter, a penalty, guidance, a sum of two rewards: finite numbers, weights that move."
    pipe = twin(name)
    reward = WeightedSum({"blue": Bluish(), "other": Bluish()}, {"blue": 1.0, "other": -0.5})
    config = make_config("emoji", **TINY | dict(
        lora_rank=small_rank(name), beta=0.1, cfg=1.0 if name == "flux-schnell" else 2.0,
        eta=0.25 if is_flow(pipe.scheduler) else 1.0, draft_steps=2, draft_views=2))
    state = TrainingState(config, pipe)
    before = [weight.detach().clone() for weight in state.weights]
    history = train(config, pipe, lambda: "a fox", reward, eval_rewards={"red": redness},
                    state=state)
    assert {"reward_blue", "reward_other", "eval_red", "ref_kl"} <= {*history[-1]}
    assert "clip_fraction" not in history[-1]
    assert all(np.isfinite([*row.values()]).all() for row in history)
    assert any((weight - old).abs().max() > 1e-4 for weight, old in zip(state.weights, before))


def test_a_run_goes_on_after_any_batch():
    "Random truncation, views, a sum: the same weights and rows to the last bit."
    kinds = (dict(draft_steps=3, draft_random=True, draft_views=2),
             dict(draft_copies=2, lora_rank=2, beta=0.1, mixed_precision="fp16"))
    for kind in kinds:
        config = make_config("emoji", **TINY | kind)
        def run(**how):
            reward = WeightedSum({"blue": Bluish(), "more": Bluish()}, {"blue": 1, "more": 0.5})
            return run_until(config, make_prompt_fn("emoji_animal_prompts"), reward, **how)
        goes_on(run, (1, 2, 3))


def test_the_plan_counts_the_last_steps():
    "K calls with a gradient, T − K without; no trajectories; more memory for more steps."
    few = dict(algorithm="draft", num_samples_per_epoch=4, batch_size=4, micro_batch_size=4)
    one, two, ddpo = (make_plan(make_config("emoji", **few | changes)) for changes in (
        {}, dict(draft_steps=2), dict(algorithm="ddpo", samples_per_prompt=1)))
    assert one.trajectories == 0 < ddpo.trajectories
    assert one.sampling == pytest.approx(ddpo.sampling * 7 / 8, rel=0.01)
    assert two.sampling == pytest.approx(ddpo.sampling * 6 / 8, rel=0.01)
    assert 1.2 * one.peaks["training"] < two.peaks["training"]
    step = ddpo.sampling / 8
    assert two.training - one.training == pytest.approx(3 * step, rel=0.05)


def test_the_command(twins, tmp_path):
    "A whole run, which goes on: card, metrics; DDPO's trainer does not take its settings."
    flags = as_flags(TINY | dict(pipeline=twins["sd2"], reward="animal", num_eval_samples=3,
                                 eval_rewards="right_animal", name="x"))
    done = ddpo_train(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    more = ddpo_train(tmp_path, "--resume=runs/x", "--num_epochs=3")
    assert more.returncode == 0, more.stderr
    card = (tmp_path / "runs" / "x" / "pipeline" / "README.md").read_text("utf-8")
    assert "Trained with DRaFT (Clark et al. 2024" in card and "- draft\n" in card
    columns, *rows = (tmp_path / "runs" / "x" / "metrics.csv").read_text("utf-8").splitlines()
    assert columns == ("epoch,reward_mean,reward_std,eval_right_animal,loss,grad_norm,lr,skipped,"
                       "seconds") and len(rows) == 3
    with pytest.raises(ValueError, match="algorithm is 'draft', and a DDPOTrainer is for 'ddpo'"):
        DDPOTrainer(make_config("emoji", **TINY), twin("sd2"), lambda: "a fox", redness)


@pytest.mark.slow
def test_the_reward_rises():
    "Of fresh images of the embedded model, after eight updates."
    config = make_config("emoji", algorithm="draft", num_epochs=2, draft_steps=2, draft_views=0,
                         lr_scheduler="constant", num_eval_samples=96)
    pipe, prompt_fn, reward = embedded(), make_prompt_fn(config.prompts), AnimalReward("cpu")
    prompts = fresh_prompts(config, prompt_fn)
    _, before = evaluate(config, pipe, prompts, reward)
    train(config, pipe, prompt_fn, reward)
    _, after = evaluate(config, pipe, prompts, reward)
    assert after.mean() > before.mean() + 0.35
