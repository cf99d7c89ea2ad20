"""Every setting of a run, typed, frozen and documented: the schema of a recipe.

The descriptions below are the reference documentation: they become the JSON Schema that
editors complete from. Rules between fields are in `check.py`, reading files is in `load.py`.
Letters in brackets are the letters of array axes (`model/__init__.py`).
"""

from typing import Annotated, Literal

from pydantic import Field

from glamcli.config.capacity import AdaptiveCapacity
from glamcli.config.devices import Mesh, Pipeline
from glamcli.config.guard import Guard
from glamcli.config.run import RunSettings
from glamcli.config.runtime import Runtime
from glamcli.config.settings import (
    MAX_NEW_TOKENS,
    Count,
    CountOrZero,
    Fraction,
    NotNegative,
    Positive,
    Prose,
    Settings,
    StepSpan,
)


class Model(Settings):
    """The transformer."""

    num_layers: Count
    """[L] Transformer layers; with experts they come in pairs (expert layer, dense layer)."""
    model_dim: Count
    """[M] width of the residual stream."""
    ffn_dim: Count
    """[H] width of every feed-forward layer, dense or expert."""
    num_heads: Count
    """[N] attention heads."""
    head_dim: Count
    """[D] width of a head; N x D need not equal M (64B/64E has 2M)."""
    vocab_size: Count
    """[V] rows of the embedding table; the tokenizer may use fewer."""
    activation_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """dtype of activations and matrix products; weights are always kept in float32."""
    attention_scale: Literal["folded", "sqrt"] = "folded"
    """`folded`: 1/sqrt(D) is part of the query initialisation (the reference code); `sqrt`:
    queries are divided by sqrt(D) at run time. Never both."""
    attention: Literal["auto", "xla", "pallas"] = "xla"
    """what computes softmax-weighted sums: `xla`, which forms all logits; `pallas`, a kernel that
    never does, on TPUs (elsewhere, and in generation, XLA does); `auto`: the kernel for rows that
    fit it (docs/parallelism.md). `xla` until the kernel, so far only compiled, has run on a TPU."""
    zero_logit: bool = True
    """add a logit of 0.0 to every attention softmax, so that a head may attend to nothing."""
    position_buckets: Count = 32
    """[R] buckets of the relative position bias (T5 style, one-directional, per layer)."""
    position_max_distance: Count = 128
    """distances from this one on share the last bucket."""
    norm_epsilon: Positive = 1e-6
    """added to the mean square in RMS normalisation."""


class Moe(Settings):
    """The expert layers: routing, capacity, and the losses that balance experts."""

    num_experts: Count
    """[E] experts in every second layer."""
    experts_per_token: Literal[1, 2] = 2
    """[K] 2 as in GLaM; 1 is Switch."""
    capacity_factor: Positive = 2.0
    """slots per expert and group: int(S x factor / E), up to a multiple of 4 (GShard counts both
    choices in the factor). The paper does not state it; the reference code uses 2.0."""
    adaptive_capacity: AdaptiveCapacity | None = None
    """train with lower factors while they drop little enough; None always has the one above."""
    group_tokens: Count = 1024
    """[S] tokens routed together. Capacity and order are per group, so results depend on it, and
    it never depends on the number of devices."""
    expert_activation: Literal["relu", "gelu"] = "relu"
    """the paper does not say; the reference code uses relu, Expert Choice gelu."""
    second_policy: Literal["all", "random", "sampling"] = "all"
    """which second choices are kept: all; at random with probability
    min(1, weight / second_threshold); or `sampling`: the second expert itself is drawn (Gumbel)."""
    second_threshold: Positive = 0.5
    """for `random`: second choices whose gate is at least this are always kept."""
    second_gate: Literal["normalized", "raw"] = "normalized"
    """for `random`: the gate compared with the threshold, the second choice's share of both
    choices' probability, or its `raw` probability, as the reference code does where gates are
    normalised after drops."""
    normalize: Literal["before_capacity", "after_drop"] = "before_capacity"
    """when the two gate weights are scaled to sum to one: before slots are given out, never again
    (the reference default), or after, over the surviving choices."""
    balance_padding: Literal["legacy", "corrected"] = "corrected"
    """`legacy` leaves padded tokens in the denominator of the balance loss, so padding lowers it;
    `corrected` divides by the real tokens."""
    balance_coef: NotNegative = 0.01
    """weight of the load balance loss (GLaM section 5)."""
    balance_over_layers: Literal["sum", "mean"] = "sum"
    """how the balance losses of the expert layers are combined (reference code: sum)."""
    router_z_coef: NotNegative = 0.0
    """weight of mean(logsumexp(router logits)^2)."""
    dispatch: Literal["auto", "einsum", "gather", "dropless"] = "auto"
    """how tokens reach experts in training: `einsum` (one-hot GSEC products), `gather` (indices,
    same capacity and same results), `dropless` (no capacity). `auto`: gather on CPU and GPU,
    einsum on TPU."""
    eval_dispatch: Literal["einsum", "gather", "dropless"] = "dropless"
    """the same for scoring and generation; with dropping, a likelihood is not causal."""
    eval_capacity_factor: Positive | None = None
    """capacity factor of scoring and generation where `eval_dispatch` drops; None: as training."""
    dropless_experts: Literal["loop", "pallas"] = "loop"
    """how the experts of a dropless layer run their blocks of rows: `loop` (XLA, on any device), or
    `pallas`, kernels for TPUs; elsewhere, and for widths that are not multiples of 128, the loop.
    The loop is the default because no TPU has run the kernels yet."""


