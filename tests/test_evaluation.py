"""Tests of chapter `nbs/practice/19_evaluation.ipynb`."""

import numpy as np
import pytest
import torch

from ddpo_scratch.rewards import JPEGCompressibility
from ddpo_scratch.scorers.names import WeightedSum
from ddpo_scratch.trainer.evaluation import evaluate, fresh_prompts, verdict
from ddpo_scratch.trainer.presets import make_config, make_prompt_fn
from helpers import TINY, redness, twin


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


def test_verdict():
    "The arithmetic, and a model whose pictures are all worth the same."
    rise = verdict(torch.tensor([-1.0, 1.0]), torch.tensor([2.0, 4.0]))
    assert "(+3.0 standard deviations)" in rise
    assert "no spread before" in verdict(torch.zeros(2), torch.ones(2))
