"""Tests of chapter `nbs/practice/28_plan.ipynb`."""
import gc
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import open_clip
import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from ddpo_scratch.animals import new_classifier, new_judge
from ddpo_scratch.command.architectures import STABLE_DIFFUSION_1, configurations, models
from ddpo_scratch.command.flags import parse
from ddpo_scratch.command.plan import (
    REWARD_WEIGHTS,
    LiveBytes,
    in_millions,
    make_plan,
    plan_text,
)
from ddpo_scratch.models.families import frozen_parts, network_of, text_encoders
from ddpo_scratch.pipelines import load_pipeline
from ddpo_scratch.rewards import AESTHETIC_CLIP, MLP, JPEGCompressibility
from ddpo_scratch.trainer.lora import add_lora, save_lora
from ddpo_scratch.trainer.precision import DTYPES
from ddpo_scratch.trainer.presets import make_config
from ddpo_scratch.workshop.twins import TWINS
from helpers import embedded, opened, small_rank, train


def measured_peak(config):
    "The highest sum of all tensors' bytes in two epochs, by PyTorch's profiler; with the weights."
    pipe = load_pipeline(config.pipeline, "cpu")
    weights = sum(4 * p.numel() for module in (pipe.unet, pipe.vae, pipe.text_encoder)
                  for p in module.parameters())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(config, pipe, lambda: "a fox", JPEGCompressibility())
    events = [event for event in profiler.profiler.kineto_results.events()
              if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return weights + peak


def test_a_plan_refuses_what_a_run_refuses(tmp_path):
    "From the configuration alone: sizes and precision that a model does not have."
    for preset, changes, says in (
            ("sana", dict(mixed_precision="fp16"), "leaves fp16's range"),
            ("sana", dict(img_size=1000), "img_size must be a positive multiple of 32 pixels"),
            ("sd35", dict(img_sizes="512x512,504x512"), "img_sizes's height must be a positive "
                                                        "multiple of 16"),
            ("sd35", dict(eval_img_size=6400), "eval_img_size is 6400; this model draws at most"),
            ("blog", dict(img_size=64), "img_size 64 is less than a quarter of the 512 pixels")):
        with pytest.raises(ValueError, match=says): make_plan(make_config(preset, **changes))
    pipe = embedded()
    add_lora(pipe.unet, 2)
    save_lora(pipe, tmp_path)
    for preset in ("blog", "sana"):
        with pytest.raises(ValueError, match="lora_from: .* is an? adapter of|is of another model"):
            make_plan(make_config(preset, lora_from=str(tmp_path)))
    make_plan(make_config("emoji", lora_from=str(tmp_path)))
    assert [in_millions(count) for count in (49_999, 51_000, 2 * 10**9)] == [
        "49,999", "0.1 million", "2000.0 million"]


@pytest.mark.slow
def test_the_planned_memory_is_the_measured_one():
    "Within a fifth, with guidance, checkpointing, LoRA, a reference and bf16."
    small = dict(num_epochs=2, num_timesteps=2, num_samples_per_epoch=32)
    for changes in (dict(cfg=5.0, gradient_checkpointing=True), dict(lora_rank=4),
                    dict(mixed_precision="bf16"), dict(beta=0.1, micro_batch_size=8)):
        config = make_config("emoji", **small | changes)
        plan = make_plan(config)
        planned = plan.memory + plan.trajectories
        assert planned == pytest.approx(measured_peak(config), rel=0.2), changes


def test_the_trajectories_are_those_that_are_held():
    "In two batches, and together: bytes of all tensors of five dimensions, while it is trained."
    def held():
        storages = [x.untyped_storage() for x in gc.get_objects()
                    if type(x) is torch.Tensor and x.ndim == 5]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    config = make_config("emoji", num_epochs=1, num_timesteps=3, num_samples_per_epoch=6,
                         samples_per_prompt=1, sample_batch_size=4)
    before, after_batches = held(), []
    train(config, embedded(), lambda: "a fox", JPEGCompressibility(),
          on_batch=lambda: after_batches.append(held() - before))
    assert max(after_batches) == make_plan(config).trajectories


def test_numbers_that_are_known():
    "Stable Diffusion 1.4: 860 million parameters, 0.8 · 10¹² operations a row."
    plan = make_plan(make_config("blog", num_samples_per_epoch=1, sample_batch_size=1, batch_size=1,
                                 num_timesteps=1, cfg=1.0, gradient_checkpointing=False))
    assert plan.trained == 859_520_964 and plan.frozen == 83_653_863 + 123_060_480
    assert plan.sampling == pytest.approx(0.803e12, rel=0.01)
    assert plan.training == pytest.approx(3 * plan.sampling, rel=0.01)
    assert plan.resident["UNet"] == 4 * plan.trained == plan.resident["gradients"]


@pytest.mark.slow
def test_what_follows_from_a_setting():
    "Steps and rows count as often as they are taken; adapter, reference, offload, AdamW in 8 bits."
    few = make_config("emoji", num_samples_per_epoch=4, samples_per_prompt=1)
    plan, more = make_plan(few), make_plan(make_config(
        "emoji", num_samples_per_epoch=8, samples_per_prompt=1, num_timesteps=16, cfg=2.0,
        num_inner_epochs=3))
    assert more.sampling == pytest.approx(2 * 2 * 2 * plan.sampling, rel=0.01)
    assert more.training == pytest.approx(2 * 2 * 2 * 3 * plan.training, rel=0.01)
    lora = make_plan(make_config("emoji", lora_rank=2, beta=0.1))
    trained = embedded().unet.num_parameters()
    assert plan.trained == trained > 50 * lora.trained and not lora.resident["its reference"]
    assert make_plan(make_config("emoji", beta=0.1)).resident["its reference"] == 4 * trained
    away, small = (make_plan(replace(few, **{name: True})) for name in ("offload", "use_8bit_adam"))
    others = plan.resident["VAE and text encoders"]
    assert not away.resident["VAE and text encoders"] and others == 4 * plan.frozen
    vae = 4 * embedded().vae.num_parameters()
    assert away.peaks == plan.peaks | {"encoding prompts": others} | {
        phase: plan.peaks[phase] + vae for phase in ("sampling", "decoding")}
    assert small.resident["AdamW's averages"] == pytest.approx(2.1 * trained, rel=0.05)


@pytest.mark.slow
def test_published_numbers_of_parameters():
    "Of XL and Stable Diffusion 3.5, part by part; 16 bits below an adapter."
    for preset, counts in (("sdxl", [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]),
                           ("sd35", [2_243_171_520, 83_819_683, 123_650_304, 694_659_840,
                                     4_762_310_656])):
        config = make_config(preset)
        network, _, vae, text_encoders = models(config, configurations(config.pipeline))
        assert counts == [sum(p.numel() for name, p in module.named_parameters()
                              if "lora_" not in name) for module in (network, vae, *text_encoders)]
        types = {name.split(".")[-2]: p.dtype for module in (network, *text_encoders)
                 for name, p in module.named_parameters() if "lora_" not in name}
        assert types.pop("wo", torch.float32) == torch.float32  # as transformers keeps T5's
        assert {*types.values()} == {DTYPES[config.mixed_precision]}
        assert {p.dtype for p in vae.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ("fp16", "bf16"))
@pytest.mark.parametrize("name", TWINS)
def test_the_plan_holds_what_a_run_loads(name, precision, twins):
    "Bytes of every part, with an adapter, in 16 bits: T5's `wo` stays in float32 in fp16 alone."
    lora_rank = small_rank(name)
    config = make_config("emoji", pipeline=twins[name], lora_rank=lora_rank,
                         mixed_precision=precision)
    network, _, vae, readers = models(config, configurations(twins[name]))
    pipe = load_pipeline(twins[name], "cpu", DTYPES[precision] if lora_rank else torch.float32)
    if lora_rank: add_lora(network_of(pipe), 2)
    def size(*modules):
        return sum(p.numel() * p.element_size() for part in modules for p in part.parameters())
    assert size(network) == size(network_of(pipe)) and size(vae) == size(pipe.vae)
    assert size(*readers) == size(*text_encoders(pipe))


def test_models_of_rewards_are_counted():
    "The numbers of the table are those of the models' own classes; one's own cannot be known."
    def tower(width, layers, **settings):
        return dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                    num_attention_heads=16, **settings)
    def vit_h():
        return transformers.CLIPModel(transformers.CLIPConfig(
            projection_dim=1024, text_config=tower(1024, 24),
            vision_config=tower(1280, 32, patch_size=14)))
    def vit_l():
        return open_clip.create_model(AESTHETIC_CLIP, pretrained=None, device="meta")
    with torch.device("meta"):
        made = {"animal": [new_classifier()], "right_animal": [new_judge()],
                "pickscore": [vit_h()], "clip_score": [vit_l()], "aesthetic": [vit_l(), MLP(768)]}
    assert REWARD_WEIGHTS == {
        name: sum(p.numel() for model in models for p in model.parameters())
        for name, models in made.items()}
    plan = make_plan(make_config("emoji", reward="animal:1,jpeg_compressibility:2"))
    assert plan.resident["models of the rewards"] == 4 * (1_206_044 + 142_204)
    own = make_config("emoji", reward="mine.py:f", eval_rewards=None)
    assert "without what mine.py:f may hold" in plan_text(own, make_plan(own))


