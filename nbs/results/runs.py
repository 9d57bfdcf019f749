"""The runs behind the chapters' tables: `python nbs/results/runs.py groups reinforce gamed right`.

`groups`, `reinforce`, `steps`, `gamed`, `incompressible`, `draft`, `dpo_noise`, `comparison0` to
`comparison2`, `play`, `value0`, `value1`, `flow_training0`, `flow_training1` and `nft_slow` train,
and have a line for each look at fresh pictures on the way; chapters 12 and 30 and the site's page
`play` have pictures, too. (Seconds are of one thread beside other work, but for `steps` and the
comparisons.) The others look at what commands have left in runs/: `right`, `samplers` and
`backgrounds` at the three runs

    ddpo_train --seed N --name seedN

whose metrics.csv are seed0.csv, seed1.csv and seed2.csv here; `evaluations` at them and at

    ddpo_train --seed N --samples_per_prompt 1 --name queueN
    ddpo_train --lora_rank 8 --name lora    (its metrics.csv is lora.csv)

and `flow` at `ddpo_train --pipeline emoji_flow --eta 0.7 --seed N --name flowN`, N 0 and 1.
`plans` computes what the presets for large models take, and `comparison` makes README's figure and
table of the algorithms from the three comparisons.
"""
import argparse
import csv
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from io import BytesIO
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from ddpo_scratch.animals import load_classifier, load_judge, right_ones, share_right
from ddpo_scratch.command.figures import csv_text, png_bytes, progress_strip
from ddpo_scratch.command.plan import make_plan
from ddpo_scratch.command.run import TRAINERS, plain_reward
from ddpo_scratch.pipelines import load_pipeline
from ddpo_scratch.prompts import PromptDataset, emoji_common_animal_prompts
from ddpo_scratch.rewards import JPEGCompressibility
from ddpo_scratch.sampling import decoding_fn, sd_sample
from ddpo_scratch.scorers.names import WeightedSum, make_reward
from ddpo_scratch.trainer.checkpoints import in_place, write_file
from ddpo_scratch.trainer.evaluation import evaluate, fresh_prompts, no_reward
from ddpo_scratch.trainer.policy import Policy
from ddpo_scratch.trainer.preferences import DPOTrainer
from ddpo_scratch.trainer.presets import make_config, make_prompt_fn
from ddpo_scratch.training import EVALUATION, noise_sources
from ddpo_scratch.workshop.drawings import BACKGROUNDS
from ddpo_scratch.workshop.emoji_model import named_right

HERE = Path(__file__).parent
kilobytes, judge, classifier = JPEGCompressibility(), load_judge(), load_classifier()

# Chapter 7. The preset with each of three answers to "better than what?".
GROUPS = {
    "batch": dict(samples_per_prompt=1, min_count=256),  # a prompt's own are never enough
    "running": dict(samples_per_prompt=1, buffer_size=32, min_count=8),
    "groups": dict(samples_per_prompt=16, buffer_size=32, min_count=8),
}

# Chapter 8. One update for an epoch's pictures, with the preset's learning rate or a larger one;
# and four, with the ratio and without the clip.
REINFORCE = GROUPS["running"] | dict(batch_size=128)
REINFORCES = {
    "reinforce": REINFORCE,
    "reinforce x4": REINFORCE | dict(lr=4 * make_config("emoji").lr),
    "unclipped": GROUPS["running"] | dict(clip_ratio=1e8),
}

# Chapter 12. A reward that does not read the prompt, first with large steps; then the cures.
GAMED = dict(reward="jpeg_compressibility", cfg=3.0, samples_per_prompt=1, batch_size=16)
SMALL_STEPS = GAMED | dict(num_epochs=16, lr=7e-5)
CURES = {
    "in haste": GAMED | dict(num_epochs=10, lr=1.4e-4, clip_ratio=2.5e-3, min_count=256),
    "compressibility alone": SMALL_STEPS,
    "with the animal reward": SMALL_STEPS | dict(reward="jpeg_compressibility:1,animal:2"),
    "with a KL penalty": SMALL_STEPS | dict(beta=1.0),
    "with a weaker KL penalty": SMALL_STEPS | dict(beta=0.1),
}


