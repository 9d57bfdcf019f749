"""Tests of chapter `nbs/practice/16_trainer.ipynb`."""
import io
import itertools
import random
import sys
import threading
from contextlib import redirect_stdout
from dataclasses import fields
from unittest.mock import patch

import numpy as np
import pytest
import torch
from peft import LoraConfig

import ddpo_scratch.trainer.training as training
from ddpo_scratch.animals import AnimalReward
from ddpo_scratch.rewards import JPEGCompressibility
from ddpo_scratch.scorers.names import WeightedSum
from ddpo_scratch.trainer.loss import choose_steps
from ddpo_scratch.trainer.sampling import encode_prompts
from ddpo_scratch.trainer.training import (
    PRESETS,
    Encoded,
    TrainerConfig,
    TrainingState,
    batch_gradient,
    check_run,
    evaluate,
    fresh_prompts,
    has_a_place_of_its_own,
    make_config,
    make_prompt_fn,
    sample_and_calculate_rewards,
    train,
    verdict,
)
from helpers import TINY, flat, redness, twin


def test_presets_are_the_blogs_and_its_miniature():
    "The blog's hyperparameters, one by one, from its text."
    blog = dict(
        num_samples_per_epoch=128, num_epochs=50, num_inner_epochs=1, num_timesteps=50,
        batch_size=4, img_size=512, lr=5e-6, clip_advantages=10.0, clip_ratio=1e-4, cfg=5.0,
        eta=1.0, weight_decay=1e-4, max_grad_norm=1.0, buffer_size=32, min_count=16,
        sample_batch_size=32, pipeline="CompVis/stable-diffusion-v1-4", reward="aesthetic",
        prompts="imagenet_animal_prompts", gradient_checkpointing=True, anneal_lr=False,
        num_eval_samples=128, timestep_fraction=1.0, samples_per_prompt=1, kl_coef=0.0,
        precision="fp32", lora_rank=0, lora_alpha=None, gradient_accumulation=1, save_every=10,
        keep=2, log_with=None, use_8bit_adam=False, offload=False, eval_rewards=None,
        push_to_hub=None, scale_rewards=True, max_unet_batch=None, skip_clipped=True,
        which_steps="first", compile=False, lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
        lora_from=None)
    assert {name: getattr(PRESETS["blog"], name) for name in blog} == blog
    assert {field.name for field in fields(TrainerConfig)} - set(blog) == {"seed", "device"}
    assert PRESETS["emoji"].pipeline == "emoji"


def test_of_two_counts_one_will_do():
    "buffer_size and min_count: each follows from the other where only one is given."
    def counts(config): return config.buffer_size, config.min_count
    for make in (TrainerConfig, lambda **changes: make_config("blog", **changes)):
        assert counts(make(buffer_size=8)) == (8, 4) and counts(make(buffer_size=2)) == (2, 2)
        assert counts(make(min_count=500)) == (1000, 500)
        assert counts(make(min_count=3, buffer_size=5)) == (5, 3)
    assert counts(make_config("emoji", min_count=4)) == (16, 4)  # a whole group
    with pytest.raises(ValueError, match="min_count 6 can never be reached in a buffer of 5"):
        make_config("blog", min_count=6, buffer_size=5)


