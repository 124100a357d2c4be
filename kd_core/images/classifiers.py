"""Classifiers as files: saved, and loaded as students and teachers from run folders and from torchvision."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kd_core.images.flags import ClassifierFlags, ImageFlags
from kd_core.images.resnets import LARGE, NAMES, BatchNorm, Classifier, build_net, fold_batch_norm
from kd_core.runs.sources import model_source
from kd_core.system.checked import read_json
from kd_core.system.files import replace_folder
from kd_core.system.ranks import rank
from kd_core.training.engine import Engine, LoopError, gathered_state_dict
from kd_core.training.optimizers import decay_groups


def save(folder: Path, model: Classifier, state: dict[str, Tensor], classes: Sequence[str], **view: int) -> None:
    """Writes `model.safetensors`, a torchvision state dict, and `config.json`: what the model is, knows and sees.

    Args:
        state: of `model`, gathered from the ranks.
        view: `image_size`, the side in pixels that it was trained at, and further facts for the reader.
    """
    config = {**model.net.built_as, "classes": list(classes), "mean": model.mean, "std": model.std, **view}  # type: ignore[dict-item]
    state = {name.removeprefix("net."): tensor.contiguous() for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def load_net(folder: str, flag: str) -> tuple[nn.Module, dict[str, Any]]:
    """The network that `save` wrote, or a run folder's, and its config.

    Raises:
        ValueError: an unreadable or foreign file, weights that are missing or too many.
    """
    source = Path(model_source(folder, flag))
    try:
        config = read_json(source / "config.json")
        if "classes" not in config:
            raise ValueError("its config.json describes no classifier; give a run folder of an image recipe")
        shape = {"blurpool": config["blurpool"], "subclasses": config.get("subclasses", 1)}
        net = build_net(config["model"], len(config["classes"]), **shape)
        net.load_state_dict(load_file(source / "model.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join((str(error) or repr(error)).split())[
            :200
        ]  # load_state_dict names weights from its second line on
        raise ValueError(f"{flag} {folder} cannot be loaded: {reason}") from error
    return net, config


def check_source(path: str, flag: str) -> None:
    """Raises ValueError unless `path` is a folder that holds a model, or names one of torchvision's."""
    if Path(path).exists():
        model_source(path, flag)
    else:
        name, _, weights = path.partition(":")
        known = torchvision.models.list_models(module=torchvision.models)
        if name not in known:
            raise ValueError(
                f"{flag} {path} is no folder and no model of torchvision; give a run folder or one of {known}"
            )
        available = [member.name for member in torchvision.models.get_model_weights(name)]
        if weights and weights not in available:
            raise ValueError(f"{flag} {path}: {name} has the weights {available}")


def check_student(path: str, flag: str = "--student") -> None:
    """Raises ValueError or FileNotFoundError unless `path` is a folder that holds a model, or a known size with torchvision's weights."""
    if path.partition(":")[0] in LARGE and not Path(path).exists():
        check_source(path, flag)
    elif not Path(path).exists():
        raise ValueError(
            f"{flag} {path} is no folder and no known size; give a run folder or one of {', '.join(NAMES)}, a large one also with "
            "weights of torchvision, such as resnet50:IMAGENET1K_V2"
        )
    else:
        model_source(path, flag)


def build_student(
    name: str,
    classes: Sequence[str],
    *,
    seed: int,
    blurpool: bool = False,
    last_bias: float | None = None,
    subclasses: int = 1,
) -> Classifier:
    """A randomly initialised network of `resnets.NAMES`, one with torchvision's weights, or a run's.

    Args:
        blurpool, last_bias: of `build_net`, for a random one.
        subclasses: of `build_net`.

    Raises:
        ValueError: none of these, or a run on other classes or with other subclasses.
    """
    torch.manual_seed(seed)
    if name in NAMES:
        net = build_net(name, len(classes), blurpool=blurpool, last_bias=last_bias, subclasses=subclasses)
        return Classifier(net)
    check_student(name)
    model = load_classifier(name, classes, flag="--student", size=0)
    if model.subclasses != subclasses:
        raise ValueError(
            f"--student {name} has {model.subclasses} outputs for each class, the run {subclasses}; give a run that has as many, or a size"
        )
    if not hasattr(
        model.net, "built_as"
    ):  # torchvision's own, whose normalisation is not in float32 whatever the weights
        net = build_net(name.partition(":")[0], len(classes))
        net.load_state_dict(model.net.state_dict())
        model.net = net
    return model


