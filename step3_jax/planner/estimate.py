"""The cost of a decoded token on given hardware: the ideal of `planner/cost.py`, and the expected one from measurements."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from step3_jax.layout.hardware import Hardware
from step3_jax.planner.cost import (
    Prices,
    TokenWork,
    attention_bound,
    attention_roofline_seconds,
    attention_seconds,
    cheapest,
    count_token_work,
    ffn_bound,
    ffn_roofline_seconds,
    ffn_seconds,
    usd_per_million_tokens,
)
from step3_jax.planner.efficiency import (
    Share,
    attention_share,
    base_batch,
    base_kernel_share,
    base_run,
    ffn_share,
    fit_shares,
)
from step3_jax.planner.own_measurement import OwnMeasurement
from step3_jax.planner.published import AFD, EP
from step3_jax.planner.shape import ModelShape

# Which of the two a target applies to.
Judge = Literal["expected", "ideal"]
JUDGES: tuple[Judge, ...] = ("expected", "ideal")


@dataclasses.dataclass(frozen=True)
class PartEstimate:
    """Attention with its projections, or the feed-forward layers, on one kind of hardware.

    Attributes:
      hardware: The device.
      usd_per_hour: Its price; None without one.
      ideal_seconds: Device seconds of one token at full use.
      expected_seconds: The expectation from measured shares.
      bound_by: The bottleneck: "memory" or "compute"; for attention in the ideal, for the FFN at the expected batch.
      share: The expected share of the roofline.
    """

    hardware: Hardware
    usd_per_hour: float | None
    ideal_seconds: float
    expected_seconds: float
    bound_by: str
    share: Share

    @property
    def ideal_usd(self) -> float | None:
        """USD per million tokens; None without a price."""
        return None if self.usd_per_hour is None else usd_per_million_tokens(self.ideal_seconds, self.usd_per_hour)

    @property
    def expected_usd(self) -> float | None:
        """USD per million tokens; None without a price."""
        return None if self.usd_per_hour is None else usd_per_million_tokens(self.expected_seconds, self.usd_per_hour)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Attention and FFN together.

    Attributes:
      arrangement: `AFD` or `EP`; the ideal does not depend on it.
      attention: Attention with its projections.
      ffn: The feed-forward layers.
    """

    arrangement: str
    attention: PartEstimate
    ffn: PartEstimate

    @property
    def ideal_usd(self) -> float | None:
        """USD per million tokens for both."""
        return _add(self.attention.ideal_usd, self.ffn.ideal_usd)

    @property
    def expected_usd(self) -> float | None:
        """USD per million tokens for both."""
        return _add(self.attention.expected_usd, self.ffn.expected_usd)

    @property
    def ideal_tokens_per_s(self) -> float:
        """Tokens per second and device, with pools in proportion to their work."""
        return 1 / (self.attention.ideal_seconds + self.ffn.ideal_seconds)

    @property
    def expected_tokens_per_s(self) -> float:
        """Tokens per second and device, with pools in proportion to their work."""
        return 1 / (self.attention.expected_seconds + self.ffn.expected_seconds)


@dataclasses.dataclass(frozen=True)
class CostAnswer:
    """The result of `step3 plan cost`.

    Attributes:
      shape: The model.
      context_tokens: Tokens that the token attends to.
      kv_dtype: Dtype of the cache.
      work: The work of one token, counted as in the report.
      pair: The requested hardware, or the best found; attention and FFN on separate devices.
      one_kind: Each candidate doing both, best first.
      is_by_price: Whether candidates were compared by USD; else by tokens per second and device, as a price is missing.
      prices: Prices of the devices.
      measurements: The user's own.
    """

    shape: ModelShape
    context_tokens: int
    kv_dtype: str
    work: TokenWork
    pair: Estimate
    one_kind: tuple[Estimate, ...]
    is_by_price: bool
    prices: Prices
    measurements: tuple[OwnMeasurement, ...]


