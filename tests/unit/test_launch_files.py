"""Launch files for clusters: what of them can be checked without a cluster."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from distill.cache_fill.verb import cache
from distill.planner.recipe import read_recipe

pytestmark = pytest.mark.filterwarnings(r"ignore:[\s\S]*(deprecat|JSONARGPARSE)")

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "scripts" / "launch"
SBATCH = sorted(LAUNCH.glob("*.sbatch"))

STRING, WHOLE, STRINGS = {"type": "string"}, {"type": "integer"}, {"type": "array", "items": {"type": "string"}}


def closed(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required or [], "additionalProperties": False}


def listed(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


QUANTITIES = {"type": "object", "additionalProperties": STRING}
CONTAINER_PATCH = closed(["name"], name=STRING, env=listed({"type": "object"}), volumeMounts=listed({"type": "object"}))
POD_PATCH = closed(
    containers=listed(CONTAINER_PATCH), volumes=listed({"type": "object"}), terminationGracePeriodSeconds=WHOLE
)
JOB_PATCH = closed(
    ["name"], name=STRING, template=closed(spec=closed(template=closed(metadata={"type": "object"}, spec=POD_PATCH)))
)
# The part of the published schema (Kubeflow Trainer 2.3, trainer.kubeflow.org_trainjobs.yaml) that the file uses.
TRAIN_JOB = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "trainer.kubeflow.org/v1alpha1"},
    kind={"const": "TrainJob"},
    metadata=closed(["name"], name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}),
    spec=closed(
        ["runtimeRef"],
        runtimeRef=closed(
            ["name"],
            apiGroup={"const": "trainer.kubeflow.org"},
            kind={"enum": ["ClusterTrainingRuntime", "TrainingRuntime"]},
            name=STRING,
        ),
        trainer=closed(
            image=STRING,
            command=STRINGS,
            args=STRINGS,
            env=listed({"type": "object"}),
            numNodes=WHOLE,
            resourcesPerNode=closed(requests=QUANTITIES, limits=QUANTITIES),
        ),
        runtimePatches=listed(
            closed(
                ["manager"],
                manager={"type": "string", "pattern": "^[^/]+/[^/]+$"},
                trainingRuntimeSpec=closed(template=closed(spec=closed(replicatedJobs=listed(JOB_PATCH)))),
            )
        ),
    ),
)
# Likewise of SkyPilot 0.14, sky/utils/schemas.py.
SKYPILOT = closed(
    name=STRING,
    num_nodes=WHOLE,
    workdir=STRING,
    resources=closed(
        accelerators={"type": ["string", "object"]},
        use_spot={"type": "boolean"},
        disk_size=WHOLE,
        job_recovery=closed(strategy=STRING, max_restarts_on_errors=WHOLE, recover_on_exit_codes=listed(WHOLE)),
    ),
    envs={"type": "object"},
    file_mounts={
        "type": "object",
        "additionalProperties": closed(
            ["source"], source=STRING, mode={"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]}, name=STRING
        ),
    },
    setup=STRING,
    run=STRING,
)


def words_of_fit(command: list[str]) -> list[str]:
    """Return the words after `distill fit` or `-m distill fit`."""
    return command[command.index("fit") + 1 :]


def recipe_of(words: list[str]) -> Any:
    """Read a recipe with a launch file's flags, as `distill fit` would."""
    parts = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    flags = dict(zip(parts[::2], parts[1::2], strict=True))
    assert flags.pop("--resume") == "auto"
    config = flags.pop("--config")
    return read_recipe(ROOT / config, [f"{flag}={value}" for flag, value in flags.items()])


@pytest.mark.parametrize("file", SBATCH, ids=lambda file: file.name)
def test_batch_files_are_bash_and_free_of_common_mistakes(file: Path) -> None:
    subprocess.run(["bash", "-n", str(file)], check=True)
    if (shellcheck := shutil.which("shellcheck")) is not None:
        subprocess.run([shellcheck, str(file)], check=True)


@pytest.mark.parametrize("file", SBATCH, ids=lambda file: file.name)
def test_sbatch_reads_every_directive_before_the_first_command(file: Path) -> None:
    lines = file.read_text().splitlines()
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    first_command = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(directives) < first_command
    options = {lines[number].split()[1].split("=")[0] for number in directives}
    assert {"--requeue", "--open-mode", "--time"} <= options


