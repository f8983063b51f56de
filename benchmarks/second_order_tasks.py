"""What second_order.py trains: small networks, what they learn from, and how far they are.

All scores are better the lower they are: the share of wrong answers, the mean squared error, nats a character.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import read
from torch import Generator, Tensor, nn
from torch.nn import functional

from rankwise.models import embedded_texts

Batch = tuple[Tensor, Tensor]
CLASSES, NOISE, CONTEXT = 10, 0.2, 64


@dataclass(frozen=True)
class Sizes:
    """How much is trained, and on how much.

    Args:
        images: to learn from; texts are not shortened.
        asked: images, or windows of a text, that choose and as many again that judge.
        width: of the first layer, or of the Transformer.
        batch: samples of a step.
        steps: of a training.
        every: steps between two looks at the curvature.
    """

    images: int
    asked: int
    width: int
    batch: int
    steps: int
    every: int


@dataclass(frozen=True)
class Task:
    """Something to learn.

    Args:
        build: makes the network.
        loss: mean over a batch's samples.
        score: sum over a batch's samples.
        learn: samples, on the first axis, each with its answer.
        choose: those that choose learning rates.
        judge: others.
        batch: samples of a step.
        positions: over which a sample's loss is a mean.
    """

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    score: Callable[[nn.Module, Batch], float]
    learn: Batch
    choose: Batch
    judge: Batch
    batch: int
    positions: int = 1

    def batches(self, seed: int) -> Iterator[Batch]:
        """Draw samples, each once in an epoch, without an end."""
        generator = Generator().manual_seed(seed)
        while True:
            rows = torch.randperm(len(self.learn[0]), generator=generator)
            for each in rows[: len(rows) // self.batch * self.batch].split(self.batch):
                yield self.learn[0][each], self.learn[1][each]

    def scored(self, model: nn.Module, data: Batch, device: torch.device) -> float:
        """Return the mean score."""
        model.eval()
        with torch.no_grad():
            parts = zip(data[0].split(500), data[1].split(500), strict=True)
            total = sum(self.score(model, (x.to(device), y.to(device))) for x, y in parts)
        model.train()
        return total / len(data[0])


class Residual(nn.Module):
    """Two convolutions with a way around them that has no parameters."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.two = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(out), nn.BatchNorm2d(out)])
        self.stride, self.more = stride, out - width

    def forward(self, x: Tensor) -> Tensor:
        """(..., width, h, w) -> (..., out, h / stride, w / stride)."""
        around = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        inside = functional.relu(self.norms[0](self.one(x)))
        return functional.relu(self.norms[1](self.two(inside)) + around)


def resnet(depth: int, width: int) -> nn.Module:
    """He and others' network for small images: 20, 32, ... layers, three stages of doubling width."""
    widths = [width, width, 2 * width, 4 * width]
    blocks = [
        Residual(widths[stage] if first else out, out, 2 if first and stage else 1)
        for stage, out in enumerate(widths[1:])
        for first in [True] + [False] * ((depth - 2) // 6 - 1)
    ]
    stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, CLASSES))


class Denoiser(nn.Module):
    """A U-Net that tells the noise in an image: three scales, each going up with what went down."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.first = nn.Conv2d(3, width, 3, 1, 1)
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise(widths))
        self.middle = nn.Conv2d(widths[-1], widths[-1], 3, 1, 1)
        self.ups = nn.ModuleList(nn.Conv2d(a + b, b, 3, 1, 1) for b, a in reversed([*itertools.pairwise(widths)]))
        self.last = nn.Conv2d(width, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, h, w) -> the same."""
        kept = [functional.relu(self.first(x))]
        for down in self.downs:
            kept.append(functional.relu(down(kept[-1])))
        y = functional.relu(self.middle(kept.pop()))
        for up in self.ups:
            wide = functional.interpolate(y, scale_factor=2)
            y = functional.relu(up(torch.cat([wide, kept.pop()], 1)))
        return self.last(y)


class Block(nn.Module):
    """Causal attention and an MLP, with norms before them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.queries, self.keys, self.values, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.heads = max(1, width // 32)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) -> the same."""
        y = self.norms[0](x)
        split = [each(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in self._inward()]
        mixed = functional.scaled_dot_product_attention(*split, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))

    def _inward(self) -> list[nn.Module]:
        return [self.queries, self.keys, self.values]