def gradient_of_seven(steps_of=None, **changes):
    "Of seven samples at three steps, with guidance and a penalty, in float64; what is measured."
    config = make_config("emoji", **TINY | dict(
        num_timesteps=3, timestep_fraction=1.0, cfg=2.0, kl_coef=0.1, clip_ratio=0.02) | changes)
    pipe = twin("sdxl").to(torch.float64)
    state = TrainingState(config, pipe)
    with torch.no_grad():
        for weight in state.weights: weight += 1e-3 * torch.randn_like(weight)
    g = torch.Generator().manual_seed(1)
    state.now.prompts = [f"animal {i}" for i in range(7)]
    state.now.advantages = torch.randn(7, generator=g)
    _, xs, log_probs = training.sd_sample(state.now.prompts, pipe, 32, 32, 2.0, 3, 1.0, "cpu", g)
    log_probs += 0.02 * torch.randn(log_probs.shape, generator=g)
    encoded = Encoded(pipe, config)
    encoded.read(state.now.prompts)
    batch = torch.randperm(7, generator=g)
    steps = choose_steps(3, config.timestep_fraction, config.which_steps, 7, g)
    steps = steps if steps_of is None else steps_of
    measured = batch_gradient(config, pipe, state, xs, log_probs, encoded, batch, steps)
    return torch.cat([weight.grad.flatten() for weight in state.weights]), measured


def test_a_batch_in_parts_has_the_same_gradient():
    "Seven samples in one part, in three (3, 2, 2) and in nine; with drawn steps, too."
    for which in (dict(), dict(which_steps="random", timestep_fraction=0.6)):
        whole, measured = gradient_of_seven(**which)
        for parts in (3, 9):
            ours, same = gradient_of_seven(gradient_accumulation=parts, **which)
            assert ours.dtype == torch.float64 and (ours - whole).norm() < 1e-10 * whole.norm()
            assert same == pytest.approx(measured, rel=1e-9)
        assert 0 < measured["clip_fraction"] < 1 and measured["ref_kl"] > 0


def test_which_steps_are_trained():
    "Steps one by one add up to all; all that can be drawn are all; one of three counts thrice."
    whole, measured = gradient_of_seven()
    one_by_one = [gradient_of_seven(which_steps=which) for which in ("0", "1", "2")]
    for gradients, loss in (
            (sum(ours for ours, _ in one_by_one), sum(found["loss"] for _, found in one_by_one)),
            *((ours, found["loss"]) for ours, found in (
                gradient_of_seven(which_steps=which) for which in ("random", "2,0,1")))):
        assert (gradients - whole).norm() < 1e-10 * whole.norm()
        assert loss == pytest.approx(measured["loss"], rel=1e-9)
    drawn, found = gradient_of_seven(
        torch.ones(1, 7, dtype=torch.long), which_steps="random", timestep_fraction=0.3)
    assert (drawn - 3 * one_by_one[1][0]).norm() < 1e-10 * drawn.norm()
    assert found["loss"] == pytest.approx(3 * one_by_one[1][1]["loss"], rel=1e-9)


def watched_training(config, prompt_fn, reward_fn):
    "Train, and note what `compute_loss` was given for each prompt, and what it returned."
    seen, real = [], training.compute_loss
    def watched(xs, log_probs, advantages, *rest):
        loss = real(xs, log_probs, advantages, *rest)
        rows = zip(xs.sum((0, 2, 3, 4)).tolist(), log_probs.sum(0).tolist(), advantages.tolist())
        seen.append((dict(zip(rest[2], rows)), loss))
        return loss
    with patch.object(training, "compute_loss", watched):
        return seen, train(config, twin("sd2"), prompt_fn, reward_fn)


def test_every_sample_is_used_once_an_inner_epoch():
    "Each with its own trajectory, log-probabilities and advantage; any batch size from 1 on."
    for size in range(1, 9):
        numbers = iter(range(100))
        changes = TINY | dict(num_epochs=1, num_inner_epochs=2, batch_size=size)
        seen, history = watched_training(
            make_config("emoji", **changes), lambda: f"animal {next(numbers)}",
            lambda images, prompts: [float(prompt[-1]) for prompt in prompts])
        half = len(seen) // 2
        first, second = ({p: row for rows, _ in part for p, row in rows.items()}
                         for part in (seen[:half], seen[half:]))
        assert sum(len(rows) for rows, _ in seen) == 14 and first == second
        assert sorted(first) == [f"animal {i}" for i in range(7)]
        assert all(len({row[k] for row in first.values()}) == 7 for k in range(3))
        mine = [first[f"animal {i}"][2] for i in range(7)]
        np.testing.assert_allclose(mine, (np.arange(7) - 3) / 2, rtol=1e-4)
        mean = np.average([loss for _, loss in seen], weights=[len(rows) for rows, _ in seen])
        assert history[0]["loss"] == pytest.approx(mean, abs=1e-9)


