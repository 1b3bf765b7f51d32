"""Options of `step3 plan simulate`."""

from __future__ import annotations

import argparse

from step3_jax.cli.dtype import dtype_name
from step3_jax.layout.admission import STEPS_PER_CALL
from step3_jax.layout.payload import PAYLOADS
from step3_jax.planner.shape import KV_DTYPE_BYTES

TIMES = ("ideal", "expected")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "deployment", metavar="DEPLOYMENT", help="a file as in configs/afd, the name of one there (2a2f), or xAyF"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--trace", metavar="FILE.json", help="write the stages, for ui.perfetto.dev")
    parser.add_argument("--picture", metavar="FILE.svg", help="draw the pipeline, as step3 afd trace does")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all random values (default: 0)")
    _add_deployment(parser.add_argument_group("deployment"))
    _add_times(parser.add_argument_group("times of the stages"))
    _add_batch(parser.add_argument_group("a batch that stays full (the default)"))
    _add_requests(parser.add_argument_group("requests that arrive and end"))


def _add_deployment(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", default="step3", metavar="NAME", help="as for step3 plan cost (default: step3)")
    group.add_argument(
        "--devices-per-instance", type=int, metavar="N", help="of an xAyF that is not a file's (default: 8)"
    )
    group.add_argument("--microbatches", type=int, metavar="N", help="in flight (default: the file's)")
    group.add_argument("--hardware", metavar="NAME", help="of configs/hardware, for both sides (default: the file's)")
    group.add_argument("--attention-hardware", metavar="NAME", help="of the attention side")
    group.add_argument("--ffn-hardware", metavar="NAME", help="of the FFN side")
    dtypes = tuple(KV_DTYPE_BYTES)
    group.add_argument("--kv-dtype", type=dtype_name(dtypes), choices=dtypes, help="KV cache (default: the file's)")
    group.add_argument(
        "--payload",
        type=dtype_name(PAYLOADS),
        choices=PAYLOADS,
        help="format of what attention sends to the FFN side (default: the file's)",
    )
    group.add_argument(
        "--network-gb-s",
        type=float,
        metavar="X",
        help="network of a device, each way (default: the hardware's)",
    )
    group.add_argument("--latency-us", type=float, default=0.0, metavar="X", help="latency of each way (default: 0)")
    group.add_argument(
        "--lockstep",
        action="store_true",
        help="as executor program: one exchange per tick, for which both sides wait; 1A1F",
    )
    group.add_argument(
        "--exchange-on-core",
        action="store_true",
        help="with --lockstep: the exchange takes the cores' time, as on CPUs",
    )


def _add_times(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--times",
        choices=TIMES,
        help="ideal times of the roofline, or those that published runs reached (default: expected)",
    )
    for name, what in (
        ("attention", "attention"),
        ("to-ffn", "the way to the FFN side"),
        ("ffn", "the FFN"),
        ("to-attention", "the way back"),
    ):
        group.add_argument(
            f"--{name}-us", type=float, metavar="X", help=f"{what} of one layer of a micro-batch, instead of hardware"
        )
    group.add_argument(
        "--tpot-ms",
        type=float,
        metavar="X",
        help="choose stages that give exactly this time per token: arithmetic, not a prediction",
    )
    group.add_argument(
        "--stage-times", metavar="FILE", help="measured times: a trace of step3 afd trace, or JSON (docs/planning.md)"
    )
    group.add_argument(
        "--head-us", type=float, metavar="X", help="head and sampling of a micro-batch, between two steps (default: 0)"
    )
    group.add_argument(
        "--jitter", type=float, metavar="X", help="deviation of attention and FFN times over their mean: 0.05 for 5 %%"
    )
    group.add_argument("--network-jitter", type=float, metavar="X", help="the same for both ways")


def _add_batch(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--batch", type=int, metavar="N", help="sequences in all (default: the file's workload)")
    group.add_argument("--context", metavar="N", help="mean tokens of each; 8k is 8,192 (default: the file's workload)")
    group.add_argument("--steps", type=int, metavar="N", help="decode steps (default: 32)")


def _add_requests(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--requests",
        metavar="FILE",
        help='JSON lines {"prompt_tokens": N, "output_tokens": N}, with "arrival_s" or not',
    )
    group.add_argument("--rate", type=float, metavar="X", help="requests per second, at random times")
    group.add_argument(
        "--concurrency", type=int, metavar="N", help="requests at a time; the next starts when one has ended"
    )
    group.add_argument("--num-requests", type=int, metavar="N", help="without a file (default: 100)")
    group.add_argument("--prompt-tokens", metavar="N", help="of each, without a file; 4k is 4,096")
    group.add_argument("--output-tokens", metavar="N", help="of each, without a file; 4k is 4,096")
    group.add_argument(
        "--decode-only", action="store_true", help="prompts come with their KV cache, prefilled elsewhere"
    )
    group.add_argument(
        "--kv-cache-tokens", metavar="N", help="tokens of KV cache on all devices (default: as plan memory computes)"
    )
    group.add_argument("--max-num-seqs", type=int, metavar="N", help="as for the engine (default: the file's workload)")
    group.add_argument("--max-num-batched-tokens", type=int, metavar="N", help="as for the engine")
    group.add_argument("--long-prefill-token-threshold", type=int, metavar="N", help="as for the engine")
    group.add_argument("--max-num-queued-reqs", type=int, metavar="N", help="as for the service")
    group.add_argument(
        "--stream-interval",
        type=int,
        metavar="N",
        help=f"as for the engine; {STEPS_PER_CALL} for answers that are not streamed",
    )
    group.add_argument("--max-call-ms", type=float, metavar="MS", help="longest decode call (default: no limit)")
