"""Tests of chapter `nbs/practice/26_processes.ipynb`."""
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import ddpo_scratch.trainer.processes as module
import ddpo_scratch.trainer.sharding as sharding
from ddpo_scratch.command.run import plain_reward
from ddpo_scratch.models.families import network_of
from ddpo_scratch.scorers.names import WeightedSum
from ddpo_scratch.trainer.evaluation import evaluate, fresh_prompts
from ddpo_scratch.trainer.lora import LORA_FILE, save_lora
from ddpo_scratch.trainer.presets import make_config
from ddpo_scratch.trainer.processes import (
    buckets,
    from_the_first,
    gathered,
    gathered_tensors,
    my_part,
    processes,
    sum_gradients,
)
from ddpo_scratch.trainer.sharding import check_divided, check_shared, shard_weights
from ddpo_scratch.trainer.trainer import TrainingState
from ddpo_scratch.workshop.twins import TWINS
from helpers import Bluish, Started, as_flags, ddpo_train, flat, forks, opened, train


def ranks(count):
    "What a launcher tells each of so many processes on this machine."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
                 LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            for rank in range(count)]


def with_rank(environment, errors, function, *args):
    "What a child does; its stderr goes to a file."
    os.environ.update(environment)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    function(*args)


def launch(count, function, *args):
    "The function in so many processes: exit codes, and what they said on stderr."
    with TemporaryDirectory() as room:
        files = [Path(room) / str(rank) for rank in range(count)]
        children = [forks().Process(target=with_rank, daemon=True,
                                    args=(environment, str(file), function, *args))
                    for environment, file in zip(ranks(count), files)]
        for child in children: child.start()
        for child in children:
            child.join(300)
            child.kill()
        return [child.exitcode for child in children], [file.read_text("utf-8") for file in files]


def one_and_two(function, source, folder, kind=""):
    "What the function leaves with one process and with two: three results."
    for count in (1, 2):
        codes, said = launch(count, function, source, str(folder))
        assert codes == [0] * count, said
    return [torch.load(folder / f"{kind}{name}.pt", weights_only=True)
            for name in ("1-0", "2-0", "2-1")]


def brightness(images, prompts):
    return images.reshape(len(images), -1).mean(1)


def run(source, lora_rank):
    config = make_config(
        "emoji", num_epochs=3, num_samples_per_epoch=11, samples_per_prompt=1, batch_size=5,
        sample_batch_size=4, num_timesteps=4, lr=1e-3, beta=0.01, micro_batch_size=5,
        img_size=32, lora_rank=lora_rank, timestep_fraction=1.0 if lora_rank else 0.75,
        which_steps="3,0" if lora_rank else None)
    pipe, names, seen = opened(source).to(torch.float64), iter(range(1000)), []
    state = TrainingState(config, pipe)
    def on_batch():
        if state.rollout.advantages is not None: seen.append(state.rollout.advantages.clone())
    history = train(config, pipe, lambda: f"animal {next(names) % 5}", brightness,
                    on_batch=on_batch, state=state)
    images, rewards = evaluate(config, pipe, [f"animal {i}" for i in range(7)], brightness)
    weights = torch.cat([weight.detach().flatten() for weight in state.weights])
    return history, seen, weights, rewards, torch.from_numpy(images)


def runs(source, folder):
    "All weights, then LoRA."
    place = f"{folder}/{processes().num_processes}-{processes().process_index}.pt"
    torch.save([run(source, 0), run(source, 2)], place)


@pytest.mark.slow
@pytest.mark.parametrize("model", ("sd2", "sdxl"))
def test_the_number_of_processes_does_not_show(model, twins, tmp_path):
    """Rewards, advantages, weights, evaluation: one process and two, uneven shares; LoRA too.

    In float64 the order of sums does not show, so the two have to agree, the weights to 0.0001."""
    results = one_and_two(runs, twins[model], tmp_path)
    for one, first, second in zip(*results):  # all weights, then LoRA
        for two in (first, second):
            for ours, theirs in zip(one[0], two[0], strict=True):
                for name in set(ours) - {"seconds"}:
                    assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7), name
            assert len(one[1]) == len(two[1]) == 9  # updates
            for ours, theirs in zip(one[1:], two[1:]):
                ours, theirs = (torch.stack(x) if isinstance(x, list) else x.double()
                                for x in (ours, theirs))
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        assert torch.equal(first[2], second[2])  # the two have the same weights to the last bit
        assert one[0][0]["clip_fraction"] > 0 and one[0][-1]["ref_kl"] > 0


def run_in_float64(config, source, folder, reward, **others):
    "Leaves rows and weights in a file of the algorithm, the number of processes, and this one."
    pipe, names = opened(source).to(torch.float64), iter(range(1000))
    history = train(config, pipe, lambda: f"animal {next(names) % 5}", reward, **others)
    name = f"{config.algorithm}-{processes().num_processes}-{processes().process_index}.pt"
    torch.save([history, flat(pipe)], f"{folder}/{name}")


