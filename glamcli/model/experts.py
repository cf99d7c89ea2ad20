"""The mixture-of-experts layer: router weights, expert weights, and one call from x to y.

`routing.decide` chooses, `Experts` computes, `dispatch.py` moves tokens to it and back; this file
holds the parameters, forms the groups and returns what it measured. `block.py` calls it in the
position of a feed-forward layer.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from glamcli.config.schema import Model, Moe
from glamcli.config.sharding import EXPERTS
from glamcli.config.sizes import capacity_factors, slots_per_expert
from glamcli.model import dispatch as moves
from glamcli.model import routing
from glamcli.model.kernels.experts import Experts
from glamcli.model.params import param, uniform_fan_in
from glamcli.parallel.axes import GLAM, Layout

Dispatch = Literal["einsum", "gather", "dropless"]


@dataclass(frozen=True)
class Routing:
    """How one pass routes tokens."""

    dispatch: Dispatch
    key: Array | None = None
    """randomness of second experts; None (scoring, generation) decides like policy `all`."""
    capacity_factor: float | None = None
    """None is that of training, `moe.capacity_factor`."""


class MoeLayer(nnx.Module):
    """Ungated experts behind a top-K router (GLaM section 4)."""

    def __init__(self, rngs: nnx.Rngs, model: Model, moe: Moe, layout: Layout = GLAM):
        M, H, E = model.model_dim, model.ffn_dim, moe.num_experts
        self.moe = moe
        self.layout = layout
        self.router = param(rngs, (M, E), EXPERTS["ffn.router"])  # whole on every device
        self.w_in = param(rngs, (E, M, H), EXPERTS["ffn.w_in"])
        # The other way round than it is applied: so the gradient of either matrix is a sum over
        # rows whose first operand, the one that is copied on a CPU, is the narrow one.
        self.w_out = param(
            rngs, (E, M, H), EXPERTS["ffn.w_out"], partial(uniform_fan_in, contracted=-1)
        )

    def __call__(
        self, x_BSM: Array, mask_BS: Array, how: Routing
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the experts' outputs, 0 for padding and dropped tokens, and `routing.tally`.

        Args:
            x_BSM: activations; products run in their dtype, the router in float32.
            mask_BS: bool, True for real tokens.

        Note: tokens are routed in groups of `moe.group_tokens`, in order. A call whose tokens do
        not divide into such groups (decoding) is one group of all its tokens, which changes
        results unless it is dropless; then its rows are the groups, and stay on their devices.
        """
        B, S, M = x_BSM.shape
        group_tokens = self.moe.group_tokens
        if (B * S) % group_tokens:
            group_tokens = S if how.dispatch == "dropless" else B * S
        x_BSM = self.layout.constrain(x_BSM, "batch", None, "act_expert_embed")
        x_GSM = x_BSM.reshape(-1, group_tokens, M)
        x_GSM = self.layout.constrain(x_GSM, "group", None, "act_expert_embed")
        real_GS = mask_BS.reshape(-1, group_tokens)
        slots = None
        if how.dispatch != "dropless":
            factor = how.capacity_factor or self.moe.capacity_factor
            slots = slots_per_expert(group_tokens, self.moe.num_experts, factor)
        with jax.named_scope("router"):
            # By default a TPU or GPU would round the factors to bfloat16 or TF32.
            logits_GSE = jnp.einsum(
                "GSM,ME->GSE",
                x_GSM.astype(jnp.float32),
                self.router[...].astype(jnp.float32),
                precision=jax.lax.Precision.HIGHEST,
            )
            route, probs_GSE = routing.decide(logits_GSE, real_GS, self.moe, slots, how.key)
            sums = routing.tally(route, logits_GSE, probs_GSE, real_GS, self.moe.balance_padding)
            if self.moe.adaptive_capacity is not None:
                slots_F = [
                    slots_per_expert(group_tokens, self.moe.num_experts, factor)
                    for factor in capacity_factors(self.moe)
                ]
                sums["dropped_F"] = routing.dropped_of(route, slots_F)
        moe, weights = self.moe, (self.w_in[...], self.w_out[...])
        experts = Experts(*weights, moe.expert_activation, self.layout, moe.dropless_experts)
        with jax.named_scope(f"experts_{how.dispatch}"):
            if slots is None:
                y_GSM = moves.dropless(x_GSM, route, experts)
            else:
                move = moves.einsum if how.dispatch == "einsum" else moves.gather
                y_GSM = move(x_GSM, route, slots, experts)
        return y_GSM.reshape(B, S, M), sums
