"""Small pictures with labels, for benchmarks that train on them."""

import gzip
import io
import itertools
import zipfile
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor


def digits(folder: Path) -> tuple[Tensor, Tensor]:
    """Return MNIST's test images (10000, 784), of mean 0 and deviation 1 in all, and labels."""
    x, labels = raw_digits(folder)
    return normal(x.flatten(1)), labels


def pictures(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """Return CIFAR-10's training images (count, 3, 32, 32), of mean 0 and deviation 1 in all, and labels."""
    x, labels = raw_pictures(folder, "train", count)
    return normal(x), labels


def normal(x: Tensor) -> Tensor:
    """Give all numbers together the mean 0 and the deviation 1."""
    return (x - x.mean()) / x.std()


def raw_digits(folder: Path) -> tuple[Tensor, Tensor]:
    """Return MNIST's test images (10000, 1, 28, 28), from 0 to 255, and labels."""
    files = folder / "mnist10k"
    pixels = gzip.decompress((files / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((files / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    x = torch.tensor(bytearray(pixels), dtype=torch.float32).view(-1, 1, 28, 28)
    return x, torch.tensor(bytearray(labels)).long()


def raw_pictures(folder: Path, part: str, count: int, skip: int = 0) -> tuple[Tensor, Tensor]:
    """Return CIFAR-10's images (count, 3, 32, 32), from 0 to 255, and labels, with classes in turn.

    Args:
        folder: has cifar10_jpg.
        part: ``"train"``, of 20,000, or ``"test"``, of 10,000.
        count: of all classes together.
        skip: leaves the first of each class out.
    """
    files = {"train": "cifar10_train20k.zip", "test": "cifar10_test10k.zip"}
    with zipfile.ZipFile(folder / "cifar10_jpg" / files[part]) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        kinds = [[*group][skip:] for _, group in itertools.groupby(names, lambda name: name.split("/")[1])]
        turns = [(i, name) for each in zip(*kinds, strict=True) for i, name in enumerate(each)][:count]
        pixels = numpy.stack([numpy.asarray(Image.open(io.BytesIO(archive.read(name)))) for _, name in turns])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), torch.tensor([i for i, _ in turns])
