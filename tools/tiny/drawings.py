"""Chooses the 80 things that the tiny Step3 names, and rasterises every artist's drawing of them.

Five icon sets draw the same emoji in different hands. Four are for training; Twemoji is for the test alone,
so that "an artist never seen" is a true statement (and its attribution licence never touches the weights).

Writes `DATA/drawings.npz` (`rgba` uint8 [n, 128, 128, 4] straight alpha, `thing` int32 [n], `artist` str [n])
and `DATA/things.json`.

    python -m tools.tiny.drawings [--data DIR] [--force]
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from tools.tiny.fetch import DEFAULT_DATA, say, write_json

TRAIN_ARTISTS = ("noto", "noto-v1", "fluent-emoji-flat", "fxemoji")
TEST_ARTIST = "twemoji"
SIDE = 128  # pixels of a rasterised drawing

# Name, emoji code point, and fxemoji's icon ("" where it has none); the other sets are matched by code point.
THINGS = (
    # animals
    ("dog", "1F415", "dogside"),
    ("cat", "1F408", "catside"),
    ("horse", "1F40E", "horse"),
    ("cow", "1F404", "cow"),
    ("pig", "1F416", "pigside"),
    ("elephant", "1F418", "elephant"),
    ("monkey", "1F412", "monkey"),
    ("camel", "1F42B", "bactriancamel"),
    ("penguin", "1F427", "penguin"),
    ("owl", "1F989", ""),
    ("turtle", "1F422", "turtle"),
    ("snake", "1F40D", "snake"),
    ("frog", "1F438", "frog"),
    ("whale", "1F40B", "whale"),
    ("octopus", "1F419", "octopus"),
    ("crab", "1F980", ""),
    ("fish", "1F41F", "fish"),
    ("butterfly", "1F98B", ""),
    ("bee", "1F41D", "honeybee"),
    ("ladybug", "1F41E", "ladybeetle"),
    ("spider", "1F577", "spider"),
    ("snail", "1F40C", "snail"),
    ("lion", "1F981", ""),
    ("panda", "1F43C", "pandaface"),
    ("rabbit", "1F407", "bunnyside"),
    # plants and weather
    ("rose", "1F339", "rose"),
    ("sunflower", "1F33B", "sunflower"),
    ("cactus", "1F335", "cactus"),
    ("palm tree", "1F334", "palmtree"),
    ("mushroom", "1F344", "mushroom"),
    ("tree", "1F333", "deciduoustree"),
    ("rainbow", "1F308", "rainbow"),
    ("snowman", "26C4", "snowmanwithoutsnow"),
    # food
    ("apple", "1F34E", "redapple"),
    ("banana", "1F34C", "banana"),
    ("grapes", "1F347", "grapes"),
    ("watermelon", "1F349", "watermelon"),
    ("strawberry", "1F353", "strawberry"),
    ("pineapple", "1F34D", "pineapple"),
    ("cherries", "1F352", "cherries"),
    ("carrot", "1F955", ""),
    ("pizza", "1F355", "sliceofpizza"),
    ("hamburger", "1F354", "hamburger"),
    ("bread", "1F35E", "bread"),
    ("doughnut", "1F369", "doughnut"),
    ("ice cream", "1F366", "softicecream"),
    ("cake", "1F382", "birthdaycake"),
    # vehicles
    ("car", "1F697", "automobile"),
    ("bus", "1F68C", "bus"),
    ("bicycle", "1F6B2", "bicycle"),
    ("tractor", "1F69C", "tractor"),
    ("train", "1F682", "steamlocomotive"),
    ("airplane", "2708", "airplane"),
    ("helicopter", "1F681", "helicopter"),
    ("rocket", "1F680", "rocket"),
    ("sailboat", "26F5", "sailboat"),
    # objects
    ("balloon", "1F388", "balloon"),
    ("clock", "23F0", "alarmclock"),
    ("guitar", "1F3B8", "guitar"),
    ("trumpet", "1F3BA", "trumpet"),
    ("violin", "1F3BB", "violin"),
    ("piano", "1F3B9", "musicalkeyboard"),
    ("key", "1F511", "key"),
    ("scissors", "2702", "blackscissors"),
    ("umbrella", "2602", "umbrella"),
    ("hammer", "1F528", "hammer"),
    ("telephone", "260E", "blacktelephone"),
    ("camera", "1F4F7", "camera"),
    ("television", "1F4FA", "television"),
    ("book", "1F4D6", "openbook"),
    ("pencil", "270F", "pencil"),
    ("light bulb", "1F4A1", "lightbulb"),
    ("candle", "1F56F", "candle"),
    ("bell", "1F514", "bell"),
    ("crown", "1F451", "crown"),
    ("glasses", "1F453", "glasses"),
    ("hat", "1F3A9", "tophat"),
    ("house", "1F3E0", "housebuilding"),
    ("castle", "1F3F0", "europeancastle"),
    ("soccer ball", "26BD", "soccerball"),
)
PLURALS = frozenset({"grapes", "cherries", "scissors", "glasses"})
UNCOUNTABLE = frozenset({"pizza", "bread"})


def answer_for(name: str) -> str:
    """Returns the sentence that names a thing: "This is an apple.", "These are scissors."."""
    if name in PLURALS:
        return f"These are {name}."
    if name in UNCOUNTABLE:
        return f"This is {name}."
    return f"This is {'an' if name[0] in 'aeiou' else 'a'} {name}."


class IconSet:
    """One artist's icons, as an Iconify package holds them."""

    def __init__(self, package: Path):
        """Opens an unpacked `@iconify-json/...` package.

        Raises:
          ValueError: If the package is not there; it says how to fetch it.
        """
        if not package.exists():
            raise ValueError(f"no icon set at {package}; run `python -m tools.tiny.fetch` with the same --data first")
        self.name = package.parent.name
        self._icons = json.loads((package / "icons.json").read_text(encoding="utf-8"))
        self._characters = json.loads((package / "chars.json").read_text(encoding="utf-8"))

    def find(self, code_point: str) -> str | None:
        """Returns the name of the icon of a code point such as "1F415", or None."""
        plain = code_point.lower()
        return self._characters.get(plain) or self._characters.get(f"{plain}-fe0f")

    def has(self, name: str) -> bool:
        """Returns whether the set has an icon of this name."""
        return name in self._icons["icons"]

    def draw(self, name: str, side: int = SIDE) -> np.ndarray:
        """Rasterises an icon.

        Args:
          name: The icon's name in this set.
          side: Width and height in pixels.

        Returns:
          uint8 [side, side, 4]: red, green, blue and straight (not premultiplied) alpha.
        """
        import resvg_py  # noqa: PLC0415 - of the extra `tiny`: tests use this module without it

        icon = self._icons["icons"][name]
        left, top = icon.get("left", 0), icon.get("top", 0)
        width = icon.get("width", self._icons.get("width", 16))  # 16: Iconify's default
        height = icon.get("height", self._icons.get("height", 16))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{side}" height="{side}">{icon["body"]}</svg>'
        )
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side))
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def match_icons(code_point: str, fxemoji: str, sets: dict[str, IconSet]) -> dict[str, str]:
    """Returns artist -> icon name for one thing.

    Raises:
      ValueError: If an artist other than fxemoji, the one set that may lack a thing, does not draw it.
    """
    noto = sets["noto"].find(code_point) or ""
    names = {artist: icons.find(code_point) or "" for artist, icons in sets.items()}
    names["noto-v1"] = noto  # this package has no code points, but names its icons as its successor does
    names["fxemoji"] = fxemoji
    found = {artist: name for artist, name in names.items() if name and sets[artist].has(name)}
    missing = set(sets) - set(found) - ({"fxemoji"} if not fxemoji else set())
    if missing:
        raise ValueError(f"code point {code_point} has no drawing in {sorted(missing)}; choose another thing")
    return found