class Batch(Settings):
    """What one optimizer step sees."""

    rows: Count
    """[B] rows per optimizer step, over all devices and accumulated parts."""
    row_tokens: Count
    """tokens per row."""
    accumulate: Count = 1
    """parts that a step is split into to save memory; their gradients are summed exactly."""


class Optimizer(Settings):
    """How weights change, and the learning rate over the steps."""

    name: Literal["adafactor", "adamw"] = "adafactor"
    learning_rate: Positive = 0.01
    """constant for `hold_steps`, then learning_rate x sqrt(hold_steps / step) (GLaM section 5)."""
    hold_steps: Count = 10_000
    """steps at the full rate before the inverse square root decay."""
    warmup_steps: CountOrZero = 0
    """linear rise from zero; the paper uses none."""
    clip_update_rms: Positive | None = 1.0
    """adafactor: a parameter's update is scaled down to this root mean square."""
    clip_grad_norm: Positive | None = None
    """scale the whole gradient down to this norm; the paper uses none."""
    decay_exponent: Positive = 0.8
    """adafactor: second-moment decay is 1 - step^-exponent."""
    scale_by_parameter: bool = True
    """adafactor: multiply updates by the parameter's root mean square (floor 1e-3)."""
    factored_min_dim: Count = 128
    """adafactor: factor the second moment when the second largest dimension has this size."""
    factor_heads: Literal["merged", "separate"] = "merged"
    """adafactor, attention's q, k, v and out: `merged` factors over M and N x D, as the published
    configurations store them; `separate` over the two largest of M, N and D."""
    beta1: Fraction = 0.0
    """momentum; 0 keeps none (GLaM). adamw users want 0.9."""
    beta2: Fraction = 0.99
    """adamw: second-moment decay."""
    weight_decay: NotNegative = 0.0
    """adamw: decoupled weight decay."""


class Loss(Settings):
    """What is minimised beside the balance losses."""

    z_coef: NotNegative = 1e-4
    """weight of logsumexp(logits)^2 per target."""
    denominator: Literal["targets", "positions"] = "targets"
    """divide the summed loss by real targets, or by every position of the batch, padding
    included (the reference code's default)."""


class Train(Settings):
    """How long training goes on, and what it keeps in memory."""

    steps: Count
    """batches of the whole run, consumed or left out by a rewind."""
    remat: Literal["none", "attention", "dots", "projections", "full"] = "full"
    """what the backward pass recomputes in each layer pair: nothing; attention's scores and
    softmax; all but matrix products, whose results are kept (of attention too); all but
    attention's queries, keys, values and weighted sums; everything."""
    max_bad_steps: Count = 10
    """stop after this many steps in a row whose update was skipped: not finite, or a spike."""


