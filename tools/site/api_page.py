"""Pages of the Python API: which definitions they show; their text is the docstrings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Section:
    """Definitions that are shown together.

    Attributes:
      title: The heading.
      text: What stands under it.
      names: Full names of the definitions.
    """

    title: str
    text: str
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ApiPage:
    """A page. Attributes: its `title`, an introduction (`text`), and its `sections`."""

    title: str
    text: str
    sections: tuple[Section, ...]


API = ApiPage(
    "Python API",
    "`from step3_jax import ...` gives `LLM`, `SamplingParams`, `StructuredOutputsParams`, `EngineConfig`, `ModelConfig`, "
    "`Parallel`, `load_model` and `save_model`; other names are imported from their modules.",
    (
        Section(
            "Generating text",
            "Examples are in [Run a model](../run.md), settings of the engine in [Engine settings](../configuration.md).",
            (
                "step3_jax.engine.llm.LLM",
                "step3_jax.sampling.params.SamplingParams",
                "step3_jax.sampling.structured.StructuredOutputsParams",
                "step3_jax.engine.request.RequestOutput",
                "step3_jax.engine.request.CompletionOutput",
                "step3_jax.engine.stats.EngineStats",
            ),
        ),
        Section(
            "Outputs taken apart",
            "See [Structured outputs and tool calls](../structured.md).",
            (
                "step3_jax.text.output_parser.parse_output",
                "step3_jax.text.output_parser.OutputParser",
                "step3_jax.text.tool_grammar.tool_grammar",
            ),
        ),
        Section(
            "Models and checkpoints",
            "See [Convert a checkpoint](../checkpoints.md).",
            (
                "step3_jax.checkpoint.load.load_model",
                "step3_jax.checkpoint.save.save_model",
                "step3_jax.config.ModelConfig",
                "step3_jax.model.step3.Step3",
            ),
        ),
        Section(
            "Several devices and processes",
            "See [Shard a model](../parallel.md), [Separate attention and FFN](../afd.md) and "
            "[Start many processes](../launch.md).",
            (
                "step3_jax.layout.parallel.Parallel",
                "step3_jax.layout.deployment.parse_topology",
                "step3_jax.afd.topology.AfdTopology",
                "step3_jax.afd.host.executor.load_host_executor",
                "step3_jax.afd.program.executor.load_program_executor",
                "step3_jax.distributed.initialise_distributed",
            ),
        ),
    ),
)
KERNELS = ApiPage(
    "Kernels API",
    "`pallas_kernels` works without `step3_jax`. What the kernels do and what has been checked of them is in "
    "[GPU kernels](../kernels.md).",
    (
        Section(
            "Attention",
            "",
            (
                "pallas_kernels.mfa_decode.api",
                "pallas_kernels.mfa_prefill.api",
                "pallas_kernels.rope_cache_write.api",
            ),
        ),
        Section("Products", "", ("pallas_kernels.fp8_matmul.api", "pallas_kernels.grouped_matmul.api")),
        Section(
            "Experts and the small fused operations",
            "",
            (
                "pallas_kernels.moe_permute.api",
                "pallas_kernels.norm_quantise.api",
                "pallas_kernels.swiglu_quantise.api",
            ),
        ),
        Section(
            "Pages of the cache, choice of the implementation", "", ("pallas_kernels.pages", "pallas_kernels.common")
        ),
    ),
)


def write_api(page: ApiPage) -> str:
    """Markdown of a page, for mkdocstrings."""
    return f"# {page.title}\n\n{page.text}\n\n" + "\n".join(map(_write_section, page.sections))


def _write_section(section: Section) -> str:
    shown: Sequence[str] = [f"::: {name}\n" for name in section.names]
    return f"## {section.title}\n\n{section.text}\n\n" + "\n".join(shown)
