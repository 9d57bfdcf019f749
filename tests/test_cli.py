"""Tests of chapter `nbs/practice/13_command.ipynb`."""
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, fields, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from huggingface_hub import HfApi
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpo_scratch.command.architectures import preset_for
from ddpo_scratch.command.cli import main
from ddpo_scratch.command.figures import image_grid
from ddpo_scratch.command.flags import Command, parse
from ddpo_scratch.command.folder import check_run_name, run_folder, what_ran
from ddpo_scratch.command.plan import make_plan
from ddpo_scratch.command.run import plain_reward, run_training
from ddpo_scratch.prompts import emoji_animal_prompts
from ddpo_scratch.rewards import JPEGCompressibility
from ddpo_scratch.scorers.names import WeightedSum, WithFacts, informed, make_reward
from ddpo_scratch.trainer.checkpoints import write_file
from ddpo_scratch.trainer.config import GROUPS, TrainerConfig, help_of
from ddpo_scratch.trainer.lora import LORA_TARGETS
from ddpo_scratch.trainer.presets import PRESETS, make_config
from ddpo_scratch.trainer.trainer import check_run
from ddpo_scratch.training import EVALUATION, noise_sources
from helpers import (
    Started,
    as_flags,
    ddpo_train,
    embedded,
    flat,
    last_line,
    opened,
    run_card,
    train,
    twin,
)

SMALL = dict(num_epochs=2, num_samples_per_epoch=5, samples_per_prompt=1, num_eval_samples=2,
             sample_batch_size=4, batch_size=2, num_timesteps=2, img_size=32)


@pytest.fixture
def flags(twins):
    "Of a small run of a small twin."
    return [*as_flags(SMALL), f"--pipeline={twins['sd2']}", "--preset=emoji"]


def called(folder, *flags):
    "The command in this process: the lines that it printed, and the sentence of a bad end."
    here, handler, said = os.getcwd(), signal.getsignal(signal.SIGTERM), io.StringIO()
    os.chdir(folder)
    try:
        with patch.object(sys, "argv", ["ddpo_train", *flags]), redirect_stdout(said): main()
    except SystemExit as left:
        return said.getvalue().splitlines(), left.code
    finally:
        os.chdir(here)
        signal.signal(signal.SIGTERM, handler)
    return said.getvalue().splitlines(), None


def opened_by_its_card(folder, base=None):
    "The picture that the model card's code draws; of an adapter, on top of the base."
    card = (folder / "README.md").read_text("utf-8")
    assert "fresh images: reward" in card and (folder / "reward_curve.png").exists()
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    ran = yaml.safe_load((folder.parent / "config.yaml").read_text())
    shown = {name: ran[name] and Path(ran[name]).name for name in (
        "pipeline", "prompts", "eval_prompts", "reward")}
    assert settings == ran | shown  # no folders of this machine
    return run_card(folder, base)["picture"]


@pytest.mark.parametrize("model", ("sd2", pytest.param("emoji", marks=pytest.mark.slow)))
def test_the_command_leaves_a_whole_run(model, twins):
    "All files, readable; plain lines; plain diffusers loads a pipeline that has changed."
    settings = SMALL | dict(pipeline=twins.get(model, model), img_size=32 if model in twins else 64)
    flags = as_flags(settings)
    with TemporaryDirectory() as folder:
        name = ["--name", "first", "--seed", "3"]
        done = ddpo_train(folder, *flags, *name) if model in twins else subprocess.run(
            [sys.executable, "-m", "ddpo_scratch", *flags, *name], cwd=folder,
            capture_output=True, text=True)  # from beginning to end, as a user has it
        assert done.returncode == 0, done.stderr
        line = r"^epoch +\d +reward +-?[\d.]+ ± [\d.]+ +loss [+-][\d.]+ +[\d.]+ s$"
        assert len(re.findall(line, done.stdout, re.M)) == 2, done.stdout
        assert len(done.stdout.splitlines()) == 7 and not set(done.stdout) & set("█\r")
        assert "fresh images: reward" in done.stdout
        right = r"^right_animal, which was not trained on: [\d.]+ before, [\d.]+ after$"
        assert re.search(right, done.stdout, re.M)
        path = Path(folder) / "runs" / "first"
        assert sorted(p.name for p in path.iterdir()) == [
            ".lock", "after.png", "before.png", "checkpoints", "config.yaml", "evaluation.csv",
            "metrics.csv", "pipeline", "progress.gif", "progress.png", "report.html",
            "reward_curve.png", "versions.yaml"]
        for picture in path.glob("*.png"): Image.open(picture).verify()
        moving = Image.open(path / "progress.gif")
        assert moving.n_frames == 3 and moving.info["loop"] == 0  # before, and two epochs
        rows = list(csv.DictReader((path / "metrics.csv").open()))
        assert [row["epoch"] for row in rows] == ["1", "2"]
        assert list(rows[0]) == [
            "epoch", "reward_mean", "reward_std", "eval_right_animal", "loss", "grad_norm",
            "clip_fraction", "approx_kl", "max_log_ratio", "lr", "skipped", "seconds"]
        assert len(list(csv.DictReader((path / "evaluation.csv").open()))) == 2
        config = TrainerConfig(**yaml.safe_load((path / "config.yaml").read_text()))
        assert config == make_config("emoji", **settings, seed=3, device=config.device)
        trained = StableDiffusionPipeline.from_pretrained(path / "pipeline")
        fresh = opened(twins[model]) if model in twins else embedded()
        assert not torch.equal(flat(trained), flat(fresh))
        assert opened_by_its_card(path / "pipeline").size == (config.img_size, config.img_size)
        taken = last_line(ddpo_train(folder, *flags, "--name", "first"))
        assert taken.startswith("ddpo_train: the run 'first' is there already")
        inside = last_line(ddpo_train(folder, "--pipeline", "runs/first"))
        assert "Did you mean 'runs/first/pipeline'?" in inside


def test_help_names_every_field_in_its_group():
    "Each field of the config once, with its meaning; the three to touch first; both presets."
    with TemporaryDirectory() as folder:
        text = re.sub(r"[\s│─]+", " ", ddpo_train(folder, "--help").stdout)
    assert all(group in text for group in GROUPS.values())
    for name in (field.name for field in fields(TrainerConfig)):
        assert len(help_of(name)) > 8 and help_of(name) in text and f"--{name}" in text, name
    assert "which defaults: blog, emoji, sdxl, sd35" in text
    assert "--resume" in text and "--config" in text
    assert "Three flags to touch first: --reward" in text


