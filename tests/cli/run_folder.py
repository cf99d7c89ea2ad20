"""A run folder as training leaves it, made in a second: random weights, bytes, a text corpus."""

import jax
import jax.numpy as jnp
import numpy as np

from glamcli.checkpoint import Checkpoints
from glamcli.config.load import load_recipe
from glamcli.data.open import open_data
from glamcli.model.decoder import Decoder
from glamcli.parallel.mesh import make_mesh
from glamcli.progress import Silent
from glamcli.train import identity
from glamcli.train.folder import write_run_files

WORDS = ["stone", "river", "light", "house", "green", "seven", "water", "paper"]
SETTINGS = (
    "batch.row_tokens=128",
    "model.activation_dtype=float32",
    "model.vocab_size=259",
    "runtime.compile_cache=false",
)


def make_run(folder, *more_settings):
    """The run folder; its checkpoint is of step 3."""
    corpus = folder / "corpus.txt"
    documents = [
        " ".join(WORDS[(i * 5 + j * j * (i + 3) + j // 7) % 8] for j in range(120))
        for i in range(30)
    ]
    corpus.write_text("\n\n".join(documents))
    (folder / "mixture.yaml").write_text(
        "sources:\n"
        "  words: {kind: text, path: corpus.txt, separator: blank_line, weight: 1}\n"
        "heldout_frac: 0.5\n"
    )
    sets = [*SETTINGS, f"data.mixture={folder / 'mixture.yaml'}", f"data.cache_dir={folder}/cache"]
    recipe = load_recipe("test-tiny", [*sets, *more_settings]).recipe
    dataset = open_data(recipe, Silent())
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(0, 0.2, shape.shape), jnp.float32),
        Decoder(recipe.model, recipe.moe).shapes,
    )
    num_devices = recipe.mesh.slice * recipe.mesh.stage * recipe.mesh.expert * recipe.mesh.model
    mesh = make_mesh(recipe.mesh, jax.devices()[:num_devices])
    run_identity = identity.identity(recipe, dataset, mesh)
    run = folder / "runs" / "words"
    checkpoints = Checkpoints(run / "checkpoints")
    checkpoints.save(3, {"params": params}, identity.at_step(run_identity, dataset, 3))
    checkpoints.close()
    write_run_files(run, recipe, run_identity, dataset.tokenizer)
    return run
