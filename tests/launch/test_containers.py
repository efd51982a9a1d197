"""launch/Dockerfile and the Kubernetes files: static checks, which do not build or run them.

The Kubernetes files are compared with the schemas that Kubeflow publishes as Python packages (kubeflow-training and
kubernetes for version 1, kubeflow-trainer-api for version 2). Those packages ignore unknown keys; `faults` does not.
"""

from __future__ import annotations

import copy
import fnmatch
import importlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dtrain.config.load import load_config
from tests.support import jobs

pytestmark = pytest.mark.commands

ROOT = jobs.ROOT
FILES = ("kubernetes.yaml", "kubernetes-trainer.yaml")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "launch" / name).read_text()))


def of_kind(kind: str) -> dict[str, Any]:
    found = [document for name in FILES for document in documents(name) if document["kind"] == kind]
    assert len(found) == 1
    return found[0]


# ---------------------------------------------------------------- schemas

ENUMS = {"restartPolicy": {"Always", "OnFailure", "Never", "ExitCode"}, "cleanPodPolicy": {"None", "Running", "All"}}
"""Allowed values that version 1's models only list in their documentation."""


def faults(value: Any, kind: str, models: Any, place: str) -> Iterator[str]:
    """Yields what is wrong with a value by the OpenAPI models of version 1: unknown keys, wrong types, missing keys.

    Args:
        kind: a type in the models' notation: int, str, list[V1Container], dict(str, str), V1PodSpec, ...
        models: returns a model's class by name.
        place: the path of the value in its document.
    """
    many = re.fullmatch(r"(list\[|dict\(str, )(.+)[\])]", kind)
    if many:
        wanted: type = list if many[1] == "list[" else dict
        if not isinstance(value, wanted):
            yield f"{place}: {value!r} is not a {wanted.__name__}"
            return
        inner = enumerate(value) if isinstance(value, list) else value.items()
        for key, each in inner:
            yield from faults(each, many[2], models, f"{place}.{key}")
    elif kind in ("str", "int", "bool", "float"):
        types = {"str": str, "int": int, "bool": bool, "float": (int, float)}[kind]
        if not isinstance(value, types) or (isinstance(value, bool) and kind != "bool"):
            yield f"{place}: {value!r} is not a {kind}"
        elif value not in ENUMS.get(place.rpartition(".")[2], {value}):
            yield f"{place}: {value!r} is unknown"
    elif kind != "object":
        yield from _faults_of_model(value, models(kind), models, place)


