"""The step of a program on torch, for several clients at once: losses, scores and optimizers over one more axis in front. Imports torch.

What it computes is what export.losses and export.optimizers write as graphs.
"""

from __future__ import annotations

import torch

from export.optimizers import CLIP_EPSILON
from regrow.local_step import Step


def client_losses(step: Step, outputs: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Each client's mean loss, [clients].

    Args:
        outputs: [clients, batch, ...].
        y: class numbers [clients, batch], or values of the outputs' shape.
        weight: of each example, [clients, batch], 0 for padding.
    """
    if not step.classifies:
        return (_per_example(step, outputs, y) * (weight / weight.sum(1, keepdim=True))).sum(1)
    scores = torch.log_softmax(outputs, 2)
    picked = -scores.gather(2, y[:, :, None])[:, :, 0]
    if not step.class_weights and not step.label_smoothing:
        return (picked * (weight / weight.sum(1, keepdim=True))).sum(1)
    classes = outputs.shape[2]
    of_class = torch.tensor(step.class_weights or [1.0] * classes, dtype=scores.dtype, device=scores.device)
    smooth = -(scores * of_class).sum(2) * (step.label_smoothing / classes)
    counted = weight * of_class[y]
    return ((1 - step.label_smoothing) * (picked * counted).sum(1) + (smooth * weight).sum(1)) / counted.sum(1)


def score_sums(step: Step, outputs: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[2, clients]: the sum of losses, without class weights and smoothing, and that of right answers or of squared errors.

    Args:
        outputs, y, weight: as client_losses.
    """
    if step.classifies:
        losses = -torch.log_softmax(outputs, 2).gather(2, y[:, :, None])[:, :, 0]
        found = (outputs.argmax(2) == y) * weight
        return torch.stack([(losses * weight).sum(1), found.sum(1)])
    losses = _per_example(step, outputs, y)
    each = ((outputs > 0) == (y > 0.5)).to(outputs.dtype) if step.counts_hits else (outputs - y) ** 2
    return torch.stack([(losses * weight).sum(1), (each.flatten(2).sum(2) if each.ndim > 2 else each).mul(weight).sum(1)])


def _per_example(step: Step, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[clients, batch], the mean over outputs."""
    if step.loss == "binary_cross_entropy":
        each = torch.nn.functional.binary_cross_entropy_with_logits(outputs, y, reduction="none")
    elif step.loss == "mse":
        each = (outputs - y) ** 2
    else:
        each = torch.nn.functional.huber_loss(outputs, y, reduction="none", delta=step.huber_delta)
    return each.flatten(2).mean(2) if each.ndim > 2 else each


class FlatOptimizer:
    """A round's optimizer of several clients, whose parameters are the rows of one tensor.

    Args:
        step: of the programs.
        start: [clients, n], where the round begins.
        dropped: bool [clients, n], what must not move; None: nothing.
        rates: learning rate of each client, [clients, 1].
    """

    def __init__(self, step: Step, start: torch.Tensor, dropped: torch.Tensor | None, rates: torch.Tensor) -> None:
        self._step, self._dropped, self._rates = step, dropped, rates
        self._anchor = start.detach().clone() if step.proximal_mu else None
        self._slots = {slot: torch.zeros_like(start) for slot in step.slots}
        self._count = 0

    def moved(self, flat: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The parameters after one step. The tensors are used up: new memory for every step costs a large model more than arithmetic.

        Args:
            flat: [clients, n], without gradient.
            gradient: of the loss, [clients, n].
        """
        step = self._step
        if step.is_bare_sgd:
            return flat.add_(self._kept(gradient.mul_(-self._rates)))
        if self._anchor is not None:
            gradient = gradient.add_(flat - self._anchor, alpha=step.proximal_mu)
        if step.clip_norm is not None:
            gradient = self._kept(gradient)
            norms = gradient.norm(dim=1, keepdim=True)
            gradient = gradient.mul_((step.clip_norm / (norms + CLIP_EPSILON)).clamp(max=1.0))
        if step.weight_decay and step.optimizer != "adamw":
            gradient = gradient.add_(flat, alpha=step.weight_decay)
        move = self._adam(flat, gradient) if step.counts_steps else self._sgd(gradient) * self._rates
        return flat.sub_(self._kept(move))

    def _kept(self, values: torch.Tensor) -> torch.Tensor:
        return values if self._dropped is None else values.masked_fill_(self._dropped, 0.0)

    def _sgd(self, gradient: torch.Tensor) -> torch.Tensor:
        if not self._slots:
            return gradient
        velocity = self._slots["momentum"].mul_(self._step.momentum).add_(gradient)
        return gradient.add(velocity, alpha=self._step.momentum) if self._step.optimizer == "nesterov" else velocity

    def _adam(self, flat: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        step = self._step
        self._count += 1
        mean = self._slots["mean"].lerp_(gradient, 1 - step.beta1)
        square = self._slots["square"].mul_(step.beta2).addcmul_(gradient, gradient, value=1 - step.beta2)
        spread = (square.sqrt() / (1 - step.beta2**self._count) ** 0.5).add_(step.epsilon)
        move: torch.Tensor = (mean / spread).mul_(self._rates / (1 - step.beta1**self._count))
        decays = step.optimizer == "adamw" and step.weight_decay
        return move.add_(flat * (self._rates * step.weight_decay)) if decays else move
