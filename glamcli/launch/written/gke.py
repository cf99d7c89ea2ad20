"""A launch as a JobSet for a cluster of Google Kubernetes Engine with a node pool of TPUs."""

import json
import sys
from pathlib import PurePosixPath

from glamcli.errors import PlanError, RecipeError
from glamcli.launch.decisions import FINAL_CODES
from glamcli.launch.record import Launch
from glamcli.launch.slices import chips_of_host, slice_of
from glamcli.plan.topology import Target
from glamcli.storage import is_url

# What GKE calls a kind of chip, and its machines: the one of 4 chips, of which slices of several
# machines are made, is named by `-4t` (cloud.google.com/kubernetes-engine/docs/concepts/tpus).
_KINDS = {
    "v4": ("tpu-v4-podslice", "ct4p-hightpu"),
    "v5e": ("tpu-v5-lite-podslice", "ct5lp-hightpu"),
    "v5p": ("tpu-v5p-slice", "ct5p-hightpu"),
    "v6e": ("tpu-v6e-slice", "ct6e-standard"),
    "7x": ("tpu7x", "tpu7x-standard"),
}

_JOBSET = """\
# A JobSet for Google Kubernetes Engine. In a cluster with JobSet (jobset.sigs.k8s.io), once:
#     gcloud container node-pools create {name} --cluster=CLUSTER --location={region} \\
#         --node-locations={zone} --machine-type={machine} --tpu-topology={topology} \\
#         --num-nodes={hosts}{spot_option}
#     kubectl create secret generic {name} --from-literal=secret=$(openssl rand -hex 32)
#     gcloud artifacts repositories create glam --repository-format=docker --location={region}
# and for this glam and this recipe, which the image holds:
#     docker build --tag {image} package
#     docker push {image}
#     kubectl apply -f jobset.yaml
# To change something, `kubectl delete jobset {name}` first. To stop: the same, which lets the run
# save; the node pool then still costs money until
#     gcloud container node-pools delete {name} --cluster=CLUSTER --location={region}
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
  annotations:
    # All pods on the machines of one slice: others have no links to it.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    # A start of all pods is counted here whatever was saved between, machines that were taken away
    # included. A run whose own error repeats ends itself after three (docs/hosts.md).
    maxRestarts: 100
    rules:
      - name: final
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]     # the codes below
  replicatedJobs:
    - name: workers
      replicas: 1                   # slices
      template:
        spec:
          parallelism: {hosts}            # machines of the slice
          completions: {hosts}
          completionMode: Indexed
          backoffLimit: 0           # no pod is of use without the others: all start again
          podFailurePolicy:
            rules:
              # A cause that is the same the next time. All other codes, 75, 86 and 134 among them,
              # and pods that were taken away, start all pods again.
              - action: FailJob
                onExitCodes:
                  containerName: glam
                  operator: In
                  values: [{final}]
          template:
            spec:
              restartPolicy: Never  # of one pod; podFailurePolicy asks for it
              terminationGracePeriodSeconds: 600    # to save; a spot machine has 25
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: {accelerator}
                cloud.google.com/gke-tpu-topology: {topology}
{spot}              containers:
                - name: glam
                  image: {image}
                  # Pods of a slice find each other by what GKE puts into their environment.
                  command: [glam, train, /opt/glam/recipe.yaml, --run, {run}]
                  env:
                    - name: GLAM_SECRET     # who may join the run
                      valueFrom:
                        secretKeyRef: {{name: {name}, key: secret}}
                  resources:
                    limits: {{google.com/tpu: {chips}}}   # of one machine
{folder}"""
_MOUNTED = """\
                  volumeMounts:
                    - name: runs
                      mountPath: {mount}
              volumes:
                - name: runs        # one that all pods may write, as of Filestore; make it before
                  persistentVolumeClaim: {{claimName: glam-runs}}
"""
_IN_BUCKET = """\
              # One that may use the bucket: `kubectl create serviceaccount glam`, and
              # gcloud storage buckets add-iam-policy-binding {bucket} \\
              #     --role=roles/storage.objectAdmin --member=principal://iam.googleapis.com/\\
              #     projects/NUMBER/locations/global/workloadIdentityPools/\\
              #     {project}.svc.id.goog/subject/ns/default/sa/glam
              serviceAccountName: glam
"""
_SPOT = '                cloud.google.com/gke-spot: "true"\n'
_DOCKERFILE = """\
FROM python:{python}-slim
COPY . /opt/glam/
RUN pip install --no-cache-dir --constraint /opt/glam/constraints.txt \\
    "$(ls /opt/glam/*.whl)[{extras}]"
"""
IGNORED = "package.json\nworker.py\n"
"""by docker: the secret of the run does not belong into an image."""


def dockerfile(extras: str) -> str:
    """Of an image that holds what is sent."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return _DOCKERFILE.format(python=python, extras=extras)


def jobset(launch: Launch, target: Target) -> str:
    """The JobSet, in YAML; its image is made of the folder `package` beside it.

    Raises: PlanError for a kind of chip that GKE does not have; RecipeError without a project.
    """
    target, chip = slice_of(target)
    if chip.name not in _KINDS:
        raise PlanError(f"GKE offers no {chip.name}", f"it has {', '.join(_KINDS)}")
    if launch.project is None:
        raise RecipeError("--write gke: the address of the image needs `--project`")
    chips = chips_of_host(target)
    accelerator, machine = _KINDS[chip.name]
    region = launch.zone.rpartition("-")[0]
    return _JOBSET.format(
        name=launch.name,
        run=json.dumps(launch.run),
        folder=_folder(launch),
        zone=launch.zone,
        region=region,
        image=f"{region}-docker.pkg.dev/{launch.project}/glam/{launch.name}",
        accelerator=accelerator,
        machine=f"{machine}-{chips}t",
        topology="x".join(map(str, target.shape)),
        hosts=target.num_chips // chips,
        chips=chips,
        spot=_SPOT * launch.spot,
        spot_option=" --spot" * launch.spot,
        final=", ".join(map(str, sorted(FINAL_CODES))),
    )


def _folder(launch: Launch) -> str:
    """How a pod comes to the run's folder."""
    if is_url(launch.run):
        bucket = "/".join(launch.run.split("/")[:3])
        return _IN_BUCKET.format(bucket=bucket, project=launch.project)
    run = PurePosixPath(launch.run)
    mount = run if run.parent == run.parent.parent else run.parent
    return _MOUNTED.format(mount=json.dumps(str(mount)))
