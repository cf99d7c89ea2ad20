"""Memory and time of a step by arithmetic alone: for GPUs, and to rank what a search compiles.

Much coarser than a compiled program (docs/decisions/0006). Letters as in `model/__init__.py`; t is
the tokens a device works on at once, m the size of the `model` axis. In a pipeline t is those of
one microbatch, and every block of a stage runs once per tick, also where a tick's rows mean
nothing.
"""

import math
from dataclasses import dataclass

from glamcli.config.schema import Recipe
from glamcli.config.sizes import (
    capacity,
    count,
    flops_per_token,
    num_blocks,
    num_moe_layers,
    tokens_per_step,
)
from glamcli.config.stages import PipelineSchedule, schedule
from glamcli.model.kernels import softmax
from glamcli.parallel.axes import Layout
from glamcli.parallel.pipeline import COPY_GRADIENTS
from glamcli.plan.memory import StateBytes
from glamcli.plan.network import Network
from glamcli.plan.schedule import Time

EFFICIENCY = 0.55
"""Share of the peak that all operations of a step reach: 58 % of a TPU v4 for PaLM (arXiv
2204.02311), 52 % of an A100 for Megatron-LM (arXiv 2104.04473)."""
BF16 = 2
FLOAT32 = 4


@dataclass(frozen=True)
class Estimate:
    """One device's bytes by group, and the time of a step."""

    bytes: dict[str, int]
    time: Time
    """computing and sending one after the other, by what is sent."""
    flops: float
    """of all devices together."""

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())


def estimate(recipe: Recipe, state: StateBytes, network: Network) -> Estimate:
    """The recipe on a mesh of the network's shape."""
    chip = network.chip
    size = BF16 if recipe.model.activation_dtype == "bfloat16" else FLOAT32
    flops = _hardware_flops(recipe, network)
    compute = flops * chip.devices / (math.prod(network.shape.values()) * chip.peak * EFFICIENCY)
    compute /= 1 - _pipeline(recipe).bubble_of_total
    groups = {
        "weights": state.weights,
        "optimizer state": state.optimizer,
        "gradients": (1 + (recipe.batch.accumulate > 1)) * state.weights,
        "activations and temporaries": _activations(recipe, network.shape, size),
        "batch": state.batch,
    }
    return Estimate(groups, Time(compute, _network(recipe, network, size)), flops)


def _tokens(recipe: Recipe, shape: dict[str, int]) -> int:
    """[t] tokens that one device works on at once, shared with the others of its `model` axis."""
    shards = Layout.of(recipe.mesh).parts("batch", shape)
    parts = recipe.batch.accumulate * _pipeline(recipe).microbatches
    return tokens_per_step(recipe) // (shards * parts)


def _pipeline(recipe: Recipe) -> PipelineSchedule:
    """The recipe's pipeline; one stage that is all of the model where it has none."""
    return schedule(recipe) or PipelineSchedule(stages=1, microbatches=1, repeats=1)


def _block_runs(recipe: Recipe) -> int:
    """How often a device runs a block in the forward pass of an accumulated part: for each of a
    repeat's blocks at each tick."""
    pipeline = _pipeline(recipe)
    return num_blocks(recipe) * pipeline.ticks // (pipeline.stages * pipeline.repeats)


def _once_per_step(recipe: Recipe) -> tuple[str, ...]:
    """The mesh axes over which a pipeline has copies of its weights, gathered once per step."""
    return Layout.of(recipe.mesh).data_axes if recipe.mesh.stage > 1 else ()


def _hardware_flops(recipe: Recipe, network: Network) -> float:
    """Matrix products of a step: three passes, what is recomputed, empty slots, and the one-hot
    products where TPUs dispatch by them."""
    flops, model, moe = flops_per_token(recipe), recipe.model, recipe.moe
    layers = flops.forward_padded - flops.logits
    if moe is not None and network.target.kind == "tpu" and moe.dispatch in ("auto", "einsum"):
        slots = moe.num_experts * capacity(moe)
        layers += num_moe_layers(recipe) * 4 * slots * model.model_dim
    of_attention = 2 * count(recipe).attention * 3 // 4 + flops.scores
    again = {"full": layers, "projections": layers - of_attention}.get(recipe.train.remat, 0)
    return float(tokens_per_step(recipe)) * (3 * layers + again + 4 * flops.logits)