def dry_run(file: Path, folder: Path, words: list[str], environment: dict[str, str], status: int = 0) -> dict[str, Any]:
    """Run a batch file with stand-ins for SLURM's commands, and return what was called."""
    calls = folder / "calls.jsonl"
    for name, code in {"srun": status, "scontrol": 0}.items():
        stub = folder / name
        stub.write_text(
            f"#!{sys.executable}\nimport json, sys\n"
            f"open({str(calls)!r}, 'a').write(json.dumps([{name!r}, *sys.argv[1:]]) + '\\n')\nsys.exit({code})\n"
        )
        stub.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(file), *words], env={"PATH": path, **environment}, capture_output=True, text=True, check=False
    )
    called = [json.loads(line) for line in calls.read_text().splitlines()] if calls.is_file() else []
    return {"status": done.returncode, "calls": called, "stderr": done.stderr}


JOB = {"SLURM_JOB_ID": "123", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8"}


def test_the_slurm_job_trains_the_recipe_on_all_its_nodes(tmp_path: Path) -> None:
    recipe = "configs/internvit_6b_to_300m.yaml"
    done = dry_run(LAUNCH / "slurm.sbatch", tmp_path, [recipe, "--model.engine.teacher_sharding=blocks"], JOB)
    assert done["status"] == 0
    ((command, *words),) = done["calls"]
    assert command == "srun"
    read = recipe_of(words_of_fit(words))
    assert read.world_size == 16
    assert read.task.engine.config.teacher_sharding == "blocks"


@pytest.mark.parametrize(("status", "is_requeued"), [(75, True), (76, True), (1, False), (0, False)])
def test_the_slurm_job_asks_to_run_again_when_its_run_is_saved_and_unfinished(
    tmp_path: Path, status: int, is_requeued: bool
) -> None:
    done = dry_run(LAUNCH / "slurm.sbatch", tmp_path, ["recipe.yaml"], JOB, status)
    assert done["status"] == status
    assert (["scontrol", "requeue", "123"] in done["calls"]) == is_requeued


def test_a_task_of_the_cache_array_takes_its_share_of_the_whole_array(tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_TASK_ID": "17", "SLURM_ARRAY_TASK_MAX": "63"}
    words = ["recipe.yaml", "states", "--compression", "pca"]
    (call,) = dry_run(LAUNCH / "slurm_cache.sbatch", tmp_path, words, array)["calls"]
    assert call[:4] == ["srun", "distill", "cache", "recipe.yaml"]
    given = dict(zip(call[4::2], call[5::2], strict=True))
    assert given == {"--out": "states", "--rank": "17", "--world": "64", "--compression": "pca"}
    assert {flag.removeprefix("--") for flag in given} <= set(inspect.signature(cache).parameters)


def test_batch_files_without_a_recipe_say_how_they_are_used(tmp_path: Path) -> None:
    for file in SBATCH:
        done = dry_run(file, tmp_path, [], JOB)
        assert done["status"] != 0
        assert "usage: sbatch" in done["stderr"]
        assert done["calls"] == []


def test_the_train_job_has_the_fields_of_the_published_schema() -> None:
    job = yaml.safe_load((LAUNCH / "trainjob.yaml").read_text())
    jsonschema.validate(job, TRAIN_JOB)
    trainer = job["spec"]["trainer"]
    read = recipe_of(words_of_fit([*trainer["command"], *trainer["args"]]))
    assert read.world_size == trainer["numNodes"] * int(trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"])


def test_every_volume_of_the_train_job_is_mounted_where_its_flags_look() -> None:
    job = yaml.safe_load((LAUNCH / "trainjob.yaml").read_text())
    (patch,) = job["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    mounted = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
    paths = [path for word in job["spec"]["trainer"]["args"] for path in re.findall("=(/.*)", word)]
    assert paths
    assert all(path.startswith(mounted["shared"] + "/") for path in paths)


def test_the_skypilot_task_has_the_fields_of_the_published_schema_and_its_command_reads_the_recipe() -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    jsonschema.validate(task, SKYPILOT)
    variables = {
        "SKYPILOT_NUM_NODES": str(task["num_nodes"]),
        "SKYPILOT_NUM_GPUS_PER_NODE": task["resources"]["accelerators"].split(":")[1],
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "PATH": os.environ["PATH"],
    }
    echoed = "torchrun() { printf '%s\\n' \"$@\"; }\n" + task["run"]
    shell = subprocess.run(
        ["bash", "-euc", echoed], env=variables | task["envs"], capture_output=True, text=True, check=True
    )
    words = shell.stdout.splitlines()
    assert words[words.index("--master-addr") + 1] == "10.0.0.1"
    assert recipe_of(words_of_fit(words)).world_size == 16
    assert shlex.split(task["setup"])[:2] == ["pip", "install"]