def _faults_of_model(value: Any, model: Any, models: Any, place: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{place}: {value!r} is not a {model.__name__}"
        return
    kinds = {model.attribute_map[name]: kind for name, kind in model.openapi_types.items()}
    for key, inner in value.items():
        if key in kinds:
            yield from faults(inner, kinds[key], models, f"{place}.{key}")
        else:
            yield f"{place}.{key} is unknown"
    names = {wire: name for name, wire in model.attribute_map.items()}
    try:  # the constructor raises an error if a required key is missing
        model(**{names[key]: inner for key, inner in value.items() if key in names})
    except ValueError as error:
        yield f"{place}: {error}"


def version_1(document: dict[str, Any]) -> list[str]:
    training = pytest.importorskip("kubeflow.training.models")
    kubernetes = importlib.import_module("kubernetes.client.models")

    def model(name: str) -> Any:
        return getattr(training, name, None) or getattr(kubernetes, name)

    return list(faults(document, "KubeflowOrgV1PyTorchJob", model, "job"))


def version_2(document: dict[str, Any], model: str) -> list[str]:
    """Returns what is wrong by pydantic models, which drop unknown keys."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    pydantic = importlib.import_module("pydantic")
    try:
        known = getattr(models, model).from_dict(copy.deepcopy(document)).to_dict()
    except pydantic.ValidationError as error:
        return [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
    return list(_dropped(document, known, "job"))


def _dropped(given: Any, known: Any, place: str) -> Iterator[str]:
    if isinstance(given, dict) and isinstance(known, dict):
        for key, inner in given.items():
            if key not in known:
                yield f"{place}.{key} is unknown"
            else:
                yield from _dropped(inner, known[key], f"{place}.{key}")
    elif isinstance(given, list) and isinstance(known, list) and len(given) == len(known):
        for index, pair in enumerate(zip(given, known, strict=True)):
            yield from _dropped(*pair, f"{place}.{index}")
    elif given != known:
        yield f"{place}: {given!r} was read as {known!r}"


def trainer(model: str) -> Callable[[dict[str, Any]], list[str]]:
    return lambda document: version_2(document, model)


CHECKS = {
    "PyTorchJob": version_1,
    "PersistentVolumeClaim": trainer("IoK8sApiCoreV1PersistentVolumeClaim"),
    "TrainingRuntime": trainer("TrainerV1alpha1TrainingRuntime"),
    "TrainJob": trainer("TrainerV1alpha1TrainJob"),
}


@pytest.mark.parametrize("kind", CHECKS)
def test_a_kubernetes_object_matches_its_schema(kind: str) -> None:
    assert CHECKS[kind](of_kind(kind)) == []


@pytest.mark.parametrize(
    ("kind", "path", "value", "message"),
    [
        ("PyTorchJob", "spec.nprocPerNode", 4, "spec.nprocPerNode: 4 is not a str"),
        ("PyTorchJob", "spec.runPolicy.backofLimit", 3, "spec.runPolicy.backofLimit is unknown"),
        ("PyTorchJob", "spec.pytorchReplicaSpecs.Worker.restartPolicy", "OnError", "'OnError' is unknown"),
        ("PyTorchJob", "spec.pytorchReplicaSpecs.Worker.template.spec.volumes.1.emptydir", {}, "emptydir is unknown"),
        (
            "PyTorchJob",
            "spec.pytorchReplicaSpecs.Master.template.spec.containers.0.args.1",
            7,
            "args.1: 7 is not a str",
        ),
        (
            "PyTorchJob",
            "spec.pytorchReplicaSpecs.Master.template.spec.containers.0.image",
            None,
            "image: None is not a str",
        ),
        ("PersistentVolumeClaim", "spec.accessModes", "ReadWriteMany", "accessModes"),
        ("TrainJob", "spec.trainer.numNodes", "2", "numNodes"),
        ("TrainJob", "spec.trainer.numProcPerNodes", 2, "spec.trainer.numProcPerNodes is unknown"),
        ("TrainJob", "spec.runtimeRef", None, "runtimeRef"),
        ("TrainingRuntime", "spec.template.spec.replicatedJobs.0.template.spec.backoffLimits", 1, "is unknown"),
        (
            "TrainingRuntime",
            "spec.template.spec.replicatedJobs.0.template.spec.template.spec.terminationGracePeriodSeconds",
            "300",
            "terminationGracePeriodSeconds",
        ),
    ],
)
def test_a_planted_mistake_is_found(kind: str, path: str, value: Any, message: str) -> None:
    document = json.loads(json.dumps(of_kind(kind)))  # an independent copy: YAML's anchors share objects
    *folders, last = path.split(".")
    place: Any = document
    for step in folders:
        place = place[int(step)] if isinstance(place, list) else place[step]
    place[int(last) if isinstance(place, list) else last] = value

    found = CHECKS[kind](document)

    assert any(message in fault for fault in found), found


# ---------------------------------------------------------------- beyond the schemas


def pods() -> list[dict[str, Any]]:
    """Returns the spec of each kind of pod."""
    replicas = of_kind("PyTorchJob")["spec"]["pytorchReplicaSpecs"]
    (node,) = of_kind("TrainingRuntime")["spec"]["template"]["spec"]["replicatedJobs"]
    specs = [replica["template"]["spec"] for replica in replicas.values()]
    return [*specs, node["template"]["spec"]["template"]["spec"]]


def test_pods_have_shared_memory_a_claim_for_runs_and_time_to_save() -> None:
    claim = of_kind("PersistentVolumeClaim")["metadata"]["name"]
    for spec in pods():
        (container,) = spec["containers"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        env = {entry["name"]: entry for entry in container["env"]}

        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert mounts["/runs"]["persistentVolumeClaim"]["claimName"] == claim
        assert 30 < int(env["PET_SHUTDOWN_TIMEOUT"]["value"]) < spec["terminationGracePeriodSeconds"]
        assert "value" not in env["HF_TOKEN"], "a reference to the secret, not its value"
        assert spec["securityContext"]["fsGroup"] == 1000
        assert "podAntiAffinity" in spec["affinity"]


def test_a_job_that_exits_with_75_is_restarted() -> None:
    """torchrun replaces it with 1, which the ExitCode policy treats as a permanent error."""
    job = of_kind("PyTorchJob")["spec"]
    (node,) = of_kind("TrainingRuntime")["spec"]["template"]["spec"]["replicatedJobs"]

    assert {replica["restartPolicy"] for replica in job["pytorchReplicaSpecs"].values()} == {"OnFailure"}
    assert job["runPolicy"]["backoffLimit"] > 0
    assert node["template"]["spec"]["template"]["spec"]["restartPolicy"] == "OnFailure"
    assert node["template"]["spec"]["backoffLimit"] > 0


def test_the_names_that_kubeflow_requires_exist() -> None:
    job, runtime, train_job = of_kind("PyTorchJob"), of_kind("TrainingRuntime"), of_kind("TrainJob")
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    rules = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["affinity"]["podAntiAffinity"]
    (rule,) = rules["requiredDuringSchedulingIgnoredDuringExecution"]

    assert [
        replica["template"]["spec"]["containers"][0]["name"] for replica in job["spec"]["pytorchReplicaSpecs"].values()
    ] == [
        "pytorch",
        "pytorch",
    ]
    assert node["name"] == node["template"]["spec"]["template"]["spec"]["containers"][0]["name"] == "node"
    assert train_job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert rule["labelSelector"]["matchLabels"]["training.kubeflow.org/job-name"] == job["metadata"]["name"]


def test_a_rank_for_each_gpu_and_settings_that_dtrain_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    job, trainer_ = of_kind("PyTorchJob")["spec"], of_kind("TrainJob")["spec"]["trainer"]
    (container,) = job["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]

    assert job["nprocPerNode"] == container["resources"]["limits"]["nvidia.com/gpu"]
    assert str(trainer_["numProcPerNode"]) == trainer_["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    for arguments in (container["args"], trainer_["args"]):
        assert arguments[0] == "--config"
        config = load_config(Path(arguments[1]), arguments[2:])
        assert config.run.startup_timeout_s > 300, "Kubernetes waits up to this long before it restarts a container"
        assert config.checkpoint.every is not None


# ---------------------------------------------------------------- the image


def instructions() -> list[tuple[str, str]]:
    """Returns the Dockerfile's instructions in order, as name and arguments, with continued lines joined."""
    lines = [line for line in (ROOT / "launch" / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [
        (name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())
    ]


def copied() -> list[str]:
    return [
        source
        for name, rest in instructions()
        if name == "COPY"
        for source in [word for word in rest.split() if not word.startswith("--")][:-1]
    ]


def test_the_image_has_a_supported_python() -> None:
    name, base = instructions()[0]

    assert name == "FROM"
    assert re.fullmatch(r"python:3\.1[0-3]-slim-[a-z]+", base), "a version and a release, not `latest`"
    assert {name for name, _ in instructions()} <= {
        "FROM",
        "ARG",
        "RUN",
        "WORKDIR",
        "COPY",
        "USER",
        "ENV",
        "ENTRYPOINT",
    }


def test_the_files_that_the_image_copies_exist_and_are_not_ignored() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]

    assert set(copied()) == {"pyproject.toml", "constraints.txt", "dtrain", "configs"}
    for source in copied():
        assert (ROOT / source).exists()
        ignored = False
        for line in lines:
            if fnmatch.fnmatch(source, line.lstrip("!")):
                ignored = not line.startswith("!")
        assert not ignored, source
    assert lines[0] == "*", "everything else is ignored: .venv, runs, .git"


def test_the_packages_are_installed_before_the_code_is_copied() -> None:
    order = [f"{name} {rest}" for name, rest in instructions()]
    install = next(index for index, line in enumerate(order) if "pip install" in line)

    assert "-c constraints.txt" in order[install]
    assert all("dtrain dtrain" not in line for line in order[:install])
    assert any("dtrain dtrain" in line for line in order[install:])


def test_the_image_runs_as_a_user_by_number_and_its_entry_point_gets_the_signals() -> None:
    found = dict(instructions())

    assert found["USER"] == "1000:1000"
    assert [name for name, _ in instructions()].index("USER") < [name for name, _ in instructions()].index("ENTRYPOINT")
    entry = json.loads(found["ENTRYPOINT"])  # a list: a shell in between would not forward SIGTERM
    assert entry == ["torchrun", "dtrain/main.py"]
    assert (ROOT / entry[1]).exists()


def test_the_image_has_dtrain_compiled_by_its_user() -> None:
    order = [f"{name} {rest}" for name, rest in instructions()]

    assert order.index("USER 1000:1000") < order.index("RUN python -m compileall -q dtrain")