def _activations(recipe: Recipe, shape: dict[str, int], size: int) -> int:
    """What every block keeps for the backward pass, and twice the values of one block: themselves
    and their gradients."""
    model, moe, remat = recipe.model, recipe.moe, recipe.train.remat
    t, m = _tokens(recipe, shape), shape["model"]
    M, H, S = model.model_dim, model.ffn_dim, recipe.batch.row_tokens
    residual = t * M * size // (1 if recipe.mesh.residual == "whole" else m)
    scores = 2 * t * S * model.num_heads * FLOAT32 // m
    projections = 4 * t * model.num_heads * model.head_dim * size // m
    block = projections + 2 * residual
    block += 3 * t * H * size // m
    masks = 0
    if moe is not None:
        slots = t * moe.num_experts * capacity(moe) // moe.group_tokens
        block += slots * (2 * M + H) * size // m
        masks = t * moe.num_experts * capacity(moe) * (size + FLOAT32) + 2 * slots * M * FLOAT32
    saved = {"none": block + scores, "attention": block, "dots": block + scores // 2}
    saved |= {"projections": projections * model.num_layers // num_blocks(recipe), "full": 0}
    layout = Layout.of(recipe.mesh)
    dense, experts = _layer_weights(recipe, shape)
    gathered = (layout.parts("embed", shape) > 1) * dense
    gathered += (layout.parts("expert_embed", shape) > 1) * experts
    working = 2 * (t * M * size + block + scores + masks) + gathered * (size + FLOAT32)
    chunks = min(t * model.vocab_size * FLOAT32 // m, softmax.CHUNK_BYTES)
    copies = 0
    if recipe.mesh.stage > 1:
        inner = layout.without(_once_per_step(recipe))
        held = dense // inner.parts("embed", shape) + experts // inner.parts("expert_embed", shape)
        copies = num_blocks(recipe) // recipe.mesh.stage * held * (size + COPY_GRADIENTS)
    kept = _block_runs(recipe) * (residual + saved[remat])
    table = FLOAT32 * model.vocab_size * M // m
    return int(copies + kept + max(working, 3 * chunks + 2 * table))


def _layer_weights(recipe: Recipe, shape: dict[str, int]) -> tuple[int, int]:
    """(dense, experts') weights of a block on a device once `data` and `expert` are gathered."""
    model, moe = recipe.model, recipe.moe
    M, H, m = model.model_dim, model.ffn_dim, shape["model"]
    attention = 4 * M * model.num_heads * model.head_dim
    if moe is None:
        return (attention + 3 * M * H) // m, 0
    return (2 * attention + 3 * M * H) // m, moe.num_experts * 2 * M * H // m // shape["expert"]


def _network(recipe: Recipe, network: Network, size: int) -> dict[str, float]:
    shape, model, moe = network.shape, recipe.model, recipe.moe
    t, m = _tokens(recipe, shape), shape["model"]
    runs, parts = _block_runs(recipe), recipe.batch.accumulate
    passes = 2 + (recipe.train.remat in ("full", "projections"))
    layout, copied = Layout.of(recipe.mesh), _once_per_step(recipe)

    def over(axes: tuple[str, ...], moved: float, exchange: bool = False) -> float:
        axes = tuple(axis for axis in axes if shape[axis] > 1)
        if not axes:
            return 0.0
        rate, latency, longest = network.rate(axes)
        n = math.prod(shape[axis] for axis in axes)
        return moved * (max((n - 1) / n, longest / 4) if exchange else (n - 1) / n) / rate + latency

    def weights(axis: str, whole_over: tuple[str, ...], held: int) -> float:
        """Gathered in every pass and their gradients scattered once, or whole everywhere and their
        gradients summed; over the axes of a pipeline's copies once per step."""
        split = layout.split(axis)
        often = tuple(a for a in split or whole_over if a not in copied)
        once = tuple(a for a in split or whole_over if a in copied)
        moved = held * (passes * size + FLOAT32) if split else 2 * held * FLOAT32
        held //= math.prod(shape[a] for a in often) if split else 1
        copying = held * (size + FLOAT32) if split else 2 * held * FLOAT32
        blocks = num_blocks(recipe) // recipe.mesh.stage
        return runs * over(often, moved) + blocks * over(once, copying)

    # Every layer gathers the residual stream and scatters what it adds, twice; once more where
    # it is computed again, and the other way round for gradients.
    wide = t * model.model_dim * size
    dense, experts = _layer_weights(recipe, shape)
    found = {
        "activations": runs * (2 if moe else 1) * 4 * passes * over(("model",), wide),
        "dense weights": weights("embed", ("data", "expert"), dense),
    }
    if moe is not None:
        found["experts' weights"] = weights("expert_embed", ("data",), experts)
        # The slots are gathered for the first product; the second's float32 sums are scattered.
        slots = t * moe.num_experts * capacity(moe) // moe.group_tokens * model.model_dim
        found["activations"] += runs * passes * over(("model",), slots * (size + FLOAT32))
        exchanged = over(("expert",), slots * size / m, exchange=True)
        found["tokens to experts"] = runs * 2 * passes * exchanged
    if shape["slice"] > 1:
        held = dense / layout.parts("embed", shape) + experts / layout.parts("expert_embed", shape)
        between = over(("slice",), held * FLOAT32) / parts
        found["gradients between slices"] = 2 * num_blocks(recipe) // recipe.mesh.stage * between
    return {name: parts * seconds for name, seconds in found.items() if seconds}
