"""Tests of chapter `nbs/practice/18_trainer.ipynb`."""
import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from peft import LoraConfig

import ddpo_scratch.trainer.ddpo as ddpo
import ddpo_scratch.trainer.trainer as trainer
from ddpo_scratch.rewards import JPEGCompressibility
from ddpo_scratch.scorers.names import WeightedSum
from ddpo_scratch.trainer.ddpo import DDPOTrainer
from ddpo_scratch.trainer.evaluation import evaluate, fresh_prompts
from ddpo_scratch.trainer.presets import make_config, make_prompt_fn
from ddpo_scratch.trainer.rollout import PromptCache
from ddpo_scratch.trainer.trainer import TrainingState
from helpers import TINY, flat, redness, train, twin


def gradient_of_seven(**changes):
    "Of seven samples at three steps, with guidance and a penalty, in float64; what is measured."
    config = make_config("emoji", **TINY | dict(
        num_timesteps=3, timestep_fraction=1.0, cfg=2.0, beta=0.1, clip_ratio=0.02) | changes)
    pipe = twin("sdxl").to(torch.float64)
    ours = DDPOTrainer(config, pipe, lambda: "a fox", redness)
    with torch.no_grad():
        for weight in ours.state.weights: weight += 1e-3 * torch.randn_like(weight)
    g, rollout = torch.Generator().manual_seed(1), ours.state.rollout
    rollout.prompts = [f"animal {i}" for i in range(7)]
    rollout.advantages = torch.randn(7, generator=g)
    ours.cache.read(rollout.prompts)
    latents, log_probs = ours.policy.sample(ours.cache(rollout.prompts), g)
    log_probs += 0.02 * torch.randn(log_probs.shape, generator=g)
    measured = ours.batch_gradient([latents, log_probs], torch.randperm(7, generator=g))
    return torch.cat([weight.grad.flatten() for weight in ours.state.weights]), measured


def test_calls_of_any_size_have_the_same_gradient():
    "Of seven samples and three steps: 7, 3, 1 and all 21 pairs in a call."
    whole, measured = gradient_of_seven()
    for size in (3, 1, 21):
        ours, same = gradient_of_seven(micro_batch_size=size)
        assert ours.dtype == torch.float64 and (ours - whole).norm() < 1e-10 * whole.norm()
        assert same == pytest.approx(measured, rel=1e-9)
    assert 0 < measured["clip_fraction"] < 1 and measured["ref_kl"] > 0


def test_which_steps_are_trained():
    "Steps one by one add up to all, in any order; a fraction is the first."
    whole, measured = gradient_of_seven()
    one_by_one = [gradient_of_seven(which_steps=which) for which in ("0", "1", "2")]
    for gradients, loss in (
            (sum(ours for ours, _ in one_by_one), sum(found["loss"] for _, found in one_by_one)),
            (lambda found: (found[0], found[1]["loss"]))(gradient_of_seven(which_steps="2,0,1"))):
        assert (gradients - whole).norm() < 1e-10 * whole.norm()
        assert loss == pytest.approx(measured["loss"], rel=1e-9)
    first, _ = gradient_of_seven(timestep_fraction=0.3)
    assert (first - one_by_one[0][0]).norm() < 1e-10 * first.norm()
    assert make_config("emoji").trained_steps == [0, 1, 2, 3, 4, 5]
    assert make_config("emoji", timestep_fraction=0.01).trained_steps == [0]


def watched_training(config, prompt_fn, reward_fn):
    "Train, and note what was trained of each prompt, and the loss."
    seen, real, asked = [], ddpo.add_gradient, []
    def noted(cache, prompts):
        asked.append(prompts)
        return PromptCache.__call__(cache, prompts)
    def watched(policy, samples, *rest):
        found = real(policy, samples, *rest)
        rows = zip(samples.latents.sum((0, 2, 3, 4)).tolist(), samples.log_probs.sum(0).tolist(),
                   samples.advantages.tolist())
        seen.append((dict(zip(asked[-1], rows)), found["loss"]))
        return found
    class Noting(PromptCache):
        __call__ = noted
    with patch.object(ddpo, "add_gradient", watched), patch.object(trainer, "PromptCache", Noting):
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
    update = trainer.PerPromptStatTracker.update
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
    with patch.object(trainer.PerPromptStatTracker, "update", watched_update):
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
               "approx_kl", "max_log_ratio", "lr", "skipped", "seconds"}
    assert all(set(row) == columns and row["skipped"] == 0 for row in free)
    assert all(row["max_log_ratio"] < 1e-4 and row["grad_norm"] > 0 for row in free)
    assert free[1]["approx_kl"] > 0 and 0 < free[1]["clip_fraction"] < 1
    tied, _ = run(beta=100.0, num_epochs=4)
    loose, _ = run(beta=1e-6, num_epochs=4)
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


