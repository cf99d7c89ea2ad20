"""One transformer layer, and the block of layers that the decoder's scan repeats.

A block is (expert layer, dense layer), experts first, or one dense layer. `decoder.py` stacks
and scans blocks; what a layer measures is returned, never written aside.
"""

from typing import Literal

import jax
from flax import nnx
from jax import Array

from glamcli.config import schema
from glamcli.model.attention import Attention
from glamcli.model.experts import MoeLayer, Routing
from glamcli.model.kv_cache import Past
from glamcli.model.layers import GatedFfn, RmsNorm
from glamcli.parallel.axes import Layout

Stats = dict[str, Array]
Remat = Literal["none", "attention", "dots", "projections", "full"]


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

    def __call__(
        self, x_BSM: Array, segments_BS: Array, routing: Routing, past: Past | None
    ) -> tuple[Array, Stats, dict[str, Array]]:
        normed_BSM = self.attention_norm(x_BSM)
        if past is None:
            a_BSM, new = self.attention(normed_BSM, segments_BS), {}
        else:
            a_BSM, new = self.attention.extend(normed_BSM, segments_BS, past)
        x_BSM = self._residual(x_BSM + a_BSM)
        normed_BSM = self.ffn_norm(x_BSM)
        if isinstance(self.ffn, MoeLayer):
            y_BSM, stats = self.ffn(normed_BSM, segments_BS != 0, routing)
        else:
            y_BSM, stats = self.ffn(normed_BSM), {}
        return self._residual(x_BSM + y_BSM), stats, new

    def _residual(self, x_BSM: Array) -> Array:
        return self.layout.constrain(x_BSM, "batch", "seq", "act_embed")


class Block(nnx.Module):
    """What the scan repeats: an expert layer and a dense layer, or a dense layer alone."""

    def __init__(self, **layers: Layer):
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.names = tuple(layers)

    def __call__(
        self, x_BSM: Array, segments_BS: Array, routing: Routing, past: Past | None = None
    ) -> tuple[Array, Stats, dict[str, dict[str, Array]]]:
        """The residual stream after the block, what routing measured, and, where there is a `past`
        (whose cache is by layer), the new tokens' keys and values by layer."""
        stats, new = {}, {}
        for name in self.names:
            layer_past = past and past._replace(cached=past.cached[name])
            with jax.named_scope(name):
                layer = getattr(self, name)
                x_BSM, measured, new[name] = layer(x_BSM, segments_BS, routing, layer_past)
            stats |= measured
        return x_BSM, stats, new
