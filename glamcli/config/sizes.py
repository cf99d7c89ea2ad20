"""Parameters and FLOPs of a recipe, by arithmetic alone (GLaM section 4 and Table 4).

There are no biases. A token uses K of E experts; everything else counts fully as active. Letters
as in `model/__init__.py`.
"""

from dataclasses import astuple, dataclass

from glamcli.config.schema import Model, Moe, Recipe

FLASH_HEADS = {64: 2, 128: 1}  # widths, and how many heads a TPU's registers hold side by side
FLASH_BLOCKS = (256, 128, 512)  # by preference
MAX_FLASH_TOKENS = 2048  # keys and values of a row are in a TPU's fast memory whole
MIN_CAPACITY = 4  # slots; also the multiple that capacities are rounded up to


@dataclass(frozen=True)
class Sizes:
    """Parameters by kind. `experts` are all of them, `active_experts` those of one token."""

    embedding: int
    attention: int
    dense_ffn: int
    experts: int
    active_experts: int
    router: int
    norms: int
    position_bias: int

    @property
    def total(self) -> int:
        return self.active - self.active_experts + self.experts

    @property
    def active(self) -> int:
        """Parameters that one token uses (n_act-params of GLaM Table 4)."""
        return sum(astuple(self)) - self.experts


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token; a multiplication and an addition are two.

    `weights` is 2 x the matrices a token passes in the layers, `scores` the attention scores and
    sums, `logits` the product with the embedding. `experts` is the part of `weights` that experts
    have, `experts_padded` what their capacity slots cost, filled or not.
    """

    weights: int
    scores: int
    logits: int
    experts: int
    experts_padded: int

    @property
    def forward(self) -> int:
        """Useful operations of one pass."""
        return self.weights + self.scores + self.logits

    @property
    def training(self) -> int:
        """Useful operations of a step: the backward pass takes twice the forward pass."""
        return 3 * self.forward

    @property
    def forward_padded(self) -> int:
        """One pass with every capacity slot computed."""
        return self.forward - self.experts + self.experts_padded

    @property
    def training_padded(self) -> int:
        return 3 * self.forward_padded


def num_blocks(recipe: Recipe) -> int:
    """What stages are made of: layers, or pairs of layers when there are experts."""
    return recipe.model.num_layers // (1 if recipe.moe is None else 2)


def num_moe_layers(recipe: Recipe) -> int:
    """Expert layers: every second one, or none (GLaM section 4)."""
    return 0 if recipe.moe is None else recipe.model.num_layers // 2


def count(recipe: Recipe) -> Sizes:
    """Parameters of the recipe's model, equal to the built model's."""
    model, moe = recipe.model, recipe.moe
    M, H, L = model.model_dim, model.ffn_dim, model.num_layers
    N, D = model.num_heads, model.head_dim
    expert_layers = num_moe_layers(recipe)
    E, K = (moe.num_experts, moe.experts_per_token) if moe else (0, 0)
    return Sizes(
        embedding=model.vocab_size * M,  # tied with the softmax, counted once
        attention=L * 4 * M * N * D,
        dense_ffn=(L - expert_layers) * 3 * M * H,  # gated: three matrices
        experts=expert_layers * E * 2 * M * H,  # not gated: two
        active_experts=expert_layers * K * 2 * M * H,
        router=expert_layers * M * E,
        norms=(2 * L + 1) * M,  # scale only
        position_bias=L * N * model.position_buckets,
    )


def flops_per_token(recipe: Recipe) -> Flops:
    """Operations per token of a full row of one document.

    Under the causal mask (row_tokens + 1) / 2 positions are attended on average. A padded expert
    layer computes E x C slots for every S tokens instead of K for each. Norms, the softmax and
    moving tokens to experts are not counted.
    """
    model, moe, sizes = recipe.model, recipe.moe, count(recipe)
    per_expert = 4 * model.model_dim * model.ffn_dim
    padded = 0
    if moe is not None:
        slots = moe.num_experts * capacity(moe)
        padded = num_moe_layers(recipe) * per_expert * slots // moe.group_tokens
    matrices = sizes.attention + sizes.dense_ffn + sizes.active_experts + sizes.router
    attended = recipe.batch.row_tokens + 1
    return Flops(
        weights=2 * matrices,
        scores=2 * model.num_layers * model.num_heads * model.head_dim * attended,
        logits=2 * model.model_dim * model.vocab_size,
        experts=2 * sizes.active_experts,
        experts_padded=padded,
    )


def group_rows(moe: Moe | None, row_tokens: int) -> int:
    """Rows that belong together in routing: as many as a group fills."""
    return 1 if moe is None else max(1, moe.group_tokens // row_tokens)


def capacity(moe: Moe) -> int:
    """[C] slots per expert in each of the recipe's groups."""
    return slots_per_expert(moe.group_tokens, moe.num_experts, moe.capacity_factor)


def capacity_factors(moe: Moe) -> tuple[float, ...]:
    """The capacity factors that training may use, ascending."""
    lower = () if moe.adaptive_capacity is None else moe.adaptive_capacity.lower_factors
    return (*sorted(lower), moe.capacity_factor)


def slots_per_expert(group_tokens: int, num_experts: int, factor: float) -> int:
    """[C] slots per expert and group: int(S x factor / E), up to a multiple of 4, at least 4."""
    slots = int(group_tokens * factor / num_experts)
    return max(MIN_CAPACITY, -(-slots // MIN_CAPACITY) * MIN_CAPACITY)


def flash_block(model: Model, row_tokens: int, num_heads: int) -> int | None:
    """Tokens of a block of the Pallas kernel of attention; None for rows that it cannot take.

    It takes heads of 128 or, in pairs, 64, and rows of whole blocks; all distances beyond a block
    must share one bias. `num_heads` are a device's. 256 comes first: by the schedules compiled
    for TPU v4 it needs 0.6 of the time that 128 does, and 512 has more masked pairs.
    """
    if model.head_dim not in FLASH_HEADS or num_heads % FLASH_HEADS[model.head_dim]:
        return None
    if row_tokens > MAX_FLASH_TOKENS:
        return None
    fitting = (b for b in FLASH_BLOCKS if row_tokens % b == 0)
    return next((b for b in fitting if model.position_max_distance <= b), None)


def tokens_total(recipe: Recipe) -> int:
    """Tokens of the whole run, padding included."""
    return recipe.train.steps * tokens_per_step(recipe)


def tokens_per_step(recipe: Recipe) -> int:
    """Tokens of a step's batch, padding included."""
    return recipe.batch.rows * recipe.batch.row_tokens


def short(number: float) -> str:
    """A number with three digits and a letter: 1.16T, 96.6B, 47.5K."""
    for letter, size in (("P", 1e15), ("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        # 999.9K rounds to 1,000K, so the next letter begins a little earlier.
        if abs(number) >= size * 0.9995:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def bytes_text(held: float) -> str:
    """Bytes as `4.29 GiB`."""
    for unit, of in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if held >= 0.9995 * of:
            return f"{held / of:,.2f} {unit}"
    return f"{held:,.0f} B"