def build(data: Path) -> None:
    """Writes `drawings.npz` and `things.json` below `data`.

    Raises:
      ValueError: If an icon set is missing or lacks a thing.
    """
    artists = (*TRAIN_ARTISTS, TEST_ARTIST)
    sets = {artist: IconSet(data / "raw" / "npm" / artist / "package") for artist in artists}
    things, pixels, labels, hands = [], [], [], []
    for index, (name, code_point, fxemoji) in enumerate(THINGS):
        found = match_icons(code_point, fxemoji, sets)
        things.append({"name": name, "answer": answer_for(name), "code_point": code_point, "drawings": found})
        for artist, icon in found.items():
            pixels.append(sets[artist].draw(icon))
            labels.append(index)
            hands.append(artist)
    temporary = data / ".drawings.tmp.npz"
    np.savez_compressed(temporary, rgba=np.stack(pixels), thing=np.array(labels, np.int32), artist=np.array(hands))
    temporary.replace(data / "drawings.npz")
    write_json(data / "things.json", things)
    say(f"drawings: {len(pixels)} drawings of {len(things)} things")


def main() -> None:
    """Rasterises the drawings unless they are there already."""
    parser = argparse.ArgumentParser(description="Rasterise the drawings of the things that the tiny Step3 names.")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help=f"data folder (default {DEFAULT_DATA})")
    parser.add_argument("--force", action="store_true", help="redraw what is there already")
    options = parser.parse_args()
    if options.force or not all((options.data / name).exists() for name in ("drawings.npz", "things.json")):
        build(options.data)
    else:
        say("drawings: there already")


if __name__ == "__main__":
    main()