def draft(source, folder):
    "Through random steps, with a penalty, views, and a sum whose units are not known yet."
    config = make_config("emoji", algorithm="draft", **FEW | dict(
        num_samples_per_epoch=7, lr=1e-3, beta=0.01, draft_steps=2, draft_random=True,
        draft_views=2, micro_batch_size=2, num_timesteps=3))
    reward = WeightedSum({"blue": Bluish(), "other": Bluish()}, {"blue": 1.0, "other": 0.5})
    run_in_float64(config, source, folder, reward, eval_rewards={"bright": brightness})


def nft(source, folder):
    "With an old policy, a penalty, an average of the weights; uneven shares."
    config = make_config("emoji", algorithm="nft", **FEW | dict(
        num_epochs=3, num_samples_per_epoch=7, lr=1e-3, beta=0.01, old_decay=0.5, ema_decay=0.5,
        noise_levels=2, micro_batch_size=2, num_timesteps=3))
    run_in_float64(config, source, folder, brightness)


def dpo(source, folder):
    "Pairs in uneven shares, one process with images of a prompt that the other has, too."
    config = make_config("emoji", algorithm="dpo", **FEW | dict(
        num_epochs=3, num_samples_per_epoch=9, samples_per_prompt=3, batch_size=6, lr=1e-3,
        beta=500.0, noise_levels=2, micro_batch_size=2, num_timesteps=3))
    run_in_float64(config, source, folder, brightness)


@pytest.mark.slow
@pytest.mark.parametrize("run_of", (draft, nft, dpo))
def test_the_number_of_processes_does_not_show_in_others(run_of, twins, tmp_path):
    "One process and two: the same rows, and the same weights to 0.00001."
    one, first, second = one_and_two(run_of, twins["sd2"], tmp_path, f"{run_of.__name__}-")
    assert torch.equal(first[1], second[1])
    torch.testing.assert_close(one[1], first[1], rtol=0, atol=1e-5)
    for ours, theirs in zip(one[0], first[0], strict=True):
        assert ours | {"seconds": 0} == pytest.approx(theirs | {"seconds": 0}, rel=1e-5)


def divided(source, folder):
    "With an adapter, a penalty and checkpointing; two processes divide the frozen weights."
    config = make_config(
        "emoji", num_epochs=2, num_samples_per_epoch=8, samples_per_prompt=1, batch_size=4,
        sample_batch_size=4, num_timesteps=4, lr=1e-3, beta=0.01, micro_batch_size=4, img_size=32,
        lora_rank=2, gradient_checkpointing=True, cfg=2.0, eta=0.2,
        shard_weights=processes().num_processes == 2)
    pipe, names = opened(source), iter(range(1000))
    def held(): return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for name, p in
                           network_of(pipe).named_parameters() if "lora_" not in name)
    whole = held()
    if config.shard_weights: shard_weights(pipe, torch.device("cpu"))
    state = TrainingState(config, pipe)
    history = train(config, pipe, lambda: f"animal {next(names) % 5}", brightness, state=state)
    images, rewards = evaluate(config, pipe, ["animal 1"], brightness)  # one process has none
    plain = plain_reward(config, pipe, ["animal 1"], brightness)
    save_lora(pipe, f"{folder}/lora-{processes().num_processes}-{processes().process_index}")
    weights = torch.cat([weight.detach().flatten() for weight in state.weights])
    name = f"{processes().num_processes}-{processes().process_index}.pt"
    torch.save([history, weights, whole, held(), rewards, plain], f"{folder}/{name}")


@pytest.mark.parametrize("model", [
    "sd3", *(pytest.param(name, marks=pytest.mark.slow) for name in TWINS
             if name not in ("sd3", "sd3-without-t5", "flux-schnell", "pixart"))])
def test_divided_weights_give_the_same_run(model, twins, tmp_path):
    "Each process holds about half; rows, adapter and its file are those of one process."
    one, first, second = one_and_two(divided, twins[model], tmp_path)
    assert torch.equal(first[1], second[1])
    torch.testing.assert_close(one[1], first[1], rtol=0, atol=1e-4)
    for ours, theirs in zip(one[0], first[0], strict=True):
        assert ours | {"seconds": 0} == pytest.approx(theirs | {"seconds": 0}, rel=2e-3, abs=1e-6)
    for two in (first, second):
        assert two[4].tolist() == pytest.approx(one[4].tolist(), abs=0.5)  # of 255
        assert two[5] == pytest.approx(one[5], abs=0.5)
    assert one[2] == one[3] == first[2] == first[3] + second[3] and first[3] < 0.6 * one[2]
    ours, theirs = (load_file(tmp_path / name / LORA_FILE) for name in ("lora-1-0", "lora-2-0"))
    assert ours.keys() == theirs.keys()
    for name in ours: torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4)