def test_training_repeats_and_changes_only_the_unet():
    "Same seed, same weights to the last bit; another seed differs; VAE and text encoder stay."
    def run(**changes):
        pipe, rows = twin("sd2"), []
        pipe.unet.enable_gradient_checkpointing()
        history = train(make_config("emoji", **TINY | changes), pipe,
                        make_prompt_fn("emoji_animal_prompts"), JPEGCompressibility(), rows.append)
        assert pipe.unet.is_gradient_checkpointing == changes.get("gradient_checkpointing", False)
        assert rows == history and [row["epoch"] for row in rows] == [1, 2]
        assert all(np.isfinite(list(row.values())).all() for row in rows)
        return pipe, flat(pipe), [row["reward_mean"] for row in rows]
    pipe, trained, rewards = run()
    _, again, same = run()
    assert torch.equal(trained, again) and rewards == same
    _, checkpointed, _ = run(gradient_checkpointing=True)
    torch.testing.assert_close(trained, checkpointed, rtol=0, atol=1e-5)
    assert not torch.equal(trained, run(seed=1)[1])
    fresh = twin("sd2")
    assert not torch.equal(trained, flat(fresh))
    for part in ("vae", "text_encoder"):
        pairs = zip(getattr(pipe, part).parameters(), getattr(fresh, part).parameters())
        for ours, theirs in pairs:
            assert torch.equal(ours, theirs)


def test_groups():
    "Each prompt K times in a row; advantages compare pictures of one prompt from the start."
    numbers, drawn, advantages = iter(range(100)), [], []
    update = training.PerPromptStatTracker.update
    def watched_update(self, prompts, rewards):
        advantages.append(update(self, prompts, rewards))
        return advantages[-1]
    def worth(images, prompts):
        rewards = 10 * np.array([float(p[-1]) for p in prompts]) + redness(images, prompts)
        drawn.append((prompts, torch.from_numpy(rewards)))
        return rewards
    config = make_config("emoji", **TINY | dict(
        num_epochs=1, num_samples_per_epoch=12, samples_per_prompt=4, sample_batch_size=5,
        buffer_size=8, min_count=4))
    with patch.object(training.PerPromptStatTracker, "update", watched_update):
        train(config, twin("sd2"), lambda: f"animal {next(numbers)}", worth)
    assert [len(prompts) for prompts, _ in drawn] == [4, 4, 4]
    prompts = [prompt for prompts, _ in drawn for prompt in prompts]
    assert prompts == [f"animal {i}" for i in range(3) for _ in range(4)]
    rewards = torch.cat([rewards for _, rewards in drawn]).double().numpy().reshape(3, 4)
    expected = (rewards - rewards.mean(1, keepdims=True)) / rewards.std(1, keepdims=True)
    np.testing.assert_allclose(advantages[0].reshape(3, 4), expected, atol=1e-3)
    for changes, match in ((dict(samples_per_prompt=5), "5 does not divide num_samples_per_epoch"),
                           (dict(samples_per_prompt=64), "64 does not fit into a buffer of 32")):
        with pytest.raises(ValueError, match=match): make_config("blog", **changes)


