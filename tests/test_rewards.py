"""Tests of chapters `nbs/tutorial/04_rewards.ipynb` and `nbs/practice/20_sums.ipynb`."""
import os
import statistics
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image

from ddpo_scratch.animals import AnimalReward
from ddpo_scratch.checks import check_reward_fn, check_rewards
from ddpo_scratch.rewards import (
    AESTHETIC_CLIP,
    AESTHETIC_SHA256,
    AESTHETIC_URL,
    MLP,
    AestheticReward,
    JPEGCompressibility,
    aesthetic_model_normalize,
    aesthetic_scoring,
    load_aesthetic_model_weights,
    picture_tensor,
)
from ddpo_scratch.scorers.names import WeightedSum, make_eval_rewards, make_reward, make_rewards
from ddpo_scratch.scorers.scorers import clip_pixels
from helpers import drawings

SHARED = [folder / "shared" / "aesthetic" for folder in Path.cwd().resolve().parents]
AESTHETIC_CACHE = next((folder for folder in SHARED if folder.is_dir()), None)


# The real head, where its weights are at hand, against five matrices in NumPy.
def test_real_head_is_five_matrices():
    "The LAION weights through `MLP` in eval mode, and multiplied out by hand in float64."
    if AESTHETIC_CACHE is None:
        pytest.skip("the LAION head's weights (../shared/aesthetic) are not here")
    weights = load_aesthetic_model_weights(AESTHETIC_CACHE)
    model = MLP(768); model.load_state_dict(weights); model.eval()
    x = np.random.default_rng(0).standard_normal((5, 768))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    expected = x
    for layer in (0, 2, 4, 6, 7):
        expected = (expected @ weights[f"layers.{layer}.weight"].double().numpy().T
                    + weights[f"layers.{layer}.bias"].double().numpy())
    with torch.no_grad(): ours = model(torch.from_numpy(x).float()).numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
    assert expected.std() > 0.05


# CLIP's weights are a download of 0.9 GB, too much for a test. Its class can be built small with
# random weights, and the whole scoring path run through it; and the real architecture can be looked
# at for its activation. What no test here does is to score a picture with the real pair of CLIP and
# head.
def small_clip():
    "open_clip's CLIP class, 768-dimensional, with two small transformer blocks and random weights."
    torch.manual_seed(0)
    vision = dict(image_size=224, patch_size=56, width=64, layers=2, head_width=32)
    text = dict(context_length=8, vocab_size=100, width=32, heads=2, layers=1)
    return open_clip.model.CLIP(768, vision, text, quick_gelu=True).eval()


def test_aesthetic_scoring():
    "A batch against one picture at a time, the norm in NumPy; no gradient, float32, shape [B]."
    clip, head = small_clip(), MLP(768).eval()
    preprocess = open_clip.image_transform(224, is_train=False)
    imgs = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
    scores = aesthetic_scoring(imgs, preprocess, clip, aesthetic_model_normalize, head)
    assert scores.shape == (3,) and scores.dtype == torch.float32 and not scores.requires_grad
    for img, score in zip(imgs, scores):
        with torch.no_grad():
            embedding = clip.encode_image(preprocess(Image.fromarray(img))[None]).numpy()
        unit = torch.from_numpy(embedding / np.linalg.norm(embedding))
        with torch.no_grad():
            torch.testing.assert_close(head(unit)[0, 0], score, rtol=1e-4, atol=1e-5)


def test_aesthetic_reward_holds_its_weights():
    "With a small CLIP, not the download: loaded once, when asked; frozen; blind to prompts; bf16."
    from unittest.mock import patch
    loads, head = [], MLP(768).state_dict()
    def small(name, pretrained):
        assert (name, pretrained) == ("ViT-L-14-quickgelu", "openai")
        loads.append(1)
        return small_clip(), None, open_clip.image_transform(224, is_train=False)
    imgs = np.random.default_rng(1).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    prompts = ["a fox"] * 5
    with patch("ddpo_scratch.rewards.load_aesthetic_model_weights", lambda cache: head):
        with patch("open_clip.create_model_and_transforms", small):
            reward_fn = make_reward("aesthetic", "cpu")
            assert isinstance(reward_fn, AestheticReward) and not loads
            scores = reward_fn(imgs, prompts)
            again = AestheticReward("cpu", batch_size=2)(torch.from_numpy(imgs).permute(
                0, 3, 1, 2) / 255, [""] * 5)
            half = AestheticReward("cpu", torch.bfloat16)(imgs, prompts)
        with patch("open_clip.create_model_and_transforms", side_effect=OSError("no route")):
            with pytest.raises(ValueError, match="CLIP ViT-L/14 could not be had: no route"):
                make_reward("aesthetic", "cpu").ready()
    assert not reward_fn.training and not any(p.requires_grad for p in reward_fn.parameters())
    assert len(loads) == 3 and torch.equal(reward_fn(imgs, prompts), scores) and len(loads) == 3
    torch.testing.assert_close(again, scores, rtol=1e-4, atol=1e-4)
    assert scores.dtype == half.dtype == torch.float32 and 0 < (half - scores).abs().max() < 0.05


