"""Tests of chapter `nbs/practice/27_speed.ipynb`."""
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from diffusers import ModelMixin
from torch import _inductor as inductor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.distributions import Normal
from torch.utils._python_dispatch import TorchDispatchMode

from ddpo_scratch.trainer import speed
from ddpo_scratch.trainer.checkpoints import state_from_dict, state_to_dict
from ddpo_scratch.trainer.ddpo import DDPOTrainer
from ddpo_scratch.trainer.gradient import Objective, Samples, add_gradient
from ddpo_scratch.trainer.lora import add_lora
from ddpo_scratch.trainer.presets import make_config
from ddpo_scratch.trainer.speed import (
    Compiled,
    check_compiler,
    fastest,
    measured_micro_batch,
)
from ddpo_scratch.trainer.trainer import TrainingState
from ddpo_scratch.workshop.twins import TWINS
from helpers import embedded, sample, train, twin

PROMPTS, ADVANTAGES = ["a fox", "an owl", "a cat", "a bee"], torch.tensor([1.0, -1.0, 0.5, 0.0])


def moved(name, guidance, rank=0, amount=4e-4):
    "A policy that has left the one that drew these trajectories of ten steps."
    g = torch.Generator().manual_seed(0)
    pipe, size = (twin(name), (32, 32)) if name in TWINS else (embedded(name), (64, 64))
    policy, trajectory = sample(PROMPTS, pipe, 10, guidance, 1.0, size, g)
    if rank: add_lora(policy.network, rank, None, ("to_q", "to_k", "to_v", "to_out.0"))
    with torch.no_grad():
        for weight in policy.network.parameters():
            if weight.requires_grad:
                weight += (20 if rank else 1) * amount * torch.randn(weight.shape, generator=g)
    return policy, Samples(*trajectory, ADVANTAGES, policy.encode(PROMPTS))


def gradient(policy):
    "All gradients in one vector; they are cleared."
    weights = [weight for weight in policy.network.parameters() if weight.requires_grad]
    found = torch.cat([weight.grad.flatten().double() for weight in weights])
    policy.network.zero_grad()
    return found


def ours(policy, samples, micro_batch_size=None, equal_calls=False):
    "Gradient and metrics of the trainer."
    metrics = add_gradient(
        policy, samples, Objective(1e-4, 10.0), [*range(10)], micro_batch_size, equal_calls)
    return gradient(policy), metrics


def one_step_at_a_time(policy, samples):
    "The gradient of the formula as the paper has it, with torch's density."
    for step in range(10):
        density = Normal(*policy.step(samples.latents[step], step, samples.cond))
        log_probs = density.log_prob(samples.latents[step + 1]).mean((1, 2, 3))
        ratio = (log_probs - samples.log_probs[step]).exp()
        clipped = ratio.clamp(1 - 1e-4, 1 + 1e-4)
        (-torch.minimum(ratio * ADVANTAGES, clipped * ADVANTAGES).mean()).backward()
    return gradient(policy)


@pytest.mark.parametrize("name, guidance, rank", (
    ("sdxl", 5.0, 0), ("sd2", 1.0, 0), ("sdxl", 5.0, 4),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("emoji", 5.0, 0), ("emoji", 1.0, 0), ("emoji", 5.0, 4), ("emoji_flow", 3.0, 0)))))
def test_the_plain_loops_gradient(name, guidance, rank):
    "Whatever the calls: direction and length, and what is measured."
    policy, samples = moved(name, guidance, rank)
    plain = one_step_at_a_time(policy, samples)
    assert plain.norm() > 1e-3
    _, expected = ours(policy, samples)
    assert expected["clip_fraction"] > 0.15
    for pairs in (1, 4, 7, 16, 500):
        found, metrics = ours(policy, samples, pairs)
        assert torch.cosine_similarity(found, plain, dim=0) > 0.99999
        assert found.norm().item() == pytest.approx(plain.norm().item(), rel=1e-4)
        assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-5)


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


def test_a_gpu_is_asked_once_a_batch():
    "Between the first step and the numbers of a batch; the mode sees what it shall see."
    with Questions() as questions:
        x = torch.arange(3.0)
        x[x > 1].sum().item(); x.nonzero(); x.tolist(); x.cpu(); x.numpy(); bool(x[0] > 1)
    assert questions.asked == ["index", "_local_scalar_dense", "nonzero", "tolist", "cpu", "numpy",
                               "_local_scalar_dense"]
    for name in ("sdxl", "emoji_flow"):
        policy, samples = moved(name, 3.0)
        policy.schedule  # tables are made on the CPU
        with Questions() as questions:
            add_gradient(policy, samples, Objective(1e-4, 10.0), [*range(10)], 8)
        assert questions.asked == ["tolist"]