def test_flags_and_presets():
    "Flags change the preset's defaults and nothing else."
    emoji, blog = PRESETS["emoji"], PRESETS["blog"]
    assert parse([]) == Command(emoji) and parse(["--preset", "blog"]).config == blog
    assert parse(["--preset=blog", "--name", "x"]) == Command(blog, None, "x", None, False)
    config, *_ = parse(["--preset", "blog", "--lr", "3e-6", "--no_gradient_checkpointing",
                       "--device", "cpu"])
    assert config == make_config("blog", lr=3e-6, gradient_checkpointing=False, device="cpu")
    for flags, counts in ((["--buffer_size", "8", "--samples-per-prompt=1"], (8, 4)),
                          (["--min_count=300"], (600, 300)),
                          (["--buffer-size", "19", "--min_count", "2"], (19, 2))):
        config, *_ = parse(flags)
        assert (config.buffer_size, config.min_count) == counts
    for flags, message in (("--preset blogg", "'blogg'. Known: blog, emoji"),
                           ("--lr -1", "lr must be a number above 0"),
                           ("--push_to_hub fox", "owner/name, not 'fox'"),
                           ("--push_to_hub=", "owner/name, not ''"),
                           ("--buffer_size 0", "buffer_size must be")):
        with pytest.raises(ValueError, match=message): parse(flags.split())


def test_the_preset_follows_from_the_model(twins, tmp_path):
    "By family, of a folder or a name; the embedded models have their own, also after training."
    for name, preset in (("sd2", "blog"), ("sdxl", "sdxl"), ("sd3", "sd35"), ("flux-dev", "flux")):
        assert preset_for(twins[name]) == preset
    for name in ("CompVis/stable-diffusion-v1-4", "stabilityai/stable-diffusion-xl-base-1.0",
                 "stabilityai/stable-diffusion-3.5-medium", "black-forest-labs/FLUX.1-dev"):
        found = parse(["--pipeline", name])
        assert PRESETS[found.preset] == found.config and found.config.pipeline == name
    for name in ("emoji", "emoji_flow"):
        embedded(name).save_pretrained(tmp_path / name)
        assert preset_for(name) == preset_for(str(tmp_path / name)) == "emoji"
    xl = "stabilityai/stable-diffusion-xl-base-1.0"
    assert parse(["--pipeline", xl, "--preset", "None", "--lora_from=None"]).preset == "sdxl"
    told = parse(["--pipeline", xl, "--preset", "blog"])
    assert told == Command(make_config("blog", pipeline=xl))
    (tmp_path / "some.yaml").write_text(f"pipeline: {xl}\nlr: 0.1")
    assert parse(["--config", f"{tmp_path}/some.yaml"]).config == make_config("sdxl", lr=0.1)
    said, wrong = called(tmp_path, f"--pipeline={twins['sdxl']}", "--name=a/b",
                         "--reward=jpeg_compressibility")
    assert said == ["preset sdxl, for this model (--preset names another)"]
    assert "a plain name" in wrong


def test_a_size_that_cannot_be_meant_is_refused():
    "The embedded preset's 64 pixels, of a model that was made for a thousand."
    pipe = twin("sdxl")
    pipe.unet.register_to_config(sample_size=128)
    with pytest.raises(ValueError, match="64 is less than a quarter of the 1024 pixels"):
        check_run(make_config("emoji", cfg=1.0), pipe)
    with pytest.raises(ValueError, match="img_size 64 is less"):
        check_run(make_config("emoji", img_size=(1024, 64)), pipe)
    check_run(make_config("emoji", img_size=256), pipe)
    with pytest.raises(ValueError, match="64 is less than a quarter of the 1024 pixels"):
        make_plan(make_config("sdxl", img_size=64))


def test_an_adapter_has_a_learning_rate_of_its_own(tmp_path):
    "Where none is given: of ddpo-pytorch and TRL, and ten times as much for the embedded model."
    for flags, lr in (("--preset blog", 5e-6), ("--preset blog --lora_rank 16", 3e-4),
                      ("--preset blog --lora-rank=16 --lr 1e-5", 1e-5), ("", 6e-5),
                      ("--lora_rank 8", 5e-4), ("--preset sdxl --lora_rank 64", 3e-4)):
        assert parse(flags.split()).config.lr == lr, flags
    assert TrainerConfig().lr == 5e-6 and TrainerConfig(lora_rank=2).lr == 3e-4
    assert make_config("emoji", lora_rank=8).lr == 5e-4
    whole = parse("--preset sd35 --lora_rank 0".split()).config
    assert (whole.lr, whole.lora_alpha, whole.lora_targets) == (5e-6, None, LORA_TARGETS)
    (tmp_path / "some.yaml").write_text("cfg: 2")
    assert parse(["--config", f"{tmp_path}/some.yaml", "--lora_rank", "4"]).config.lr == 5e-4


def test_pictures_need_not_be_square(flags, tmp_path):
    "Height and width: pictures, the card's code, the plan; and one number where they are equal."
    lines, wrong = called(tmp_path, *flags, "--img_size", "48", "32", "--name", "x")
    assert wrong is None, wrong
    path = tmp_path / "runs" / "x"
    assert yaml.safe_load((path / "config.yaml").read_text())["img_size"] == [48, 32]
    assert opened_by_its_card(path / "pipeline").size == (32, 48)
    assert "48 × 32 pixels" in (path / "pipeline" / "README.md").read_text()
    lines, wrong = called(tmp_path, "--resume", "runs/x", "--num_epochs", "3")
    assert wrong is None and any(line.startswith("epoch   3") for line in lines)
    config = parse([*flags, "--img_size", "32", "32"]).config
    assert config.img_size == 32 and config.sizes == [config.eval_sides] == [(32, 32)]
    assert make_config("emoji", img_size=(np.int64(48), 32)).img_size == (48, 32)
    for bad in ((64, 60), (64,), (64, 64, 64), (64, 0), (64, 8.0), "64", 8 * 10**12):
        with pytest.raises(ValueError, match="img_size must be"): make_config("emoji", img_size=bad)


