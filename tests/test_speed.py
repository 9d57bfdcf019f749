"""Tests of chapter `nbs/practice/25_speed.ipynb`."""
import functools
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from diffusers import ModelMixin
from torch import _inductor as inductor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.utils._python_dispatch import TorchDispatchMode

from ddpo_scratch.models.families import network_of
from ddpo_scratch.trainer import speed
from ddpo_scratch.trainer.checkpoints import state_from_dict, state_to_dict
from ddpo_scratch.trainer.lora import add_lora
from ddpo_scratch.trainer.loss import compute_loss
from ddpo_scratch.trainer.sampling import encode_prompts, make_schedule, sd_sample
from ddpo_scratch.trainer.speed import (
    Compiled,
    cheapest,
    check_compiler,
    measured_batch,
    off,
    onto,
    searching_pays,
)
from ddpo_scratch.trainer.training import TrainingState, make_config, train
from ddpo_scratch.workshop.bench import Work, plain_gradient
from ddpo_scratch.workshop.twins import TWINS
from helpers import embedded, twin

PROMPTS, ADVANTAGES = ["a fox", "an owl", "a cat", "a bee"], torch.tensor([1.0, -1.0, 0.5, 0.0])


def moved(name, guidance, rank=0, amount=2e-4):
    "A pipeline that has left the policy that drew these trajectories."
    g = torch.Generator().manual_seed(0)
    pipe, size = (twin(name), 32) if name in TWINS else (embedded(name), 64)
    network = network_of(pipe)
    if rank:
        add_lora(network, rank, None, ("to_q", "to_k", "to_v", "to_out.0"))
    _, xs, log_probs = sd_sample(PROMPTS, pipe, size, size, guidance, 10, 1.0, "cpu", g)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.requires_grad:
                weight += (20 if rank else 1) * amount * torch.randn(weight.shape, generator=g)
    return pipe, xs, log_probs


def gradient(pipe, function, *args, **kwargs):
    network_of(pipe).zero_grad()
    function(*args, **kwargs)
    return torch.cat([weight.grad.flatten().double() for weight in network_of(pipe).parameters()
                      if weight.requires_grad])


def ours(pipe, xs, log_probs, guidance, advantages=ADVANTAGES, **changes):
    metrics = {}
    def loss():
        metrics["loss"] = compute_loss(
            xs, log_probs, advantages, 10.0, 1e-4, PROMPTS, pipe, 10, guidance, 1.0, "cpu",
            metrics=metrics, **changes)
    return gradient(pipe, loss), metrics


@pytest.mark.parametrize("name, guidance, rank", (
    ("sdxl", 5.0, 0), ("sd2", 1.0, 0), ("sdxl", 5.0, 4),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("emoji", 5.0, 0), ("emoji", 1.0, 0), ("emoji", 5.0, 4), ("emoji_flow", 3.0, 0)))))
def test_the_plain_loops_gradient(name, guidance, rank):
    "Whatever the calls, with the search and without: direction and length, and what is measured."
    pipe, xs, log_probs = moved(name, guidance, rank)
    work = Work(steps=10, guidance=guidance)
    plain = gradient(pipe, plain_gradient, pipe, work, PROMPTS, xs, log_probs, ADVANTAGES)
    assert plain.norm() > 1e-3
    _, expected = ours(pipe, xs, log_probs, guidance)
    assert expected["clip_fraction"] > 0.15
    for rows in (1, 8, 14, 32, 1000):
        for search in (False, True):
            found, metrics = ours(pipe, xs, log_probs, guidance, max_unet_batch=rows,
                                  skip_clipped=search)
            assert torch.cosine_similarity(found, plain, dim=0) > 0.99999
            assert found.norm().item() == pytest.approx(plain.norm().item(), rel=1e-4)
            assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_only_what_has_a_gradient_gets_a_graph():
    "Rows with and without: without the search all have one, with it those that are not cut off."
    pipe, xs, log_probs = moved("sdxl", 5.0)
    rows = {True: 0, False: 0}
    def note(module, args): rows[torch.is_grad_enabled()] += len(args[0])
    pipe.unet.register_forward_pre_hook(note)
    ours(pipe, xs, log_probs, 5.0, max_unet_batch=32)
    assert rows == {True: 80, False: 0}
    rows.update({True: 0, False: 0})
    _, metrics = ours(pipe, xs, log_probs, 5.0, max_unet_batch=32, skip_clipped=True)
    alive = round(40 * (1 - metrics["clip_fraction"])) - 10  # a sample has no advantage
    assert rows == {True: 2 * alive, False: 80} and alive < 25


