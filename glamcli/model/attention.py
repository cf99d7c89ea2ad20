"""Causal self-attention inside segments, with a relative position bias.

Logits and softmax are float32. The scale 1/sqrt(D) is either part of the query initialisation
(`folded`, the reference code) or applied at run time (`sqrt`), never both.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from glamcli.config import schema
from glamcli.config.sharding import ATTENTION
from glamcli.model import kv_cache
from glamcli.model.kernels.linear import linear, on_one_cpu
from glamcli.model.params import gaussian, param
from glamcli.model.position import RelativeBias
from glamcli.parallel.axes import GLAM, Layout

MASKED = -1e9


class Attention(nnx.Module):
    """Projections around `attend`; heads x head width need not equal the model width."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        model: schema.Model,
        layout: Layout = GLAM,
        *,
        recompute: bool = False,
    ):
        M, N, D = model.model_dim, model.num_heads, model.head_dim
        folded = model.attention_scale == "folded"
        query_std = (M * D) ** -0.5 if folded else M**-0.5
        self.query = param(rngs, (M, N, D), ATTENTION["attention.query"], gaussian(query_std))
        self.key = param(rngs, (M, N, D), ATTENTION["attention.key"], gaussian(M**-0.5))
        self.value = param(rngs, (M, N, D), ATTENTION["attention.value"], gaussian(M**-0.5))
        self.out = param(rngs, (N, D, M), ATTENTION["attention.out"], gaussian((N * D) ** -0.5))
        self.bias = RelativeBias(rngs, N, model.position_buckets, model.position_max_distance)
        self.scale = None if folded else 1.0 / math.sqrt(D)
        self.zero_logit = model.zero_logit
        self.recompute = recompute
        self.layout = layout

    def __call__(self, x_BSM: Array, segments_BS: Array) -> Array:
        """Attention over the rows themselves: to no other segment, to no later token."""
        B, S, _ = x_BSM.shape
        with jax.named_scope("attention"):
            q_BSND, k_BSND, v_BSND = self.project(x_BSM)
            mask_BST = jnp.equal(segments_BS[:, :, None], segments_BS[:, None, :])
            mask_BST &= jnp.tril(jnp.ones((S, S), bool))[None]
            bias_BNST = self._bias(B, S)
            if on_one_cpu():
                core = partial(attend_by_row, self.zero_logit)
            else:
                core = partial(attend, zero_logit=self.zero_logit)
            if self.recompute:
                core = jax.checkpoint(core)
            return self.merge(core(q_BSND, k_BSND, v_BSND, bias_BNST, mask_BST))

    def extend(
        self,
        x_BTM: Array,
        kept: dict[str, Array],
        segments_BT: Array,
        segments_BC: Array,
        start_B: Array,
    ) -> tuple[Array, dict[str, Array]]:
        """Attention of new tokens over this layer's cache and themselves; their keys and values.

        Token t of row b has place start_b + t of C; a place is its position, and `segments_BC`
        already knows the new tokens.
        """
        T, C = segments_BT.shape[1], segments_BC.shape[1]
        with jax.named_scope("attention"):
            q_BTND, k_BTND, v_BTND = self.project(x_BTM)
            k_BCND = kv_cache.write(kept["key"], k_BTND, start_B)
            v_BCND = kv_cache.write(kept["value"], v_BTND, start_B)
            place_BT = kv_cache.places(start_B, T)
            mask_BTC = jnp.equal(segments_BT[:, :, None], segments_BC[:, None, :])
            mask_BTC &= jnp.arange(C, dtype=jnp.int32)[None, None, :] <= place_BT[:, :, None]
            bias_BNTC = self.bias(T, C, start_B)
            a_BTND = attend(q_BTND, k_BCND, v_BCND, bias_BNTC, mask_BTC, zero_logit=self.zero_logit)
            return self.merge(a_BTND), {"key": k_BTND, "value": v_BTND}

    def _bias(self, B: int, S: int) -> Array:
        """The bias of queries over keys, [1, N, S, S], or [B, N, S, S] where data is split.

        There every data shard has its own copy of the table: what the gradient sums over rows is
        then sent as N x R numbers, not as N x S x S.
        """
        X = self.layout.num_parts((B,), ("batch",))
        table_XNR = jnp.broadcast_to(self.bias.table[...], (X, *self.bias.table.shape))
        table_XNR = self.layout.constrain(table_XNR, "batch", "act_heads", None)
        bias_XNST = self.bias.of(table_XNR, S, S)
        if X == 1:
            return bias_XNST
        bias_XBNST = jnp.broadcast_to(bias_XNST[:, None], (X, B // X, *bias_XNST.shape[1:]))
        return bias_XBNST.reshape(B, *bias_XNST.shape[1:])

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

    def merge(self, a_BSND: Array) -> Array:
        """Heads back to the model width."""
        # Or the residual stream's split over tokens would reach into the softmax.
        a_BSND = self.layout.constrain(a_BSND, "batch", None, "act_heads", None)
        return linear("BSND,NDM->BSM", a_BSND, self.out[...])


def attend(
    q_BSND: Array,
    k_BTND: Array,
    v_BTND: Array,
    bias_BNST: Array,
    mask_BST: Array,
    *,
    zero_logit: bool,
) -> Array:
    """Weighted sums of values; weights are a softmax over the keys that the mask allows.

    With `zero_logit` the softmax has one more entry of logit 0 and value 0, so the weights of a
    query may sum to less than one. Weights are divided after the sum over values, where there
    is D/T as much to divide. The bias may have one row for the whole batch.
    """
    # A product of matrices would have all keys and values copied, transposed, for one query.
    single = q_BSND.shape[1] == 1 and on_one_cpu()
    logits_BNST = (_one_query if single else _queries)(q_BSND, k_BTND)
    B, N, S, T = logits_BNST.shape
    logits_BNST = logits_BNST + jnp.broadcast_to(bias_BNST, (B, N, S, T))
    logits_BNST = jnp.where(mask_BST[:, None], logits_BNST, MASKED)
    top_BNS1 = jnp.max(jax.lax.stop_gradient(logits_BNST), axis=-1, keepdims=True)
    if zero_logit:
        top_BNS1 = jnp.maximum(top_BNS1, 0.0)
    weight_BNST = jnp.exp(logits_BNST - top_BNS1)
    total_BNS1 = jnp.sum(weight_BNST, axis=-1, keepdims=True)
    if zero_logit:
        total_BNS1 = total_BNS1 + jnp.exp(-top_BNS1)
    sum_BSND = (_one_sum if single else _sums)(weight_BNST.astype(v_BTND.dtype), v_BTND)
    return (sum_BSND / jnp.swapaxes(total_BNS1, 1, 2)).astype(v_BTND.dtype)


def _queries(q_BSND: Array, k_BTND: Array) -> Array:
    return jnp.einsum("BSND,BTND->BNST", q_BSND, k_BTND, preferred_element_type=jnp.float32)


def _sums(weight_BNST: Array, v_BTND: Array) -> Array:
    return jnp.einsum("BNST,BTND->BSND", weight_BNST, v_BTND, preferred_element_type=jnp.float32)


def _one_query(q_B1ND: Array, k_BTND: Array) -> Array:
    """`_queries`, added up where the keys lie."""
    products_BTND = q_B1ND.astype(jnp.float32) * k_BTND.astype(jnp.float32)
    return jnp.swapaxes(jnp.sum(products_BTND, axis=-1), 1, 2)[:, :, None]


def _one_sum(weight_BN1T: Array, v_BTND: Array) -> Array:
    """`_sums`, added up where the values lie."""
    weight_BTN1 = jnp.swapaxes(weight_BN1T[:, :, 0], 1, 2)[..., None].astype(jnp.float32)
    return jnp.sum(weight_BTN1 * v_BTND.astype(jnp.float32), axis=1, keepdims=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_by_row(
    zero_logit: bool,
    q_BSND: Array,
    k_BTND: Array,
    v_BTND: Array,
    bias_1NST: Array,
    mask_BST: Array,
) -> Array:
    """The same as `attend`, one row of the batch at a time, for one CPU.

    There the softmax is bound by memory and one row's logits stay in the cache: about twice as
    fast. The backward pass computes the logits again instead of reading them back.
    """
    return _rows_forward(zero_logit, q_BSND, k_BTND, v_BTND, bias_1NST, mask_BST)[0]


def _row_logits(q_SND: Array, k_TND: Array, bias_NST: Array, mask_ST: Array) -> Array:
    logits_NST = jnp.einsum("SND,TND->NST", q_SND, k_TND, preferred_element_type=jnp.float32)
    return jnp.where(mask_ST[None], logits_NST + bias_NST, MASKED)


def _rows_forward(zero_logit, q_BSND, k_BTND, v_BTND, bias_1NST, mask_BST):
    def row(carry, part):
        q_SND, k_TND, v_TND, mask_ST = part
        logits_NST = _row_logits(q_SND, k_TND, bias_1NST[0], mask_ST)
        top_NS1 = jnp.max(logits_NST, axis=-1, keepdims=True)
        top_NS1 = jnp.maximum(top_NS1, 0.0) if zero_logit else top_NS1
        weight_NST = jnp.exp(logits_NST - top_NS1)
        total_NS1 = jnp.sum(weight_NST, axis=-1, keepdims=True)
        total_NS1 = total_NS1 + jnp.exp(-top_NS1) if zero_logit else total_NS1
        sum_SND = jnp.einsum(
            "NST,TND->SND",
            weight_NST.astype(v_TND.dtype),
            v_TND,
            preferred_element_type=jnp.float32,
        )
        a_SND = (sum_SND / jnp.swapaxes(total_NS1, 0, 1)).astype(v_TND.dtype)
        return carry, (a_SND, top_NS1 + jnp.log(total_NS1))

    _, (a_BSND, logz_BNS1) = jax.lax.scan(row, None, (q_BSND, k_BTND, v_BTND, mask_BST))
    return a_BSND, (q_BSND, k_BTND, v_BTND, bias_1NST, mask_BST, logz_BNS1, a_BSND)


def _rows_backward(zero_logit, kept, d_a_BSND):
    del zero_logit  # logz holds its share
    q_BSND, k_BTND, v_BTND, bias_1NST, mask_BST, logz_BNS1, a_BSND = kept
    dtype = q_BSND.dtype

    def row(d_bias_NST, part):
        q_SND, k_TND, v_TND, mask_ST, logz_NS1, a_SND, d_a_SND = part
        weight_NST = jnp.exp(_row_logits(q_SND, k_TND, bias_1NST[0], mask_ST) - logz_NS1)
        d_weight_NST = jnp.einsum(
            "SND,TND->NST", d_a_SND, v_TND, preferred_element_type=jnp.float32
        )
        shared_SN1 = jnp.sum((d_a_SND * a_SND).astype(jnp.float32), axis=-1, keepdims=True)
        d_logits_NST = weight_NST * (d_weight_NST - jnp.swapaxes(shared_SN1, 0, 1))
        d_NST = d_logits_NST.astype(dtype)
        return d_bias_NST + d_logits_NST, (
            jnp.einsum("NST,TND->SND", d_NST, k_TND),
            jnp.einsum("NST,SND->TND", d_NST, q_SND),
            jnp.einsum("NST,SND->TND", weight_NST.astype(dtype), d_a_SND),
        )

    parts = (q_BSND, k_BTND, v_BTND, mask_BST, logz_BNS1, a_BSND, d_a_BSND)
    d_bias_NST, d_qkv = jax.lax.scan(row, jnp.zeros_like(bias_1NST[0]), parts)
    return *d_qkv, d_bias_NST[None], None


attend_by_row.defvjp(_rows_forward, _rows_backward)
