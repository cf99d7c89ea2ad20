"""The sharding table of a recipe, `mesh.rules`."""

from __future__ import annotations

from typing import Literal

from glamcli.config.settings import Settings

MeshAxis = Literal["slice", "stage", "data", "expert", "model"]
Split = tuple[MeshAxis, ...]


class Rules(Settings):
    """Which mesh axes each logical axis of an array is split over: the one sharding table.

    The defaults are the two-dimensional layout of GSPMD and GLaM. Every name is a dimension of
    weights or of activations (`act_`, `batch`, `seq`, `group`); [] keeps it whole.
    """

    layers: Split = ("stage",)
    """[L] layers, stacked."""
    vocab: Split = ("model",)
    """[V] rows of the embedding table."""
    embed: Split = ("data", "expert")
    """[M] of the embedding and of all weights outside experts."""
    heads: Split = ("model",)
    """[N] of attention weights and position biases."""
    head_dim: Split = ()
    """[D] of attention weights."""
    mlp: Split = ("model",)
    """[H] of dense feed-forward weights."""
    buckets: Split = ()
    """[R] of position biases."""
    expert: Split = ("expert",)
    """[E] of expert weights."""
    expert_embed: Split = ("data",)
    """[M] of expert weights."""
    expert_mlp: Split = ("model",)
    """[H] of expert weights: more than one device per expert."""
    batch: Split = ("slice", "data", "expert")
    """[B] rows."""
    seq: Split | None = None
    """[S] tokens of a row, in the residual stream and its norms; None: see `mesh.residual`."""
    act_embed: Split | None = None
    """[M] of the residual stream; None: see `mesh.residual`."""
    act_heads: Split = ("model",)
    """[N] of queries, keys and values."""
    act_mlp: Split = ("model",)
    """[H] inside dense feed-forward layers."""
    act_vocab: Split = ("model",)
    """[V] of logits."""
    outer_batch: Split | None = None
    """[B] rows outside the layers, at the embedding and the softmax, where the stages of a pipeline
    share the work; None: those of `batch`, then `stage`."""
    group: Split = ("slice", "data", "expert")
    """[G] groups of tokens, before they move to their experts and after."""
    expert_group: Split = ("slice", "data")
    """[G] while tokens are with their experts."""
    act_expert: Split = ("expert",)
    """[E] of tokens at their experts."""
    act_expert_embed: Split = ("model",)
    """[M] of tokens on their way to experts and back."""
    act_expert_mlp: Split = ("model",)
    """[H] inside experts."""
