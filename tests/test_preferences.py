"""Tests of chapter `nbs/practice/32_preferences.ipynb`."""
import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ddpo_scratch.command.flags import parse
from ddpo_scratch.command.plan import make_plan
from ddpo_scratch.command.run import run_training
from ddpo_scratch.sampling import decoding_fn
from ddpo_scratch.scorers.names import WeightedSum
from ddpo_scratch.trainer.checkpoints import save_checkpoint
from ddpo_scratch.trainer.forward import Noised
from ddpo_scratch.trainer.pairs import encoded, opened, ranked_pairs, read_preferences
from ddpo_scratch.trainer.policy import Trajectory
from ddpo_scratch.trainer.preferences import preference_losses
from ddpo_scratch.trainer.presets import PRESETS, make_config, make_prompt_fn
from ddpo_scratch.trainer.trainer import TrainingState, check_run
from ddpo_scratch.training import TRAINING, noise_sources
from ddpo_scratch.workshop.twins import TWINS
from helpers import (
    Bluish,
    as_flags,
    batch_gradient,
    ddpo_train,
    drawings,
    embedded,
    fake_gpu,
    goes_on,
    redness,
    rolled_out,
    run_until,
    shaken,
    slope,
    small_rank,
    train,
    twin,
)

TINY = dict(algorithm="dpo", num_epochs=2, num_samples_per_epoch=12, samples_per_prompt=3,
            sample_batch_size=5, batch_size=6, num_timesteps=4, timestep_fraction=1.0,
            noise_levels=2, img_size=32, lr=1e-3, beta=500.0)
PAIRS = TINY | dict(samples_per_prompt=2, num_samples_per_epoch=6, batch_size=4)


def stepped(images, prompts):
    "Two values, so that some images of a prompt are worth the same."
    return torch.tensor([0.0, 1.0])[[int(i == 2) for i in range(len(prompts))]]


def of_noise():
    "A twin that predicts the noise, so that the target is the noise."
    pipe = twin("sd2")
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, prediction_type="epsilon", rescale_betas_zero_snr=False)
    return pipe


def made(pipe, reward_fn=stepped, **changes):
    "A trainer whose first epoch has been sampled or read; what it has kept of each image."
    config = make_config("emoji", **TINY | dict(micro_batch_size=8) | changes)
    return rolled_out(config, pipe, reward_fn)


@pytest.fixture
def folder(tmp_path):
    "Five pairs of drawings of several sizes, the blue one preferred to the grey one."
    pictures, animals = drawings()
    lines = []
    for i in range(5):
        blue = pictures[i].copy()
        blue[..., 2] = 255
        for name, pixels, size in (("a", pictures[i], (64, 64)), ("b", blue, (40 + 8 * i, 64))):
            Image.fromarray(pixels).resize(size).save(tmp_path / f"{i}{name}.png")
        lines.append(json.dumps({"prompt": f"{i}. {animals[i]}", "preferred": f"{i}b.png",
                                 "rejected": f"{i}a.png"}))
    (tmp_path / "preferences.jsonl").write_text("\n\n".join(lines) + "\n", "utf-8")
    return tmp_path


@pytest.mark.parametrize("group", (2, 3, 5, 8))
def test_the_best_is_preferred_to_the_worst(group):
    "Against a list sorted by hand."
    rewards = torch.rand(4 * group, generator=torch.Generator().manual_seed(group))
    expected = []
    for first in range(0, len(rewards), group):
        best_first = sorted(range(first, first + group), key=lambda i: -rewards[i].item())
        while len(best_first) > 1: expected.append([best_first.pop(0), best_first.pop()])
    assert ranked_pairs(rewards, group).tolist() == expected