def by_chance(images, prompts):
    return [random.random() for _ in prompts]


def unseeded(source, folder):
    "Prompts that nobody can draw again, and a reward that uses up random numbers."
    config = make_config("emoji", **FEW, lr=1e-3)
    asked, chance, pipe = [], random.SystemRandom(), opened(source)
    prompts = fresh_prompts(config, lambda: str(chance.random()))
    def drawn():
        asked.append(f"{chance.random()} {random.random()}")
        return asked[-1]
    history = train(config, pipe, drawn, by_chance)
    torch.save([prompts, len(asked), [row["max_log_ratio"] for row in history], flat(pipe)],
               f"{folder}/{processes().process_index}.pt")


def test_prompts_come_from_one_process(twins, tmp_path):
    "So pictures and prompts belong together, whatever the prompt function and the reward draw."
    codes, said = launch(2, unseeded, twins["sd2"], str(tmp_path))
    assert codes == [0, 0], said
    first, second = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2))
    assert first[0] == second[0] and len(set(first[0])) == FEW["num_eval_samples"]
    assert (first[1], second[1]) == (12, 0)
    assert max(first[2] + second[2]) < 1e-5
    assert torch.equal(first[3], second[3])


FEW = dict(num_epochs=2, num_samples_per_epoch=6, samples_per_prompt=1, batch_size=4,
           num_timesteps=2, num_eval_samples=5, img_size=32)


@pytest.mark.slow
def test_one_command_leaves_one_folder(twins, tmp_path):
    "Of two processes, written by one; a single one may go on with it."
    flags = as_flags(FEW | dict(pipeline=twins["sd2"]))
    started = [Started(tmp_path, *flags, **environment) for environment in ranks(2)]
    first, second = [process.end() for process in started]
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout.count("epoch   2") == 1 and first.stdout.count("fresh images") == 1
    assert "epoch" not in second.stdout and "fresh" not in second.stdout
    folder, = (tmp_path / "runs").iterdir()
    assert folder.name == "sd2-animal-1" and not (folder / "UNFINISHED.txt").exists()
    grown = Started(tmp_path, "--resume", str(folder), "--num_epochs", "3").end()
    assert grown.returncode == 0 and "epoch   3" in grown.stdout, grown.stderr


FAILING = """
from ddpo_scratch.trainer.processes import gathered, processes
for i in range(3):
    gathered([i])
    if i == 1 and processes().process_index == 1: raise RuntimeError("the ink has run out")
"""


def fails():
    exec(FAILING, {})


def test_a_process_that_dies_ends_the_run():
    "On all: the others do not wait for it."
    codes, (first, second) = launch(2, fails)
    assert codes == [1, 1] and "RuntimeError: the ink has run out" in second
    assert "ink" not in first and "gather_object" in first, first  # it was waiting for the other


LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m",
            "ddpo_scratch"]


