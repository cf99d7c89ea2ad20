"""A `gcloud` whose slices are folders and whose machines are processes of this computer.

Its state is under $FAKE_CLOUD. What it does is in `plan.json` there, which a test writes:

    workers      machines of a slice
    states       states of a request before ACTIVE, one per `describe`
    create       what `create` says instead, call by call: text of an error, or null
    fail         what any call says whose words contain a key: text of an error
    unreachable  workers that do not answer ssh
    failures     how many requests fail, the first ones
    late         what `create` says instead of nothing, when the slice has come to be
    project      gcloud's default one
    no_request   machines are there without a request
    preempt      saved steps of the run at which a slice is taken away, one after the other
    run          the run's folder, for `preempt`; it may be in a bucket
    location     where every bucket is

As on a real slice, `ssh` runs a shell in the home folder of each machine, and processes outlive it.
Peers are told by the variables of Open MPI, where a real slice has its metadata server.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

CLOUD = Path(os.environ["FAKE_CLOUD"])
OWN_PLACE = ("z", "p")


def plan():
    return json.loads((CLOUD / "plan.json").read_text())


def refuse(command, said):
    sys.stderr.write(f"ERROR: (gcloud.{command}) {said}\n")
    sys.exit(1)


def requests(name):
    return CLOUD / "requests" / f"{name}.json"


def plain(name):
    return name.rpartition(".")[2]


def read(path):
    return json.loads(path.read_text()) if path.exists() else None


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps(value))
    new.replace(path)


def turn_off(name):
    """Ends every process of the slice's machines, as a switch does."""
    mark = f"FAKE_SLICE={CLOUD / name}".encode()
    for each in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (each / "environ").read_bytes().split(b"\0"):
                os.kill(int(each.name), signal.SIGKILL)
        except OSError:
            pass
    shutil.rmtree(CLOUD / "machines" / name, ignore_errors=True)


def saved_step():
    if (plan().get("run") or "").startswith("gs://"):
        return step_in_bucket(plan()["run"])
    folder = Path(plan().get("run") or "/nowhere") / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def step_in_bucket(run):
    bucket, _, name = run[len("gs://") :].partition("/")
    place = f"/download/storage/v1/b/{bucket}/o/{name}%2Fsteps.json?alt=media"
    try:
        with urllib.request.urlopen(os.environ["STORAGE_EMULATOR_HOST"] + place) as answer:
            names = json.loads(answer.read())
    except urllib.error.HTTPError:
        return 0
    steps = {name.split("/")[0] for name in names}
    return max((int(step) for step in steps if step.isdigit()), default=0)


def advance(name):
    """The request after one more look at it."""
    request = read(requests(name))
    if request is None:
        return None
    if request["state"] == "SUSPENDING":
        request["state"] = "SUSPENDED"
    elif request["state"] == "DELETING":
        requests(name).unlink()
        return None
    elif request["todo"]:
        request["state"] = request["todo"].pop(0)
    taken = read(CLOUD / "taken.json") or 0
    steps = plan().get("preempt", [])
    if request["state"] == "ACTIVE" and taken < len(steps) and saved_step() >= steps[taken]:
        write(CLOUD / "taken.json", taken + 1)
        turn_off(name)
        request["state"] = "SUSPENDING"
    write(requests(name), request)
    return request


def queued(verb, words, options):
    command = f"compute.tpus.queued-resources.{verb}"
    name = words[0]
    if verb == "create":
        said = plan().get("create", [])
        number = read(CLOUD / "created.json") or 0
        write(CLOUD / "created.json", number + 1)
        if number < len(said) and said[number] is not None:
            refuse(command, said[number])
        if requests(name).exists():
            refuse(command, f"ALREADY_EXISTS: Resource 'projects/p/{name}' already exists")
        time.sleep(plan().get("slow", 0))
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        todo = [*plan().get("states", ["WAITING_FOR_RESOURCES", "PROVISIONING"]), "ACTIVE"]
        todo = ["FAILED"] if number < plan().get("failures", 0) else todo
        label = dict([options["labels"].split("=")])
        common = {"state": "CREATING", "labels": label, "kind": options["accelerator-type"]}
        write(requests(name), {**common, "todo": todo, "port": port})
        if said := plan().get("late"):
            refuse(command, said)
        return
    if not requests(name).exists() or plan().get("no_request"):
        refuse(command, f"NOT_FOUND: Resource 'projects/p/{plain(name)}' was not found")
    if verb == "delete":
        request = read(requests(name))
        if request["state"] == "ACTIVE" and "force" not in options:
            refuse(command, "FAILED_PRECONDITION: the queued resource has nodes; use --force")
        turn_off(name)
        write(requests(name), {**request, "state": "DELETING"})
    elif verb == "describe":
        request = advance(name)
        if request is None:
            refuse(command, f"NOT_FOUND: Resource 'projects/p/{plain(name)}' was not found")
        state = {"state": request["state"]}
        if request["state"] == "FAILED":
            state["failedData"] = {"error": {"message": "internal error"}}
        spec = {"nodeSpec": [{"nodeId": name, "node": {"labels": request["labels"]}}]}
        found = json.dumps({"name": f"projects/p/{name}", "state": state, "tpu": spec})
        sys.stdout.write(found if options["format"] == "json" else state["state"])