def real_pictures():
    "Photographs that come with matplotlib, the package's drawings enlarged, and noise."
    for name in ("grace_hopper.jpg", "Minduka_Present_Blue_Pack.png"):
        with get_sample_data(name) as file: yield np.asarray(Image.open(file).convert("RGB"))
    images, _ = drawings()
    for image in images[::400]:
        yield np.asarray(Image.fromarray(image).resize((512, 512), Image.Resampling.BICUBIC))
    yield np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    yield np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def test_pictures_on_the_device_are_pils():
    "CLIP's preprocessing of tensors against PIL's: the pixels; the real head's ratings to 0.02."
    preprocess = open_clip.image_transform(224, is_train=False)
    clip, head = small_clip(), MLP(768).eval()
    if AESTHETIC_CACHE: head.load_state_dict(load_aesthetic_model_weights(AESTHETIC_CACHE))
    for image in real_pictures():
        ours = clip_pixels(picture_tensor(image[None], "cpu"), 224, open_clip.OPENAI_DATASET_MEAN,
                           open_clip.OPENAI_DATASET_STD)
        theirs = preprocess(Image.fromarray(image))[None]
        levels = (ours - theirs).abs() * 0.27 * 255  # of grey
        assert levels.max() < 2.5 and levels.mean() < 0.02
        expected = aesthetic_scoring(
            image[None], preprocess, clip, aesthetic_model_normalize, head)
        with torch.no_grad(): rating = head(aesthetic_model_normalize(clip.encode_image(ours)))
        assert abs(rating - expected) < 0.02


def test_normalize():
    "Unit length along any axis and for any order; zero stays zero."
    a = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)); a[2] = 0
    for axis, order in ((-1, 2), (0, 2), (1, 1)):
        norms = np.linalg.norm(a.numpy(), order, axis, keepdims=True); norms[norms == 0] = 1
        np.testing.assert_allclose(
            aesthetic_model_normalize(a, axis, order).numpy(), a.numpy() / norms, rtol=1e-5)


def test_aesthetic_clip_uses_quickgelu():
    "On the meta device, without weights: the named architecture is OpenAI's, activation included."
    model = open_clip.create_model(AESTHETIC_CLIP, pretrained=None, device="meta")
    assert isinstance(model.visual.transformer.resblocks[0].mlp[1], open_clip.transformer.QuickGELU)
    assert (len(model.visual.transformer.resblocks) == 24
            and tuple(model.visual.proj.shape) == (1024, 768))


# A damaged file in the cache must be noticed and replaced. The download is real too: `file://` is a
# URL like any other.
def test_weights_are_checked_and_fetched_again():
    "Wrong bytes are never loaded: neither from the cache, nor from the web."
    from tempfile import TemporaryDirectory
    from unittest.mock import patch
    name = AESTHETIC_URL.rsplit("/", 1)[1]
    with TemporaryDirectory() as web, TemporaryDirectory() as cache:
        torch.save(MLP(768).state_dict(), Path(web) / name)
        good = sha256((Path(web) / name).read_bytes()).hexdigest()
        url = (Path(web) / name).as_uri()
        (Path(cache) / name).write_bytes(b"damaged")
        with patch.multiple("ddpo_scratch.rewards", AESTHETIC_URL=url):
            with pytest.raises(ValueError, match="could not be had"):
                load_aesthetic_model_weights(cache)
            assert (Path(cache) / name).read_bytes() == b"damaged"
            with patch.multiple("ddpo_scratch.rewards", AESTHETIC_SHA256=good):
                assert load_aesthetic_model_weights(cache).keys() == MLP(768).state_dict().keys()
                os.remove(Path(web) / name)
                load_aesthetic_model_weights(cache)
    if AESTHETIC_CACHE is not None:
        assert sha256((AESTHETIC_CACHE / name).read_bytes()).hexdigest() == AESTHETIC_SHA256


