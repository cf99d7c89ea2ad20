"""One training step on one device and on every kind of mesh: what differs, and by how much.

A recipe is made small without changing its structure, run in float32 from the same state on the
same batch, and compared: loss, balance loss, every gradient, every updated parameter. Called by
`glam doctor parity` and by the tests, on simulated devices.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from glamcli.config import schema
from glamcli.config.schema import Recipe
from glamcli.config.settings import Settings
from glamcli.model.decoder import Decoder
from glamcli.named_leaves import named_leaves
from glamcli.parallel.mesh import make_mesh
from glamcli.train import programs
from glamcli.train.state import State, init_state, state_shardings
from glamcli.train.step import gradient, make_train_step, update

LIMIT = 1e-5
"""The largest relative error that float32 sums in another order may make."""

NUM_DEVICES = 8
NUM_SOURCES = 2
DISPATCHES = ("einsum", "gather", "dropless")

CIRCULAR: dict[str, Any] = {"stage": 2, "microbatches": 4, "repeats": 2}
WHOLE_WEIGHTS = {"embed": (), "expert_embed": ()}
FOLDED = {  # experts and their tokens over the model axis as well; an expert is on one device
    "group": ("slice", "data", "expert", "model"),
    "expert": ("expert", "model"),
    "act_expert": ("expert", "model"),
    "expert_mlp": (),
    "act_expert_mlp": (),
    "act_expert_embed": (),
}


@dataclass(frozen=True)
class Case:
    """A way to lay a model over eight devices."""

    name: str
    mesh: schema.Mesh
    pipeline: schema.Pipeline


def _case(
    name: str,
    residual: str = "embed",
    rules: Mapping[str, Any] = {},
    microbatches: int | None = None,
    repeats: int = 1,
    **sizes: int,
) -> Case:
    mesh = {"data": 1, "residual": residual, "rules": rules, **sizes}
    pipeline = schema.Pipeline(microbatches=microbatches, repeats=repeats)
    return Case(name, schema.Mesh.model_validate(mesh), pipeline)


ONE_DEVICE = _case("one device")

CASES = (
    _case("data parallel", data=8, rules=WHOLE_WEIGHTS),
    _case("fully sharded", data=8),
    _case("expert parallel", expert=8, rules=WHOLE_WEIGHTS),
    _case("experts, weights sharded", expert=8),
    _case("several experts per device", data=2, expert=4),
    _case("tensor parallel", model=8, residual="whole"),
    _case("tensor parallel, width split", model=8),
    _case("sequence parallel", model=8, residual="sequence"),
    _case("data x tensor", data=4, model=2, residual="whole", rules=WHOLE_WEIGHTS),
    _case("sharded data x sequence", data=2, model=4, residual="sequence"),
    _case("GLaM 2D", expert=4, model=2),
    _case("several devices per expert", expert=2, model=4),
    _case("experts x sequence", expert=4, model=2, residual="sequence"),
    _case("data x expert x tensor", data=2, expert=2, model=2),
    _case("data x expert x sequence", data=2, expert=2, model=2, residual="sequence"),
    _case("experts folded over tensor", expert=2, model=4, rules=FOLDED),
    _case("slices x data", slice=2, data=4),
    _case("slices x expert x tensor", slice=2, expert=2, model=2),
    _case("stages x data", stage=2, data=4, microbatches=4),
    _case("stages x expert x tensor", stage=2, expert=2, model=2, microbatches=4),
    _case("stages, circular", data=2, expert=2, **CIRCULAR),
    _case("stages x expert x sequence, circular", "sequence", expert=2, model=2, **CIRCULAR),
    _case("four stages x tensor", stage=4, model=2, residual="whole", microbatches=8),
    _case("slices x stages x data", slice=2, stage=2, data=2, microbatches=4),
)


_Settings = TypeVar("_Settings", bound=Settings)
_Values = tuple[Mapping[str, Any], ...]
"""Loss, balance loss, gradients and updated parameters, each by name."""


@dataclass(frozen=True)
class Difference:
    """Largest relative errors of one mesh against one device."""

    name: str
    mesh: dict[str, int]
    dispatch: str
    loss: float
    balance_loss: float
    gradient: float
    worst_gradient: str
    """the parameter whose gradient differs most."""
    parameters: float
    worst_parameter: str
    seconds: float

    @property
    def error(self) -> float:
        """The largest of all; NaN if any is."""
        return float(np.max([self.loss, self.balance_loss, self.gradient, self.parameters]))

    @property
    def equal(self) -> bool:
        return self.error <= LIMIT


def small(recipe: Recipe) -> Recipe:
    """The recipe with little of everything: same structure, same switches, float32."""
    moe, batch, row_tokens = recipe.moe, recipe.batch, 16
    if moe is not None:
        rows_per_group = min(2, max(1, moe.group_tokens // batch.row_tokens))
        groups_per_row = min(2, max(1, batch.row_tokens // moe.group_tokens))
        group_tokens = row_tokens * rows_per_group // groups_per_row
        moe = _with(moe, num_experts=NUM_DEVICES, group_tokens=group_tokens)
    num_layers = 2 if Decoder(recipe.model).is_shallow else 8
    sizes = {"model_dim": 32, "ffn_dim": 64, "num_heads": NUM_DEVICES, "head_dim": 8}
    sizes |= {"num_layers": num_layers, "vocab_size": 128}
    model = _with(recipe.model, activation_dtype="float32", **sizes)
    accumulate = min(2, batch.accumulate)
    rows = 2 * NUM_DEVICES * accumulate
    batch = schema.Batch(rows=rows, row_tokens=row_tokens, accumulate=accumulate)
    # So small a width is factored where the recipe's own would be.
    optimizer = _with(recipe.optimizer, factored_min_dim=min(16, recipe.optimizer.factored_min_dim))
    return _with(recipe, model=model, moe=moe, batch=batch, optimizer=optimizer)


def _with(settings: _Settings, **changes: Any) -> _Settings:
    return settings.model_copy(update=changes)


def dispatches(recipe: Recipe) -> tuple[str, ...]:
    """Every way to reach the experts; one without a name for a dense model."""
    return ("",) if recipe.moe is None else DISPATCHES


class Parity:
    """Compares the small version of a recipe on meshes with itself on one device."""

    def __init__(self, recipe: Recipe):
        self.recipe = small(recipe)
        self._alone = make_mesh(ONE_DEVICE.mesh, jax.devices()[:1])
        self._expected: dict[tuple[str, int], _Values] = {}
        self._starts: dict[int, State] = {}
        self._updates: dict[tuple[str, int], Callable[..., State]] = {}

    def differences(self, cases: tuple[Case, ...] = CASES) -> Iterator[Difference]:
        """Every case with every dispatch, one after the other."""
        for case in cases:
            for dispatch in dispatches(self.recipe):
                yield self.difference(case, dispatch)

    def difference(self, case: Case, dispatch: str) -> Difference:
        """One mesh against one device, with this way to reach the experts."""
        start = time.monotonic()
        mesh = make_mesh(case.mesh, jax.devices()[:NUM_DEVICES])
        # Deeper where each stage must have a layer for every repeat.
        deep = 2 * case.mesh.stage * case.pipeline.repeats
        key = (dispatch, max(self.recipe.model.num_layers, deep))
        if key not in self._expected:
            self._expected[key] = self._values(ONE_DEVICE, self._alone, *key)
        pairs = zip(self._values(case, mesh, *key), self._expected[key], strict=True)
        (loss, _), (balance, _), gradient, parameter = (_worst(*pair) for pair in pairs)
        sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
        seconds = time.monotonic() - start
        return Difference(case.name, sizes, dispatch, loss, balance, *gradient, *parameter, seconds)

    def _variant(self, dispatch: str, num_layers: int, case: Case) -> Recipe:
        """The recipe with so many layers on this mesh."""
        model = _with(self.recipe.model, num_layers=num_layers)
        moe = self.recipe.moe and _with(self.recipe.moe, dispatch=dispatch)
        return _with(self.recipe, model=model, moe=moe, mesh=case.mesh, pipeline=case.pipeline)

    def _start(self, num_layers: int) -> State:
        """A state after one step, where no second moment is zero any more."""
        if num_layers not in self._starts:
            recipe = self._variant(dispatches(self.recipe)[0], num_layers, ONE_DEVICE)
            decoder = _decoder(recipe, self._alone)
            state = init_state(decoder, recipe.optimizer, recipe.seed, self._alone)
            with jax.set_mesh(self._alone):
                run = jax.jit(make_train_step(decoder, recipe, NUM_SOURCES))
                self._starts[num_layers] = jax.device_get(run(state, _batch(recipe, 0))[0])
        return self._starts[num_layers]

    def _values(self, case: Case, mesh: Mesh, dispatch: str, num_layers: int) -> _Values:
        """What one step makes, on the host."""
        recipe = self._variant(dispatch, num_layers, case)
        decoder = _decoder(recipe, mesh)
        where = state_shardings(decoder, recipe.optimizer, mesh)
        layout = programs.abstract_batch(recipe, mesh, recipe.batch.rows)
        start, batch = self._start(num_layers), _batch(recipe, 1)
        differentiate = jax.jit(
            lambda *args: gradient(decoder, recipe, NUM_SOURCES, *args),
            out_shardings=(where.params, None),
        )
        # Compiled once for every dispatch, for it has no part in the update.
        apply = self._updates.setdefault(
            (case.name, num_layers),
            jax.jit(lambda *args: update(decoder, recipe, *args)[0], out_shardings=where),
        )
        with jax.set_mesh(mesh):
            state = jax.device_put(start, where)
            batch = {name: jax.device_put(x, layout[name].sharding) for name, x in batch.items()}
            grads, sums = differentiate(state, batch)
            after = apply(state, grads, sums["loss"])
            after, grads, sums = jax.device_get((after, grads, sums))
        balance = np.sum(sums["routing"]["balance_loss"]) if sums["routing"] else 0.0
        return {"": sums["loss"]}, {"": balance}, _flat(grads), _flat(after.params)


def _decoder(recipe: Recipe, mesh: Mesh) -> Decoder:
    """Stacked on one device as well, so that parameters have the same names everywhere."""
    return replace(programs.make_decoder(recipe, mesh.shape), apart=False)


def _batch(recipe: Recipe, seed: int) -> dict[str, np.ndarray]:
    """Random rows of two documents each, some of them padded."""
    rng = np.random.default_rng(seed)
    B, S = recipe.batch.rows, recipe.batch.row_tokens
    position_1S = np.arange(S)[None, :]
    second_B1 = rng.integers(1, S, (B, 1))
    end_B1 = np.where(rng.random((B, 1)) < 0.5, S, rng.integers(S // 2, S, (B, 1)))
    segments_BS = np.where(position_1S < second_B1, 1, 2) * (position_1S < end_B1)
    tokens, targets = rng.integers(0, recipe.model.vocab_size, (2, B, S), dtype=np.int32)
    return {
        "tokens": tokens,
        "targets": targets,
        "segments": segments_BS.astype(np.int32),
        "source": rng.integers(0, NUM_SOURCES, B, dtype=np.int32),
    }


def _flat(tree: Any) -> dict[str, np.ndarray]:
    return {name.replace("/", "."): np.asarray(x) for name, x in named_leaves(tree).items()}


def _worst(found: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[float, str]:
    """The largest relative error, and whose it is."""
    errors = {name: _relative(found[name], expected[name]) for name in expected}
    name = max(errors, key=lambda each: (np.isnan(errors[each]), errors[each]))
    return errors[name], name


def _relative(found: Any, expected: Any) -> float:
    """|found - expected| / |expected|, as vectors; 0 where both vanish."""
    distance = np.linalg.norm(np.ravel(np.asarray(found, np.float64) - expected))
    norm = np.linalg.norm(np.ravel(expected))
    return float(distance / norm if norm else distance)
