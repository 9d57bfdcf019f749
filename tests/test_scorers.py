"""Tests of chapter `nbs/practice/21_scorers.ipynb`."""
# The large weights cannot be had here. The same classes are built small, saved, and loaded from
# files in the way in which the large ones would be.
import base64
import io
import json
import os
import random
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import open_clip
import pytest
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image, ImageDraw, ImageFont
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from ddpo_scratch.pipelines import load_pipeline
from ddpo_scratch.scorers.names import informed, make_reward
from ddpo_scratch.scorers.ocr import edit_distance
from ddpo_scratch.scorers.scorers import (
    CLIPScore,
    HPSScore,
    PickScore,
    VisionJudge,
    load_open_clip,
    number_in,
)

PROMPTS = ["a fox", "an owl", "a picture of a cat"]
TINY_CLIP = {
    "embed_dim": 32, "vision_cfg": {
        "image_size": 64, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}


def pictures():
    "Three parts of a photograph, of one size, not square."
    with get_sample_data("grace_hopper.jpg") as file: photo = np.asarray(Image.open(file))
    return np.stack([photo[i:i + 300, i:i + 400] for i in (0, 50, 100)])


def test_clip_score_for_any_model():
    "Cosines in NumPy of what open_clip's own preprocessing and encoders give; weights from a file."
    for mode, how in (("shortest", "bicubic"), ("squash", "bilinear")):
        with TemporaryDirectory() as folder:
            (Path(folder) / "tiny-clip.json").write_text(json.dumps(TINY_CLIP))
            open_clip.add_model_config(folder)
            torch.manual_seed(0)
            clip, _, preprocess = open_clip.create_model_and_transforms(
                "tiny-clip", image_resize_mode=mode, image_interpolation=how)
            torch.save(clip.state_dict(), f"{folder}/weights.pt")
            of_file = partial(CLIPScore, "cpu", batch_size=2, model="tiny-clip",
                              pretrained=f"{folder}/weights.pt")
            reward_fn, quick = (of_file(quick_gelu=quick).ready() for quick in (False, True))
            with pytest.raises(ValueError, match="does not say.*quick_gelu=True or False"):
                of_file().ready()
        for model, kind in ((reward_fn.clip_model, "GELU"), (quick.clip_model, "QuickGELU")):
            blocks = model.visual.transformer.resblocks
            assert {type(block.mlp[1]).__name__ for block in blocks} == {kind}
        reward_fn.clip_model.visual.preprocess_cfg |= dict(resize_mode=mode, interpolation=how)
        with torch.no_grad():
            seen = clip.eval().encode_image(torch.stack(
                [preprocess(Image.fromarray(image)) for image in pictures()])).numpy()
            asked = clip.encode_text(open_clip.get_tokenizer("tiny-clip")(PROMPTS)).numpy()
        lengths = np.linalg.norm(seen, axis=1) * np.linalg.norm(asked, axis=1)
        expected = 100 * (seen * asked).sum(1) / lengths
        ours = reward_fn(pictures(), PROMPTS).numpy()
        np.testing.assert_allclose(ours, expected, atol=0.02)
        assert np.ptp(expected) > 1
        assert not np.allclose(reward_fn(pictures(), PROMPTS[::-1]).numpy(), ours, atol=0.1)
    with pytest.raises(ValueError, match="CLIP tiny-clip with the weights 'none' could not be had"):
        CLIPScore("cpu", model="tiny-clip", pretrained="none").ready()


@pytest.mark.parametrize("height, width", ((300, 400), (400, 150), (64, 64), (37, 20)))
def test_hps_score(height, width, tmp_path):
    "A checkpoint as HPS has it; open_clip's own preprocessing of the longest side, in NumPy."
    (tmp_path / "tiny-clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    clip, _, preprocess = open_clip.create_model_and_transforms(
        "tiny-clip", image_resize_mode="longest")
    torch.save({"epoch": 1, "state_dict": clip.state_dict()}, tmp_path / "hps.pt")
    images = pictures()
    if height > width: images = images.transpose(0, 2, 1, 3)
    images = np.ascontiguousarray(images[:, :height, :width])
    assert images.shape[1:3] == (height, width)
    with torch.no_grad():
        seen = clip.eval().encode_image(torch.stack(
            [preprocess(Image.fromarray(image)) for image in images])).numpy()
        asked = clip.encode_text(open_clip.get_tokenizer("tiny-clip")(PROMPTS)).numpy()
    lengths = np.linalg.norm(seen, axis=1) * np.linalg.norm(asked, axis=1)
    ours = HPSScore(tmp_path / "hps.pt", "cpu", model="tiny-clip")(images, PROMPTS).numpy()
    np.testing.assert_allclose(ours, 100 * (seen * asked).sum(1) / lengths, atol=0.02)
    assert np.ptp(ours) > 0.5
    with pytest.raises(ValueError, match="none.pt' could not be had"):
        HPSScore(tmp_path / "none.pt", "cpu", model="tiny-clip").ready()


def test_the_activation_is_the_tags():
    "Without weights: whether open_clip is told to take QuickGELU, for tags of either kind."
    asked, real = [], open_clip.create_model
    def made(name, pretrained, force_quick_gelu):
        model = real(name, pretrained=None, force_quick_gelu=force_quick_gelu, device="meta")
        asked.append(type(model.visual.transformer.resblocks[0].mlp[1]).__name__)
        return model
    tags = (("ViT-B-32", "laion400m_e32"), ("ViT-B-32", "metaclip_400m"), ("ViT-B-32", "openai"),
            ("ViT-B-32-quickgelu", "laion400m_e32"), ("ViT-B-32", "LAION400M-e32"),
            ("ViT-B-32", "laion2b_s34b_b79k"))
    with patch("open_clip.create_model", made):
        for model, tag in tags: load_open_clip(model, tag, torch.float32)
        with pytest.raises(ValueError, match="trained with GELU: take ViT-B-32"):
            load_open_clip("ViT-B-32-quickgelu", "x", torch.float32, quick_gelu=False)
    assert asked == ["QuickGELU"] * 5 + ["GELU"]


def test_pick_score():
    "A small `CLIPModel` with its processor, loaded from folders, against its own logits."
    tokenizer = load_pipeline("emoji", "cpu").tokenizer  # which it changes
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(projection_dim=16, vision_config=dict(
        image_size=48, patch_size=16, **tower), text_config=dict(
            vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length,
            eos_token_id=tokenizer.eos_token_id, **tower))).eval()
    processor = CLIPProcessor(CLIPImageProcessor(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}), tokenizer)
    with TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")
        processor.save_pretrained(f"{folder}/processor")
        reward_fn = PickScore("cpu", batch_size=2, model=f"{folder}/model",
                              processor=f"{folder}/processor").ready()
    inputs = processor(images=[Image.fromarray(image) for image in pictures()], text=PROMPTS,
                       return_tensors="pt", padding="max_length", truncation=True)
    with torch.no_grad(): expected = model(**inputs).logits_per_image.diag()
    ours = reward_fn(pictures(), PROMPTS)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.01)
    assert expected.std() > 0.05 and not torch.allclose(
        reward_fn(pictures(), PROMPTS[::-1]), ours, atol=0.02)
    with patch("transformers.CLIPModel.from_pretrained", side_effect=OSError("no route")):
        with pytest.raises(ValueError, match="PickScore could not be had"):
            PickScore("cpu", processor="/nowhere/at/all").ready()


