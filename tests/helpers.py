"""What the tests share: models that are loaded once, rewards, small settings, the command."""
import copy
import functools
import multiprocessing
import os
import signal
import sys
import time
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from ddpo_scratch import sampling
from ddpo_scratch.command.door import main
from ddpo_scratch.command.run import TRAINERS
from ddpo_scratch.models.families import frozen_parts, network_of
from ddpo_scratch.pipelines import ddim_scheduler, is_flow, load_pipeline
from ddpo_scratch.trainer import policy
from ddpo_scratch.trainer.checkpoints import Stopped, load_checkpoint, save_checkpoint
from ddpo_scratch.trainer.policy import Policy, check_policy
from ddpo_scratch.trainer.trainer import TrainingState
from ddpo_scratch.workshop.twins import make_twin

TINY = dict(num_epochs=2, num_samples_per_epoch=7, samples_per_prompt=1, sample_batch_size=3,
            batch_size=4, num_timesteps=3, img_size=32)


@functools.cache
def loaded(make, *names):
    return make(*names)


def a_copy(pipe):
    """Modules and scheduler of its own; the tokenizers are shared, because copying them is slow.

    A test that changes a tokenizer, or counts the warnings about it, loads its own."""
    shared = [part for name, part in pipe.components.items() if "tokenizer" in name]
    return copy.deepcopy(pipe, {id(part): part for part in shared})


def embedded(name="emoji"):
    "The embedded model, as `load_pipeline` gives it to a run on the CPU."
    return a_copy(loaded(load_pipeline, name, "cpu"))


def made_ready(name):
    "A new twin, with what `load_pipeline` changes in a pipeline."
    pipe = make_twin(name)
    if not is_flow(pipe.scheduler): pipe.scheduler = ddim_scheduler(pipe.scheduler.config)
    for part in frozen_parts(pipe): part.requires_grad_(False)
    return pipe


def twin(name):
    "Of `TWINS`, with tens of thousands of weights, as `load_pipeline` gives it to a run."
    return a_copy(loaded(made_ready, name))


def small_rank(name):
    "A rank for the twin's adapter; 0 for PixArt, for whose transformer diffusers has none."
    return 0 if name == "pixart" else 2


def opened(folder):
    "The same from a folder of the fixture `twins`."
    return a_copy(loaded(load_pipeline, folder, "cpu"))


def drawings():
    "Every drawing of the package on a grey ground, with its animal."
    path = files("ddpo_scratch") / "emoji_pictures.npz"
    with np.load(str(path), allow_pickle=False) as data:
        rgba, animals = data["pictures"].astype(float), data["animal"].tolist()
    alpha = rgba[..., 3:] / 255
    return (rgba[..., :3] * alpha + 160 * (1 - alpha)).round().astype(np.uint8), animals


def redness(images, prompts):
    "Red minus the mean of the channels, averaged over the picture, in [-1, 1]."
    return (images[..., 0] / 255.0 - images.mean(-1) / 255.0).mean((1, 2))


class Bluish:
    "A smooth reward, with and without a gradient, that notes what it is asked for."

    def __init__(self):
        self.asked = []

    def differentiable(self, images, prompts):
        self.asked.append((images.shape, list(prompts)))
        rows = torch.linspace(0.2, 1.5, images.shape[-1]).to(images)
        return (torch.sin(3 * images[:, 2] * rows) - images[:, 0] ** 2).mean((1, 2))

    def __call__(self, images, prompts):
        x = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255
        return self.differentiable(x, prompts)


def flat(pipe, part=lambda p: p):
    "All weights of its network in one vector, a copy; or another `part` of each."
    return torch.cat([part(p).detach().flatten() for p in network_of(pipe).parameters()])


def tiny_pipeline():
    "The embedded pipeline with a UNet of a few thousand weights, all in float64: for differences."
    pipe = embedded()
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=2, cross_attention_dim=128,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    for part in (pipe.unet, pipe.vae, pipe.text_encoder): part.double()
    return pipe


def gradient(pipe):
    "All gradients in one vector; they are cleared."
    found = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten()
                       for p in pipe.unet.parameters()])
    pipe.unet.zero_grad(set_to_none=True)
    return found


def moved(pipe, direction):
    "Add `direction` to the weights."
    with torch.no_grad():
        for p, d in zip(pipe.unet.parameters(),
                        direction.split([p.numel() for p in pipe.unet.parameters()])):
            p += d.view_as(p)


def shaken(pipe, by=1e-2):
    "Other weights."
    with torch.no_grad():
        for i, weight in enumerate(pipe.unet.parameters()):
            g = torch.Generator().manual_seed(i)
            weight += by * torch.randn(weight.shape, generator=g, dtype=weight.dtype)


def slope(value, pipe, direction, far):
    "How fast a value of the pipeline rises in that direction of its weights: a difference."
    def at(distance):
        other = copy.deepcopy(pipe)
        moved(other, distance * direction)
        with torch.no_grad(): return value(other).item()
    return (at(far) - at(-far)) / (2 * far)


def rolled_out(config, pipe, reward_fn):
    "A trainer with an epoch's images that are weighed, and what it has kept of each."
    names = iter(["a fox", "an owl"] * 100)
    ours = TRAINERS[config.algorithm](config, pipe, lambda: next(names), reward_fn)
    ours.roll_out(0, lambda: None)
    scores, *kept = zip(*ours.state.rollout.samples)
    ours.weigh({"reward": torch.cat([score["reward"] for score in scores])})
    return ours, [torch.cat(parts, dim=1) for parts in kept]