def test_the_reference_has_no_dropout():
    "That of an adapter which somebody loaded, in a UNet that is in train mode: no divergence."
    pipe = twin("sd2")
    pipe.unet.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(
        r=4, lora_dropout=0.5, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    pipe.unet.train()
    config = make_config("emoji", **TINY | dict(num_epochs=1, batch_size=7), beta=0.1)
    state = TrainingState(config, pipe)
    assert not any(module.training for module in state.reference.modules())
    row, = train(config, pipe, lambda: "a fox", redness, state=state)
    assert row["ref_kl"] == 0


def test_learning_rate_follows_the_schedule():
    "Four epochs of one update each: by the formulas of the schedules, also in the metrics."
    real, seen = torch.optim.AdamW.step, []
    def watched(self, *rest):
        seen.append(self.param_groups[0]["lr"])
        return real(self, *rest)
    with patch.object(torch.optim.AdamW, "step", watched):
        told = []
        for name, warm_up in (("linear", 0), ("constant", 0), ("cosine", 2),
                              ("constant_with_warmup", 2)):
            config = make_config("emoji", **TINY | dict(num_epochs=4, batch_size=7), lr=8e-4,
                                 lr_scheduler=name, lr_warmup_steps=warm_up)
            told += [row["lr"] for row in train(config, twin("sd2"), lambda: "a fox", redness)]
    expected = [8e-4, 6e-4, 4e-4, 2e-4] + [8e-4] * 4 + [0, 4e-4, 8e-4, 4e-4] + [0, 4e-4, 8e-4, 8e-4]
    np.testing.assert_allclose(seen, expected)
    np.testing.assert_allclose(told, expected)


# Numbers that are none: they must stop the run before they reach the weights, a reward or a file.
def test_a_broken_model_gets_no_reward():
    "One NaN weight: an error with prompt and step, not black pictures that make small files."
    pipe = twin("sd2")
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="prompt 'a fox', are NaN or infinite from step 1 of 3"):
        train(make_config("emoji", **TINY), pipe, lambda: "a fox", JPEGCompressibility())


def test_training_stops_before_the_weights_are_ruined():
    "A loss that overflows, a gradient that is NaN, half precision: the weights stay as they were."
    config = make_config("emoji", **TINY)
    pipe, real = twin("sd2"), ddpo.add_gradient
    before = flat(pipe)
    def overflows(*arguments): return real(*arguments) | {"loss": float("inf")}
    def ruins_gradient(*arguments):
        found = real(*arguments)
        pipe.unet.conv_in.weight.grad[0, 0, 0, 0] = torch.nan
        return found
    for broken, match in ((overflows, "epoch 1: none of its 2 updates was finite.*loss inf"),
                          (ruins_gradient, "norm of the gradient nan.*learning rate")):
        with patch.object(ddpo, "add_gradient", broken):
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
    "To a file: a line an epoch and nothing else. To a terminal: bars as well, on stderr."
    def output(errors):
        with redirect_stdout(io.StringIO()) as lines, redirect_stderr(errors):
            train(make_config("emoji", **TINY), twin("sd2"), lambda: "a fox", redness)
        return lines.getvalue(), errors.getvalue()
    lines, errors = output(io.StringIO())
    assert [line[:11] for line in lines.splitlines()] == ["epoch   1  ", "epoch   2  "]
    assert not errors and not set(lines) & set("\r%█|")
    if "ipykernel" not in sys.modules: assert set("\r%|") <= set(output(Terminal())[1])


def test_bad_rewards_end_the_run_before_any_weight_has_changed():
    "What comes in the second of the batches of 3, 2 and 2; a wrong signature before the first."
    pipe = twin("sd2")
    before, config = flat(pipe), make_config("emoji", **TINY)
    def second(bad): return lambda images, prompts: [1.0] * 3 if len(prompts) == 3 else bad
    def theirs(images, prompts, metadata): return [1.0] * 3, {}
    for reward_fn, error, match in (
            (second([0.0]), ValueError, r"shape \[2\]"), (second(None), ValueError, "2 numbers"),
            (second([0.0, float("nan")]), ValueError, "image 1, prompt 'a fox'"),
            (theirs, ValueError, "theirs has three arguments, and so wants facts about"),
            (lambda images: [1.0], TypeError, r"reward_fn\(images, prompts\).*\(images\)")):
        with pytest.raises(error, match=match):
            train(config, pipe, lambda: "a fox", reward_fn)
    with pytest.raises(ValueError, match="not the int 1"):
        train(config, pipe, lambda: 1, redness)
    assert torch.equal(before, flat(pipe))


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


def test_arguments_of_another_kind():
    "A model's name in place of the configuration; a list of rewards in place of a dict."
    pipe, config = twin("sd2"), make_config("emoji", **TINY)
    with pytest.raises(TypeError, match="config is a TrainerConfig.*not a str"):
        DDPOTrainer("sdxl", pipe, lambda: "a fox", redness)
    with pytest.raises(TypeError, match="eval_rewards is a dict .*not a list"):
        DDPOTrainer(config, pipe, lambda: "a fox", redness, [redness])


