"""Sound files in and out: every format against an independent decoder, bad files, the resampler, growing WAV files."""

import os
import shutil
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile

from seqlab.audio import AudioReader, Resampler, WavFile, change_speed, pcm16, read_mono
from seqlab.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = next((p for p in (REPOSITORY.parent / "shared" / "data", REPOSITORY.parents[1] / "shared" / "data") if p.is_dir()), Path("absent"))
FORMATS = sorted((DATA / "audio" / "formats").glob("*.*")) if DATA.is_dir() else []


def tone(seconds=0.5, rate=8000, frequency=440.0, level=0.5):
    return (level * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def read(path):
    with AudioReader(path) as reader:
        return reader.info, np.concatenate(list(reader.blocks()))


# -- formats -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, options, tolerance",
    [
        ("a.wav", {"subtype": "PCM_U8"}, 1 / 127),
        ("a.wav", {"subtype": "PCM_16"}, 1 / 32767),
        ("a.wav", {"subtype": "PCM_24"}, 1e-6),
        ("a.wav", {"subtype": "PCM_32"}, 1e-6),
        ("a.wav", {"subtype": "FLOAT"}, 1e-7),
        ("a.wav", {"subtype": "DOUBLE"}, 1e-7),
        ("a.flac", {"subtype": "PCM_16"}, 1 / 32767),
        ("a.aiff", {"subtype": "PCM_24"}, 1e-6),
        ("a.caf", {"subtype": "PCM_16"}, 1 / 32767),
        ("a.w64", {"subtype": "PCM_16"}, 1 / 32767),
        ("a.au", {"subtype": "PCM_16"}, 1 / 32767),
        ("a.ogg", {}, 0.05),
        ("a.mp3", {}, 0.05),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_what_was_written_is_read(name, options, tolerance, channels, tmp_path):
    x = tone(0.5, 16000)
    # the mean of the channels is the tone again
    frames = x[:, None] if channels == 1 else np.stack([1.5 * x, 0.5 * x], axis=1)
    soundfile.write(tmp_path / name, frames, 16000, **options)
    info, got = read(tmp_path / name)
    assert info.sample_rate == 16000 and info.channels == channels
    if name.endswith("mp3"):  # padded by the encoder: the tone is in it, somewhere
        assert abs(len(got) - len(x)) < 4000
        lag = np.argmax(np.correlate(got, x[1000:3000], "valid")) - 1000
        got, x = got[1000 + lag : 5000 + lag], x[1000:5000]
    assert len(got) == len(x)
    np.testing.assert_allclose(got, x, atol=tolerance)


@pytest.mark.skipif(not FORMATS, reason="the folder shared/data is not here")
@pytest.mark.parametrize("path", FORMATS, ids=lambda p: p.name)
def test_odd_files_against_an_independent_decoder(path):
    """Rate, channels and every sample as another library has them: miniaudio (dr_wav, dr_flac, dr_mp3)."""
    miniaudio = pytest.importorskip("miniaudio", reason="the independent decoder is not installed: pip install miniaudio")
    kind = {".mp3": "mp3", ".flac": "flac"}.get(path.suffix, "wav")
    facts = getattr(miniaudio, f"{kind}_get_file_info")(str(path))
    if kind == "wav":
        sound = miniaudio.wav_read_file_f32(str(path))
    else:
        sound = getattr(miniaudio, f"{kind}_read_file_f32")(str(path))
    expected = np.array(sound.samples, np.float32).reshape(-1, facts.nchannels)
    info, got = read(path)
    assert (info.sample_rate, info.channels) == (facts.sample_rate, facts.nchannels)
    expected = expected.mean(axis=1)
    if kind == "mp3":  # decoders differ in how much of the encoder's delay they drop
        assert abs(len(got) - len(expected)) < 2600
        lags = range(-2600, 2601)
        middle = slice(60_000, 64_000)
        lag = min(lags, key=lambda n: np.abs(np.roll(got, n)[middle] - expected[middle]).max())
        got, expected = np.roll(got, lag)[middle], expected[middle]
        assert np.abs(expected).max() > 0.01
    assert len(got) == len(expected)
    # 8 bits: we divide by 128 with 128 as zero, dr_wav maps 0 .. 255 to -1 .. 1
    np.testing.assert_allclose(got, expected, atol=2e-4 if kind == "mp3" else 1 / 128 if "8bit" in path.name else 2e-5)


def test_other_formats_go_through_ffmpeg(tmp_path, monkeypatch):
    program = pytest.importorskip("imageio_ffmpeg", reason="no ffmpeg here: pip install imageio-ffmpeg").get_ffmpeg_exe()
    import subprocess

    soundfile.write(tmp_path / "a.wav", np.stack([tone(1.0, 22050)] * 2, 1), 22050)
    subprocess.run([program, "-v", "error", "-i", tmp_path / "a.wav", "-c:a", "aac", tmp_path / "a.m4a"], check=True)
    (tmp_path / "bin").mkdir()
    os.symlink(program, tmp_path / "bin" / "ffmpeg")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    info, got = read(tmp_path / "a.m4a")
    assert info.sample_rate == 22050 and info.channels == 2 and abs(len(got) - 22050) < 3000
    assert np.abs(got[5000:15000]).max() == pytest.approx(0.5, abs=0.03)
    (tmp_path / "b.m4a").write_bytes((tmp_path / "a.m4a").read_bytes()[:900])
    with pytest.raises(UserError, match="neither libsndfile"):
        read(tmp_path / "b.m4a")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="install ffmpeg"):
        read(tmp_path / "a.m4a")


# -- bad files -----------------------------------------------------------------------------------------------------
def test_files_that_cannot_be_used(tmp_path):
    def error(name, data=None):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError) as caught:
            read(tmp_path / name)
        message = str(caught.value)
        assert name in message and "\n" not in message
        return message

    assert "no such file" in error("absent.wav")
    assert "empty" in error("zero.wav", b"")
    assert "not a sound file" in error("text.wav", b"hello, this is text\n" * 50)
    assert "not a sound file" in error("binary.wav", bytes(range(256)) * 8)
    soundfile.write(tmp_path / "header.wav", np.zeros(0), 8000)
    assert "no samples" in error("header.wav")
    for bad in (np.nan, np.inf):
        x = tone()
        x[1234] = bad
        soundfile.write(tmp_path / "nan.wav", x, 8000, subtype="FLOAT")
        assert "sample 1,234" in error("nan.wav") and "NaN or infinite" in error("nan.wav")
    (tmp_path / "folder.wav").mkdir()
    assert "directory" in error("folder.wav")
    good = tmp_path / "rate.wav"
    soundfile.write(good, tone(), 8000)
    data = bytearray(good.read_bytes())
    data[24:28] = struct.pack("<I", 7)
    assert "7 samples a second" in error("rate.wav", bytes(data))