def torchrun(folder, *flags):
    "The command in two processes of PyTorch's own launcher: what it printed."
    done = subprocess.run(
        [*LAUNCHER, *flags], capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_pytorchs_own_launcher(twins, tmp_path):
    """Divided weights, Ctrl-C: one last sentence, from the first process, with the command that
    goes on; it does, in one folder, and a single process adds an epoch."""
    flags = as_flags(FEW | dict(
        pipeline=twins["sd2"], lora_rank=2, num_samples_per_epoch=8, batch_size=4, num_epochs=6,
        micro_batch_size=4, save_every=1, eval_every=3))
    run = subprocess.Popen([*LAUNCHER, *flags, "--shard_weights"], cwd=tmp_path, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in run.stdout:
        if line.startswith("epoch   2"): break
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=120)
    last, = (line for line in said.splitlines() if line.startswith("ddpo_train"))
    assert re.search(r"by (Ctrl-C|SIGTERM, which .* after Ctrl-C)\. runs/sd2-animal-1 ", last), last
    command = "torchrun --nproc_per_node 2 -m ddpo_scratch --resume runs/sd2-animal-1"
    assert last.endswith(f"To go on: {command}")
    said = torchrun(tmp_path, *command.split()[-2:])
    assert said.count("epoch   6") == 1 and said.count("fresh images") == 1
    folder, = (tmp_path / "runs").iterdir()
    assert folder.name == "sd2-animal-1" and not (folder / "UNFINISHED.txt").exists()
    done = ddpo_train(tmp_path, f"--resume={folder}", "--num_epochs=7", "--no-shard_weights")
    assert done.returncode == 0, done.stderr
    assert (folder / "metrics.csv").read_text().count("\n") == 8


def test_what_divided_weights_ask_for():
    "Told by the configuration, by the command, and by the trainer."
    for changes in (dict(), dict(lora_rank=2, micro_batch_size=None), dict(micro_batch_size=4)):
        with pytest.raises(ValueError, match="set lora_rank and micro_batch_size, too"):
            make_config("emoji", shard_weights=True, **dict(lora_rank=0) | changes)
    some = dict(lora_rank=2, micro_batch_size=4, num_samples_per_epoch=8, batch_size=4,
                samples_per_prompt=1)
    for other in (dict(compile=True), dict(load_in_4bit=True)):
        with pytest.raises(ValueError, match="shard_weights does not work with compile"):
            make_config("emoji", shard_weights=True, **some | other)
    config, whole = make_config("emoji", shard_weights=True, **some), torch.nn.Linear(2, 2)
    divided = object.__new__(type("Divided", (FSDPModule,), {}))
    with pytest.raises(ValueError, match="and there is one: start them with torchrun"):
        check_shared(config)
    with pytest.raises(ValueError, match="the network is whole: call shard_weights"):
        check_divided(config, whole)
    with pytest.raises(ValueError, match="shard_weights is False, and the network is divided"):
        check_divided(replace(config, shard_weights=False), divided)
    check_divided(config, divided)
    dpo = dict(algorithm="dpo", samples_per_prompt=2, beta=1.0)
    with patch.object(sharding, "processes", lambda: SimpleNamespace(num_processes=4)):
        check_shared(config)
        check_shared(replace(config, num_samples_per_epoch=16, batch_size=8, **dpo))
        check_shared(replace(config, batch_size=6))  # two updates of four images
        for changes, says in (
                (dict(num_samples_per_epoch=20, batch_size=16),
                 "num_samples_per_epoch 20 and batch_size 16 make updates of 10 images"),
                (dict(num_samples_per_epoch=10), "updates of 3 and 4 images"),
                (dict(num_samples_per_epoch=16, **dpo), "updates of 2 pairs")):
            with pytest.raises(ValueError, match=says): check_shared(replace(config, **changes))
        with pytest.raises(ValueError, match="4 processes cannot share 3 samples"):
            check_shared(replace(config, num_samples_per_epoch=3, shard_weights=False))


def exchanges(folder):
    "Batches of different sizes and kinds; one process has two of them, and the last none."
    rank, sent, real = processes().process_index, [], module.gather_object
    def noted(items):
        sent.append(len(pickle.dumps(items)))
        return real(items)
    def batch(number):
        g = torch.Generator().manual_seed(number)
        return [{"reward": torch.rand(2 + number, generator=g, dtype=torch.float64)},
                torch.rand(3, 400, 2 + number, 5, generator=g).transpose(1, 2),
                torch.zeros(0, 3), torch.arange(number)]
    mine = {0: [0, 1], 1: [2], 2: []}[rank]
    with patch.object(module, "gather_object", noted):
        found = gathered_tensors([batch(number) for number in mine])
    for ours, theirs in zip(found, map(batch, range(3))):
        assert torch.equal(ours[0]["reward"], theirs[0]["reward"])
        assert all(map(torch.equal, ours[1:], theirs[1:]))
    assert len(found) == 3 and max(sent) < 3000, sent  # shapes alone; a batch has over 60 kB
    weights = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 4, 50, 2, 7)]
    for number, weight in enumerate(weights):
        if (number, rank) != (1, 0): weight.grad = torch.full_like(weight, 10.0**rank + number)
    with patch.object(module.buckets, "__defaults__", (8,)): sum_gradients(weights)
    for number, weight in enumerate(weights):
        assert (weight.grad == 111 + 3 * number - (number == 1) * 2).all(), (number, weight.grad)


def test_tensors_are_not_sent_as_objects(tmp_path):
    "Three processes; a gradient that one of them lacks counts as 0."
    codes, said = launch(3, exchanges, str(tmp_path))
    assert codes == [0, 0, 0], said


def test_buckets():
    "In order, none larger than allowed but for a single tensor."
    sizes = [3, 4, 2, 50, 1, 7, 1]
    found = buckets([torch.zeros(size) for size in sizes], 8)
    assert [[x.numel() for x in bucket] for bucket in found] == [[3, 4], [2], [50], [1, 7], [1]]
    assert buckets([]) == []


def test_alone():
    "One process: everything is its part, and nothing is exchanged."
    assert processes().num_processes == 1 and processes().is_main_process
    assert my_part(torch.arange(5)).tolist() == list(range(5))
    assert gathered([1, "a"]) == [1, "a"] and from_the_first(lambda: 3) == 3
    weight = torch.nn.Parameter(torch.ones(2))
    sum_gradients([weight])
    assert weight.grad is None
