"""Tests of chapter `nbs/practice/35_elsewhere.ipynb`."""
import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import patch

import numpy as np
import pytest
import requests
import torch
from PIL import Image

from ddpo_scratch.scorers.names import WeightedSum
from ddpo_scratch.scorers.server import RewardServer, reward_server
from helpers import redness

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 12, 16, 3), dtype=np.uint8)
PROMPTS = ["a fox", "an owl", "a cat", "ein Löwe", ""]


@contextmanager
def serving(server):
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def no_pauses():
    with patch("urllib3.util.Retry.sleep"): yield


def test_the_rewards_of_a_server_are_those_of_the_reward():
    "Every image and prompt arrives as it is, in order, in several requests; tensors, too."
    seen = []
    def reward(images, prompts):
        seen.append((images, prompts))
        return redness(images, prompts)
    with serving(reward_server(reward, 0)) as url:
        far = RewardServer(url, batch_size=2)
        np.testing.assert_allclose(far(IMAGES, PROMPTS), redness(IMAGES, PROMPTS), rtol=1e-6)
        tensors = torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 255
        np.testing.assert_allclose(far(tensors, PROMPTS), redness(IMAGES, PROMPTS), rtol=1e-6)
    assert [len(prompts) for _, prompts in seen] == [2, 2, 1] * 2
    assert (np.concatenate([images for images, _ in seen[:3]]) == IMAGES).all()
    assert sum([prompts for _, prompts in seen[:3]], []) == PROMPTS
    assert far.beside


def test_facts_travel_with_the_prompts():
    "To a reward that wants them; one that gets none says so."
    def count(images, prompts, facts): return [fact["count"] for fact in facts]
    with serving(reward_server(count, 0)) as url:
        far = RewardServer(url, batch_size=3)
        facts = [{"count": number, "of": "apples"} for number in range(5)]
        assert far(IMAGES, PROMPTS, facts) == [0, 1, 2, 3, 4]
        with pytest.raises(ValueError, match="says 400: .*count wants facts about the prompts"):
            far(IMAGES, PROMPTS)
    def either(images, prompts, facts=None): return [5 if facts is None else 6] * len(prompts)
    with serving(reward_server(either, 0)) as url:
        far = RewardServer(url)
        assert (far(IMAGES, PROMPTS)[0], far(IMAGES, PROMPTS, [{}] * 5)[0]) == (5, 6)


class Moody(BaseHTTPRequestHandler):
    "Answers with what the test has laid out, one after the other."
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((json.loads(body), dict(self.headers)))
        status, text = self.server.answers.pop(0)
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args): pass


@contextmanager
def moody(*answers):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Moody)
    server.answers, server.asked = [*answers], []
    with serving(server) as url: yield server, url


def test_a_server_that_is_busy_is_asked_again():
    "429 and 500 and above, as often as was said; what was asked is the same every time."
    well = 200, b'{"rewards": [1, 2.5, -3, 0, 5]}'
    with moody((503, b""), (429, b""), (500, b"x"), well) as (server, url):
        far = RewardServer(url, headers={"Authorization": "Bearer key"})
        assert far(IMAGES, PROMPTS) == [1, 2.5, -3, 0, 5]
    first, *others = (body for body, _ in server.asked)
    assert len(others) == 3 and all(body == first for body in others)
    assert all(headers["Authorization"] == "Bearer key" for _, headers in server.asked)
    assert first["prompts"] == PROMPTS and "facts" not in first
    picture = Image.open(io.BytesIO(base64.b64decode(first["images"][3])))
    assert picture.format == "PNG" and (np.asarray(picture) == IMAGES[3]).all()
    with moody(*[(503, b"still busy")] * 3) as (server, url):
        with pytest.raises(ValueError, match="reward server at .* says 503: still busy"):
            RewardServer(url, tries=2)(IMAGES, PROMPTS)
        assert len(server.asked) == 3


