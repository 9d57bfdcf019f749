"""Tests of chapter `nbs/practice/37_report.ipynb`."""
import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from itertools import count, cycle

import numpy as np
import pytest
import torch
from PIL import Image

from ddpo_scratch.command.figures import SIDE, thumbnails
from ddpo_scratch.command.folder import reason_of
from ddpo_scratch.command.report import changed_settings, from_here, longest_silence, to_go
from ddpo_scratch.command.run import run_training
from ddpo_scratch.trainer.checkpoints import Stopped
from ddpo_scratch.trainer.policy import Ruined
from ddpo_scratch.trainer.presets import make_config
from helpers import redness, twin

SMALL = dict(num_epochs=2, num_samples_per_epoch=4, samples_per_prompt=1, num_eval_samples=3,
             sample_batch_size=4, batch_size=2, num_timesteps=2, img_size=32, save_every=1)
ODD = ['<b>"fox" & owl</b>', "a dog", "{{ 7 * 7 }}"]


class Page(HTMLParser):
    "What a browser would read: texts by tag, pictures, and everything that is asked of others."
    def __init__(self, text):
        super().__init__()
        self.images, self.texts, self.asked, self.tags, self.pairs = [], {}, [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "img", "br", "input"): self.tags.append(tag)
        if tag == "img": self.images.append(attributes)
        if tag == "div" and self.tags[-2:] == ["li", "div"]: self.pairs.append("")
        self.asked += [value for name, value in attributes.items()
                       if name in ("src", "href") and not value.startswith("data:")]

    def handle_endtag(self, tag):
        assert self.tags.pop() == tag  # all are closed, in order

    def handle_data(self, data):
        words = " ".join(data.split())
        if words: self.texts.setdefault(self.tags[-1], []).append(words)
        if words and self.pairs and "li" in self.tags and "div" not in self.tags:
            self.pairs[-1] = f"{self.pairs[-1]} {words}".strip()

    def says(self, tag): return " ".join(self.texts.get(tag, []))


def decoded(image):
    "The picture that an address holds."
    head, content = image["src"].split(",", 1)
    assert head.startswith("data:image/") and head.endswith(";base64")
    return base64.b64decode(content)


def run(folder, reward_fn=redness, resume=False, **changes):
    names = cycle(ODD)
    run_training(make_config("emoji", **SMALL | changes), twin("sd2"), lambda: next(names),
                 reward_fn, folder, resume, eval_rewards={"blue": lambda i, p: -redness(i, p)})
    return Page((folder / "report.html").read_text("utf-8"))


def test_the_page_of_a_whole_run(tmp_path):
    "Odd prompts are texts; the rewards are the table's, the pictures whole, the code the card's."
    page = run(tmp_path)
    assert not page.asked and not page.tags and all(image["alt"] for image in page.images)
    assert "Finished." in page.says("strong") and "Epoch 2 of 2" in page.says("p")
    rows = [*csv.DictReader((tmp_path / "evaluation.csv").open(encoding="utf-8"))]
    pairs = page.images[:6]
    assert [image["alt"] for image in pairs] == [
        f"{row['prompt']}, {when}" for row in rows for when in ("before training", "after epoch 2")]
    assert {row["prompt"] for row in rows} == {*ODD}
    for row, said in zip(rows, page.pairs, strict=True):
        before, after = float(row["before"]), float(row["after"])
        assert said == f"{row['prompt']} {before:.3f} → {after:.3f}"
    for image in pairs: assert Image.open(io.BytesIO(decoded(image))).size == (32, 32)
    drawn, strip = page.images[6:]
    assert b"<svg" in decoded(drawn) and "in epoch 2" in drawn["alt"]
    assert decoded(strip) == (tmp_path / "progress.png").read_bytes()
    mean = np.mean([float(row["eval_blue_after"]) for row in rows])
    assert page.texts["td"][:6][-1] == f"{mean:.4f}" and page.texts["td"][:1] == ["untrained"]
    card = (tmp_path / "pipeline" / "README.md").read_text("utf-8")
    code = card.split("```python\n")[1].split("```")[0].replace(
        "path/to/this/folder", str(tmp_path / "pipeline"))
    assert " ".join(code.split()) in page.says("pre")


def test_the_page_says_how_far_the_run_is(tmp_path):
    "Read while it samples the second epoch; then it is stopped, and goes on with its old pictures."
    seen, calls = [], count()
    def watching(images, prompts):
        if len(prompts) == 4 and next(calls) == 1:
            seen.append(Page((tmp_path / "report.html").read_text("utf-8")))
            raise Stopped("SIGINT")
        return redness(images, prompts)
    with pytest.raises(Stopped): run(tmp_path, watching)
    assert "Running." in seen[0].says("strong") and "script" in seen[0].texts
    assert "Epoch 1 of 2, " in seen[0].says("p") and "to go" in seen[0].says("p")
    stopped = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "Stopped." in stopped.says("strong") and "script" not in stopped.texts
    assert "Ended by Ctrl-C. " in stopped.says("p")
    assert f"To go on: ddpo_train --resume {tmp_path}" in stopped.says("p")
    assert [image["alt"].rpartition(", ")[2] for image in stopped.images[:3]] == [
        "before training"] * 3
    page = run(tmp_path, watching, resume=True)
    assert "Finished." in page.says("strong")
    assert page.images[:6:2] == stopped.images[:3]


