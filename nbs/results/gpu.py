"""What a GPU takes for Stable Diffusion 1.4's architecture, 512 pixels, guidance, weights random.

    python nbs/results/gpu.py

leaves gpu.csv beside this file, with a line for each measurement: the median of six after two that
warm up, or the second epoch of a run of three.
"""
import statistics
import time
from pathlib import Path

import torch

from ddpo_scratch.command.figures import csv_text
from ddpo_scratch.prompts import imagenet_animal_prompts
from ddpo_scratch.rewards import JPEGCompressibility
from ddpo_scratch.trainer.checkpoints import write_file
from ddpo_scratch.trainer.ddpo import DDPOTrainer
from ddpo_scratch.trainer.gradient import Objective, Samples, step_losses
from ddpo_scratch.trainer.policy import Policy
from ddpo_scratch.trainer.presets import make_config
from ddpo_scratch.trainer.speed import Compiled
from ddpo_scratch.workshop.rehearsal import full_size

DEVICE, FILE, rows = torch.device("cuda"), Path(__file__).with_name("gpu.csv"), []


def note(what, variant, milliseconds, unet_rows="", first="", log_ratio=""):
    "A line of the table, which is written at once: what has been measured is not lost."
    peak = torch.cuda.max_memory_allocated() / 1e9
    rows.append({"card": torch.cuda.get_device_name(), "what": what, "variant": variant,
                 "rows": unet_rows, "milliseconds": round(milliseconds, 2),
                 "first_seconds": first, "peak_gb": round(peak, 1), "log_ratio": log_ratio})
    print(rows[-1], flush=True)
    write_file(FILE, csv_text(rows))


def clock(what, variant, call, unet_rows=""):
    "Note how long a call takes, and what the first one did."
    torch.cuda.reset_peak_memory_stats()
    took = []
    for _ in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    note(what, variant, 1000 * statistics.median(took[2:]), unet_rows, round(took[0], 1))


def calls(variant, pipe, sampled, trained, mixed_precision="bf16"):
    "One step of some samples, sampled, and trained."
    policy = Policy(pipe, 50, 5.0, 1.0, (512, 512), mixed_precision)
    cond, objective = policy.encode(["a fox"]).to(DEVICE), Objective(1e-4, 10.0)

    def sample():
        with torch.no_grad(): policy.step(samples.latents[0], 3, samples.cond)

    def learn():
        step_losses(policy, samples, 0 * pairs, pairs, objective).loss.sum().backward()

    for what, call, sizes in (("sample", sample, sampled), ("train", learn, trained)):
        for count in sizes:
            zeros, pairs = torch.zeros(count, device=DEVICE), torch.arange(count, device=DEVICE)
            samples = Samples(torch.randn(2, count, 4, 64, 64, device=DEVICE), zeros[None],
                              zeros + 1, cond[[0] * count])
            clock(what, variant, call, 2 * count)


def epochs(variant, **changes):
    "Sixteen pictures in twenty steps, from the second epoch of three."
    config = make_config("blog", **dict(
        device="cuda", mixed_precision="bf16", reward="jpeg_compressibility",
        num_samples_per_epoch=16, sample_batch_size=16, num_timesteps=20, num_epochs=3,
        micro_batch_size=4) | changes)
    torch.manual_seed(0)
    pipe = full_size(config)
    torch.cuda.reset_peak_memory_stats()
    history = DDPOTrainer(config, pipe, imagenet_animal_prompts, JPEGCompressibility()).train()
    print(*history, sep="\n", flush=True)
    note("epoch", variant, 1000 * history[1]["seconds"], "", round(history[0]["seconds"], 1),
         f"{history[0]['max_log_ratio']:.4f}")


def main():
    torch.set_float32_matmul_precision("high")
    epochs("a step of a batch at a time")
    epochs("32 rows at a time", micro_batch_size=16)
    pipe = full_size(make_config("blog", device="cuda"))
    pipe.unet.eval()
    calls("plain", pipe, (4, 16, 32), (4, 8, 16))
    calls("fp32, as TF32", pipe, (16,), (8,), "no")
    for variant, fused in (("plain", None), ("fused", True)):
        optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=1e-9, fused=fused)
        clock("AdamW", variant, optimizer.step)
    del optimizer
    pipe.unet.to(memory_format=torch.channels_last)
    calls("channels last", pipe, (16,), (16,))
    pipe.unet.to(memory_format=torch.contiguous_format)
    with Compiled(pipe.unet): calls("compiled", pipe, (16,), (16,))
    epochs("32 rows, compiled", micro_batch_size=16, compile=True)


if __name__ == "__main__":
    main()
