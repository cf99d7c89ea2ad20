"""Memory and time of a step by arithmetic alone: for GPUs, and to tell a search what to compile.

Much coarser than a compiled program. Letters as in `config/sizes.py`; t is the tokens a device
works on at once, m the size of the `model` axis. In a pipeline t is those of one microbatch, every
block of a stage runs once per tick, also where a tick's rows mean nothing, and every data shard has
a copy of its stage's weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from glamcli.config import stages
from glamcli.config.schema import Recipe
from glamcli.config.sizes import (
    capacity,
    flops_per_token,
    group_rows,
    num_blocks,
    num_moe_layers,
    tokens_per_step,
)
from glamcli.model.kernels import softmax
from glamcli.parallel.axes import Layout
from glamcli.parallel.pipeline import COPY_GRADIENTS, copied_over, num_parts
from glamcli.plan.memory import StateBytes
from glamcli.plan.network import Network

EFFICIENCY = 0.7
EFFICIENCY_LOST = 0.07
"""Share of the peak that matrix products reach, everything between them included: 0.7 over
1 + 0.07 m, because splitting the model cuts them into narrow pieces. Two compiled layouts of
64B/64E on TPU v4 gave 0.58 (m = 4) and 0.33 (m = 16)."""
RESERVED = 1.5
"""What compilers reserve for activations over what is alive at once; the same two gave 1.4, 1.6."""
MOVING = 5
"""Arrays of slots and of one-hot masks alive at once: programs of 0.1B/64E and 64B/64E gave 5.7 and
4.8 when one array of attention's logits is counted, as dense 0.1B gave."""
BF16 = 2
FLOAT32 = 4


@dataclass(frozen=True)
class Estimate:
    """One device's bytes by group, and the seconds of a step."""

    bytes: dict[str, int]
    compute_seconds: float
    network: dict[str, float]
    """seconds of sending, by what is sent."""
    flops: float
    """of all devices together."""

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    @property
    def seconds(self) -> float:
        """Computing and sending one after the other."""
        return self.compute_seconds + sum(self.network.values())


def estimate(recipe: Recipe, state: StateBytes, network: Network) -> Estimate:
    """The recipe on a mesh of the network's shape."""
    chip = network.target.chip
    assert chip is not None
    size = BF16 if recipe.model.activation_dtype == "bfloat16" else FLOAT32
    flops = _hardware_flops(recipe, network)
    devices = math.prod(network.shape.values())
    efficiency = EFFICIENCY / (1 + EFFICIENCY_LOST * network.shape["model"])
    compute = flops * chip.devices / (devices * chip.peak * efficiency)
    pipeline = stages.schedule(recipe)
    if pipeline is not None:
        compute /= 1 - pipeline.bubble_of_total
    sets = 1 + (recipe.batch.accumulate > 1)
    return Estimate(
        {
            "weights": state.weights,
            "optimizer state": state.optimizer,
            "gradients": sets * state.weights,
            "activations and temporaries": _activations(recipe, network.shape, size),
            "batch": state.batch,
        },
        compute,
        _network(recipe, network, size),
        flops,
    )


def _tokens(recipe: Recipe, shape: dict[str, int]) -> int:
    """[t] tokens that one device works on at once, shared with the others of its `model` axis."""
    shards = Layout.of(recipe.mesh).parts("batch", shape)
    microbatches = recipe.pipeline.microbatches or 1
    return tokens_per_step(recipe) // (shards * recipe.batch.accumulate * microbatches)


def _block_runs(recipe: Recipe) -> int:
    """How often a device runs a block in the forward pass of an accumulated part: once for each of
    its blocks, or with a pipeline for each of a repeat's blocks at each tick."""
    blocks = num_blocks(recipe)
    pipeline = stages.schedule(recipe)
    if pipeline is None:
        return blocks
    return blocks * pipeline.ticks // (pipeline.stages * pipeline.repeats)


def _held_blocks(recipe: Recipe) -> int:
    return num_blocks(recipe) // recipe.mesh.stage


