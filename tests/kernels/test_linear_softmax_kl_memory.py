"""What linear_softmax_kl holds at its peak grows with N x (D + E), not with N x V: read from the operating system."""

import sys

import pytest
import torch

from kd_core.kernels import linear_softmax_kl as module
from kd_core.kernels.bench_measure import in_a_new_process, own_peak_bytes

V, D, E = 30522, 64, 96
CHUNK_BYTES = 8 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


def peak_bytes(num_rows: int, impl: str) -> int:
    """Of a step beyond its inputs."""
    torch.set_num_threads(1)
    module.CPU_CHUNK_BYTES = CHUNK_BYTES
    hidden, weight = torch.randn(num_rows, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    teacher, teacher_weight = torch.randn(num_rows, E), torch.randn(V, E)
    labels = torch.randint(V, (num_rows,))

    def step() -> None:
        loss, *_ = module.linear_softmax_kl(
            hidden, weight, teacher, teacher_weight, labels, label_weight=0.5, impl=impl
        )
        torch.autograd.grad(loss, (hidden, weight))

    return own_peak_bytes(step)


def test_nothing_of_the_size_of_the_logits_is_held() -> None:
    few, many = (in_a_new_process(peak_bytes, num_rows, "torch") for num_rows in (128, 512))
    gradient_growth, logits_growth = 4 * (512 - 128) * D, 4 * (512 - 128) * V
    assert many <= CHUNK_BYTES + 4 * V * D + 16 * gradient_growth + (8 << 20), many
    assert many - few <= 16 * gradient_growth + (2 << 20) < logits_growth / 10, (few, many)
    # The same clock sees the logits of those who hold them: of both sides, and more.
    assert in_a_new_process(peak_bytes, 512, "reference") > 2 * 4 * 512 * V