def test_settings_from_a_file():
    "A run's own config.yaml, a few lines of one's own, flags above both; mistakes by name."
    with TemporaryDirectory() as folder:
        file = Path(folder) / "some.yaml"
        def parsed(text, *flags):
            file.write_text(text)
            return parse(["--config", str(file), *flags])[0]
        config = make_config("blog", lr=3e-6, lora_rank=4, lora_targets=("to_q",), cfg=1.5)
        assert parsed(yaml.safe_dump(asdict(config))) == config
        assert parsed(yaml.safe_dump(asdict(config)), "--lr", "1") == replace(config, lr=1.0)
        assert parsed("lr: 1e-4\nmin_count: 4") == make_config("emoji", lr=1e-4, min_count=4)
        assert parsed("cfg: 2", "--preset", "blog") == make_config("blog", cfg=2)
        assert parsed("lora_alpha: 8", "--lora_rank", "4").lora_alpha == 8
        both = parsed("reward: {animal: 0.5, rewards.py:redness: 2}\neval_rewards: [pickscore]")
        assert (both.reward, both.eval_rewards) == ("animal:0.5,rewards.py:redness:2", "pickscore")
        for text, match in (
                ("learning_rate: 1", "no setting 'learning_rate'. `ddpo_train --help`"),
                ("lora_rnak: 1", "Did you mean 'lora_rank'"), ("lr", "holds no settings"),
                ("a: b: c", "cannot be read: mapping values"), ("lr: fast", "lr must be a number"),
                ("offload: 'yes'", "some.yaml': offload is True or False"),
                ("reward:", "reward is a name"), ("prompts: 2024-01-01", "prompts is a name"),
                ("eta: -1", "eta must be")):
            with pytest.raises(ValueError, match=match): parsed(text)
        with pytest.raises(ValueError, match="cannot be read.*No such file"):
            parse(["--config", f"{folder}/none.yaml"])


MISTAKES = {
    "--reward beauty": "unknown reward 'beauty'", "--pipeline emojis": "unknown pipeline 'emojis'",
    "--num_epochs 0": "num_epochs must be", "--prompts cats": "unknown prompt function 'cats'",
    "--preset blog --reward beauty": "unknown reward 'beauty'", "--eta 3": "eta = 3.0 asks",
    "--img_size 100": "img_size must be a multiple of 8", "--name ../x": "a run's name",
    "--prompts imagenet_animal_prompts": "the prompt '", "--reward animal:x": "the weight of",
    "--device gpu": "device 'gpu' cannot", "--device meta": "device 'meta' cannot",
    "--prompts own.py:f": "prompts 'own.py:f': here a known name or a text file",
    "--plan --reward own.py:f": "the reward 'own.py:f': there is no file",
    "--name .hid": "a run's name must be a plain name that does not begin with a dot"}


def test_mistakes_are_told_in_one_line():
    "No traceback for settings that cannot be; nothing is left behind."
    with TemporaryDirectory() as folder:
        for flags, message in MISTAKES.items():
            said = called(folder, *flags.split())[1]  # Python prints it, and exits with 1
            assert said.startswith(f"ddpo_train: {message}") and len(said) < 300
        assert not list(Path(folder).iterdir())
        real = last_line(ddpo_train(folder, "--reward", "beauty"))
        assert real.startswith("ddpo_train: unknown reward 'beauty'")


def test_folders_and_files():
    "Numbered names, no overwriting, no halves; of many that start together each gets its own."
    with TemporaryDirectory() as runs:
        runs = Path(runs)
        with ThreadPoolExecutor(8) as pool:
            folders = list(pool.map(lambda _: run_folder(PRESETS["emoji"], None, runs), range(16)))
        assert sorted(folder.name for folder in folders) == sorted(
            f"emoji-animal-{number}" for number in range(1, 17))
        both = make_config("emoji", reward="jpeg_compressibility:1,animal:0.5")
        assert run_folder(both, None, runs).name == "emoji-jpeg_compressibility-1-animal-0.5-1"
        assert run_folder(PRESETS["emoji"], "mine", runs) == runs / "mine"
        with pytest.raises(ValueError, match="there already"): check_run_name("mine", runs)
        for name in ("", " ", "../x", "a/b", "..", ".hid"):
            with pytest.raises(ValueError, match="plain name"): check_run_name(name, runs)
        path = runs / "a.txt"
        write_file(path, "one"); write_file(path, b"two")
        path.with_name("taken").mkdir()
        with pytest.raises(OSError): write_file(path.with_name("taken"), "three")
        assert path.read_text() == "two" and not list(runs.glob("*.part"))


# A reward of one's own, through Python: what ran is what is written, and what goes wrong leaves its
# reason.
class ThirdTime:
    "A reward that raises at its third call, which is the first one of training."
    calls = 0

    def __call__(self, images, prompts):
        self.calls += 1
        if self.calls == 3: raise RuntimeError("the scorer has run out of ink")
        return [float(len(prompt)) for prompt in prompts]


def a_fox(): return "a fox"


