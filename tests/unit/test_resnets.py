"""Networks, their files, batch normalisation in float32, BlurPool, the optimizer, the moving average and the metrics."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn

from kd_core.images import classifiers, resnets
from kd_core.images import evaluation as classification
from kd_core.images.flags import ImageFlags
from kd_core.losses.labels import label_loss
from kd_core.training import optimizers
from kd_core.training.engine import LoopError
from kd_core.training.kept import Ema


@pytest.mark.parametrize(("name", "million"), [("resnet8", 0.078), ("resnet20", 0.272), ("resnet56", 0.856)])
def test_small_resnets_have_the_papers_size(name: str, million: float) -> None:
    """He et al. 2015, table 6, say 0.27 M and 0.85 M for 20 and 56 layers; projections add 2.6 k."""
    net = resnets.build_net(name, 10)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(million, abs=0.002)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_torchvision_networks_load_torchvisions_weights_and_compute_the_same() -> None:
    theirs = torchvision.models.resnet18(num_classes=7).eval()
    ours = resnets.build_net("resnet18", 7).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_student_beside_a_projector_is_exported_alone(tmp_path: Path) -> None:
    classes, module = ("a", "b", "c"), nn.Module()
    module.student = resnets.Classifier(resnets.build_net("resnet8", 3))
    module.projector = nn.Conv2d(16, 8, 1)
    engine = SimpleNamespace(module=module, zero_optimization_stage=lambda: 0)
    cfg = ImageFlags(train_size=32, eval_resize=32, eval_size=32)
    classifiers.export(cfg, engine, classes, tmp_path / "hf", part="student")
    loaded = classifiers.load_classifier(str(tmp_path / "hf"), classes, flag="--student")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), module.student.parameters(), strict=True))
    with pytest.raises(LoopError, match=r"give part=, one of \['student'\], got ''"):
        classifiers.export(cfg, engine, classes, tmp_path / "hf")
    with pytest.raises(LoopError, match="Module has no part 'studnt'; it has student, projector"):
        classifiers.export(cfg, engine, classes, tmp_path / "hf", part="studnt")


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "resnet50"])
def test_residual_blocks_begin_as_the_identity(name: str) -> None:
    net = resnets.build_net(name, 10)
    last = [block.bn3 if hasattr(block, "bn3") else block.bn2 for block in net.modules() if hasattr(block, "bn2")]
    assert last and all((bn.weight == 0).all() for bn in last)


def test_blur_is_the_binomial_filter() -> None:
    x = torch.randn(2, 5, 9, 8)
    row = torch.tensor([1.0, 2.0, 1.0])
    kernel = (row[:, None] * row / 16).expand(5, 1, 3, 3)
    for stride in (1, 2):
        torch.testing.assert_close(resnets.blur(x, stride), F.conv2d(x, kernel, stride=stride, padding=1, groups=5))


def test_blurpool_is_less_sensitive_to_shifts_and_keeps_the_state_dict() -> None:
    torch.manual_seed(0)
    plain, blurred = resnets.build_net("resnet18", 10), resnets.build_net("resnet18", 10, blurpool=True)
    assert set(plain.state_dict()) == set(blurred.state_dict())
    blurred.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 65, 65)

    def change(net: nn.Module) -> float:
        one, other = (net.eval().maxpool(x[:, :, :64, begin : 64 + begin]) for begin in (0, 1))  # type: ignore[operator]
        return float((one - other).std() / one.std())

    assert change(blurred) < change(plain)
    assert plain(x).shape == blurred(x).shape


def test_batch_normalisation_is_float32_under_bf16_weights() -> None:
    ours, reference = resnets.BatchNorm(6), nn.BatchNorm2d(6)
    for parameter in ours.parameters():
        parameter.data = parameter.data.bfloat16()
    x = torch.randn(8, 6, 5, 5).bfloat16()
    for _ in range(50):
        y = ours(x)
        reference(x.float())
    assert y.dtype == torch.bfloat16 and ours.running_var is not None and ours.running_var.dtype == torch.float32
    torch.testing.assert_close(ours.running_var, reference.running_var, rtol=1e-4, atol=1e-6)


def test_the_classifier_normalises_and_resizes() -> None:
    model = resnets.Classifier(nn.Identity(), mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3), size=8)
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.1, 0.2, 0.3), (0.5, 0.4, 0.3)))
    model.net.register_parameter("weight", nn.Parameter(torch.zeros(1)))
    torch.testing.assert_close(model(pixels), (pixels / 255 - mean) / std)
    assert model(torch.zeros(2, 3, 20, 20, dtype=torch.uint8)).shape == (2, 3, 8, 8)
    before = pixels.float()
    model(before)
    assert torch.equal(before, pixels.float()), "pixels are shared with the teachers"


def test_files_bring_the_network_back(tmp_path: Path) -> None:
    model = resnets.Classifier(resnets.build_net("resnet14", 3, blurpool=True))
    classifiers.save(tmp_path, model, model.state_dict(), ["a", "b", "c"], image_size=32)
    loaded = classifiers.load_classifier(str(tmp_path), ("a", "b", "c"), flag="--teachers").eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(loaded(pixels), model.eval()(pixels))
    assert loaded.size == 32
    with pytest.raises(ValueError, match="same classes in the same order"):
        classifiers.load_classifier(str(tmp_path), ("a", "c", "b"), flag="--teachers")


def test_an_engines_autocast_stays_on() -> None:
    model = resnets.Classifier(resnets.build_net("resnet8", 3)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).dtype == torch.bfloat16


@pytest.mark.parametrize("theirs", [False, True])
def test_a_teacher_for_zero_3_is_contiguous_and_really_bf16(
    theirs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=3) if theirs else resnets.build_net("resnet8", 3)
    config = {"mean": [0.5] * 3, "std": [0.5] * 3, "image_size": 32, "classes": ["a", "b", "c"]}
    monkeypatch.setattr(classifiers, "check_source", lambda *_: None)
    monkeypatch.setattr(classifiers, "model_source", lambda path, _: path)
    monkeypatch.setattr(classifiers, "load_net", lambda *_: (copy.deepcopy(net), config))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    whole, split = (
        classifiers.load_teacher(str(tmp_path), ("a", "b", "c"), flag="", autocast=True, split=split).eval()
        for split in (False, True)
    )
    torch.testing.assert_close(split(pixels).float(), whole(pixels).float(), rtol=0.1, atol=0.05)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in whole.modules())
    assert all(p.dtype == torch.bfloat16 and p.is_contiguous() for p in split.parameters())
    assert all(b.dtype != torch.bfloat16 for b in split.buffers())


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "resnet50", "densenet121", "mobilenet_v3_small"])
@pytest.mark.parametrize("blurpool", [False, True])
def test_a_folded_network_answers_the_same(name: str, blurpool: bool) -> None:
    torch.manual_seed(0)
    ours = name in resnets.NAMES
    net = resnets.build_net(name, 5) if ours else torchvision.models.get_model(name, num_classes=5)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.5)
    if blurpool:
        resnets.add_blurpool(net)
    net.eval()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = net(pixels)
        resnets.fold_batch_norm(net)
        torch.testing.assert_close(net(pixels), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not ours or not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


def test_torchvisions_classes_in_another_order_are_refused() -> None:
    known = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
    with pytest.raises(ValueError, match=f"in another order, from {known[1]} on"):
        classifiers.load_classifier("resnet18", [known[1], known[0], *known[2:]], flag="--teachers")


def on_one_of_two_ranks(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    x, gradient = 2 + 3 * torch.randn(8, 6, 5, 5), torch.randn(8, 6, 5, 5)
    reference, ours = nn.BatchNorm2d(6), resnets.BatchNorm(6)
    resnets.synchronize_batch_norm(ours)
    mine = slice(4 * rank, 4 * rank + 4)
    whole, part = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
    y = reference(whole)
    (y * gradient).sum().backward()
    y_mine = ours(part)
    (y_mine * gradient[mine]).sum().backward()
    assert whole.grad is not None and part.grad is not None and ours.weight.grad is not None
    torch.testing.assert_close(y_mine, y[mine])
    torch.testing.assert_close(part.grad, whole.grad[mine], rtol=1e-4, atol=1e-5)
    dist.all_reduce(ours.weight.grad)
    torch.testing.assert_close(ours.weight.grad, reference.weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.running_mean, reference.running_mean)
    torch.testing.assert_close(ours.running_var, reference.running_var)

    net = resnets.build_net("resnet8", 10)
    weights = [parameter.clone() for parameter in net.parameters()]
    for name, buffer in net.named_buffers():
        if "running" in name:
            buffer.fill_(1.0 + 2 * rank)
    resnets.average_batch_norm(net)
    assert all((buffer == 2).all() for name, buffer in net.named_buffers() if "running" in name)
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
    dist.destroy_process_group()


def test_batch_normalisation_over_ranks(tmp_path: Path) -> None:
    """Synchronised: values, gradients and running statistics of the whole batch; otherwise the statistics' mean."""
    torch.multiprocessing.spawn(on_one_of_two_ranks, (str(tmp_path),), nprocs=2)