@pytest.mark.parametrize("name", TWINS)
def test_every_family_can_be_planned(name, twins):
    "A twin from its files."
    pipe = opened(twins[name])
    plan = make_plan(make_config("blog", pipeline=twins[name], img_size=32, cfg=1.0,
                                 num_timesteps=2, num_samples_per_epoch=4))
    assert plan.trained == sum(p.numel() for p in network_of(pipe).parameters())
    assert plan.frozen == sum(p.numel() for part in frozen_parts(pipe) for p in part.parameters())
    assert plan.sampling > 0 and min(plan.peaks.values()) > 0


@pytest.mark.slow
def test_a_plan_is_the_same_whatever_was_planned_before(twins):
    "What is remembered is asked for by all that it depends on."
    some = dict(pipeline=twins["sd2"], img_size=32, cfg=1.0, gradient_checkpointing=False,
                num_timesteps=2, num_samples_per_epoch=4)
    for changes in (dict(), dict(img_size=64), dict(cfg=3.0), dict(mixed_precision="bf16"),
                    dict(lora_rank=2), dict(gradient_checkpointing=True), dict(beta=0.1)):
        config = make_config("blog", **some | changes)
        after_others = make_plan(config)
        with patch.dict("ddpo_scratch.command.plan.WORKS", clear=True):
            assert make_plan(config) == after_others, changes


