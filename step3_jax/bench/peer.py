"""A PyTorch process with the same weights, and how far its logits are from ours."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from types import TracebackType
from typing import cast

import numpy as np
from jaxtyping import Float, Int

from step3_jax.bench.loop import Ours
from step3_jax.checkpoint.save import save_model
from step3_jax.model.step3 import Step3

# Sums in float32 differ only by rounding; in bfloat16 two almost equally likely experts may also swap.
MAX_ERROR = {"float32": 1e-4, "bfloat16": 0.05}


class TorchPeer:
    """tools/torch_decoder.py in a separate process, with our weights; a context manager."""

    def __init__(self, python: str, model: Step3, dtypes: Sequence[str], threads: int) -> None:
        """Starts the process and passes it the weights through a temporary folder.

        Args:
          python: Interpreter that has torch and numpy.
          model: The model, in float32.
          dtypes: What to measure.
          threads: Threads it may use.

        Raises:
          ValueError: If the script is not there, or the interpreter has no torch.
        """
        script = pathlib.Path(__file__).parents[2] / "tools" / "torch_decoder.py"
        if not script.is_file():
            raise ValueError(f"--torch needs {script}, which is part of a checkout of the project, not of the package")
        if python == sys.executable and importlib.util.find_spec("torch") is None:
            raise ValueError(
                "--torch needs PyTorch: install step3-jax[bench], or name an interpreter that has it with --torch-python"
            )
        try:
            self._process = subprocess.Popen(
                # Its own process group: this process handles Ctrl-C.
                [python, str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                process_group=0,
            )
        except OSError as error:
            raise ValueError(f"--torch-python {python} cannot be started: {error.strerror}") from None
        with tempfile.TemporaryDirectory() as folder:
            save_model(model, pathlib.Path(folder) / "model")
            self.versions = self.ask(
                "open", folder=str(pathlib.Path(folder) / "model"), dtypes=list(dtypes), threads=threads
            )

    def __enter__(self) -> TorchPeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.stdin is not None and self._process.stdout is not None:
            self._process.stdin.close()
            self._process.stdout.close()
        if kind is not None:
            self._process.kill()
        self._process.wait()

    def ask(self, request: str, **values: object) -> dict[str, object]:
        """One request of tools/torch_decoder.py.

        Raises:
          ValueError: If the process ended; what it said is on stderr.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise ValueError("the PyTorch process has no pipes")
        try:
            print(json.dumps({"do": request} | values), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ValueError(
                "the PyTorch process ended (see above): give --torch-python an interpreter with torch and numpy"
            )
        answer: dict[str, object] = json.loads(line)
        return answer

    def logits(self, dtype: str, ids: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T V"]:
        """Logits of every token."""
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "logits.npy")  # noqa: PTH118
            self.ask("logits", dtype=dtype, ids=ids.tolist(), file=file)
            return np.load(file)

    def prefill(self, dtype: str, ids: Int[np.ndarray, "B T"], room: int) -> float:
        """Seconds of prefilling prompts."""
        return cast(float, self.ask("prefill", dtype=dtype, ids=ids.tolist(), room=room)["seconds"])

    def decode(self, dtype: str, steps: int) -> float:
        """Seconds of generating `steps` tokens for each row."""
        return cast(float, self.ask("decode", dtype=dtype, steps=steps)["seconds"])


def check_agreement(ours: Ours, peer: TorchPeer, dtype: str, ids: Int[np.ndarray, "B T"]) -> float:
    """The median over tokens of |ours - peer| / |peer|, both in the euclidean norm over the vocabulary.

    Raises:
      ValueError: If it is above `MAX_ERROR`: then the two do not run the same model, and the times are meaningless.
    """
    mine, theirs = ours.logits(ids), peer.logits(dtype, ids)
    errors = np.linalg.norm(mine - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)
    error = float(np.median(errors))
    if not error <= MAX_ERROR[dtype]:
        raise ValueError(
            f"logits of the {dtype} model differ from PyTorch's by {error:.2e}; at most {MAX_ERROR[dtype]:.0e} is allowed"
        )
    return error
