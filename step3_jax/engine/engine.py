"""Calls from many threads on one core: each waits for its own outputs, and one that waits steps for all."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from step3_jax.engine.core import EngineCore
from step3_jax.engine.grammar import ConstraintMaker
from step3_jax.engine.output import OutputProcessor
from step3_jax.engine.request import (
    CompletionOutput,
    Prompt,
    Request,
    RequestMetrics,
    RequestOutput,
    SequenceOutput,
    StreamPiece,
)
from step3_jax.engine.warm_up import Progress
from step3_jax.sampling.params import SamplingParams
from step3_jax.text.tokenizer import Tokenizer


class Event(NamedTuple):
    """Something that happened in a call.

    Attributes:
      piece: New output of a completion; None if only a request ended.
      output: The whole output of a request that has ended; None while it goes on.
      is_refused: Whether the request was refused before anything was computed.
    """

    piece: StreamPiece | None
    output: RequestOutput | None
    is_refused: bool = False


class Refused(NamedTuple):
    """A prompt that never becomes a request.

    Attributes:
      prompt: What is known of it, or None.
      error: The reason.
    """

    prompt: Prompt | None
    error: str


class Engine:
    """One core, driven by the threads that wait for it: one of them steps at a time, and each step serves all.

    Attributes:
      core: The core.
    """

    def __init__(
        self, core: EngineCore, tokenizer: Tokenizer | None, eos_ids: tuple[int, ...], constraints: ConstraintMaker
    ) -> None:
        """Takes a core, of which it is the only stepper.

        Args:
          core: The core.
          tokenizer: Makes text; None gives only token ids.
          eos_ids: The model's own end tokens.
          constraints: Makes the requests' constraints.
        """
        self.core = core
        self._constraints = constraints
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        # Notified whenever a step has ended. A lock held while stepping would not do: the stepping thread would take it
        # again before others wake, and they would get their outputs late.
        self._turn = threading.Condition()
        self._is_stepping = False
        self._numbers = itertools.count()

    def check(self, request: Request) -> None:
        """Raises ValueError if a request cannot be served; the message says what would be."""
        self.new_processor().check(request)
        self.core.check(request)

    def new_processor(self) -> OutputProcessor:
        """Turns the core's outputs into text, for one thread."""
        return OutputProcessor(self._tokenizer, self._eos_ids)

    def has_grammar(self, params: SamplingParams) -> bool:
        """Whether `new_request` has no grammar to compile; never waits."""
        return self._constraints.is_ready(params)

    def new_request(
        self, prompt: Prompt, params: SamplingParams, seed: int, steps_per_call: int, *, must_fit: bool = False
    ) -> Request:
        """A request with an id of its own.

        Raises:
          ValueError: If its output format cannot be enforced. Compiling it may take seconds.
        """
        constraint = self._constraints.make(prompt, params)
        return Request(str(next(self._numbers)), prompt, params, seed, steps_per_call, must_fit, constraint)

    def run(self, requests: Iterable[Request | Refused]) -> Iterator[Event]:
        """Runs requests; leaving the iterator early aborts the unfinished ones.

        Args:
          requests: In order. They are taken only as there is room for them, as making one may take long and need memory.

        Yields:
          Events of all requests, as they arrive. A request that cannot be served has one output, with its error.
        """
        processor = self.new_processor()
        outputs: queue.SimpleQueue[SequenceOutput] = queue.SimpleQueue()
        source = enumerate(requests)
        # Enough for all slots, and as many to follow while the next are made.
        most = 2 * self.core.config.max_num_seqs
        try:
            is_exhausted = False
            while True:
                while not is_exhausted and len(processor) < most:
                    place, request = next(source, (0, None))
                    if request is None:
                        is_exhausted = True
                    else:
                        refusal = self._add(request, place, processor, outputs)
                        if refusal is not None:
                            yield Event(None, refusal, is_refused=True)
                if is_exhausted and not len(processor):
                    return
                yield from self._take(processor, outputs)
        finally:
            for request_id in processor.request_ids():
                self.core.abort(request_id)
            self._settle()

    def _add(
        self,
        request: Request | Refused,
        place: int,
        processor: OutputProcessor,
        outputs: queue.SimpleQueue[SequenceOutput],
    ) -> RequestOutput | None:
        """Adds a request to the core; returns the output of one that it refuses."""
        if isinstance(request, Refused):
            return _refused_output(str(next(self._numbers)), place, request)
        try:
            processor.check(request)
            self.core.add(request, outputs)
        except ValueError as error:
            return _refused_output(request.request_id, place, Refused(request.prompt, str(error)))
        processor.add(request, place)
        return None

    def _take(self, processor: OutputProcessor, outputs: queue.SimpleQueue[SequenceOutput]) -> Iterator[Event]:
        """Waits until there are outputs, stepping unless another thread does; returns them all as events."""
        with self._stepping(outputs.empty) as has_turn:
            if has_turn:
                if not self.core.has_work:
                    raise RuntimeError("the engine has no work, but some requests have not ended: this is a bug")
                self.core.step()
        while not outputs.empty():
            output = outputs.get()
            piece, must_abort = processor.push(output)
            if must_abort:
                self.core.abort(output.request_id, output.index)
            whole = None
            if piece is not None and piece.finish_reason is not None:
                whole = processor.take(output.request_id)
            if piece is not None or whole is not None:
                yield Event(piece, whole)

    def warm_up(self, progress: Progress | None = None) -> None:
        """Compiles every program a request can need; calls in progress wait meanwhile."""
        with self._stepping(lambda: True):
            self.core.warm_up(progress)

    def _settle(self) -> None:
        """Lets the core process aborts, so that their pages are free before the next call."""
        with self._stepping(lambda: not self._is_stepping) as has_turn:
            if has_turn:
                self.core.settle()

    @contextlib.contextmanager
    def _stepping(self, is_wanted: Callable[[], bool]) -> Iterator[bool]:
        """Waits for the turn to step while it is needed; yields whether this thread has it, and passes it on at the end."""
        has_turn = False
        try:
            with self._turn:
                self._turn.wait_for(lambda: not (self._is_stepping and is_wanted()))
                if is_wanted():
                    has_turn = self._is_stepping = True
            yield has_turn
        finally:
            if has_turn:
                with self._turn:
                    self._is_stepping = False
                    self._turn.notify_all()


def _refused_output(request_id: str, place: int, refused: Refused) -> RequestOutput:
    """The output of a prompt that was refused: one completion without tokens, and the error."""
    prompt = refused.prompt
    return RequestOutput(
        request_id,
        place,
        prompt.text if prompt else None,
        prompt.token_ids if prompt else (),
        (CompletionOutput(0, "", (), "error"),),
        RequestMetrics(len(prompt.token_ids) if prompt else 0, 0, 0.0, 0.0, 0.0),
        error=refused.error,
    )
