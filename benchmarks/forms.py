"""The forms that experts and attention are computed in, for `accelerator.py`.

Each is a function of a dtype that returns results and gradients on the same numbers. `reference` is
meant to be run in float32 at the highest precision of products.
"""

from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp

from glamcli.config.schema import Model, Moe
from glamcli.model.experts import MoeLayer, Routing
from glamcli.model.kernels.attention import attend
from glamcli.model.kernels.flash_attention import flash_attention
from glamcli.model.params import blueprint
from glamcli.model.position import RelativeBias


def expert_forms(tiny: bool) -> dict[str, Callable]:
    """dtype -> output and gradients of a layer with room for every token, in every form."""
    M, H, E, tokens = (128, 256, 4, 64) if tiny else (512, 1024, 8, 2048)
    model = Model(num_layers=2, model_dim=M, ffn_dim=H, num_heads=1, head_dim=8, vocab_size=8)

    def form(dispatch: str, **settings: str) -> Callable:
        moe = Moe(num_experts=E, capacity_factor=E, group_tokens=tokens, **settings)
        plan = blueprint(lambda rngs: MoeLayer(rngs, model, moe))
        params = jax.jit(plan.init)(jax.random.key(0))

        def loss(params, x_BSM):
            y_BSM, _ = plan.bind(params)(x_BSM, jnp.ones(x_BSM.shape[:2], bool), Routing(dispatch))
            pull_BSM = jax.random.normal(jax.random.key(2), y_BSM.shape)
            return jnp.sum(y_BSM.astype(jnp.float32) * pull_BSM), y_BSM

        def run(dtype):
            # Numbers that both dtypes can hold, so that both choose the same experts.
            x_BSM = jax.random.normal(jax.random.key(1), (1, tokens, M), "bfloat16").astype(dtype)
            run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
            (_, y_BSM), (d_params, d_x_BSM) = run(params, x_BSM)
            return [y_BSM, d_x_BSM, d_params["w_in"], d_params["w_out"]]

        return run

    kinds = get_args(Moe.model_fields["dropless_experts"].annotation)
    return {
        "reference": form("dropless", dropless_experts="loop"),
        "gather": form("gather"),
        "einsum": form("einsum"),
        **{f"dropless, {kind}": form("dropless", dropless_experts=kind) for kind in kinds},
    }


def attention_forms(tiny: bool, rows: int = 2) -> dict[str, Callable]:
    """dtype -> sums of values and gradients of queries, keys, values and biases, in every form."""
    N, S, D = (2, 256, 64) if tiny else (16, 1024, 128)
    bias = blueprint(lambda rngs: RelativeBias(rngs, N, 32, 128))
    params = jax.jit(bias.init)(jax.random.key(0))
    segments_BS = jnp.broadcast_to(jnp.where(jnp.arange(S) > S // 3, 2, 1), (rows, S))
    same_BSS = segments_BS[:, :, None] == segments_BS[:, None, :]
    mask_BSS = same_BSS & jnp.tril(jnp.ones((S, S), bool))[None]
    on_cpu = jax.default_backend() == "cpu"

    def xla(params, *qkv):
        bias_1NSS = bias.bind(params).of(params["table"][None], S, S)
        return attend(*qkv, bias_1NSS, mask_BSS, zero_logit=True)

    def pallas(params, *qkv):
        band_1Nw = bias.bind(params).band(params["table"][None], 128)
        return flash_attention(*qkv, band_1Nw, segments_BS, zero_logit=True)

    def cudnn(params, *qkv):
        """Without the zero logit, which cuDNN does not have."""
        bias_1NSS = bias.bind(params).of(params["table"][None], S, S).astype(qkv[0].dtype)
        options = {"bias": bias_1NSS, "mask": mask_BSS[:, None], "scale": 1.0}
        return jax.nn.dot_product_attention(*qkv, **options, implementation="cudnn")

    def form(core: Callable) -> Callable:
        def loss(params, q, k, v):
            a_BSND = core(params, q, k, v).astype(jnp.float32)
            return jnp.sum(a_BSND * jax.random.normal(jax.random.key(2), a_BSND.shape)), a_BSND

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))

        def run(dtype):
            keys = jax.random.split(jax.random.key(1), 3)
            q, k, v = (jax.random.normal(key, (rows, S, N, D), "bfloat16") for key in keys)
            q, k, v = (a.astype(dtype) for a in (q * D**-0.5, k, v))
            (_, a_BSND), (d_params, *d_qkv) = step(params, q, k, v)
            return [a_BSND, d_params["table"], *d_qkv]

        return run

    forms = {"reference": form(xla), "xla": form(xla)}
    if jax.default_backend() == "tpu" or (on_cpu and tiny):
        forms["pallas"] = form(pallas)
    if jax.default_backend() == "gpu":
        forms["cudnn, no zero logit"] = form(cudnn)
    return forms