def test_metrics_of_an_epoch():
    "Ratios are 1 before the first update; a penalty keeps the policy nearer to where it began."
    def run(**changes):
        pipe = twin("sd2")
        start = flat(pipe)
        config = make_config("emoji", **TINY | dict(lr=1e-3, clip_ratio=1e-3) | changes)
        return train(config, pipe, lambda: "a fox", redness), (flat(pipe) - start).norm()
    free, _ = run()
    columns = {"epoch", "reward_mean", "reward_std", "loss", "grad_norm", "clip_fraction",
               "approx_kl", "max_log_ratio", "skipped", "seconds"}
    assert all(set(row) == columns and row["skipped"] == 0 for row in free)
    assert all(row["max_log_ratio"] < 1e-4 and row["grad_norm"] > 0 for row in free)
    assert free[1]["approx_kl"] > 0 and 0 < free[1]["clip_fraction"] < 1
    tied, _ = run(kl_coef=100.0, num_epochs=4)
    loose, _ = run(kl_coef=1e-6, num_epochs=4)
    assert tied[-1]["ref_kl"] < 0.5 * loose[-1]["ref_kl"]


def test_sample_batch_size_changes_no_result():
    "Pictures within two grey levels, the same rewards, the same training in batches of 7 and 2."
    def run(size):
        pipe = twin("sd2")
        config = make_config("emoji", **TINY | dict(sample_batch_size=size, num_eval_samples=7))
        prompt_fn = make_prompt_fn("emoji_animal_prompts")
        prompts, start = fresh_prompts(config, prompt_fn), flat(pipe)
        images, _ = evaluate(config, pipe, prompts, redness)
        few, _ = evaluate(config, pipe, prompts[:2], redness)
        assert np.abs(few.astype(int) - images[:2]).max() <= 2
        history = train(config, pipe, prompt_fn, redness)
        return images.astype(int), [row["reward_mean"] for row in history], flat(pipe) - start
    images, rewards, change = run(7)
    others, same, again = run(2)
    assert np.abs(images - others).max() <= 2 and np.abs(images[0] - images[1]).max() > 50
    np.testing.assert_allclose(rewards, same, atol=1e-4)
    assert (change - again).norm() < 0.05 * change.norm()


def test_a_sum_takes_its_units_from_all_evaluation_pictures():
    "In batches of any size, once: later pictures are measured in the same units."
    pipe = twin("sd2")
    config = make_config("emoji", **TINY | dict(sample_batch_size=3, num_eval_samples=7))
    prompts = fresh_prompts(config, make_prompt_fn("emoji_animal_prompts"))
    parts = {"size": JPEGCompressibility(), "red": redness}
    size, red = (evaluate(config, pipe, prompts, part)[1].numpy() for part in parts.values())
    both = WeightedSum(parts, {"size": 1.0, "red": -2.0})
    expected = (size - size.mean()) / size.std() - 2 * (red - red.mean()) / red.std()
    np.testing.assert_allclose(evaluate(config, pipe, prompts, both)[1], expected, rtol=1e-6)
    few = evaluate(config, pipe, prompts[:2], both)[1]
    np.testing.assert_allclose(few, expected[:2], atol=0.5)  # grey levels differ by rounding
    assert len(both.units) == 2 and both.units["size"][0] == pytest.approx(size.mean())


def test_prompts_are_the_runs_own():
    "A reward that draws random numbers, or a generator that is set anew, changes no prompt."
    def prompts_of(reward_fn):
        asked = []
        def seen(images, prompts):
            asked.extend(prompts)
            return reward_fn(images, prompts)
        train(make_config("emoji", **TINY), twin("sd2"), prompt_fn, seen)
        return asked
    def prompt_fn(): return f"{random.random()} {np.random.random()} {torch.rand(1).item()}"
    def restless(images, prompts):
        for seed in (random.seed, np.random.seed, torch.manual_seed): seed(5)
        return redness(images, prompts)
    plain = prompts_of(redness)
    assert prompts_of(restless) == plain and len(set(plain)) == 14
    for seed in (random.seed, np.random.seed, torch.manual_seed): seed(7)
    expected = random.random(), np.random.random(), torch.rand(1).item()
    for seed in (random.seed, np.random.seed, torch.manual_seed): seed(7)
    first = fresh_prompts(make_config("emoji"), prompt_fn)
    assert (random.random(), np.random.random(), torch.rand(1).item()) == expected
    assert fresh_prompts(make_config("emoji"), prompt_fn) == first


