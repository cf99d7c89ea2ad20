"""The plain layers: RMS norm, the gated feed-forward layer, the tied embedding. No biases."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import normal, ones

from glamcli.config import schema
from glamcli.config.sharding import DENSE, NORM, OUTSIDE
from glamcli.model.kernels.embedding import read_table
from glamcli.model.kernels.linear import linear
from glamcli.model.params import param
from glamcli.parallel.axes import GLAM, Layout


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
        self.table = param(rngs, shape, OUTSIDE["embedding.table"], normal(1.0))
        self.dtype = jnp.dtype(model.activation_dtype)
        self.layout = layout

    def __call__(self, tokens_BS: Array) -> Array:
        """Embeddings in the activation dtype; an id outside the table becomes NaN, never another
        token."""
        with jax.named_scope("embed"):
            return read_table(self.table[...], tokens_BS, self.dtype, self.layout)
