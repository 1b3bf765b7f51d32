"""Constants of the image processor, from a checkpoint's `preprocessor_config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from step3_jax.stored_file import read_json_object

_SETTING_KEYS = {"patch_size": "window_size"}  # The release calls the window's side `patch_size`.


@dataclass(frozen=True)
class ImageSettings:
    """Constants of the image processor; the defaults are the released ones.

    Attributes:
      image_size: Side of the view in pixels; images up to this long are cut only if they are long and thin.
      window_size: Side of a window in pixels, as the model sees it.
      max_side: Longer images are first scaled to this length.
      small_ratio: An image no longer than `image_size` is cut if its aspect ratio is above this.
      wide_ratio: A longer image above this ratio gets windows no larger than its short side.
      round_up: A side is rounded up to one more window if at least this fraction of a window is left over.
      image_mean: Mean subtracted from red, green and blue in [0, 1].
      image_std: Divisor of red, green and blue after that.
      image_token_len: Tokens of the view.
      patch_token_len: Tokens of a window.
      max_windows: Images that need more windows are refused. Not in the release.
      max_tokens: Images that need more tokens, including delimiters, are refused. Not in the release.
    """

    image_size: int = 728
    window_size: int = 504
    max_side: int = 3024
    small_ratio: float = 1.5
    wide_ratio: float = 4.0
    round_up: float = 0.2
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    image_token_len: int = 169
    patch_token_len: int = 81
    max_windows: int = 64
    max_tokens: int = 6144

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("image_mean", "image_std"):
                positive = field.name == "image_std"
                is_valid = isinstance(value, (tuple, list)) and len(value) == 3
                is_valid = is_valid and all(_is_number(item) and (item > 0 or not positive) for item in value)
                allowed = f"three {'positive ' if positive else ''}numbers"
                object.__setattr__(self, field.name, tuple(value) if is_valid else value)
            elif isinstance(field.default, int):
                lowest = 0 if field.name == "max_windows" else 1
                is_valid = isinstance(value, int) and not isinstance(value, bool) and value >= lowest
                allowed = f"a whole number of at least {lowest}"
            elif field.name == "round_up":
                is_valid, allowed = _is_number(value) and 0 <= value < 1, "a number in [0, 1)"
            else:
                is_valid, allowed = _is_number(value) and value >= 1, "a number of at least 1"
            if not is_valid:
                raise ValueError(f"Image setting {field.name} is {value!r}; it must be {allowed}.")

    @classmethod
    def load(cls, folder: str | Path) -> ImageSettings:
        """Reads `preprocessor_config.json`.

        Args:
          folder: Folder of the checkpoint. Without the file the released constants are used, and likewise for each
            missing key. Keys of other processors are ignored. The window's side is stored as `patch_size`.

        Returns:
          The settings.

        Raises:
          ValueError: If the file is not a JSON object or holds an impossible value.
        """
        path = Path(folder) / "preprocessor_config.json"
        stored = read_json_object(path)
        renamed = {_SETTING_KEYS.get(key, key): value for key, value in stored.items()}
        known = {field.name for field in fields(cls)}
        try:
            # The constructor checks the types of the values.
            return cls(**{name: value for name, value in renamed.items() if name in known})  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
