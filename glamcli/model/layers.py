"""The plain layers: RMS norm, the gated feed-forward layer, the tied embedding. No biases."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from glamcli.config import schema
from glamcli.config.sharding import DENSE, NORM, OUTSIDE
from glamcli.model.kernels.linear import linear
from glamcli.model.params import gaussian, ones, param
from glamcli.parallel.axes import GLAM, Layout, first_row, num_devices


class RmsNorm(nnx.Module):
    """Root mean square normalisation with a scale and nothing else, in float32."""

    def __init__(self, rngs: nnx.Rngs, model: schema.Model):
        self.scale = param(rngs, (model.model_dim,), NORM, ones)
        self.epsilon = model.norm_epsilon

    def __call__(self, x_BSM: Array) -> Array:
        with jax.named_scope("norm"):
            wide_BSM = x_BSM.astype(jnp.float32)
            square_BS1 = jnp.mean(jnp.square(wide_BSM), axis=-1, keepdims=True)
            scaled_BSM = wide_BSM * jax.lax.rsqrt(square_BS1 + self.epsilon)
            return (scaled_BSM * self.scale[...][None, None, :]).astype(x_BSM.dtype)


class GatedFfn(nnx.Module):
    """GELU of one linear map times another, then a third (GLaM section 4)."""

    def __init__(self, rngs: nnx.Rngs, model: schema.Model, layout: Layout = GLAM):
        self.layout = layout
        M, H = model.model_dim, model.ffn_dim
        self.gate = param(rngs, (M, H), DENSE["ffn.gate"])
        self.w_in = param(rngs, (M, H), DENSE["ffn.w_in"])
        self.w_out = param(rngs, (H, M), DENSE["ffn.w_out"])

    def __call__(self, x_BSM: Array) -> Array:
        with jax.named_scope("ffn"):
            gate_BSH = linear("BSM,MH->BSH", x_BSM, self.gate[...])
            in_BSH = linear("BSM,MH->BSH", x_BSM, self.w_in[...])
            hidden_BSH = jax.nn.gelu(gate_BSH, approximate=True) * in_BSH
            hidden_BSH = self.layout.constrain(hidden_BSH, "batch", None, "act_mlp")
            return linear("BSH,HM->BSM", hidden_BSH, self.w_out[...])


class Embedding(nnx.Module):
    """The table shared by input and softmax: read unscaled, written through M^-1/2."""

    def __init__(self, rngs: nnx.Rngs, model: schema.Model, layout: Layout = GLAM):
        shape = (model.vocab_size, model.model_dim)
        self.table = param(rngs, shape, OUTSIDE["embedding.table"], gaussian(1.0))
        self.dtype = jnp.dtype(model.activation_dtype)
        self.layout = layout

    def __call__(self, tokens_BS: Array) -> Array:
        """Embeddings in the activation dtype; an id outside the table becomes NaN, never another
        token."""
        with jax.named_scope("embed"):
            if num_devices() == 1:
                rows_BSM = _rows(self.table[...], tokens_BS, jnp.nan)
                return rows_BSM.astype(self.dtype)
            num_ids = self.table.shape[0]
            return read_split(self.layout, self.dtype, num_ids, self.table[...], tokens_BS)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def read_split(
    layout: Layout, dtype: jnp.dtype, num_ids: int, table_VM: Array, tokens_BS: Array
) -> Array:
    """Rows of a table whose vocabulary is split over devices (Megatron-LM, section 3).

    A device reads the ids that are its own and leaves zeros for the others; their sum is split
    as the residual stream wants it.
    """
    vocab = layout.here("vocab", num_ids)
    sizes = {"seq": tokens_BS.shape[1], "act_embed": table_VM.shape[1]}
    axes = ("outer_batch", *layout.within(vocab, ("seq", "act_embed"), sizes))

    def run(table_VM: Array, tokens_BS: Array) -> Array:
        rows_BSM = _rows(table_VM, tokens_BS - first_row(vocab, table_VM), 0.0)
        known_BS = (tokens_BS >= 0) & (tokens_BS < num_ids)
        rows_BSM = jnp.where(known_BS[..., None], rows_BSM, jnp.nan)
        return layout.summed(rows_BSM, vocab, axes, sizes)

    split = layout.on_each_device(run, (("vocab", None), ("outer_batch", None)), axes, sizes)
    return split(table_VM.astype(dtype), tokens_BS)


def _read_forward(layout: Layout, dtype: jnp.dtype, num_ids: int, table_VM: Array, tokens_BS):
    return read_split(layout, dtype, num_ids, table_VM, tokens_BS), tokens_BS


def _read_backward(layout: Layout, dtype: jnp.dtype, num_ids: int, tokens_BS: Array, d_BSM: Array):
    """The table's gradient, in float32 like the table."""
    del dtype
    B, _, M = d_BSM.shape
    vocab, rows = layout.here("vocab", num_ids), layout.here("outer_batch", B)
    sizes = {"vocab": num_ids, "embed": M}
    num_rows = num_ids // layout.num_parts((num_ids,), ("vocab",))
    axes = ("vocab", *layout.within(rows, ("embed",), sizes))

    def run(tokens_BS: Array, d_BSM: Array) -> Array:
        d_table_VM = jnp.zeros((num_rows, M), jnp.float32)
        own = d_table_VM.at[tokens_BS - first_row(vocab, d_table_VM)]
        d_table_VM = own.add(d_BSM.astype(jnp.float32), mode="drop", wrap_negative_indices=False)
        return layout.summed(d_table_VM, rows, (None, *axes[1:]), sizes)

    by_row = ("outer_batch", None, None)
    split = layout.on_each_device(run, (by_row[:2], by_row), axes, sizes)
    return split(tokens_BS, d_BSM), None


read_split.defvjp(_read_forward, _read_backward)


def _rows(table_VM: Array, ids_BS: Array, other: float) -> Array:
    """Rows by id; `other` for an id that the table does not have."""
    return table_VM.at[ids_BS].get(mode="fill", fill_value=other, wrap_negative_indices=False)