# Chapter 27. The preset with all of its eight steps, or the first four.
STEPS = {
    "all eight": dict(timestep_fraction=1.0),
    "the first four": dict(timestep_fraction=0.5),
}


def names_of_cells(
    notebook: str,
    *parts: str,  # each of the one cell that is meant
) -> dict:
    "What these cells of a chapter define: its code is there, and is not repeated here."
    cells = json.loads((HERE.parent / notebook).read_text("utf-8"))["cells"]
    names = {}
    for part in parts:
        source, = [code for cell in cells if part in (code := "".join(cell["source"]))]
        exec(source, names)
    return names


class TimeIsUp(Exception):
    pass


def in_few_colours(png: bytes) -> bytes:
    "A picture with 256 colours, a third of the size."
    smaller = BytesIO()
    Image.open(BytesIO(png)).convert("RGB").quantize(256).save(smaller, "PNG", optimize=True)
    return smaller.getvalue()


def watched(
    name: str,       # of the run, for the table
    config,          # `TrainerConfig`
    looked_at: int,  # how many fresh pictures
    every: int,      # epochs from look to look
    strip: Path | None = None,  # where to leave the pictures of six prompts
    limit: float = float("inf"),  # seconds of training, after which it ends with a look
    measure=lambda images, prompts: {},  # → more columns
    on_look=lambda epoch, images: None,  # gets them
    kind=None,  # of trainer; None: the algorithm's
) -> list[dict]:     # a row for each look
    """Train, and look at fresh pictures on the way: how large, and how many right animals?

    With `ema_decay`, the pictures are those of the average; "last" is the share of the last
    weights, and "last_…" what is measured of theirs. Seconds are those of training alone."""
    pipe, rows, looks = load_pipeline(config.pipeline, "cpu"), [], []
    prompt_fn, reward_fn = make_prompt_fn(config.prompts), make_reward(config.reward, "cpu")
    prompts = fresh_prompts(config, prompt_fn)
    if isinstance(reward_fn, WeightedSum):
        evaluate(config, pipe, prompts, reward_fn)  # takes its units, as in the command
    prompts = prompts[:looked_at]
    kind = kind or TRAINERS[config.algorithm]
    trainer = kind(config, pipe, prompt_fn, reward_fn)

    def look(epoch, seconds):
        average, more = trainer.state.average if epoch else None, {}
        with in_place(average, trainer.state.weights):
            images, sizes = evaluate(config, pipe, prompts, kilobytes)
        if trainer.state.average:
            last, _ = evaluate(config, pipe, prompts, no_reward) if average else (images, None)
            more = {"last": round(share_right(last, prompts, judge), 4)} | {
                f"last_{name}": value for name, value in measure(last, prompts).items()}
        looks.append((epoch, images))
        rows.append({
            "run": name, "seed": config.seed, "epoch": epoch, "seconds": round(seconds, 1),
            "kilobytes": round(-sizes.mean().item(), 4),
            "right": round(share_right(images, prompts, judge), 4)} | more
            | measure(images, prompts))
        print(rows[-1], flush=True)
        on_look(epoch, images)

    def on_epoch(row):
        nonlocal seconds
        seconds += row["seconds"]
        if row["epoch"] % every == 0 or seconds >= limit: look(row["epoch"], seconds)
        if seconds >= limit: raise TimeIsUp

    seconds = 0.0
    look(0, seconds)
    try:
        trainer.train(on_epoch)
    except TimeIsUp: pass
    if strip:
        first = [prompts.index(prompt) for prompt in dict.fromkeys(prompts)][:6]
        shown = looks if len(looks) <= 6 else looks[::2]
        columns = [images[first] for _, images in shown]
        titles = [f"epoch {epoch}" if epoch else "before" for epoch, _ in shown]
        figure = progress_strip(columns, titles, [prompts[i] for i in first])
        write_file(strip, in_few_colours(png_bytes(figure)))
    return rows


def compared(runs):
    return [row for seed in (0, 1) for name, changes in runs.items()
            for row in watched(name, make_config(
                "emoji", seed=seed, num_epochs=24, **changes), 256, 4)]


def groups():
    "Chapter 7."
    return compared(GROUPS)


def reinforce():
    "Chapter 8."
    return compared(REINFORCES)