@pytest.mark.parametrize("backend", (
    "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_compiled_blocks_compute_the_same(backend):
    "The same gradient; graphs are made once."
    policy, samples = moved("sdxl", 5.0)
    expected, told = ours(policy, samples)
    torch._dynamo.reset()
    counters.clear()
    real = ModelMixin.compile_repeated_blocks
    def compile_with(network, **options): real(network, backend=backend, **options)
    with patch.object(ModelMixin, "compile_repeated_blocks", compile_with):
        blocks = Compiled(policy.network, None)
    ours(policy, samples)
    assert not counters["stats"]["unique_graphs"]  # not entered
    graphs = []
    for _ in range(2):
        with blocks: found, metrics = ours(policy, samples, 16, equal_calls=True)
        assert torch.cosine_similarity(found, expected, dim=0) > 0.99999
        assert found.norm().item() == pytest.approx(expected.norm().item(), rel=1e-4)
        assert metrics == pytest.approx(told, rel=1e-3, abs=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0 and not counters["graph_break"]


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
    policy, samples = moved("sdxl", 1.0)
    rows = []
    policy.network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    expected, told = ours(policy, samples)
    for most, sizes in ((12, [10] * 4), (16, [14] * 3), (40, [40]), (1, [1] * 40)):
        rows.clear()
        found, metrics = ours(policy, samples, most, equal_calls=True)
        assert rows == sizes
        assert (found - expected).norm() < 1e-4 * expected.norm()
        assert metrics == pytest.approx(told, rel=1e-3, abs=1e-5)


def test_the_number_is_the_fastest():
    "On a clock that the calls move: doubled while it pays; halved where memory is too small."
    now = [0.0]
    def run(cost, first, most):
        def call(samples):
            seconds = cost(samples)
            if seconds is None: raise torch.cuda.OutOfMemoryError("out of memory")
            now[0] += seconds
        with patch.object(speed.time, "perf_counter", lambda: now[0]):
            return fastest(call, first, most, torch.device("cpu"))
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
            assert fastest(full, 16, 1000, torch.device("cpu")) == 4
    for words in ("something else", "CUDA error: an illegal memory access was encountered"):
        def broken(samples): raise RuntimeError(words)
        with pytest.raises(RuntimeError, match=words): fastest(broken, 1, 8, torch.device("cpu"))


def test_measuring_leaves_no_trace():
    "No gradient, no random number; a run and its checkpoints remember it."
    pipe = twin("sd2")
    config = make_config("emoji", img_size=32, cfg=3.0, batch_size=3, num_timesteps=4,
                         micro_batch_size=None, num_epochs=1, num_samples_per_epoch=4,
                         samples_per_prompt=1)
    trainer = DDPOTrainer(config, pipe, lambda: "a fox", lambda images, prompts: [0.0])
    trainer.draw_prompts()
    before = torch.get_rng_state()
    pairs = measured_micro_batch(config, trainer.state.weights, trainer.trial, 3)
    assert pairs in (3, 6) and torch.equal(before, torch.get_rng_state())  # three steps of four
    assert all(weight.grad is None for weight in pipe.unet.parameters())
    prompts = iter(PROMPTS)
    state = TrainingState(config, pipe)
    assert state.micro_batch_size is None
    train(config, pipe, lambda: next(prompts), lambda images, prompts: images.mean((1, 2, 3)),
          state=state)
    assert state.micro_batch_size in (3, 6)
    again = TrainingState(config, twin("sd2"))
    state_from_dict(again, state_to_dict(state))
    assert again.micro_batch_size == state.micro_batch_size
    given = TrainingState(replace(config, micro_batch_size=7), twin("sd2"))
    state_from_dict(given, state_to_dict(state))
    assert given.micro_batch_size == 7


def test_runs_are_the_same_however_they_call():
    "Two epochs: one step at a time, one pair at a time, and all at once."
    def run(**changes):
        prompts = iter(PROMPTS * 4)
        config = make_config("emoji", **dict(
            num_epochs=2, num_samples_per_epoch=8, samples_per_prompt=1, batch_size=4, cfg=3.0,
            num_timesteps=4, img_size=32, lr=3e-4, clip_ratio=1e-4, micro_batch_size=4,
            gradient_checkpointing=True) | changes)
        return train(config, twin("sd2"), lambda: next(prompts),
                     lambda images, prompts: images[..., 0].mean((1, 2)))
    plain = run()
    assert plain[-1]["clip_fraction"] > 0.1
    for changes in (dict(micro_batch_size=32), dict(micro_batch_size=1)):
        for row, same in zip(plain, run(**changes)):
            for name in ("reward_mean", "loss", "grad_norm", "clip_fraction"):
                assert row[name] == pytest.approx(same[name], rel=2e-2, abs=2e-2)
