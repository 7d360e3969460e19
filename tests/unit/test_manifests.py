"""The Kubernetes manifests of launch/ and docker/compose.yaml: fields, commands, variables, sizes.

Nothing is started. The fields of the jobs are compared with those that Kubeflow's operators declare.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from zods.cli.arguments import option_parser

REPOSITORY = Path(__file__).parents[2]
MANIFESTS = REPOSITORY / "launch" / "kubernetes"
IMAGES = [(REPOSITORY / "docker" / f"{kind}.Dockerfile").read_text() for kind in ("cpu", "cuda")]

# The fields that are used, of Kubernetes's core/v1. A type stands for a value of it, a list for a
# list of its only item, "*" for any key.
CONTAINER = {
    "name": str,
    "image": str,
    "command": [str],
    "args": [str],
    "env": [{"name": str, "value": str}],
    "resources": {"limits": {"nvidia.com/gpu": int}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
VOLUME = {
    "name": str,
    "persistentVolumeClaim": {"claimName": str},
    "emptyDir": {"medium": str, "sizeLimit": str},
}
TEMPLATE = {
    "metadata": {"annotations": {"*": str}},
    "spec": {
        "terminationGracePeriodSeconds": int,
        "containers": [CONTAINER],
        "volumes": [VOLUME],
    },
}
# All fields of the jobs, without their objects that are not used here. Sources:
# github.com/kubeflow/mpi-operator, pkg/apis/kubeflow/v2beta1/types.go, commit 013fa15;
# github.com/kubeflow/training-operator, pkg/apis/kubeflow.org/v1/pytorch_types.go, commit 2f18ab7,
# and common_types.go, commit 186ac6c.
REPLICA = {"replicas": int, "template": TEMPLATE, "restartPolicy": str}
RUN_POLICY = {
    "cleanPodPolicy": str,
    "ttlSecondsAfterFinished": int,
    "activeDeadlineSeconds": int,
    "backoffLimit": int,
}
JOBS: dict[str, dict[str, Any]] = {
    "mpijob.yaml": {
        "apiVersion": "kubeflow.org/v2beta1",
        "kind": "MPIJob",
        "metadata": {"name": str},
        "spec": {
            "slotsPerWorker": int,
            "sshAuthMountPath": str,
            "mpiImplementation": str,
            "waitForWorkers": bool,
            "runPolicy": {**RUN_POLICY, "suspend": bool},
            "mpiReplicaSpecs": {"Launcher": REPLICA, "Worker": REPLICA},
        },
    },
    "pytorchjob.yaml": {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": str},
        "spec": {
            "nprocPerNode": str,
            "runPolicy": RUN_POLICY,
            "pytorchReplicaSpecs": {"Master": REPLICA, "Worker": REPLICA},
        },
    },
}
RESTART_POLICIES = {"Always", "OnFailure", "Never", "ExitCode"}


def mistakes(value: Any, declared: Any, path: str = "") -> Iterator[str]:
    """Where a value does not have the declared fields and types."""
    if isinstance(declared, dict) and isinstance(value, dict):
        for key, of_key in value.items():
            if key in declared or "*" in declared:
                yield from mistakes(of_key, declared.get(key, declared.get("*")), f"{path}.{key}")
            else:
                yield f"{path}.{key} is not declared"
    elif isinstance(declared, list) and isinstance(value, list):
        for item in value:
            yield from mistakes(item, declared[0], f"{path}[]")
    elif isinstance(declared, str) and value != declared:
        yield f"{path}: {value!r} in place of {declared!r}"
    elif not isinstance(declared, str) and type(value) is not declared:
        yield f"{path}: {value!r} is not of {declared}"


def job_of(name: str) -> dict[str, Any]:
    return yaml.safe_load((MANIFESTS / name).read_text())


def replicas_of(job: dict[str, Any]) -> dict[str, Any]:
    (specs,) = (value for key, value in job["spec"].items() if key.endswith("ReplicaSpecs"))
    return specs


def test_every_manifest_is_checked():
    assert {path.name for path in MANIFESTS.iterdir()} == set(JOBS)


@pytest.mark.parametrize("name", JOBS)
def test_a_manifest_has_only_the_fields_that_the_operator_declares(name):
    job = job_of(name)
    assert list(mistakes(job, JOBS[name])) == []
    for replica in replicas_of(job).values():
        assert replica.get("restartPolicy", "Never") in RESTART_POLICIES
    job["spec"]["slots"] = job["spec"]["runPolicy"]["backoffLimit"] = "8"
    assert len(list(mistakes(job, JOBS[name]))) == 2, "an unknown field and a text for a number"


@pytest.mark.parametrize("name", JOBS)
def test_what_a_manifest_starts_is_in_the_images(name):
    options = set(option_parser()._option_string_actions)
    variables = (REPOSITORY / "launch" / "environment.sh").read_text()
    for replica in replicas_of(job_of(name)).values():
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        command = [*container["command"], *container.get("args", [])]
        assert command[0] == "bash"
        if command[1] == "-c":
            assert all("openssh-server" in image for image in IMAGES)
            assert_makes_host_keys(command[2])
        else:
            assert (REPOSITORY / command[1]).is_file()
            assert all("COPY launch launch" in image for image in IMAGES)
            own = command[command.index("--") + 1 :]
            assert {word for word in own if word.startswith("--")} <= options
        for variable in container.get("env", []):
            assert re.search(rf"\b{variable['name']}\b", variables), variable
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
        assert mounts["data"] == "/data"


def gpus_of(replica: dict[str, Any]) -> int:
    return replica["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]


def test_the_ranks_of_a_manifest_are_its_gpus():
    job = job_of("mpijob.yaml")
    replicas, slots = replicas_of(job), job["spec"]["slotsPerWorker"]
    command = replicas["Launcher"]["template"]["spec"]["containers"][0]["command"]
    assert slots == gpus_of(replicas["Worker"])
    assert int(command[command.index("-n") + 1]) == slots * replicas["Worker"]["replicas"]
    job = job_of("pytorchjob.yaml")
    for replica in replicas_of(job).values():
        assert int(job["spec"]["nprocPerNode"]) == gpus_of(replica)
        # the operator finds its container, and gives it the addresses, by this name
        assert replica["template"]["spec"]["containers"][0]["name"] == "pytorch"


def assert_makes_host_keys(script: str) -> None:
    """The images have none, because all who have an image would know them."""
    assert all("/etc/ssh/ssh_host_*" in image for image in IMAGES)
    before, _, options = script.partition("exec /usr/sbin/sshd ")
    assert "ssh-keygen -A" in before
    assert options.startswith("-D")


def test_the_nodes_of_the_compose_file_serve_ssh_from_the_cpu_image():
    services = yaml.safe_load((REPOSITORY / "docker" / "compose.yaml").read_text())["services"]
    assert set(services) == {"node1", "node2"}
    for name, service in services.items():
        assert service.get("hostname", name) == name
        assert f"-t {service['image']} ." in IMAGES[0]
        assert 'ENTRYPOINT ["bash"]' in IMAGES[0]
        assert service["command"][0] == "-c"
        assert_makes_host_keys(service["command"][1])
    assert services["node1"]["volumes"] == services["node2"]["volumes"], "one key for both"
