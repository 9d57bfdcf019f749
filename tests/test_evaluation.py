"""Tests of chapter `nbs/practice/19_evaluation.ipynb`."""

import csv
import json
from dataclasses import replace
from functools import partial
from unittest.mock import patch

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
    assert "after epoch 3 of 5: mark 5.0000, in the end mark 5.0000" in said
    assert "ends here: 2 evaluations were no better" in said
    assert f"the best weights are in {tmp_path / 'x' / 'checkpoints' / 'best'}" in said
    assert sorted(path.name for path in (tmp_path / "x" / "evaluations").iterdir()) == [
        f"{epoch:05d}.png" for epoch in range(1, 6)]
    with pytest.raises(ValueError, match="its end, after 5 epochs. .*give it another --patience"):
        run(config, twin("sd2"), folder=tmp_path / "x", eval_rewards={"mark": mark}, resume=True)
    marks = iter([6.0, 7.0, 8.0])
    run(replace(config, patience=0), twin("sd2"), folder=tmp_path / "x",
        eval_rewards={"mark": mark}, resume=True)
    assert [row["epoch"] for row in rows_of(tmp_path / "x")] == [*"012345678"]
    with pytest.raises(ValueError, match="its end, after 8 epochs. .*more: --num_epochs"):
        run(replace(config, patience=7), twin("sd2"), folder=tmp_path / "x",
            eval_rewards={"mark": mark}, resume=True)


def test_a_run_that_has_ended_stays_ended(tmp_path):
    "Its last evaluation is the limit, and then the disk is full: it goes on with what is left."
    marks, config = iter([3.0, 2.0, 1.0]), make_config("emoji", **WATCHED, best_by="mark",
                                                       patience=2)
    def mark(images, prompts):
        return np.full(len(prompts), next(marks) if len(prompts) == 2 else 0.0)
    def run(**others):
        run_training(config, twin("sd2"), emoji_animal_prompts, redness, tmp_path / "x",
                     eval_rewards={"mark": mark}, **others)
    full = patch("ddpo_scratch.command.run.evaluate_after", side_effect=OSError("no space"))
    with full, pytest.raises(OSError, match="no space"): run()
    marks = iter([0.5])  # of the final evaluation, which is done again
    run(resume=True)
    assert [row["epoch"] for row in rows_of(tmp_path / "x")] == [*"012"]
    assert not (tmp_path / "x" / "checkpoints" / "best").exists()  # none was better than before


def test_an_evaluation_that_failed_is_made_up(tmp_path):
    "The server was gone for a while. The last epoch is evaluated, whatever eval_every is."
    config, gone = make_config("emoji", **WATCHED | dict(num_epochs=5, eval_every=2)), []
    def reward(images, prompts):
        if len(prompts) == 2 and gone and gone.pop(): raise OSError("no route")
        return redness(images, prompts)
    def run(name, **others):
        run_training(config, twin("sd2"), emoji_animal_prompts, reward, tmp_path / name,
                     eval_rewards={}, **others)
    run("x")
    gone += [True, False, False]  # before: the reward, and that of pipe(prompt); then after epoch 2
    with pytest.raises(OSError, match="no route"): run("y")
    assert not (tmp_path / "y" / "evaluations.csv").exists()
    run("y", resume=True)
    assert rows_of(tmp_path / "y") == rows_of(tmp_path / "x")
    assert [row["epoch"] for row in rows_of(tmp_path / "x")] == [*"0245"]


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
    "The reward, or one that is watched; another is refused before anything runs."
    assert [column_of(name, ["mark", "file.py:other"]) for name in (
        "reward", "mark", "other", "file.py:other")] == [
            "reward", "eval_mark", "eval_other", "eval_other"]
    config = make_config("emoji", **WATCHED, best_by="beauty")
    with pytest.raises(ValueError, match="best_by 'beauty' is no score .* mark, reward"):
        run_training(config, twin("sd2"), emoji_animal_prompts, redness, tmp_path / "x",
                     eval_rewards={"mark": redness})
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="there are none: set eval_every"):
        make_config("emoji", patience=3)
