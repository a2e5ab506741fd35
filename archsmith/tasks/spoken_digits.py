"""Spoken digits: single words by a few speakers, recognised as a sequence of phones.

The Free Spoken Digit Dataset (Jakobovski and others, CC BY-SA 4.0): six speakers, 8 kHz. ``data`` is a folder, either
of the original recordings ``<digit>_<speaker>_<index>.wav`` (16 bit, mono; a folder ``recordings`` in it is found), or
with the same recordings in two files: ``recordings.tsv`` (columns file, digit, speaker, index, start, end) and
``audio_delta.npy.xz``, first differences of all samples laid end to end.

Tokens are phones of the ARPAbet, as in the published speech models; a digit has two to five. With letters, ``three``
and others need more frames than short recordings have at a third of the frame rate.
"""

from __future__ import annotations

import csv
import hashlib
import io
import lzma
import re
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archsmith.core.errors import Shown, UserError
from archsmith.tasks.bounds import one_of, real, whole
from archsmith.tasks.filterbank import speech_features
from archsmith.tasks.speech import SpeechRecognition
from archsmith.tasks.split import DEFAULT_VALID, Indices, first_per_class, split_off

TASKS = (
    {
        "name": "spoken-digits",
        "title": "spoken digits, single words by six speakers, by CTC over phones",
        "data": "folder of the Free Spoken Digit Dataset",
        "metric": "accuracy",
    },
)

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

PHONES = {
    "zero": ("Z", "IY", "R", "OW"),
    "one": ("W", "AH", "N"),
    "two": ("T", "UW"),
    "three": ("TH", "R", "IY"),
    "four": ("F", "AO", "R"),
    "five": ("F", "AY", "V"),
    "six": ("S", "IH", "K", "S"),
    "seven": ("S", "EH", "V", "AH", "N"),
    "eight": ("EY", "T"),
    "nine": ("N", "AY", "N"),
}

OFFICIAL_TEST = 5
"""Recordings of each digit and speaker with an index below this are the official test part."""

_NAME = re.compile(r"(\d)_([A-Za-z]+)_(\d+)\.wav")


@dataclass(frozen=True, kw_only=True)
class SpeechOptions:
    """What ``open_task("spoken-digits", ...)`` accepts beside ``data``.

    Attributes:
        split: ``"official"``: indices 0 to 4 are the test part, by speakers that training hears too. ``"speakers"``:
            the last speaker in alphabetical order is the test part and the one before the valid part.
        units: ``"phones"`` or ``"letters"``.
        seconds: Length of the inputs. Of longer recordings the stretch of this length with the most energy is taken.
        hop_ms: Time between two frames.
        bands: Mel bands; a frame has three planes of them.
        valid_fraction: Share of the official training part that becomes the valid part, 0.01 to 0.5.
        limit: Use the first so many recordings of each digit in each part, for quick trials.
    """

    split: str = "official"
    units: str = "phones"
    seconds: float = 1.0
    hop_ms: float = 10.0
    bands: int = 40
    valid_fraction: float = DEFAULT_VALID
    limit: int | None = None

    def __post_init__(self) -> None:
        one_of("split", self.split, ("official", "speakers"))
        one_of("units", self.units, ("phones", "letters"))
        real("seconds", self.seconds, low=0.1, high=10.0)
        real("hop_ms", self.hop_ms, low=2.0, high=25.0)
        whole("bands", self.bands, low=4, high=80)
        real("valid_fraction", self.valid_fraction, low=0.01, high=0.5)
        if self.limit is not None:
            whole("limit", self.limit, low=2, high=10**6)


@dataclass(frozen=True, eq=False)
class Recordings:
    """Recordings in the order of their file names.

    Attributes:
        waves: int16 samples of each.
        rate: Samples per second, of all.
        digits: What is said, 0 to 9.
        speakers: Who says it.
        indices: Number of the repetition.
    """

    waves: tuple[NDArray[np.int16], ...]
    rate: int
    digits: NDArray[np.int64]
    speakers: tuple[str, ...]
    indices: NDArray[np.int64]