class Chat(BaseHTTPRequestHandler):
    "OpenAI's chat protocol; the model's name says how the server behaves."
    def do_POST(self):
        site, asked = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        words, picture = asked["messages"][0]["content"]
        with site.lock:
            site.busy += 1
            site.most, site.asked = max(site.most, site.busy), site.asked + 1
            number = site.asked
            site.seen.append((words["text"], picture["image_url"]["url"],
                              self.headers["Authorization"]))
            site.options.append({name: asked.get(name) for name in ("temperature", "max_tokens")})
            site.headers |= dict(self.headers)
        time.sleep(0.1)
        answer = {"id": "1", "object": "chat.completion", "created": 1, "model": asked["model"],
                  "choices": [{"index": 0, "finish_reason": "stop", "message": {
                      "role": "assistant", "content": f"I would say {len(words['text'])}.5"}}]}
        status, kind, body, length = 200, asked["model"], json.dumps(answer).encode(), None
        if kind == "busy at first" and number <= 3: status, body = 500, b"too busy"
        if kind == "closed": status, body = 401, b'{"error": {"message": "wrong key sk-secret"}}'
        if kind == "odd" and number <= 2: body = b'{"what": "is this"}'
        if kind == "cut off" and number == 1: body, length = body[:50], len(body)
        if kind == "half" and number == 1: body = body[:50]
        if kind == "wordy": body = body.replace(b"I would say", b"Well, no number. v")
        if kind == "shy" and "shy" in words["text"]: body = body.replace(b"I would", b"Not 3, I")
        if kind == "strict" and "shy" in words["text"]: status, body = 400, b'{"error": "unsafe"}'
        with site.lock: site.busy -= 1  # before the answer: the next request may follow at once
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        if length is not None: self.close_connection = True

    def log_message(self, *args): pass


