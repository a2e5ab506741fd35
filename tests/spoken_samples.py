"""A small spoken set made of tones: every phone is a tone of its own, speakers differ in pitch and pace."""

import lzma
import wave
from pathlib import Path

import numpy as np

from archsmith.tasks.speech import SpeechRecognition
from archsmith.tasks.spoken_digits import PHONES, WORDS

RATE = 8000
SPEAKERS = ("ada", "bob", "cyn")
_ALL = sorted({phone for spelled in PHONES.values() for phone in spelled})


def spoken(digit: int, speaker: int, index: int, seconds: float = 0.1) -> np.ndarray:
    """Return the int16 samples of a digit."""
    rng = np.random.default_rng([digit, speaker, index])
    pieces = []
    for phone in PHONES[WORDS[digit]]:
        time = np.arange(int(RATE * seconds * rng.uniform(0.9, 1.3))) / RATE
        pitch = (300 + 170 * _ALL.index(phone)) * (1 + 0.03 * speaker)
        pieces.append(np.sin(2 * np.pi * pitch * time) * np.hanning(len(time)))
    sound = 0.5 * np.concatenate(pieces)
    return np.round(32767 * (sound + 0.002 * rng.standard_normal(len(sound)))).clip(-32768, 32767).astype("<i2")


def write_wav(path: Path, samples: np.ndarray, *, rate: int = RATE, channels: int = 1) -> None:
    """Write 16-bit samples."""
    with wave.open(str(path), "wb") as stream:
        stream.setnchannels(channels)
        stream.setsampwidth(2)
        stream.setframerate(rate)
        stream.writeframes(samples.tobytes())


def write_spoken_digits(folder: Path, *, repetitions: int = 8, packed: bool = False) -> Path:
    """Write ten digits by three speakers as WAV files, or packed into two files; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, waves = [], []
    for digit in range(10):
        for speaker, name in enumerate(SPEAKERS):
            for index in range(repetitions):
                samples, file = spoken(digit, speaker, index), f"{digit}_{name}_{index}.wav"
                rows.append((file, digit, name, index, sum(map(len, waves))))
                waves.append(samples)
                if not packed:
                    write_wav(folder / file, samples)
    if packed:
        text = "file\tdigit\tspeaker\tindex\tsplit\tstart\tend\n"
        for (file, digit, name, index, start), samples in zip(rows, waves, strict=True):
            split = "test" if index < 5 else "train"
            text += f"{file}\t{digit}\t{name}\t{index}\t{split}\t{start}\t{start + len(samples)}\n"
        (folder / "recordings.tsv").write_text(text, encoding="utf-8")
        joined = np.concatenate(waves).astype(np.int16)
        with lzma.open(folder / "audio_delta.npy.xz", "wb") as stream:
            np.save(stream, np.diff(joined, prepend=np.int16(0)))
    return folder


def tiny_speech(utterances: int = 48) -> SpeechRecognition:
    """Return words of one or two of three tokens, each some frames of its own band, in noise."""
    rng = np.random.default_rng(0)
    features, targets = [], []
    for index in range(utterances):
        target = [1 + index % 3, 1 + (index // 3) % 3][: 1 + index % 2]
        frames = np.repeat(target, 6)
        sound = rng.normal(0, 0.3, (3, 4, len(frames) + index % 3)).astype(np.float32)
        sound[0, frames, np.arange(len(frames))] += 3.0
        features.append(sound)
        targets.append(target)
    order = np.arange(utterances)
    splits = {"train": order[order % 6 > 1], "valid": order[order % 6 == 0], "test": order[order % 6 == 1]}
    return SpeechRecognition(
        "tiny", features, targets, tokens=("<blank>", "a", "b", "c"), splits=splits, frames=15, digest="tiny"
    )
