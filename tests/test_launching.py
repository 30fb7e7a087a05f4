"""The files in launch/ and docs/launching.md name commands, options, keys and exit codes that exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from jaxreset.cli import app
from jaxreset.config_file import load_config
from jaxreset.errors import PREEMPTED
from jaxreset.parallel.processes import _in_a_job

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
DOCS = (ROOT / "docs" / "launching.md").read_text()
TASK = {  # what `srun` gives the second of two tasks
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


def options(command):
    """The flags of `jaxreset COMMAND`."""
    parameters = typer.main.get_command(app).commands[command].params
    return {flag for parameter in parameters for flag in parameter.opts}


def takes(arguments):
    """Whether `jaxreset train` would take them; its config."""
    flags = [x for x in arguments if x.startswith("-")]
    assert set(flags) <= options("train")
    config, *overrides = (x for x in arguments if not x.startswith("-"))
    return load_config(ROOT / config, overrides)


def test_the_jobset_trains_on_as_many_chips_as_its_slice_has():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    [workers] = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert container["command"][:2] == ["jaxreset", "train"]
    config = takes(container["command"][2:])
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert rows * columns == chips == config.mesh.fsdp * config.mesh.tensor
    assert job["completions"] == job["parallelism"]
    assert config.train.prompts_per_step % config.mesh.fsdp == 0
    assert config.eval.batch % config.mesh.fsdp == 0
    [code, _] = job["podFailurePolicy"]["rules"]
    assert code["onExitCodes"]["values"] == [PREEMPTED]
    assert code["onExitCodes"]["containerName"] == container["name"]
    [mount] = container["volumeMounts"]
    shared = (config.run.dir, config.model.path, config.data.path)
    assert all(path.startswith(mount["mountPath"]) for path in shared)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("name", ["slurm.sbatch", "slurm_here.sh"])
def test_the_scripts_are_bash(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)


def test_the_scripts_run_what_there_is():
    batch = (LAUNCH / "slurm.sbatch").read_text()
    assert 'jaxreset train "$@"' in batch
    assert f'"$code" = {PREEMPTED}' in batch
    [tiny] = re.findall(r"tiny=\((.*?)\)", (LAUNCH / "slurm_here.sh").read_text(), re.DOTALL)
    config = takes([*shlex.split(tiny), "train.steps=2", "run.dir=x"])
    assert (config.mesh.data, config.train.steps) == (4, 2)


def test_the_page_names_keys_options_and_files_that_exist():
    key = r"\b((?:model|data|run|mesh|train|eval|task|sampling)(?:\.[a-z_]+)+)"
    keys = set(re.findall(key + r"\b(?![/-])", DOCS))
    assert {"mesh.fsdp", "run.compile_cache", "eval.batch"} <= keys
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    for name in keys - {"train.jsonl", "train.log"}:
        value = config
        for part in name.split("."):
            assert part in type(value).model_fields, name
            value = getattr(value, part)
    for command in re.findall(r"jaxreset train (.*)", DOCS):
        assert set(re.findall(r"(?<!\S)--[a-z-]+", command)) <= options("train"), command
    for file in re.findall(r"\]\((?!http)([^)]+)\)", DOCS):
        assert (ROOT / "docs" / file).exists(), file
    assert f"| {PREEMPTED} |" in DOCS


def test_a_job_is_noticed_by_what_its_launcher_sets(monkeypatch):
    for variable in (*TASK, "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    assert not _in_a_job()
    for variable, value in TASK.items():
        assert not _in_a_job(), "not before all of them are there"
        monkeypatch.setenv(variable, value)
    assert _in_a_job()


def test_a_job_is_noticed_by_the_address_of_its_first_process(monkeypatch):
    for variable in TASK:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "node001:1234")
    assert _in_a_job()
