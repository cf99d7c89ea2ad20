"""Reading rows of the embedding table, whole on one device or split over the vocabulary, and the
table's gradient."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from glamcli.parallel.axes import Layout, first_row, num_devices


def read_table(table_VM: Array, tokens_BS: Array, dtype: jnp.dtype, layout: Layout) -> Array:
    """Rows [B, S, M] of the table in `dtype`; NaN for an id that it does not have."""
    if num_devices() == 1:
        return _rows(table_VM, tokens_BS, jnp.nan).astype(dtype)
    return _read_split(layout, dtype, table_VM.shape[0], table_VM, tokens_BS)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _read_split(
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


_read_split.defvjp(lambda *args: (_read_split(*args), args[-1]), _read_backward)


def _rows(table_VM: Array, ids_BS: Array, other: float) -> Array:
    """Rows by id; `other` for an id that the table does not have."""
    return table_VM.at[ids_BS].get(mode="fill", fill_value=other, wrap_negative_indices=False)