def test_the_embedded_flow_model_can_be_planned():
    "With what it borrows from the other one."
    flow = make_plan(make_config("emoji", pipeline="emoji_flow"))
    assert flow.trained == 2_799_684 and flow.frozen == make_plan(make_config("emoji")).frozen


def test_bytes_that_are_alive():
    "Counted once, with their views; gone when nobody refers to them."
    kept = torch.zeros(10)
    with LiveBytes(kept) as live:
        a = torch.zeros(100) + kept[:1]
        view = a.view(10, 10).t()
        assert live.now == 400
        del a
        assert live.now == 400 and view.shape == (10, 10)
        del view
        torch.ones(25)
    assert live.now == 0 and live.peak >= 800  # zeros, and their sum


def test_the_plan_is_printed():
    "By the command's flag; for what cannot be had, a sentence."
    assert parse(["--plan", "--preset", "blog"]).only_plan and not parse([]).only_plan
    text = plan_text(config := make_config("emoji"), make_plan(config))
    compiled = replace(config, compile=True)
    more = plan_text(compiled, make_plan(config)).removeprefix(text)
    assert more == " Compiled blocks take more memory than this."
    for words in ("6.9 million numbers are trained", "decoding", "RTX 4090", "computed, not"):
        assert words in text
    assert "does not fit" not in text
    assert configurations("CompVis/stable-diffusion-v1-4") is STABLE_DIFFUSION_1
    with pytest.raises(ValueError, match="unknown pipeline 'emojis'"): configurations("emojis")


@pytest.mark.slow
def test_the_rehearsal():
    "The full architecture at 128 × 128 pixels, in a process of its own."
    code = "from ddpo_scratch.workshop.rehearsal import rehearse; rehearse(img_size=128)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "picture (1, 128, 128, 3)" in done.stdout
    assert "gradients are finite in 256 tensors of the adapter" in done.stdout


@pytest.mark.slow
def test_flux_fits_a_card_of_24_gigabytes():
    "The preset for it, with 1.5 GB for driver and PyTorch; without four bits it does not."
    config = make_config("flux_24gb")
    plan, whole = make_plan(config), make_plan(replace(config, load_in_4bit=False))
    assert plan.memory / 1e9 + 1.5 < 25.8 < whole.memory / 1e9
    assert plan.trained == whole.trained and plan.frozen == whole.frozen
    assert plan.training == pytest.approx(whole.training, rel=0.01)
    assert "RTX 4090, 24 GB" in next(line for line in plan_text(config, plan).splitlines()
                                     if "4090" in line and "does not fit" not in line)


def test_divided_weights_in_the_plan(twins):
    "A share of the frozen weights, two whole blocks and what is in none, by another count."
    config = make_config("sd35", pipeline=twins["sd3"], img_size=32, mixed_precision="no",
                         lora_targets=("to_q",), lora_alpha=None)
    network = network_of(opened(twins["sd3"]))
    def size(part): return 4 * sum(p.numel() for p in part.parameters())
    blocks, frozen = [*map(size, network.transformer_blocks)], size(network)
    with patch("ddpo_scratch.command.plan.processes", lambda: SimpleNamespace(num_processes=4)):
        plan, whole = (make_plan(replace(config, shard_weights=divided))
                       for divided in (True, False))
        assert "by each of 4 processes" in plan_text(replace(config, shard_weights=True), plan)
    adapter = whole.resident["transformer"] - frozen
    assert adapter == 4 * plan.trained == 4 * whole.trained
    assert plan.resident["transformer"] == adapter + frozen // 4 + frozen - sum(blocks) + sum(
        sorted(blocks)[-2:])
