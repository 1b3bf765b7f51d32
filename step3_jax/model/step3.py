"""The whole model: vision features merged into the decoder's embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from step3_jax.config import ModelConfig
from step3_jax.layers.embed import merge_image_features
from step3_jax.model.layers import stack_layers, unstack_layers
from step3_jax.model.text import Decoder
from step3_jax.model.vision import Projector, VisionTower


class Step3(nnx.Module):
    """Step3. `vision` and `projector` are None in a text-only model."""

    def __init__(self, config: ModelConfig, *, dtype: jax.typing.DTypeLike | None = None, rngs: nnx.Rngs) -> None:
        """Makes a model with random weights.

        Args:
          config: Sizes.
          dtype: Of weights and activations; the configuration's if absent.
          rngs: Source of the random weights.
        """
        dtype = jnp.dtype(dtype or config.dtype)
        self.config = config
        self.text = Decoder(config.text, dtype=dtype, rngs=rngs)
        has_vision = config.vision is not None
        self.vision = VisionTower(config.vision, dtype=dtype, rngs=rngs) if has_vision else None
        self.projector = Projector(config, dtype=dtype, rngs=rngs) if has_vision else None

    def __call__(
        self,
        input_ids: Int[Array | np.ndarray, "B T"],
        positions: Int[Array | np.ndarray, "B T"] | None = None,
        pixel_values: Float[Array | np.ndarray, "images 3 S S"] | None = None,
        patch_pixel_values: Float[Array | np.ndarray, "windows 3 W W"] | None = None,
        num_patches: Sequence[int] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of every token, without a cache.

        Args:
          input_ids: Token ids, image places already expanded.
          positions: Rotary positions; 0..T-1 if absent.
          pixel_values: Whole images, all of the batch in row order.
          patch_pixel_values: Windows of the images, in the same order; may be absent if there are none.
          num_patches: Windows of each image, on the host; zeros if absent.

        Raises:
          ValueError: If the counts of images, windows and image places do not match, or images are given to a
            text-only model. Under `jax.jit` the image places cannot be counted.
        """
        input_ids = jnp.asarray(input_ids)
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids has shape {input_ids.shape}; [B, T] is needed")
        embeddings = self.text.embed(input_ids)
        if pixel_values is not None:
            features = self.image_features(pixel_values, patch_pixel_values, num_patches)
            is_place = input_ids == self.config.image_token_id
            if not isinstance(input_ids, jax.core.Tracer):
                check_places(int(np.sum(np.asarray(is_place))), features.shape[0])
            rows = jnp.cumsum(is_place.reshape(-1)).reshape(is_place.shape) - 1
            embeddings = merge_image_features(embeddings, features, jnp.where(is_place, rows, -1))
        elif patch_pixel_values is not None or num_patches is not None:
            raise ValueError("patch_pixel_values and num_patches need pixel_values: every image has a whole view")
        hidden, _ = self.text(embeddings, positions=positions)
        return self.text.logits(hidden)

    def encode_images(self, pixels: Float[Array | np.ndarray, "B 3 S S"]) -> Float[Array, "B image_tokens D"]:
        """Features of whole images, or of windows: one size per call."""
        if self.vision is None or self.projector is None:
            raise ValueError("this is a text-only model: its checkpoint has no vision tower, so it takes no images")
        with jax.named_scope("vision"):
            return self.projector(self.vision(jnp.asarray(pixels)))

    def image_features(
        self,
        pixel_values: Float[Array | np.ndarray, "images 3 S S"],
        patch_pixel_values: Float[Array | np.ndarray, "windows 3 W W"] | None,
        num_patches: Sequence[int] | None,
    ) -> Float[Array, "M D"]:
        """Features in prompt order: for each image its windows, then the whole view."""
        pixel_values = jnp.asarray(pixel_values)
        num_images = pixel_values.shape[0]
        counts = [int(count) for count in num_patches] if num_patches is not None else [0] * num_images
        num_windows = 0 if patch_pixel_values is None else jnp.asarray(patch_pixel_values).shape[0]
        if len(counts) != num_images or sum(counts) != num_windows:
            raise ValueError(
                f"{num_images} images and {num_windows} windows are given, but num_patches is {counts}: it needs one "
                "number per image, and they must sum to the windows"
            )
        views = self.encode_images(pixel_values)
        width = views.shape[-1]
        windows = self.encode_images(jnp.asarray(patch_pixel_values)) if num_windows else None
        parts, start = [], 0
        for image, count in enumerate(counts):
            if count and windows is not None:
                parts.append(windows[start : start + count].reshape(-1, width))
            parts.append(views[image])
            start += count
        return jnp.concatenate(parts)


def stack_model(model: Step3) -> Step3:
    """A model like `model`, neighbouring layers of the same structure stacked; see `model.layers.stack_layers`."""
    return _with_layers(model, stack_layers(model.text.layers))


def unstack_model(model: Step3) -> Step3:
    """A model like `model` with its layers unstacked; see `model.layers.unstack_layers`."""
    return _with_layers(model, unstack_layers(model.text.layers))


def _with_layers(model: Step3, layers: Sequence[nnx.Module]) -> Step3:
    copy = nnx.merge(*nnx.split(model))
    copy.text.layers = nnx.List(layers)
    return copy


def check_places(num_places: int, num_features: int) -> None:
    """Raises ValueError unless the prompt has one place for each image feature."""
    if num_places != num_features:
        raise ValueError(
            f"the prompt has {num_places} image places, but the images give {num_features} features: expand one "
            "image place for each image (step3_jax.text.images), and give all images"
        )


class _OneKey(nnx.Rngs):
    """The same key for all weights: none is drawn, and counting keys while tracing takes most of a minute at full size."""

    def params(self) -> Array:
        return jax.random.key(0)


def abstract_step3(config: ModelConfig, dtype: jax.typing.DTypeLike | None = None) -> Step3:
    """The module with shapes in place of arrays, which takes no memory; arguments as for `Step3`."""
    return nnx.eval_shape(lambda: Step3(config, dtype=dtype, rngs=_OneKey(0)))
