"""What an engine has done so far."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class EngineStats:
    """Counts and times since the engine was made; compiling is apart from the other times.

    Attributes:
      num_requests: Requests that have ended.
      num_prompt_tokens: Tokens of the prompts that were prefilled or found cached, each prompt once.
      num_generated_tokens: Tokens generated.
      num_preemptions: Sequences that lost their pages to others and were computed again.
      prefix_cache_queries: Prompt tokens looked for in the prefix cache.
      prefix_cache_hits: Those that were there.
      num_images: Images of prompts.
      num_known_images: Those whose features were kept from before.
      image_encode_s: Time of the vision tower.
      prefill_s: Time of prefill, images included.
      decode_s: Time of the decode loop.
      compile_s: Time of tracing and compiling.
    """

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_images: int = 0
    num_known_images: int = 0
    image_encode_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    compile_s: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens a second; 0 before the first prompt."""
        return self.num_prompt_tokens / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Generated tokens a second, all rows together; 0 before the first."""
        return self.num_generated_tokens / self.decode_s if self.decode_s > 0 else 0.0
