"""Rules of attention as one operator, and of recurrent layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .depend import admit
from .rules_compute import equate_last
from .terms import ONE
from .trace import Axes, Call, rule
from .unify import cut, equate, factor


@rule(
    "scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def attention(call: Call) -> Axes:
    """Weigh values by the similarity of queries and keys: (…, heads, tokens, units), heads of queries in groups."""
    query, key, value = (list(call.axes(call[name])) for name in ("query", "key", "value"))
    for term in (key, value):  # fewer heads of keys serve several heads of queries each
        if len(query) > 2 and term[-3].size < query[-3].size:
            served = factor(query[-3], (term[-3].size, query[-3].size // term[-3].size), call.reason)
            equate(served[0], term[-3], call.reason)
    for own, other in ((query, key), (key, value)):
        for mine, theirs in zip(own[:-2], other[:-2], strict=True):
            if mine.size == theirs.size:
                equate(mine, theirs, call.reason)
    equate(query[-1], key[-1], call.reason)
    equate(key[-2], value[-2], call.reason)
    mask = call["attn_mask"] if call["attn_mask"] is not None else call["attn_bias"]
    if isinstance(mask, Tensor):
        equate_last(call, [*query[:-1], key[-2]], mask)
    if call["is_causal"]:
        call.pin(query[-2])
        call.pin(key[-2])
    # every query meets every key of its head, so that none of the four orders depends on another
    batch, few = query[:-2], key[:-2]
    admit([[*few, query[-1]], [*batch, query[-2]], [*few, key[-2]], [*few, value[-1]], [*batch, value[-1]]])
    call.tracer.heads += query[1:-2]
    return [*query[:-1], value[-1]]


@rule("mkldnn_rnn_layer")
def recurrent_layer(call: Call) -> tuple[Axes, ...]:
    """Run one direction of a recurrent layer: the gates of a unit move together, in both matrices and both biases."""
    tensor = call.axes(call["input"])
    hidden: int = call["hidden_size"]
    state = call.axes(call["weight1"])[1]
    equate(tensor[-1], call.axes(call["weight0"])[1], call.reason)
    for name in ("weight0", "weight1", "weight2", "weight3"):
        _tie_gates(call, call.axes(call[name])[0], state, hidden)
    for name in ("hx_", "cx_"):
        if isinstance(call[name], Tensor) and call[name].ndim:
            equate_last(call, [tensor[1], state], call[name])
    admit([[state], tensor[:-1], [tensor[-1]]])
    axes = [tensor[0], tensor[1], state]
    last: Axes = [tensor[1], state]
    shapes = [list(last) if t.ndim == 2 else [ONE, *last] for t in call.result[1:3]]
    return (axes, *shapes)


def _tie_gates(call: Call, term: Any, state: Any, hidden: int) -> None:
    for gate in cut(term, [hidden] * (term.size // hidden), call.reason):
        equate(gate, state, call.reason)