def test_where_nothing_is_left_the_gradient_is_zero():
    "Not None, with which AdamW would stand still where zeros let it roll on."
    pipe, xs, log_probs = moved("sdxl", 1.0)
    found, metrics = ours(pipe, xs, log_probs, 1.0, torch.zeros(4), skip_clipped=True)
    assert (found == 0).all() and metrics["loss"] == 0
    assert all(weight.grad is not None for weight in pipe.unet.parameters())


class Questions(TorchDispatchMode):
    "Notes what the CPU has to wait for: the names of operations and of methods."
    methods = ("tolist", "cpu", "numpy")  # they are not dispatched

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, masks = func.overloadpacket.__name__, args[1] if len(args) > 1 else ()
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in masks)
        if name in ("_local_scalar_dense", "nonzero", "equal") or by_mask: self.asked.append(name)
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self.patches = ExitStack()
        for name in self.methods:
            def asking(x, name=name, real=getattr(torch.Tensor, name)):
                self.asked.append(name)
                return real(x)
            self.patches.enter_context(patch.object(torch.Tensor, name, asking))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.close()
        return super().__exit__(*error)


def test_nothing_is_asked_between_the_first_step_and_the_loss():
    "None without the search, one with it, and then the loss; the mode sees what it shall see."
    with Questions() as questions:
        x = torch.arange(3.0)
        x[x > 1].sum().item(); x.nonzero(); x.tolist(); x.cpu(); x.numpy(); bool(x[0] > 1)
    assert questions.asked == ["index", "_local_scalar_dense", "nonzero", "tolist", "cpu", "numpy",
                               "_local_scalar_dense"]
    for name in ("sdxl", "emoji_flow"):
        pipe, xs, log_probs = moved(name, 3.0)
        words = encode_prompts(PROMPTS, pipe, 3.0, "cpu")
        made = functools.cache(make_schedule)  # tables are made on the CPU
        with patch("ddpo_scratch.trainer.loss.make_schedule", made):
            ours(pipe, xs, log_probs, 3.0, words=words)
            for search in (False, True):
                with Questions() as questions:
                    ours(pipe, xs, log_probs, 3.0, max_unet_batch=16, skip_clipped=search,
                         words=words)
                assert questions.asked == ["index"] * search + ["tolist"]


