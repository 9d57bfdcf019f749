"""Tests of chapter `nbs/tutorial/10_training.ipynb`."""
import random

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler

from ddpo_scratch.config import DDPOConfig
from ddpo_scratch.rewards import JPEGCompressibility
from ddpo_scratch.trainer.ddpo import DDPOTrainer
from ddpo_scratch.trainer.presets import make_config
from ddpo_scratch.training import (
    EVALUATION,
    TRAINING,
    equal_batches,
    evaluate,
    noise_sources,
    sample_and_calculate_rewards,
    train,
)
from helpers import flat, redness, twin

TINY = dict(num_samples_per_epoch=7, num_epochs=2, num_timesteps=3, batch_size=4,
            sample_batch_size=3, img_size=32, lr=1e-3, clip_ratio=1e-2)
ANIMALS = ["a fox", "an owl", "a cat", "a bee"]


def draw():
    return random.choice(ANIMALS)


def quiet(row):
    "In place of a printed line."


def test_defaults_are_the_blogs():
    "One by one, from its text."
    assert DDPOConfig() == DDPOConfig(
        num_samples_per_epoch=128, num_epochs=50, num_inner_epochs=1, num_timesteps=50,
        batch_size=4, sample_batch_size=32, img_size=512, lr=5e-6, weight_decay=1e-4,
        max_grad_norm=1.0, clip_advantages=10.0, clip_ratio=1e-4, cfg=5.0, eta=1.0, buffer_size=32,
        min_count=16)


@pytest.mark.parametrize("changes", (
    dict(cfg=1.0), dict(cfg=3.0, num_inner_epochs=2), dict(cfg=1.0, batch_size=5, eta=0.5)))
def test_the_trainer_leaves_the_same_weights(changes):
    "Two epochs: guided and not, uneven batches, two inner epochs; prompts, rewards, weights."
    tutorial, trainer = twin("sd2"), twin("sd2")
    for pipe in (tutorial, trainer):
        for part in (pipe.unet, pipe.vae, pipe.text_encoder): part.double()
    start, settings = flat(tutorial).clone(), TINY | changes
    rows = train(DDPOConfig(**settings, min_count=2), tutorial, draw, redness, quiet)
    config = make_config("blog", **settings, min_count=2, buffer_size=32, micro_batch_size=5,
                         gradient_checkpointing=False)
    theirs = DDPOTrainer(config, trainer, draw, redness).train()
    for ours, other in zip(rows, theirs):
        for name in ("reward_mean", "reward_std", "loss", "grad_norm"):
            assert ours[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6)
    assert (flat(tutorial) - start).abs().max() > 1e-3
    torch.testing.assert_close(flat(tutorial), flat(trainer), rtol=0, atol=1e-5)


def test_training_repeats_and_changes_only_the_unet():
    "Same seed, same weights to the last bit; another seed differs; VAE and text encoder stay."
    def run(**changes):
        pipe = twin("sd2")
        rows = []
        history = train(DDPOConfig(**TINY | dict(cfg=1.0) | changes), pipe, draw,
                        JPEGCompressibility(), rows.append)
        assert rows == history and [row["epoch"] for row in rows] == [1, 2]
        assert all(np.isfinite(list(row.values())).all() for row in rows)
        return pipe, flat(pipe)
    pipe, trained = run()
    assert torch.equal(trained, run()[1])
    assert not torch.equal(trained, run(seed=1)[1])
    fresh = twin("sd2")
    change, others = trained - flat(fresh), run(sample_batch_size=7)[1] - flat(fresh)
    assert change.norm() > 0 and (change - others).norm() < 0.05 * change.norm()
    for part in ("vae", "text_encoder"):
        pairs = zip(getattr(pipe, part).parameters(), getattr(fresh, part).parameters())
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_evaluation_has_noise_of_its_own():
    "The same images each time, in any batches, and none that training sees."
    pipe, seen = twin("sd2"), []
    def noted(images, prompts):
        seen.extend(images.copy())
        return np.zeros(len(images))
    config = DDPOConfig(**TINY | dict(cfg=1.0, num_epochs=1, lr=1e-12))
    images, rewards = evaluate(config, pipe, ANIMALS, redness)
    assert images.shape == (4, 32, 32, 3) and images.dtype == np.uint8
    np.testing.assert_allclose(rewards, redness(images, ANIMALS))
    one_by_one = DDPOConfig(**TINY | dict(cfg=1.0, sample_batch_size=1))
    again, _ = evaluate(one_by_one, pipe, ANIMALS, redness)
    assert abs(images.astype(int) - again).max() <= 1
    train(config, pipe, lambda: ANIMALS[0], noted, quiet)
    assert len(seen) == 7 and min(abs(images[0].astype(int) - x).mean() for x in seen) > 1


