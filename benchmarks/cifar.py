"""A trained ResNet-20 and CIFAR-10 images."""

import itertools
from pathlib import Path

import torch
from images import raw_pictures
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # with which the networks were trained


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters: strided, and filled up with zero channels."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride = 1 if before == after else 2
        self.conv1 = nn.Conv2d(before, after, 3, self.stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.more = after - before

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        short = x[:, :, :: self.stride, :: self.stride]
        short = functional.pad(short, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return functional.relu(self.bn2(self.conv2(y)) + short)


class ResNet(nn.Module):
    """The CIFAR ResNet of 6 k + 2 layers."""

    def __init__(self, k: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [16, 16, 32, 64]
        for i, (before, after) in enumerate(itertools.pairwise(widths), 1):
            blocks = [Block(before if j == 0 else after, after) for j in range(k)]
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Make logits of images; labels may stand beside them in a batch."""
        x = functional.relu(self.bn1(self.conv1(x)))
        for i in (1, 2, 3):
            x = self.get_submodule(f"layer{i}")(x)
        return self.linear(x.mean((2, 3)))


def trained(data: Path) -> ResNet:
    """ResNet-20 with 91.78 % on the original images."""
    model = ResNet()
    model.load_state_dict(load_file(data / "resnet_cifar10" / "resnet20-12fca82f.safetensors"), strict=False)
    return model.eval()


def images(data: Path, split: str, each: int, skip: int = 0) -> tuple[Tensor, Tensor]:
    """Normalised images (count, 3, 32, 32) and labels: ``each`` of every class, after the first ``skip``."""
    pixels, labels = (by_class(part) for part in raw_pictures(data, split, CLASSES * each, skip))
    mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, DEVIATION))
    return ((pixels / 255 - mean) / deviation).contiguous(), labels


def by_class(turns: Tensor) -> Tensor:
    """Sort what has classes in turn."""
    return turns.unflatten(0, (-1, CLASSES)).transpose(0, 1).flatten(0, 1)
