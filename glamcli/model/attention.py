"""Causal self-attention inside segments, with a relative position bias.

Logits and softmax are float32. The scale 1/sqrt(D) is either part of the query initialisation
(`folded`, the reference code) or applied at run time (`sqrt`), never both.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import normal

from glamcli.config import schema
from glamcli.config.sharding import ATTENTION
from glamcli.config.sizes import flash_block
from glamcli.model import kv_cache
from glamcli.model.kernels.attention import KEPT, attend, attend_rows
from glamcli.model.kernels.linear import linear, platform
from glamcli.model.params import param
from glamcli.model.position import RelativeBias
from glamcli.parallel.axes import GLAM, Layout


class Attention(nnx.Module):
    """Projections around `attend`; heads x head width need not equal the model width."""

    def __init__(
        self, rngs: nnx.Rngs, model: schema.Model, layout: Layout = GLAM, recompute: bool = False
    ):
        M, N, D = model.model_dim, model.num_heads, model.head_dim
        folded = model.attention_scale == "folded"
        query_std = (M * D) ** -0.5 if folded else M**-0.5
        self.query = param(rngs, (M, N, D), ATTENTION["attention.query"], normal(query_std))
        self.key = param(rngs, (M, N, D), ATTENTION["attention.key"], normal(M**-0.5))
        self.value = param(rngs, (M, N, D), ATTENTION["attention.value"], normal(M**-0.5))
        self.out = param(rngs, (N, D, M), ATTENTION["attention.out"], normal((N * D) ** -0.5))
        self.bias = RelativeBias(rngs, N, model.position_buckets, model.position_max_distance)
        self.scale = None if folded else 1.0 / math.sqrt(D)
        self.zero_logit = model.zero_logit
        self.flash_block = partial(flash_block, model) if model.attention != "xla" else None
        self.recompute = recompute
        self.layout = layout

    def __call__(self, x_BSM: Array, segments_BS: Array) -> Array:
        """Attention over the rows themselves: to no other segment, to no later token."""
        B, S, _ = x_BSM.shape
        with jax.named_scope("attention"):
            q_BSND, k_BSND, v_BSND = (checkpoint_name(x, KEPT) for x in self.project(x_BSM))
            if (block := self._block(q_BSND.shape)) is not None:
                # Pallas takes a while to import.
                from glamcli.model.kernels.flash_attention import flash_attention

                band_XNw = self.bias.band(self._tables(B), block)
                core = partial(flash_attention, zero_logit=self.zero_logit, layout=self.layout)
                return self.merge(core(q_BSND, k_BSND, v_BSND, band_XNw, segments_BS))
            mask_BST = jnp.equal(segments_BS[:, :, None], segments_BS[:, None, :])
            mask_BST &= jnp.tril(jnp.ones((S, S), bool))[None]
            bias_BNST = self._bias(B, S)
            core = partial(attend_rows, zero_logit=self.zero_logit)
            if self.recompute:
                core = jax.checkpoint(core)
            a_BSND = core(q_BSND, k_BSND, v_BSND, bias_BNST, mask_BST)
            return self.merge(checkpoint_name(a_BSND, KEPT))

    def extend(
        self, x_BSM: Array, segments_BS: Array, past: kv_cache.Past
    ) -> tuple[Array, dict[str, Array]]:
        """Attention of new tokens over this layer's cache and themselves; their keys and values.

        Token s of row b has position start_b + s of T in the cache.
        """
        S, T = segments_BS.shape[1], past.segments_BT.shape[1]
        with jax.named_scope("attention"):
            q_BSND, k_BSND, v_BSND = self.project(x_BSM)
            k_BTND = kv_cache.insert(past.cached["key"], k_BSND, past.start_B)
            v_BTND = kv_cache.insert(past.cached["value"], v_BSND, past.start_B)
            position_BS = kv_cache.positions(past.start_B, S)
            mask_BST = jnp.equal(segments_BS[:, :, None], past.segments_BT[:, None, :])
            mask_BST &= jnp.arange(T, dtype=jnp.int32)[None, None, :] <= position_BS[:, :, None]
            with jax.named_scope("bias"):
                bias_BNST = self.bias(S, T, past.start_B)
            a_BSND = attend(q_BSND, k_BTND, v_BTND, bias_BNST, mask_BST, zero_logit=self.zero_logit)
            return self.merge(a_BSND), {"key": k_BSND, "value": v_BSND}

    def _block(self, q_shape: tuple[int, ...]) -> int | None:
        """The block of the kernel for TPUs where it serves; None where XLA does."""
        _, S, N, _ = q_shape
        if self.flash_block is None or platform() != "tpu":
            return None
        return self.flash_block(S, N // self.layout.num_parts((N,), ("act_heads",)))

    @jax.named_scope("bias")
    def _tables(self, B: int) -> Array:
        """A copy of the bias's table [X, N, R] for every data shard: what its gradient sums over
        rows is then sent as N x R numbers, not as N x S x S."""
        X = self.layout.num_parts((B,), ("batch",))
        table_XNR = jnp.broadcast_to(self.bias.table[...], (X, *self.bias.table.shape))
        return self.layout.constrain(table_XNR, "batch", "act_heads", None)

    @jax.named_scope("bias")
    def _bias(self, B: int, S: int) -> Array:
        """The bias of queries over keys, [1, N, S, S], or [B, N, S, S] where data is split."""
        bias_XNST = self.bias.of(self._tables(B), S, S)
        X = bias_XNST.shape[0]
        if X == 1:
            return bias_XNST
        bias_XBNST = jnp.broadcast_to(bias_XNST[:, None], (X, B // X, *bias_XNST.shape[1:]))
        return bias_XBNST.reshape(B, *bias_XNST.shape[1:])

    @jax.named_scope("projections")
    def project(self, x_BSM: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values [B, S, N, D]."""
        q_BSND, k_BSND, v_BSND = (
            self.layout.constrain(
                linear("BSM,MND->BSND", x_BSM, weight[...]), "batch", None, "act_heads", None
            )
            for weight in (self.query, self.key, self.value)
        )
        if self.scale is not None:
            q_BSND = q_BSND * self.scale
        return q_BSND, k_BSND, v_BSND

    @jax.named_scope("projections")
    def merge(self, a_BSND: Array) -> Array:
        """Heads back to the model width."""
        # Or the residual stream's split over tokens would reach into the softmax.
        a_BSND = self.layout.constrain(a_BSND, "batch", None, "act_heads", None)
        return linear("BSND,NDM->BSM", a_BSND, self.out[...])