def loss_by_hand(pipe, before, kept, pairs, rewards, config):
    "With the pipeline's own UNet, pair by pair and level by level; as the authors' program has it."
    x_t, _, _, steps = kept
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(config.num_timesteps)
    alphas = scheduler.alphas_cumprod.double()
    prompts, total = (["a fox"] * 3 + ["an owl"] * 3) * 2, 0.0
    ids = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    words, twice = pipe.text_encoder(ids)[0], 2 * config.beta  # beta_dpo
    for better, worse in pairs:
        if rewards[better] == rewards[worse]: continue
        for k in range(config.noise_levels):
            losses = []
            for i in (better, worse):
                n, noise = scheduler.timesteps[steps[k, i]], kept[1][k, i]
                x_0 = (x_t[k, i] - (1 - alphas[n]).sqrt() * noise) / alphas[n].sqrt()
                asked = (scheduler.add_noise(x_0, noise, n)[None], n)
                with torch.no_grad():
                    theirs = before.unet(*asked, encoder_hidden_states=words[i:i + 1]).sample
                ours = pipe.unet(*asked, encoder_hidden_states=words[i:i + 1]).sample
                losses.append([((out - noise) ** 2).mean() for out in (ours, theirs)])
            (model_w, ref_w), (model_l, ref_l) = losses
            inside = -0.5 * twice * ((model_w - model_l) - (ref_w - ref_l))
            total = total + (1 + (-inside).exp()).log()
    return total / len(pairs)


def test_the_gradient_is_the_papers():
    "Against another implementation in float64, and against finite differences of its loss."
    pipe = of_noise().to(torch.float64)
    before = copy.deepcopy(pipe)
    ours, kept = made(pipe, cfg=3.0)
    rewards = torch.cat([scores["reward"] for scores, *_ in ours.state.rollout.samples])
    pairs = ranked_pairs(rewards, 3)
    ties = rewards[pairs[:, 0]] == rewards[pairs[:, 1]]
    assert 0 < ties.sum() < len(pairs) == 4
    start, at_first = batch_gradient(ours, kept, pairs)
    assert at_first["loss"] == pytest.approx(2 * np.log(2) * (~ties).float().mean())
    assert at_first["ref_kl"] < 1e-20 and start.norm() > 1e-3
    shaken(pipe)
    found, measured = batch_gradient(ours, kept, pairs)
    settings = before, kept, pairs.tolist(), rewards, ours.config
    value = loss_by_hand(pipe, *settings)
    theirs = torch.cat([g.flatten() for g in torch.autograd.grad(value, ours.state.weights)])
    assert measured["loss"] == pytest.approx(value.item(), rel=1e-5)
    assert (found - theirs).norm() < 1e-5 * theirs.norm() and measured["ref_kl"] > 1e-4
    rise = slope(lambda p: loss_by_hand(p, *settings), pipe, found / found.norm(), 1e-4)
    assert rise == pytest.approx(found.norm().item(), rel=2e-2) and rise > 0


def test_updates_separate_the_pairs():
    "All of them, of one epoch's images: the loss falls, the implicit reward takes the same side."
    ours, kept = made(twin("sd2"), Bluish(), num_inner_epochs=40)
    ours.update(0, partial(ours.batch_gradient, kept), lambda: None)
    updates = ours.state.rollout.updates
    assert updates[0]["loss"] == pytest.approx(2 * np.log(2), rel=1e-3)
    assert updates[-1]["loss"] < 0.5 and updates[-1]["implicit_accuracy"] == 1


def test_pairs_and_their_noise():
    "Each image that is sampled has its own; all pairs are in an update's batch."
    ours, (_, noise, _, _) = made(of_noise())
    rows = noise.flatten(0, 1).flatten(1)
    assert len({tuple(row[:3].tolist()) for row in rows}) == 24
    empty = Trajectory(torch.zeros(1, 12, *ours.policy.latent_shape), None)
    later = ours.kept(1, torch.arange(12), empty)[1]
    assert (noise != later).all() and (noise != made(of_noise(), seed=1)[1][1]).all()
    rollout = ours.state.rollout
    assert [batch.shape for batch in rollout.batches] == [(2, 2), (2, 2)]
    assert len(set(torch.cat(rollout.batches).flatten().tolist())) == 8
    better, worse = torch.cat(rollout.batches).T
    assert (rollout.advantages[better] == -rollout.advantages[worse]).all()
    assert {*rollout.advantages.tolist()} == {-1.0, 0.0, 1.0}