@contextmanager
def chat_server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Chat) as site:
        site.lock, site.busy, site.most, site.asked, site.seen = threading.Lock(), 0, 0, 0, []
        site.options, site.headers = [], {}
        threading.Thread(target=site.serve_forever, daemon=True).start()
        yield site, f"http://127.0.0.1:{site.server_port}/v1"
        site.shutdown()


def test_a_judge_over_http():
    "A real server: order, picture and question, bounded concurrency; trouble that passes."
    pytest.importorskip("openai")
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    prompts = ["x" * i for i in range(6)]
    for kind in ("well", "busy at first", "odd", "cut off", "half"):
        with chat_server() as (site, url):
            judge = VisionJudge(url, kind, "{prompt}?", workers=3, client=dict(
                api_key="sk-secret\n", max_retries=2), asking=dict(temperature=0, max_tokens=9))
            tensors = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
            assert judge(tensors if kind == "well" else images, prompts) == [
                1.5, 2.5, 3.5, 4.5, 5.5, 6.5], kind
            assert 1 < site.most <= 3 and (site.asked > 6) == (kind != "well")
            text, picture, key = next(seen for seen in site.seen if seen[0] == "xx?")
            there = Image.open(io.BytesIO(base64.b64decode(picture.split(",")[1])))
            assert (np.asarray(there) == images[2]).all() and key == "Bearer sk-secret"
            assert site.options[0] == dict(temperature=0, max_tokens=9)
            VisionJudge(url, "well", "{prompt}?")(images[:1], ["a fox"])
            assert site.options[-1] == dict(temperature=None, max_tokens=None)


def test_what_openai_is_meant_to_get_goes_nowhere_else():
    "Key, organisation, project and headers of the environment stay there, and are not lost."
    pytest.importorskip("openai")
    theirs = {f"OPENAI_{name}": "secret" for name in ("API_KEY", "ORG_ID", "PROJECT_ID")}
    theirs["OPENAI_CUSTOM_HEADERS"] = "X-Theirs: secret"
    with chat_server() as (site, url), patch.dict(os.environ, theirs):
        VisionJudge(url, "well", "{prompt}")(np.zeros((1, 8, 8, 3), np.uint8), ["a fox"])
        assert "secret" not in str(site.headers) and "x-theirs" not in str(site.headers).lower()
        assert {name: os.environ[name] for name in theirs} == theirs


@pytest.mark.parametrize("kind", ("shy", "strict"))
def test_a_judge_that_will_not_say(kind):
    "One picture in twenty counts as was said. One in two, or nothing was said: the end."
    pytest.importorskip("openai")
    def ask(count, **options):
        prompts = [f"{i}shy" if i % count == 0 else str(i) for i in range(40)]
        judge = VisionJudge(url, kind, "{prompt}", useless=-1.0, client=dict(max_retries=1))
        for name, value in options.items(): setattr(judge, name, value)
        return judge(np.zeros((40, 8, 8, 3), np.uint8), prompts)
    with chat_server() as (site, url):
        marks = ask(20)
        assert [i for i, mark in enumerate(marks) if mark == -1.0] == [0, 20]
        with pytest.raises(ValueError, match="so it was for 11 of the last 21 answers"):
            ask(2, workers=1)  # one after the other, so that it is the eleventh that ends it
        assert ask(2, most_useless=0.5).count(-1.0) == 20
        with pytest.raises(ValueError, match="no answer of use"): ask(20, useless=None)
    with pytest.raises(ValueError, match="useless must be a finite number"):
        VisionJudge("http://127.0.0.1:9/v1", "x", useless=float("nan"))
    assert VisionJudge("http://127.0.0.1:9/v1", "x", client=dict(api_key=None)).key == ""


