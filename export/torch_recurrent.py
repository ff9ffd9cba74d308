"""LSTM and GRU in torch, step by step, so that torch.func.vmap and autograd go through them. Importing this module imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from export.torch_ops import Attributes, Inputs, Op, UnsupportedError

Outputs = tuple[torch.Tensor, ...]
State = tuple[torch.Tensor, ...]
Step = Callable[[torch.Tensor, State, torch.Tensor, torch.Tensor | None], State]
"""(W x and its bias, (h, ...), R, R's bias) -> (h, ...)."""


def _lstm_step(entering: torch.Tensor, state: State, r: torch.Tensor, bias: torch.Tensor | None) -> State:
    h, cell = state
    i, o, f, g = (entering + functional.linear(h, r, bias)).chunk(4, -1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _gru_step(entering: torch.Tensor, state: State, r: torch.Tensor, bias: torch.Tensor | None) -> State:
    (h,) = state
    (of_z, of_r, of_n), (z, reset, q) = entering.chunk(3, -1), functional.linear(h, r, bias).chunk(3, -1)
    n = torch.tanh(of_n + torch.sigmoid(of_r + reset) * q)
    z = torch.sigmoid(of_z + z)
    return ((1 - z) * n + z * h,)


def _recurrent(inputs: Inputs, attributes: Attributes, step: Step, states: int) -> Outputs:
    """(h of every step [steps, directions, batch, hidden], the last h [directions, batch, hidden], and for LSTM the last c)."""
    given = [*inputs, *[None] * 8]
    for odd in ("clip", "layout", "input_forget", "activations"):
        if attributes.get(odd):
            raise UnsupportedError(odd)
    if given[4] is not None or given[7] is not None:
        raise UnsupportedError("sequence_lens or peepholes")
    x, w, r, bias = given[:4]
    directions = {"forward": [1], "reverse": [-1], "bidirectional": [1, -1]}[attributes.get("direction", "forward")]
    outputs, lasts = [], []
    for place, direction in enumerate(directions):
        bias_w, bias_r = bias[place].chunk(2) if bias is not None else (None, None)
        zeros = x.new_zeros((x.shape[1], r.shape[2]))
        state = tuple(
            zeros if each is None else torch.as_tensor(each, dtype=x.dtype, device=x.device)[place] for each in given[5 : 5 + states]
        )
        entering: Sequence[torch.Tensor] = functional.linear(x, w[place], bias_w).unbind(0)
        found = []
        for each in entering[::direction]:
            state = step(each, state, r[place], bias_r)
            found.append(state[0])
        outputs.append(torch.stack(found[::direction]))
        lasts.append(state)
    return torch.stack(outputs, 1), *(torch.stack([state[index] for state in lasts]) for index in range(states))


def _gru(inputs: Inputs, attributes: Attributes) -> Any:
    if not attributes.get("linear_before_reset", 0):
        raise UnsupportedError("linear_before_reset = 0")
    return _recurrent(inputs, attributes, _gru_step, 1)


RECURRENT_OPS: dict[str, Op] = {"GRU": _gru, "LSTM": lambda i, a: _recurrent(i, a, _lstm_step, 2)}
"""Like torch_ops.OPS; each gives all outputs of the node."""
