"""Tests of chapter `nbs/tutorial/01_pipelines.ipynb`."""
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from ddpo_scratch.pipelines import ddim_scheduler, default_device, load_pipeline, pipeline_source


def test_plain_diffusers_opens_the_embedded_folder():
    "Nothing of ours is needed to use the model: same weights, float32."
    from diffusers import StableDiffusionPipeline
    plain = StableDiffusionPipeline.from_pretrained(pipeline_source("emoji"))
    ours = load_pipeline("emoji", "cpu")
    for part in ("unet", "vae", "text_encoder"):
        theirs = getattr(plain, part).state_dict()
        for key, value in getattr(ours, part).state_dict().items():
            torch.testing.assert_close(value, theirs[key].to(value.dtype), rtol=0, atol=0)


# A folder of the user's own, with the scheduler that Stable Diffusion 1.4 ships (PNDM): the noise
# schedule must survive the change to DDIM. Then all the other schedulers that fine-tunes come with,
# saved with nothing but their betas, as many are.
def test_local_folder_keeps_its_noise_schedule():
    "PNDM in, DDIM out, same betas and offsets; a path will do where a string does."
    pipe = load_pipeline("emoji", "cpu")
    pipe.scheduler = PNDMScheduler(beta_start=0.0012, beta_end=0.02, beta_schedule="linear",
                                   skip_prk_steps=True, steps_offset=1)
    with TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        again = load_pipeline(Path(folder), "cpu")
    assert isinstance(again.scheduler, DDIMScheduler) and again.scheduler.config.steps_offset == 1
    torch.testing.assert_close(again.scheduler.alphas_cumprod, pipe.scheduler.alphas_cumprod)


BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
OTHERS = ("PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep",
          "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "HeunDiscrete", "LCM", "DDPM")


def test_any_scheduler_becomes_stable_diffusions_ddim():
    "In memory and from a file: the same noise, no clipping unless asked for, no idle last step."
    for name in OTHERS:
        source = getattr(diffusers, f"{name}Scheduler")(**BETAS, prediction_type="v_prediction")
        with TemporaryDirectory() as folder:
            source.save_pretrained(folder)
            saved = type(source).from_pretrained(folder)
        for config in (source.config, saved.config):
            ours = ddim_scheduler(config)
            torch.testing.assert_close(ours.alphas_cumprod, source.alphas_cumprod)
            assert ours.config.prediction_type == "v_prediction", name
            says = {} if config is source.config else config  # a file says all that there is
            assert ours.config.clip_sample == says.get("clip_sample", False), name
            ours.set_timesteps(8)
            to_nothing = says.get("set_alpha_to_one", False)
            assert ours.timesteps.tolist()[::7] == ([875, 0] if to_nothing else [876, 1]), name
            assert ours.final_alpha_cumprod == (1 if to_nothing else ours.alphas_cumprod[0]), name


def test_what_a_configuration_says_stays():
    "Trailing steps, zero terminal SNR, clipping, an end without noise: as the checkpoint has it."
    said = dict(timestep_spacing="trailing", rescale_betas_zero_snr=True, clip_sample=True,
                set_alpha_to_one=True, steps_offset=0, num_train_timesteps=500)
    ours = ddim_scheduler(DDIMScheduler(**BETAS, **said).config).config
    assert {name: ours[name] for name in said} == said
    for other in (diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.EDMEulerScheduler()):
        with pytest.raises(ValueError, match="has no schedule of betas"):
            ddim_scheduler(other.config)
    with pytest.raises(ValueError, match="cannot be turned into DDIM: sigmoid"):
        ddim_scheduler(diffusers.DDPMScheduler(beta_schedule="sigmoid").config)
    euler = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    assert ddim_scheduler(euler.config).config.timestep_spacing == "trailing"


def test_bad_names_and_devices():
    "Each message says what was given and what to do."
    with pytest.raises(ValueError, match="'emojis'.*'emoji'.*hub id"):
        load_pipeline("emojis")
    for name in ("./emojis", "~/emojis", "/emojis", "emojis/", "a/b/c"):
        with pytest.raises(ValueError, match="unknown pipeline"):
            load_pipeline(name)
    with pytest.raises(TypeError, match="not by a int"):
        load_pipeline(4)
    for device, reason in (("gpu", "no device of that name"), ("meta", "holds no data"),
                           ("cuda:99", ""), ("", "no device of that name")):
        with pytest.raises(ValueError, match=f"'{device}' cannot be used .*{reason}") as found:
            load_pipeline("emoji", device)
        assert len(str(found.value)) < 300
    if not torch.cuda.is_available():
        assert default_device() == torch.device("cpu")


def test_folders_that_hold_something_else():
    "A run's folder points to its pipeline; another class of pipeline is named."
    with TemporaryDirectory() as folder:
        run = Path(folder) / "a"
        (run / "pipeline").mkdir(parents=True)
        index = '{"_class_name": "StableDiffusionInpaintPipeline"}'
        (run / "pipeline" / "model_index.json").write_text(index)
        for name in (run, str(run)):
            with pytest.raises(ValueError, match="Did you mean '.*/a/pipeline'"):
                load_pipeline(name, "cpu")
        with pytest.raises(ValueError, match="is a StableDiffusionInpaintPipeline; what can be"):
            load_pipeline(run / "pipeline", "cpu")


@pytest.mark.parametrize("name, hint", (
    ("nobody/nothing-of-this-name", "'emoji', which needs no download"),
    ("runwayml/stable-diffusion-v1-5", "moved to 'stable-diffusion-v1-5/stable-diffusion-v1-5'")))
def test_unreachable_hub_says_what_was_asked_for(name, hint):
    "`ValueError` with the hub id and the way out; where a checkpoint has moved, its new place."
    with patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):  # as its environment variable
        with pytest.raises(ValueError, match=f"the pipeline '{name}' could not be loaded") as left:
            load_pipeline(name, "cpu")
    assert hint in str(left.value)