def batch_gradient(ours, kept, batch):
    "Of those samples or pairs: all weights' in one vector, and what was measured."
    for weight in ours.state.weights: weight.grad = None
    measured = ours.batch_gradient(kept, batch)
    return torch.cat([weight.grad.flatten() for weight in ours.state.weights]), measured


def sample(prompts, pipe, steps, guidance=1.0, eta=1.0, size=(64, 64), generators=None, **others):
    "The policy, and a trajectory for each prompt."
    policy = Policy(pipe, steps, guidance, eta, size, **others)
    check_policy(policy)
    return policy, policy.sample(policy.encode(prompts).to(policy.device), generators)


def train(config, pipe, prompt_fn, reward_fn, *callbacks, eval_rewards={}, state=None, **others):
    "A trainer's whole run: the rows of its epochs."
    return TRAINERS[config.algorithm](
        config, pipe, prompt_fn, reward_fn, eval_rewards, state).train(*callbacks, **others)


def run_until(config, prompt_fn, reward_fn, stop=None, checkpoint=None):
    "A twin's run, perhaps up to that batch, perhaps from a checkpoint: pipeline and state."
    pipe, done = twin("sd2"), []
    state = TrainingState(config, pipe)
    if checkpoint: load_checkpoint(checkpoint, pipe, state)
    def on_batch():
        done.append(1)
        if len(done) == stop: raise Stopped("SIGTERM")
    try:
        train(config, pipe, prompt_fn, reward_fn, on_batch=on_batch, state=state)
    except Stopped: pass
    return pipe, state


def goes_on(run, stops):
    """Of a run (stop=, checkpoint=) that stops after these batches and is resumed: the same weights
    and rows as of a whole one, to the last bit. The names of the checkpoints."""
    (whole, state), names = run(), []
    for stop in stops:
        with TemporaryDirectory() as folder:
            checkpoint = save_checkpoint(Path(folder), 1, *run(stop=stop), {})
            again, resumed = run(checkpoint=checkpoint)
        assert torch.equal(flat(again), flat(whole)), stop
        for ours, theirs in zip(resumed.history, state.history, strict=True):
            assert ours | {"seconds": 0} == theirs | {"seconds": 0}, stop
        names.append(checkpoint.name)
    return names


@contextmanager
def fake_gpu():
    """Tensors know their shape, type and device, and hold no data: one on the wrong device raises.

    The tables of a schedule are numbers, which are looked at; they are made outside."""
    def outside(make):
        def run(*args):
            with unset_fake_temporarily(): return make(*args)
        return run
    ddim, flow = outside(sampling.ddim_schedule), outside(policy.flow_schedule)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with (FakeTensorMode(allow_non_fake_inputs=True),
              patch.multiple(sampling, ddim_schedule=ddim),
              patch.multiple(policy, ddim_schedule=ddim, flow_schedule=flow)): yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@functools.cache
def forks():
    "Makes processes from one that has imported everything; on Windows, from nothing."
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    if os.name == "posix": context.set_forkserver_preload(["ddpo_scratch.command.cli"])
    return context


def as_the_command(flags, folder, out, err, largest, environment):
    "What a child does: its output goes to two files."
    os.environ.update(environment)
    for file, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    if largest:
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    os.chdir(folder)
    sys.argv = ["ddpo_train", *flags]
    main()


class Started:
    "`ddpo_train` in a process of its own, forked from one that has imported everything."

    def __init__(self, folder, *flags, largest=None, **environment):
        self.room = TemporaryDirectory()
        self.files = [f"{self.room.name}/{name}" for name in ("out", "err")]
        self.process = forks().Process(target=as_the_command, daemon=True, args=(
            flags, str(folder), *self.files, largest, environment))
        self.process.start()

    def until(self, condition, seconds=60):
        "Wait for it, or for the end of the process; whether it has come."
        end = time.monotonic() + seconds
        while self.process.is_alive() and time.monotonic() < end:
            if condition(): return True
            time.sleep(0.002)
        return False

    def said(self):
        "On stdout, until now."
        file = Path(self.files[0])
        return file.read_text("utf-8") if file.exists() else ""

    def end(self, number=None, seconds=300):
        "Perhaps after a signal: exit code, and what it has said on stdout and stderr."
        if number and self.process.is_alive(): os.kill(self.process.pid, number)
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"ddpo_train goes on after {seconds} seconds")
        said = [Path(file).read_text("utf-8") for file in self.files]
        self.room.cleanup()
        return Ended(self.process.exitcode, *said)


class Ended(NamedTuple):
    "As subprocess has it."
    returncode: int
    stdout: str
    stderr: str


def ddpo_train(folder, *flags, **options):
    "The command, and its end."
    return Started(folder, *flags, **options).end()


def last_line(done):
    "What the command said last, when it did not succeed; no traceback before it."
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


def as_flags(settings):
    "Settings as the command takes them; of a small model, with the small model's preset."
    preset = ["--preset=emoji"] * ("pipeline" in settings)
    return preset + [f"--{name}={value}" for name, value in settings.items()]


def run_card(folder, base=None):
    "The names that a model card's code leaves: `pipe`, `picture`. An adapter's base is `base`."
    card, found = (Path(folder) / "README.md").read_text("utf-8"), {}
    code = card.split("```python\n")[1].split("```")[0]
    if base: code = code.replace(f"path/to/{Path(base).name}", str(base))
    exec(code.replace("path/to/this/folder", str(folder)), found)
    return found