def test_what_is_written_down_is_what_ran(twins):
    "Names of one's own prompts and reward, of the pipeline that was given; a folder as a string."
    with TemporaryDirectory() as runs:
        folder, pipe = Path(runs) / "mine", opened(twins["sd2"])
        with pytest.raises(RuntimeError, match="out of ink"):
            config = make_config("blog", **SMALL)
            run_training(config, embedded(), a_fox, ThirdTime(), str(folder))
        ran = yaml.safe_load((folder / "config.yaml").read_text())
        assert ran["reward"] == f"{__name__}:ThirdTime" and ran["prompts"] == f"{__name__}:a_fox"
        assert ran["pipeline"] == "emoji" and ran["device"] == "cpu" and TrainerConfig(**ran)
        note = (folder / "UNFINISHED.txt").read_text()
        assert "did not finish" in note and "RuntimeError: the scorer has run out of ink" in note
        left = {path.name for path in folder.iterdir()}
        assert left == {".lock", "UNFINISHED.txt", "config.yaml", "versions.yaml", "before.png",
                        "progress.gif", "progress.png", "report.html"}
        config = make_config("emoji", **SMALL, eval_rewards=None)
        with pytest.raises(ValueError, match="not empty"):
            run_training(config, pipe, a_fox, ThirdTime(), folder)
        with pytest.raises(TypeError, match="reward_fn"):
            run_training(config, pipe, a_fox, lambda images: [0.0], Path(runs) / "never")
        assert not (Path(runs) / "never").exists()
        folder = Path(runs) / "names"
        run_training(config, pipe, emoji_animal_prompts, JPEGCompressibility(), folder)
        ran = yaml.safe_load((folder / "config.yaml").read_text())
        assert (ran["prompts"], ran["reward"]) == ("emoji_animal_prompts", "jpeg_compressibility")
        assert ran["pipeline"] == twins["sd2"]
        run_training(config, pipe, a_fox, partial(JPEGCompressibility()), Path(runs) / "again")
        ran = yaml.safe_load((Path(runs) / "again" / "config.yaml").read_text())
        assert ran["pipeline"] == str(folder / "pipeline")
        assert ran["reward"] == "ddpo_scratch.rewards:JPEGCompressibility"
        both = WeightedSum({"a": JPEGCompressibility(), "b": ThirdTime()}, {"a": 1, "b": -0.5})
        assert what_ran(config, pipe, a_fox, both).reward == (
            f"jpeg_compressibility:1,{__name__}:ThirdTime:-0.5")
        assert not (folder / "UNFINISHED.txt").exists()


@pytest.mark.parametrize("model", ("sd2", pytest.param("emoji", marks=pytest.mark.slow)))
def test_an_adapter_is_left_instead_of_the_pipeline(model, twins):
    "With lora_rank: a folder that plain diffusers opens on top of the base; no pipeline."
    def base(): return opened(twins[model]) if model in twins else embedded()
    settings = SMALL | dict(img_size=32 if model in twins else 64, eval_rewards=None)
    pipe, config = base(), make_config("emoji", **settings, lora_rank=2)
    with TemporaryDirectory() as runs:
        folder = Path(runs) / "small"
        run_training(config, pipe, emoji_animal_prompts, JPEGCompressibility(), folder)
        left = {path.name for path in folder.iterdir()}
        assert "lora" in left and not {"pipeline", "UNFINISHED.txt", "lora.part"} & left
        left = TrainerConfig(**yaml.safe_load((folder / "config.yaml").read_text()))
        assert left.lora_targets == (
            "to_q", "to_k", "to_v", "to_out.0")
        plain = base()
        plain.load_lora_weights(folder / "lora")
        drawn = opened_by_its_card(folder / "lora", twins.get(model))
        assert drawn.size == (config.img_size, config.img_size)
    x, words = torch.randn(1, 4, 8, 8), torch.randn(1, 8, plain.unet.config.cross_attention_dim)
    def output(pipe):
        with torch.no_grad():
            return pipe.unet(x, torch.tensor(500), encoder_hidden_states=words).sample
    assert torch.equal(output(pipe), output(plain))

    with TemporaryDirectory() as runs:  # trained further: the pipeline brings its adapter
        config = make_config("emoji", **settings | dict(lr=1e-2))
        before, again = output(plain), base()
        run_training(config, plain, emoji_animal_prompts, JPEGCompressibility(), Path(runs) / "on")
        again.load_lora_weights(Path(runs) / "on" / "lora")
    assert torch.equal(output(plain), output(again)) and not torch.equal(output(again), before)


def test_evaluation_has_prompts_of_its_own(flags, tmp_path):
    "A file's, in turn, with their facts; and every update has its row, also when a run goes on."
    def write(name, rows):
        (tmp_path / name).write_text("\n".join(
            json.dumps({"prompt": prompt, "count": count}) for prompt, count in rows.items()))
    write("prompts.jsonl", {"a fox": 3, "an owl": 5})
    write("watched.jsonl", {"a bee": 7, "a cat": 9})
    (tmp_path / "mine.py").write_text("def count(images, prompts, facts):\n"
                                      "    return [fact['count'] for fact in facts]\n")
    settings = [*flags, "--num_epochs=1", "--samples_per_prompt=1", "--reward=mine.py:count",
                "--prompts=prompts.jsonl", "--num_eval_samples=3", "--eval_rewards=None",
                "--cfg=2", "--negative_prompt=blurred, a 'bad' one"]
    several = [*settings, "--eval_prompts=watched.jsonl"]
    lines, wrong = called(tmp_path, *several, "--log_updates", "--name=x")
    assert wrong is None, wrong
    lines, wrong = called(tmp_path, "--resume=runs/x", "--num_epochs=2")
    assert wrong is None, wrong
    folder = tmp_path / "runs" / "x"
    def table(name): return list(csv.DictReader((folder / name).open()))
    assert [(row["prompt"], float(row["before"])) for row in table("evaluation.csv")] == [
        ("a bee", 7), ("a cat", 9), ("a bee", 7)]
    metrics, updates = table("metrics.csv"), table("updates.csv")
    assert all(3 <= float(row["reward_mean"]) <= 5 for row in metrics)
    numbers = [(row["epoch"], row["update"]) for row in updates]
    count = len(updates) // 2
    assert count > 1 and numbers == [(epoch, str(i)) for epoch in "12" for i in range(1, count + 1)]
    assert {"loss", "grad_norm", "clip_fraction", "lr", "skipped"} < updates[0].keys()
    for epoch, row in enumerate(metrics):
        norms = [float(update["grad_norm"]) for update in updates[epoch * count:][:count]]
        assert min(norms) < float(row["grad_norm"]) < max(norms)
    card = (folder / "pipeline" / "README.md").read_text("utf-8")
    assert "3 images for prompts from\n`watched.jsonl`" in card
    assert '''negative_prompt="blurred, a 'bad' one"''' in card
    opened_by_its_card(folder / "pipeline")

    write("watched.jsonl", {"a bee": 7, "a cat": 8})
    wrong = called(tmp_path, "--resume=runs/x", "--num_epochs=3")[1]
    assert "began with other eval_prompts than the file has now" in wrong
    write("watched.jsonl", {"a bee": 7, "a fox": 8})
    wrong = called(tmp_path, *several)[1]
    assert "the prompt 'a fox' has other facts in eval_prompts than in prompts" in wrong
    (tmp_path / "words.txt").write_text("a bee")
    wrong = called(tmp_path, *settings, "--eval_prompts=words.txt")[1]
    assert "wants facts about all prompts, and 'a bee' has none" in wrong and "Nothing was" in wrong
    wrong = called(tmp_path, *several, "--num_eval_samples=1")[1]
    assert "has 2 prompts: raise num_eval_samples, now 1" in wrong and "Nothing was" in wrong
    wrong = called(tmp_path, *settings, "--eval_prompts=none.txt")[1]
    assert "eval_prompts 'none.txt': the prompts in 'none.txt' cannot be read" in wrong


