"""Networks for image classification: torchvision's ResNets, and He et al.'s small ones for 32 x 32 images.

A model takes pixels in [0, 255] and normalises them itself, so that a student and its teachers see one view and each keeps
its own normalisation and resolution. Shape letters: B images, C classes.
"""

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.utils import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.transforms.v2.functional import resize

SMALL_DEPTHS = (8, 14, 20, 26, 32, 44, 56, 110)  # 6n + 2, He et al. 2015, section 4.2
SMALL = tuple(f"resnet{depth}" for depth in SMALL_DEPTHS)
LARGE = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2")
NAMES = SMALL + LARGE
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BLUR_MIN_CHANNELS = 16  # Composer's: the first convolution, of 3 channels, stays as it is


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation in float32 whatever the dtype of the weights: running statistics lose their updates in bf16.

    With `synced`, the batch is that of all ranks (torch.nn.SyncBatchNorm has no CPU form). Ranks' batches are equally large.
    """

    synced = False

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        if not (self.synced and self.training):
            running = (self.running_mean, self.running_var)
            return F.batch_norm(x, *running, weight, bias, self.training, self.momentum or 0.0, self.eps)
        x32 = x.float()
        ranks = dist.get_world_size()
        mean = all_reduce(x32.mean((0, 2, 3))) / ranks
        var = all_reduce((x32 - mean[:, None, None]).square().mean((0, 2, 3))) / ranks
        rows = x.numel() // len(mean) * ranks
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (rows / max(1, rows - 1)), self.momentum)
        scale = weight * torch.rsqrt(var + self.eps)
        return torch.addcmul((bias - mean * scale)[:, None, None], x32, scale[:, None, None]).to(x.dtype)


class SmallResNet(nn.Module):
    """ResNet of depth 6n + 2 for 32 x 32 images: a 3 x 3 stem, three stages of n blocks, widths 16, 32, 64.

    Source: He et al. 2015, arXiv 1512.03385, section 4.2. Shortcuts between stages are 1 x 1 convolutions with batch
    normalisation (their option B; the paper's tables for CIFAR use A, parameter-free padding).
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = BatchNorm(16)
        width, stages = 16, []
        for planes in (16, 32, 64):
            blocks = []
            for _ in range((depth - 2) // 6):
                stride = 1 if planes == width else 2
                shortcut = nn.Conv2d(width, planes, 1, stride, bias=False)
                downsample = None if stride == 1 else nn.Sequential(shortcut, BatchNorm(planes))
                blocks.append(BasicBlock(width, planes, stride, downsample, norm_layer=BatchNorm))
                width = planes
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


def blur(x: Tensor, stride: int = 1) -> Tensor:
    """A depthwise 3 x 3 binomial filter, [1, 2, 1] in each direction, zero-padded: two 2 x 2 means in a row."""
    return F.avg_pool2d(F.avg_pool2d(x, 2, 1, padding=1), 2, stride)


class BlurredMaxPool(nn.MaxPool2d):
    """Maximum at stride 1, then the blur at stride 2; it has no weights, so a state dict does not change."""

    def forward(self, x: Tensor) -> Tensor:
        return blur(F.max_pool2d(x, self.kernel_size, 1, self.padding), 2)


def _blur_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (blur(inputs[0]), *inputs[1:])


def add_blurpool(net: nn.Module) -> None:
    """Blurs before every convolution of stride 2 with at least 16 channels, and after the maximum pooling.

    Source: Zhang 2019, arXiv 1904.11486, in Composer's form (`blur_first`: the filter before the strided convolution).
    """
    for module in list(net.modules()):
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2) and module.in_channels >= BLUR_MIN_CHANNELS:
            module.register_forward_pre_hook(_blur_input)
    if isinstance(getattr(net, "maxpool", None), nn.MaxPool2d):
        net.maxpool = BlurredMaxPool(3, 2, padding=1)


class Classifier(nn.Module):
    """A network with the normalisation and resolution of its input.

    Activations have the memory format of the pixels. A student's weights stay contiguous: DeepSpeed flattens them, and
    cannot broadcast others.

    Args:
        size: side in pixels to which a view is resized first; None takes it as it comes.
        autocast: compute in bf16 with weights in float32, as a teacher does.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        size: int | None = None,
        autocast: bool = False,
    ) -> None:
        super().__init__()
        self.net, self.size, self.autocast, self.mean, self.std = net, size, autocast, tuple(mean), tuple(std)
        mean_311, std_311 = (torch.tensor(values)[:, None, None] for values in (mean, std))
        self.subclasses: int = getattr(net, "built_as", {}).get("subclasses", 1)
        self.scale = nn.Buffer(1 / (255 * std_311), persistent=False)
        self.shift = nn.Buffer(-mean_311 / std_311, persistent=False)

    def normalize(self, pixels: Tensor) -> Tensor:
        return (pixels.float() * self.scale).add_(self.shift)  # on a CPU 3 times as fast as with the uint8 factor

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W], uint8 or float in [0, 255] -> logits [B, C]; in training those of all subclasses, [B, C * S]."""
        if self.size is not None and self.size != pixels.shape[-1]:
            pixels = resize(pixels, [self.size, self.size], antialias=True)
        x = self.normalize(pixels)
        bf16 = torch.autocast(x.device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext()
        with bf16:  # an engine's own autocast stays on
            # Under DeepSpeed's bf16 the weights say what the network computes in.
            logits = self.net(x if self.autocast else x.to(next(self.net.parameters()).dtype))
        if self.subclasses == 1 or self.training:
            return logits
        return logits.float().unflatten(1, (-1, self.subclasses)).logsumexp(-1)


def build_net(
    name: str, num_classes: int, *, blurpool: bool = False, last_bias: float | None = None, subclasses: int = 1
) -> nn.Module:
    """A randomly initialised network whose residual blocks begin as the identity.

    Args:
        name: one of SMALL or LARGE.
        subclasses: outputs for each class, one after the other, which a `Classifier` sums.
        last_bias: of the last layer, such as -log C for binary cross-entropy: every class begins at probability 1 / C.
    """
    if name in SMALL:
        net: Any = SmallResNet(int(name.removeprefix("resnet")), num_classes * subclasses)
    else:
        net = torchvision.models.get_model(
            name, weights=None, num_classes=num_classes * subclasses, zero_init_residual=True, norm_layer=BatchNorm
        )
    if blurpool:
        add_blurpool(net)
    if last_bias is not None:
        nn.init.constant_(net.fc.bias, last_bias)
    net.built_as = {"model": name, "blurpool": blurpool} | ({"subclasses": subclasses} if subclasses > 1 else {})
    return net


def synchronize_batch_norm(net: nn.Module) -> None:
    """From now on batches are normalised over all ranks."""
    for module in net.modules():
        if isinstance(module, BatchNorm):
            module.synced = True


def average_batch_norm(net: nn.Module) -> None:
    """Makes running statistics the mean over ranks, in one collective: DeepSpeed synchronises parameters only.

    Running means are linear in the batches' statistics, so it does not matter how often this is called; after it all
    ranks evaluate, and rank 0 saves, the same model.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    stats = [buffer for name, buffer in net.named_buffers() if name.endswith(("running_mean", "running_var"))]
    flat = torch.cat([buffer.flatten() for buffer in stats])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    torch._foreach_copy_(stats, list(flat.split([buffer.numel() for buffer in stats])))


def fold_batch_norm(net: nn.Module) -> None:
    """Multiplies the batch normalisations of a frozen network into the convolutions before them: one pass less each.

    A convolution's normalisation follows it in nn.Sequential and in the blocks of ResNets; elsewhere nothing changes.
    """
    for parent in list(net.modules()):
        if isinstance(parent, (nn.Sequential, BasicBlock, Bottleneck, ResNet, SmallResNet)):
            for (name, conv), (norm_name, norm) in itertools.pairwise(list(parent.named_children())):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                    setattr(parent, norm_name, nn.Identity())
