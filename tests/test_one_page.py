"""Tests of chapter `nbs/tutorial/00_one_page.ipynb`."""
# The page must not drift away from the library. Given the library's noise, both see the same
# pictures, gradients and weights.
import json
import random
from pathlib import Path

import torch

from ddpo_scratch.config import DDPOConfig
from ddpo_scratch.loss import compute_loss
from ddpo_scratch.training import TRAINING, noise_sources, train
from helpers import embedded, flat


def one_page():
    "The names that the page's algorithm defines, in a namespace of their own."
    path = Path(__file__).parent.parent / "nbs" / "tutorial" / "00_one_page.ipynb"
    notebook = json.loads(path.read_text("utf-8"))
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    algorithm, = [source for source in sources if "\ndef update(" in source]
    names = {}
    exec(algorithm, names)
    return names


def test_the_page_and_the_library_have_one_gradient():
    "One batch, other weights than those that sampled it: ratios and clip are felt."
    page, pipe = one_page(), embedded()
    prompts = ["a fox", "an owl", "a whale", "a frog"]
    words, advantages = page["encode"](prompts), torch.tensor([1.0, -1.0, 2.0, -0.5])
    torch.manual_seed(0)
    xs, log_probs = page["sample"](words)
    log_probs = log_probs + 0.02 * torch.randn(log_probs.shape)
    gradients = []

    class Recorder:
        def step(self): gradients.append(flat(page["pipe"], lambda p: p.grad))
        def zero_grad(self): pass

    page["optimizer"] = Recorder()
    page["update"](xs, log_probs, advantages, words)
    def library(clip):
        pipe.unet.zero_grad()
        compute_loss(xs, log_probs, advantages, 10.0, clip, prompts, pipe, page["steps"], 1.0, 1.0,
                     "cpu")
        return flat(pipe, lambda p: p.grad)
    unclipped, ours = library(1e8), library(page["clip"])
    assert (unclipped - ours).norm() > 0.1 * unclipped.norm()
    torch.nn.utils.clip_grad_norm_(pipe.unet.parameters(), 1.0)
    ours = flat(pipe, lambda p: p.grad)
    assert (gradients[0] - ours).norm() < 1e-3 * ours.norm() > 0


def test_the_page_and_the_library_have_one_epoch():
    "Same prompts, noise, rewards and order of batches: the same mean reward, the same weights."
    page, pipe = one_page(), embedded()
    page.update(samples=24, batch_size=8)
    start = flat(pipe).clone()
    config = DDPOConfig(
        num_epochs=1, num_samples_per_epoch=page["samples"], sample_batch_size=page["samples"],
        batch_size=page["batch_size"], buffer_size=page["samples"], min_count=page["samples"],
        lr=page["lr"], clip_ratio=page["clip"], num_timesteps=page["steps"], cfg=1.0, img_size=64)
    def blue_sky(images, prompts):
        return (images[:, :6, :, 2].astype(float) - images[:, :6, :, 0]).mean((1, 2)) / 255
    row, = train(config, pipe, lambda: random.choice(page["animals"]), blue_sky, len)

    noise = noise_sources(config.seed, TRAINING, range(page["samples"]))
    shape = page["draw"](1).shape
    def draw(count): return torch.cat([torch.randn(shape, generator=g) for g in noise])
    def rounded(pictures):
        images = (255 * pictures).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return torch.from_numpy(blue_sky(images, None))
    page.update(draw=draw, reward=rounded)
    random.seed(config.seed)
    reward = page["epoch"]()
    assert abs(reward - row["reward_mean"]) < 1e-2 * row["reward_std"]
    ours, theirs = flat(pipe) - start, flat(page["pipe"]) - start
    assert ours.norm() > 0 and (ours - theirs).norm() < 0.05 * ours.norm()