def test_decoupled_rewards():
    "GDPO's equations 4 to 6, in NumPy, for the groups of an epoch; and what is trained on it."
    def small(images, prompts): return redness(images, prompts) / 1000
    def large(images, prompts): return 1000.0 * images[..., 1].mean((1, 2))
    reward_fn = WeightedSum({"small": small, "large": large}, {"small": 2.0, "large": -1.0})
    config = make_config("emoji", **TINY | dict(num_samples_per_epoch=8, samples_per_prompt=4,
                                                num_epochs=1), decouple_rewards=True,
                         min_count=4, buffer_size=4)
    names, kept = iter(["a fox", "an owl"]), []
    class Watched(DDPOTrainer):
        def weigh(self, scores):
            super().weigh(scores)
            kept.append(({**scores}, self.state.rollout.advantages))
    Watched(config, twin("sd2"), lambda: next(names), reward_fn).train()
    (scores, advantages), = kept
    total = np.zeros(8)
    for name, weight in (("small", 2), ("large", -1)):
        groups = scores[f"reward_{name}"].double().numpy().reshape(2, 4)
        apart = groups - groups.mean(1, keepdims=True)
        total += weight * (apart / np.sqrt((apart**2).mean(1, keepdims=True))).ravel()
    expected = (total - total.mean()) / total.std()
    np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-5)
    assert abs(np.corrcoef(expected, scores["reward"].numpy())[0, 1]) < 0.999
    with pytest.raises(ValueError, match="decouple_rewards is for a sum of rewards, and this is"):
        DDPOTrainer(config, twin("sd2"), lambda: "a fox", redness)
    with pytest.raises(ValueError, match="decouple_rewards means nothing to algorithm 'draft'"):
        make_config("emoji", algorithm="draft", decouple_rewards=True)


@pytest.mark.parametrize("algorithm", ("ddpo", "nft", "draft"))
@pytest.mark.parametrize("name", ("sdxl", "flux-dev"))
def test_epochs_of_several_sizes(algorithm, name):
    "In turn; an epoch is that of a run of this size alone; the evaluation has a size of its own."
    sizes, seen = [(32, 48), (48, 32), (32, 32)], []
    class Watched(Bright):
        def see(self, images): seen.append(tuple(images.shape[-2:]))
    config = make_config("emoji", **TINY | dict(num_epochs=4), algorithm=algorithm, lr=1e-3,
                         eta=0.5, img_sizes="32x48,48x32,32x32", eval_img_size=(48, 64))
    pipe = twin(name)
    train(config, pipe, lambda: "a fox", Watched())
    changes = [size for size, before in zip(seen, [None, *seen]) if size != before]
    assert changes == [*sizes, sizes[0]]
    images, _ = evaluate(config, pipe, ["a fox"], redness)
    assert images.shape == (1, 48, 64, 3)
    alone, one = twin(name), replace(config, num_epochs=1, img_sizes=None, img_size=(32, 48))
    first, again = twin(name), replace(config, num_epochs=1)
    train(one, alone, lambda: "a fox", Bright())
    train(again, first, lambda: "a fox", Bright())
    torch.testing.assert_close(flat(first), flat(alone))


class Bright(torch.nn.Module):
    "A reward with a gradient and without weights: how bright an image is."
    def see(self, images): pass

    def differentiable(self, images, prompts):
        self.see(images)
        return images.flatten(1).mean(1)

    def forward(self, images, prompts):
        self.see(images.transpose(0, 3, 1, 2))
        return images.reshape(len(images), -1).mean(1) / 255


def test_sizes_are_checked():
    "Each of them, and that of the evaluation: this network halves its latents twice."
    for changes in (dict(img_sizes="32x32,32x8"), dict(eval_img_size=8)):
        with pytest.raises(ValueError, match=f"{[*changes][0]}.* 8"):
            DDPOTrainer(make_config("emoji", **TINY, **changes), twin("sd3"), lambda: "a", redness)


def test_the_largest_size_is_measured():
    "Where micro_batch_size is to be found; the epoch goes on with its own size."
    seen = []
    class Watched(DDPOTrainer):
        def trial(self, count):
            seen.append(self.policy.size)
            return super().trial(count)
    config = make_config("emoji", **TINY | dict(num_epochs=1), img_sizes="32x32,48x64",
                         micro_batch_size=None)
    with patch.object(trainer, "measured_micro_batch", lambda config, weights, trial, most: (
            trial(2), 2)[1]):
        ours = Watched(config, twin("sd2"), lambda: "a fox", redness)
        ours.train()
    assert seen == [(48, 64)] and ours.policy.size == (32, 32)


def test_images_of_one_size_are_compared():
    "A reward that only depends on the size gives no advantage, also after epochs of other sizes."
    def pixels(images, prompts): return [float(images[0, ..., 0].size)] * len(images)
    config = make_config("emoji", **TINY | dict(num_epochs=4, num_samples_per_epoch=8),
                         img_sizes="32x32,48x64", min_count=2, buffer_size=32)
    rows = train(config, twin("sd2"), lambda: "a fox", pixels)
    assert all(row["loss"] == 0 for row in rows)
    assert rows[0]["reward_mean"] != rows[1]["reward_mean"]