def make(name: str, *, data: Any, options: Mapping[str, Any]) -> SpeechRecognition:
    """Return the task ``spoken-digits``; see ``archsmith.tasks.open_task``."""
    known = [field.name for field in fields(SpeechOptions)]
    for key in options:
        if key not in known:
            raise UserError(f"option of task {name}", key, allowed=", ".join(known))
    chosen = SpeechOptions(**options)
    if data is None or not Path(data).is_dir():
        raise UserError("data", None if data is None else str(data), allowed="the folder with the recordings")
    found = read_recordings(Path(data))
    hop = round(chosen.hop_ms * found.rate / 1000)
    length = round(chosen.seconds * found.rate)
    tokens, spelled = spelling(chosen.units)
    features = [
        speech_features(loudest(samples, length) / 32768.0, found.rate, bands=chosen.bands, hop=hop)
        for samples in found.waves
    ]
    return SpeechRecognition(
        name,
        features,
        [spelled[WORDS[digit]] for digit in found.digits],
        tokens=tokens,
        splits=planned(name, found, chosen),
        frames=-(-length // hop),
        digest=_digest(found, [length, hop, chosen.bands]),
    )


def spelling(units: str) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """Return the names of the tokens, the blank's first, and every word as their numbers."""
    words = {word: PHONES[word] if units == "phones" else tuple(word) for word in WORDS}
    tokens = ("<blank>", *sorted({unit for spelled in words.values() for unit in spelled}))
    return tokens, {word: tuple(tokens.index(unit) for unit in spelled) for word, spelled in words.items()}


def loudest(samples: NDArray[np.int16], length: int) -> NDArray[np.int16]:
    """Return the stretch of ``length`` samples with the most energy, the first of equals; all if there are fewer."""
    if len(samples) <= length:
        return samples
    energy = np.concatenate([[0], np.cumsum(samples.astype(np.int64) ** 2)])
    start = int(np.argmax(energy[length:] - energy[:-length]))
    return samples[start : start + length]


def planned(name: str, found: Recordings, options: SpeechOptions) -> dict[str, Indices]:
    """Return the index arrays of train, valid and test.

    Raises:
        UserError: A part would be empty.
    """
    everything = np.arange(len(found.waves))
    if options.split == "speakers":
        speakers = sorted(set(found.speakers))
        if len(speakers) < 3:
            raise UserError("split", options.split, allowed=f"official, with {len(speakers)} speakers; this needs 3")
        of = np.array([speakers.index(speaker) for speaker in found.speakers])
        last = len(speakers) - 1
        parts = {"train": of < last - 1, "valid": of == last - 1, "test": of == last}
        splits = {part: everything[chosen] for part, chosen in parts.items()}
    else:
        test = found.indices < OFFICIAL_TEST
        if test.all() or not test.any():
            allowed = f"recordings with indices below {OFFICIAL_TEST}, the test part, and others"
            raise UserError("data", Shown(f"indices {found.indices.min()} to {found.indices.max()}"), allowed=allowed)
        said = [WORDS[digit] for digit in range(10) if (found.digits == digit).any()]
        labels = np.array([said.index(WORDS[digit]) for digit in found.digits])
        train, valid = split_off(
            everything[~test],
            labels,
            fraction=options.valid_fraction,
            stream=(name, "valid"),
            class_names=said,
        )
        splits = {"train": train, "valid": valid, "test": everything[test]}
    if options.limit is not None:
        splits = {part: first_per_class(indices, found.digits, options.limit) for part, indices in splits.items()}
    return splits


def read_recordings(folder: Path) -> Recordings:
    """Return the recordings of a folder, in either of the two forms.

    Raises:
        UserError: There are none, or a file is damaged or not as described.
    """
    if (folder / "recordings.tsv").is_file():
        return _packed(folder)
    inner = folder / "recordings"
    paths = sorted((inner if inner.is_dir() else folder).glob("*.wav"))
    named = [(path, found) for path in paths if (found := _NAME.fullmatch(path.name))]
    if not named:
        raise UserError("data", str(folder), allowed="a folder with <digit>_<speaker>_<index>.wav or recordings.tsv")
    read = [_wav(path) for path, _ in named]
    rates = sorted({rate for _, rate in read})
    if len(rates) > 1:
        raise UserError("data", Shown(f"files at {rates} samples per second"), allowed="one sampling rate for all")
    return Recordings(
        tuple(samples for samples, _ in read),
        rates[0],
        np.array([int(found[1]) for _, found in named]),
        tuple(found[2] for _, found in named),
        np.array([int(found[3]) for _, found in named]),
    )


def _packed(folder: Path) -> Recordings:
    try:
        # The stream is decoded whole first: numpy reads a plain file faster than one behind a decoder.
        audio = np.load(io.BytesIO(lzma.decompress((folder / "audio_delta.npy.xz").read_bytes())))
        audio = audio.cumsum(dtype=np.int16)
        with (folder / "recordings.tsv").open(encoding="utf-8", newline="") as stream:
            rows = sorted(csv.DictReader(stream, delimiter="\t"), key=lambda row: row["file"])
        waves = tuple(audio[int(row["start"]) : int(row["end"])] for row in rows)
        digits, indices = (np.array([int(row[key]) for row in rows]) for key in ("digit", "index"))
        speakers = tuple(row["speaker"] for row in rows)
    except (OSError, EOFError, lzma.LZMAError, ValueError, KeyError) as error:
        raise UserError("data", str(folder), allowed="readable recordings.tsv and audio_delta.npy.xz") from error
    if not waves or not all(len(samples) for samples in waves) or not set(digits.tolist()) <= set(range(10)):
        raise UserError("data", str(folder), allowed="recordings of digits 0 to 9, none of them empty")
    return Recordings(waves, 8000, digits, speakers, indices)


def _wav(path: Path) -> tuple[NDArray[np.int16], int]:
    try:
        with wave.open(str(path), "rb") as stream:
            form = (stream.getnchannels(), stream.getsampwidth())
            samples, rate = np.frombuffer(stream.readframes(stream.getnframes()), "<i2"), stream.getframerate()
    except (OSError, EOFError, wave.Error, ValueError) as error:
        raise UserError("data", str(path), allowed="a readable WAV file of 16 bits, mono") from error
    if form != (1, 2) or not len(samples):
        raise UserError("data", str(path), allowed="a WAV file of 16 bits, mono, with at least one sample")
    return samples.astype(np.int16), rate


def _digest(found: Recordings, made_with: Sequence[int]) -> str:
    digest = hashlib.sha256(repr([found.rate, list(made_with)]).encode())
    for samples in found.waves:
        digest.update(str(len(samples)).encode() + samples.astype("<i2").tobytes())
    return digest.hexdigest()
