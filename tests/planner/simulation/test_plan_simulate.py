"""`step3 plan simulate`: what it prints, what it refuses, and that it needs no jax."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys

import pytest

from step3_jax.cli.main import main
from step3_jax.timeline.trace import measure, read_trace


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert main(["plan", "simulate", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def test_it_answers_without_jax() -> None:
    code = (
        "import sys; from step3_jax.cli.main import main; code = main(['plan', 'simulate', '2a2f', '--json']); "
        "assert 'jax' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["deployment"] == "2a2f"


def test_the_page_shows_what_is_printed(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    page = (pathlib.Path(__file__).parents[3] / "docs" / "planning.md").read_text()
    section = page[page.index("## The pipeline, event by event") :]
    command = next(line for line in section.splitlines() if line.startswith("step3 plan simulate"))
    words = command.replace("simulated.svg", str(tmp_path / "simulated.svg")).split()[1:]
    assert main(words) == 0
    assert capsys.readouterr().out in section
    drawn = pathlib.Path(__file__).parents[3] / "docs" / "simulated.svg"
    assert (tmp_path / "simulated.svg").read_text() == drawn.read_text()


def test_the_papers_deployment_with_published_shares_gives_its_throughput(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "2a2f", "--hardware", "h800")
    assert found["tokens_per_s_per_device"] == pytest.approx(4039, rel=0.01)
    assert found["measured_on_gpu_by_this_project"] is False
    ideal = answer(capsys, "2a2f", "--hardware", "h800", "--times", "ideal")
    assert float(str(ideal["tokens_per_s_per_device"])) > 1.5 * 4039


def test_a_time_per_token_is_turned_into_throughput(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "4a2f", "--tpot-ms", "48.4")
    assert found["tokens_per_s_per_device"] == pytest.approx(2643, rel=0.03)
    assert "arithmetic, not a prediction" in str(found["times_from"])


def test_given_times_jitter_and_seed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["1a1f", "--attention-us", "300", "--ffn-us", "250", "--to-ffn-us", "40", "--to-attention-us", "80"]
    constant = answer(capsys, *words)
    assert constant["tpot_ms"] == pytest.approx(dict.fromkeys(("mean", "p50", "p90", "p99"), 61 * 3 * 0.3))
    spread = [answer(capsys, *words, "--jitter", "0.2", "--seed", seed)["tpot_ms"] for seed in ("1", "1", "2")]
    assert spread[0] == spread[1] != spread[2]
    ticks = answer(capsys, *words, "--lockstep")
    assert ticks["tpot_ms"] == pytest.approx(dict.fromkeys(("mean", "p50", "p90", "p99"), 61 * 3 * 0.33))


def test_requests_are_served_and_counted(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    lengths = ["--prompt-tokens", "500", "--output-tokens", "20", "--num-requests", "12"]
    found = answer(capsys, "1a1f", "--rate", "50", *lengths)
    assert found["requests"] == 12
    assert found["ttft_ms"] is not None
    closed = answer(capsys, "1a1f", "--concurrency", "3", *lengths, "--decode-only")
    assert closed["most_running"] == 3
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt_tokens": 100, "output_tokens": 5, "arrival_s": 1.5}\n' * 4)
    traced = answer(capsys, "1a1f", "--requests", str(file), "--max-num-queued-reqs", "3")
    assert traced["requests"] == 3
    assert traced["rejected"] == 1
    assert main(["plan", "simulate", "1a1f", "--requests", str(file)]) == 0
    assert "4 requests ended" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more",
    [[], ["--lockstep"], ["--rate", "50", "--prompt-tokens", "9", "--output-tokens", "9", "--num-requests", "9"]],
)
def test_the_trace_is_of_the_form_that_the_picture_is_drawn_from(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, more: list[str]
) -> None:
    trace, picture = tmp_path / "trace.json", tmp_path / "pipeline.svg"
    steps = [] if "--rate" in more else ["--steps", "4"]
    files = ["--trace", str(trace), "--picture", str(picture)]
    assert main(["plan", "simulate", "1a1f", *steps, *files, *more]) == 0
    assert 0.5 < measure(read_trace(trace)).efficiency <= 1
    assert "Simulated 1A1F" in picture.read_text()
    # A simulation's output can be simulated again.
    assert main(["plan", "simulate", "1a1f", "--stage-times", str(trace), "--steps", "3"]) == 0
    assert "measured: " in capsys.readouterr().out


def test_a_file_and_the_command_line_name_the_devices_of_both_sides(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    text = "afd: 2a2f\ndevices_per_instance: 8\nweights: fp8\nkv_cache: fp8\nhardware: h20\nffn_hardware: h800\n"
    file = tmp_path / "mixed.yaml"
    file.write_text(text + "device_memory_gib: 80\nworkload: {sequences: 3072, context_tokens: 8192}\n")
    found = answer(capsys, str(file), "--steps", "3")
    assert "attention on h20, FFN on h800" in str(found["times_from"])
    changed = answer(capsys, str(file), "--steps", "3", "--attention-hardware", "h200", "--ffn-hardware", "h20")
    assert "attention on h200-sxm, FFN on h20" in str(changed["times_from"])
    # The file's 80 GiB are those of its own device.
    assert int(str(changed["kv_cache_tokens"])) > 1.5 * int(str(found["kv_cache_tokens"]))
    assert found["fits"] is True


def test_a_batch_that_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "simulate", "2a2f", "--kv-dtype", "bf16", "--steps", "3"]) == 0
    assert "DOES NOT FIT: 25,165,824 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("2b2f", "did you mean 2a2f"),
        ("8gpu-fp8-48gb", "attention and FFN on the same devices"),
        ("2a3f --batch 8 --context 4k", "give --hardware"),
        ("2a2f --devices-per-instance 4", "already says how many"),
        ("2a2f --hardware h9000", "did you mean h800"),
        ("2a2f --model step4", "did you mean step3"),
        ("2a2f --context 5x", "no unit x"),
        ("2a2f --context 70000", "positions for 65,536"),
        ("2a2f --batch 0", "--batch 0: at least 1"),
        ("2a2f --batch 2", "cannot be cut into 3"),
        ("2a2f --steps 2", "--steps 2: at least 3"),
        ("2a2f --microbatches 5", "allowed: 1 to 4"),
        ("2a2f --seed -1", "--seed -1"),
        ("2a2f --latency-us -1", "at least 0"),
        ("2a2f --network-gb-s 0", "above 0"),
        ("2a2f --hardware cpu-2-socket --times ideal", "give --network-gb-s"),
        ("2a2f --jitter -1", "at least 0"),
        ("2a2f --tpot-ms 0", "above 0"),
        ("2a2f --tpot-ms 50 --attention-us 3", "give one of them"),
        ("2a2f --attention-us 3", "--ffn-us is missing"),
        ("2a2f --attention-us nan --ffn-us 3", "at least 0"),
        ("2a2f --lockstep", "simulated for 1A1F"),
        ("1a1f --exchange-on-core", "add --lockstep"),
        ("2a2f --rate 3", "give --prompt-tokens and --output-tokens"),
        ("2a2f --rate 0 --prompt-tokens 3 --output-tokens 3", "above 0"),
        ("2a2f --rate 3 --concurrency 3 --prompt-tokens 3 --output-tokens 3", "give one of them"),
        ("2a2f --rate 3 --prompt-tokens 0 --output-tokens 3", "--prompt-tokens 0: a whole number"),
        ("2a2f --rate 3 --prompt-tokens 70000 --output-tokens 3", "positions for 65,536"),
        ("2a2f --rate 3 --batch 3", "leave one of them out"),
        ("2a2f --prompt-tokens 3 --output-tokens 3", "give a rate"),
        ("2a2f --tpot-ms 50 --rate 3 --prompt-tokens 3 --output-tokens 3", "give --kv-cache-tokens"),
        (
            "2a2f --tpot-ms 50 --rate 3 --prompt-tokens 3 --output-tokens 3 --kv-cache-tokens 100000",
            "add --decode-only",
        ),
        ("2a2f --rate 3 --prompt-tokens 3 --output-tokens 3 --max-num-seqs 0", "max_num_seqs"),
        ("2a2f --rate 3 --prompt-tokens 3 --output-tokens 3 --max-num-queued-reqs 0", "0 requests that run or wait"),
        ("2a2f --picture pipeline.png", "ends in .svg"),
        ("2a2f --stage-times none.json", "none.json cannot be read"),
    ],
)
def test_what_cannot_be_is_refused(capsys: pytest.CaptureFixture[str], words: str, said: str) -> None:
    assert main(["plan", "simulate", *words.split()]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt_tokens": 5, "output_tokens": 5, "arrival_s": 0}\n{"prompt_tokens": 5, "outp', "line 2: .* cut off"),
        ('{"prompt_tokens": 5, "output_tokens": 0, "arrival_s": 0}\n', "line 1: output_tokens is 0"),
        ('{"prompt_tokens": 65537, "output_tokens": 1, "arrival_s": 0}\n', "line 1: a prompt of 65,537 tokens"),
        ('{"prompt_tokens": 5, "output_tokens": 5}\n', "give a rate"),
    ],
)
def test_a_wrong_line_of_a_trace_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, text: str, said: str
) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text(text)
    assert main(["plan", "simulate", "2a2f", "--requests", str(file)]) == 2
    assert re.search(said, capsys.readouterr().err)