def test_logs():
    "What TensorBoard and an offline Weights & Biases have been told is what metrics.csv says."
    config = make_config("emoji", **SMALL | dict(num_eval_samples=3), eval_rewards=None)
    def run(folder, kind):
        run_training(replace(config, log_with=kind, tracker_project_name="a_project"), twin("sd2"),
                     emoji_animal_prompts, JPEGCompressibility(), folder)
        return [row["reward_mean"] for row in csv.DictReader((folder / "metrics.csv").open())]
    with TemporaryDirectory() as runs:
        folder = Path(runs) / "tb"
        rewards = run(folder, "tensorboard")
        events = EventAccumulator(str(folder / "tensorboard")).Reload()
        told = events.Scalars("reward_mean")
        assert [event.step for event in told] == [1, 2]
        np.testing.assert_allclose([event.value for event in told], list(map(float, rewards)), 1e-6)
        tags = [tag for tag in events.Tags()["images"] if tag.startswith("progress/")]
        assert tags and all(len(events.Images(tag)) == 2 for tag in tags)
        folder = Path(runs) / "wb"
        import wandb
        real, projects = wandb.init, []
        def begun(project, **others):
            projects.append(project)
            return real(project=project, **others)
        with patch.dict(os.environ, {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}):
            with patch("wandb.init", begun): run(folder, "wandb")
        file, = folder.glob("wandb/offline-run-*/*.wandb")
        assert b"reward_mean" in file.read_bytes()
        assert projects == ["a_project"]
        assert all(tag.removeprefix("progress/").encode() in file.read_bytes() for tag in tags)
        assert len(list(folder.glob("wandb/offline-run-*/files/media/images/*.png"))) >= 6
        with patch.dict(sys.modules, {"wandb": None}):
            with pytest.raises(ValueError, match=r"pip install 'ddpo_scratch\[wandb\]'"):
                run(Path(runs) / "none", "wandb")
        assert not (Path(runs) / "none").exists()


@pytest.mark.slow
def test_events_of_a_resumed_run_are_told_once(flags, tmp_path):
    "TensorBoard after a kill: what was told after the checkpoint is told again, and counts once."
    run = Started(tmp_path, *flags, "--name=x", "--log_with=tensorboard", "--save_every=8",
                  "--num_epochs=16")
    rows = tmp_path / "runs" / "x" / "metrics.csv"
    assert run.until(lambda: rows.exists() and rows.read_text().count("\n") >= 11)
    run.end(signal.SIGKILL)
    wrong = called(tmp_path, "--resume=runs/x")[1]
    assert wrong is None
    told = EventAccumulator(str(rows.parent / "tensorboard")).Reload().Scalars("reward_mean")
    assert [event.step for event in told] == [*range(1, 17)]


OWN = """
from ddpo_scratch.rewards import JPEGCompressibility
from ddpo_scratch.scorers.names import WeightedSum

def redness(images, prompts):
    images[:] = images[..., :1]
    return images[..., 0].mean((1, 2))

small = JPEGCompressibility()
both = WeightedSum({"red": redness, "small": small}, {"red": 1.0, "small": 2.0})

def broken(images, prompts):
    return float("a number")
"""


@pytest.mark.slow
def test_rewards_of_ones_own_are_resumed(flags):
    "By file: a function in a sum, a sum, an object of a known class; the names are found again."
    with TemporaryDirectory() as folder:
        (Path(folder) / "mine.py").write_text(OWN)
        rewards = ("mine.py:redness:0.5,animal", "mine.py:both", "mine.py:small")
        for number, name in enumerate(rewards):
            watched = "mine.py:small" if number < 2 else "None"
            lines, wrong = called(folder, *flags, "--num_epochs=1", "--reward", name,
                                  "--name", str(number), "--eval_rewards", watched)
            assert wrong is None
            path = Path(folder) / "runs" / str(number)
            ran = yaml.safe_load((path / "config.yaml").read_text())
            file = f"{Path(folder).resolve()}/mine.py"
            assert ran["reward"].startswith(f"{file}:{name.split(':')[1].split(',')[0]}")
            rows = list(csv.DictReader((path / "metrics.csv").open()))
            parts = ({"reward_redness", "reward_animal"}, {"reward_red", "reward_small"}, set())
            assert parts[number] <= rows[0].keys() and (number == 2) != ("eval_small" in rows[0])
            if number < 2:  # the first reward writes into its pictures; the other does not see it
                assert float(rows[0]["eval_small"]) < -1
            card = next(path.glob("pipeline/README.md")).read_text()
            assert folder not in card and "mine.py:" in card
            lines, wrong = called(folder, "--resume", f"runs/{number}", "--num_epochs", "2")
            assert wrong is None and any(line.startswith("epoch   2") for line in lines), wrong
            assert len(list(csv.DictReader((path / "metrics.csv").open()))) == 2
        with redirect_stderr(io.StringIO()) as said:
            wrong = called(folder, *flags, "--reward", "mine.py:broken", "--eval_rewards", "None")
        assert "in broken\n" in said.getvalue() and "could not convert" in wrong[1]
        wrong = called(folder, *flags, "--reward", "mine.py:rednes")[1]
        assert "no 'rednes' in mine.py. Did you mean 'redness'" in wrong
        wrong = called(folder, *flags, "--reward", "mine.py:OWN", "--name", "never")[1]
        assert wrong.startswith("ddpo_train: the reward 'mine.py:OWN': there is no 'OWN'")