def test_micro_batches_change_nothing():
    "Guided; pairs one by one; no reward needs a gradient."
    def whole(**changes):
        pipe = twin("sd2").to(torch.float64)
        ours, kept = made(pipe, Bluish(), **dict(cfg=3.0, micro_batch_size=24) | changes)
        shaken(pipe)
        return batch_gradient(ours, kept, torch.cat(sorted(ours.state.rollout.batches, key=str)))
    found, measured = whole()
    for changes in (dict(micro_batch_size=1), dict(micro_batch_size=5),
                    dict(sample_batch_size=12), dict(gradient_checkpointing=True)):
        theirs, same = whole(**changes)
        assert (found - theirs).norm() < 1e-6 * found.norm(), changes
        assert same == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize("name", TWINS)
def test_encoding_is_the_vaes(name):
    "Of uint8 images, against `diffusers`' own preprocessing; with the model's scale and shift."
    pipe = twin(name)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    x = VaeImageProcessor().preprocess([Image.fromarray(image) for image in images])
    config = pipe.vae.config
    with torch.no_grad():
        if name == "flux2": expected = pipe._encode_vae_image(x, torch.Generator())
        elif name == "qwen-image":
            mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1)
                         for key in ("latents_mean", "latents_std"))
            expected = (pipe.vae.encode(x[:, :, None]).latent_dist.mean.squeeze(2) - mean) / std
        else:
            found = pipe.vae.encode(x)
            theirs = found.latent if name == "sana" else found.latent_dist.mean
            shift = getattr(config, "shift_factor", None) or 0.0
            expected = config.scaling_factor * (theirs - shift)
    torch.testing.assert_close(encoded(images, pipe), expected)


def test_encoding_and_decoding(folder):
    "Give nearly the same drawing back, by the embedded autoencoder; sizes are made equal."
    images = np.stack([opened(pair.rejected, (64, 64)) for pair in read_preferences(folder)])
    pipe = embedded()
    back = decoding_fn(encoded(images, pipe), pipe)
    assert np.abs(back.astype(float) - images).mean() < 12
    wide = opened(folder / "0b.png", (32, 64))
    assert wide.shape == (32, 64, 3) and wide[..., 2].min() > 200


def test_the_folders_pairs_take_turns(folder):
    "Each as often; another order in each turn; prompts with their images; no sampling."
    def never(images, prompts): raise AssertionError("the folder's images need no reward")
    ours, (x_t, noise, _, steps) = made(of_noise(), never, **PAIRS, preferences=str(folder))
    drawn = [pair for epoch in range(10) for pair in ours.pairs_of(epoch)]
    turns = [[pair.prompt for pair in drawn[i:i + 5]] for i in range(0, 30, 5)]
    prompts = {pair.prompt for pair in read_preferences(folder)}
    assert all({*turn} == prompts for turn in turns) and len({*map(tuple, turns)}) > 3
    assert ours.state.rollout.prompts == [pair.prompt for pair in drawn[:3] for _ in range(2)]
    assert sorted(torch.cat(ours.state.rollout.batches).tolist()) == [[0, 1], [2, 3], [4, 5]]
    assert torch.equal(noise[:, 0], noise[:, 1]) and not torch.equal(noise[:, 0], noise[:, 2])
    assert torch.equal(steps[:, 0], steps[:, 1])
    schedule, paths = ours.policy.schedule, [path for pair in drawn[:3] for path in pair[1:]]
    signal, level = (table[steps][..., None, None, None]
                     for table in (schedule.signal, schedule.noise))
    clean = encoded(np.stack([opened(path, (32, 32)) for path in paths]), ours.pipe)
    torch.testing.assert_close(x_t, signal * clean + level * noise, rtol=0, atol=1e-5)


def test_a_folder_is_learnt_from(folder):
    "The implicit reward comes to prefer what people prefer, whatever the reward says."
    config = make_config("emoji", **PAIRS | dict(num_epochs=20), preferences=str(folder))
    reward = WeightedSum({"red": redness, "blue": Bluish()}, {"red": 1.0, "blue": -1.0})
    history = train(config, twin("sd2"), lambda: "unused", reward, eval_rewards={"r": redness})
    assert history[0]["loss"] > 1.2 and history[-1]["loss"] < 0.3
    assert history[-1]["implicit_accuracy"] == 1
    assert history[-1]["reward_mean"] == 0.5 and "ref_kl" in history[-1]