def test_what_a_reward_returns_is_not_believed():
    "A wrong shape, NaN, a wrong signature: an error before any weight has changed."
    pipe = twin("sd2")
    before, config = flat(pipe), DDPOConfig(**TINY)
    def theirs(images, prompts, metadata): return [1.0] * 3, {}
    def harmful(images, prompts):  # may write into its images
        images[:] = 0
        return np.zeros(len(images))
    for reward_fn, error, match in (
            (lambda images, prompts: [0.0], ValueError, r"shape \[3\]"),
            (lambda images, prompts: None, ValueError, "3 numbers"),
            (lambda images, prompts: [0.0, np.nan, 1.0], ValueError, "image 1, prompt 'a fox'"),
            (theirs, TypeError, r"reward_fn\(images, prompts\).*\(images, prompts, metadata\)")):
        with pytest.raises(error, match=match):
            train(config, pipe, lambda: "a fox", reward_fn, quiet)
    with pytest.raises(ValueError, match="not the int 1"):
        train(config, pipe, lambda: 1, redness, quiet)
    assert torch.equal(before, flat(pipe))
    imgs, *_ = sample_and_calculate_rewards(
        ["a fox"], pipe, 32, 1.0, 2, lambda latents, pipe: np.full((1, 32, 32, 3), 7, np.uint8),
        harmful, "cpu")
    assert (imgs == 7).all()


def test_ruined_weights_end_training():
    "NaN in the weights, or a learning rate that makes it: an error, not a curve of NaN."
    pipe = twin("sd2")
    with torch.no_grad(): next(pipe.unet.parameters())[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        train(DDPOConfig(**TINY), pipe, draw, redness, quiet)
    with pytest.raises((ValueError, RuntimeError), match="non-finite|NaN or infinite"):
        train(DDPOConfig(**TINY | dict(lr=1e8, clip_ratio=1e8)), twin("sd2"), draw, redness, quiet)


def test_batches_are_equal():
    "Every sample once, sizes that differ by one at most, none above the limit, as few as possible."
    g = torch.Generator().manual_seed(0)
    for count in range(1, 20):
        for limit in range(1, 22):
            batches = equal_batches(count, limit, g)
            sizes = [len(batch) for batch in batches]
            assert sorted(torch.cat(batches).tolist()) == list(range(count))
            assert 1 <= min(sizes) and max(sizes) <= min(limit, min(sizes) + 1)
            assert len(sizes) == (count + limit - 1) // limit
    assert [len(batch) for batch in equal_batches(17, 16, g)] == [9, 8]
    orders = {tuple(torch.cat(equal_batches(9, 4, g)).tolist()) for _ in range(9)}
    assert len(orders) == 9


def test_every_sample_has_noise_of_its_own():
    "Of 20,000 samples, of training and evaluation, of neighbouring seeds, no two begin alike."
    first = [torch.randn(2, generator=source)
             for seed in (0, 1) for kind in (TRAINING, EVALUATION)
             for source in noise_sources(seed, kind, range(5000))]
    assert len({tuple(x.tolist()) for x in first}) == 20_000
    x = torch.stack(first)
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02
    assert abs(np.corrcoef(x.T)[0, 1]) < 0.03
    assert abs(np.corrcoef(x[:-1, 0], x[1:, 0])[0, 1]) < 0.03  # seeds that are neighbours


@pytest.mark.parametrize("seed", (0, 1, 2**31 - 1))
def test_no_two_of_100000_samples_share_their_noise(seed):
    "By the birthday bound, hashes of 32 bits would: 1.2 pairs of them, on average."
    seeds = {source.initial_seed() for kind in (TRAINING, EVALUATION)
             for source in noise_sources(seed, kind, range(100_000))}
    assert len(seeds) == 200_000 and max(seeds) < 2**32 and min(seeds) >= 0


@pytest.mark.parametrize("name, value", (
    ("num_epochs", 0), ("num_samples_per_epoch", 2.5), ("batch_size", True), ("lr", 0),
    ("lr", float("nan")), ("clip_ratio", -1e-4), ("cfg", -1), ("cfg", "5"), ("eta", 0),
    ("min_count", 1), ("min_count", 33), ("img_size", 60), ("seed", -1), ("seed", 2**31)))
def test_bad_hyperparameters(name, value):
    "Refused when they are written down, by name."
    with pytest.raises(ValueError, match=name):
        DDPOConfig(**{name: value})


def test_other_pipelines_are_refused():
    "Before anything is sampled."
    for pipe, error, match in (("emoji", TypeError, "not a str"),
                               (twin("flux-dev"), TypeError, "not a FluxPipeline. DDPOTrainer")):
        with pytest.raises(error, match=match): train(DDPOConfig(**TINY), pipe, draw, redness)
    other = twin("sd2")
    other.scheduler = PNDMScheduler.from_config(other.scheduler.config)
    with pytest.raises(TypeError, match="PNDMScheduler.*ddim_scheduler"):
        train(DDPOConfig(**TINY), other, draw, redness)
