"""Jobs for other schedulers: each is taken by what reads such files, and does what it says."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from kubeflow_trainer_api.models import jobset_v1alpha2_job_set as jobsets
from ruamel.yaml import YAML
from simple_slurm import Slurm

from glamcli.launch.decisions import FINAL_CODES

HERE = Path(__file__).parent
SLICE = ("--tpu", "v4-32", "--zone", "us-central2-b", "--project", "my-project")
# The fields of a task and of its resources by the schema of skypilot 0.14.1 (sky/utils/schemas.py)
# that are used; the whole package is too large to be asked for here.
SKY_TASK = {"name": str, "resources": dict, "file_mounts": dict, "setup": str, "run": str}
SKY_RESOURCES = {
    "infra": str,
    "accelerators": str,
    "accelerator_args": dict,
    "use_spot": bool,
    "job_recovery": dict,
}


@pytest.fixture
def written(glam, tmp_path, monkeypatch):
    """The text of the file that is written, and its folder."""
    monkeypatch.chdir(tmp_path)

    def written(kind: str, *words: str, run: str = "/mnt/shared/moe") -> tuple[str, Path]:
        words = (*words, "--set", "batch.rows=64", "--run", run, "--write", kind)
        code, out, err = glam("launch", "test-tiny", *words)
        assert code == 0, err
        path = re.match("wrote (.*) and what it sends; read it, then `cd glam-moe && ", out)[1]
        return Path(path).read_text(), tmp_path / "glam-moe"

    return written


def fits(values: dict, fields: dict) -> None:
    assert {key: type(value) for key, value in values.items()} == {
        key: fields[key] for key in values
    }


def test_a_task_of_skypilot_rents_the_slice_and_starts_again_by_exit_code(written):
    text, folder = written("sky", *SLICE, "--spot")
    task = YAML(typ="safe", pure=True).load(text)
    fits(task, SKY_TASK)
    fits(task["resources"], SKY_RESOURCES)
    assert task["resources"]["infra"] == "gcp/us-central2/us-central2-b"
    assert task["resources"]["accelerators"] == "tpu-v4-32:1"
    assert task["resources"]["use_spot"] is True
    recovery = task["resources"]["job_recovery"]
    assert {75, 86, 134} <= set(recovery["recover_on_exit_codes"])
    assert not FINAL_CODES & set(recovery["recover_on_exit_codes"])
    ((there, here),) = task["file_mounts"].items()
    assert (folder / here / "worker.py").is_file()
    for command in (task["setup"], task["run"]):
        python, worker, what = shlex.split(command)
        assert (python, worker) == ("python3", f"{there}/worker.py")
        assert f'"{what}": _{what},' in (folder / here / "worker.py").read_text()


TOPOLOGIES = {
    "v4-32": ("tpu-v4-podslice", "2x2x4", 4, 4),
    "v5e-32": ("tpu-v5-lite-podslice", "4x8", 8, 4),
    "v5e-8": ("tpu-v5-lite-podslice", "2x4", 1, 8),
    "v5p-32": ("tpu-v5p-slice", "2x2x4", 4, 4),
    "v6e-4": ("tpu-v6e-slice", "2x2", 1, 4),
    "tpu7x-16": ("tpu7x", "2x2x2", 2, 4),
}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_jobset_is_one_of_kubernetes_for_the_pods_of_the_slice(written, name):
    accelerator, topology, hosts, chips = TOPOLOGIES[name]
    text, _ = written("gke", "--tpu", name, *SLICE[2:])
    values = YAML(typ="safe", pure=True).load(text)
    jobset = jobsets.JobsetV1alpha2JobSet.from_dict(values)
    known = json.loads(jobset.to_json())
    assert known == values, "the models know every key"
    (workers,) = jobset.spec.replicated_jobs
    job = workers.template.spec
    assert (job.parallelism, job.completions, job.backoff_limit) == (hosts, hosts, 0)
    (rule,) = job.pod_failure_policy.rules
    assert (rule.action, rule.on_exit_codes.operator) == ("FailJob", "In")
    assert rule.on_exit_codes.values == sorted(FINAL_CODES)
    assert not {75, 86, 134} & set(rule.on_exit_codes.values)
    pod = job.template.spec
    assert pod.restart_policy == "Never", "Kubernetes asks for it where there is such a policy"
    assert pod.node_selector == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    (container,) = pod.containers
    assert rule.on_exit_codes.container_name == container.name
    assert values["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ][0]["resources"] == {"limits": {"google.com/tpu": chips}}
    assert container.command[-2:] == ["--run", "/mnt/shared/moe"]
    assert container.volume_mounts[0].mount_path == "/mnt/shared"
    assert "gke-spot" not in text


def test_pods_need_no_volume_for_a_run_in_a_bucket_but_a_right_to_it(written):
    text, folder = written("gke", *SLICE, run="gs://bucket/moe")
    values = YAML(typ="safe", pure=True).load(text)
    assert json.loads(jobsets.JobsetV1alpha2JobSet.from_dict(values).to_json()) == values
    pod = values["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert ("volumes" in pod, pod["serviceAccountName"]) == (False, "glam")
    assert pod["containers"][0]["command"][-1] == "gs://bucket/moe"
    assert "fetch" not in json.loads((folder / "package" / "package.json").read_text())


def test_an_image_holds_glam_and_the_recipe_and_no_secret(written):
    text, folder = written("gke", *SLICE, "--spot")
    assert 'cloud.google.com/gke-spot: "true"' in text
    package = folder / "package"
    assert f"FROM python:{sys.version_info.major}." in (package / "Dockerfile").read_text()
    assert "[tpu,remote]" in (package / "Dockerfile").read_text()
    sent = {path.name for path in package.iterdir()}
    ignored = set((package / ".dockerignore").read_text().split())
    assert ignored < sent
    left = [path for path in package.iterdir() if path.name not in ignored]
    secret = json.loads((package / "package.json").read_text())["secret"]
    assert not [path for path in left if secret.encode() in path.read_bytes()]
    assert {"recipe.yaml", "mixture.yaml", "constraints.txt"} < {path.name for path in left}


def test_a_job_of_slurm_has_options_that_sbatch_takes(written):
    text, folder = written("slurm", "--nodes", "4", "--gpus", "8")
    lines = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH ")]
    for line in lines:
        key, _, value = line.removeprefix("--").partition("=")
        Slurm(key.replace("-", "_"), value or True)  # argparse ends with an error
    assert {"--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8"} < set(lines)
    package = json.loads((folder / "package" / "package.json").read_text())
    assert package["extras"] == "gpu,remote"


@pytest.mark.parametrize(
    ("ends", "code", "starts", "requeued"),
    [
        (["0 0 5"], 0, 1, False),
        (["86 134 5", "134 134 6", "75 75 7"], 75, 3, True),
        (["134 134 5", "4 4 6"], 4, 2, False),
        (["134 134 5", *["134 134 5"] * 9], 134, 4, False),
    ],
)
def test_a_job_of_slurm_starts_again_by_exit_code(
    written, tmp_path, monkeypatch, ends, code, starts, requeued
):
    """With an `srun` that starts the command twice here, and a `scontrol` that writes down."""
    _, folder = written("slurm", "--nodes", "2", run=str(tmp_path / "moe"))
    assert subprocess.run(["bash", "-n", folder / "job.sbatch"]).returncode == 0
    (tmp_path / "ends").write_text("".join(f"{line}\n" for line in ends))
    tools = tmp_path / "bin"
    tools.mkdir()
    each = 'OMPI_COMM_WORLD_RANK=$rank python3 "${@: -2}" || code=$(($? > code ? $? : code))'
    ranks = '[[ $* == *--ntasks=1* ]] && ranks=0 || ranks="0 1"'
    srun = f"code=0; {ranks}; for rank in $ranks; do {each}; done; exit $code"
    uv = f'exec {sys.executable} -SE {HERE / "fake_uv.py"} "$@"'
    for name, script in (
        ("srun", srun),
        ("scontrol", 'echo "$@" >> $FAKE_CLOUD/scontrol'),
        ("sleep", ""),
        ("uv", uv),
    ):
        (tools / name).write_text(f"#!/bin/bash\n{script}\n")
        (tools / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "FAKE_CLOUD": str(tmp_path),
        "FAKE_GLAM": str(HERE / "fake_glam.sh"),
        "SLURM_JOB_ID": "17",
    }
    done = subprocess.run(["bash", folder / "job.sbatch"], env=environment, timeout=100)
    assert done.returncode == code
    assert len((tmp_path / "starts-1").read_text().splitlines()) == starts
    assert (tmp_path / "scontrol").exists() is requeued


REFUSED = {
    "--nodes is for `--write slurm`": ["sky", *SLICE, "--nodes", "2"],
    "a cluster has no slices": ["slurm", *SLICE],
    "--tpu is missing": ["sky", *SLICE[2:]],
    "folder that all nodes share": ["slurm", "--run", "gs://bucket/moe"],
    "the mesh asks for 2 devices": ["slurm", "--nodes=3", "--set", "mesh.data=2"],
    "needs `--project`": ["gke", *SLICE[:4]],
    "GKE offers no v3": ["gke", "--tpu", "v3-32", *SLICE[2:]],
    "--setup is for machines": ["gke", *SLICE, "--setup", "true"],
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_a_scheduler_cannot_do_is_refused_and_nothing_is_written(
    glam, tmp_path, monkeypatch, words
):
    monkeypatch.chdir(tmp_path)
    kind, *rest = REFUSED[words]
    words_given = ("launch", "test-tiny", "--set", "batch.rows=64", "--run", "/mnt/moe", *rest)
    code, _, err = glam(*words_given, "--write", kind)
    assert (code in (2, 5), words in err) == (True, True), err
    assert list(tmp_path.iterdir()) == []
