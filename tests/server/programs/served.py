"""A server whose model says what a test wants, and which obeys lines of standard input.

    python served.py [--option value ...]

`load` makes the model available, `fail` makes loading it fail, `hold` and `go` stop and start its engine, `die` ends the
engine's thread.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import threading

from step3_jax import resources
from step3_jax.cli.process import say
from step3_jax.config import ModelConfig
from step3_jax.engine.llm import LLM
from step3_jax.server.config import ServerConfig
from step3_jax.server.log import start_log
from step3_jax.server.process import describe_address, open_socket, serve
from step3_jax.text.chat_template import ChatTemplate
from step3_jax.text.image_settings import ImageSettings
from step3_jax.text.tokenizer import Tokenizer
from tests.server.fake import ReplyExecutor

# The context is 2,048 tokens.
REPLY = "</think>" + "word " * 300


def main() -> int:
    folder = resources.find("models/step3-tiny")
    tokenizer = Tokenizer.load(folder)
    executor = ReplyExecutor(ModelConfig.preset("step3-tiny"), tokenizer, lambda prompt: REPLY)
    executor.is_stubborn = False
    commands: list[str] = []
    has_command = threading.Event()

    def follow() -> None:
        for line in sys.stdin:
            command = line.strip()
            if command == "hold":
                executor.gate.clear()
            elif command == "go":
                executor.gate.set()
            elif command == "die":
                # Not an Exception, so the core lets it through.
                executor.failure = SystemExit("the device is gone")
                executor.gate.set()
            else:
                commands.append(command)
                has_command.set()
            with contextlib.suppress(OSError):
                print(f"did {command}", file=sys.stderr, flush=True)

    def load() -> LLM:
        has_command.wait()
        if commands[0] == "fail":
            raise ValueError("the weights are damaged")
        return LLM.from_model(
            executor, tokenizer, template=ChatTemplate.load(folder), image_settings=ImageSettings.load(folder)
        )

    config = ServerConfig.of({"port": 0} | json.loads(sys.argv[1]))
    opened = open_socket(config)
    with contextlib.suppress(OSError):
        say(f"listening on {describe_address(opened, config)}")
    threading.Thread(target=follow, daemon=True).start()
    listener = start_log()
    ending = serve(load, config, opened, say)
    listener.stop()
    with contextlib.suppress(OSError):
        say(f"ended with {ending}, frozen={gc.get_freeze_count() > 0}, collects={gc.isenabled()}")
    return ending.code


if __name__ == "__main__":
    sys.exit(main())