def test_a_reward_gets_the_facts_of_its_prompts(flags, tmp_path):
    "Each image its own, whatever the order; in a sum, watched, and when the run goes on."
    words = {"a fox": 3, "an owl": 5, "a bee": 7}
    (tmp_path / "prompts.jsonl").write_text("\n".join(
        json.dumps({"prompt": prompt, "count": count}) for prompt, count in words.items()))
    (tmp_path / "mine.py").write_text(f"WORDS = {words}\n" + """
def count(images, prompts, facts):
    assert [fact.pop("count") for fact in facts] == [WORDS[prompt] for prompt in prompts]
    return [WORDS[prompt] for prompt in prompts]
""")
    settings = [*flags, "--num_epochs=1", "--samples_per_prompt=1", "--reward",
                "mine.py:count:1,jpeg_compressibility:1", "--eval_rewards=mine.py:count"]
    lines, wrong = called(tmp_path, *settings, "--prompts=prompts.jsonl", "--name=x")
    assert wrong is None, wrong
    lines, wrong = called(tmp_path, "--resume=runs/x", "--num_epochs=2")
    assert wrong is None, wrong
    rows = list(csv.DictReader((tmp_path / "runs" / "x" / "metrics.csv").open()))
    assert all(3 <= float(row["reward_count"]) == float(row["eval_count"]) <= 7 for row in rows)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a fox", "count": 4}')
    wrong = called(tmp_path, "--resume=runs/x", "--num_epochs=3")[1]
    assert "began with other prompts than the file has now" in wrong
    wrong = called(tmp_path, *settings, "--best_by=beauty", "--eval_every=1")[1]
    assert "best_by 'beauty' is no score of this run, which has count, reward" in wrong
    assert "Nothing was written" in wrong
    wrong = called(tmp_path, *settings, "--prompts=emoji_animal_prompts")[1]
    assert "the reward count has three arguments, and so wants facts" in wrong
    assert "--prompts file.jsonl" in wrong and "Nothing was written" in wrong


def test_facts_from_python():
    "The prompt function has them, or the reward is given them."
    def count(images, prompts, facts): return [fact["count"] for fact in facts]
    def either(images, prompts, facts=None): return [2.0 if facts is None else facts[0]["count"]]
    def prompts(): return "a fox"
    config = make_config("emoji", **SMALL | dict(num_epochs=1, eval_rewards=None))
    with pytest.raises(ValueError, match="wants facts about the prompts, of which there are none"):
        train(config, twin("sd2"), prompts, count)
    known = {"a fox": {"count": 2}}
    for reward_fn in (count, WithFacts(count, known)):
        prompts.facts = known if reward_fn is count else {}
        row, = train(config, twin("sd2"), prompts, reward_fn)
        assert row["reward_mean"] == 2
    with pytest.raises(ValueError, match=r"put WithFacts\(count, facts\) in its place"):
        WeightedSum({"count": count}, {"count": 1.0})
    image = np.zeros((1, 8, 8, 3), np.uint8)
    for facts, expected in (({}, 2.0), ({"a fox": {"count": 7}}, 7)):
        prompts.facts = facts
        assert informed(either, prompts)(image, ["a fox"]) == [expected]
    asked = []
    class Smooth:
        def __call__(self, images, prompts, facts): return [0.0] * len(prompts)
        def differentiable(self, images, prompts, facts):
            asked.append(facts)
            return images.mean((1, 2, 3))
    WithFacts(Smooth(), known).differentiable(torch.zeros(1, 3, 8, 8), ["a fox"])
    assert asked == [[{"count": 2}]]
    with pytest.raises(ValueError, match="count asks for facts about the prompt 'an owl'"):
        WithFacts(count, known)(image, ["an owl"])


def test_a_file_is_known_by_path_and_content(tmp_path):
    "Saved again or changed between making and running; two files of one name; a class's object."
    text = ("def f(images, prompts): return images.mean((1, 2, 3))\n"
            "class C:\n    def __call__(self, images, prompts): return f(images, prompts)\n"
            "x = C()\n")
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.py").write_text(text + f"mark = {folder!r}\n")
    a, b = f"{tmp_path}/a/r.py", f"{tmp_path}/b/r.py"
    both, alone = make_reward(f"{a}:x,{b}:f"), make_reward(f"{a}:C")
    def name(reward_fn, **changes):
        return what_ran(make_config("emoji", **changes), twin("sd2"), a_fox, reward_fn).reward
    for change in (lambda: None, lambda: os.utime(a, (1, 1)), lambda: Path(a).write_text(
            text + "raise ValueError('it must not be run again')"), lambda: Path(a).unlink()):
        change()
        assert name(both, reward=f"{a}:x,{b}:f") == f"{a}:x:1,{b}:f:1"
        assert name(both.rewards["f"]) == f"{b}:f" and name(alone) == f"{a}:C"
    one, two = (sys.modules[type(part).__module__ if number == 0 else part.__module__]
                for number, part in enumerate(both.rewards.values()))
    assert (one.mark, two.mark) == ("a", "b")


def test_planning_runs_nobodys_code(flags, tmp_path):
    "And running says whose it runs."
    (tmp_path / "theirs.py").write_text(
        "open('it_ran', 'w')\ndef f(images, prompts): return images.mean((1, 2, 3))\n")
    (tmp_path / "theirs.yaml").write_text("reward: theirs.py:f\neval_rewards:\nnum_epochs: 1\n")
    lines, wrong = called(tmp_path, *flags, "--config", "theirs.yaml", "--plan")
    assert not wrong and not (tmp_path / "it_ran").exists()
    assert any("in all, without what theirs.py:f may hold" in line for line in lines)
    lines, wrong = called(tmp_path, *flags, "--config", "theirs.yaml")
    assert wrong is None and (tmp_path / "it_ran").exists()
    assert f"running the code in {tmp_path}/theirs.py:f" in lines


