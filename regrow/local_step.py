"""What one step of local training does: loss, optimizer, regularisation. Part of [training] in task.toml, and of each program's metadata.

The exporter builds the programs from it; the device reads from it which inputs its program has; the trainer on torch does the same step.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from regrow.errors import LocalError, PeerError, UsageError

METADATA = "regrow.step"
"""The property of a program that holds its step as JSON; without it, the step has all defaults."""
MAX_JSON_BYTES = 1024 * 1024

_Decay = Annotated[float, msgspec.Meta(ge=0, lt=1)]
_Strength = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
_Above = Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]

_ONLY_WITH = {
    "class_weights": ("loss", ("cross_entropy",)),
    "label_smoothing": ("loss", ("cross_entropy",)),
    "huber_delta": ("loss", ("huber",)),
    "momentum": ("optimizer", ("momentum", "nesterov")),
    "beta1": ("optimizer", ("adam", "adamw")),
    "beta2": ("optimizer", ("adam", "adamw")),
    "epsilon": ("optimizer", ("adam", "adamw")),
}
"""Keys that change nothing unless another key has one of these values."""


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One step; its losses and optimizers are those of torch.nn and torch.optim under these names, "momentum" and "nesterov" being SGD's.

    Raises:
        LocalError: keys that do not go together.
    """

    loss: Literal["cross_entropy", "binary_cross_entropy", "mse", "huber"] = "cross_entropy"
    target: Literal["y", "input"] = "y"
    class_weights: Annotated[tuple[_Above, ...], msgspec.Meta(max_length=65_536)] = ()
    label_smoothing: _Decay = 0.0
    huber_delta: _Above = 1.0
    optimizer: Literal["sgd", "momentum", "nesterov", "adam", "adamw"] = "sgd"
    momentum: _Decay = 0.9
    beta1: _Decay = 0.9
    beta2: _Decay = 0.999
    epsilon: Annotated[float, msgspec.Meta(ge=1e-16, le=1)] = 1e-8
    weight_decay: _Strength = 0.0
    clip_norm: _Above | None = None
    proximal_mu: _Strength = 0.0

    def __post_init__(self) -> None:
        defaults = dict(zip(Step.__struct_fields__, Step.__struct_defaults__, strict=True))
        for key, (other, values) in _ONLY_WITH.items():
            if getattr(self, other) not in values and getattr(self, key) != defaults[key]:
                wanted = " or ".join(f'{other} = "{value}"' for value in values)
                raise UsageError(f"{key} at $.training: changes nothing without {wanted}; set that, or take {key} out")
        if self.target == "input" and self.classifies:
            raise UsageError('target at $.training: "input" compares outputs with features; set loss = "mse", "huber" or the like')

    @property
    def classifies(self) -> bool:
        """Whether y is class numbers, int64 [batch]; otherwise the target is float32 of the output's shape."""
        return self.loss == "cross_entropy"

    @property
    def counts_hits(self) -> bool:
        """Whether a score is the share of right answers; otherwise it is R^2."""
        return self.loss in ("cross_entropy", "binary_cross_entropy")

    @property
    def slots(self) -> tuple[str, ...]:
        """What the optimizer remembers of every parameter, float32 in its shape, zero at the start of a round."""
        return {"sgd": (), "momentum": ("momentum",), "nesterov": ("momentum",)}.get(self.optimizer, ("mean", "square"))

    @property
    def counts_steps(self) -> bool:
        """Whether the optimizer also counts its steps."""
        return self.optimizer in ("adam", "adamw")

    @property
    def is_bare_sgd(self) -> bool:
        """Whether the update is -learning_rate times the gradient of the loss and nothing else."""
        return self.optimizer == "sgd" and not self.weight_decay and self.clip_norm is None and not self.proximal_mu

    @property
    def spans_the_round(self) -> bool:
        """Whether a step depends on more of its round than the parameters: on state or on where the round began."""
        return bool(self.slots) or self.proximal_mu > 0

    def metadata(self) -> dict[str, str]:
        """What a program says of its step; nothing when all is default."""
        return {} if self == Step() else {METADATA: msgspec.json.encode(self).decode()}

    @staticmethod
    def from_metadata(text: str | None) -> Step:
        """The inverse of `metadata`.

        Raises:
            PeerError: it is not that.
        """
        if text is None:
            return Step()
        if len(text) > MAX_JSON_BYTES:
            raise PeerError(f"{METADATA}: {len(text)} characters, at most {MAX_JSON_BYTES} are accepted")
        try:
            return msgspec.json.decode(text, type=Step)
        except (msgspec.MsgspecError, UnicodeError, RecursionError, LocalError) as error:
            raise PeerError(f"{METADATA}: {error}") from error


def step_of(training: Step) -> Step:
    """The step alone, without what else [training] says."""
    return Step(**{name: getattr(training, name) for name in Step.__struct_fields__})
