"""What starts a run on several hosts: the shell by shellcheck and with stand-ins for the tools, the YAML by schemas."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys

import kubernetes_validate
import pytest
import yaml
from pages import commands, tool
from processes import ROOT
from test_docs import read_options

from asymvq_jax.config import load_config
from asymvq_jax.errors import ExitCode

DEPLOY = ROOT / "deploy"
JOBSET = yaml.load((DEPLOY / "jobset.yaml").read_text(), yaml.SafeLoader)


def run(script, *arguments, tools, env):
    """Runs a script whose only tools beside the system's are the stand-ins of the directory `tools`."""
    return subprocess.run(
        ["bash", str(script), *arguments],
        env={"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tools)} | env,
        cwd=ROOT, text=True, capture_output=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture
def tools(tmp_path):
    """Makes stand-ins: each notes its arguments in `calls`, one call a line, and does what it is told to."""

    def make(**bodies):
        for name, body in bodies.items():
            tool = tmp_path / name
            tool.write_text(
                f'#!/bin/bash\nprintf "%q " {name} "$@" >> "{tmp_path}/calls"\necho >> "{tmp_path}/calls"\n{body}\n'
            )
            tool.chmod(0o755)
        return tmp_path

    make.calls = lambda: [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]
    return make


@pytest.mark.parametrize("script", [*DEPLOY.glob("*.sh"), *DEPLOY.glob("*.sbatch")], ids=lambda p: p.name)
def test_scripts_are_sound(script):
    result = subprocess.run([tool("shellcheck"), str(script)], text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stdout


def test_the_jobset_holds_a_valid_job():
    assert JOBSET["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert JOBSET["kind"] == "JobSet"
    assert set(JOBSET["spec"]) == {"failurePolicy", "replicatedJobs"}
    (replicated,) = JOBSET["spec"]["replicatedJobs"]
    assert set(replicated) == {"name", "replicas", "template"}
    # A JobSet's own schema comes with its controller; what it makes of the template is a Job.
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **replicated["template"]}
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


def test_a_misspelt_field_would_be_found():
    (replicated,) = JOBSET["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"] | {"parallellism": 4}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, "spec": spec}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


def test_the_jobset_has_a_process_for_each_host_and_stops_for_the_runs_own_errors():
    (replicated,) = JOBSET["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = int(sides[0]) * int(sides[1])
    assert job["parallelism"] == job["completions"] == chips / container["resources"]["limits"]["google.com/tpu"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["values"] == [ExitCode.FAILED, ExitCode.WRONG_INPUT]
    (restart,) = JOBSET["spec"]["failurePolicy"]["rules"]
    assert restart["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_the_jobsets_arguments_can_be_read(monkeypatch, capsys):
    (replicated,) = JOBSET["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    assert read_options(container["args"], monkeypatch) == 0, capsys.readouterr().err
    batch = next(a for a in container["args"] if a.startswith("--data.batch_size="))
    assert load_config(ROOT / "configs" / "x2.py", [batch]).data.batch_size % 16 == 0


@pytest.mark.parametrize(
    ("code", "requeued"),
    [(ExitCode.DONE, False), (ExitCode.WRONG_INPUT, False), (ExitCode.SAVED, True), (ExitCode.LOST_PEER, True)],
)
def test_slurm_starts_again_what_can_resume(code, requeued, tools, monkeypatch, capsys):
    folder = tools(srun=f"exit {code}", scontrol="")
    result = run(DEPLOY / "slurm.sbatch", "--data.batch_size=64", tools=folder, env={"SLURM_JOB_ID": "17"})
    assert result.returncode == code, result.stderr
    (started, *rest) = tools.calls()
    assert rest == ([["scontrol", "requeue", "17"]] if requeued else [])
    (words,) = commands(shlex.join(started))
    assert words[-1] == "--data.batch_size=64"
    assert read_options(words, monkeypatch) == 0, capsys.readouterr().err


def test_slurm_has_a_task_for_each_gpu():
    text = (DEPLOY / "slurm.sbatch").read_text()
    options = dict(re.findall(r"(?m)^#SBATCH --([\w-]+)=(\S+)", text))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("TERM@")
    # Slurm ignores its options after the first command.
    assert text.rindex("#SBATCH") < text.index("\nset ")


# What the launchers tell process `i` of two, on one machine; JAX takes the port from JAX_COORDINATOR_PORT.
LAUNCHED = {
    "Slurm": lambda i: {
        "SLURM_JOB_ID": "17", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i),
    },
    "Open MPI": lambda i: {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i),
    },
    "GKE, one slice": lambda i: {
        "TPU_SKIP_MDS_QUERY": "true", "TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.1", "TPU_WORKER_ID": str(i)
    },
    "GKE, two slices": lambda i: {
        "TPU_SKIP_MDS_QUERY": "true", "TPU_WORKER_HOSTNAMES": "127.0.0.1", "TPU_WORKER_ID": "0",
        "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1:8080", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": str(i),
    },
}  # fmt: skip
# The TPU is not there, nor is Google's metadata server: JAX is told that the machine is a TPU's host, and that the
# server has nothing to add.
JOIN = """
import jax, os
from jax._src.clusters import cloud_tpu_cluster
cloud_tpu_cluster.running_in_cloud_tpu_vm = "TPU_WORKER_ID" in os.environ
cloud_tpu_cluster.get_tpu_env_value_from_metadata = lambda key: None
from asymvq_jax.devices import cluster
cluster.join()
from jax.experimental import multihost_utils
print(multihost_utils.process_allgather(jax.process_index()).tolist())
"""


@pytest.mark.parametrize("launcher", LAUNCHED)
def test_processes_find_each_other_by_what_the_launcher_tells(launcher):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    known = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI", "TPU", "JAX_C"))
    }
    known |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_COORDINATOR_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN], env=known | LAUNCHED[launcher](i), cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            out, err = process.communicate(timeout=180)
            assert out.splitlines()[-1:] == ["[0, 1]"], err
    finally:
        for process in processes:
            process.kill()
            process.communicate()


GOOGLE = {"PROJECT": "p", "ZONE": "z", "BUCKET": "gs://b", "NAME": "n"}


def test_tpu_vm_starts_the_same_command_on_all_hosts(tools, monkeypatch, capsys):
    folder = tools(gcloud="echo ACTIVE", sleep="")
    for step in (
        ["create", "--spot"],
        ["train", "--config", "x2", "--model.decoder_channels=64,64, 64,64"],
        ["delete"],
    ):
        result = run(DEPLOY / "tpu_vm.sh", *step, tools=folder, env=GOOGLE)
        assert result.returncode == 0, result.stderr
    calls = [call for call in tools.calls() if call[0] == "gcloud"]
    done = [" ".join(call[3:5]) for call in calls]
    assert done == ["queued-resources create", "queued-resources describe", "tpu-vm ssh", "queued-resources delete"]
    assert "--spot" in calls[0]
    assert all({"--project=p", "--zone=z"} <= set(call) for call in calls)
    assert "--worker=all" in calls[2]
    remote = next(word for word in calls[2] if word.startswith("--command="))
    (words,) = commands(remote.removeprefix("--command="))
    assert "--run.directory=gs://b/runs/n" in words
    assert "--model.decoder_channels=64,64, 64,64" in words
    assert read_options(words, monkeypatch) == 0, capsys.readouterr().err


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_tpu_vm_ends_where_there_is_no_slice(state, tools):
    folder = tools(gcloud=f"echo {state}", sleep="")
    assert run(DEPLOY / "tpu_vm.sh", "create", tools=folder, env=GOOGLE).returncode == 1


def test_tpu_vm_names_what_is_missing(tools):
    result = run(DEPLOY / "tpu_vm.sh", "create", tools=tools(), env={"PROJECT": "p"})
    assert result.returncode != 0
    assert "ZONE" in result.stderr


@pytest.mark.parametrize("file", sorted(DEPLOY.glob("*.Dockerfile")), ids=lambda p: p.name)
def test_images_copy_what_is_there_and_start_the_command(file):
    text = re.sub(r"\\\n", " ", file.read_text())
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert lines[0][0] == "FROM"
    assert {keyword for keyword, _ in lines} <= {"FROM", "RUN", "WORKDIR", "COPY", "ENTRYPOINT"}
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for keyword, rest in lines if keyword == "COPY" for source in rest.split()[:-1]}
    assert copied == sent
    assert all((ROOT / source).exists() for source in copied)
    assert lines[-1] == ["ENTRYPOINT", '["asymvq"]']


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", [".github/workflows/ci.yml"]),
        ("github-issue-forms", [f".github/ISSUE_TEMPLATE/{name}.yml" for name in ("bug", "feature", "quality")]),
        ("github-issue-config", [".github/ISSUE_TEMPLATE/config.yml"]),
        ("citation-file-format", ["CITATION.cff"]),
    ],
)
def test_files_for_others_follow_their_schemas(schema, files):
    result = subprocess.run(
        [tool("check-jsonschema"), "--builtin-schema", f"vendor.{schema}", *files],
        cwd=ROOT, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
