"""A slice that `glam plan` knows, in the words of Google Cloud."""

from glamcli.config.chips import Chip
from glamcli.errors import PlanError
from glamcli.plan.topology import Target

# The software of a slice's machines for programs that bring their own jax
# (cloud.google.com/tpu/docs/runtimes).
_IMAGES = {
    **dict.fromkeys(("v2", "v3", "v4"), "tpu-ubuntu2204-base"),
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}


# Chips of the largest slice that one machine has; larger ones have machines of 4.
_ONE_HOST = {"v2": 4, "v3": 4, "v5e": 8, "v6e": 8}


def slice_of(target: Target) -> tuple[Target, Chip]:
    """The target and its kind of chip. Raises: PlanError when it is not one TPU slice."""
    if target.kind != "tpu" or target.chip is None:
        raise PlanError(f"`{target.name}` is no TPU slice", "for example `--tpu v4-32`")
    if target.num_slices > 1:
        raise PlanError(
            f"`{target.name}` is {target.num_slices} slices, and one is launched at a time",
            "a launcher of your own, such as Kubernetes, starts several; docs/hosts.md",
        )
    return target, target.chip


def chips_of_host(target: Target) -> int:
    """Chips of each machine of the slice."""
    target, chip = slice_of(target)
    return target.num_chips if chip.torus == 2 and target.num_chips <= _ONE_HOST[chip.name] else 4


def accelerator_type(target: Target) -> str:
    """What gcloud calls the slice: `v5litepod-64` for v5e-64."""
    target, chip = slice_of(target)
    name = chip.also[0] if chip.also else chip.name
    return f"{name}-{target.num_chips * chip.names_per_chip}"


def image_of(target: Target) -> str:
    """The runtime version of its machines.

    Raises: PlanError where Google offers the kind in Kubernetes only.
    """
    target, chip = slice_of(target)
    if chip.name not in _IMAGES:
        raise PlanError(
            f"Google offers {chip.name} in Kubernetes only",
            "`--write gke` writes a job for it",
        )
    return _IMAGES[chip.name]
