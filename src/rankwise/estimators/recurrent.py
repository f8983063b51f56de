"""Recurrent layers that go step by step, each step with a constant state before it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

State = tuple[Tensor, ...]
Hear = Callable[[int, int, int, Tensor], None]
"""(number of the layer, step, steps, hidden state (b, m)) -> nothing."""


def unrolled(layer: nn.RNNBase, hear: Hear) -> Callable[..., Any]:
    """Return what computes the same as ``layer``, with hidden states as constants.

    Each new state is handed to ``hear``, which may run a backward pass; so only one step is ever kept for it.

    Args:
        layer: an ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM``.
        hear: learns from a step.

    Raises:
        ValueError: if the layer has two directions or projects its states.
    """
    if layer.bidirectional or layer.proj_size:
        raise ValueError(
            "recurrent layers that have two directions, or project their states, cannot go step by step; "
            "leave them out of blocks."
        )

    def forward(input: Tensor, hx: Any = None) -> Any:
        if not isinstance(input, Tensor) or input.dim() != 3:
            raise ValueError("recurrent layers that learn step by step take batches of sequences of one length.")
        x = input if layer.batch_first else input.transpose(0, 1)
        two = isinstance(layer, nn.LSTM)
        zeros = x.new_zeros(layer.num_layers, len(x), layer.hidden_size)
        before = ((zeros, zeros) if two else (zeros,)) if hx is None else tuple(hx) if two else (hx,)
        last: list[State] = []
        for number in range(layer.num_layers):
            x, state = _layer(layer, number, x, tuple(each[number] for each in before), hear)
            last.append(state)
            if number + 1 < layer.num_layers:
                x = functional.dropout(x, layer.dropout, layer.training)
        hidden = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        return x if layer.batch_first else x.transpose(0, 1), hidden if two else hidden[0]

    return forward


def _layer(layer: nn.RNNBase, number: int, x: Tensor, state: State, hear: Hear) -> tuple[Tensor, State]:
    """Run one layer over (b, t, n); returns its states as constants, (b, t, m), and the last one."""
    weights = [getattr(layer, f"{kind}_l{number}") for kind in ("weight_ih", "weight_hh")]
    weights += [getattr(layer, f"{kind}_l{number}") for kind in ("bias_ih", "bias_hh") if layer.bias]
    cell, known = CELLS[layer.mode], x.detach().requires_grad_(x.requires_grad)  # a leaf, for what is before it
    hidden, steps = [], x.shape[1]
    for step in range(steps):
        found = cell(known[:, step], tuple(each.detach() for each in state), *weights)
        if found[0].requires_grad:
            hear(number, step, steps, found[0])
        state = tuple(each.detach() for each in found)
        hidden.append(state[0])
    if known.grad is not None:
        x.backward(known.grad)
    return torch.stack(hidden, 1), state


CELLS: dict[str, Callable[..., State]] = {
    "RNN_TANH": lambda x, state, *weights: (torch.rnn_tanh_cell(x, *state, *weights),),
    "RNN_RELU": lambda x, state, *weights: (torch.rnn_relu_cell(x, *state, *weights),),
    "GRU": lambda x, state, *weights: (torch.gru_cell(x, *state, *weights),),
    "LSTM": lambda x, state, *weights: torch.lstm_cell(x, state, *weights),
}
