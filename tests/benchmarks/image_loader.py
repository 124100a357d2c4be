"""Images per second of one core: kd_core.images against torchvision's ImageFolder and DataLoader, interleaved.

    ./launch/bench.sh images --data imagenette/ --size 224          decoded at every epoch
    ./launch/bench.sh images --data cifar_as_folder/ --size 32      held decoded

Both sides make normalised float32 batches, in this process on one thread; the time is the process's own CPU time, so
that other work on the machine counts little. The ratio is taken within each round.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from kd_core.images import batches as images
from kd_core.images import resnets
from kd_core.images import sources as image_sources
from kd_core.images.views import View

SMALL_SIDE = 64  # up to here the usual crop is a shift, and data is held decoded


def theirs(folder: str, size: int, batch: int) -> Iterator[torch.Tensor]:
    small = size <= SMALL_SIDE
    crop = transforms.RandomCrop(size, padding=size // 8) if small else transforms.RandomResizedCrop(size)
    normalize = transforms.Normalize(resnets.IMAGENET_MEAN, resnets.IMAGENET_STD)
    steps = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize]
    data = ImageFolder(folder, transforms.Compose(steps))
    while True:
        for pixels, _ in DataLoader(data, batch_size=batch, shuffle=True, drop_last=True):
            yield pixels


def ours(folder: str, size: int, batch: int) -> Iterator[torch.Tensor]:
    small = size <= SMALL_SIDE
    data = image_sources.prepare(folder, decoded_gib=2 if small else 0, max_corrupt=0)
    view = View(size, "padded" if small else "resized")
    batches = images.TrainBatches(data.train, view, 10**6, 0, batch, batch, 0, 1)
    model = resnets.Classifier(torch.nn.Identity())
    number = 0
    while True:
        micro = batches[number]
        yield model.normalize(micro.pixels)
        number += 1


def cpu_seconds(step: Callable[[], object], times: int) -> float:
    began = time.process_time()
    for _ in range(times):
        step()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train/<class>/<image>")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=4, help="batches of a side in a round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sides = {
        "ImageFolder": theirs(f"{args.data}/train", args.size, args.batch),
        "kd_core.images": ours(args.data, args.size, args.batch),
    }
    for loader in sides.values():
        next(loader)
    rounds = [
        {
            name: args.batch * args.batches / cpu_seconds(lambda loader=loader: next(loader), args.batches)
            for name, loader in sides.items()
        }
        for _ in range(args.rounds)
    ]
    for name in sides:
        print(f"{name}: {statistics.median(r[name] for r in rounds):.0f} images per CPU second")
    ratios = sorted(r["kd_core.images"] / r["ImageFolder"] for r in rounds)
    print(f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), {args}")


if __name__ == "__main__":
    main()
