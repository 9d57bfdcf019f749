"""Tests of chapter `nbs/practice/14_config.ipynb`."""
from dataclasses import fields

import numpy as np
import pytest

from ddpo_scratch.trainer.config import TrainerConfig
from ddpo_scratch.trainer.presets import PRESETS, make_config, make_prompt_fn
from ddpo_scratch.trainer.trainer import check_run
from helpers import redness, train, twin


def test_presets_are_the_blogs_and_its_miniature():
    "The blog's hyperparameters, one by one, from its text."
    blog = dict(
        num_samples_per_epoch=128, num_epochs=50, num_inner_epochs=1, num_timesteps=50,
        batch_size=4, img_size=512, lr=5e-6, clip_advantages=10.0, clip_ratio=1e-4, cfg=5.0,
        eta=1.0, weight_decay=1e-4, max_grad_norm=1.0, buffer_size=32, min_count=16,
        sample_batch_size=32, pipeline="CompVis/stable-diffusion-v1-4", reward="aesthetic",
        prompts="imagenet_animal_prompts", gradient_checkpointing=True, lr_scheduler="constant",
        num_eval_samples=128, timestep_fraction=1.0, samples_per_prompt=1, beta=0.0,
        mixed_precision="no", lora_rank=0, lora_alpha=None, save_every=10,
        checkpoints_total_limit=2, log_with=None, use_8bit_adam=False, offload=False,
        eval_rewards=None, push_to_hub=None, scale_rewards=True, micro_batch_size=None,
        which_steps=None, compile=False, lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
        lora_from=None, algorithm="ddpo", draft_steps=1, draft_random=False, draft_copies=1,
        draft_views=0, noise_levels=4, nft_beta=1.0, old_decay=0.0, ema_decay=0.0, preferences=None,
        flow_sampler="sde", mixed_sampling=False, eval_every=0, best_by="reward", patience=0,
        lr_warmup_steps=0, negative_prompt=None, eval_prompts=None, log_updates=False,
        tracker_project_name="ddpo_scratch", load_in_4bit=False, shard_weights=False,
        decouple_rewards=False, img_sizes=None, eval_img_size=None)
    assert {name: getattr(PRESETS["blog"], name) for name in blog} == blog
    assert {field.name for field in fields(TrainerConfig)} - set(blog) == {"seed", "device"}
    assert PRESETS["emoji"].pipeline == "emoji"


def test_names_that_are_not_settings():
    "The nearest one is named; a function in place of a name; `no`, which YAML reads as False."
    with pytest.raises(ValueError, match="no setting 'num_epoch'. Did you mean 'num_epochs'"):
        make_config("blog", num_epoch=3)
    with pytest.raises(TypeError, match="Functions go to run_training or DDPOTrainer"):
        make_config("blog", reward=redness)
    assert make_config("sdxl", mixed_precision=False).mixed_precision == "no"


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


BAD = (("num_epochs", 0), ("batch_size", -1), ("num_timesteps", 2.5), ("img_size", 0), ("lr", 0),
       ("img_size", 100), ("lr", -1e-3), ("lr", float("nan")), ("eta", 0), ("clip_ratio", 0),
       ("cfg", -1), ("beta", -1), ("weight_decay", -1), ("samples_per_prompt", 0),
       ("seed", -1), ("seed", 2**31), ("num_eval_samples", 0),
       ("batch_size", True), ("timestep_fraction", 0), ("timestep_fraction", 1.1), ("lr", True),
       ("buffer_size", 0), ("min_count", 0), ("buffer_size", "8"), ("buffer_size", 1),
       ("min_count", 1), ("lr", 1e38), ("micro_batch_size", 0), ("log_with", "wandbb"),
       ("save_every", 0), ("checkpoints_total_limit", 0), ("which_steps", "last"),
       ("which_steps", ""), ("which_steps", "random"),
       ("which_steps", 1.5), ("which_steps", "0,0"), ("which_steps", "0,8"), ("which_steps", True),
       ("which_steps", "٣"), ("which_steps", []), ("which_steps", "0 3"),
       ("which_steps", "0,3"),  # timestep_fraction is 0.75
       ("weight_decay", float("inf")), ("lr_scheduler", "steps"), ("lr_warmup_steps", -1),
       ("lr_warmup_steps", 96), ("lr_warmup_steps", 3), ("tracker_project_name", "a/b"),
       ("tracker_project_name", ""), ("img_sizes", "64"), ("img_sizes", "64x60"),
       ("img_sizes", ""), ("img_sizes", 64), ("img_sizes", "64x64x64"), ("eval_img_size", 60))


def test_bad_configurations():
    "Refused when written down, by name."
    for name, value in BAD:
        with pytest.raises(ValueError, match=name):
            make_config("emoji", **{name: value})
    with pytest.raises(ValueError, match="'blogg'. Known: blog, emoji, flux, flux2, flux_24gb"):
        make_config("blogg")
    for given in ("0,3", " 0, 3", [0, 3], (0, 3), np.array([0, 3]).tolist()):
        assert make_config("emoji", which_steps=given, timestep_fraction=1).which_steps == "0,3"
    for given in ("64x64,48x64", ["64x64", "48x64"], [[64, 64], [48, 64]]):
        assert make_config("emoji", img_sizes=given).sizes == [(64, 64), (48, 64)]
    assert make_config("emoji", which_steps=np.int64(3), timestep_fraction=1).which_steps == "3"
    with pytest.raises(ValueError, match="'cats'. Known: common_animal_prompts, emoji_an"):
        make_prompt_fn("cats")
    with pytest.raises(TypeError, match="reward is a name"):
        make_config("emoji", reward=redness)
    with pytest.raises(TypeError, match="log_updates is True or False"):
        make_config("emoji", log_updates=1)
    with pytest.raises(TypeError, match="not a str"):
        train(make_config("emoji"), "emoji", lambda: "a fox", redness)
    pipe = twin("sd2")
    levels = pipe.scheduler
    pipe.scheduler = type(levels).from_config(levels.config, set_alpha_to_one=True)
    def named(steps): return make_config("emoji", which_steps=steps, timestep_fraction=1)
    with pytest.warns(UserWarning, match="no noise"), pytest.raises(
            ValueError, match=r"the trained steps \[7\] have no noise"):
        check_run(named("7"), pipe)
    check_run(named("6,7"), pipe)
    pipe.scheduler = levels
    pipe.vae_scale_factor = 16
    with pytest.raises(ValueError, match="img_size must be a positive multiple of 16"):
        train(make_config("emoji", img_size=72), pipe, lambda: "a fox", redness)