class Transformer(nn.Module):
    """Predicts the next character."""

    def __init__(self, characters: int, width: int, layers: int) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(characters, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)
        nn.init.normal_(self.letters.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, letters: Tensor) -> Tensor:
        """(N, T) -> (N, T, characters)."""
        x = self.letters(letters) + self.places.weight[: letters.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def images(data: Path | None, part: str, count: int) -> Batch:
    """Return images (N, 3, 32, 32) from 0 to 1, as many of each class, and labels; without data, made-up ones."""
    if data is None:
        generator = Generator().manual_seed(len(part))
        labels = torch.arange(count) % CLASSES
        means = torch.rand(CLASSES, 3, 32, 32, generator=Generator().manual_seed(0))
        return (means[labels] + 0.3 * torch.randn(count, 3, 32, 32, generator=generator)).clamp(0, 1), labels
    from images import raw_pictures

    pixels, labels = raw_pictures(data, part, count)
    return pixels / 255, labels


def halves(data: Batch) -> tuple[Batch, Batch]:
    """Cut samples into those that choose and those that judge."""
    middle = len(data[0]) // 2
    return (data[0][:middle], data[1][:middle]), (data[0][middle:], data[1][middle:])


def classify(data: Path | None, sizes: Sizes, depth: int) -> Task:
    """Tell what is on an image."""

    def normal(batch: Batch) -> Batch:
        return (batch[0] - 0.47) / 0.25, batch[1]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    def wrong(model: nn.Module, batch: Batch) -> float:
        return float((model(batch[0]).argmax(-1) != batch[1]).sum())

    learn, asked = (
        normal(images(data, *which)) for which in [("train", sizes.images), ("test", 2 * sizes.asked)]
    )
    return Task(lambda: resnet(depth, sizes.width), loss, wrong, learn, *halves(asked), sizes.batch)


def denoise(data: Path | None, sizes: Sizes) -> Task:
    """Tell the noise on an image, of which each image has its own."""

    def noisy(batch: Batch, seed: int) -> Batch:
        noise = NOISE * torch.randn(batch[0].shape, generator=Generator().manual_seed(seed))
        return (batch[0] - 0.5) + noise, noise

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch[0]) - batch[1]).square().flatten(1).sum(1).mean() / 100

    def error(model: nn.Module, batch: Batch) -> float:
        return float((model(batch[0]) - batch[1]).square().flatten(1).mean(1).sum())

    learn = noisy(images(data, "train", sizes.images), 1)
    asked = noisy(images(data, "test", 2 * sizes.asked), 2)
    return Task(lambda: Denoiser(sizes.width), loss, error, learn, *halves(asked), sizes.batch)


def spell(data: Path | None, sizes: Sizes) -> Task:
    """Tell the next character."""
    text = embedded_texts()["topics"] if data is None else read(data / "tinyshakespeare" / "input.txt.xz")
    letters = sorted(set(text))
    numbers = torch.tensor([letters.index(each) for each in text])
    windows = numbers[: len(numbers) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    def nats(model: nn.Module, batch: Batch) -> float:
        return float(loss(model, batch)) * len(batch[0])

    learn, asked = ((part[:, :-1], part[:, 1:]) for part in _apart(windows, 2 * sizes.asked))
    choose, judge = halves(asked)
    build = lambda: Transformer(len(letters), sizes.width, 2)  # noqa: E731 (it goes into the task)
    return Task(build, loss, nats, learn, choose, judge, sizes.batch, positions=CONTEXT)


def _apart(windows: Tensor, count: int) -> Sequence[Tensor]:
    """Keep windows aside from all over the text."""
    rows = torch.randperm(len(windows), generator=Generator().manual_seed(0))
    return windows[rows[count:]], windows[rows[:count]]


TASKS: dict[str, Callable[[Path | None, Sizes], Task]] = {
    "resnet8": lambda data, sizes: classify(data, sizes, 8),
    "resnet20": lambda data, sizes: classify(data, sizes, 20),
    "resnet32": lambda data, sizes: classify(data, sizes, 32),
    "denoiser": denoise,
    "transformer": spell,
}