@pytest.mark.parametrize("backend", (
    "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_compiled_blocks_compute_the_same(backend):
    "The plain gradient, with and without the search; graphs are made once, whatever is clipped."
    pipe, xs, log_probs = moved("sdxl", 5.0)
    expected, told = ours(pipe, xs, log_probs, 5.0)
    torch._dynamo.reset()
    counters.clear()
    real = ModelMixin.compile_repeated_blocks
    def compile_with(network, **options): real(network, backend=backend, **options)
    with patch.object(ModelMixin, "compile_repeated_blocks", compile_with):
        blocks = Compiled(pipe.unet, None)
    ours(pipe, xs, log_probs, 5.0)
    assert not counters["stats"]["unique_graphs"]  # not entered
    def compiled(**changes):
        with blocks:
            return ours(pipe, xs, log_probs, 5.0, max_unet_batch=32, even_calls=True, **changes)
    for search in (False, True):
        found, metrics = compiled(skip_clipped=search)
        assert torch.cosine_similarity(found, expected, dim=0) > 0.99999
        assert found.norm().item() == pytest.approx(expected.norm().item(), rel=1e-4)
        assert metrics == pytest.approx(told, rel=1e-3, abs=1e-5)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0 and not counters["graph_break"]
    for advantages in ([0.0, 0.0, 1.0, -1.0], [0.0, 0.0, 0.0, 1.0]):
        compiled(skip_clipped=True, advantages=torch.tensor(advantages))
    assert counters["stats"]["unique_graphs"] == graphs


def test_what_is_compiled_is_so_for_a_while():
    "Blocks inside, nothing outside or after an error; what was compiled before stays as it was."
    pipe = twin("sd2")
    def compiled(): return {module for module in pipe.unet.modules() if module._compiled_call_impl}
    blocks = Compiled(pipe.unet, None)
    assert not compiled()
    with pytest.raises(KeyError), blocks:
        assert {type(block).__name__ for block in compiled()} == set(pipe.unet._repeated_blocks)
        raise KeyError
    assert not compiled()
    pipe.unet.conv_in.compile()
    theirs = pipe.unet.conv_in._compiled_call_impl
    with Compiled(pipe.unet):
        assert len(compiled()) > 1 and pipe.unet.conv_in._compiled_call_impl is theirs
    assert compiled() == {pipe.unet.conv_in}


def test_a_compiler_is_looked_for():
    "Before a run begins, in words."
    torch._dynamo.reset()
    with inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), fresh_cache():
        with pytest.raises(ValueError, match="cannot be had on cpu: .*no-such-compiler.*without"):
            TrainingState(make_config("emoji", compile=True), twin("sd2"))
    torch._dynamo.reset()
    check_compiler(torch.device("cpu"))


def test_calls_of_one_size():
    "Filled up: not one row more than the largest call needs; no padding in what is measured."
    pipe, xs, log_probs = moved("sdxl", 1.0)
    rows = []
    pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    expected, told = ours(pipe, xs, log_probs, 1.0)
    for most, sizes in ((12, [10] * 4), (16, [14] * 3), (40, [40]), (1, [1] * 40)):
        rows.clear()
        found, metrics = ours(pipe, xs, log_probs, 1.0, max_unet_batch=most, even_calls=True)
        assert rows == sizes
        assert (found - expected).norm() < 1e-4 * expected.norm()
        assert metrics == pytest.approx(told, rel=1e-3, abs=1e-5)
    rows.clear()
    ours(pipe, xs, log_probs, 1.0, max_unet_batch=16, even_calls=True, skip_clipped=True)
    assert set(rows) == {14}


def test_copies_are_the_same():
    "Where all is on the CPU nothing is copied; `device` decides."
    x = torch.randn(3, 4)
    assert onto(torch.device("cpu"), x) is x and off(x) is x
    if torch.cuda.is_available():
        there = onto(torch.device("cuda"), x)
        assert there.is_cuda and torch.equal(off(there), x) and off(there).is_pinned()


def test_the_number_is_the_cheapest():
    "On a clock that the calls move: doubled while it pays; halved where memory is too small."
    now = [0.0]
    def run(cost, first, most):
        def call(samples):
            seconds = cost(samples)
            if seconds is None: raise torch.cuda.OutOfMemoryError("out of memory")
            now[0] += seconds
        with patch.object(speed.time, "perf_counter", lambda: now[0]):
            return cheapest(call, first, most, torch.device("cpu"))
    assert run(lambda n: 10 + n, 4, 1000) == 64         # (10 + n) / n falls by 7% from here
    assert run(lambda n: 10 + n, 4, 60) == 32           # no more than there are
    assert run(lambda n: n, 4, 1000) == 4               # larger is not cheaper
    assert run(lambda n: n * max(1, n / 16) + 5, 4, 1000) == 16
    assert run(lambda n: None if n > 20 else 10 + n, 4, 1000) == 16
    assert run(lambda n: None if n > 20 else 10 + n, 48, 1000) == 12
    for words in ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
                  "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
                  "[enforce fail] DefaultCPUAllocator: can't allocate memory"):
        def full(samples):
            if samples > 5: raise RuntimeError(words)
            now[0] += 10 + samples
        with patch.object(speed.time, "perf_counter", lambda: now[0]):
            assert cheapest(full, 16, 1000, torch.device("cpu")) == 4
    for words in ("something else", "CUDA error: an illegal memory access was encountered"):
        def broken(samples): raise RuntimeError(words)
        with pytest.raises(RuntimeError, match=words): cheapest(broken, 1, 8, torch.device("cpu"))