def test_short_loud_and_silent_files_are_read(tmp_path):
    for name, x, rate in (
        ("one.wav", np.array([0.25], np.float32), 44100),
        ("silence.wav", np.zeros(4000, np.float32), 8000),
        ("loud.wav", np.array([2.5, -3.0] * 100, np.float32), 8000),
        ("fast.wav", tone(0.1, 192000), 192000),
    ):
        soundfile.write(tmp_path / name, x, rate, subtype="FLOAT")
        info, got = read(tmp_path / name)
        assert info.sample_rate == rate
        np.testing.assert_array_equal(got, x)
        resampled = np.concatenate(list(read_mono(tmp_path / name, 16000)))
        assert len(resampled) == -(-len(x) * 16000 // rate)


# -- resampling ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "old, new", [(44100, 16000), (8000, 16000), (16000, 8000), (192000, 16000), (22050, 16000), (16000, 16000), (48000, 44100)]
)
@pytest.mark.parametrize("length", [1, 2, 441, 20_011])
def test_a_stream_resampled_in_pieces_equals_torchaudio_on_the_whole(old, new, length):
    try:
        import torchaudio.functional as functional
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"torchaudio does not import here: {str(error).splitlines()[0]}")
    import torch

    rng = np.random.default_rng(length)
    x = rng.standard_normal(length).astype(np.float32)
    expected = functional.resample(torch.from_numpy(x).double(), old, new).numpy()
    resampler, parts, at = Resampler(old, new), [], 0
    while at < length:
        size = int(rng.integers(1, 3000))
        parts.append(resampler.push(x[at : at + size]))
        at += size
    got = np.concatenate([*parts, resampler.finish()])
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=3e-6)


def test_the_cut_makes_no_difference_at_all():
    x = np.random.default_rng(0).standard_normal(30_000).astype(np.float32)
    whole = Resampler(44100, 16000)
    expected = np.concatenate([whole.push(x), whole.finish()])
    pieces = Resampler(44100, 16000)
    got = np.concatenate([*(pieces.push(part) for part in np.array_split(x, 211)), pieces.finish()])
    np.testing.assert_array_equal(got, expected)


def test_changed_speed_is_the_tone_at_another_pitch():
    x = tone(1.0, 8000, 500.0)
    for factor in (0.9, 1.0, 1.15):
        got = change_speed(x, factor)
        assert len(got) == round(len(x) / factor)
        expected = tone(2.0, 8000, 500.0 * factor)[: len(got)]
        np.testing.assert_allclose(got[100:-100], expected[100:-100], atol=2e-3)


# -- writing -------------------------------------------------------------------------------------------------------
def test_a_wav_file_is_valid_after_every_write_and_can_be_continued(tmp_path):
    path, x = tmp_path / "a.wav", tone(0.3)
    file = WavFile(path, 8000)
    for i in range(3):
        file.write(x[i * 800 : (i + 1) * 800])
        with wave.open(str(path)) as other:  # the standard library's reader is the judge
            assert (other.getframerate(), other.getnchannels(), other.getsampwidth()) == (8000, 1, 2)
            assert other.getnframes() == 800 * (i + 1)
            frames = np.frombuffer(other.readframes(10**6), "<i2")
            np.testing.assert_array_equal(frames, pcm16(x[: 800 * (i + 1)]))
    file.close()
    shutil.copy(path, tmp_path / "b.wav")
    again = WavFile(tmp_path / "b.wav", 8000, keep=1000)
    again.write(x[1000:])
    again.close()
    whole = WavFile(path, 8000)
    whole.write(x)
    whole.close()
    assert (tmp_path / "b.wav").read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match="not the file that was left behind"):
        WavFile(path, 8000, keep=len(x) + 1)


def test_amplitudes_out_of_range_are_clamped_not_wrapped():
    assert pcm16(np.array([2.0, 1.0, -1.0, -9.0, 0.0])).tolist() == [32767, 32767, -32768, -32768, 0]
