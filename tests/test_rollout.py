"""Tests of chapter `nbs/practice/17_rollout.ipynb`."""
import itertools
import random
import threading
from unittest.mock import patch

import numpy as np
import pytest
import torch

import ddpo_scratch.trainer.ddpo as ddpo
from ddpo_scratch.animals import AnimalReward
from ddpo_scratch.rewards import JPEGCompressibility
from ddpo_scratch.scorers.names import WeightedSum
from ddpo_scratch.trainer.evaluation import fresh_prompts
from ddpo_scratch.trainer.policy import Policy
from ddpo_scratch.trainer.presets import make_config, make_prompt_fn
from ddpo_scratch.trainer.rollout import PromptCache, is_elsewhere
from ddpo_scratch.trainer.trainer import TrainingState
from helpers import TINY, flat, redness, train, twin


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


def test_a_prompt_is_read_once_in_a_run():
    "Whatever the pictures of it and the passes over them; and read as it would be in a batch."
    pipe, read = twin("sd2"), []
    pipe.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(len((args or [kwargs["input_ids"]])[0])),
        with_kwargs=True)
    config = make_config("emoji", **TINY | dict(
        num_samples_per_epoch=8, samples_per_prompt=2, num_inner_epochs=2, cfg=3.0, num_epochs=2,
        sample_batch_size=3, micro_batch_size=2))
    prompts = iter(["a fox", "an owl", "a cat", "a fox", "a whale", "an owl", "a fox", "an owl"])
    first, _ = train(config, pipe, lambda: next(prompts), redness)
    assert read == [1] * 5  # four different ones, and once the empty one
    assert first["max_log_ratio"] < 1e-5
    batch = ["an owl", "a cat", "a fox", "an owl", "a cat"]
    policy = Policy(pipe, 3, 3.0, 1.0, (32, 32))
    cache = PromptCache(policy)
    for some in (batch[:1], batch): cache.read(some)
    for picked in (batch, ["a cat"]):
        ours, theirs = cache(picked), policy.encode(picked)
        assert ours.guided and theirs.guided and len(ours) == len(picked)
        torch.testing.assert_close(ours.rows, theirs.rows)
    cache.most = 10
    cache.read(["a cat", "a whale"])
    assert set(cache.encoded) == {"a cat", "a whale"}


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
        with patch.object(ddpo, "is_elsewhere", lambda *arguments: beside):
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
        assert is_elsewhere(reward_fn, cpu) == on_cpu
        assert is_elsewhere(reward_fn, gpu) == on_gpu


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
    assert [len(sample[0]["reward"]) for sample in state.rollout.samples] == [2, 2]
