"""Tests of chapter `nbs/practice/23_lora.ipynb`."""
import os
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from ddpo_scratch.models.families import network_of
from ddpo_scratch.pipelines import ddim_scheduler, load_pipeline, pipeline_source
from ddpo_scratch.trainer.lora import (
    LORA_FILE,
    AdapterOff,
    adapter_settings,
    add_lora,
    load_lora,
    save_lora,
)
from ddpo_scratch.trainer.presets import make_config, make_prompt_fn
from ddpo_scratch.trainer.trainer import TrainingState, check_run
from helpers import embedded, redness, sample, train, twin

SMALL = dict(num_epochs=2, num_samples_per_epoch=8, samples_per_prompt=1, batch_size=4,
             num_timesteps=3, timestep_fraction=1.0, min_count=8, lora_rank=4, lr=1e-2)


def trained_with(pipe, **changes):
    "The pipeline after two small epochs, and their metrics."
    config = make_config("emoji", **SMALL | changes)
    return train(config, pipe, make_prompt_fn(config.prompts), redness)


def weights(unet, adapter):
    "Copies of the weights by name: the adapter's, or the others."
    return {name: p.detach().clone() for name, p in unet.named_parameters()
            if ("lora_" in name) == adapter}


def test_only_the_adapter_is_trained():
    "W + (α/r)BA by hand; the base stays bit for bit, and has no gradient; the adapter moves."
    pipe = embedded()
    before = weights(pipe.unet, adapter=False)
    history = trained_with(pipe, lora_alpha=12.0)
    after = {name.replace(".base_layer", ""): p for name, p in weights(pipe.unet, False).items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    adapter = weights(pipe.unet, adapter=True)
    assert {p.dtype for p in adapter.values()} == {torch.float32}
    assert all(p.abs().max() > 0 for name, p in adapter.items() if "lora_B" in name)
    assert {name for name, p in pipe.unet.named_parameters() if p.grad is not None} == set(adapter)
    assert history[0]["max_log_ratio"] == 0 and history[0]["grad_norm"] > 0

    layer = pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape[0] == b.shape[1] == 4
    base = layer.base_layer
    bias = 0 if base.bias is None else base.bias
    torch.testing.assert_close(layer(x), x @ (base.weight + 12 / 4 * b @ a).T + bias)


def test_a_saved_adapter_draws_the_same_pictures():
    "Opened by plain diffusers on top of the base, with α ≠ r: equal to the grey level."
    pipe = embedded()
    trained_with(pipe, lora_alpha=12.0)
    plain = StableDiffusionPipeline.from_pretrained(pipeline_source("emoji"), safety_checker=None)
    with pytest.raises(ValueError, match="the unet has 0 adapters"): save_lora(plain, "nowhere")
    with TemporaryDirectory() as folder:
        save_lora(pipe, folder)
        assert os.listdir(folder) == ["pytorch_lora_weights.safetensors"]
        plain.load_lora_weights(folder)
        save_lora(plain, f"{folder}/again")  # whatever the adapter is called
        with pytest.raises(ValueError, match="Did you mean.*load_lora_weights"):
            load_pipeline(folder)
    plain.scheduler = ddim_scheduler(plain.scheduler.config)
    def draw(pipe):
        g = torch.Generator().manual_seed(0)
        policy, (latents, _) = sample(["a fox", "an owl"], pipe, 5, generators=g)
        return policy.decode(latents[-1]).astype(int)
    assert np.array_equal(draw(pipe), draw(plain))
    assert abs(draw(pipe) - draw(embedded())).max() > 10


def test_an_adapter_scaled_down(tmp_path):
    "Half of it, as chapter 30 says: the base plus half of the difference, of a linear layer."
    pipe = twin("sd2")
    add_lora(pipe.unet, 2, 4.0)
    with torch.no_grad():
        for name, weight in pipe.unet.named_parameters():
            if "lora_B" in name: weight.fill_(0.3)
    save_lora(pipe, tmp_path)
    loaded = twin("sd2")
    loaded.load_lora_weights(tmp_path, adapter_name="trained")
    found, x = {}, torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    for scale in (0.0, 0.5, 1.0):
        loaded.set_adapters("trained", scale)
        layer = next(module for name, module in loaded.unet.named_modules()
                     if name.endswith("attn1.to_q"))
        found[scale] = layer(x[:, :layer.in_features])
    torch.testing.assert_close(found[0.5], (found[0.0] + found[1.0]) / 2)
    assert (found[1.0] - found[0.0]).abs().max() > 0.1


def test_the_reference_is_the_base():
    "With the adapter off the UNet is what it was; so the divergence is that from a copy."
    pipe = embedded()
    base = embedded().unet
    history = trained_with(pipe, beta=0.3)
    assert history[0]["ref_kl"] < history[1]["ref_kl"] and history[1]["ref_kl"] > 0
    x, words = torch.randn(2, 4, 8, 8), torch.randn(2, 8, pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        def ask(unet): return unet(x, torch.tensor(500), encoder_hidden_states=words).sample
        assert torch.equal(ask(AdapterOff(pipe.unet)), ask(base))
        assert not torch.allclose(ask(pipe.unet), ask(base), atol=1e-3)


def test_dropout_does_not_break_the_ratio():
    "An adapter with dropout, a UNet in training mode: sampling and loss still see one policy."
    pipe = embedded()
    add_lora(pipe.unet, 4)
    for name, module in pipe.unet.named_modules():
        if name.endswith("lora_dropout"): module["default"] = torch.nn.Dropout(0.5)
        if name.endswith("lora_B.default"): torch.nn.init.normal_(module.weight, std=0.1)
    pipe.unet.train()
    assert trained_with(pipe, lora_rank=0)[0]["max_log_ratio"] == 0


@pytest.mark.parametrize("name", ("sd2", "sd3"))
def test_training_goes_on_from_an_adapter(name, tmp_path):
    "Into a base in bf16: trained in float32 from where it was, at divergence 0, saved again."
    pipe = twin(name)
    small = SMALL | dict(img_size=32, eta=0.3)
    trained_with(pipe, **small | dict(lora_alpha=12.0, lora_targets=("to_k", "to_v")))
    save_lora(pipe, tmp_path / "first")
    begun = weights(network_of(pipe), adapter=True)
    config = make_config("emoji", **SMALL | dict(batch_size=8), eta=0.3, img_size=32, beta=0.1,
                         mixed_precision="bf16", clip_ratio=0.1, lora_from=str(tmp_path / "first"))
    assert (config.lora_alpha, config.lora_targets) == (12.0, ("to_k", "to_v"))
    assert make_config("blog", lora_from=str(tmp_path / "first")).lr == 3e-4
    with pytest.raises(ValueError, match="lora_rank is 8, and that of the adapter in .* is 4"):
        TrainingState(make_config("emoji", lora_from=str(tmp_path / "first"), lora_rank=8,
                                  img_size=32), twin(name))
    again = twin(name).to(torch.bfloat16)
    again.vae.float()
    state = TrainingState(config, again)
    now = weights(network_of(again), adapter=True)
    assert len(now) == len(begun) and {p.dtype for p in now.values()} == {torch.float32}
    assert all(torch.equal(p, begun[key.replace("default_0", "default")]) for key, p in now.items())
    assert {p.dtype for p in weights(network_of(again), False).values()} == {torch.bfloat16}
    shared = {p.data_ptr() for p in network_of(again).parameters()} & {
        p.data_ptr() for p in state.reference.parameters()}
    assert len(shared) == len(weights(network_of(again), False))
    history = train(config, again, lambda: "a fox", redness, state=state)
    assert history[0]["ref_kl"] == 0 < history[1]["ref_kl"] and history[0]["grad_norm"] > 0
    save_lora(again, tmp_path / "second")
    assert adapter_settings(tmp_path / "second") == adapter_settings(tmp_path / "first")
    loaded = twin(name)
    loaded.load_lora_weights(tmp_path / "first")
    trained_with(loaded, **small | dict(lora_rank=0))  # whoever has loaded it trains it just so
    assert {p.requires_grad for p in weights(network_of(loaded), False).values()} == {False}


def test_folders_that_hold_no_adapter(tmp_path):
    "Nothing there, no description, another part's, another model's: each in a sentence."
    def refused(match, pipe=None):
        with pytest.raises(ValueError, match=match):
            load_lora(pipe, tmp_path) if pipe else adapter_settings(tmp_path)
    refused("there is no adapter in")
    (tmp_path / "lora").mkdir()
    save_file({"unet.x": torch.zeros(4)}, tmp_path / "lora" / LORA_FILE)
    refused("Did you mean .*lora")
    save_file({"unet.to_q.lora_A.weight": torch.zeros(4, 8)}, tmp_path / LORA_FILE)
    refused("does not say its rank")
    save_file({"text_encoder.q.lora_A.weight": torch.zeros(4, 8)}, tmp_path / LORA_FILE,
              {"lora_adapter_metadata": "{}"})
    refused("an adapter of text_encoder, and one of a UNet or transformer alone")
    pipe = twin("sdxl")
    trained_with(pipe, img_size=32)
    save_lora(pipe, tmp_path)
    refused("not one of this model's", twin("sd2"))
    config = make_config("emoji", lora_from=tmp_path, img_size=32)
    for other in (twin("sd2"), embedded()):  # before anything is loaded into it
        with pytest.raises(ValueError, match="the adapter in .* is of another model: its .* does "
                                             "not fit this unet"):
            check_run(config, other)
    pipe = twin("sd2")  # convolutions have channels
    trained_with(pipe, img_size=32, lora_targets=("conv1",))
    save_lora(pipe, tmp_path)
    with pytest.raises(ValueError, match="its .*conv1 does not fit this unet"):
        check_run(make_config("emoji", lora_from=tmp_path, img_size=32), embedded())
    with pytest.raises(ValueError, match="lora_rank is 0, which means none: leave lora_rank out"):
        make_config("emoji", lora_from=tmp_path, lora_rank=0)
    config = make_config("emoji", lora_from=tmp_path, img_size=32)
    with pytest.raises(ValueError, match="an adapter of unet, and one of transformer alone"):
        TrainingState(config, twin("sd3"))


def test_checkpointing_changes_nothing():
    "With an adapter, a penalty and bf16: the same weights with and without, to the last bit."
    results = []
    for checkpointing in (False, True):
        pipe = embedded()
        trained_with(pipe, beta=0.1, mixed_precision="bf16", clip_ratio=0.5, num_epochs=1,
                     gradient_checkpointing=checkpointing)
        results.append(weights(pipe.unet, adapter=True))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_adapters_that_cannot_be():
    "A second one, none of the modules, ranks and scales that are none; nothing to train."
    pipe = embedded()
    add_lora(pipe.unet, 2)
    with pytest.raises(ValueError, match="has an adapter already.*lora_rank at 0"):
        add_lora(pipe.unet, 2)
    for target, what in (("to_x", "no module"), ("attn1", "a Attention"), ("norm1", "a .*Norm")):
        plain = embedded()
        with pytest.raises(ValueError, match=f"lora_targets: '{target}' is {what}"):
            trained_with(plain, lora_targets=("to_q", target))
        assert all(p.requires_grad for p in plain.unet.parameters())
    for wrong in (dict(lora_rank=-1), dict(lora_rank=2.5), dict(lora_alpha=0.0),
                  dict(lora_targets=()), dict(lora_targets="to_q"), dict(lora_alpha=8.0)):
        with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
            make_config("emoji", **wrong)
    frozen = embedded()
    frozen.unet.requires_grad_(False)
    with pytest.raises(ValueError, match="all weights of the network are frozen"):
        trained_with(frozen, lora_rank=0)
