"""The GLaM decoder: shapes, initial values, and the forward pass as functions of plain dicts.

Layers come in blocks that a scan repeats (`block.py`). Training, scoring, generation and the
planner call it, all through `Decoder`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from glamcli.config import schema
from glamcli.config.sizes import group_rows
from glamcli.config.stages import PipelineSchedule
from glamcli.model import kv_cache
from glamcli.model.block import Block, Layer, Remat, Stats
from glamcli.model.experts import Dispatch, Routing
from glamcli.model.kernels import softmax
from glamcli.model.kernels.attention import KEPT
from glamcli.model.kernels.linear import platform
from glamcli.model.layers import Embedding, RmsNorm
from glamcli.model.params import Blueprint, blueprint, stack, stacked, unstack, unstacked
from glamcli.model.routing import summary
from glamcli.parallel import pipeline
from glamcli.parallel.axes import GLAM, Layout

Params = dict[str, Any]

UNROLLED_LAYERS = 4
"""Models up to this deep run without a loop: a loop copies every block's weights and gradients
out of and into the stack, a tenth of a step with many experts (docs/decisions/0005)."""


@dataclass(frozen=True)
class Decoder:
    """A model's description and its forward pass. Cheap to make: nothing is allocated."""

    model: schema.Model
    moe: schema.Moe | None = None
    remat: Remat = "none"
    layout: Layout = GLAM
    apart: bool = False
    """Whether `params["blocks"]` is a list, with arrays of its own for every block, and not stacks
    of arrays over all blocks: what few layers on one device train and generate with
    (docs/decisions/0005)."""
    capacity_factor: float | None = None
    """of training; None is `moe.capacity_factor`."""

    @cached_property
    def _parts(self) -> dict[str, Blueprint[Any]]:
        def block(rngs: Any) -> Block:
            def layer(moe: schema.Moe | None) -> Layer:
                return Layer(rngs, self.model, moe, self.remat, self.layout)

            experts = {"expert_layer": layer(self.moe)} if self.moe else {}
            return Block(**experts, dense_layer=layer(None))

        copies = unstacked if self.apart else stacked
        return {
            "embedding": blueprint(lambda rngs: Embedding(rngs, self.model, self.layout)),
            "blocks": copies(blueprint(block), self.num_blocks),
            "final_norm": blueprint(lambda rngs: RmsNorm(rngs, self.model)),
        }

    @property
    def _blocks(self) -> Blueprint[Block]:
        return self._parts["blocks"]

    @property
    def num_blocks(self) -> int:
        """Repetitions of the scan: layers, or pairs of layers when there are experts."""
        per_block = 1 if self.moe is None else 2
        if self.model.num_layers % per_block:
            raise ValueError("layers with experts come in pairs")
        return self.model.num_layers // per_block

    @property
    def is_shallow(self) -> bool:
        """Whether blocks run one after the other without a loop (`UNROLLED_LAYERS`)."""
        return self.model.num_layers <= UNROLLED_LAYERS

    @property
    def eval_dispatch(self) -> Dispatch | None:
        """How scoring and generation route tokens; None for a dense model."""
        return None if self.moe is None else self.moe.eval_dispatch

    def for_one_device(self) -> Decoder:
        """The same model in the form that is fastest on one device: a shallow one's blocks
        `apart`."""
        return replace(self, apart=self.is_shallow)

    def with_capacity(self, factor: float | None) -> Decoder:
        """The same model, trained with this capacity factor."""
        return replace(self, capacity_factor=factor)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of activations."""
        return jnp.dtype(self.model.activation_dtype)

    @property
    def shapes(self) -> Params:
        """Shapes of the parameters, all float32."""
        return {name: part.shapes for name, part in self._parts.items()}

    @property
    def axes(self) -> Params:
        """Logical axes of the parameters; layers are stacked over the first, `layers`."""
        return {name: part.axes for name, part in self._parts.items()}

    def init(self, key: Array) -> Params:
        """New parameters; under `jit` with output shardings never whole on one device."""
        keys = jax.random.split(key, len(self._parts))
        return {name: part.init(keys[i]) for i, (name, part) in enumerate(self._parts.items())}

    def hidden(
        self,
        params: Params,
        tokens_BS: Array,
        segments_BS: Array,
        *,
        dispatch: Dispatch | None = None,
        key: Array | None = None,
        schedule: PipelineSchedule | None = None,
    ) -> tuple[Array, Stats]:
        """Hidden states [B, S, M] in the activation dtype, ready for the softmax, and what routing
        measured, [expert layers, ...] each.

        Without `dispatch` tokens are routed as for training; scoring passes `eval_dispatch`,
        and gets the capacity of evaluation. Padding (segment 0) takes no part in routing; what
        comes out at padding means nothing.

        With a `schedule` the blocks are stages of a pipeline, which is the same but for drawn
        second experts: those are drawn per microbatch and data shard.
        """
        routing = self._routing(dispatch, training=dispatch is None)

        keys = None if key is None else jax.random.split(key, self.num_blocks)
        x_BSM = self._embed(params, tokens_BS)

        def block(x_BSM: Array, part: tuple[Params, Array | None]) -> tuple[Array, Stats]:
            params, key = part
            bound = self._blocks.bind(params)
            return bound(x_BSM, segments_BS, replace(routing, key=key))[:2]

        def stage_block(layout, x_BSM, segments_BS, params, number, rows):
            key = None if keys is None else jax.random.fold_in(keys[number], rows)
            bound = replace(self, layout=layout)._blocks.bind(params)
            return bound(x_BSM, segments_BS, replace(routing, key=key))[:2]

        if schedule is None:
            x_BSM = self.layout.constrain(x_BSM, "batch", "seq", "act_embed")
            run = self._rematerialised(block)
            x_BSM, sums = self._over_blocks(run, x_BSM, params["blocks"], keys)
        else:
            x_BSM, sums = pipeline.run_stages(
                schedule,
                self.layout,
                stage_block,
                params["blocks"],
                self._blocks.axes,
                x_BSM,
                segments_BS,
                group_rows=group_rows(self.moe, x_BSM.shape[1]),
                remat=self._rematerialised,
                unroll=self.is_shallow,
            )
        return self._finish(params, x_BSM), summary(sums) if sums else {}

    def logits(self, params: Params, x_BSM: Array) -> Array:
        """Float32 logits [B, S, V] of hidden states."""
        return softmax.logits(x_BSM, params["embedding"]["table"], self.layout)

    def losses(self, params: Params, x_BSM: Array, targets_BS: Array) -> tuple[Array, Array]:
        """-log p of every target and logsumexp of its logits, float32 [B, S] each."""
        return softmax.losses(x_BSM, params["embedding"]["table"], targets_BS, self.layout)

    def init_cache(self, batch: int, length: int) -> kv_cache.Cache:
        """An empty cache for `batch` rows of up to `length` tokens."""
        shape = (batch, length, self.model.num_heads, self.model.head_dim)
        axes = ("batch", None, "act_heads", None)
        if not self.apart:
            shape, axes = (self.num_blocks, *shape), ("layers", *axes)

        def empty(block: Params) -> Params:
            def zeros() -> Array:
                return self.layout.constrain(jnp.zeros(shape, self.dtype), *axes)

            return {name: {"key": zeros(), "value": zeros()} for name in block}

        blocks = self._blocks.shapes
        return {
            "layers": [empty(block) for block in blocks] if self.apart else empty(blocks),
            "segments": jnp.zeros((batch, length), jnp.int32),
            "length": jnp.zeros((batch,), jnp.int32),
        }

    def step(
        self,
        params: Params,
        state: kv_cache.Cache,
        tokens_BS: Array,
        segments_BS: Array | None = None,
        *,
        key: Array | None = None,
    ) -> tuple[Array, kv_cache.Cache]:
        """Hidden states [B, S, M], in the activation dtype, of S more tokens per row (a prompt is
        one big step), and the cache after them.

        Tokens of segment 0 are padding, on either side; without
        `segments_BS` every token is real and of segment 1. The caller keeps rows within the
        cache's length. Dropless unless the recipe's `moe.eval_dispatch` says otherwise, and then
        equal to `hidden` over the same tokens.
        """
        routing = self._routing(None, training=False, key=key)
        if segments_BS is None:
            segments_BS = jnp.ones(tokens_BS.shape, jnp.int32)
        start_B = state["length"]
        segments_BT = kv_cache.insert(state["segments"], segments_BS, start_B)

        def block(x_BSM: Array, part: tuple[Params, Any]) -> tuple[Array, Any]:
            params, cached = part
            past = kv_cache.Past(cached, segments_BT, start_B)
            x_BSM, _, new = self._blocks.bind(params)(x_BSM, segments_BS, routing, past)
            return x_BSM, new

        x_BSM = self._embed(params, tokens_BS)
        x_BSM = self.layout.constrain(x_BSM, "batch", "seq", "act_embed")
        x_BSM, new = self._over_blocks(block, x_BSM, params["blocks"], state["layers"])
        insert = kv_cache.insert
        if self.apart:  # one write per block, in its own buffer
            new = unstack(new, self.num_blocks)
        else:
            insert = jax.vmap(kv_cache.insert, in_axes=(0, 0, None))
        state = {
            "layers": jax.tree.map(lambda x, new: insert(x, new, start_B), state["layers"], new),
            "segments": segments_BT,
            "length": start_B + kv_cache.used_positions(segments_BS),
        }
        return self._finish(params, x_BSM), state

    def _over_blocks(
        self, block: Callable, x_BSM: Array, blocks: Any, others: Any
    ) -> tuple[Array, Any]:
        """What `jax.lax.scan` returns: the last x of block(x, (parameters, part of `others`)) run
        one after the other, and the rest of what they return, stacked. `others` may be a list."""
        if not self.apart:
            return jax.lax.scan(block, x_BSM, (blocks, others), unroll=self.is_shallow)
        returned = []
        others = others if isinstance(others, list) else unstack(others, self.num_blocks)
        for part in zip(blocks, others, strict=True):
            x_BSM, rest = block(x_BSM, part)
            returned.append(rest)
        return x_BSM, stack(returned)

    def _embed(self, params: Params, tokens_BS: Array) -> Array:
        x_BSM = self._parts["embedding"].bind(params["embedding"])(tokens_BS)
        return self.layout.constrain(x_BSM, "outer_batch", "seq", "act_embed")

    @jax.named_scope("final_norm")
    def _finish(self, params: Params, x_BSM: Array) -> Array:
        """Final norm and the output scale M^-1/2 of the tied embedding."""
        normed_BSM = self._parts["final_norm"].bind(params["final_norm"])(x_BSM)
        return normed_BSM * self.model.model_dim**-0.5

    def _routing(
        self, dispatch: Dispatch | None, *, training: bool, key: Array | None = None
    ) -> Routing:
        moe = self.moe
        if moe is None:
            return Routing("dropless", key)  # not used
        chosen = dispatch or (moe.dispatch if training else moe.eval_dispatch)
        if chosen == "auto":
            chosen = "einsum" if platform() == "tpu" else "gather"
        return Routing(chosen, key, self.capacity_factor if training else moe.eval_capacity_factor)

    def _rematerialised(self, block: Callable) -> Callable:
        """The scan's body with what the backward pass computes again (`train.remat`)."""
        saveable = jax.checkpoint_policies
        policies = {
            "full": None,
            "dots": saveable.dots_saveable,
            "projections": saveable.save_only_these_names(KEPT),
        }
        if self.remat not in policies:
            return block
        return jax.checkpoint(block, prevent_cse=self.is_shallow, policy=policies[self.remat])