def test_the_reference_has_no_dropout():
    "That of an adapter which somebody loaded, in a UNet that is in train mode: no divergence."
    pipe = twin("sd2")
    pipe.unet.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(
        r=4, lora_dropout=0.5, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    pipe.unet.train()
    config = make_config("emoji", **TINY | dict(num_epochs=1, batch_size=7), kl_coef=0.1)
    state = TrainingState(config, pipe)
    assert not any(module.training for module in state.reference.modules())
    row, = train(config, pipe, lambda: "a fox", redness, state=state)
    assert row["ref_kl"] == 0


def test_learning_rate_falls_in_a_straight_line():
    "Four epochs of one update each; without annealing the rate stays."
    real, seen = torch.optim.AdamW.step, []
    def watched(self, *rest):
        seen.append(self.param_groups[0]["lr"])
        return real(self, *rest)
    with patch.object(torch.optim.AdamW, "step", watched):
        for anneal_lr in (True, False):
            config = make_config("emoji", **TINY | dict(num_epochs=4, batch_size=7), lr=8e-4,
                                 anneal_lr=anneal_lr)
            train(config, twin("sd2"), lambda: "a fox", redness)
    np.testing.assert_allclose(seen, [8e-4, 6e-4, 4e-4, 2e-4] + [8e-4] * 4)


def test_verdict():
    "The arithmetic, and a model whose pictures are all worth the same."
    rise = verdict(torch.tensor([-1.0, 1.0]), torch.tensor([2.0, 4.0]))
    assert "(+3.0 standard deviations)" in rise
    assert "no spread before" in verdict(torch.zeros(2), torch.ones(2))


# Numbers that are none: they must stop the run before they reach the weights, a reward or a file.
def test_a_broken_model_gets_no_reward():
    "One NaN weight: an error with prompt and step, not black pictures that make small files."
    pipe = twin("sd2")
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="prompt 'a fox', are NaN or infinite from step 1 of 3"):
        sample_and_calculate_rewards(["a fox"], pipe, 64, 1.0, 3, training.decoding_fn,
                                     JPEGCompressibility(), "cpu")
    with pytest.raises(ValueError, match="from step 1 of 3"):
        train(make_config("emoji", **TINY), pipe, lambda: "a fox", JPEGCompressibility())


def test_training_stops_before_the_weights_are_ruined():
    "A loss that overflows, a gradient that is NaN, half precision: the weights stay as they were."
    config = make_config("emoji", **TINY)
    pipe, real = twin("sd2"), training.compute_loss
    before = flat(pipe)
    def overflows(*arguments): return real(*arguments) + float("inf")
    def ruins_gradient(*arguments):
        loss = real(*arguments)
        pipe.unet.conv_in.weight.grad[0, 0, 0, 0] = torch.nan
        return loss
    for broken, match in ((overflows, "epoch 1: none of its 2 updates was finite.*loss inf"),
                          (ruins_gradient, "norm of the gradient nan.*learning rate")):
        with patch.object(training, "compute_loss", broken):
            with pytest.raises(ValueError, match=match):
                train(config, pipe, lambda: "a fox", redness)
    assert torch.equal(flat(pipe), before)
    with pytest.raises(ValueError, match="NaN|nan|inf"):
        train(make_config("emoji", **TINY, lr=1e6), pipe, lambda: "a fox", redness)
    assert flat(pipe).isfinite().all()
    with pytest.raises(ValueError, match=r"unet is in float16.*pipe.unet.float\(\)"):
        train(config, twin("sd2").to(torch.float16), lambda: "a fox", redness)