def steps():
    "Chapter 27. Four minutes of training each, on a machine with nothing else."
    return [row for seed in (0, 1) for name, changes in STEPS.items()
            for row in watched(name, make_config(
                "emoji", seed=seed, num_epochs=1000, **changes), 512, 8, limit=240)]


def gamed():
    "Chapter 12."
    return [row for name, changes in CURES.items() for row in watched(
        name, make_config("emoji", **changes), 128, 2,
        HERE / f"gamed_{name.replace(' ', '_')}.png")]


def incompressible():
    "The other way round; chapter 12."
    config = make_config("emoji", **SMALL_STEPS | dict(reward="jpeg_incompressibility"))
    return watched("incompressible", config, 128, 2, HERE / "gamed_incompressible.png")


# Chapter 30. Five minutes by the reward's own gradient, five times the default.
DRAFTS = {"four views": 4, "the image itself": 0}


def spread(
    images: np.ndarray,  # uint8, [N, H, W, 3]
    prompts: list[str],
) -> float:
    """How different the images of a prompt are: the mean distance of two with the same prompt.

    The distance is the root of the mean squared difference of pixel values from 0 to 1."""
    same = [[i for i, other in enumerate(prompts) if other == prompt]
            for prompt in dict.fromkeys(prompts)]
    values = images.astype(np.float32) / 255
    return float(np.mean([np.sqrt(((values[i] - values[j]) ** 2).mean())
                          for group in same for i, j in combinations(group, 2)]))


def draft():
    "Chapter 30."
    def measured(images, prompts):
        return {"reward": round(animal(images, prompts).mean().item(), 4),
                "spread": round(spread(images, prompts), 4)}
    rows, animal = [], make_reward("animal", "cpu")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(3, 1)
    for ax, (name, count) in zip(axes[1:], DRAFTS.items()):
        config = make_config("emoji", algorithm="draft", draft_views=count,
                             lr_scheduler="constant", num_epochs=40)
        prompts = fresh_prompts(config, make_prompt_fn(config.prompts))[:256]
        often = sorted({*prompts}, key=lambda prompt: (-prompts.count(prompt), prompt))[:3]
        shown = [i for prompt in often
                 for i in [i for i, other in enumerate(prompts) if other == prompt][:5]]

        def show(epoch, images):
            if epoch not in (0, config.num_epochs): return
            part, title = (ax, f"{name}, epoch {epoch}") if epoch else (axes[0], "before training")
            part.imshow(np.concatenate([*images[shown]], 1))
            part.set_axis_off()
            part.set_title(title, fontsize=9, loc="left")
        rows += watched(name, config, 256, 4, measure=measured, on_look=show)
    write_file(HERE / "draft.png", png_bytes(figure))
    return rows


# Every algorithm as `ddpo_train --algorithm …` has it.
ALGORITHMS_COMPARED = {"ddpo": 3, "draft": 1, "nft": 2, "awm": 2, "dpo": 2}  # epochs between looks


def compare_algorithms(seed: int):
    """Chapter 34. Eight minutes a seed, on a machine with nothing else.

    All keep an average of the weights here, which changes nothing in training. "right" and
    "spread" are of what the command leaves by default, which is the average for some only."""
    def measured(images, prompts): return {"spread": round(spread(images, prompts), 4)}
    rows = []
    for algorithm, every in ALGORITHMS_COMPARED.items():
        config = make_config("emoji", algorithm=algorithm, seed=seed)
        for row in watched(algorithm, replace(config, ema_decay=0.9), 256, every, measure=measured):
            average, last = row["right"], row["last"]
            left = ("right", "spread") if config.ema_decay else ("last", "last_spread")
            rows.append({name: row[name] for name in ("run", "seed", "epoch", "seconds")} | dict(
                zip(("right", "spread"), (row[name] for name in left))) | {
                    "average": average, "last": last})
    return rows


def comparison():
    "The figure and the table of README, by the cells of chapter 34."
    here = os.getcwd()
    os.chdir(HERE)  # they read ../results
    try:
        names = names_of_cells("practice/34_comparison.ipynb", "def summary(")
        figure, rows = names["shares_over_time"](), names["summary"]()
    finally: os.chdir(here)
    write_file(HERE.parent / "images" / "comparison.png", png_bytes(figure))
    return rows


PLAYED = 8  # prompts