def estimate_cost(
    shape: ModelShape,
    *,
    context_tokens: int,
    kv_dtype: str,
    candidates: Sequence[Hardware],
    attention: Hardware | None = None,
    ffn: Hardware | None = None,
    prices: Prices | None = None,
    measurements: Sequence[OwnMeasurement] = (),
) -> CostAnswer:
    """Estimates a model's cost on some hardware.

    Args:
      shape: The model.
      context_tokens: Tokens that the token attends to.
      kv_dtype: Of the cache.
      candidates: Hardware to choose from, at least one.
      attention: Hardware for attention; the best candidate if absent.
      ffn: Hardware for the FFN; the best candidate if absent.
      prices: Prices of devices; those of the files if absent.
      measurements: The user's own, which replace published shares on their hardware.

    Raises:
      ValueError: For a context below 1, an unknown dtype, or no candidates.
    """
    prices = prices or Prices()
    work = count_token_work(shape, context_tokens, kv_dtype)

    def estimate(attention: Hardware, ffn: Hardware, arrangement: str) -> Estimate:
        return _estimate(shape, context_tokens, kv_dtype, attention, ffn, arrangement, prices, measurements)

    def choose(seconds_of_part: Sequence[float]) -> Hardware:
        return cheapest(list(zip(candidates, seconds_of_part, strict=True)), prices)

    best_attention = attention or choose([attention_seconds(work, one) for one in candidates])
    best_ffn = ffn or choose([ffn_seconds(work, one) for one in candidates])
    is_by_price = all(prices.usd_per_hour(one) is not None for one in candidates)
    one_kind = [estimate(one, one, EP) for one in candidates]
    return CostAnswer(
        shape=shape,
        context_tokens=context_tokens,
        kv_dtype=kv_dtype,
        work=work,
        pair=estimate(best_attention, best_ffn, AFD),
        one_kind=tuple(sorted(one_kind, key=lambda one: _rank(one, is_by_price))),
        is_by_price=is_by_price,
        prices=prices,
        measurements=tuple(measurements),
    )


def choose_attention_share(
    shape: ModelShape,
    context_tokens: float,
    kv_dtype: str,
    hardware: Hardware,
    arrangement: str,
    measurements: Sequence[OwnMeasurement] = (),
) -> Share:
    """The share that attention with its projections is expected to reach: the user's own, else a published one.

    Args:
      shape: The model.
      context_tokens: Tokens that a token attends to.
      kv_dtype: Of the cache.
      hardware: The attention devices.
      arrangement: `AFD` or `EP`.
      measurements: The user's own.
    """
    # The kernels and the engine are for MFA.
    for own in measurements if shape.design == "mfa" else ():
        if own.hardware.name == hardware.name and kv_dtype in own.attention:
            return _own_share(own, own.attention[kv_dtype], arrangement, kv_dtype)
    return attention_share(
        shape.design, hardware, context_tokens=context_tokens, kv_dtype=kv_dtype, arrangement=arrangement
    )


def choose_ffn_share(
    kv_dtype: str, hardware: Hardware, arrangement: str, measurements: Sequence[OwnMeasurement] = ()
) -> Share:
    """The share that the feed-forward layers are expected to reach: the user's own, else a published one.

    Args:
      kv_dtype: Dtype of the cache, which chooses the published run.
      hardware: The FFN devices.
      arrangement: `AFD` or `EP`.
      measurements: The user's own.
    """
    for own in measurements:
        if own.hardware.name == hardware.name and own.ffn is not None:
            return _own_share(own, own.ffn, arrangement, kv_dtype)
    return ffn_share(hardware, kv_dtype=kv_dtype, arrangement=arrangement)


def _estimate(
    shape: ModelShape,
    context_tokens: int,
    kv_dtype: str,
    attention: Hardware,
    ffn: Hardware,
    arrangement: str,
    prices: Prices,
    measurements: Sequence[OwnMeasurement],
) -> Estimate:
    ideal = count_token_work(shape, context_tokens, kv_dtype)
    exact = count_token_work(shape, context_tokens, kv_dtype, rule="exact")
    batch = base_batch(arrangement, kv_dtype)
    share = choose_attention_share(shape, context_tokens, kv_dtype, attention, arrangement, measurements)
    sequences = batch.sequences_per_device(ideal)
    attention_part = PartEstimate(
        attention,
        prices.usd_per_hour(attention),
        ideal_seconds=attention_seconds(ideal, attention),
        expected_seconds=attention_roofline_seconds(shape, exact, attention, sequences) / share.value,
        bound_by=attention_bound(ideal, attention),
        share=share,
    )
    share = choose_ffn_share(kv_dtype, ffn, arrangement, measurements)
    ffn_part = PartEstimate(
        ffn,
        prices.usd_per_hour(ffn),
        ideal_seconds=ffn_seconds(ideal, ffn),
        expected_seconds=ffn_roofline_seconds(shape, ffn, batch.tokens) / share.value,
        bound_by=ffn_bound(shape, ffn, batch.tokens),
        share=share,
    )
    return Estimate(arrangement, attention_part, ffn_part)


def _own_share(own: OwnMeasurement, value: float, arrangement: str, kv_dtype: str) -> Share:
    if own.is_whole_engine:
        return Share(value, own.source, True)
    # Outside kernels, a deployment loses what the published one lost outside its own.
    run = base_run(arrangement, kv_dtype)
    around = min(fit_shares(run).attention / base_kernel_share(run).value, 1.0)
    return Share(
        value * around, f"{own.source}, of which {around:.0%} are left around kernels, as in {run.source}", False
    )


def _rank(one: Estimate, is_by_price: bool) -> float:
    return one.ideal_usd if is_by_price and one.ideal_usd is not None else -one.ideal_tokens_per_s


def _add(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second
