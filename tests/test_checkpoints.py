"""Tests of chapter `nbs/practice/25_checkpoints.ipynb`."""
import csv
import io
import os
import random
import re
import shutil
import signal
import time
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file

from ddpo_scratch.command.flags import parse
from ddpo_scratch.command.folder import unfinished_until_the_end
from ddpo_scratch.command.run import run_training
from ddpo_scratch.prompts import emoji_animal_prompts
from ddpo_scratch.rewards import JPEGCompressibility
from ddpo_scratch.scorers.names import WeightedSum
from ddpo_scratch.trainer.checkpoints import (
    Stopped,
    at_one_stroke,
    checkpoints_in,
    find_again,
    load_checkpoint,
    newest_intact,
    put_away,
    random_states,
    save_checkpoint,
    set_random_states,
    state_from_dict,
    state_to_dict,
    stop_after_a_batch,
)
from ddpo_scratch.trainer.config import TrainerConfig
from ddpo_scratch.trainer.presets import make_config
from ddpo_scratch.trainer.trainer import TrainingState
from helpers import (
    Started,
    as_flags,
    ddpo_train,
    flat,
    goes_on,
    opened,
    redness,
    run_until,
    train,
    twin,
)

SMALL = dict(num_epochs=4, num_samples_per_epoch=4, samples_per_prompt=2, num_eval_samples=2,
             sample_batch_size=2, batch_size=2, num_timesteps=2, save_every=1, img_size=32,
             eval_rewards=None, buffer_size=8, min_count=2)  # so that what the tracker knows counts