def test_a_judge_that_stays_away():
    "The address and the prompt in the error, and never the key; no server, no access, no number."
    pytest.importorskip("openai")
    image, prompt = np.zeros((1, 8, 8, 3), np.uint8), ["a fox"]
    with chat_server() as (site, url):
        for kind, reason in (("closed", "401"), ("wordy", "no number from 0 to 10")):
            match = f"'{kind}' at {url} .*'a fox': .*{reason}"
            with pytest.raises(ValueError, match=match) as left:
                VisionJudge(url, kind, client=dict(
                    api_key="sk-secret", max_retries=1))(image, prompt)
            assert "sk-secret" not in str(left.value)
        with pytest.raises(ValueError, match="VisionJudge: 1 images and 2 prompts"):
            VisionJudge(url, "well")(image, ["a", "b"])
    with pytest.raises(ValueError, match="http://127.0.0.1:9/v1 gives no answer.*[Cc]onnect"):
        VisionJudge("http://me:hunter2@127.0.0.1:9/v1", "well", client=dict(max_retries=0))(
            image, prompt)
    for answer, number in (("7", 7), ("Score: 8.5/10", 8.5), ("0", 0), ("**3**", 3), ("-1", None),
                           ("11", None), ("v2 is best", None), ("", None), ("8,5", None),
                           ("<think>I see 2</think> 9", 9), ("7 out of 10.", 7), ("3rd", None),
                           ("On a scale of 0 to 10, a 7", None), ("3 of the 4, so 7", None)):
        if number is None:
            with pytest.raises(ValueError, match="no number from 0 to 10"): number_in(answer)
        else:
            assert number_in(answer) == number


def slow_distance(one, other):
    "The edit distance by its definition."
    if not one or not other: return len(one) + len(other)
    return min(slow_distance(one[1:], other) + 1, slow_distance(one, other[1:]) + 1,
               slow_distance(one[1:], other[1:]) + (one[0] != other[0]))


def test_edit_distance():
    "Of short random words, against the definition."
    chance = random.Random(0)
    for _ in range(60):
        one, other = ("".join(chance.choices("abc", k=chance.randrange(6))) for _ in range(2))
        assert edit_distance(one, other) == slow_distance(one, other)
    assert edit_distance("kitten", "sitting") == 3


def written(text):
    "An image of a text."
    image = Image.new("RGB", (320, 96), "white")
    ImageDraw.Draw(image).text((16, 20), text, "navy", ImageFont.load_default(44))
    return np.asarray(image)


def test_text_in_images():
    "What is written is read by the real program; wrong letters count as said."
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    reward_fn = make_reward("ocr")
    images = np.stack([written("OPEN DAILY"), written("OPEN DAILY"), written("OPEN"), written("")])
    prompts = ['a sign that says "open daily"'] * 4
    rewards = reward_fn(images, prompts)
    assert rewards[:2] == [1, 1] and rewards[2] == pytest.approx(4 / 9) and rewards[3] == 0
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    assert reward_fn(tensors, prompts) == rewards
    assert reward_fn(images[:1], ["a sign"], [{"text": "Open"}]) == [1]
    assert reward_fn(images[2:3], ["a sign"], [{"text": "OPQN"}]) == [0.75]
    told = informed(reward_fn, PromptsWithText())  # of a prompt without facts, the quotes count
    assert told(images[:2], ["a sign", 'one that says "daily"']) == [1, 1]
    with pytest.raises(ValueError, match="which text should the image of 'a fox' show"):
        reward_fn(images[:1], ["a fox"])


class PromptsWithText:
    facts = {"a sign": {"text": "open"}}


def test_ocr_wants_its_packages():
    "The extra that brings them."
    with patch("importlib.util.find_spec", return_value=None):
        with pytest.raises(ValueError, match=r"ocr needs .*pip install 'ddpo_scratch\[rapidocr\]'"):
            make_reward("ocr")