# ----------------------------------------------------------------------------------------------------------- optimizer


def test_weight_decay_spares_batch_normalisation_and_biases() -> None:
    net = resnets.build_net("resnet8", 10)
    decayed, spared = optimizers.decay_groups(net, 0.1)
    assert {p.ndim for p in decayed["params"]} == {2, 4} and {p.ndim for p in spared["params"]} == {1}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(spared["params"]) == len(list(net.parameters()))


def test_decoupled_sgd_equals_its_formula() -> None:
    weight, bias = nn.Parameter(torch.tensor([[2.0]])), nn.Parameter(torch.tensor([3.0]))
    groups = [{"params": [weight], "weight_decay": 0.01}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = optimizers.DecoupledSGD(groups, lr=0.5, momentum=0.9)
    w, b, momentum = 2.0, 3.0, 0.0
    for lr in (0.5, 0.25, 0.1):
        weight.grad, bias.grad = torch.ones_like(weight), torch.ones_like(bias)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        momentum = 0.9 * momentum + 1
        w, b = w * (1 - 0.01 * lr / 0.5) - lr * momentum, b - lr * momentum
        assert (weight.item(), bias.item()) == pytest.approx((w, b))


def test_the_moving_average_has_its_half_life_and_steps_aside() -> None:
    net = resnets.build_net("resnet8", 4)
    ema = Ema(net, half_life=10)
    with torch.no_grad():
        net.fc.weight.add_(1.0)  # type: ignore[union-attr, operator]
    start = net.fc.weight.detach().clone()  # type: ignore[union-attr, operator]
    for step in (1, 2):
        ema.update(step)
        with ema.applied():
            assert torch.equal(net.fc.weight, start), "the initialisation has no part in it"  # type: ignore[arg-type]
    with torch.no_grad():
        net.fc.weight.add_(8.0)  # type: ignore[union-attr, operator]
    for step in range(3, 23):
        ema.update(step)
    with ema.applied():
        torch.testing.assert_close(net.fc.weight.detach(), start + 6.0)  # type: ignore[union-attr]
    torch.testing.assert_close(net.fc.weight.detach(), start + 8.0)  # type: ignore[union-attr]
    none = Ema(net, half_life=0)
    none.update(5)
    with none.applied():
        assert none.average == []


# ------------------------------------------------------------------------------------------------------------- metrics


def test_metrics_equal_their_definitions() -> None:
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(600, 20), torch.randint(20, (600,))
    counted = torch.rand(600) < 0.7
    parts = [classification.classification_sums(logits[i : i + 100], labels[i : i + 100], counted[i : i + 100])
             for i in range(0, 600, 100)]  # fmt: skip
    metrics = classification.classification_metrics(torch.stack(parts).sum(0))
    logits, labels = logits[counted], labels[counted]
    assert metrics["eval/loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert metrics["eval/accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
    top5 = (logits.topk(5).indices == labels[:, None]).any(-1).float().mean()
    assert metrics["eval/top5"] == pytest.approx(float(top5))
    confidence, guess = logits.softmax(-1).max(-1)
    error = 0.0
    for b in range(15):
        inside = (confidence >= b / 15) & (confidence < (b + 1) / 15)
        if inside.any():
            gap = confidence[inside].mean() - (guess[inside] == labels[inside]).float().mean()
            error += float(inside.float().mean() * gap.abs())
    assert metrics["eval/calibration_error"] == pytest.approx(error, abs=1e-5)


def test_label_losses() -> None:
    logits, labels = torch.randn(5, 7).bfloat16(), torch.randint(7, (5,))
    one_hot = F.one_hot(labels, 7).float()
    for smoothing in (0.0, 0.1):
        hard = label_loss(logits, labels, smoothing=smoothing)
        soft = label_loss(logits, one_hot, smoothing=smoothing)
        torch.testing.assert_close(hard, soft)
        assert hard.dtype == torch.float32 and hard.shape == (5,)
        target = one_hot * (1 - smoothing) + smoothing / 7
        p = logits.float().sigmoid()
        bce = -(target * p.log() + (1 - target) * (1 - p).log()).sum(-1)
        torch.testing.assert_close(label_loss(logits, labels, kind="bce", smoothing=smoothing), bce)
    torch.testing.assert_close(label_loss(logits, labels), F.cross_entropy(logits.float(), labels, reduction="none"))
