"""One transformer layer, and the block of layers that the decoder's scan repeats.

A block is (expert layer, dense layer), experts first, or one dense layer. `decoder.py` stacks
and scans blocks; what a layer measures is returned, never written aside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
from flax import nnx
from jax import Array

from glamcli.config import schema
from glamcli.model.attention import Attention
from glamcli.model.experts import Dispatch, MoeLayer
from glamcli.model.layers import GatedFfn, RmsNorm
from glamcli.parallel.axes import Layout

Stats = dict[str, Array]
Remat = Literal["none", "attention", "dots", "full"]


@dataclass(frozen=True)
class Routing:
    """How one pass routes tokens: the dispatch strategy, a key for drawn second experts, and a
    capacity factor other than training's."""

    dispatch: Dispatch
    key: Array | None
    capacity_factor: float | None = None


class Layer(nnx.Module):
    """Attention, then a feed-forward layer, dense or of experts; each normalised first."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        model: schema.Model,
        moe: schema.Moe | None,
        remat: Remat,
        layout: Layout,
    ):
        self.layout = layout
        self.attention_norm = RmsNorm(rngs, model)
        self.attention = Attention(rngs, model, layout, recompute=remat == "attention")
        self.ffn_norm = RmsNorm(rngs, model)
        self.ffn = (
            GatedFfn(rngs, model, layout) if moe is None else MoeLayer(rngs, model, moe, layout)
        )

    def __call__(self, x_BSM: Array, segments_BS: Array, routing: Routing) -> tuple[Array, Stats]:
        x_BSM = x_BSM + self.attention(self.attention_norm(x_BSM), segments_BS)
        return self.feed(self._residual(x_BSM), segments_BS, routing)

    def extend(
        self,
        x_BSM: Array,
        cached: dict[str, Array],
        segments_BS: Array,
        segments_BT: Array,
        start_B: Array,
        routing: Routing,
    ) -> tuple[Array, dict[str, Array]]:
        """The layer over new tokens, and their keys and values."""
        a_BSM, new = self.attention.extend(
            self.attention_norm(x_BSM), cached, segments_BS, segments_BT, start_B
        )
        return self.feed(x_BSM + a_BSM, segments_BS, routing)[0], new

    def feed(self, x_BSM: Array, segments_BS: Array, routing: Routing) -> tuple[Array, Stats]:
        """The residual stream after the feed-forward layer, and what routing measured."""
        normed_BSM = self.ffn_norm(x_BSM)
        if isinstance(self.ffn, MoeLayer):
            y_BSM, stats = self.ffn(
                normed_BSM,
                segments_BS != 0,
                dispatch=routing.dispatch,
                capacity_factor=routing.capacity_factor,
                key=routing.key,
            )
        else:
            y_BSM, stats = self.ffn(normed_BSM), {}
        return self._residual(x_BSM + y_BSM), stats

    def _residual(self, x_BSM: Array) -> Array:
        return self.layout.constrain(x_BSM, "batch", "seq", "act_embed")


class Block(nnx.Module):
    """What the scan repeats: an expert layer and a dense layer, or a dense layer alone."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        model: schema.Model,
        moe: schema.Moe | None,
        remat: Remat,
        layout: Layout,
    ):
        if moe is not None:
            self.expert_layer = Layer(rngs, model, moe, remat, layout)
        self.dense_layer = Layer(rngs, model, None, remat, layout)
        self.names = ("dense_layer",) if moe is None else ("expert_layer", "dense_layer")

    def __call__(self, x_BSM: Array, segments_BS: Array, routing: Routing) -> tuple[Array, Stats]:
        stats = {}
        for name in self.names:
            with jax.named_scope(name):
                x_BSM, measured = getattr(self, name)(x_BSM, segments_BS, routing)
            stats |= measured
        return x_BSM, stats

    def extend(
        self,
        x_BSM: Array,
        cached: dict[str, dict[str, Array]],
        segments_BS: Array,
        segments_BT: Array,
        start_B: Array,
        routing: Routing,
    ) -> tuple[Array, dict[str, dict[str, Array]]]:
        """The block over new tokens, and their keys and values by layer."""
        new = {}
        for name in self.names:
            with jax.named_scope(name):
                x_BSM, new[name] = getattr(self, name).extend(
                    x_BSM, cached[name], segments_BS, segments_BT, start_B, routing
                )
        return x_BSM, new