def _copied_over(recipe: Recipe, shape: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes over which a pipeline's weights have copies."""
    pipeline, layout = stages.schedule(recipe), Layout.of(recipe.mesh)
    if pipeline is None:
        return ()
    rows = recipe.batch.rows // recipe.batch.accumulate
    together = group_rows(recipe.moe, recipe.batch.row_tokens)
    parts = num_parts(pipeline, layout, shape, rows, together)
    return copied_over(layout, shape, parts)


def _hardware_flops(recipe: Recipe, network: Network) -> float:
    """Matrix products of a step: three passes, one more where everything is recomputed, empty
    slots, and the one-hot products where TPUs dispatch by them."""
    flops, model, moe = flops_per_token(recipe), recipe.model, recipe.moe
    layers = flops.forward_padded - flops.logits
    if moe is not None and network.target.kind == "tpu" and moe.dispatch in ("auto", "einsum"):
        slots = moe.num_experts * capacity(moe)
        layers += num_moe_layers(recipe) * 4 * slots * model.model_dim
    passes = 3 + (recipe.train.remat == "full")
    return float(tokens_per_step(recipe)) * (passes * layers + 4 * flops.logits)


def _activations(recipe: Recipe, shape: dict[str, int], size: int) -> int:
    model, moe = recipe.model, recipe.moe
    t, m = _tokens(recipe, shape), shape["model"]
    M, H, S = model.model_dim, model.ffn_dim, recipe.batch.row_tokens
    split = 1 if recipe.mesh.residual == "whole" else m
    residual = t * M * size // split
    heads = t * model.num_heads * model.head_dim * size // m
    scores = t * S * model.num_heads * FLOAT32 // m
    dense = 3 * t * H * size // m
    saved = {"attention": 4 * heads + 2 * residual, "scores": 2 * scores, "ffn": dense}
    moving = 0
    if moe is not None:
        slots = t * moe.num_experts * capacity(moe) // moe.group_tokens
        masks = t * moe.num_experts * capacity(moe) * (size + FLOAT32)
        saved["experts"] = slots * (2 * M + H) * size // m
        moving = MOVING * (slots * M * (size + FLOAT32) + masks)
    keep = recipe.train.remat
    stacked = residual
    if keep == "none":
        stacked += sum(saved.values())
    elif keep == "attention":
        stacked += sum(saved.values()) - saved["scores"]
    elif keep == "dots":
        stacked += sum(saved.values()) + scores
    working = 2 * t * M * size + scores + 2 * dense + moving + _gathered(recipe, shape, size)
    chunks = min(t * model.vocab_size * FLOAT32 // m, softmax.CHUNK_BYTES)
    table = FLOAT32 * model.vocab_size * M // m
    copies = 0
    if recipe.mesh.stage > 1:
        inner = Layout.of(recipe.mesh).without(_copied_over(recipe, shape))
        dense, experts = _layer_weights(recipe, shape)
        dense, experts = (
            dense // inner.parts("embed", shape),
            experts // inner.parts("expert_embed", shape),
        )
        copies = _held_blocks(recipe) * (dense + experts) * (size + COPY_GRADIENTS)
    alive = _block_runs(recipe) * stacked + max(working, 3 * chunks + 2 * table)
    return int(copies + RESERVED * alive)


def _layer_weights(recipe: Recipe, shape: dict[str, int]) -> tuple[int, int]:
    """(dense, experts') weights of a block on a device once `data` and `expert` are gathered."""
    model, moe = recipe.model, recipe.moe
    M, H, m = model.model_dim, model.ffn_dim, shape["model"]
    attention = 4 * M * model.num_heads * model.head_dim
    if moe is None:
        return (attention + 3 * M * H) // m, 0
    return (2 * attention + 3 * M * H) // m, moe.num_experts * 2 * M * H // m // shape["expert"]


def _gathered(recipe: Recipe, shape: dict[str, int], size: int) -> int:
    """A block's gathered weights, and their gradients before they are scattered."""
    dense, experts = _layer_weights(recipe, shape)
    layout = Layout.of(recipe.mesh).without(_copied_over(recipe, shape))
    kept = 0 if layout.parts("expert_embed", shape) == 1 else experts * (size + FLOAT32)
    whole = layout.parts("embed", shape) == 1
    return kept + (0 if whole else dense * (size + FLOAT32) // 2)


def _network(recipe: Recipe, network: Network, size: int) -> dict[str, float]:
    shape, model, moe = network.shape, recipe.model, recipe.moe
    t, m = _tokens(recipe, shape), shape["model"]
    again = recipe.train.remat == "full"
    runs = _block_runs(recipe)
    parts = recipe.batch.accumulate

    def over(axes: tuple[str, ...], moved: float, exchange: bool = False) -> float:
        axes = tuple(axis for axis in axes if shape[axis] > 1)
        if not axes:
            return 0.0
        rate, latency, longest = network.rate(axes)
        n = math.prod(shape[axis] for axis in axes)
        return moved * (max((n - 1) / n, longest / 4) if exchange else (n - 1) / n) / rate + latency

    # Every layer gathers the residual stream and scatters what it adds, twice; once more where
    # it is computed again, and the other way round for gradients.
    passes = 2 + again
    layers = 2 if moe else 1
    wide = t * model.model_dim * size
    found = {"activations": runs * layers * 4 * passes * over(("model",), wide)}
    dense, experts = _layer_weights(recipe, shape)
    gathers = passes * size + FLOAT32  # weights in every pass, gradients once
    layout = Layout.of(recipe.mesh)

    copied = _copied_over(recipe, shape)

    def weights(axis: str, axes: tuple[str, ...], wide: int) -> float:
        """Gathered whenever a block runs, or whole everywhere and their gradients summed as often;
        over the axes of copies that is done once per step."""
        split = layout.split(axis)
        often = tuple(a for a in split or axes if a not in copied)
        once = tuple(a for a in split or axes if a in copied)
        passing = wide * gathers if split else 2 * wide * FLOAT32
        wide //= math.prod(shape[a] for a in often) if split else 1
        copying = wide * (size + FLOAT32) if split else 2 * wide * FLOAT32
        return runs * over(often, passing) + _held_blocks(recipe) * over(once, copying)

    found["dense weights"] = weights("embed", ("data", "expert"), dense)
    if moe is not None:
        found["experts' weights"] = weights("expert_embed", ("data",), experts)
        # The slots are gathered for the first product; the second's float32 sums are scattered.
        slots = t * moe.num_experts * capacity(moe) // moe.group_tokens * model.model_dim
        found["activations"] += runs * passes * over(("model",), slots * (size + FLOAT32))
        exchanged = over(("expert",), slots * size / m, exchange=True)
        found["tokens to experts"] = runs * 2 * passes * exchanged
    if shape["slice"] > 1:
        held = dense / layout.parts("embed", shape) + experts / layout.parts("expert_embed", shape)
        found["gradients between slices"] = (
            2 * _held_blocks(recipe) * over(("slice",), held * FLOAT32) / parts
        )
    return {name: parts * seconds for name, seconds in found.items() if seconds}