class Terminal(io.StringIO):
    "A file that says it is a terminal."
    def isatty(self): return True


def test_bars_for_whoever_watches():
    "To a file: a line an epoch and nothing else. To a terminal: bars as well."
    def output(file):
        with patch.object(training, "IN_NOTEBOOK", False), redirect_stdout(file):
            train(make_config("emoji", **TINY), twin("sd2"), lambda: "a fox",
                  redness)
        return file.getvalue()
    lines = output(io.StringIO())
    assert [line[:11] for line in lines.splitlines()] == ["epoch   1  ", "epoch   2  "]
    assert not set(lines) & set("\r%█|")
    if "ipykernel" not in sys.modules:
        assert set("\r%█|") <= set(output(Terminal()))


BAD = (("num_epochs", 0), ("batch_size", -1), ("num_timesteps", 2.5), ("img_size", 0), ("lr", 0),
       ("img_size", 100), ("lr", -1e-3), ("lr", float("nan")), ("eta", 0), ("clip_ratio", 0),
       ("cfg", -1), ("kl_coef", -1), ("weight_decay", -1), ("samples_per_prompt", 0),
       ("seed", -1), ("seed", 2**31), ("num_eval_samples", 0),
       ("batch_size", True), ("timestep_fraction", 0), ("timestep_fraction", 1.1), ("lr", True),
       ("buffer_size", 0), ("min_count", 0), ("buffer_size", "8"), ("buffer_size", 1),
       ("min_count", 1), ("lr", 1e38), ("gradient_accumulation", 0), ("log_with", "wandbb"),
       ("save_every", 0), ("keep", 0), ("which_steps", "last"), ("which_steps", ""),
       ("which_steps", 1.5), ("which_steps", "0,0"), ("which_steps", "0,8"), ("which_steps", True),
       ("which_steps", "٣"), ("which_steps", []), ("which_steps", "0 3"),
       ("which_steps", "0,3"),  # timestep_fraction is 0.75
       ("weight_decay", float("inf")))


def test_bad_configurations():
    "Refused when written down, by name."
    for name, value in BAD:
        with pytest.raises(ValueError, match=name):
            make_config("emoji", **{name: value})
    with pytest.raises(ValueError, match="'blogg'. Known: blog, emoji, flux, sd35, sdxl"):
        make_config("blogg")
    for given in ("0,3", " 0, 3", [0, 3], (0, 3), np.array([0, 3]).tolist()):
        assert make_config("emoji", which_steps=given, timestep_fraction=1).which_steps == "0,3"
    assert make_config("emoji", which_steps=np.int64(3), timestep_fraction=1).which_steps == "3"
    with pytest.raises(ValueError, match="'cats'. Known: common_animal_prompts, emoji_an"):
        make_prompt_fn("cats")
    with pytest.raises(TypeError, match="reward is a name"):
        make_config("emoji", reward=redness)
    with pytest.raises(TypeError, match="anneal_lr is True or False"):
        make_config("emoji", anneal_lr=1)
    with pytest.raises(TypeError, match="not a str"):
        train(make_config("emoji"), "emoji", lambda: "a fox", redness)
    pipe = twin("sd2")
    levels = pipe.scheduler
    pipe.scheduler = type(levels).from_config(levels.config, set_alpha_to_one=True)
    def named(steps): return make_config("emoji", which_steps=steps, timestep_fraction=1)
    with pytest.warns(UserWarning, match="no noise"), pytest.raises(
            ValueError, match="'7'.*none of these has noise"):
        check_run(named("7"), pipe)
    check_run(named("6,7"), pipe)
    pipe.scheduler = levels
    pipe.vae_scale_factor = 16
    with pytest.raises(ValueError, match="img_size must be a positive multiple of 16"):
        train(make_config("emoji", img_size=72), pipe, lambda: "a fox", redness)