class Every(Settings):
    """How often things happen, in steps, or at which; None means never."""

    log_steps: Count = 10
    heldout_steps: Count | None = 1000
    eval_steps: Count | None = None
    """how often the tasks of `eval` are scored; a failure is reported and training goes on."""
    checkpoint_steps: Count | None = 1000
    profile_steps: StepSpan | None = None
    """`FIRST:LAST`: trace these steps into `RUN/profile`, once (`glam train --profile`)."""


class HeldoutSettings(Settings):
    """How much of the held-out documents is scored."""

    rows: Count = 64
    """held-out rows scored per source, at most."""


class CheckpointSettings(Settings):
    """Which checkpoints stay."""

    keep: Count = 3
    """newest good checkpoints kept (1 keeps 2: one may turn out damaged); the newest stays as well
    while updates are refused."""
    retry_seconds: NotNegative = 1800.0
    """one process: how long a save that fails is tried again, after 5 seconds, 15, 60 and then
    every 120, before the run ends; 0 ends it at the first failure."""


NUM_BYTE_IDS = 259
"""ids of the `bytes` tokenizer: three special ones and 256 bytes."""


class TokenizerSettings(Settings):
    """How text becomes tokens."""

    kind: Literal["sentencepiece", "bytes"] = "sentencepiece"
    path: str | None = None
    """a SentencePiece model file; None trains one on the mixture (`glam tokenizer train`)."""
    train_vocab_size: Count | None = None
    """pieces of a tokenizer trained on the mixture; None means model.vocab_size."""


class Data(Settings):
    """What the model is trained on."""

    mixture: str
    """a mixture by name, or a path relative to the recipe."""
    tokenizer: TokenizerSettings = TokenizerSettings()
    packing: Literal["fill", "whole"] = "fill"
    """`fill`: rows are filled to the last token and long documents continue in the next row;
    `whole`: a document that fits into a row is never split, the rest of the row is padding."""
    cache_dir: str | None = None
    """folder of tokenizers and prepared rows; None is the user's cache folder. Behind a URL, they
    are made once, and every machine copies them to the user's cache folder."""
    prepare_processes: CountOrZero = 0
    """processes that tokenise and pack; 0 means one per core."""


class PlanSettings(Settings):
    """What `glam plan` plans for."""

    target: str | None = None
    """devices that the mesh is meant for, as `glam plan --target` names them."""


class Eval(Settings):
    """What `every.eval_steps` scores."""

    suite: str = "quick"
    """evaluation suite or task, by name or path."""
    shots: tuple[CountOrZero, ...] = (0,)
    limit: Count = 50
    """items of each task, from its first on."""


class Finish(Settings):
    """What `glam train` does with a finished model."""

    suite: str | None = None
    """evaluation suite, by name or path."""
    shots: tuple[CountOrZero, ...] = (0, 1, 5)
    prompt: str | None = None
    """text to continue."""
    sample_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] = 96
    """tokens of that continuation, at most."""


class Recipe(Settings):
    """A whole run. A file holds what differs from its parent (`extends`)."""

    about: Prose = ""
    """one line for `glam recipe list`."""
    notes: tuple[Prose, ...] = ()
    """what a reader of `glam recipe show` should know."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """for everything random: weights, order of rows, drawn second experts."""
    model: Model
    moe: Moe | None = None
    """None is a dense model: every feed-forward layer is gated."""
    batch: Batch
    optimizer: Optimizer = Optimizer()
    loss: Loss = Loss()
    train: Train
    guard: Guard = Guard()
    run: RunSettings = RunSettings()
    every: Every = Every()
    heldout: HeldoutSettings = HeldoutSettings()
    eval: Eval = Eval()
    checkpoints: CheckpointSettings = CheckpointSettings()
    data: Data
    mesh: Mesh = Mesh()
    pipeline: Pipeline = Pipeline()
    plan: PlanSettings = PlanSettings()
    runtime: Runtime = Runtime()
    finish: Finish = Finish()
