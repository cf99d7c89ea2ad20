"""The core of attention: softmax-weighted sums of values, and its form for one CPU.

Logits and softmax are float32. `model/attention.py` projects to queries, keys and values and back.
"""

import jax
import jax.numpy as jnp
from jax import Array

from glamcli.model.kernels.linear import einsum32, on_one_cpu

MASKED = -1e9

KEPT = "projections"
"""What `train.remat: projections` keeps has this name: queries, keys, values, sums of values."""


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
    with jax.named_scope("logits"):
        logits_BNST = (_one_query if single else _queries)(q_BSND, k_BTND)
        B, N, S, T = logits_BNST.shape
        logits_BNST = logits_BNST + jnp.broadcast_to(bias_BNST, (B, N, S, T))
        logits_BNST = jnp.where(mask_BST[:, None], logits_BNST, MASKED)
    weight_BNST, total_BNS1, _ = _weights(logits_BNST, zero_logit)
    with jax.named_scope("values"):
        sum_BSND = (_one_sum if single else _sums)(weight_BNST.astype(v_BTND.dtype), v_BTND)
        return (sum_BSND / jnp.swapaxes(total_BNS1, 1, 2)).astype(v_BTND.dtype)


@jax.named_scope("softmax")
def _weights(logits: Array, zero_logit: bool) -> tuple[Array, Array, Array]:
    """Weights over the last axis before they are divided, their sum, and the largest logit."""
    top = jnp.max(jax.lax.stop_gradient(logits), axis=-1, keepdims=True)
    top = jnp.maximum(top, 0.0) if zero_logit else top
    weight = jnp.exp(logits - top)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    return weight, total + jnp.exp(-top) if zero_logit else total, top


def _queries(q_BSND: Array, k_BTND: Array) -> Array:
    return einsum32("BSND,BTND->BNST", q_BSND, k_BTND)


def _sums(weight_BNST: Array, v_BTND: Array) -> Array:
    return einsum32("BNST,BTND->BSND", weight_BNST, v_BTND)


def _one_query(q_B1ND: Array, k_BTND: Array) -> Array:
    """`_queries` as a product and a sum, which leaves the keys as they are in memory."""
    products_BTND = q_B1ND.astype(jnp.float32) * k_BTND.astype(jnp.float32)
    return jnp.swapaxes(jnp.sum(products_BTND, axis=-1), 1, 2)[:, :, None]


def _one_sum(weight_BN1T: Array, v_BTND: Array) -> Array:
    """`_sums` in the same way."""
    weight_BTN1 = jnp.swapaxes(weight_BN1T[:, :, 0], 1, 2)[..., None].astype(jnp.float32)
    return jnp.sum(weight_BTN1 * v_BTND.astype(jnp.float32), axis=1, keepdims=True)


def attend_rows(*arrays: Array, zero_logit: bool) -> Array:
    """`attend` of whole rows over themselves, on one CPU one row of the batch at a time.

    There the softmax is bound by memory and one row's logits stay in the cache: about twice as
    fast. The backward pass computes the logits again instead of reading them back.
    """
    if on_one_cpu():
        return _by_row(zero_logit, *arrays)
    return attend(*arrays, zero_logit=zero_logit)


@jax.named_scope("logits")
def _row_logits(q_SND: Array, k_TND: Array, bias_NST: Array, mask_ST: Array) -> Array:
    logits_NST = einsum32("SND,TND->NST", q_SND, k_TND) + bias_NST
    return jnp.where(mask_ST[None], logits_NST, MASKED)


def _rows_forward(zero_logit, q_BSND, k_BTND, v_BTND, bias_1NST, mask_BST):
    def row(carry, part):
        q_SND, k_TND, v_TND, mask_ST = part
        logits_NST = _row_logits(q_SND, k_TND, bias_1NST[0], mask_ST)
        weight_NST, total_NS1, top_NS1 = _weights(logits_NST, zero_logit)
        with jax.named_scope("values"):
            sum_SND = einsum32("NST,TND->SND", weight_NST.astype(v_TND.dtype), v_TND)
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
        d_weight_NST = einsum32("SND,TND->NST", d_a_SND, v_TND)
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


_by_row = jax.custom_vjp(lambda *a: _rows_forward(*a)[0], nondiff_argnums=(0,))
_by_row.defvjp(_rows_forward, _rows_backward)