def test_bad_rewards_end_the_run_before_any_weight_has_changed():
    "What comes in the second of the batches of 3, 2 and 2; a wrong signature before the first."
    pipe = twin("sd2")
    before, config = flat(pipe), make_config("emoji", **TINY)
    def second(bad): return lambda images, prompts: [1.0] * 3 if len(prompts) == 3 else bad
    def theirs(images, prompts, metadata): return [1.0] * 3, {}
    for reward_fn, error, match in (
            (second([0.0]), ValueError, r"shape \[2\]"), (second(None), ValueError, "2 numbers"),
            (second([0.0, float("nan")]), ValueError, "image 1, prompt 'a fox'"),
            (theirs, TypeError, r"reward_fn\(images, prompts\).*\(images, prompts, metadata\)")):
        with pytest.raises(error, match=match):
            train(config, pipe, lambda: "a fox", reward_fn)
    with pytest.raises(ValueError, match="not the int 1"):
        train(config, pipe, lambda: 1, redness)
    assert torch.equal(before, flat(pipe))


def test_a_prompt_is_read_once_in_a_run():
    "Whatever the pictures of it and the passes over them; and read as it would be in a batch."
    pipe, read = twin("sd2"), []
    pipe.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(len((args or [kwargs["input_ids"]])[0])),
        with_kwargs=True)
    config = make_config("emoji", **TINY | dict(
        num_samples_per_epoch=8, samples_per_prompt=2, num_inner_epochs=2, cfg=3.0, num_epochs=2,
        sample_batch_size=3, gradient_accumulation=2))
    prompts = iter(["a fox", "an owl", "a cat", "a fox", "a whale", "an owl", "a fox", "an owl"])
    first, _ = train(config, pipe, lambda: next(prompts), redness)
    assert read == [1] * 5  # four different ones, and once the empty one
    assert first["max_log_ratio"] < 1e-5
    batch = ["an owl", "a cat", "a fox", "an owl", "a cat"]
    encoded = Encoded(pipe, config)
    for some in (batch[:1], batch): encoded.read(some)
    for picked in (batch, ["a cat"]):
        ours = encoded(picked, torch.device("cpu"))
        theirs = encode_prompts(picked, pipe, 3.0, "cpu")
        assert ours.guided and theirs.guided
        torch.testing.assert_close(ours.rows, theirs.rows)
    encoded.most = 10
    encoded.read(["a cat", "a whale"])
    assert set(encoded.words) == {"a cat", "a whale"}


def test_a_reward_is_asked_while_the_next_batch_is_drawn():
    "Each answer waits for the next batch to begin; one at a time, in order; the same numbers."
    begun, asked, threads = [0, threading.Condition()], [], set()
    changes = dict(TINY, num_samples_per_epoch=12, sample_batch_size=4, num_epochs=1)
    def patient(images, prompts):
        threads.add(threading.current_thread())
        with begun[1]:
            wanted = min(len(asked) + 2, 3)  # of three batches, none begins after the last
            assert begun[1].wait_for(lambda: begun[0] >= wanted, timeout=20), "nothing was drawn"
        asked.append(len(prompts))
        return redness(images, prompts)
    def run(reward_fn, beside=True):
        pipe, begun[0] = twin("sd2"), 0
        calls = itertools.count()
        def note(*arguments):
            if next(calls) % changes["num_timesteps"]: return  # a batch begins with its first step
            with begun[1]:
                begun[0] += 1
                begun[1].notify_all()
        pipe.unet.register_forward_pre_hook(note)
        place = "ddpo_scratch.trainer.training.has_a_place_of_its_own"
        with patch(place, lambda *arguments: beside):
            row, = train(make_config("emoji", **changes), pipe, make_prompt_fn(
                "emoji_animal_prompts"), reward_fn)
        return {**row, "seconds": 0}, flat(pipe)
    (row, ours), (expected, theirs) = run(patient), run(redness, beside=False)
    assert row == expected and torch.equal(ours, theirs)
    assert asked == [4, 4, 4] and threading.main_thread() not in threads and len(threads) == 1


