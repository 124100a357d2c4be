"""Classifiers for GLUE's tasks: built on a pretrained encoder, loaded as teachers, asked in batches, scored."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from kd_core.glue import tasks as glue
from kd_core.glue.plan import FineTuning
from kd_core.system.ranks import device, to_device
from kd_core.text.pretrained import load_pretrained, require_all_weights

disable_progress_bar()
set_verbosity_error()  # a fresh classifier is what is wanted here, and nothing to warn of
EVAL_BATCH = 128


def build_student(job: FineTuning, task: glue.Task) -> Any:
    """The pretrained encoder under a fresh classifier, and a fresh pooler where there is none."""
    settings: dict[str, Any] = {"hidden_dropout_prob": job.dropout, "attention_probs_dropout_prob": job.dropout}
    settings |= {"num_labels": task.columns, "dtype": torch.float32}
    from_pretrained: Any = BertForSequenceClassification.from_pretrained
    model, info = from_pretrained(
        job.model, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **settings
    )
    require_all_weights(
        info,
        str(job.model),
        BertForSequenceClassification,
        fresh=("classifier.", "bert.pooler."),
        beside=r"^cls\.|\.position_ids$",
    )
    fresh = [model.classifier]
    fresh += [model.bert.pooler.dense] if "bert.pooler.dense.weight" in info["missing_keys"] else []
    torch.manual_seed(job.seed)
    for layer in fresh:
        nn.init.normal_(layer.weight, std=model.config.initializer_range)
        nn.init.zeros_(layer.bias)
    if task.labels:
        model.config.id2label = dict(enumerate(task.labels))
        model.config.label2id = {label: column for column, label in enumerate(task.labels)}
    return model.to(device())


def build_teacher(job: FineTuning, task: glue.Task) -> Any:
    """The task's fine-tuned teacher, frozen."""
    model = load_pretrained(BertForSequenceClassification, str(job.teacher), 0, dtype=torch.float32)
    return model.eval().requires_grad_(False).to(device())


def forward(job: FineTuning, model: Any, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Logits [B, V] of input_ids, token_type_ids and attention_mask, each [B, T]."""
    input_ids, types, mask = to_device(*batch)
    bf16 = job.precision == "bf16" or (job.precision == "auto" and torch.cuda.is_available())
    with torch.autocast(device().type, torch.bfloat16, enabled=bf16):
        return model(input_ids=input_ids, token_type_ids=types, attention_mask=mask).logits.float()


@torch.no_grad()
def predict(job: FineTuning, model: Any, examples: glue.Examples) -> Tensor:
    """float32 [E, V] on the CPU: logits of all examples, computed in the order of their lengths."""
    model.eval()
    order = examples.lengths.argsort()
    logits = torch.cat([forward(job, model, examples.batch(rows)) for rows in order.split(EVAL_BATCH)]).cpu()
    if not logits.isfinite().all():
        raise ValueError(f"{job.task}, seed {job.seed}: predictions that are not finite; lower --lr")
    return torch.empty_like(logits).index_copy_(0, order, logits)


def evaluate(job: FineTuning, task: glue.Task, model: Any, data: dict[str, glue.Examples]) -> dict[str, float]:
    """The task's official metrics on its dev splits, as "eval/accuracy" and so on."""
    scores: dict[str, float] = {}
    for split in task.evaluated:
        predicted = glue.predicted(task, predict(job, model, data[split]))
        scores |= glue.score(task, split, predicted, data[split].labels.numpy())
    return {f"eval/{name}": value for name, value in scores.items()}
