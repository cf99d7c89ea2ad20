"""How rows pass through the stages of a pipeline: the schedule's arithmetic, and what is refused.

The schedule itself runs in `parallel/pipeline.py`. This file needs no jax.
"""

import math
from dataclasses import dataclass

from glamcli.config.nearest import Found, divisors, multiples, use
from glamcli.config.schema import Recipe
from glamcli.config.sharding import known_sizes, num_shards, table
from glamcli.config.sizes import num_blocks


@dataclass(frozen=True)
class PipelineSchedule:
    """How microbatches pass through the stages of a pipeline.

    One tick is a stage's share of the layers over one microbatch. Each stage has
    microbatches x repeats of them to do and waits stages - 1 more while the pipeline fills and
    empties (GPipe, arXiv 1811.06965; interleaved: Megatron-LM, arXiv 2104.04473, section 2.2).
    """

    stages: int
    microbatches: int
    repeats: int

    @property
    def ticks(self) -> int:
        """Ticks of a whole pass."""
        return self.microbatches * self.repeats + self.stages - 1

    @property
    def bubble_of_total(self) -> float:
        """Unused share of the pass's time: (stages - 1) / ticks."""
        return (self.stages - 1) / self.ticks

    @property
    def bubble_of_ideal(self) -> float:
        """Unused time over the time without any, Megatron-LM's convention."""
        return (self.stages - 1) / (self.microbatches * self.repeats)


def schedule(recipe: Recipe) -> PipelineSchedule | None:
    """The recipe's pipeline; None with one stage."""
    stages, pipeline = recipe.mesh.stage, recipe.pipeline
    if stages == 1 or pipeline.microbatches is None:
        return None
    return PipelineSchedule(stages, pipeline.microbatches, pipeline.repeats)


def wrong(recipe: Recipe) -> Found:
    """(key, what, hint) of everything that a pipeline cannot do."""
    stages, pipeline = recipe.mesh.stage, recipe.pipeline
    if stages == 1:
        for name in pipeline.model_dump(exclude_defaults=True):
            key = f"pipeline.{name}"
            what = f"`{key}` has no effect with one stage (`mesh.stage` 1)"
            yield key, what, "remove it, or raise `mesh.stage`"
        return
    if not table(recipe.mesh).layers:
        what = f"`mesh.stage` is {stages}, but `mesh.rules.layers` keeps all layers on each"
        yield "mesh.rules.layers", what, "use [stage]"
    if pipeline.microbatches is None:
        yield (
            "mesh.stage",
            f"`mesh.stage` is {stages}, which needs `pipeline.microbatches`",
            _microbatches(recipe),
        )
    elif pipeline.microbatches % stages:
        yield (
            "pipeline.microbatches",
            f"microbatches pass through the stages in turns of `mesh.stage` {stages}, but "
            f"`pipeline.microbatches` is {pipeline.microbatches}",
            multiples(pipeline.microbatches, stages),
        )
    blocks = num_blocks(recipe)
    if blocks % stages == 0 and blocks % (stages * pipeline.repeats):
        each = blocks // stages
        pairs = " (in pairs)" if recipe.moe else ""
        near = [size for size in divisors(each) if size < pipeline.repeats]
        more = [size for size in divisors(each) if size > pipeline.repeats]
        yield (
            "pipeline.repeats",
            f"a stage has {each} layers{pairs}, which do not divide over `pipeline.repeats` "
            f"{pipeline.repeats}",
            use(*near[-1:], *more[:1]),
        )


def _microbatches(recipe: Recipe) -> str:
    """Advice: a number that divides what there is, near four per stage, which leaves less than a
    fifth of the time unused."""
    batch, stages, moe = recipe.batch, recipe.mesh.stage, recipe.moe
    parts = batch.accumulate * num_shards(recipe, known_sizes(recipe.mesh))
    group = 1 if moe is None else moe.group_tokens
    fit = [
        size
        for size in (divisors(batch.rows // parts) if batch.rows % parts == 0 else ())
        if size % stages == 0
        and batch.rows // batch.accumulate // size * batch.row_tokens % group == 0
    ]
    if fit:
        return f"for example {min(fit, key=lambda size: abs(size - 4 * stages))}"
    need = math.lcm(parts, batch.accumulate * -(-group // batch.row_tokens)) * stages
    return f"for example {stages}, with `batch.rows` {-(-batch.rows // need) * need}"