@pytest.mark.parametrize("line, match", (
    ("{", "line 10 is not JSON"), ('["a"]', "must have prompt, preferred and rejected"),
    ('{"prompt": "a fox", "preferred": "0a.png"}', "must have prompt, preferred and rejected"),
    ('{"prompt": "a fox", "preferred": "0a.png", "rejected": 1}', "three strings"),
    ('{"prompt": "a fox", "preferred": "0a.png", "rejected": "no.png"}', "no image that can be"),
    ('{"prompt": "a fox", "preferred": "0a.png", "rejected": "bad.png"}', "no image that can be")))
def test_what_is_wrong_in_a_folder(folder, line, match):
    "Is said before anything is computed."
    (folder / "bad.png").write_text("no image")
    with (folder / "preferences.jsonl").open("a", encoding="utf-8") as file: file.write(line)
    config = make_config("emoji", **PAIRS, preferences=str(folder))
    with pytest.raises(ValueError, match=match): check_run(config, twin("sd2"))


def test_folders_without_pairs(folder, tmp_path):
    "No file, an empty one, an image that is none."
    with pytest.raises(ValueError, match="cannot be read.*A line for each pair is wanted"):
        read_preferences(tmp_path / "nowhere")
    (folder / "0a.png").write_text("no image")
    with pytest.raises(ValueError, match="0a.png' is no image that can be read"):
        opened(folder / "0a.png", (32, 32))
    (folder / "preferences.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="there is no pair"): read_preferences(folder)


def test_kinds_of_images(tmp_path):
    "Transparent ones lie on white, photographs stand upright, others become RGB, or are refused."
    def saved(image, name, **others):
        image.save(tmp_path / name, **others)
        return opened(tmp_path / name, (4, 4))
    red = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    red.paste((0, 0, 0, 0), (0, 0, 2, 4))
    expected = np.full((4, 4, 3), 255)
    expected[:, 2:] = 255, 0, 0
    for name, image in (("rgba.png", red), ("la.png", red.convert("LA")),
                        ("palette.png", red.quantize())):
        found = saved(image, name)
        assert (found[:, :2] == 255).all(), name
        if name != "la.png": assert (found == expected).all(), name
    for mode in ("L", "P", "1", "CMYK"):
        image = Image.new("RGB", (4, 4), "white").convert(mode)
        assert (saved(image, f"{mode}.tif") > 250).all(), mode
    tall = Image.new("RGB", (4, 8), "red")
    tall.paste("blue", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise: what was above is on the right
    tall.save(tmp_path / "turned.png", exif=exif)
    turned = opened(tmp_path / "turned.png", (4, 8))
    assert (turned[:, :4] == (255, 0, 0)).all() and (turned[:, 4:] == (0, 0, 255)).all()
    with pytest.raises(ValueError, match="more than 8 bits a channel"):
        saved(Image.fromarray(np.full((4, 4), 1000, np.uint16)), "deep.png")
    pair = {"prompt": "a fox", "preferred": "deep.png", "rejected": "L.tif"}
    (tmp_path / "preferences.jsonl").write_text(json.dumps(pair), encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: .*deep.png' has more than 8 bits a channel"):
        read_preferences(tmp_path)


def test_a_folder_that_changes(folder):
    "While a run is stopped: it is not mixed with what was read before."
    config = make_config("emoji", **PAIRS, preferences=str(folder))
    run = partial(run_until, config, lambda: "a fox", Bluish())
    checkpoint = save_checkpoint(folder / "checkpoints", 1, *run(stop=1), {})
    with (folder / "preferences.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "new", "preferred": "0a.png", "rejected": "0b.png"}))
    with pytest.raises(ValueError, match="is not what it was when this epoch began"):
        run(checkpoint=checkpoint)


def test_a_list_that_changes_between_epochs(folder, tmp_path, capfd):
    "Preferred and rejected change places after a run: it does not go on."
    config = make_config("emoji", **PAIRS | dict(num_eval_samples=2), preferences=str(folder))
    def run(config, **others):
        run_training(config, twin("sd2"), lambda: "a fox", redness, tmp_path / "x",
                     eval_rewards={}, **others)
    run(config)
    assert f"{len(read_preferences(folder))} pairs in" in capfd.readouterr().out
    path = folder / "preferences.jsonl"
    lines = path.read_text("utf-8")
    path.write_text(lines.replace("rejected", "x").replace("preferred", "rejected").replace(
        "x", "preferred"), encoding="utf-8")
    with pytest.raises(ValueError, match="began with other preferences"):
        run(replace(config, num_epochs=3), resume=True)
    path.write_text(lines, encoding="utf-8")
    run(replace(config, num_epochs=3), resume=True)


def test_large_images_are_encoded_one_by_one(monkeypatch):
    "About a megapixel at a time; latents that are no numbers are refused."
    pipe, sizes = twin("sd2"), []
    real = pipe.vae.encode
    def watched(x):
        sizes.append(len(x))
        return real(x)
    monkeypatch.setattr(pipe.vae, "encode", watched)
    images = np.zeros((3, 1024, 1024, 3), np.uint8)
    assert encoded(images, pipe).shape[0] == 3 and sizes == [1, 1, 1]
    with torch.no_grad(): next(pipe.vae.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="latents are NaN or infinite"):
        encoded(images[:, :32, :32], pipe)


def test_names_of_folders_on_the_command_line():
    "Numbers are names, too; none is not an empty one."
    found = parse(["--algorithm=dpo", "--preferences=007"]).config
    assert (found.preferences, found.samples_per_prompt) == ("007", 2)
    assert parse(["--algorithm=dpo"]).config.samples_per_prompt == 16
    with pytest.raises(ValueError, match="preferences is empty"):
        parse(["--algorithm=dpo", "--preferences="])
    for preset in PRESETS:
        config = make_config(preset, algorithm="dpo")
        assert config.beta >= 100 and config.samples_per_prompt >= 2
        assert make_config(preset, algorithm="dpo", preferences=Path("x")).preferences == "x"
    with pytest.raises(ValueError, match="preferences means nothing to algorithm 'ddpo', only to "
                                         "dpo: change algorithm, or"): parse(["--preferences=x"])
    with pytest.raises(ValueError, match="take a multiple of 2[.]"):
        parse(["--algorithm=dpo", "--preferences=x", "--num_samples_per_epoch=7"])
    assert parse(["--algorithm=dpo", "--samples_per_prompt=64"]).config.samples_per_prompt == 64


def test_values_that_are_refused():
    "No loss, no pairs, settings of other algorithms."
    for changes, match in ((dict(beta=0.0), "beta is 0, which means no loss in DPO"),
                           (dict(samples_per_prompt=1), "needs at least 2 of each"),
                           (dict(batch_size=1), "needs at least 2 of each"),
                           (dict(preferences="x"), "samples_per_prompt is 3, and in preferences"),
                           (dict(old_decay=0.5), "old_decay means nothing to algorithm 'dpo'"),
                           (dict(nft_beta=0.5), "nft_beta means nothing to algorithm 'dpo'"),
                           (dict(algorithm="nft", preferences="x"), "preferences means nothing")):
        with pytest.raises(ValueError, match=match): make_config("emoji", **TINY | changes)


@pytest.mark.parametrize("name", ("sd2", "sd3"))
def test_all_stays_on_its_device(name):
    "Noised images and losses on a fake CUDA device."
    (ours, _), batch = made(twin(name), eta=0.25, cfg=1.0), torch.arange(4)
    with fake_gpu():
        ours.pipe.to("cuda")
        ours.state.reference.to("cuda")
        vars(ours.policy).pop("schedule", None)  # of the CPU
        trajectory = ours.policy.sample(
            ours.cache(["a fox"] * 4), noise_sources(0, TRAINING, range(4)))
        kept = ours.kept(0, batch, trajectory)
        images = Noised(*kept, torch.ones(4, device="cuda"), ours.cache(["a fox"] * 4))
        pairs = torch.arange(2, device="cuda")
        loss = preference_losses(ours.policy, images, 0 * pairs, pairs, ours.objective).loss
        assert loss.device.type == "cuda" and loss.requires_grad and loss.shape == (2,)


@pytest.mark.parametrize("name", TWINS)
def test_every_family(name, folder):
    "With an adapter and an average, online and from a folder: finite numbers, weights that move."
    for more in (TINY, PAIRS | dict(preferences=str(folder))):
        pipe = twin(name)
        config = make_config("emoji", **more | dict(
            lora_rank=small_rank(name), ema_decay=0.5, eta=0.0,
            cfg=1.0 if name == "flux-schnell" else 2.0, micro_batch_size=None))
        state = TrainingState(config, pipe)
        before = [weight.detach().clone() for weight in state.weights]
        history = train(config, pipe, lambda: "a fox", Bluish(), state=state)
        assert {"implicit_accuracy", "ref_kl"} <= {*history[-1]}
        assert all(np.isfinite([*row.values()]).all() for row in history)
        assert any((weight - old).abs().max() > 1e-4 for weight, old in zip(state.weights, before))


def test_a_run_goes_on_after_any_batch(folder):
    "While it samples, reads or trains: the same weights to the last bit."
    prompt_fn = make_prompt_fn("emoji_animal_prompts")
    for kind, stops in ((dict(ema_decay=0.5), (2, 4, 6, 9)),
                        (PAIRS | dict(preferences=str(folder), lora_rank=2), (1, 3, 5, 7))):
        config = make_config("emoji", **TINY | dict(num_epochs=3) | kind)
        goes_on(partial(run_until, config, prompt_fn, Bluish()), stops)


def test_the_plan_counts_the_reference_once():
    "When images are noised, and not in training; no sampling where a folder is read."
    few = dict(num_samples_per_epoch=4, batch_size=4, micro_batch_size=4, noise_levels=2)
    nft = make_plan(make_config("emoji", algorithm="nft", samples_per_prompt=2, **few))
    dpo = make_plan(make_config("emoji", algorithm="dpo", beta=9.0, samples_per_prompt=2, **few))
    read = make_plan(make_config("emoji", algorithm="dpo", beta=9.0, samples_per_prompt=2,
                                 preferences="x", **few))
    assert (dpo.sampling, dpo.training) == (nft.sampling, nft.training)
    assert read.sampling == pytest.approx(dpo.sampling * 2 / 10)
    assert dpo.resident["its reference"] == dpo.resident["UNet"] and dpo.peaks == nft.peaks
    one = few | dict(samples_per_prompt=2, micro_batch_size=1)
    two = one | dict(micro_batch_size=2)
    assert make_plan(make_config("emoji", algorithm="dpo", **one)).peaks == make_plan(
        make_config("emoji", algorithm="dpo", **two)).peaks  # a call takes a pair


def test_the_command(twins, folder):
    "A whole run from a folder, which goes on; its card."
    flags = as_flags(PAIRS | dict(pipeline=twins["sd2"], reward="animal", num_eval_samples=3,
                                  preferences=folder, name="x"))
    done = ddpo_train(folder, *flags)
    assert done.returncode == 0, done.stderr
    more = ddpo_train(folder, "--resume=runs/x", "--num_epochs=3")
    assert more.returncode == 0, more.stderr
    card = (folder / "runs" / "x" / "pipeline" / "README.md").read_text("utf-8")
    assert "Trained with Diffusion-DPO (Wallace et al. 2024" in card and "- dpo\n" in card
    assert f"trained on the preferences in `{folder.name}`" in card and str(folder) not in card
    columns, *rows = (folder / "runs" / "x" / "metrics.csv").read_text("utf-8").splitlines()
    assert len(rows) == 3 and columns == (
        "epoch,reward_mean,reward_std,loss,grad_norm,implicit_accuracy,ref_kl,lr,skipped,seconds")