def sprite(rows: list[np.ndarray]) -> bytes:  # each uint8, [B, H, W, 3]
    "Rows of images of one size as one WebP file."
    buffer = BytesIO()
    whole = np.concatenate([np.concatenate([*row], 1) for row in rows])
    Image.fromarray(whole).save(buffer, "WEBP", quality=85, method=6)
    return buffer.getvalue()


def play():
    """What can be moved on the site's page `play`. Ten minutes, on a machine with nothing else.

    The runs of `comparison0` with the settings as they are, and the images of eight prompts from
    look to look: nbs/images/play_ALGORITHM.webp has a row for each prompt, a column for each look.
    A line of the table is of a look; its rewards are those of the eight images."""
    rows, animal = [], make_reward("animal", "cpu")
    for algorithm, every in ALGORITHMS_COMPARED.items():
        config, columns = make_config("emoji", algorithm=algorithm), []
        prompts = fresh_prompts(config, make_prompt_fn(config.prompts))[:256]
        shown = [prompts.index(prompt) for prompt in dict.fromkeys(prompts)][:PLAYED]

        def measured(images, prompts):
            rewards = animal(images, prompts)
            return {"reward": round(rewards.mean().item(), 4), "spread": round(
                spread(images, prompts), 4)} | {
                    prompts[i]: round(rewards[i].item(), 3) for i in shown}
        found = watched(algorithm, config, 256, every, measure=measured,
                        on_look=lambda epoch, images: columns.append(images[shown]))
        names = ("run", "epoch", "right", "reward", "spread", *(
            prompts[i] for i in shown))
        rows += [{name: row[name] for name in names} for row in found]
        write_file(HERE.parent / f"images/play_{algorithm}.webp", sprite([*np.stack(columns, 1)]))
    write_file(HERE.parent / "images/play_steps.webp", sprite(trajectories()))
    return rows


ETAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def trajectories() -> list[np.ndarray]:  # for each of `ETAS` uint8, [21, H, W, 3]
    "One image from pure noise in 20 steps, each decoded; always from the same random numbers."
    pipe, found = load_pipeline("emoji", "cpu"), []
    for eta in ETAS:
        policy = Policy(pipe, 20, 3.0, eta, (64, 64))
        with torch.no_grad():
            cond = policy.encode(["a tiger"])
            steps = policy.sample(cond, noise_sources(0, EVALUATION, [0])).latents
        found.append(policy.decode(steps[:, 0]))
    return found


