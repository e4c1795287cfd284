"""A small classifier, trained on the real pictures, that says whether drawn ones can be recognised."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from autoencoder.files import require_replaceable, write_tensors, written_beside
from autoencoder.untrusted import inside, read_header, read_json, require_finite
from ldm.checks import require_int
from ldm.config import UserError
from ldm.data import DataConfig, Source, open_source
from ldm.inspection import sound
from ldm.pictures import to_tensor
from ldm.sampling import order

WIDTH = 32
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MOST = 100_000
"""Classes that a file may name"""


class Classifier(nn.Sequential):
    """Pixels [B,3,H,W] in [-1, 1] => logits [B,classes]."""

    def __init__(self, classes: int) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for width in (WIDTH, 2 * WIDTH, 4 * WIDTH, 8 * WIDTH):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        super().__init__(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels, classes)
        )


@dataclass(frozen=True)
class Recogniser:
    """A trained classifier, and how well it knows real pictures that it was not trained on."""

    network: Classifier
    classes: tuple[str, ...]
    size: int
    """Side in pixels of the pictures that it was trained on"""
    accuracy: dict[str, float]
    """Share of each held-out split that it names rightly"""

    @torch.no_grad()
    def names(self, pixels: Tensor) -> list[str]:
        """Pixels [N,3,S,S] => the class of each."""
        found = torch.cat([self.network(part).argmax(1) for part in pixels.split(64)])
        return [self.classes[i] for i in found.tolist()]


def load_pixels(source: Source, size: int) -> Tensor:
    """All pictures of a source, [N,3,size,size] in [-1, 1]."""
    return torch.stack([to_tensor(source.picture(i, size)) for i in range(len(source))])


def augmented(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Each picture mirrored or not, a little zoomed and shifted: drawn fruit need not lie where photographed did."""
    n = len(pixels)
    zoom = torch.from_numpy(rng.uniform(0.85, 1.15, n)).float()
    mirror = torch.from_numpy(rng.choice([-1.0, 1.0], n)).float()
    shift = torch.from_numpy(rng.uniform(-0.1, 0.1, (n, 2))).float()
    zero = torch.zeros(n)
    rows = [torch.stack([zoom * mirror, zero, shift[:, 0]], 1), torch.stack([zero, zoom, shift[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def train_recogniser(data: DataConfig, epochs: int = 6, batch: int = 64, seed: int = 0) -> Recogniser:
    """Train on `data.split`, every class equally often, and measure on the other splits that the data has.

    Raises:
        UserError: the data has no classes.
    """
    require_int("epochs", epochs, 1, 2**31)
    source = sound(open_source(data))
    if source.labels is None:
        raise UserError(
            f"{data.where} has no classes to recognise; set data.label to the column that names them."
        )
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network = Classifier(len(source.classes)).to(memory_format=torch.channels_last)
    pixels, labels, indices = load_pixels(source, data.size), source.labels, order(source, balance=True)
    batch = min(batch, len(indices))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 4e-3, total_steps=epochs * (len(indices) // batch)
    )
    for _ in range(epochs):
        shuffled = rng.permutation(indices)
        for first in tqdm(range(0, len(indices) - batch + 1, batch), desc="classifier", unit="batch"):
            chosen = shuffled[first : first + batch]
            seen = augmented(pixels[chosen], rng).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(network(seen), labels[chosen], label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
    trained = Recogniser(network.eval(), source.classes, data.size, {})
    for split in ("validation", "test"):
        trained.accuracy.update(measured(trained, data, split))
    return trained


def measured(recogniser: Recogniser, data: DataConfig, split: str) -> dict[str, float]:
    """{split: share named rightly}, or nothing where the data has no such split with classes."""
    try:
        source = sound(open_source(data, split))
    except UserError:
        return {}
    if source.labels is None:
        return {}
    names = recogniser.names(load_pixels(source, data.size))
    truth = [source.classes[i] for i in source.labels.tolist()]
    return {split: float(np.mean([name == true for name, true in zip(names, truth, strict=True)]))}


def save_recogniser(recogniser: Recogniser, folder: Path) -> None:
    """Write config.json and model.safetensors, taking the place of what was there only when both are written."""
    about = {
        "_class_name": "Classifier",
        "classes": list(recogniser.classes),
        "size": recogniser.size,
        "accuracy": recogniser.accuracy,
    }
    require_replaceable(folder, WEIGHTS)
    with written_beside(folder) as fresh:
        (fresh / CONFIG).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        weights = {name: tensor.contiguous() for name, tensor in recogniser.network.state_dict().items()}
        write_tensors(fresh / WEIGHTS, weights)


def load_recogniser(folder: Path) -> Recogniser:
    """What `save_recogniser` wrote.

    Raises:
        UserError: there is none in the folder.
        ValueError: one of the files is damaged, or they don't belong together.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{folder} holds no classifier ({CONFIG} and {WEIGHTS}); train one with `ldm classifier`."
        )
    about = read_json(inside(folder, CONFIG))
    classes, size = about.get("classes"), about.get("size")
    if about.get("_class_name") != "Classifier" or not isinstance(size, int) or not 8 <= size <= 4096:
        raise ValueError(f"{folder / CONFIG} does not describe a classifier of ours.")
    if (
        not isinstance(classes, list)
        or not 1 <= len(classes) <= MOST
        or not all(isinstance(c, str) for c in classes)
    ):
        raise ValueError(f"{folder / CONFIG} names no classes.")
    network = Classifier(len(classes))
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if read_header(inside(folder, WEIGHTS)) != wanted:
        raise ValueError(
            f"{folder / WEIGHTS} does not hold the weights of a classifier of {len(classes)} classes."
        )
    weights = load_file(folder / WEIGHTS)
    require_finite(weights, folder)
    network.load_state_dict(weights)
    accuracy = about.get("accuracy")
    return Recogniser(network.eval(), tuple(classes), size, accuracy if isinstance(accuracy, dict) else {})