# The classifier and the judge, on the drawings that they were trained on; they must be two, not
# one.
def test_rewards_by_name():
    "Known names are listed; those without weights need no device."
    assert isinstance(make_reward("jpeg_compressibility", "cpu"), JPEGCompressibility)
    assert make_eval_rewards(None) == {}
    assert list(make_eval_rewards("right_animal,animal", "cpu")) == ["right_animal", "animal"]
    with pytest.raises(ValueError, match="leave out the weights"): make_eval_rewards("animal:2")
    with pytest.raises(ValueError, match="'beauty'. Known: aesthetic, animal, clip_score, jpeg_"
                                         "compressibility, jpeg_incompressibility, ocr, pickscore"):
        make_reward("beauty")


def test_a_weighted_sum_counts_each_part_in_its_own_deviations():
    "Against a plain retelling; units of the first pictures, whatever the batches and their scale."
    rng = np.random.default_rng(0)
    size, animal = 40 + 5 * rng.standard_normal(17), -3 + rng.standard_normal(17)
    prompts, weights = ["a prompt"] * 17, {"size": 1.0, "animal": -2.5, "equal": 4.0}
    first = statistics.mean(size[:6].tolist()), statistics.pstdev(size[:6].tolist())
    second = statistics.mean(animal[:6].tolist()), statistics.pstdev(animal[:6].tolist())
    expected = [(s - first[0]) / first[1] - 2.5 * (a - second[0]) / second[1]
                for s, a in zip(size.tolist(), animal.tolist())]
    for scale in (1.0, 1e-200, 1e200):
        parts = {"size": lambda images, prompts: scale * size[images],
                 "animal": lambda images, prompts: animal[images],
                 "equal": lambda images, prompts: [0.1] * len(prompts)}  # no float is 0.1
        both = WeightedSum(parts, weights)
        ours = [both(np.arange(6), prompts[:6])]
        ours += [both(np.array([i]), ["a prompt"]) for i in range(6, 17)]
        assert ours[0].dtype == torch.float64
        np.testing.assert_allclose(torch.cat(ours), expected, rtol=1e-6, atol=1e-9)


def test_sums_by_name():
    "On the command line; what makes no sense is refused, and the parts are checked one by one."
    both = make_reward("jpeg_compressibility:1, animal:0.5", "cpu")
    assert both.weights == {"jpeg_compressibility": 1.0, "animal": 0.5}
    assert isinstance(both.rewards["animal"], AnimalReward)
    assert make_reward("jpeg_compressibility,animal", "cpu").weights["animal"] == 1.0
    assert isinstance(make_reward("animal", "cpu"), AnimalReward)
    assert isinstance(make_reward(" animal ", "cpu"), AnimalReward)
    for name, match in (("animal:x", "the weight of animal must be a number, not 'x'"),
                        ("animal:", "must be a number, not ''"), ("animal:nan", "must not be 0"),
                        ("animal:0", "must not be 0"), ("animal:1e9", "between -1e9 and 1e9"),
                        ("animal:1,animal:2", "stands twice"),
                        ("animal:1,", "unknown reward ''"), ("beauty:1", "jpeg_incompressib")):
        with pytest.raises(ValueError, match=match): make_reward(name, "cpu")
    size = JPEGCompressibility()
    for rewards, weights in (({}, {}), ({"a": size}, {}), ({"a": size}, {"b": 1.0})):
        with pytest.raises(ValueError, match="a weight for each reward"):
            WeightedSum(rewards, weights)
    with pytest.raises(TypeError, match="a reward is a function"): WeightedSum({"a": 3}, {"a": 1.0})
    with pytest.raises(TypeError, match="must be a number"): WeightedSum({"a": size}, {"a": "1"})
    with pytest.raises(TypeError, match="must be a dict"): WeightedSum([size], [1.0])
    with pytest.raises(ValueError, match="a sum itself"): WeightedSum({"a": both}, {"a": 1.0})
    def bad(images, prompts): return [0.0, np.nan]
    plain = WeightedSum({"a": lambda images, prompts: [1.0, 2.0], "b": lambda images, prompts: [
        [5.0], [7.0]]}, {"a": 2.0, "b": -1.0}, scaled=False)
    assert plain(None, ["x", "y"]).tolist() == [-3.0, -3.0]
    assert not make_reward("animal:1,jpeg_compressibility:1", "cpu", scaled=False).scaled
    with pytest.raises(ValueError, match="must not be called 'mean'"):
        WeightedSum({"mean": size}, {"mean": 1.0})
    with pytest.raises(ValueError, match="b: the reward of image 1, prompt 'an owl', is nan"):
        WeightedSum({"a": lambda images, prompts: [0.0, 1.0], "b": bad}, {"a": 1.0, "b": 1.0})(
            None, ["a cat", "an owl"])


