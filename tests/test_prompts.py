"""Tests of chapter `nbs/tutorial/05_prompts.ipynb`."""
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from torch.utils.data import DataLoader

from ddpo_scratch.prompts import (
    COMMON_ANIMALS,
    PromptDataset,
    common_animal_prompts,
    emoji_animal_prompts,
    emoji_common_animal_prompts,
    emoji_prompts,
    imagenet_animals,
    with_article,
)
from ddpo_scratch.trainer.presets import PromptFile


# torchvision keeps a list of its own. It renamed one animal, because ImageNet also has a crane that
# lifts things.
def test_imagenet_animals_agree_with_torchvision():
    "Same 397 names in the same order, from a second source."
    from torchvision.models import ResNet50_Weights
    theirs = ResNet50_Weights.DEFAULT.meta["categories"][:397]
    assert ([name if name != "crane bird" else "crane" for name in theirs]
            == list(imagenet_animals()))


def test_articles_go_by_sound():
    "Words that begin with a vowel's letter and not its sound, and the other way round."
    for noun in ("unicorn", "Unicorn", "ewe", "European hare", "unicycle", "urial", "user",
                 "one-eyed cat", "fox", "yak", "hare", "horse", "utility", "union"):
        assert with_article(noun) == f"a {noun}"
    for noun in ("owl", "ant", "Elephant", "umbrella", "urchin", "unlucky cat", "uninvited guest",
                 "hour", "heir", "onager", "otter", "eagle", "emu", "upupa", "ibex", "honest fox"):
        assert with_article(noun) == f"an {noun}"


def test_common_animals():
    "The paper's 45; of these the embedded model's 44, bee as honeybee and no squirrel."
    random.seed(0)
    assert len(set(COMMON_ANIMALS)) == 45
    assert {common_animal_prompts() for _ in range(2_000)} == set(map(with_article, COMMON_ANIMALS))
    known = {emoji_common_animal_prompts() for _ in range(2_000)}
    assert len(known) == 44 and known <= set(emoji_prompts())
    expected = {with_article(animal) for animal in COMMON_ANIMALS} - {"a bee", "a squirrel"}
    assert known == expected | {"a honeybee"}


def test_prompts_from_a_file():
    "One a line; comments and blank lines do not count; what cannot be read says so."
    with TemporaryDirectory() as folder:
        path = Path(folder) / "mine.txt"
        text = "\ufeff# views\r\n\r\n  a fox at dawn \r\nein Löwe, groß\n\n#a cat"
        path.write_bytes(text.encode())
        draw = PromptFile(str(path))
        assert {draw() for _ in range(50)} == {"a fox at dawn", "ein Löwe, groß"}
        for content, match in ((b"", "no prompt in"), (b"# nothing\n \n", "no prompt in"),
                               (b"\xff\xfe\x00", "cannot be read")):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=match): PromptFile(path)
        for missing in (path.with_name("not.txt"), folder):
            with pytest.raises(ValueError, match="cannot be read"): PromptFile(missing)


def test_only_line_ends_end_a_line(tmp_path):
    "As editors have them; not what `splitlines` takes for one besides."
    inside = ["a fox\u2029in snow", "an owl\x85at night", "a cat\x0bon a mat", "a\x1cdog\u2028here"]
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "prompts.txt").write_bytes(end.join(inside).encode())
        assert PromptFile(tmp_path / "prompts.txt").prompts == tuple(inside)


def test_prompts_with_facts(tmp_path):
    "A row for each; a prompt may stand twice, with the same facts."
    path = tmp_path / "prompts.jsonl"
    def read(*lines):
        path.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
        return PromptFile(path)
    rows = ('{"prompt": "three apples", "count": 3}', "", "# more", ' {"prompt": "a fox"}',
            '{"count": 3, "prompt": "three apples"}')
    found = read(*rows)
    assert found.prompts == ("three apples", "a fox", "three apples")
    assert found.facts == {"three apples": {"count": 3}, "a fox": {}}
    for line, match in (("{", "line 6 is not JSON"), ('["a fox"]', "line 6 must be an object"),
                        ('{"text": "a fox"}', "with a prompt, a string"),
                        ('{"prompt": " "}', "with a prompt, a string"),
                        ('{"prompt": 7}', "with a prompt, a string"),
                        ('{"prompt": "a fox", "count": 1}', "line 6: .* 'a fox' has other facts")):
        with pytest.raises(ValueError, match=match): read(*rows, line)
    (tmp_path / "prompts.json").write_text('{"prompt": "a fox"}')
    with pytest.raises(ValueError, match="lines of JSON: call the file prompts.jsonl"):
        PromptFile(tmp_path / "prompts.json")


def test_prompt_dataset():
    "As many prompts as asked for, whatever the batch size, each from one call."
    calls = iter(range(100))
    data = PromptDataset(lambda: f"prompt {next(calls)}", 10)
    assert [len(batch) for batch in DataLoader(data, batch_size=4)] == [4, 4, 2]
    assert next(calls) == 10
    assert list(PromptDataset(lambda: "x", 3)) == ["x"] * 3
    for num in (0, -1, 2.5, "4"):
        with pytest.raises(ValueError, match="at least 1"): PromptDataset(emoji_animal_prompts, num)
    with pytest.raises(TypeError, match="not a str"): PromptDataset("a fox", 4)
    with pytest.raises(ValueError, match="not the int 7"): PromptDataset(lambda: 7, 4)[0]
