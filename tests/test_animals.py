"""Tests of chapter `nbs/tutorial/06_animals.ipynb`."""
from pathlib import Path

import numpy as np
import pytest
import torch

import ddpo_scratch
from ddpo_scratch.animals import (
    AnimalReward,
    animal_in,
    load_classifier,
    load_judge,
    name_animals,
    share_right,
)
from ddpo_scratch.prompts import emoji_animals, with_article
from ddpo_scratch.scorers.names import make_reward
from helpers import drawings


def test_animal_reward_pays_for_the_asked_animal():
    "The classifier's log-softmax by hand; the right name pays more than another."
    images, animals = drawings()
    reward_fn, some = make_reward("animal", "cpu"), slice(None, None, 13)
    images, animals = images[some], animals[some]
    right = reward_fn(images, [f"a picture of {with_article(animal)}" for animal in animals])
    wrong = reward_fn(images, [animals[i - 1] for i in range(len(animals))])
    assert (right > wrong + 1).all() and right.max() < 0 and right.dtype == torch.float32
    x = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 127.5 - 1
    logits = load_classifier().double()(x).numpy()
    expected = [row[list(emoji_animals()).index(animal)] - np.log(np.exp(row).sum())
                for row, animal in zip(logits, animals)]
    np.testing.assert_allclose(right.numpy(), expected, rtol=1e-3, atol=1e-4)
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255
    torch.testing.assert_close(reward_fn(tensors, animals), right, rtol=1e-3, atol=1e-3)
    large = np.repeat(np.repeat(images, 4, 1), 4, 2)
    assert np.mean(np.abs(reward_fn(large, animals).numpy() - right.numpy()) < 0.5) > 0.9


def test_the_judge_is_another():
    "Both know the drawings; built of other layers; 3 MB in all; 1 or 0 for each picture."
    images, animals = drawings()
    classifier, judge = load_classifier(), load_judge()
    for network in (classifier, judge):
        assert np.mean([a == b for a, b in zip(name_animals(images, network), animals)]) > 0.95
        assert not network.training and not any(p.requires_grad for p in network.parameters())
    kinds = [{type(layer) for layer in network} for network in (classifier, judge)]
    assert torch.nn.BatchNorm2d in kinds[0] - kinds[1] and torch.nn.GroupNorm in kinds[1] - kinds[0]
    package = Path(ddpo_scratch.__file__).parent
    files = [package / f"emoji_{name}.safetensors" for name in ("classifier", "judge")]
    assert sum(file.stat().st_size for file in files) <= 3_000_000
    assert share_right(images[:4], animals[:3] + ["an owl"], judge) == 0.75
    right = make_reward("right_animal", "cpu")(images[:4], animals[:3] + ["an owl"])
    assert right.tolist() == [1, 1, 1, 0] and right.dtype == torch.float32


def test_the_animal_is_read_off_the_prompt():
    "The longest name that fits; none or two are errors that say what was found."
    for prompt, animal in (("a polar bear", "polar bear"), ("A picture of a Bear!", "bear"),
                           ("a cat face", "cat face"), ("fox", "fox"), ("a t rex", "t rex"),
                           ("a front facing baby chick", "front facing baby chick")):
        assert animal_in(prompt) == animal
    for animal in emoji_animals():
        assert animal_in(with_article(animal)) == animal
    for prompt, match in (("a castle", "'a castle' names no animal"), ("", "names no animal"),
                          ("a foxglove", "names no animal"),
                          ("a cat and a dog", r"names 2 animals \(cat, dog\)")):
        with pytest.raises(ValueError, match=match):
            AnimalReward("cpu")(np.zeros((1, 64, 64, 3), np.uint8), [prompt])