class SharedNoise(DPOTrainer):
    "All images of a prompt are noised in the same way."
    def forward_noise(self, epoch, numbers):
        group = self.config.samples_per_prompt
        return super().forward_noise(epoch, [i // group * group for i in numbers])


def dpo_noise():
    "Chapter 32."
    config = make_config("emoji", algorithm="dpo", num_epochs=6, beta=100.0, lr=3e-5,
                         noise_levels=4, ema_decay=0.0)
    return [row for name, kind in (("shared", SharedNoise), ("own", DPOTrainer))
            for row in watched(name, config, 256, 3, kind=kind)]


VALUES = {"per prompt": {}, "value": dict(baseline=True),
          "γ = 0.9": dict(gamma=0.9, baseline=False)}


def compare_values(seed: int):
    "Chapter 33."
    kinds = names_of_cells("practice/33_value.ipynb", "class ValueNet", "class ValueTrainer")
    rows = []
    for name, changes in VALUES.items():
        made = []
        def kind(*args):
            made.append(type("Changed", (kinds["ValueTrainer"],), changes)(*args))
            return made[0]
        def explained(images, prompts):
            if not made or not made[0].explained: return {"explained": ""}
            return {"explained": " ".join(f"{x:.3f}" for x in made[0].explained[-1])}
        rows += watched(name, make_config("emoji", seed=seed), 256, 4, measure=explained,
                        kind=kind if changes else None)
    return rows


def right():
    "Right animals without and with guidance before training, and without it after; chapter 11."
    rows = []
    for seed in (0, 1, 2):
        for model, guidance in (("untrained", 1.0), ("untrained", 3.0), ("untrained", 5.0),
                                ("trained", 1.0)):
            config = make_config("emoji", seed=seed, cfg=guidance)
            pipe = load_pipeline("emoji" if model == "untrained" else f"runs/seed{seed}/pipeline")
            prompts = fresh_prompts(config, make_prompt_fn(config.prompts))
            start = time.perf_counter()
            images, _ = evaluate(config, pipe, prompts, no_reward)
            seconds = time.perf_counter() - start
            rows.append({
                "seed": seed, "model": model, "guidance": guidance,
                "right": round(share_right(images, prompts, judge), 4),
                "classifier": round(share_right(images, prompts, classifier), 4),
                "milliseconds": round(1000 * seconds / len(prompts), 1)})
            print(rows[-1], flush=True)
    return rows


def hero():
    """32 prompts before and after the run with seed 2, which the README shows.

    The table says of each prompt whether the judge sees the right animal."""
    config = make_config("emoji", seed=2)
    prompts = [*dict.fromkeys(fresh_prompts(config, make_prompt_fn(config.prompts)))][:32]
    figure, rows = Figure(figsize=(12, 3.3), layout="constrained"), []
    for part, (when, source) in zip(figure.subfigures(1, 2, wspace=0.03), (
            ("before", "emoji"), ("after", "runs/seed2/pipeline"))):
        images, _ = evaluate(config, load_pipeline(source, "cpu"), prompts, no_reward)
        right = right_ones(images, prompts, judge)
        for ax, image, prompt, found in zip(part.subplots(4, 8).flat, images, prompts, right):
            colour = "#1a7f37" if found else "#c62828"
            ax.imshow(image)
            ax.set(xticks=[], yticks=[])
            ax.set_title(("✓ " if found else "✗ ") + prompt.split(" ", 1)[1], fontsize=7, pad=2,
                         color=colour)
            ax.spines[:].set(color=colour, linewidth=2)
        part.suptitle(f"{when} training: {sum(right)} of 32 right", fontsize=9)
        rows += [{"model": when, "prompt": prompt, "right": int(found)}
                 for prompt, found in zip(prompts, right)]
    write_file(HERE.parent / "images" / "hero.png", png_bytes(figure))
    return rows


SAMPLERS = {  # steps, eta, guidance
    "as it was trained": (8, 1.0, 1.0),
    "with guidance": (8, 1.0, 3.0),
    "without noise": (8, 0.0, 1.0),
    "in 50 steps": (50, 1.0, 1.0),
    "in 50 steps without noise": (50, 0.0, 1.0),
    "pipe(prompt)": (50, 0.0, 7.5),
}


def samplers():
    "The trained model under samplers that it was not trained with; chapter 11."
    rows = []
    for seed in (0, 2):
        config = make_config("emoji", seed=seed, num_eval_samples=256)
        prompts = fresh_prompts(config, make_prompt_fn(config.prompts))
        for model, source in (("untrained", "emoji"), ("trained", f"runs/seed{seed}/pipeline")):
            pipe = load_pipeline(source, "cpu")
            pipe.set_progress_bar_config(disable=True)
            for name, (steps, eta, guidance) in SAMPLERS.items():
                images = [np.asarray(image) for batch in torch.arange(len(prompts)).split(32)
                          for image in pipe(
                              [prompts[i] for i in batch], num_inference_steps=steps, eta=eta,
                              guidance_scale=guidance, height=64, width=64, generator=noise_sources(
                                  seed, EVALUATION, batch.tolist())).images]
                rows.append({"seed": seed, "model": model, "sampler": name, "right": round(
                    share_right(np.stack(images), prompts, judge), 4)})
                print(rows[-1], flush=True)
    return rows


def flow():
    "The flow model, before and after training, as it was trained and by pipe(prompt); chapter 22."
    rows = []
    for seed in (0, 1):
        config = make_config("emoji", pipeline="emoji_flow", eta=0.7, seed=seed)
        prompts = fresh_prompts(config, make_prompt_fn(config.prompts))
        for model, source in (("untrained", "emoji_flow"),
                              ("trained", f"runs/flow{seed}/pipeline")):
            pipe, reward_fn = load_pipeline(source, "cpu"), make_reward(config.reward, "cpu")
            images, rewards = evaluate(config, pipe, prompts, reward_fn)
            rows.append({
                "seed": seed, "model": model, "right": round(
                    share_right(images, prompts, judge), 4), "reward": round(
                    rewards.mean().item(), 4), "reward of pipe(prompt)": round(
                    plain_reward(config, pipe, prompts, reward_fn), 4)})
            print(rows[-1], flush=True)
    return rows


FLOW_NOISES = {  # algorithm nft takes eta 0, and does not train here
    "none": dict(algorithm="nft", eta=0.0),
    **{f"sde, a = {a}": dict(eta=a) for a in (0.4, 0.7, 1.0)},
    **{f"cps, a = {a}": dict(eta=a, flow_sampler="cps") for a in (0.4, 0.7, 1.0)},
    "sde, a = 0.7, steps 0 to 3": dict(eta=0.7, timestep_fraction=0.5, mixed_sampling=True)}


FLOWS = {
    "sde": dict(eta=0.7), "cps": dict(eta=0.7, flow_sampler="cps"),
    "noise in steps 0 to 3": dict(eta=0.7, timestep_fraction=0.5, mixed_sampling=True),
    "nft": dict(algorithm="nft", eta=0.0)}


def flow_training(seed: int):
    "Ways of training the flow model, three to six minutes of one thread each; chapter 22."
    rows = [row for name, changes in FLOWS.items() for row in watched(name, make_config(
        "emoji", pipeline="emoji_flow", seed=seed, **changes), 256, 4)]
    for row in rows: row.pop("last", None)  # of nft, which is judged by its average
    return rows


def nft_slow():
    "NFT with a third of its learning rate, with the seeds on which it fails; chapter 34."
    return [row for seed in (1, 2) for row in watched(
        "nft", make_config("emoji", algorithm="nft", lr=3e-5, seed=seed), 256, 4)]


def flow_noise():
    "The untrained flow model in eight steps, by ways of adding noise; chapter 22."
    rows, pipe = [], load_pipeline("emoji_flow", "cpu")
    for seed in (0, 1):
        for name, changes in FLOW_NOISES.items():
            config = make_config(
                "emoji", pipeline="emoji_flow", seed=seed, num_eval_samples=256, **changes)
            prompts = fresh_prompts(config, make_prompt_fn(config.prompts))
            images, sizes = evaluate(config, pipe, prompts, kilobytes)
            rows.append({"seed": seed, "noise": name, "right": round(
                share_right(images, prompts, judge), 4), "kilobytes": round(
                -sizes.mean().item(), 3), "spread": round(spread(images, prompts), 4)})
            print(rows[-1], flush=True)
    return rows


def guidance():
    "Guidance towards the classifier in place of training, and sampling without it; chapter 11."
    names, rows = names_of_cells("tutorial/11_results.ipynb", "def guided("), []
    random.seed(0)
    prompts = list(PromptDataset(emoji_common_animal_prompts, 128))
    for strength in ("none", 0.0, 0.3, 1.0, 3.0, 10.0):
        generator, start = torch.Generator().manual_seed(0), time.perf_counter()
        def draw(batch):
            if strength != "none": return names["guided"](batch, strength, generator)
            latents, *_ = sd_sample(batch, names["pipe"], 64, 64, 1.0, 8, 1.0, "cpu", generator)
            return decoding_fn(latents, names["pipe"])
        images = np.concatenate([draw(prompts[i:i + 32]) for i in range(0, 128, 32)])
        seconds = time.perf_counter() - start
        rows.append({
            "strength": strength, "right": round(share_right(images, prompts, judge), 4),
            "classifier": round(share_right(images, prompts, classifier), 4),
            "milliseconds": round(1000 * seconds / len(prompts), 1)})
        print(rows[-1], flush=True)
    return rows


def named():
    "Three pictures of every animal, guided, in 50 steps: the share that is right; chapter 80."
    first = 0.6801  # of the first version, by this function at commit 51eebc2, where it shipped
    return [{"version": "first", "right": first},
            {"version": "second", "right": round(named_right(load_pipeline("emoji"), judge), 4)}]


def ground_of(images):
    "Of each picture the median colour of its border, [B, 3], and the pixels that are like it."
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], 1)
    colours = np.median(border, axis=1)
    return colours, np.abs(images - colours[:, None, None]).max(-1) < 40