def test_a_reward_that_goes_away(flags, tmp_path):
    "What is done is kept, the error and its traceback are shown, and the run goes on from there."
    (tmp_path / "mine.py").write_text("""
import os
count = []
def judge(images, prompts):
    count.append(1)
    if len(count) == 8 and not os.path.exists("back"): raise ConnectionError("nobody answers")
    return images.mean((1, 2, 3))
def none(images, prompts): return None
""")
    mine = [*flags, "--num_epochs=4", "--eval_rewards=None", "--save_every=100"]
    with redirect_stderr(io.StringIO()) as said:
        wrong = called(tmp_path, *mine, "--reward=mine.py:judge", "--name=x")[1]
    assert "in judge\n" in said.getvalue() and wrong.startswith("ddpo_train: nobody answers. ")
    assert "To go on: ddpo_train --resume runs/x" in wrong
    checkpoint, = (tmp_path / "runs" / "x" / "checkpoints").iterdir()
    assert checkpoint.name == "00002-00001"  # two epochs, and a batch of two
    (tmp_path / "back").write_text("")
    assert called(tmp_path, "--resume=runs/x")[1] is None
    assert called(tmp_path, *mine, "--reward=mine.py:judge", "--name=whole")[1] is None
    x, whole = (list(csv.DictReader((tmp_path / "runs" / name / "metrics.csv").open()))
                for name in ("x", "whole"))
    assert [row | {"seconds": 0} for row in x] == [row | {"seconds": 0} for row in whole]
    wrong = called(tmp_path, *mine, "--reward=mine.py:none", "--name=y")[1]
    assert wrong.startswith("ddpo_train: none must return 2 numbers") and "NoneType" in wrong


def test_prompts_are_drawn_as_they_are(flags, tmp_path):
    "Signs that mean mathematics to matplotlib, in titles, labels and file names."
    odd = ["a $100% fee", r"$_$ \frac{fox", "x^{2 and $ a_{b 50% & #"]
    (tmp_path / "odd.txt").write_text("\n".join(odd))
    (tmp_path / "m$_.py").write_text("red = lambda images, prompts: images.mean((1, 2, 3))\n")
    assert called(tmp_path, *flags, "--prompts=odd.txt", "--reward=m$_.py:red", "--name=x",
                  "--eval_rewards=None", "--num_epochs=1", "--num_eval_samples=8")[1] is None
    assert {row["prompt"] for row in csv.DictReader(
        (tmp_path / "runs" / "x" / "evaluation.csv").open())} == set(odd)
    for image, title in zip(np.zeros((2, 1, 8, 8, 3), np.uint8), ("$_$ cat", "a \\$ b")):
        figure = image_grid(image, [title])
        figure.canvas.draw()
        drawn = figure.axes[0].title
        assert drawn.get_text() == title and not drawn.get_parse_math()


def test_a_warning_is_given_once(tmp_path):
    "Of a flow model's noise, before the first pictures."
    done = ddpo_train(tmp_path, "--pipeline=emoji_flow", "--eta=5", "--num_epochs=1",
                      "--num_samples_per_epoch=2", "--samples_per_prompt=1", "--num_timesteps=2",
                      "--num_eval_samples=2")
    assert done.returncode == 0 and done.stderr.count("so much noise") == 1, done.stderr


def test_what_plain_diffusers_draws_is_measured():
    "The same pictures as a pipeline draws that was saved and opened; LoRA over half a base, too."
    prompts, pipe = ["a fox", "an owl", "a cat"], twin("sd2")
    config = make_config("emoji", **SMALL | dict(sample_batch_size=2))
    seen = []
    def keep(images, prompts):
        seen.extend(images)
        return images.mean((1, 2, 3))
    value = plain_reward(config, pipe, prompts, keep)
    with TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        plain = StableDiffusionPipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    drawn = plain(prompts, generator=noise_sources(0, EVALUATION, range(3)), height=32, width=32)
    theirs = np.stack([np.asarray(image) for image in drawn.images]).astype(int)
    assert abs(np.stack(seen) - theirs).max() <= 1
    assert value == pytest.approx(theirs.mean(), abs=0.1)
    for unet, words in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16),
                        (torch.bfloat16, torch.float16), (torch.float64, torch.float32)):
        pipe.unet.to(unet), pipe.text_encoder.to(words)
        assert plain_reward(config, pipe, prompts, keep) == pytest.approx(value, abs=3)


def test_ctrl_c_before_anything_is_imported():
    "The command as it is installed, stopped while it still imports: a sentence, no traceback."
    command = [sys.executable, "-c", "from ddpo_scratch.command.door import main; main()"]
    with TemporaryDirectory() as place:
        early = subprocess.Popen(command, cwd=place, text=True, stderr=subprocess.PIPE)
        time.sleep(1.5)
        early.send_signal(signal.SIGINT)
        _, said = early.communicate(timeout=60)
    assert early.returncode == 130 and "Traceback" not in said and said.endswith(
        "\nddpo_train: stopped by Ctrl-C. Nothing was written.\n"), (early.returncode, said)


def test_ctrl_c_ends_in_one_sentence(flags, tmp_path):
    "A real process, a real signal in the second epoch: what is kept is said, and no half is left."
    run = Started(tmp_path, *flags, "--num_epochs", "1000", "--name", "long")
    folder = tmp_path / "runs" / "long"
    assert run.until(lambda: "\nepoch   2" in run.said())
    assert (folder / "UNFINISHED.txt").read_text().startswith("This run is still going on")
    ended = run.end(signal.SIGINT)
    assert ended.returncode == 130 and "Traceback" not in ended.stderr
    checkpoint, = (folder / "checkpoints").iterdir()
    assert last_line(ended) == (
        "ddpo_train: stopped by Ctrl-C. runs/long keeps before.png, checkpoints, config.yaml, "
        "metrics.csv, progress.gif, progress.png, report.html, reward_curve.png, versions.yaml. "
        f"runs/long/checkpoints/{checkpoint.name}/pipeline is what was trained, for diffusers. "
        "To go on: ddpo_train --resume runs/long")
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "UNFINISHED.txt", "before.png", "checkpoints", "config.yaml", "metrics.csv",
        "progress.gif", "progress.png", "report.html", "reward_curve.png", "versions.yaml"}
    assert "ended by Ctrl-C." in (folder / "UNFINISHED.txt").read_text()
    StableDiffusionPipeline.from_pretrained(checkpoint / "pipeline")