def test_where_rewards_are_computed():
    "Beside: whoever says so, and scorers on another device; all others at once; sums as a whole."
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    def wraps_a_network(images, prompts): return redness(images, prompts)
    def patient(images, prompts): return redness(images, prompts)
    patient.beside = True
    def weighted(*parts): return WeightedSum(dict(zip("ab", parts)), dict.fromkeys("ab", 1.0))
    def on(place):
        reward_fn = AnimalReward("cpu")
        reward_fn.device = torch.device(place)
        return reward_fn
    for reward_fn, on_cpu, on_gpu in (
            (wraps_a_network, False, False), (patient, True, True),
            (JPEGCompressibility(), True, True), (AnimalReward("cpu"), False, True),
            (weighted(patient, AnimalReward("cpu")), False, True),
            (weighted(patient, wraps_a_network), False, False),
            (on("cuda"), True, False), (on("cuda:1"), True, True)):
        assert has_a_place_of_its_own(reward_fn, cpu) == on_cpu
        assert has_a_place_of_its_own(reward_fn, gpu) == on_gpu


def test_trouble_beside():
    "An error keeps its own traceback and ends the run; a stop waits for the answer under way."
    config = make_config("emoji", **dict(TINY, num_samples_per_epoch=8, sample_batch_size=2))
    calls = []
    def leaking(images, prompts):
        calls.append(1)
        if len(calls) == 3: raise RuntimeError("the ink has run out")
        return redness(images, prompts)
    leaking.beside = True
    pipe = twin("sd2")
    before = flat(pipe)
    with pytest.raises(RuntimeError, match="the ink has run out") as left:
        train(config, pipe, make_prompt_fn("emoji_animal_prompts"), leaking)
    assert "leaking" in [frame.name for frame in left.traceback] and len(calls) == 3
    assert torch.equal(flat(pipe), before)
    state, batches = TrainingState(config, pipe), []
    def stop():
        batches.append(1)
        if len(batches) == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        train(config, pipe, make_prompt_fn("emoji_animal_prompts"), redness, on_batch=stop,
              state=state)
    assert [len(sample[0]["reward"]) for sample in state.now.samples] == [2, 2]


def test_what_is_watched_is_told_and_not_followed():
    "Parts of a sum and eval_rewards in every row, by hand from the pictures; the same weights."
    prompt_fn, seen = make_prompt_fn("emoji_animal_prompts"), []
    def blueness(images, prompts):
        seen.append(images.copy())
        return images[..., 2].mean((1, 2))
    def run(eval_rewards):
        pipe = twin("sd2")
        both = WeightedSum({"red": redness, "small": JPEGCompressibility()},
                           {"red": 2.0, "small": 1.0})
        config = make_config("emoji", **dict(TINY, num_epochs=1, sample_batch_size=3))
        row, = train(config, pipe, prompt_fn, both, eval_rewards=eval_rewards)
        return row, flat(pipe), config.num_samples_per_epoch
    (row, ours, count), (plain, theirs, _) = run({"blueness": blueness}), run({})
    assert torch.equal(ours, theirs) and plain.keys() == row.keys() - {"eval_blueness"}
    images = np.concatenate(seen)
    assert len(images) == count
    assert row["eval_blueness"] == pytest.approx(images[..., 2].mean())
    red, small = redness(images, None), JPEGCompressibility()(images, [""] * count).numpy()
    assert row["reward_red"] == pytest.approx(red.mean())
    assert row["reward_small"] == pytest.approx(small.mean())
    assert row["reward_mean"] == pytest.approx(0, abs=1e-6)  # from the means of its parts on
    total = 2 * (red - red.mean()) / red.std() + (small - small.mean()) / small.std()
    assert row["reward_std"] == pytest.approx(total.std(), rel=1e-5)
