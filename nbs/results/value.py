"""An experiment, not measured yet: DDPO with an advantage for each step.

The conclusion of the blog names two refinements.

A value baseline: any number that does not depend on the action may be subtracted from the reward
without a bias. For the step from x_t to x_{t-1} this may be a prediction V(x_t, t, c), here of the
advantage A within the prompt's group, so that it has to find out only what the mean of the group
does not say: A_t = A − V(x_t, t, c). The step is no longer praised or blamed for what was settled
before it.

Discounting: the advantage of a step is multiplied by γ for each step that follows it.

`python nbs/results/runs.py value0 value1` compares both with the preset.
"""
import torch
import torch.nn.functional as F

from ddpo_scratch.trainer.ddpo import DDPOTrainer
from ddpo_scratch.trainer.gradient import Samples, add_gradient
from ddpo_scratch.trainer.trainer import averages


class ValueNet(torch.nn.Module):
    "Predicts an advantage from a noisy latent, its step, and the prompt; 0.2 M weights."

    def __init__(self, channels, side, steps, words):
        super().__init__()
        self.look = torch.nn.Sequential(
            torch.nn.Conv2d(channels, 32, 3, 2, 1), torch.nn.SiLU(),
            torch.nn.Conv2d(32, 64, 3, 2, 1), torch.nn.SiLU(), torch.nn.Flatten(),
            torch.nn.Linear(64 * (side // 4) ** 2, 128))
        self.step, self.prompt = torch.nn.Embedding(steps, 128), torch.nn.Linear(words, 128)
        self.judge = torch.nn.Sequential(
            torch.nn.SiLU(), torch.nn.Linear(128, 128), torch.nn.SiLU(), torch.nn.Linear(128, 1))

    def forward(self, x_t, step, words):  # [P, C, h, w], [P], [P, W] → [P]
        return self.judge(self.look(x_t) + self.step(step) + self.prompt(words)).squeeze(1)


class ValueTrainer(DDPOTrainer):
    "DDPO with an advantage for each step: times γ for each later step, less a value."
    gamma, baseline = 1.0, True

    def __init__(self, *args):
        super().__init__(*args)
        self.net, self.seen, self.explained = None, [], []

    def words(self, numbers):  # the mean of the text encoder's tokens, [B, W]
        cond = self.cache([self.state.rollout.prompts[i] for i in numbers])
        return cond.rows["encoder_hidden_states"].mean(1)

    def weigh(self, rewards):
        "Advantages as in DDPO, then those of each step; then the network learns from the epoch."
        super().weigh(rewards)
        A, latents = self.state.rollout.advantages.float(), torch.cat(
            [latents for _, latents, _ in self.state.rollout.samples], dim=1)
        steps = len(latents) - 1
        left = torch.arange(steps - 1, -1, -1)
        self.by_step = A * self.gamma ** left[:, None].float()  # [T, N]
        if not self.baseline: return
        words = self.words(range(len(A)))
        if self.net is None:
            torch.manual_seed(self.config.seed)
            self.net = ValueNet(*latents.shape[2:4], steps, words.shape[1])
            self.adam = torch.optim.AdamW(self.net.parameters(), 1e-3)
        with torch.no_grad():
            V = torch.stack([self.net(x_t, torch.full((len(A),), step), words)
                             for step, x_t in enumerate(latents[:-1])])
        self.explained.append((1 - (A - V).var(1) / A.var()).tolist())
        if self.seen: self.by_step = self.by_step - V  # the first epoch's knows nothing
        self.seen = [*self.seen[-7:], (latents[:-1], words, A)]  # of eight epochs
        for _ in range(200): self.learn_values()

    def learn_values(self):
        latents, words, A = self.seen[torch.randint(len(self.seen), ()).item()]
        step, i = torch.randint(len(latents), (64,)), torch.randint(len(A), (64,))
        loss = F.mse_loss(self.net(latents[step, i], step, words[i]), A[i])
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()

    def batch_gradient(self, kept, batch):
        self.batch = batch
        return super().batch_gradient(kept, batch)

    def add_gradient(self, kept, advantages, cond, backward):
        "DDPO's, step by step, each with its own advantages."
        rows = [add_gradient(
            self.policy, Samples(*kept, self.by_step[step, self.batch], cond), self.objective,
            [step], self.state.micro_batch_size, False, backward)
            for step in self.config.trained_steps]
        return averages(rows, [1] * len(rows))
