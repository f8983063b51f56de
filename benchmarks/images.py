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
    files = folder / "mnist10k"
    pixels = gzip.decompress((files / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((files / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    x = torch.tensor(bytearray(pixels), dtype=torch.float32).view(-1, 784)
    return (x - x.mean()) / x.std(), torch.tensor(bytearray(labels)).long()


def pictures(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """Return CIFAR-10's training images (count, 3, 32, 32), of mean 0 and deviation 1 in all, and labels."""
    with zipfile.ZipFile(folder / "cifar10_jpg" / "cifar10_train20k.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        kinds = [[*group] for _, group in itertools.groupby(names, lambda name: name.split("/")[1])]
        turns = [(i, name) for each in zip(*kinds, strict=True) for i, name in enumerate(each)][:count]
        pixels = numpy.stack([numpy.asarray(Image.open(io.BytesIO(archive.read(name)))) for _, name in turns])
    x = torch.tensor(pixels).permute(0, 3, 1, 2).float()
    return (x - x.mean()) / x.std(), torch.tensor([i for i, _ in turns])
