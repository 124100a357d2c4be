"""BERT for masked language modelling with a head at given positions only: built, loaded, exported, evaluated."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM
from transformers.utils.logging import disable_progress_bar

from kd_core.kernels.linear_softmax_kl import LinearSoftmaxKL
from kd_core.kernels.softmax_kl import softmax_kl
from kd_core.losses.distillation import DIRECTIONS
from kd_core.system.files import replace_folder
from kd_core.system.ranks import device, rank, to_device, total, world_size
from kd_core.text.corpus import IGNORE_INDEX, Corpus
from kd_core.text.masking import validation_batches
from kd_core.text.pretrained import load_pretrained, teacher_settings
from kd_core.training.engine import Engine, gathered_state_dict
from kd_core.training.stop import interruptible

disable_progress_bar()  # Hugging Face's, for files that load in a moment
# Layers and width of Turc et al. 2019 (arXiv 1908.08962) and Devlin et al. 2018; heads of 64, feed-forward 4 x width.
SIZES = dict(tiny=(2, 128), mini=(4, 256), small=(4, 512), medium=(8, 512), base=(12, 768), large=(24, 1024))


def size_of(name: str) -> tuple[int, int] | None:
    """Layers and width of a name in SIZES or of LAYERSxWIDTH; None for a checkpoint."""
    grid = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
    return (int(grid[1]), int(grid[2])) if grid else SIZES.get(name)


class MaskedBert(BertForMaskedLM):
    """BERT that computes vocabulary logits at given positions only: the full [B, T, V] logits exist nowhere."""

    def forward(
        self, input_ids: Tensor, positions: Tensor, *teacher_and_labels: Any, head: bool = True, **options: Any
    ) -> Any:
        """input_ids [B, T], positions [N] into B*T -> logits [N, V]; losses, given what they need; or the head's input."""
        hidden_ND = self.cls.predictions.transform(self.bert(input_ids).last_hidden_state.flatten(0, 1)[positions])
        return self.cls.predictions.decoder(hidden_ND, *teacher_and_labels, **options) if head else hidden_ND


def head_and_input(teacher: Any, micro: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What `fused_losses` needs of a teacher: its head's input [N, E], weight [V, E] and bias [V]."""
    head = teacher.cls.predictions.decoder
    return teacher(*micro.inputs, head=False), head.weight, head.bias


def fused_losses(
    student: Any, micro: Any, of_teacher: tuple[Tensor, Tensor, Tensor] | None, *, divergence: str, **method: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`losses.distillation.distillation_sum` by the student's own head, without logits in memory."""
    hidden, weight, bias = of_teacher or (None, None, None)
    method |= {"direction": DIRECTIONS.get(divergence, "forward"), "teacher_bias_V": bias}
    return student(*micro.inputs, hidden, weight, micro.labels, **method)


def build(
    name: str,
    vocab_size: int,
    *,
    seed: int,
    seq_len: int,
    dropout: float,
    gradient_checkpointing: bool = False,
    initializer_range: float = 0.02,
) -> MaskedBert:
    """A randomly initialised BERT of one of its sizes, or a checkpoint's; its vocabulary padded to a multiple of 64."""
    padded = math.ceil(vocab_size / 64) * 64
    settings: dict[str, Any] = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    torch.manual_seed(seed)
    if size := size_of(name):
        layers, width = size
        shape: dict[str, Any] = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width}
        shape["initializer_range"] = initializer_range
        model = MaskedBert(BertConfig(vocab_size=padded, num_attention_heads=width // 64, **shape, **settings))
    else:
        model = load_pretrained(
            MaskedBert, name, vocab_size, flag="--student", seq_len=seq_len, dtype=torch.float32, **settings
        )
        model.resize_token_embeddings(padded, mean_resizing=False)
    model.cls.predictions.decoder.__class__ = LinearSoftmaxKL  # the same linear layer, able to give losses
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def load_teacher(path: str, vocab_size: int, *, seq_len: int, dtype: str) -> nn.Module:
    """A frozen BERT; dtype int8: weights of linear layers below the head in 8 bits."""
    settings = teacher_settings(dtype, keep=["cls"])
    model: nn.Module = load_pretrained(MaskedBert, path, vocab_size, seq_len=seq_len, **settings)
    return model


def export(student: Engine, tokenizer: Any, folder: Path, *, part: str = "") -> None:
    """Writes `folder`: the student alone, cropped to the tokenizer's vocabulary, and the tokenizer; call on every rank.

    Args:
        part: of the engine's module, where the student is a submodule.
    """
    state = gathered_state_dict(student, part)
    if rank() == 0:
        plain: Any = BertForMaskedLM(copy.deepcopy(student.module.get_submodule(part).config))
        plain.to(next(iter(state.values())).dtype).load_state_dict(state)
        plain.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        replace_folder(folder, plain.save_pretrained, tokenizer.save_pretrained)


@torch.no_grad()
def evaluate(model: Any, corpus: Corpus, *, micro_batch_size: int) -> dict[str, float]:
    """Loss (nats), perplexity and accuracy at the validation set's fixed masked positions, over all ranks."""
    model.eval()
    sums = torch.zeros(3, device=device())
    for batch in interruptible(
        validation_batches(corpus, micro_batch_size=micro_batch_size, rank=rank(), world_size=world_size())
    ):
        input_ids, positions, labels = to_device(batch.input_ids, batch.positions, batch.labels)
        logits = model(input_ids, positions)[:, : len(corpus.tokenizer)]
        _, label_N = softmax_kl(logits, None, labels)
        sums += torch.stack([label_N.sum(), (logits.argmax(-1) == labels).sum(), (labels != IGNORE_INDEX).sum()])
    loss_sum, correct, tokens = total(sums).tolist()
    loss = loss_sum / tokens
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 80.0)), "eval/accuracy": correct / tokens}
