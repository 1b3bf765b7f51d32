"""The shipped tiny model on the device at hand, through `LLM`: the demo's questions, and the answers that ship with them.

Few kernels take its sizes (heads of 64), so it checks the rest of what a user runs: loading into stacks, the loops over
them, the tower, the cache, the scheduler and the sampler. In float32, with products in full precision, the answers must be
those that a CPU gave, letter by letter. How many are in bfloat16, its checkpoint's dtype, is reported and not judged.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax

from step3_jax import resources

if TYPE_CHECKING:
    import pathlib

    from tools.demo import Example

# Called with what comes next, or with what is known already.
Say = Callable[..., None]

MODEL = "models/step3-tiny"
# Enough for every question, so that few sizes are compiled.
SETTINGS = {"max_model_len": 512, "max_num_seqs": 1}
# Seconds of silence allowed on a GPU: a question may be the first that needs some programs.
COMPILING_S = 180.0


def answer_questions(mode: str, say: Say, report: Say, *, is_quick: bool, deadline: float) -> dict[str, object]:
    """Asks all questions in float32, and then in bfloat16.

    Args:
      mode: "gpu" or "interpret": on a CPU the same without kernels.
      say: Called with what comes next.
      report: Called with what is known already.
      is_quick: Whether to ask only the first question with an image and the first without, and in float32 alone.
      deadline: `time.time()` after which nothing new is started.
    """
    try:
        # The kernels' own checks run without the model and its libraries.
        from tools.demo import read_examples  # noqa: PLC0415
    except ModuleNotFoundError as error:
        return {"status": "SKIPPED", "reason": f"the model needs {error.name}: pip install -e ."}

    folder = resources.find(MODEL)
    examples = [example for example in read_examples(folder / "examples") if example.answer is not None]
    if is_quick:
        with_image, without = ([one for one in examples if (one.image is not None) is kind] for kind in (True, False))
        examples = [*with_image[:1], *without[:1]]
    allowed_s = COMPILING_S if mode == "gpu" else None
    with jax.default_matmul_precision("highest"):
        wrong = ask_all(folder, examples, "float32", say, allowed_s)
    num_right = len(examples) - len(wrong)
    result: dict[str, object] = {
        "status": "FAIL" if wrong else "PASS",
        "answers": len(examples),
        "equal": num_right,
        "reason": "; ".join([f"{num_right} of {len(examples)} answers as they ship, float32", *wrong[:2]]),
    }
    if wrong or is_quick or time.time() > deadline:
        return result
    report(**result)
    num_right = len(examples) - len(ask_all(folder, examples, "bfloat16", say, allowed_s))
    return {**result, "equal_bfloat16": num_right, "reason": f"{result['reason']}; {num_right} in bfloat16"}


def ask_all(
    folder: pathlib.Path, examples: list[Example], dtype: str, say: Say, allowed_s: float | None = None
) -> list[str]:
    """Asks questions greedily; the answers that differ from those that ship, in words."""
    from step3_jax.engine.llm import LLM  # noqa: PLC0415
    from tools.demo import ask  # noqa: PLC0415

    say(f"loading the tiny model in {dtype}", allowed_s)
    llm = LLM(folder, dtype=dtype, **SETTINGS)
    wrong = []
    for number, example in enumerate(examples, 1):
        say(f"question {number} of {len(examples)} in {dtype}", allowed_s)
        answer = ask(llm, folder, example)
        if answer != example.answer:
            wrong.append(f"{example.prompt} {answer!r} instead of {example.answer!r}")
    return wrong
