"""Times the common workload in MaxText 0.2.5 (JAX), with experts of fixed capacity.

    python3.12 -m venv VENV && VENV/bin/pip install --no-deps maxtext==0.2.5
    VENV/bin/pip install "jax[cpu]==0.12.0.1" flax==0.12.12 optax==0.2.8 orbax-checkpoint==0.12.8 \
        qwix==0.1.8 aqtp==0.9.0 tokamax==0.0.15 pathwaysutils==0.1.13 drjax==0.2.1 grain==0.2.18 \
        transformers==5.24.0 omegaconf pydantic jinja2 psutil pillow ml_collections sentencepiece \
        sympy tiktoken      # what its training code imports, of the many packages of its extras
    VENV/bin/python benchmarks/rival_maxtext.py --experts 8 64

Its `envy` decoder has the workload's shape: every second layer is of experts, with no shared
expert; the experts are gated (three matrices) and the positions rotary. Tokens go to the experts
by one-hot products (`sparse_matmul=false`), each row of tokens a group of its own. MaxText counts
its capacity factor per choice: its 1.0 has the slots of a capacity factor of 2.0 over tokens.
The step is MaxText's own `train_step`, without logs or checkpoints. Fused projections and `minimal`
rematerialization (it keeps the products) were the fastest settings of those tried.

Prints one row per setting; `train_step.py --rival maxtext=PYTHON` times it in turns with
glam, which is the comparison to trust.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import TextIO

from turns import peak_bytes, take_turns

ROWS, ROW_TOKENS, VOCAB = 8, 256, 8192


def settings(num_experts: int, dtype: str, optimizer: str, options: argparse.Namespace) -> dict:
    return {
        "run_name": "rival",
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "decoder_block": "envy",
        "interleave_moe_layer_step": 2,
        "inhomogeneous_layer_cycle_interval": 2,
        "base_num_decoder_layers": 4,
        "base_emb_dim": 256,
        "base_mlp_dim": 1024,
        "base_moe_mlp_dim": 1024,
        "base_num_query_heads": 8,
        "base_num_kv_heads": 8,
        "head_dim": 32,
        "vocab_size": VOCAB,
        "logits_via_embedding": True,
        "num_experts": num_experts,
        "num_experts_per_tok": 2,
        "capacity_factor": options.capacity_factor,
        "sparse_matmul": False,
        "megablox": False,
        "load_balance_loss_weight": 0.01,
        "attention": "dot_product",
        "fused_qkv": True,
        "fused_mlp": True,
        "scan_layers": False,
        "remat_policy": options.remat,
        "dtype": dtype,
        "weight_dtype": dtype,
        "opt_type": optimizer,
        "learning_rate": 1e-3,
        "warmup_steps_fraction": 0.0,
        "gradient_clipping_threshold": 0.0,
        "steps": 100_000,
        "dataset_type": "synthetic",
        "per_device_batch_size": ROWS,
        "max_target_length": ROW_TOKENS,
        "enable_checkpointing": False,
        "log_config": False,
        "jax_cache_dir": "",
    }


def make_step(values: dict) -> tuple[Callable[[], float], dict]:
    """Returns a function that takes one step and times it, and a dict with what it last told."""
    import jax
    from flax import nnx
    from flax.core.spmd import logical_axis_rules
    from maxtext.configs import pyconfig
    from maxtext.trainers.pre_train.train import train_step
    from maxtext.utils import sharding, train_utils
    from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR

    config = pyconfig.initialize(["", os.path.join(MAXTEXT_CONFIGS_DIR, "base.yml")], **values)
    made = train_utils.setup_train_loop(config, recorder=None)
    shardings, mesh, batches, state = made[2], made[4], made[6], made[10]
    graph, state = nnx.split(state)
    parameters = jax.tree.leaves(nnx.state(nnx.merge(graph, state).model, nnx.Param))
    parameter_shardings, shardings = sharding.maybe_update_params_sharding_with_opt(
        config, shardings
    )
    compiled, _ = train_utils.jit_train_and_eval_step(
        config, graph, mesh, state, shardings, train_step, params_shardings=parameter_shardings
    )
    batch = next(batches)
    told = {"parameters": sum(leaf.size for leaf in parameters), "losses": []}

    def step() -> float:
        nonlocal state
        start = time.perf_counter()
        with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
            state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
        seconds = time.perf_counter() - start
        told["losses"].append(float(metrics["scalar"]["learning/loss"]))
        return seconds

    return step, told


def main(out: TextIO) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--optimizers", nargs="+", default=["adamw"])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--capacity-factor", type=float, default=1.0, help="as MaxText counts it")
    parser.add_argument("--remat", default="minimal", help="none keeps every activation")
    parser.add_argument("--turns", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE"}
    for num_experts, dtype, optimizer in itertools.product(
        options.experts, options.dtypes, options.optimizers
    ):
        step, told = make_step(settings(num_experts, dtype, optimizer, options))
        first = step()
        if options.turns:
            # The workload's own useful work: the third matrix of these experts is their choice.
            summary = {"useful_flops": 90.2e9, "compile_seconds": first}
            take_turns(step, options.steps, lambda summary=summary: summary, out)
            continue
        seconds = [step() for _ in range(options.steps + 1)][1:]
        print(
            f"maxtext E={num_experts:<4d} {dtype:9s} {optimizer:10s} "
            f"{statistics.median(seconds):7.3f} s/step  first {first:5.1f} s  "
            f"peak {peak_bytes() / 2**30:4.1f} GB  {told['parameters'] / 1e6:.2f} M parameters  "
            f"loss {told['losses'][0]:.3f} to {told['losses'][-1]:.3f}",
            file=out,
            flush=True,
        )


with contextlib.redirect_stdout(sys.stderr):  # MaxText's own prints
    main(sys.__stdout__)