def sgd(cfg: ClassifierFlags, model: nn.Module) -> torch.optim.SGD:
    """As `ClassifierFlags` say, without decay on batch normalisation and biases."""
    return torch.optim.SGD(decay_groups(model, cfg.weight_decay), lr=cfg.lr, momentum=cfg.momentum)


def export(cfg: ImageFlags, engine: Engine, classes: Sequence[str], folder: Path, *, part: str = "") -> None:
    """Writes `folder`: the network alone as a torchvision state dict, and what it is and sees; call on every rank.

    Args:
        part: of the engine's module, where the network is a submodule.
    """
    state = gathered_state_dict(engine, part)
    if not isinstance(engine.module.get_submodule(part), Classifier):
        parts = [name for name, module in engine.module.named_modules() if isinstance(module, Classifier)]
        raise LoopError(f"what is exported is a Classifier; give part=, one of {parts}, got {part!r}")
    if rank() == 0:
        view = {"image_size": cfg.train_size, "eval_resize": cfg.eval_resize, "eval_size": cfg.eval_size}
        replace_folder(folder, lambda hidden: save(hidden, engine.module.get_submodule(part), state, classes, **view))


def load_classifier(
    path: str, classes: Sequence[str], *, flag: str, size: int | None = None, autocast: bool = False
) -> Classifier:
    """A trained model with its own normalisation: a run folder, or `resnet101` or `resnet101:IMAGENET1K_V1` of torchvision.

    Args:
        classes: of the run's data, which the model must have been trained on, in this order.
        size: side in pixels of the model's view; None: what it was trained at, 0: the student's view as it comes.

    Raises:
        ValueError: other classes, or a model that cannot be loaded.
    """
    check_source(path, flag)
    if Path(path).exists():
        net, config = load_net(path, flag)
        mean, std, own_size = config["mean"], config["std"], config["image_size"]
        if tuple(config["classes"]) != tuple(classes):
            raise ValueError(
                f"{flag} {path} was trained on {len(config['classes'])} classes ({config['classes'][0]}, ...), "
                f"the data has {len(classes)} ({classes[0]}, ...); give a model of the same classes in the same order"
            )
    else:
        name, _, chosen = path.partition(":")
        weights = torchvision.models.get_model_weights(name)[chosen or "DEFAULT"]
        known = weights.meta["categories"]
        if len(known) != len(classes):
            raise ValueError(f"{flag} {path} knows the {len(known)} classes of ImageNet, the data has {len(classes)}")
        if set(known) == set(classes) and tuple(known) != tuple(classes):
            first = next(name for name, other in zip(classes, known, strict=True) if name != other)
            raise ValueError(
                f"{flag} {path} has the data's classes in another order, from {first} on; number them as torchvision does, "
                "or name the class folders by their WordNet ids"
            )
        try:
            net = torchvision.models.get_model(name, weights=weights)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{flag} {path} cannot be loaded: {str(error).splitlines()[0]}") from error
        view = weights.transforms()
        mean, std, own_size = view.mean, view.std, view.crop_size[0]
    own = own_size if size is None else size or None
    model = Classifier(net, mean=mean, std=std, size=own, autocast=autocast)
    model.read_from = model_source(path, flag) if Path(path).exists() else path  # type: ignore[assignment]
    return model


def load_teacher(
    path: str, classes: Sequence[str], *, autocast: bool = False, split: bool = False, **settings: Any
) -> nn.Module:
    """A `load_classifier` made fast for evaluation.

    Args:
        split: for ZeRO-3, which takes only contiguous weights, in the dtype that they compute in.
    """
    model = load_classifier(path, classes, autocast=autocast and not split, **settings).eval()
    fold_batch_norm(model)
    if not split:
        return model.to(memory_format=torch.channels_last)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = BatchNorm  # torchvision's takes no bf16 weights beside float32 statistics
    for parameter in model.parameters() if autocast else ():
        parameter.data = parameter.data.bfloat16()
    return model