def machine(verb, words, options):
    command = f"compute.tpus.tpu-vm.{verb}"
    name = (words[1].partition(":") if verb == "scp" else (words[0],))[0]
    request = read(requests(name))
    if request is None or request["state"] != "ACTIVE":
        refuse(command, f"NOT_FOUND: Resource 'projects/p/nodes/{plain(name)}' was not found")
    number = plan().get("workers", 2)
    if verb == "describe":
        ends = [{"ipAddress": "127.0.0.1"} for _ in range(number)]
        node = {"state": "READY", "networkEndpoints": ends, "labels": request["labels"]}
        sys.stdout.write(json.dumps(node))
        return
    if verb == "delete":
        turn_off(name)
        requests(name).unlink()
        return
    silent = plan().get("unreachable", [])
    reached = [worker for worker in range(number) if worker not in silent]
    homes = {worker: CLOUD / "machines" / name / str(worker) for worker in reached}
    for home in homes.values():
        home.mkdir(parents=True, exist_ok=True)
    if verb == "scp":
        for home in homes.values():
            target = home / words[1].partition(":")[2]
            shutil.copytree(words[0], target / Path(words[0]).name if target.is_dir() else target)
    codes = []
    if verb == "ssh":
        codes = ssh(options, homes, name, request["port"], number)
    if silent:
        refuse(command, "[/usr/bin/ssh] exited with return code [255].")
    sys.exit(max(codes, default=0))


def ssh(options, homes, name, port, number):
    running = []
    for worker, home in homes.items():
        environment = {
            **os.environ,
            "HOME": str(home),
            "PATH": f"{CLOUD / 'worker-bin'}:{os.environ['PATH']}",
            "FAKE_SLICE": str(CLOUD / name),
            "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1",
            "OMPI_COMM_WORLD_SIZE": str(number),
            "OMPI_COMM_WORLD_RANK": str(worker),
            "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            "JAX_COORDINATOR_PORT": str(port),
        }
        # So does gcloud 528, when it is given a folder.
        place = f"None/{worker}.log" if "output-directory" in options else os.dup(1)
        with open(place, "ab") as log:
            running.append(
                subprocess.Popen(
                    ["bash", "-c", options["command"]],
                    cwd=home,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )
    return [abs(each.wait()) for each in running]


def main(arguments):
    with open(CLOUD / "calls", "a") as calls:
        calls.write(" ".join(arguments) + "\n")
    options = {}
    for each in arguments:
        if each.startswith("--"):
            key, _, value = each[2:].partition("=")
            options[key] = value
    words = [each for each in arguments if not each.startswith("--")]
    for key, said in plan().get("fail", {}).items():
        if key in " ".join(words):
            refuse(".".join(words[:4]), said)
    if words[:2] == ["auth", "list"]:
        sys.stdout.write(json.dumps(plan().get("accounts", [{"account": "me@example.com"}])))
        return
    if words[:2] == ["config", "get"]:
        sys.stdout.write(plan().get("project", "p") + "\n")
        return
    if words[:3] == ["storage", "buckets", "describe"]:
        sys.stdout.write(json.dumps({"location": plan().get("location", "Z")}))
        return
    kind, verb, *rest = words[2:]
    assert "zone" in options, "gcloud would ask for a zone"
    place = (options["zone"], options.get("project", plan().get("project", "p")))
    if place != OWN_PLACE and verb != "scp":
        rest[0] = ".".join([*place, rest[0]])
    {"queued-resources": queued, "tpu-vm": machine}[kind](verb, rest, options)


if __name__ == "__main__":
    main(sys.argv[1:])