def test_what_a_reward_returns_is_not_believed():
    "Numbers of any kind, [B] or [B, 1]; nothing else, and nothing that is not finite."
    prompts = ["a fox", "an owl"]
    for fine in ([1, 2], np.array([1.0, 2.0]), torch.tensor([1.0, 2.0], requires_grad=True),
                 (True, 2.0), torch.tensor([1.0, 2.0], dtype=torch.bfloat16), [[1.0], [2.0]],
                 [torch.tensor(1.0), torch.tensor(2.0)], torch.tensor([[1.0], [2.0]])):
        assert torch.equal(check_rewards(fine, prompts), torch.tensor([1.0, 2.0]).double())
    assert check_rewards(torch.tensor([[3.0]]), ["a fox"]).tolist() == [3.0]
    assert check_rewards([1e9 + 0.1, 1e39], prompts).tolist() == [1e9 + 0.1, 1e39]
    for wrong in ([1.0], [[1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]], [1.0, 2.0, 3.0], 1.0):
        with pytest.raises(ValueError, match=r"shape \[2\]"): check_rewards(wrong, prompts)
    for wrong in (None, [torch.tensor(1.0, requires_grad=True), torch.tensor(2.0)],
                  ["good", "bad"], [None, 1.0], [1.0, [2.0]], ([1.0, 2.0], {}),
                  (np.zeros(2), None), (torch.zeros(2), {"info": 1})):
        with pytest.raises(ValueError, match="2 numbers"): check_rewards(wrong, prompts)
    with pytest.raises(ValueError, match=r"a tuple \(Tensor, dict\). Return the first"):
        check_rewards((torch.zeros(2), {}), prompts)
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="image 1, prompt 'an owl'"):
            check_rewards([0.0, bad], prompts)


class Scorer(torch.nn.Module):
    "A reward with weights."
    def forward(self, images, prompts): return self.bias.expand(len(images))


class Greedy(torch.nn.Module):
    "A reward that wants more than it gets."
    def forward(self, images, prompts, metadata): return torch.zeros(len(images)), {}


def test_a_reward_takes_pictures_and_prompts():
    "Functions, objects, modules, partials of two arguments pass; others are told what is wanted."
    def two(images, prompts): return [0.0] * len(images)
    def optional(images, prompts, scale=1.0): return [0.0] * len(images)
    def three(images, prompts, metadata): return [0.0] * len(images), {}
    for fine in (two, optional, JPEGCompressibility(), Scorer(), max, lambda *arguments: [],
                 partial(three, metadata=None), Scorer().forward):
        check_reward_fn(fine)
    for wrong, found in ((three, r"three\(images, prompts, metadata\)"),
                         (Greedy(), r"Greedy\(images, prompts, metadata\)"),
                         (lambda images: [], "lambda"), (7, "not a int"),
                         ("aesthetic", "not a str"), (lambda images, *, prompts: [], "lambda")):
        with pytest.raises(TypeError, match=found): check_reward_fn(wrong)


OWN = """
import torch
from ddpo_scratch.rewards import Scorer
from ddpo_scratch.animals import load_judge, animal_logits

def redness(images, prompts):
    return images[..., 0].mean((1, 2))

class Certainty(Scorer):
    def load(self):
        self.judge = load_judge()

    def score(self, images, prompts):
        return animal_logits(images, self.judge).softmax(1).amax(1)[:, None]

class Picky:
    def __init__(self, taste): pass
    def __call__(self, images, prompts): return [0.0] * len(prompts)

certain = Certainty("cpu", batch_size=2)
seven = 7
"""


