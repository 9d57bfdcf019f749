"""Tests of chapter `nbs/practice/19_evaluation.ipynb`."""

import csv
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from ddpo_scratch.command.run import run_training
from ddpo_scratch.command.watch import column_of
from ddpo_scratch.pipelines import load_pipeline
from ddpo_scratch.prompts import emoji_animal_prompts
from ddpo_scratch.rewards import JPEGCompressibility
from ddpo_scratch.scorers.names import WeightedSum
from ddpo_scratch.trainer.checkpoints import Stopped
from ddpo_scratch.trainer.evaluation import evaluate, fresh_prompts, verdict
from ddpo_scratch.trainer.presets import make_config, make_prompt_fn
from helpers import TINY, flat, redness, twin


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


WATCHED = TINY | dict(num_epochs=8, lr=1e-3, sample_batch_size=4, num_eval_samples=2, eval_every=1)


def rows_of(folder):
    with (folder / "evaluations.csv").open(encoding="utf-8") as file: return [*csv.DictReader(file)]


def trained(folder):
    return flat(load_pipeline(str(folder / "pipeline"), "cpu"))


def test_the_best_is_kept_and_a_run_that_gets_no_better_ends(tmp_path, capfd):
    "Marks are given in this order; the weights are those of runs of three and of five epochs."
    marks = iter([1.0, 3.0, 2.0, 5.0, 4.0, 5.0])
    def mark(images, prompts):  # evaluations alone are of two images
        return np.full(len(prompts), next(marks) if len(prompts) == 2 else 0.0)
    config = make_config("emoji", **WATCHED, best_by="mark", patience=2)
    run = partial(run_training, prompt_fn=emoji_animal_prompts, reward_fn=redness)
    run(config, twin("sd2"), folder=tmp_path / "x", eval_rewards={"mark": mark})
    rows = rows_of(tmp_path / "x")
    assert [float(row["eval_mark"]) for row in rows] == [1.0, 3.0, 2.0, 5.0, 4.0, 5.0]
    assert [row["epoch"] for row in rows] == [*"012345"] and not [*marks]
    for epochs, place in ((3, tmp_path / "x" / "checkpoints" / "best"), (5, tmp_path / "x")):
        short, pipe = replace(config, num_epochs=epochs, eval_every=0, best_by="reward",
                              patience=0), twin("sd2")
        run(short, pipe, folder=tmp_path / str(epochs), eval_rewards={})
        assert torch.equal(flat(pipe), trained(place)), epochs
    best = tmp_path / "x" / "checkpoints" / "best" / "pipeline" / "evaluation.json"
    assert json.loads(best.read_text("utf-8"))["epoch"] == 3
    said = capfd.readouterr().out
    assert "best after epoch 3: mark 5.0000, in checkpoints/best; in the end mark 5.0000" in said
    assert sorted(path.name for path in (tmp_path / "x" / "evaluations").iterdir()) == [
        f"{epoch:05d}.png" for epoch in range(1, 6)]
    with pytest.raises(ValueError, match="more than 8 --num_epochs or another --patience"):
        run(config, twin("sd2"), folder=tmp_path / "x", eval_rewards={"mark": mark}, resume=True)
    marks = iter([6.0, 7.0, 8.0])
    run(replace(config, patience=0), twin("sd2"), folder=tmp_path / "x",
        eval_rewards={"mark": mark}, resume=True)
    assert [row["epoch"] for row in rows_of(tmp_path / "x")] == [*"012345678"]


@pytest.mark.parametrize("changes", ({"ema_decay": 0.9}, {"lora_rank": 2, "lr": 1e-2}))
def test_what_was_evaluated_is_what_was_kept(changes, tmp_path):
    "The kept weights draw the images of their evaluation; a run that is stopped has the same ones."
    config, stops = make_config("emoji", **WATCHED | dict(num_epochs=3) | changes), []
    def reward(images, prompts):
        if len(prompts) == 3 and stops and stops.pop(): raise Stopped("SIGTERM")  # once an epoch
        return redness(images, prompts)
    run = partial(run_training, config, prompt_fn=emoji_animal_prompts, reward_fn=reward,
                  eval_rewards={})
    pipe = twin("sd2")
    run(pipe, folder=tmp_path / "x")
    best = max(rows_of(tmp_path / "x"), key=lambda row: float(row["reward"]))
    place = tmp_path / "x" / "checkpoints" / "best"
    if config.lora_rank:
        pipe = twin("sd2")
        pipe.load_lora_weights(str(place / "lora"))
    else:
        pipe = load_pipeline(str(place / "pipeline"), "cpu")
    _, again = evaluate(config, pipe, fresh_prompts(config, emoji_animal_prompts), redness)
    assert best["epoch"] != "0" and again.mean().item() == pytest.approx(float(best["reward"]))

    stops += [True, False]  # from the last: in the second epoch
    with pytest.raises(Stopped): run(twin("sd2"), folder=tmp_path / "y")
    run(twin("sd2"), folder=tmp_path / "y", resume=True)
    assert rows_of(tmp_path / "y") == rows_of(tmp_path / "x")


def test_which_score_is_the_best_by(tmp_path):
    "The reward, a part of a sum, or one that is watched; another is refused before anything runs."
    both = WeightedSum({"size": JPEGCompressibility(), "red": redness}, {"size": 1.0, "red": -2.0})
    assert [column_of(name, both, {"mark": redness}) for name in ("reward", "red", "mark")] == [
        "reward", "reward_red", "eval_mark"]
    config = make_config("emoji", **WATCHED, best_by="beauty")
    with pytest.raises(ValueError, match="best_by 'beauty' is no score .* mark, reward"):
        run_training(config, twin("sd2"), emoji_animal_prompts, redness, tmp_path / "x",
                     eval_rewards={"mark": redness})
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="there are none: set eval_every"):
        make_config("emoji", patience=3)