def test_measuring_leaves_no_trace():
    "No gradient, no random number; guidance counts twice; a run and its checkpoints remember it."
    pipe = twin("sd2")
    config = make_config("emoji", img_size=32, cfg=3.0, batch_size=3, num_timesteps=4,
                         max_unet_batch=None, num_epochs=1, num_samples_per_epoch=4,
                         samples_per_prompt=1)
    before = torch.get_rng_state()
    words = encode_prompts(["a fox"], pipe, 3.0, "cpu")
    rows = measured_batch(config, pipe, words, None)
    assert rows in (6, 12) and torch.equal(before, torch.get_rng_state())  # three steps of four
    assert all(weight.grad is None for weight in pipe.unet.parameters())
    prompts = iter(PROMPTS)
    state = TrainingState(config, pipe)
    assert state.unet_batch is None
    train(config, pipe, lambda: next(prompts), lambda images, prompts: images.mean((1, 2, 3)),
          state=state)
    assert state.unet_batch in (6, 12)
    again = TrainingState(config, twin("sd2"))
    state_from_dict(again, state_to_dict(state))
    assert again.unet_batch == state.unet_batch
    given = TrainingState(replace(config, max_unet_batch=7), twin("sd2"))
    state_from_dict(given, state_to_dict(state))
    assert given.unet_batch == 7


def test_when_a_search_pays():
    "Not at ratio 1, not where it is turned off; from a third on, a quarter, or with LoRA a half."
    def pays(*clipped, still=0.0, **changes):
        config = SimpleNamespace(**dict(
            gradient_checkpointing=False, skip_clipped=True, lora_rank=0) | changes)
        return searching_pays(config, [{"clip_fraction": share} for share in clipped], still)
    assert not pays() and not pays(0.9, 0.3) and pays(0.0, 0.4)
    assert pays(0.3, gradient_checkpointing=True) and not pays(0.2, gradient_checkpointing=True)
    assert not pays(0.9, skip_clipped=False)
    assert not pays(0.4, lora_rank=4) and pays(0.4, lora_rank=4, gradient_checkpointing=True)
    assert pays(still=0.5) and pays(0.2, still=0.2) and not pays(0.1, still=0.2)


def test_runs_are_the_same_however_they_call():
    "Two epochs: one step at a time, as many as fit, and with the search."
    def run(**changes):
        prompts = iter(PROMPTS * 4)
        config = make_config("emoji", **dict(
            num_epochs=2, num_samples_per_epoch=8, samples_per_prompt=1, batch_size=4, cfg=3.0,
            num_timesteps=4, img_size=32, lr=3e-4, clip_ratio=1e-4, max_unet_batch=8,
            skip_clipped=False, gradient_checkpointing=True) | changes)
        return train(config, twin("sd2"), lambda: next(prompts),
                     lambda images, prompts: images[..., 0].mean((1, 2)))
    plain = run()
    assert plain[-1]["clip_fraction"] > 0.1
    for changes in (dict(max_unet_batch=64), dict(skip_clipped=True), dict(max_unet_batch=1)):
        for row, same in zip(plain, run(**changes)):
            for name in ("reward_mean", "loss", "grad_norm", "clip_fraction"):
                assert row[name] == pytest.approx(same[name], rel=2e-2, abs=2e-2)