def numbers(folder):
    "metrics.csv without the seconds, and the evaluation."
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    for row in rows: del row["seconds"]
    return rows, (folder / "evaluation.csv").read_text()


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
@pytest.mark.slow
def test_kills_change_nothing(twins, tmp_path):
    "SIGKILL once during a save, else in an epoch: the same metrics and weights to the last bit."
    kills = 4
    settings = SMALL | dict(
        pipeline=twins["sd2"], lr=1e-3, num_epochs=kills + 2,
        reward="jpeg_compressibility:1,animal:0.5", eval_rewards="right_animal")
    whole, folder = tmp_path / "runs" / "whole", tmp_path / "runs" / "cut"
    done = ddpo_train(tmp_path, *as_flags(settings), "--name=whole")
    assert done.returncode == 0, done.stderr
    chance, killed, in_a_save = random.Random(0), 0, 0
    run = Started(tmp_path, *as_flags(settings), "--name=cut")
    for kill in range(kills):
        before = set(checkpoints_in(folder / "checkpoints"))
        saving = kill == kills // 2
        def moment():
            if saving: return any((folder / "checkpoints").glob("*.part/*"))
            return set(checkpoints_in(folder / "checkpoints")) - before
        assert run.until(moment), kill
        if not saving: time.sleep(chance.uniform(0, 0.05))
        ended = run.end(signal.SIGKILL)
        killed += ended.returncode == -signal.SIGKILL
        in_a_save += any((folder / "checkpoints").glob("*.part"))
        if ended.returncode == 0: break
        run = Started(tmp_path, "--resume=runs/cut")
    else:
        ended = run.end()
    assert ended.returncode == 0 and killed >= kills - 1 and in_a_save >= 1, ended.stderr
    assert numbers(folder) == numbers(whole)
    ours, theirs = (load_file(path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
                    for path in (folder, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list(tmp_path.rglob("*.part")) and not (folder / "UNFINISHED.txt").exists()
    assert len(checkpoints_in(folder / "checkpoints")) == 1


def by_chance(images, prompts):
    "A reward that draws random numbers of its own."
    return [random.random() for _ in prompts]


def trained(config, stop=None, checkpoint=None):
    "A run, perhaps up to the given batch, perhaps from a checkpoint; pipeline and state."
    reward_fn = WeightedSum({"size": JPEGCompressibility(), "chance": by_chance},
                            {"size": 1.0, "chance": 0.3})
    def drawn():  # with all three generators; two prompts, so that each comes again
        number = random.randrange(9) + np.random.randint(9) + torch.randint(9, (1,)).item()
        return ("a fox", "an owl")[number % 2]
    return run_until(config, drawn, reward_fn, stop, checkpoint)


def test_a_run_goes_on_after_any_batch():
    "All weights; LoRA, a penalty, chosen steps; bf16: stopped in sampling and in updates."
    changes = SMALL | dict(num_epochs=2, num_timesteps=2, lr=1e-3, num_inner_epochs=2,
                           lr_scheduler="cosine", lr_warmup_steps=3)
    some = dict(which_steps="1", timestep_fraction=1.0)
    kinds = (dict(), dict(lora_rank=2, beta=0.1, **some), dict(beta=0.1, mixed_precision="bf16"),
             dict(img_sizes="32x32,32x48", log_updates=True))
    for kind in kinds:
        run = partial(trained, make_config("emoji", **changes | kind))
        assert goes_on(run, (1, 6, 9)) == [  # an epoch: two batches of samples, four updates
            "00000-00001", "00000-00006", "00001-00003"]


def test_a_gpus_way_to_compute_adamw_stays_where_it_was():
    "A state from before `fused`, or from the CPU, into a fused optimiser, and back: both go on."
    config = make_config("emoji", **SMALL)
    def made(fused):
        state = TrainingState(config, twin("sd2"))
        state.optimizer = torch.optim.AdamW(state.weights, lr=1e-3, fused=fused)
        state.scaler = torch.amp.GradScaler("cpu")
        return state
    def step(state):
        for weight in state.weights: weight.grad = torch.ones_like(weight)
        state.scaler.scale(torch.ones(()))  # begins
        state.scaler.unscale_(state.optimizer)
        state.scaler.step(state.optimizer)
        state.scaler.update()
    for ours, theirs in ((None, True), (True, None)):
        old, new = made(ours), made(theirs)
        step(old)
        state_from_dict(new, state_to_dict(old))
        assert new.optimizer.param_groups[0]["fused"] is theirs
        step(new)
        assert {float(x["step"]) for x in new.optimizer.state.values()} == {2.0}


def test_random_states():
    "The three generators go on where they were."
    def draw(): return random.random(), np.random.normal(size=3).tolist(), torch.randn(3).tolist()
    draw()
    np.random.normal()  # leaves half a pair behind
    states = random_states()
    first = draw()
    set_random_states(states)
    assert draw() == first != draw()


def test_damaged_checkpoints_are_passed_over():
    "A flipped bit, half a file, a file that is gone, a list that is none: named, the next taken."
    def flip(path):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    damages = {
        "state.pt": flip, "pipeline/unet/diffusion_pytorch_model.safetensors": flip,
        "pipeline/vae/config.json": Path.unlink, "sha256.json": lambda path: path.write_text("{"),
        "pipeline/model_index.json": lambda path: os.truncate(path, 9)}
    config = make_config("emoji", **SMALL)
    pipe = twin("sd2")
    state = TrainingState(config, pipe)
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        assert newest_intact(folder) is None
        for _ in range(6):
            save_checkpoint(folder, 6, pipe, state, {})
            state.history.append({})
        assert [path.name for path in checkpoints_in(folder)] == [f"0000{i}" for i in range(6)]
        for number, (name, damage) in zip(range(5, 0, -1), damages.items()):
            damage(folder / f"0000{number}" / name)
            with redirect_stdout(io.StringIO()) as said:
                assert newest_intact(folder) == folder / f"0000{number - 1}"
            assert f"0000{number} is damaged ({name})" in said.getvalue()
        flip(folder / "00000" / "state.pt")
        with pytest.raises(ValueError, match="all 1 checkpoints in .* are damaged"):
            newest_intact(folder)
        save_checkpoint(folder, 2, pipe, state, {})
        assert [path.name for path in checkpoints_in(folder)] == ["00000", "00006"]


@pytest.mark.slow
def test_a_run_may_grow_and_change_in_no_other_way():
    "Two epochs and two more are four; anything else is refused, with all differences."
    def run(place, resume=False, **changes):
        pipe = twin("sd2")
        run_training(make_config("emoji", **SMALL | changes), pipe, emoji_animal_prompts,
                     JPEGCompressibility(), place, resume)
        return flat(pipe)
    with TemporaryDirectory() as runs:
        short, whole = Path(runs) / "short", Path(runs) / "whole"
        run(short, num_epochs=2)
        flags = ["--resume", str(short)]
        with pytest.raises(ValueError, match="its end, after 2 epochs.*--num_epochs"): parse(flags)
        with pytest.raises(ValueError, match="num_epochs was 2 and is 1.*num_epochs may grow"):
            parse([*flags, "--num_epochs", "1"])
        with pytest.raises(ValueError, match="lr was 6e-05 and is 1.0; cfg was 1.0 and is 3.0"):
            parse([*flags, "--num_epochs", "4", "--lr", "1", "--cfg", "3"])
        with pytest.raises(ValueError, match="seed was 0 and is 1"):
            run(short, True, num_epochs=4, seed=1)
        with pytest.raises(ValueError, match="leave out --preset"):
            parse([*flags, "--preset", "blog"])
        with pytest.raises(ValueError, match="there is no run in '.*none'"):
            parse(["--resume", f"{runs}/none"])
        config, _, name, folder, _ = parse([*flags, "--num_epochs", "4"])
        assert (config.num_epochs, name, folder) == (4, None, short)
        assert torch.equal(run(short, True, num_epochs=4), run(whole, num_epochs=4))
        assert numbers(short) == numbers(whole)
        assert {path.name for path in short.iterdir()} == {path.name for path in whole.iterdir()}
        kept, = checkpoints_in(short / "checkpoints")
        assert kept.name == "00004"


@pytest.mark.slow
def test_the_machine_may_change(tmp_path):
    "Settings that change no result: noted in config.yaml, from which epoch; the same training."
    def run(name, resume=False, **changes):
        pipe = twin("sd2")
        run_training(make_config("emoji", **SMALL | changes), pipe, emoji_animal_prompts,
                     JPEGCompressibility(), tmp_path / name, resume)
        return flat(pipe)
    begun = flat(twin("sd2"))
    whole = run("whole", num_epochs=3, lr=1e-3) - begun
    run("x", num_epochs=2, lr=1e-3)
    run("x", True, num_epochs=3, lr=1e-3, micro_batch_size=1, sample_batch_size=1, save_every=7,
        gradient_checkpointing=True, offload=True)
    text = (tmp_path / "x" / "config.yaml").read_text()
    again = run("x", True, num_epochs=4, lr=1e-3, micro_batch_size=1, sample_batch_size=2)
    later = (tmp_path / "x" / "config.yaml").read_text()
    first, second = (set(re.findall("^# (.*)$", part, re.M)) for part in (text, later))
    assert "from epoch 3 on: micro_batch_size 1, before 32" in first and len(first) == 6
    assert first < second and "from epoch 4 on: sample_batch_size 2, before 1" in second
    assert TrainerConfig(**yaml.safe_load(later)).sample_batch_size == 2
    for name, value in dict(mixed_precision="bf16", lr=2e-3, num_samples_per_epoch=6).items():
        with pytest.raises(ValueError, match=f"{name} was"):
            run("x", True, **dict(num_epochs=5, lr=1e-3) | {name: value})
    assert again.isfinite().all()
    run("y", num_epochs=2, lr=1e-3)
    same = run("y", True, num_epochs=3, lr=1e-3, micro_batch_size=1, sample_batch_size=1) - begun
    assert (same - whole).norm() < 0.05 * whole.norm()


def test_other_batches_of_samples_after_a_stop():
    "Stopped in the middle of sampling: samples are drawn again, each once, and the same."
    config = make_config("emoji", **SMALL | dict(num_epochs=1, num_samples_per_epoch=6))
    def drawn(config, stop_after=None, checkpoint=None):
        pipe, seen = twin("sd2"), []
        state, calls = TrainingState(config, pipe), []
        if checkpoint: load_checkpoint(checkpoint, pipe, state)
        def on_batch():
            calls.append(1)
            if state.rollout.advantages is not None: raise Stopped("SIGTERM")
            if len(calls) == stop_after: raise Stopped("SIGTERM")
        def noted(images, prompts):
            seen.extend(prompts)
            return images.mean((1, 2, 3))
        names = iter(range(99))
        try: train(config, pipe, lambda: str(next(names)), noted, on_batch=on_batch, state=state)
        except Stopped: pass
        return pipe, state, seen
    _, _, whole = drawn(config)
    pipe, state, _ = drawn(config, 1)
    with TemporaryDirectory() as folder:
        checkpoint = save_checkpoint(Path(folder), 1, pipe, state, {})
        for size in (1, 2, 3, 5):
            seen = drawn(replace(config, sample_batch_size=size), checkpoint=checkpoint)[2]
            assert seen == (whole if size != 2 else whole[-len(seen):]), size


@pytest.mark.parametrize("algorithm", ("ddpo", "nft"))
def test_smaller_batches_of_samples_after_a_stop_in_an_update(algorithm):
    "Nothing is sampled again with weights that are half trained; metrics are of the same images."
    config = make_config("emoji", algorithm=algorithm, **SMALL | dict(
        num_epochs=1, num_samples_per_epoch=6, sample_batch_size=3, batch_size=3))
    def run(config, **others): return run_until(config, lambda: "a fox", redness, **others)
    _, whole = run(config)
    with TemporaryDirectory() as folder:
        checkpoint = save_checkpoint(Path(folder), 1, *run(config, stop=3), {})
        assert checkpoint.name == "00000-00003"
        _, again = run(replace(config, sample_batch_size=1), checkpoint=checkpoint)
    for ours, theirs in zip(again.history, whole.history, strict=True):
        assert ours | {"seconds": 0} == theirs | {"seconds": 0}


def test_a_checkpoint_has_the_average(tmp_path):
    "For diffusers; a run that goes on has the last weights again."
    config = make_config("emoji", **SMALL | dict(num_epochs=2, ema_decay=0.9, lr=1e-3))
    pipe, state = run_until(config, lambda: "a fox", redness, stop=5)
    last, average = flat(pipe), torch.cat([x.flatten() for x in state.average.shadow_params])
    checkpoint = save_checkpoint(tmp_path, 1, pipe, state, {})
    assert torch.equal(flat(pipe), last) and not torch.equal(last, average)
    assert torch.equal(flat(opened(str(checkpoint / "pipeline"))), average)
    again = twin("sd2")
    load_checkpoint(checkpoint, again, TrainingState(config, again))
    assert torch.equal(flat(again), last)


def test_a_folder_is_never_gone():
    "A kill at any moment of replacing a folder: the old or the new one is there, or found again."
    with TemporaryDirectory() as room:
        path = Path(room) / "lora"
        def write(content, die_at=None):
            calls, real = [], os.replace
            def replace_or_die(*names):
                calls.append(1)
                if len(calls) == die_at: raise KeyboardInterrupt
                real(*names)
            with patch.object(os, "replace", replace_or_die), at_one_stroke(path) as part:
                part.mkdir()
                (part / "x").write_text(content)
        write("first")
        for name in ("lora.old", "lora.bak"): (Path(room) / name).mkdir()  # somebody's own
        for die_at, content in ((1, "second"), (2, "third")):
            with pytest.raises(KeyboardInterrupt): write(content, die_at)
            find_again(path)
            assert (path / "x").read_text() == "first"
        with pytest.raises(KeyboardInterrupt): write("fourth", 2)
        write("fifth")
        assert (path / "x").read_text() == "fifth"
        assert sorted(os.listdir(room)) == ["lora", "lora.bak", "lora.old"]
        checkpoints, pipe = Path(room) / "checkpoints", twin("sd2")
        state = TrainingState(make_config("emoji", **SMALL), pipe)
        made = save_checkpoint(checkpoints, 1, pipe, state, {})
        made.rename(put_away(made))
        assert newest_intact(checkpoints) == made


@pytest.mark.slow
@pytest.mark.parametrize("when", ("after", "before"))
def test_an_update_is_whole_or_it_is_not(when, tmp_path):
    "An error in the middle of an optimiser's step: nothing of it is kept, and the run goes on."
    calls, real = [], torch.optim.AdamW.step
    def full(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4 and when == "before": raise RuntimeError("CUDA out of memory")
        found = real(self, *args, **kwargs)
        if len(calls) == 4: raise RuntimeError("CUDA out of memory")
        return found
    def run(name, resume=False):
        pipe = twin("sd2")
        run_training(make_config("emoji", **SMALL | dict(num_epochs=3, save_every=2), lr=1e-3),
                     pipe, emoji_animal_prompts, JPEGCompressibility(), tmp_path / name, resume)
        return flat(pipe)
    with patch.object(torch.optim.AdamW, "step", full), pytest.raises(RuntimeError, match="memory"):
        run("x")
    assert not (tmp_path / "x" / "checkpoints").exists()  # of two updates an epoch it was the 4th
    assert torch.equal(run("x", True), run("whole"))


def test_a_ruined_run_keeps_what_was_whole(tmp_path):
    "Weights that have gone wild are not saved over those of before."
    config = make_config("emoji", **SMALL | dict(num_epochs=3, checkpoints_total_limit=1), lr=1e-3)
    pipe = twin("sd2")
    def wild(images, prompts):
        if (tmp_path / "x" / "checkpoints" / "00001").exists():
            with torch.no_grad(): pipe.unet.conv_out.weight *= float("nan")
        return JPEGCompressibility()(images, prompts)
    with pytest.raises(ValueError, match="NaN or infinite"):
        run_training(config, pipe, emoji_animal_prompts, wild, tmp_path / "x")
    assert [path.name for path in checkpoints_in(tmp_path / "x" / "checkpoints")] == ["00001"]


def test_checkpoints_from_before_are_refused(tmp_path):
    "What was remembered then has other names: in a sentence."
    pipe = twin("sd2")
    state = TrainingState(make_config("emoji", **SMALL), pipe)
    made = save_checkpoint(tmp_path, 1, pipe, state, {})
    saved = torch.load(made / "state.pt", weights_only=True)
    saved["state"]["now"] = saved["state"].pop("rollout")
    torch.save(saved, made / "state.pt")
    with pytest.raises(ValueError, match="an older version of this library"):
        load_checkpoint(made, pipe, state)


def test_a_lock_is_one_file():
    "Who waits for it while another ends holds what a third one asks for."
    with TemporaryDirectory() as folder:
        folder = Path(folder) / "run"
        with unfinished_until_the_end(folder, False):
            there = (folder / ".lock").stat().st_ino
        with FileLock(folder / ".lock"):
            assert (folder / ".lock").stat().st_ino == there
            with pytest.raises(ValueError, match="still going on"):
                with unfinished_until_the_end(folder, True): pass


def test_what_people_do_to_a_run():
    "A trained pipeline, edits, strange files, a run that goes on, nothing left to go on from."
    fails = []
    def reward_fn(images, prompts):
        if fails and (place / "checkpoints" / "00001").exists(): raise RuntimeError("no ink")
        return JPEGCompressibility()(images, prompts)
    def prompt_fn(): return np.random.choice(["a fox", "an owl"])  # NumPy has its own strings
    def run(resume=True, pipe=None, **changes):
        config = make_config("emoji", **SMALL | dict(num_epochs=2, lr=1e-3) | changes)
        run_training(config, pipe or twin("sd2"), prompt_fn, reward_fn, place, resume)
    def refused(match, **arguments):
        with pytest.raises(ValueError, match=match): run(**arguments)
    with TemporaryDirectory() as runs:
        place, pipe = Path(runs) / "mine", twin("sd2")
        config, checkpoints = place / "config.yaml", place / "checkpoints"
        fails.append(1)
        with pytest.raises(RuntimeError, match="no ink"): run(False, pipe)
        fails.clear()
        refused("began with other weights.*load it again", pipe=pipe)
        config.write_text(config.read_text().replace("seed: 0", "seed: 1"))
        refused("seed was 0 and is 1", seed=1)
        config.write_text(config.read_text().replace("seed: 1", "seed: 0"))
        with FileLock(place / ".lock"): refused("still going on")
        for name in ("notes", "00001-best", "x.part", "00009"): (checkpoints / name).mkdir()
        (checkpoints / "00001" / ".DS_Store").write_text("")
        run()  # 00009 has lost all its files
        assert {path.name.split("-damaged")[0] for path in checkpoints.iterdir()} == {
            "notes", "00001-best", "x.part", "00002", "00009"}
        assert [path.name for path in checkpoints_in(checkpoints)] == ["00002"]
        (checkpoints / "00002" / "state.pt").unlink()
        refused("all 1 checkpoints in .* are damaged", num_epochs=3)
        assert not (place / "UNFINISHED.txt").exists()
        shutil.rmtree(checkpoints / "00002")
        refused("has no checkpoint to go on from", num_epochs=3)


def test_a_signal_waits_for_the_batch():
    "The first is noted, the second is not patient; afterwards all is as before."
    before = signal.getsignal(signal.SIGINT)
    with stop_after_a_batch() as on_batch:
        on_batch()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped) as stopped: on_batch()
        assert stopped.value.exit_code == 143
    with stop_after_a_batch() as on_batch:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt): signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(os.name != "posix", reason="SIGTERM is POSIX's")
def test_sigterm_leaves_a_checkpoint(twins, tmp_path):
    "A real process: what was trained can be used, and the exit code is the signal's."
    settings = SMALL | dict(pipeline=twins["sd2"], num_epochs=1000, save_every=1000, lora_rank=2)
    run, folder = Started(tmp_path, *as_flags(settings), "--name=x"), tmp_path / "runs" / "x"
    assert run.until((folder / "metrics.csv").exists)
    assert run.end(signal.SIGTERM).returncode == 143
    checkpoint, note = newest_intact(folder / "checkpoints"), folder / "UNFINISHED.txt"
    assert "ended by SIGTERM." in note.read_text()
    relative = checkpoint.relative_to(tmp_path)
    assert f"{relative}/lora is what was trained" in note.read_text()
    opened(twins["sd2"]).load_lora_weights(checkpoint / "lora")