def test_what_differs_from_the_preset():
    "Names and both values; the device is this machine's, not a wish."
    config = make_config("emoji", num_epochs=3, device="cpu", algorithm="draft")
    preset, changes = changed_settings(config)
    assert preset == "emoji" and [change[0] for change in changes] == ["num_epochs"]
    assert changed_settings(make_config("flux"))[1] == []
    unknown = make_config("emoji", pipeline="__main__:made")
    assert changed_settings(unknown)[0] == "blog"


def test_small_pictures():
    "Of any shape: no side is longer, none is made larger, and the colours stay."
    wide = np.zeros((20, 96, 384, 3), np.uint8)
    wide[..., 0] = 200
    small = thumbnails(wide)
    assert small.shape == (16, 48, SIDE, 3) and small.dtype == torch.uint8
    assert (small[..., 0] == 200).all() and (small[..., 1:] == 0).all()
    assert thumbnails(wide[:2, :, :64]).shape == (2, 96, 64, 3)


def test_the_time_to_go():
    "By the last ten epochs, of which the first, slow one is none; with all that is between them."
    clock = [(0, 0.0), *[(i, 500.0 + 30 * i) for i in range(1, 13)]]
    assert to_go(24, clock) == ", 30.0 s each: about 6.0 min to go"
    assert to_go(24, clock[:2]) == ", 530.0 s each: about 3.4 h to go"
    assert to_go(24, clock[:1]) == "" == to_go(12, clock)
    assert longest_silence(clock[:1]) == 24 * 60 and longest_silence(clock) == 10 + 5 * 530 / 60


def test_what_ended_a_run():
    "A second Ctrl-C has no words of its own."
    assert reason_of(KeyboardInterrupt()) == reason_of(Stopped("SIGINT")) == "Ctrl-C."
    assert reason_of(Stopped("SIGTERM")) == "SIGTERM."
    assert reason_of(MemoryError()) == "MemoryError."
    assert reason_of(Ruined("broke. (Try less.)")) == "Ruined: broke. (Try less.)"


def test_paths_in_code(monkeypatch, tmp_path):
    "Relative to where the command was started, where that can be; names of the hub as they are."
    monkeypatch.chdir(tmp_path)
    assert from_here(tmp_path / "runs" / "a" / "lora") == from_here("runs/a/lora") == "runs/a/lora"
    assert from_here("owner/name") == "owner/name" and from_here("emoji") == "emoji"
    assert from_here(tmp_path.parent / "other") == (tmp_path.parent / "other").as_posix()


def test_a_page_about_preferences(tmp_path):
    "There is no reward in such a run: the curve is the implicit accuracy, and says so."
    (tmp_path / "pairs").mkdir()
    for number in range(4):
        Image.new("RGB", (32, 32), (60 * number, 0, 0)).save(tmp_path / f"pairs/{number}.png")
    (tmp_path / "pairs" / "preferences.jsonl").write_text("".join(
        json.dumps({"prompt": "a fox", "preferred": f"{i}.png", "rejected": f"{3 - i}.png"}) + "\n"
        for i in (0, 1)))
    page = run(tmp_path / "run", algorithm="dpo", preferences=str(tmp_path / "pairs"), beta=1.0,
               samples_per_prompt=2)
    rows = [*csv.DictReader((tmp_path / "run" / "metrics.csv").open(encoding="utf-8"))]
    shown, = (image["alt"] for image in page.images if "in epoch 2" in image["alt"])
    first, last = (float(row["implicit_accuracy"]) for row in (rows[0], rows[-1]))
    assert shown == (f"The implicit accuracy is {first:.4f} in epoch 1 and {last:.4f} in epoch 2.")
    assert "The implicit accuracy of each epoch" in page.says("p")
    assert not any(str(tmp_path) in page.says(tag) for tag in ("h1", "td", "p"))


def test_a_page_says_why_a_run_ended(tmp_path):
    "By patience, or by weights that are lost: one sentence, and no picture of what is not there."
    page = run(tmp_path / "patient", lambda images, prompts: np.zeros(len(images)), num_epochs=5,
               eval_every=1, patience=1)
    assert "Finished." in page.says("strong") and "Epoch 1 of 5" in page.says("p")
    assert "because 1 evaluation was no better (--patience)." in page.says("p")
    with pytest.raises(Ruined): run(tmp_path / "mad", lr=1e6)
    page = Page((tmp_path / "mad" / "report.html").read_text("utf-8"))
    assert "Stopped." in page.says("strong") and "Ruined: " in page.says("p")
    assert not re.search(r"[.!?…][)]?[.]", page.says("p")), page.says("p")


def test_the_page_does_not_hide_an_error(tmp_path):
    "Where it cannot be written any more, the run's own error is what is seen."
    def leaving(images, prompts):
        if len(prompts) == 4:
            (tmp_path / "run" / "report.html").unlink()
            (tmp_path / "run" / "report.html").mkdir()
            raise Stopped("SIGTERM")
        return redness(images, prompts)
    with pytest.raises(Stopped): run(tmp_path / "run", leaving)
