"""Attention and FFN in separate processes over gloo: the fused model's tokens, everything where it belongs."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import pytest

from step3_jax.beacon import BeaconFile, read_beacon
from tests.afd.conftest import PROGRAMS
from tests.process import ROOT, environment, free_port, run_together

Answer = dict

# All with the same programs.
PAIR = [
    {"do": "tokens", "afd": "1a1f", "microbatches": 2},
    {"do": "features", "afd": "1a1f", "microbatches": 2},
    {"do": "repeat", "afd": "1a1f", "microbatches": 2},
    {"do": "guesses", "afd": "1a1f", "microbatches": 2},
    {"do": "places", "afd": "1a1f", "microbatches": 2},
    {"do": "loaded", "afd": "1a1f", "folder": str(ROOT / "tests" / "goldens" / "tiny_text")},
    {"do": "hlo", "afd": "1a1f", "microbatches": 2, "rows": 4, "storage": "float32"},
    {"do": "callbacks", "afd": "1a1f", "microbatches": 2},
]
OTHER_MICROBATCHES = [
    {"do": "tokens", "afd": "1a1f", "microbatches": 1, "together": True},
    {"do": "tokens", "afd": "1a1f", "microbatches": 3, "layers": 3, "together": True},
    {"do": "tokens", "afd": "1a1f", "microbatches": 4, "together": True},
]
MORE_PAIR = [
    {"do": "hlo", "afd": "1a1f", "microbatches": count, "storage": storage} | rows
    for count, storage, rows in (
        (3, "float32", {}),
        (4, "float32", {"rows": 4}),
        (1, "bfloat16", {"rows": 1}),
        (2, "fp8", {"rows": 4}),
    )
]


def run_ranks(num_processes: int, cases: Sequence[Answer], **more: str | list[str]) -> list[list[Answer]]:
    """What each process answers to the cases; a variable in `more` may have a value for each process."""
    own = {
        "STEP3_COORDINATOR": f"127.0.0.1:{free_port()}",
        "STEP3_NUM_PROCESSES": str(num_processes),
        "STEP3_CPU_DEVICES": "1",
    }
    variables = []
    for rank in range(num_processes):
        each = {name: value if isinstance(value, str) else value[rank] for name, value in more.items()}
        variables.append(environment(**(own | {"STEP3_PROCESS_ID": str(rank)} | each)))
    return run_together(PROGRAMS / "program_rank.py", [json.dumps(cases)], variables)  # type: ignore[return-value]


def assert_as_fused(answers: Sequence[Answer]) -> None:
    """Process 0 has the fused model's tokens, and the others none: they only work for it."""
    assert answers[0]["fused"]
    assert answers[0]["afd"] == answers[0]["fused"]
    assert not any(answer.get("afd") for answer in answers[1:])


def make_beacons(folder: pathlib.Path, count: int) -> list[pathlib.Path]:
    """The files behind the ranks' beacons, as a keeper makes them."""
    paths = [folder / str(rank) for rank in range(count)]
    for path in paths:
        with path.open("w+b") as file:
            BeaconFile(file).close()
    return paths


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[list[Answer]]:
    """The answers to `PAIR` of each of two processes, which a keeper watches."""
    beacons = make_beacons(tmp_path_factory.mktemp("beacons"), 2)
    return run_ranks(2, PAIR, STEP3_BEACON=[str(path) for path in beacons])


def answers_to(answers: list[list[Answer]], cases: Sequence[Answer], do: str) -> list[Answer]:
    """Each process's answer to the first case of a name."""
    index = next(index for index, case in enumerate(cases) if case["do"] == do)
    return [own[index] for own in answers]


@pytest.mark.parametrize("do", ["tokens", "features"])
def test_tokens_are_those_of_the_fused_model(pair: list[list[Answer]], do: str) -> None:
    assert_as_fused(answers_to(pair, PAIR, do))


@pytest.mark.thorough
def test_tokens_do_not_depend_on_the_number_of_micro_batches() -> None:
    for answers in zip(*run_ranks(2, OTHER_MICROBATCHES), strict=True):
        assert_as_fused(answers)


def test_guesses_change_nothing_of_the_tokens(pair: list[list[Answer]]) -> None:
    answers = answers_to(pair, PAIR, "guesses")
    assert_as_fused(answers)
    assert answers[0]["accepted"] > 0


def test_nothing_is_compiled_after_warm_up(pair: list[list[Answer]]) -> None:
    for found in answers_to(pair, PAIR, "repeat"):
        assert found["before"]["decode"] >= 1
        assert found["before"] == found["after"]


def test_a_process_holds_what_its_role_needs(pair: list[list[Answer]]) -> None:
    attention, ffn = answers_to(pair, PAIR, "places")
    # Embedding, norm and head; norms, MFA and router; dense layer and experts.
    assert attention["placed"] == {"ends": 3, "attention": 17, "ffn": 0}
    assert ffn["placed"] == {"ends": 0, "attention": 0, "ffn": 9}
    assert attention["cache"] == 2 * 2 * 38 * 64 * 16
    assert ffn["cache"] == 0
    assert ffn["weights"] == 32 * (3 * 48 + 3 * 16 + 3 * 6 * 16)


