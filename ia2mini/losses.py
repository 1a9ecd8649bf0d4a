"""The three losses, each a value per answer position in float32; `per_run` turns positions into one loss a run (protocol section 4)."""

import torch.nn.functional as F
from torch import Tensor


def per_run(values: Tensor, weights: Tensor) -> Tensor:
    """Losses [R] from values at positions [P], with weights [R, P / R] that average over positions of a row, then over rows."""
    return (values.view(weights.shape) * weights).sum(1)


def activation_mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Equation 4: squared difference of attention outputs [L, P, D], mean over hidden units, summed over layers: [P]."""
    return (outputs.float() - targets.float()).square().mean(-1).sum(0)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Equation 2: cross-entropy of logits [P, V] against answer tokens [P]: [P]."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def soft_cross_entropy(logits: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
    """KL(teacher || student) of logits [P, V] against the teacher's log-probabilities [P, k] of tokens `ids` [P, k]: [P].

    Renormalised over the k tokens on the teacher's side; exact for k = V (paper section 6, soft labels).
    """
    student = logits.float().log_softmax(-1).gather(1, ids)
    teacher = teacher.float().log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1)
