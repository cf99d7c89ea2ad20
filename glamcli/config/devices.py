"""Sections of a recipe about devices: the mesh, its sharding table, the pipeline."""

from typing import Literal

from glamcli.config.settings import Count, Settings

MeshAxis = Literal["slice", "stage", "data", "expert", "model"]
MeshAxes = tuple[MeshAxis, ...]


class Rules(Settings):
    """Which mesh axes each logical axis of an array is split over: the one sharding table.

    The defaults are the two-dimensional layout of GSPMD and GLaM. Every name is a dimension of
    weights or of activations (`act_`, `batch`, `seq`, `group`); [] keeps it whole.
    """

    layers: MeshAxes = ("stage",)
    """[L] layers, stacked."""
    vocab: MeshAxes = ("model",)
    """[V] rows of the embedding table."""
    embed: MeshAxes = ("data", "expert")
    """[M] of the embedding and of all weights outside experts."""
    heads: MeshAxes = ("model",)
    """[N] of attention weights and position biases."""
    head_dim: MeshAxes = ()
    """[D] of attention weights."""
    mlp: MeshAxes = ("model",)
    """[H] of dense feed-forward weights."""
    buckets: MeshAxes = ()
    """[R] of position biases."""
    expert: MeshAxes = ("expert",)
    """[E] of expert weights."""
    expert_embed: MeshAxes = ("data",)
    """[M] of expert weights."""
    expert_mlp: MeshAxes = ("model",)
    """[H] of expert weights: more than one device per expert."""
    batch: MeshAxes = ("slice", "data", "expert")
    """[B] rows."""
    seq: MeshAxes | None = None
    """[S] tokens of a row, in the residual stream and its norms; None: see `mesh.residual`."""
    act_embed: MeshAxes | None = None
    """[M] of the residual stream; None: see `mesh.residual`."""
    act_heads: MeshAxes = ("model",)
    """[N] of queries, keys and values."""
    act_mlp: MeshAxes = ("model",)
    """[H] inside dense feed-forward layers."""
    act_vocab: MeshAxes = ("model",)
    """[V] of logits."""
    outer_batch: MeshAxes | None = None
    """[B] rows outside the layers, at the embedding and the softmax, where the stages of a pipeline
    share the work; None: those of `batch`, then `stage`."""
    group: MeshAxes = ("slice", "data", "expert")
    """[G] groups of tokens, before they move to their experts and after."""
    expert_group: MeshAxes = ("slice", "data")
    """[G] while tokens are with their experts."""
    act_expert: MeshAxes = ("expert",)
    """[E] of tokens at their experts."""
    act_expert_embed: MeshAxes = ("model",)
    """[M] of tokens on their way to experts and back."""
    act_expert_mlp: MeshAxes = ("model",)
    """[H] inside experts."""


class Mesh(Settings):
    """Devices as a grid of named axes, and which dimensions are split over which of them.

    `mesh: auto` instead of a section chooses `data`, `expert` and `model` for the devices at hand.
    """

    auto: bool = False
    """what `mesh: auto` stands for: choose `data`, `expert` and `model` at the start, by memory."""
    slice: Count = 1
    stage: Count = 1
    data: Count | Literal["auto"] = "auto"
    """`auto`: all devices that the other axes leave over."""
    expert: Count = 1
    model: Count = 1
    residual: Literal["embed", "sequence", "whole"] = "embed"
    """what the residual stream and its norms are split over `model` by: the width (GSPMD, GLaM);
    tokens (Megatron's sequence parallelism); or nothing (Megatron's tensor parallelism, with
    all-reduces in the place of all-gathers and reduce-scatters)."""
    collective_matmul: Literal["auto", "off"] = "off"
    """TPU, in training: whether XLA may turn a product and its gather or scatter into a loop that
    sends one piece while it multiplies another (GSPMD's windowed einsum). `auto` leaves it to XLA,
    which also does so where pieces are thin and each of them rewrites the whole result."""
    expert_sums: Literal["float32", "bfloat16"] = "float32"
    """what experts that are split over `model` send of their outputs and of the gradients of their
    inputs, to be added up there. `bfloat16` halves these bytes, and rounds before adding, as dense
    layers do; it has no effect without a `model` axis."""
    rules: Rules = Rules()


class Pipeline(Settings):
    """How rows pass through stages of layers; only with `mesh.stage` above 1."""

    microbatches: Count | None = None
    """parts in which the rows of a step (or accumulated part) pass through the stages, a multiple
    of `mesh.stage`: the more, the less time is idle (`glam recipe show` says how much)."""
    repeats: Count = 1
    """how often a part passes through every stage (circular, interleaved); 1 is GPipe. Divides the
    idle time and multiplies the transfers. With `train.remat` `none` or `attention` the backward
    pass then keeps a copy of a stage's weights per part and repeat."""