def test_a_process_reads_what_its_role_needs(pair: list[list[Answer]]) -> None:
    attention, ffn = (set(found["read"]) for found in answers_to(pair, PAIR, "loaded"))
    assert not attention & ffn
    assert "model.embed_tokens.weight" in attention
    assert all(".mlp." in name or ".moe." in name or ".share_expert." in name for name in ffn)
    assert any(".moe.down_proj" in name for name in ffn)


def test_no_copy_of_the_cache_is_in_the_decode_loop(pair: list[list[Answer]]) -> None:
    done = answers_to(pair, PAIR, "hlo")[0]["done"]
    # Keys and values of two layers, whatever the number of micro-batches.
    assert done["scatter"] == 4
    assert set(done) <= {"parameter", "get-tuple-element", "scatter", "dynamic-update-slice", "fusion"}


def test_no_host_takes_part_in_a_step(pair: list[list[Answer]]) -> None:
    assert [found["count"] for found in answers_to(pair, PAIR, "callbacks")] == [0, 0]


# Three processes; four are tested below, and the exchange by itself in one.
@pytest.mark.slow
def test_two_attention_processes_share_an_ffn_process(tmp_path: pathlib.Path) -> None:
    beacons = make_beacons(tmp_path, 3)
    cases = [{"do": kind, "afd": "2a1f", "microbatches": 3} for kind in ("tokens", "callbacks")]
    answers = run_ranks(3, cases, STEP3_BEACON=[str(path) for path in beacons], STEP3_TRACE_STEPS="1")
    assert_as_fused([answer[0] for answer in answers])
    assert all(answer[1]["count"] for answer in answers)
    # With tracing, outsiders know how far each process got.
    readings = [read_beacon(path) for path in beacons]
    assert len({(reading.step, reading.exchange) for reading in readings}) == 1
    assert readings[0].step >= 9
    assert readings[0].exchange > 0


@pytest.mark.slow  # Four processes on two cores; the defaults have both sides with two processes, one at a time.
def test_two_attention_processes_and_two_ffn_processes() -> None:
    cases = [{"do": kind, "afd": "2a2f", "microbatches": 2} for kind in ("tokens", "places", "guesses")]
    answers = run_ranks(4, cases)
    for index in (0, 2):
        assert_as_fused([answer[index] for answer in answers])
    assert answers[0][2]["accepted"] > 0
    weights = [answer[1]["weights"] for answer in answers]
    assert weights[0] == weights[1]
    # Half of the experts each, and a copy of the dense layer and the shared expert.
    assert weights[2] == weights[3] == 32 * (3 * 48 + 3 * 16 + 3 * 3 * 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_processes", "cpu_devices", "case"),
    [
        (3, 1, {"afd": "1a2f", "microbatches": 4}),
        (3, 1, {"afd": "1a2f", "microbatches": 2, "parallel": [1, 2, 1]}),
        (4, 1, {"afd": "2a2f", "microbatches": 4, "layers": 3, "parallel": [1, 2, 2]}),
        (4, 1, {"afd": "1a1f", "devices": 2, "microbatches": 3, "count": 1}),
        (4, 1, {"afd": "1a3f", "microbatches": 1}),
        # A process with all devices of its role.
        (2, 2, {"afd": "1a1f", "devices": 2, "microbatches": 3}),
    ],
    ids=str,
)
def test_other_topologies(num_processes: int, cpu_devices: int, case: Answer) -> None:
    answers = run_ranks(num_processes, [{"do": "tokens"} | case], STEP3_CPU_DEVICES=str(cpu_devices))
    assert_as_fused([answer for [answer] in answers])


@pytest.mark.slow
def test_no_copy_of_the_cache_with_other_rows_and_formats() -> None:
    for found in run_ranks(2, MORE_PAIR)[0]:
        done = found["done"]
        assert done["scatter"] >= 4
        assert set(done) <= {"parameter", "get-tuple-element", "scatter", "dynamic-update-slice", "fusion"}


@pytest.mark.slow
def test_the_shipped_model_sees_pictures_on_two_attention_processes() -> None:
    answers = run_ranks(3, [{"do": "shipped", "afd": "2a1f"}])
    assert_as_fused([answer for [answer] in answers])
    assert "6267" in answers[0][0]["afd_text"]


@pytest.mark.slow
@pytest.mark.parametrize("payload", ["bfloat16", "fp8"])
def test_the_shipped_model_answers_alike_with_a_narrow_payload(payload: str) -> None:
    answers = run_ranks(2, [{"do": "shipped", "afd": "1a1f", "payload": payload}])
    assert_as_fused([answer for [answer] in answers])