def test_rewards_of_ones_own_by_name():
    "A function, a class, an object, of a file or a module; alone, weighted; wrong names are told."
    from tempfile import TemporaryDirectory
    images, prompts = drawings()[0][:5], ["a fox"] * 5
    with TemporaryDirectory() as folder:
        path = Path(folder) / "my rewards.py"
        path.write_text("from my_neighbour import one\n" + OWN)
        (Path(folder) / "my_neighbour.py").write_text("one = 1")
        red = make_reward(f"{path}:redness")
        assert check_rewards(red(images, prompts), prompts).tolist() == images[..., 0].mean(
            (1, 2)).tolist()
        made, there = make_reward(f"{path}:Certainty", "cpu"), make_reward(f"{path}:certain")
        assert made.device.type == "cpu" and not made.loaded
        assert make_reward(f"{path}:certain") is there  # the file is read once
        first = check_rewards(made(images, prompts), prompts)
        torch.testing.assert_close(check_rewards(there(images, prompts), prompts), first)
        both = make_reward(f"{path}:redness:0.5,animal,{path}:certain:-2")
        assert both.weights == {"redness": 0.5, "animal": 1.0, "certain": -2.0}
        assert make_reward("operator:sub")(3, 1) == 2  # of a module
        spaced = make_reward(f"{path} : certain", "cpu")
        assert spaced is there
        path.write_text(OWN.replace("[..., 0]", "[..., 1]"))  # of the same length
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
        green = make_reward(f"{path}:redness")(images, prompts)
        assert (green == images[..., 1].mean((1, 2))).all()
        (Path(folder) / "a,b").mkdir()
        (Path(folder) / "a,b" / "c.py").write_text(OWN)
        with pytest.raises(ValueError, match="commas stand between rewards"):
            make_rewards([f"{folder}/a,b/c.py:redness"], "cpu")
        for name, match in (
                (f"{folder}/none.py:redness", "there is no file '.*none.py'"),
                (f"{path}:rednes", "no 'rednes' in .*my rewards.py. Did you mean 'redness'"),
                (f"{path}:Picky", "cannot be made without arguments .*'taste'"),
                (f"{path}:redness:x", "weight of .*redness must be a number, not 'x'"),
                (f"{path}", "unknown reward .*rewards.py:redness"),
                ("nowhere.at_all:redness", "module 'nowhere.at_all' cannot be imported.*file"),
                ("./some:redness", "cannot be imported"),
                (f"{path}:redness,{path}:redness", "stands twice"),
                ("a:1", "unknown reward 'a:1'")):
            with pytest.raises(ValueError, match=match): make_reward(name)
        with pytest.raises(TypeError, match="a reward is a function"): make_reward(f"{path}:seven")
        path.write_text("import torch\n\nraise RuntimeError('no ink')\n")
        with pytest.raises(ValueError, match="line 3 raises RuntimeError: no ink"):
            make_reward(f"{path}:redness")
        path.write_text("def redness(:\n")
        with pytest.raises(ValueError, match="line 1 raises SyntaxError"):
            make_reward(f"{path}:redness")


def test_what_a_reward_is_given_is_looked_at():
    "Form, type, range, number of prompts: the error names reward, picture and prompt."
    good, prompts = torch.full((2, 3, 8, 8), 0.5), ["a fox", "an owl"]
    for reward in (JPEGCompressibility(), AnimalReward("cpu")):
        name = type(reward).__name__
        assert len(reward(good, prompts)) == len(reward(np.zeros((2, 8, 8, 3), np.uint8), prompts))
        for images, error, match in (
                ([1, 2], TypeError, "not a list"), (np.zeros((2, 8, 8, 3)), TypeError, "float64"),
                ((255 * good).byte(), TypeError, "Tensor of torch.uint8"),
                (np.zeros((8, 8, 3), np.uint8), ValueError, r"shape \[8, 8, 3\]"),
                (good.permute(0, 2, 3, 1), ValueError, r"\[B, 3, H, W\] .*shape \[2, 8, 8, 3\]"),
                (good[:1], ValueError, "1 images and 2 prompts"),
                (good * 2 - 1.5, ValueError, "values of image 0, prompt 'a fox', go from -0.5"),
                (torch.stack([good[0], good[1] * float("nan")]), ValueError,
                 "image 1, prompt 'an owl', go from nan")):
            with pytest.raises(error, match=f"{name}: .*{match}"): reward(images, prompts)
