"""examples/cluster: Dockerfiles, KubeRay's RayJob and the Slurm script, linted and run as far as they can be here."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from helpers import ROOT
from ray.scripts.scripts import cli as ray_cli

from actors.placement import fitted, plan
from onpolicy_skd.config.loading import load_settings

CLUSTER = ROOT / "examples" / "cluster"
RAYJOB = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text(encoding="utf-8"))
RAY_CLUSTER = RAYJOB["spec"]["rayClusterSpec"]
GROUPS = [RAY_CLUSTER["headGroupSpec"], *RAY_CLUSTER["workerGroupSpecs"]]
# Of KubeRay's API reference, ray.io/v1.
JOB_FIELDS = {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec", "backoffLimit",
              "activeDeadlineSeconds", "runtimeEnvYAML", "submissionMode", "suspend", "metadata"}  # fmt: skip
CLUSTER_FIELDS = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs", "autoscalerOptions"}
GROUP_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template"}


def instructions(dockerfile):
    """The (instruction, arguments) pairs of a Dockerfile."""
    text = (CLUSTER / dockerfile).read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]


def copy_sources(dockerfile, folder):
    """Copy into ``folder`` what the Dockerfile copies into the image."""
    for instruction, arguments in instructions(dockerfile):
        if instruction == "COPY":
            *sources, target = arguments.split()
            for file in [file for source in sources for file in ROOT.glob(source)]:
                if file.is_dir():
                    shutil.copytree(file, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(file, folder / target)


def make_command(dockerfile):
    (command,) = (a for i, a in instructions(dockerfile) if i == "RUN" and a.startswith("make "))
    return shlex.split(command.replace('TORCH="$TORCH"', ""))


@pytest.mark.parametrize("dockerfile", ["Dockerfile.cpu", "Dockerfile.gpu"])
def test_hadolint_finds_nothing(dockerfile):
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, CLUSTER / dockerfile], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("dockerfile", ["Dockerfile.cpu", "Dockerfile.gpu"])
def test_an_image_has_the_files_that_its_set_up_reads(dockerfile, tmp_path):
    copy_sources(dockerfile, tmp_path)
    (version,) = (a.split(":")[1].split("-")[0] for i, a in instructions(dockerfile) if i == "FROM")
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}

    def steps(folder):
        command = [*make_command(dockerfile), "-n", f"VERSION={version}", f"VENV={tmp_path / 'none'}"]
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True).stdout

    assert steps(tmp_path) == steps(ROOT)
    backend = dockerfile.rpartition(".")[2]
    lock = re.search(r"-r (requirements-\S+\.lock)", steps(tmp_path)).group(1)
    assert lock.startswith(f"requirements-{backend}")
    for name in ("onpolicy_skd/assets/demo_student/model.safetensors", "actors/workers.py", "configs/demo.yaml", lock):
        assert (tmp_path / name).is_file(), name


@pytest.mark.slow
def test_the_steps_of_the_cpu_image_in_a_fresh_folder(tmp_path):
    """The same commands; packages of the system, the user and the container are left out."""
    copy_sources("Dockerfile.cpu", tmp_path)
    env = {n: v for n, v in os.environ.items() if not n.startswith(("MAKE", "PYTHON", "VIRTUAL_ENV"))}
    subprocess.run([*make_command("Dockerfile.cpu"), f"PYTHON={sys.executable}"], cwd=tmp_path, env=env, check=True)
    env["PATH"] = f"{tmp_path / '.venv' / 'bin'}:{env['PATH']}"
    command = shlex.split(
        "skd train --config demo run.steps=1 learner.batch_size=4 rollout.engine=transformers eval.problems=4 "
        "eval.teacher=false eval.before=false run.evaluate_every=0"
    )
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert "finished after 1 steps" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("group", GROUPS, ids=["head", "workers"])
def test_kubernetes_accepts_the_pods(group):
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
    kubernetes_validate.validate(pod, "1.33", strict=True)
    mounts = {mount["name"] for c in pod["spec"]["containers"] for mount in c["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["spec"]["volumes"]}


def test_the_rayjob_has_no_field_that_kuberay_lacks():
    assert (RAYJOB["apiVersion"], RAYJOB["kind"]) == ("ray.io/v1", "RayJob")
    assert RAYJOB["spec"].keys() <= JOB_FIELDS
    assert RAY_CLUSTER.keys() <= CLUSTER_FIELDS
    assert all(group.keys() <= GROUP_FIELDS for group in GROUPS)
    assert RAY_CLUSTER["authOptions"] == {"mode": "token"}
    locked = re.search(r"^ray==(.*)$", (ROOT / "requirements-gpu.lock").read_text(), re.MULTILINE).group(1)
    assert RAY_CLUSTER["rayVersion"] == locked


def settings_of(command):
    """The settings of a ``skd train`` command."""
    assert command[:2] == ["skd", "train"]
    return load_settings(command[2:])


def node(group):
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}


def test_the_pods_have_room_for_the_run():
    settings = settings_of(shlex.split(RAYJOB["spec"]["entrypoint"]))
    nodes = [node(group) for group in GROUPS for _ in range(group.get("replicas", 1))]
    resources = fitted(plan(settings, sum(n["GPU"] for n in nodes)), nodes)
    assert sum(role.count * role.gpus for role in resources.roles) == 8
    assert str(settings.run.dir).startswith("/shared")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (Debian: shellcheck)")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", CLUSTER / "slurm.sh"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_slurm_script_starts_the_run_on_enough_nodes(tmp_path):
    """The script itself, with Slurm's and Ray's commands replaced by ones that print their arguments."""
    stand_ins = {
        "srun": 'printf "%s\\n" "$@" > arguments',
        "scontrol": "printf 'gpu-3\\ngpu-4\\n'",
        "getent": '[ "$2" = gpu-3 ] && printf "10.0.0.3 STREAM gpu-3\\n10.0.0.3 DGRAM\\n"',
        "ray": '[ "$*" = "get-auth-token --generate" ]',
    }
    (tmp_path / "bin").mkdir()
    for name, text in stand_ins.items():
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
    activate = tmp_path / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text("")
    slurm = {"SLURM_JOB_NODELIST": "gpu-[3-4]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "96"}
    env = os.environ | slurm | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    script = CLUSTER / "slurm.sh"
    subprocess.run(["bash", script, "learner.lr=5e-6"], cwd=tmp_path, env=env, check=True)
    arguments = (tmp_path / "arguments").read_text().splitlines()
    ray, command = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    assert ray == ["--cpus-per-task=96", "ray", "symmetric-run", "--address", "10.0.0.3:6379", "--min-nodes", "2"]
    settings = settings_of(command)
    assert (settings.cluster.address, settings.learner.lr, settings.resume) == ("10.0.0.3:6379", 5e-6, "auto")
    asked = dict(re.findall(r"^#SBATCH --(\S+?)=(\S+)$", script.read_text(), re.MULTILINE))
    hours, minutes, seconds = map(int, asked["time"].split(":"))
    assert hours + minutes / 60 + seconds / 3600 > settings.run.max_hours
    nodes = [{"CPU": 96.0, "GPU": float(asked["gpus-per-node"])}] * int(asked["nodes"])
    fitted(plan(settings, sum(n["GPU"] for n in nodes)), nodes)


def test_ray_has_the_commands_that_the_slurm_script_uses():
    for verb, option in (("symmetric-run", "--min-nodes"), ("get-auth-token", "--generate")):
        assert option in {name for parameter in ray_cli.commands[verb].params for name in parameter.opts}
