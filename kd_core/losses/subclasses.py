"""Subclasses that nobody has labelled: a few classes are split along what a teacher's embeddings know beside its logits.

Shape letters: N rows, C classes, S subclasses of each, D width of the embeddings.
"""

from typing import Any, Literal, Self

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor
from torch.nn.functional import one_hot

Directions = Literal["pca", "random", "kmeans"]
NEVER = -30.0  # a logarithm of a probability that is 0


class Subclasses:
    """Shares of S subclasses in each class: softmax over s of z_{c,s} / beta, z_{c,s} = <u_{c,s}, h> - b_{c,s} of an embedding h.

    Attributes:
        directions_CSD: u, orthogonal to all rows of the head, so that z says nothing that the logits say.
        offsets_CS: b.
        deviation: of z from its mean over s, in the fitted rows' own classes: a scale for beta; 1 where there is none.
    """

    def __init__(self) -> None:
        self.directions_CSD = self.offsets_CS = torch.empty(0)
        self.deviation = 1.0

    @classmethod
    def fit(
        cls,
        embeddings_ND: Tensor,
        labels_N: Tensor,
        head_CD: Tensor,
        num_subclasses: int,
        *,
        seed: int,
        directions: Directions = "pca",
    ) -> Self:
        """Directions of embeddings by their classes, computed in float64 on the CPU, and left where the embeddings are.

        The embeddings are projected onto the null space of the head, P h, unless that is all; mu_c is the mean of P h in class c.

        Args:
            labels_N: int64 classes.
            head_CD: the rows that make the logits of the embeddings.
            num_subclasses: S.
            directions: `pca`: the S leading principal directions of P h in the class, rotated by a random orthonormal matrix, which
                gives all the same variance in expectation. `random`: orthonormal ones of the null space; both with b = <u, mu_c>. `kmeans`:
                u the centres of S clusters of P h and b half their squares, so that z / beta goes to the nearest centre as beta goes to 0.
            seed: of the rotation, the directions, the first centres.

        Raises:
            ValueError: more subclasses than directions, or than images of a class less one.

        Source: LELP, arXiv 2409.20449, by its reviews; that mu_c is subtracted is our reading.
        """
        embeddings, head = embeddings_ND.detach().double().cpu(), head_CD.detach().double().cpu()
        labels_N = labels_N.cpu()
        _, values, rows = torch.linalg.svd(head, full_matrices=True)
        rank = int((values > values.max() * 1e-9).sum())
        null = rows[rank:] if rank < len(rows) else rows
        images = int(torch.bincount(labels_N, minlength=len(head)).min())
        most = min(len(null), images - 1)
        if not 1 <= num_subclasses <= most:
            raise ValueError(
                f"num_subclasses must be in 1 to {most}, got {num_subclasses}: {len(null)} directions of the embeddings are none of the "
                f"head's, and a class has only {images} images"
            )
        generator = torch.Generator().manual_seed(seed)
        fitted = cls()
        parts: list[tuple[Tensor, Tensor]] = []
        for number in range(len(head)):
            inside = embeddings[labels_N == number] @ null.T  # coordinates within the null space
            mean = inside.mean(0)
            if directions == "kmeans":
                drawn = torch.randint(2**31, (), generator=generator).item()
                centres, _ = kmeans2((inside - mean).numpy(), num_subclasses, minit="++", rng=int(drawn))
                own = torch.from_numpy(centres)
                parts.append((own @ null, own @ mean + own.square().sum(1) / 2))
                continue
            if directions == "pca":
                _, axes = torch.linalg.eigh((inside - mean).T @ (inside - mean))
                own = _orthonormal(num_subclasses, num_subclasses, generator) @ axes.flip(1)[:, :num_subclasses].T
            else:
                own = _orthonormal(num_subclasses, len(null), generator)
            parts.append((own @ null, own @ mean))
        directions_CSD, offsets_CS = (torch.stack(one).float() for one in zip(*parts, strict=True))
        fitted.directions_CSD, fitted.offsets_CS = directions_CSD, offsets_CS
        z_NS = fitted._scores(embeddings.float())[torch.arange(len(labels_N)), labels_N]
        fitted.deviation = float((z_NS - z_NS.mean(1, keepdim=True)).square().mean().sqrt()) or 1.0
        return fitted.to(embeddings_ND.device)

    def _scores(self, embeddings_ND: Tensor) -> Tensor:
        return torch.einsum("nd,csd->ncs", embeddings_ND, self.directions_CSD) - self.offsets_CS

    def targets(self, teacher_logits_NC: Tensor, embeddings_ND: Tensor, *, temperature: float, beta: float) -> Tensor:
        """log(p_c * softmax_s(z_{c,s} / beta)), float32 [N, C * S], column c * S + s; p = softmax(teacher / temperature).

        Summed over s it is p; with one subclass it is log p, the target of plain distillation.

        Args:
            embeddings_ND: of the same rows, on the device of the directions.
            beta: > 0; small: every row belongs to one subclass, large: evenly to all.
        """
        log_p_NC = torch.log_softmax(teacher_logits_NC.detach().float() / temperature, -1)
        shares_NCS = torch.log_softmax(self._scores(embeddings_ND.detach().float()) / beta, -1)
        return (log_p_NC[:, :, None] + shares_NCS).flatten(1)

    def to(self, device: torch.device) -> Self:
        """Moves the directions."""
        self.directions_CSD, self.offsets_CS = self.directions_CSD.to(device), self.offsets_CS.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        return {"directions": self.directions_CSD, "offsets": self.offsets_CS, "deviation": self.deviation}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.directions_CSD, self.offsets_CS, self.deviation = state["directions"], state["offsets"], state["deviation"]


def known_targets(
    teacher_logits_NC: Tensor, labels_N: Tensor, parts_N: Tensor, num_subclasses: int, *, temperature: float
) -> Tensor:
    """As `Subclasses.targets` of an oracle: within the true class all is the known part's, within others each part has as much.

    Args:
        parts_N: int64 in [0, S), of the true class.
    """
    log_p_NC = torch.log_softmax(teacher_logits_NC.detach().float() / temperature, -1)
    even = -torch.log(log_p_NC.new_tensor(float(num_subclasses)))
    shares_NCS = even.expand(*log_p_NC.shape, num_subclasses).clone()
    shares_NCS[torch.arange(len(labels_N)), labels_N] = NEVER * (1.0 - one_hot(parts_N, num_subclasses).float())
    return (log_p_NC[:, :, None] + shares_NCS).flatten(1)


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Uniformly drawn orthonormal rows, float64 [rows, columns]."""
    basis, triangle = torch.linalg.qr(torch.randn(columns, rows, generator=generator, dtype=torch.float64))
    return (basis * triangle.diagonal().sign()).T