@pytest.mark.parametrize("answer, reason", (
    ((404, b"not here"), "says 404: not here"), ((200, b"<html>"), "not '<html>'"),
    ((200, b'{"rewards": [1, 2]}'), "5 numbers"), ((200, b'{"scores": [1]}'), "5 numbers"),
    ((200, b'{"rewards": ["a", 1, 1, 1, 1]}'), "5 numbers"), ((200, b"[]"), "5 numbers")))
def test_answers_of_no_use(answer, reason):
    "One request, and an error with the address, without the password in it."
    with moody(answer) as (server, url):
        with pytest.raises(ValueError, match=reason) as left:
            RewardServer(url.replace("//", "//me:hunter2@"))(IMAGES, PROMPTS)
        assert len(server.asked) == 1
    assert url in str(left.value) and "hunter2" not in str(left.value)


def test_no_server_and_wrong_arguments():
    "Told at once, and by whom."
    with pytest.raises(ValueError, match="at http://127.0.0.1:9 cannot be asked: Connection"):
        RewardServer("http://me:hunter2@127.0.0.1:9", tries=1)(IMAGES, PROMPTS)
    for wrong, reason in ((dict(url="localhost:8000"), "must begin with http"),
                          (dict(batch_size=0), "batch_size"), (dict(timeout=0), "timeout")):
        with pytest.raises(ValueError, match=reason):
            RewardServer(**dict(url="http://127.0.0.1:9") | wrong)
    with pytest.raises(ValueError, match="a sum is not served"):
        reward_server(WeightedSum({"a": redness}, {"a": 1.0}))
    with pytest.raises(ValueError, match="RewardServer: 5 images and 1 prompts"):
        RewardServer("http://127.0.0.1:9")(IMAGES, ["a fox"])


def test_errors_of_a_reward_reach_the_client():
    "Also a NaN, and something that is no request; the server lives on."
    def moods(images, prompts):
        if "cat" in prompts[0]: raise RuntimeError("no cats")
        return [np.nan if "owl" in prompt else 1.0 for prompt in prompts]
    with serving(reward_server(moods, 0)) as url:
        far = RewardServer(url)
        with pytest.raises(ValueError, match="says 400: .*RuntimeError: no cats"):
            far(IMAGES[:1], ["a cat"])
        with pytest.raises(ValueError, match="says 400: .*owl"):
            far(IMAGES[:2], ["a fox", "an owl"])
        assert requests.post(url, data=b"{", timeout=10).status_code == 400
        assert requests.post(url, data=(b"{" for _ in "a"), timeout=10).status_code == 400
        assert requests.post(url, json={"images": []}, timeout=10).status_code == 400
        assert far(IMAGES[:1], ["a fox"]) == [1.0]


def test_a_served_reward_trains(tmp_path):
    "Two processes: the module as a program, and a run that asks it."
    serve = subprocess.Popen(
        [sys.executable, "-m", "ddpo_scratch.scorers.server", "jpeg_compressibility", "--port=0"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        url = serve.stdout.readline().split(" at ")[1].split(",")[0]
        (tmp_path / "far.py").write_text(
            "from ddpo_scratch.scorers.server import RewardServer\n"
            f"far = RewardServer({url!r})\n")
        done = subprocess.run(
            [sys.executable, "-m", "ddpo_scratch", "--reward=far.py:far",
             "--eval_rewards=jpeg_compressibility", "--num_epochs=1", "--num_samples_per_epoch=8",
             "--samples_per_prompt=1", "--batch_size=4", "--num_timesteps=2",
             "--num_eval_samples=2", "--name=x"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        serve.send_signal(signal.SIGINT)
        assert serve.wait(20) == 0
    finally: serve.kill()
    header, row = (tmp_path / "runs" / "x" / "metrics.csv").read_text().splitlines()
    found = dict(zip(header.split(","), row.split(",")))
    assert float(found["reward_mean"]) == pytest.approx(
        float(found["eval_jpeg_compressibility"]), abs=1e-6)
