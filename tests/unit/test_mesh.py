"""The devices that a program finds, in separate processes: their number is fixed once JAX computes."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from step3_jax.mesh import _missing_platform
from tests.process import ROOT, environment


def run(program: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        env=environment(**more),
        capture_output=True,
        text=True,
        check=False,
    )


COUNT = """
    from step3_jax.mesh import find_devices
    print(len(find_devices({count})))
"""


@pytest.mark.parametrize(
    ("count", "more", "found"),
    [
        (4, {}, 4),
        (4, {"STEP3_CPU_DEVICES": "3"}, 3),
        (1, {"STEP3_CPU_DEVICES": "3"}, 3),
        (4, {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, 2),
    ],
)
def test_a_cpu_looks_like_as_many_devices_as_are_wanted(count: int, more: dict[str, str], found: int) -> None:
    done = run(COUNT.format(count=count), **more)
    assert (done.stdout, done.stderr) == (f"{found}\n", "")


def test_a_number_that_the_program_has_chosen_itself_stays() -> None:
    program = "import jax; jax.config.update('jax_num_cpu_devices', 2)" + textwrap.dedent(COUNT.format(count=4))
    assert run(program, STEP3_CPU_DEVICES="3").stdout == "2\n"


def test_the_library_reads_the_number_as_the_command_does() -> None:
    program = """
        from step3_jax.afd.topology import AfdTopology
        from step3_jax.layout.deployment import parse_topology
        from step3_jax.mesh import make_layout
        from step3_jax.layout.parallel import Parallel
        print(make_layout(Parallel(tp=4, ep=1)).mesh.size, AfdTopology.of(parse_topology("2a2f")).num_attention)
    """
    assert run(program).stdout == run(program, STEP3_CPU_DEVICES="4").stdout == "4 2\n"


def test_too_few_devices_come_with_advice_that_works() -> None:
    program = """
        import jax
        {before}
        jax.numpy.ones(1)
        from step3_jax.mesh import make_layout
        from step3_jax.layout.parallel import Parallel
        try:
            print(make_layout(Parallel(tp=4, ep=1)).mesh.size)
        except ValueError as error:
            print(error)
    """
    refused = run(program.format(before="")).stdout
    assert "needs 4 devices, and there are 1 (cpu)" in refused
    advice = 'jax.config.update("jax_num_cpu_devices", 4)'
    assert advice in refused
    assert "STEP3_CPU_DEVICES=4 before the program starts" in refused
    assert run(program.format(before=advice)).stdout == "4\n"


@pytest.mark.parametrize(
    ("platform", "said"),
    [("cuda", "pip install 'step3-jax[cuda13]'"), ("no-such", "JAX_PLATFORMS is 'no-such'")],
)
def test_a_platform_that_is_not_there_is_named_with_what_to_do(platform: str, said: str) -> None:
    done = run(
        """
        from step3_jax.cli.main import main
        raise SystemExit(main(["generate", "-p", "hi"]))
        """,
        JAX_PLATFORMS=platform,
    )
    if "cuda" in platform and "CUDA plugin is installed" in done.stderr:
        pytest.skip("this environment has the plugin for GPUs")
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.startswith("step3: error: ")
    assert done.stderr.count("\n") == 1


def test_a_plugin_without_a_gpu_is_another_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    said = _missing_platform("cuda", "Unable to initialize backend 'cuda': no supported devices found")
    assert "no supported devices found" in said
    assert "nvidia-smi" in said
    assert "pip install" not in said