def backgrounds():
    """What the classifier thinks of the untrained model's pictures when their ground is recoloured,
    and which grounds the untrained and the trained models draw; chapter 11."""
    rows, palette = [], np.array(list(BACKGROUNDS.values()))
    for seed in (0, 1, 2):
        config, drawn = make_config("emoji", seed=seed), {}
        prompts = fresh_prompts(config, make_prompt_fn(config.prompts))
        for model, source in (("untrained", "emoji"), ("trained", f"runs/seed{seed}/pipeline")):
            drawn[model], _ = evaluate(config, load_pipeline(source, "cpu"), prompts, no_reward)
        reward_fn = make_reward("animal", "cpu")
        images = drawn["untrained"]
        _, ground = ground_of(images)
        nearest = {model: np.abs(ground_of(pictures)[0][:, None] - palette).sum(-1).argmin(1)
                   for model, pictures in drawn.items()}
        for number, (name, colour) in enumerate(BACKGROUNDS.items()):
            recoloured = np.where(ground[..., None], np.array(colour, np.uint8), images)
            rows.append({"seed": seed, "ground": name, "reward of recoloured": round(
                reward_fn(recoloured, prompts).mean().item(), 4)} | {
                    model: round(float((near == number).mean()), 4)
                    for model, near in nearest.items()})
            print(rows[-1], flush=True)
    return rows


