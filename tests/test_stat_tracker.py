"""Tests of chapter `nbs/tutorial/07_stat_tracker.ipynb`."""

import numpy as np
import pytest
import torch

from ddpo_scratch.stat_tracker import PerPromptStatTracker


def test_no_advantage_is_infinite():
    "A reward far outside of a usual that is all but equal: very large, and a number."
    advantages = PerPromptStatTracker(2, 1).update(["a"] * 3, [1.0, 0.0, 3e-209])
    assert np.isfinite(advantages).all() and advantages[0] == np.finfo(np.float32).max


def test_the_scale_of_a_reward_does_not_matter():
    "Unit spread for rewards of any size; exactly 0 for equal ones, whatever they are."
    noise = np.random.default_rng(0).standard_normal(8)
    expected = ((noise - noise.mean()) / noise.std()).astype(np.float32)
    for scale in (1e-300, 1e-8, 1.0, 1e6, 1e300):
        for prompts in (["a"] * 8, list("abcdefgh")):
            ours = PerPromptStatTracker(32, 2).update(prompts, scale * noise)
            np.testing.assert_allclose(ours, expected, rtol=1e-5)
            assert ours.std() == pytest.approx(1, rel=1e-5)
    for value in (0.0, 5.0, 0.1, 1e9 + 0.1, -1e-300, 1e300):
        assert PerPromptStatTracker(8, 8).update(["a"] * 8, [value] * 8).tolist() == [0.0] * 8
    assert PerPromptStatTracker(8, 1).update(["a"], [3.7]).tolist() == [0.0]


def test_tracker_takes_anything_array_like():
    "Lists, arrays and tensors in; float32 out; the queue keeps the newest."
    expected = PerPromptStatTracker(4, 2).update(["a", "b"], [1.0, 2.0])
    for rewards in (np.array([1, 2]), torch.tensor([1.0, 2.0], requires_grad=True), (1.0, 2.0),
                    torch.tensor([1.0, 2.0], dtype=torch.bfloat16)):
        advantages = PerPromptStatTracker(4, 2).update(("a", "b"), rewards)
        assert advantages.dtype == np.float32 and np.array_equal(advantages, expected)
    tracker = PerPromptStatTracker(buffer_size=3, min_count=2)
    for reward in range(5): tracker.update(["a"], [reward])
    assert list(tracker.stats["a"]) == [2.0, 3.0, 4.0]


def test_tracker_refuses_nonsense():
    "Sizes that make no sense, rewards that do not belong to the prompts, or are no numbers."
    for sizes in ((0, 1), (4, 0), (2.5, 1), (4, 5)):
        with pytest.raises(ValueError): PerPromptStatTracker(*sizes)
    tracker = PerPromptStatTracker(4, 2)
    for prompts, rewards, match in (("ab", [1.0], r"\[2\] prompts came with \[1\]"),
                                    ("a", [[1.0]], r"\[1\] prompts came with \[1, 1\]"),
                                    ("ab", [1.0, np.nan], "reward 1, of prompt 'b', is nan"),
                                    ("ab", [-np.inf, 0.0], "reward 0, of prompt 'a', is -inf")):
        with pytest.raises(ValueError, match=match): tracker.update(list(prompts), rewards)
    assert not tracker.stats