class Hub(BaseHTTPRequestHandler):
    "As much of the hub's protocol as an upload needs, in memory."
    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        body, site = self.rfile.read(length), self.server
        if self.headers["Authorization"] != "Bearer hf_right":
            return self.answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/repos/create":
            site.made.append(json.loads(body))
            return self.answer(200, {"url": f"{site.url}/me/foxes"})
        if site.full: return self.answer(403, {"error": "no room for foxes"})
        if self.path.endswith("/preupload/main"):
            return self.answer(200, {"files": [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]]})
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    site.files[line["value"]["path"]] = b64decode(line["value"]["content"])
            return self.answer(200, {"commitOid": "0" * 40, "success": True,
                                     "commitUrl": f"{site.url}/me/foxes/commit/1"})
        self.answer(200, {"errors": [], "warnings": []})  # of the card's head

    def do_GET(self):
        if self.path.endswith("/auth-check/write"):
            return self.answer(403 if self.server.foreign else 200, {})
        self.answer(404, {"error": "not here"})

    def answer(self, status, content):
        content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args): pass


def test_the_result_goes_to_the_hub(flags):
    "To a server that speaks the protocol: every byte; no token, no network, a hub that goes away."
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as site, TemporaryDirectory() as place:
        site.url, site.made, site.files, site.full, site.foreign = (
            f"http://127.0.0.1:{site.server_port}", [], {}, False, False)
        Thread(target=site.serve_forever, daemon=True).start()
        def run(name, token="hf_right", url=site.url):
            with patch("ddpo_scratch.command.card.HfApi", partial(HfApi, url, token)):
                return called(place, *flags, "--name", name, "--lora_rank", "2",
                              "--push_to_hub", "me/foxes")
        lines, wrong = run("first")
        assert wrong is None and lines[-1] == f"uploaded: {site.url}/me/foxes/commit/1"
        made = site.made[0]
        assert (made["name"], made["organization"]) == ("foxes", "me")
        assert made.get("private") or made.get("visibility") == "private"
        path = Path(place) / "runs" / "first" / "lora"
        assert site.files == {file.name: file.read_bytes() for file in path.iterdir()}
        assert "README.md" in site.files and len(site.files) == 3
        nowhere = "http://127.0.0.1:9"
        for wrong, reason in ((dict(token="hf_wrong"), "401"), (dict(url=nowhere), ""),
                              (dict(), "403")):
            site.foreign = not wrong
            said = run("never", **wrong)[1]
            assert said.startswith("ddpo_train: 'me/foxes' cannot be written to on the hub") and (
                reason in said and said.endswith("Nothing was written.")), said
        site.foreign = False
        assert not (Path(place) / "runs" / "never").exists()
        site.full = True
        said = run("second")[1]
        assert said.startswith("ddpo_train: runs/second/lora could not be uploaded (`hf upload "
                               "me/foxes runs/second/lora` does it later): ") and "403" in said
        assert said.endswith("The run itself has come to its end, and is whole in runs/second.")
        site.shutdown()


def test_each_sentence_ends_once(tmp_path):
    "A wrong setting: what is wrong, and that nothing was written; processes say which one it is."
    for flag, end in (("--eta=0", "need no noise.) Nothing was written."),
                      ("--reward=beauty", ". Nothing was written."),
                      ("--lora_from=nowhere", ". Nothing was written.")):
        wrong = called(tmp_path, flag)[1]
        assert wrong.endswith(end) and not re.search(r"[.!?…][)]?[.]", wrong), wrong
        with patch.dict(os.environ, RANK="1"): second = called(tmp_path, flag)[1]
        assert second == wrong.replace(": ", ", in process 1: ", 1).removesuffix(
            " Nothing was written.")
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(os.name != "posix", reason="limits of a process are POSIX's")
def test_no_room_ends_in_one_sentence(flags, tmp_path):
    "Files above 0.2 MB cannot be written: what there is is said, no half of a pipeline stays."
    said = last_line(ddpo_train(tmp_path, *flags, "--name", "full", largest=200_000))
    assert said.startswith("ddpo_train: ") and "the fine-tuned weights are not saved" in said
    assert "metrics.csv" in said and "No checkpoint was written" in said
    left = {path.name for path in (tmp_path / "runs" / "full").iterdir()}
    assert "UNFINISHED.txt" in left and not any(name.startswith("pipeline") for name in left)
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("0*"))

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "runs").write_text("a file where a folder should be")
    said = last_line(ddpo_train(tmp_path / "elsewhere", *flags))
    assert said.startswith("ddpo_train: [Errno") and said.endswith("Nothing was written.")


def test_a_ruined_model_is_neither_praised_nor_saved(flags, tmp_path):
    "A learning rate of a million: one line, no verdict, no pipeline."
    done = ddpo_train(tmp_path, *flags, "--lr", "1e6", "--name", "mad")
    assert "learning rate" in last_line(done) and "fresh images" not in done.stdout
    left = {path.name for path in (tmp_path / "runs" / "mad").iterdir()}
    assert "UNFINISHED.txt" in left and not {"pipeline", "after.png"} & left


def test_star_import_gives_the_main_names():
    "What DESIGN.md and the chapters promise, and no helpers."
    names = {}
    exec("from ddpo_scratch.all import *", names)
    public = {name for name in names if not name.startswith("_")}
    assert public >= {
        "load_pipeline", "imagenet_animal_prompts", "emoji_animal_prompts", "PromptDataset",
        "sd_sample", "decoding_fn", "calculate_log_probs", "Policy", "MLP",
        "load_aesthetic_model_weights", "aesthetic_model_normalize", "aesthetic_scoring",
        "AestheticReward", "JPEGCompressibility", "JPEGIncompressibility", "make_reward",
        "PerPromptStatTracker", "compute_loss", "clipped_surrogate", "DDPOConfig", "DDPOTrainer",
        "TrainerConfig", "make_config",
        "make_prompt_fn", "sample_and_calculate_rewards", "train", "evaluate", "fresh_prompts",
        "verdict", "run_training", "load_classifier", "Scorer", "PickScore", "CLIPScore",
        "HPSScore", "VisionJudge"}
    assert not public & {"fit", "blur", "parse", "differences", "write_file", "csv_text", "augment",
                         "check_field", "to_array", "prepare", "main", "COUNTS", "TRAINING",
                         "run_folder", "check_run_name", "LORA_TARGETS", "text_of", "Command"}
    assert len(public) < 80, sorted(public)