def evaluations():
    "What the command's own evaluation said of the runs that are in runs/; chapters 7, 11 and 19."
    rows = []
    for folder in sorted(Path("runs").iterdir()):
        if not (folder / "evaluation.csv").exists(): continue
        found = list(csv.DictReader((folder / "evaluation.csv").open(encoding="utf-8")))
        def mean(column): return round(float(np.mean([float(row[column]) for row in found])), 4)
        rows.append({"run": folder.name, "pictures": len(found)} | {
            f"{name} {when}": mean(column.format(when)) for name, column in (
                ("reward", "{}"), ("right", "eval_right_animal_{}"))
            for when in ("before", "after")})
    return rows


PROCESSES = ("--num_epochs 3 --num_samples_per_epoch 11 --samples_per_prompt 1 --batch_size 5 "
             "--sample_batch_size 4 --num_timesteps 4 --num_eval_samples 9 --lr 1e-3 "
             "--reward jpeg_compressibility --name x")


def processes():
    "The same run by one process and by two, each with one thread; chapter 26."
    launch, rows = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"], []
    for count in ("1", "2"):
        with TemporaryDirectory() as folder:
            subprocess.run([*launch, count, "-m", "ddpo_scratch", *PROCESSES.split()], cwd=folder,
                           check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            rows += [{"processes": count} | {name: row[name] for name in (
                "epoch", "reward_mean", "grad_norm")} for row in csv.DictReader(
                    (Path(folder) / "runs" / "x" / "metrics.csv").open())]
    return rows


def plans():
    "What the presets for large models take, as they are and without offload; chapter 22."
    rows = []
    for preset in ("sdxl", "sd35", "flux", "flux_24gb", "flux2", "qwen_image", "sana",
                   "pixart"):
        config = make_config(preset)
        plan, kept = make_plan(config), make_plan(replace(config, offload=False))
        rows.append({
            "preset": preset, "pixels": config.img_size, "gb": round(plan.memory / 1e9, 1),
            "vae_and_text_encoders_gb": round(kept.resident["VAE and text encoders"] / 1e9, 1),
            "without_offload_gb": round(kept.memory / 1e9, 1),
            "minutes_on_an_a100": round(plan.seconds("A100, 80 GB", config.mixed_precision) / 60)})
    return rows


TABLES = {function.__name__: function for function in (
    groups, reinforce, steps, gamed, incompressible, draft, comparison, play, dpo_noise, hero,
    right, samplers, flow, flow_noise, guidance, named, nft_slow, processes, backgrounds,
    evaluations, plans)}
TABLES |= {f"comparison{seed}": partial(compare_algorithms, seed) for seed in (0, 1, 2)}
TABLES |= {f"{name}{seed}": partial(function, seed) for seed in (0, 1) for name, function in (
    ("value", compare_values), ("flow_training", flow_training))}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=TABLES, nargs="+")
    for table in parser.parse_args().table:
        write_file(HERE / f"{table}.csv", csv_text(TABLES[table]()))
