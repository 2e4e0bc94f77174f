"""Files that a recorder writes and that a report reads: bad ones are refused by file and field."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import recorded
import torch

from deft_kernels import row_statistics
from deft_kernels.diagnostics import Recorder, Recording
from deft_kernels.diagnostics.stored import find
from deft_kernels.diagnostics.streaming import Rows


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "run.npz"
    recorded.run().training.save(path)
    return path


def test_loaded_as_it_was_saved(saved: Path) -> None:
    first, second = recorded.run().training, Recording.load(saved)
    for field in dataclasses.fields(Recording):
        one, other = getattr(first, field.name), getattr(second, field.name)
        assert type(one) is type(other), field.name
        np.testing.assert_array_equal(one, other)
    assert [path.name for path in saved.parent.iterdir()] == ["run.npz"]
    with np.load(saved, allow_pickle=False) as fields:  # as anybody may read it
        assert fields["version"] == 1 and fields["objectives"].tolist() == list(first.objectives)


def rewritten(path: Path, **changes: object) -> None:
    with np.load(path) as fields:
        everything = dict(fields) | changes
    np.savez(path, **{name: value for name, value in everything.items() if value is not None})


def with_nan(name: str) -> np.ndarray:
    table = getattr(recorded.run().training, name).copy()
    table.reshape(-1)[3] = np.nan
    return table


@pytest.mark.parametrize(
    "field, change, message",
    [
        ("version", lambda: np.array(2), "version: is 2, this package reads 1"),
        ("version", lambda: None, "version: there is no such field"),
        ("mass", lambda: None, "mass: there is no such field"),
        ("mass", lambda: np.zeros((1, 2)), r"mass: expected shape \(6, 1, 100, 50\), got \(1, 2\)"),
        ("mass", lambda: with_nan("mass"), "mass: holds NaN"),
        ("values", lambda: with_nan("values"), "values: holds NaN"),
        ("p_alpha", lambda: -recorded.run().training.p_alpha, "p_alpha: holds a number below 0"),
        (
            "series",
            lambda: recorded.run().training.series.astype("f4"),
            "series: expected float64, got float32",
        ),
        ("tokens", lambda: recorded.run().training.values, "tokens: holds float64"),
        ("stride", lambda: np.array(0), "stride: expected at least 1, got 0"),
        ("seed", lambda: np.array([1, 2]), "seed: expected one integer"),
        ("objectives", lambda: np.array([b"nll"]), "objectives: holds |S3"),
    ],
)
def test_a_recording_with_a_wrong_field(saved: Path, field: str, change: Callable, message: str) -> None:
    rewritten(saved, **{field: change()})
    with pytest.raises(ValueError, match=rf"run\.npz: {message}"):
        Recording.load(saved)


def test_pickles_are_not_read(saved: Path) -> None:
    rewritten(saved, mass=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"run\.npz: mass: cannot be read \(Object arrays cannot be loaded"):
        Recording.load(saved)


@pytest.mark.parametrize("kept", [0, 10, 0.5, -1])
def test_a_recording_cut_short(saved: Path, kept: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(len(whole) * kept) if kept == 0.5 else int(kept)])
    with pytest.raises(ValueError, match=r"run\.npz: every field: not an npz file, or cut short"):
        Recording.load(saved)


def test_a_recording_damaged_within(saved: Path) -> None:
    with zipfile.ZipFile(saved) as archive:
        place = archive.getinfo("mass.npy").header_offset + 200
    damaged = bytearray(saved.read_bytes())
    damaged[place : place + 20] = bytes(20)
    saved.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"run\.npz: mass: cannot be read"):
        Recording.load(saved)


def test_a_full_disk_leaves_the_file_of_before(saved: Path) -> None:
    resource = pytest.importorskip("resource", reason="the operating system has no such bounds")
    before, bounds = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, bounds[1]))
    try:
        with pytest.raises(OSError, match=r"run\.npz: [\w ]+: File too large"):
            recorded.run().training.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, bounds)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["run.npz"]


def test_who_reads_while_it_is_saved_has_the_file_of_before(saved: Path) -> None:
    before = saved.read_bytes()
    with saved.open("rb") as reader:
        recorded.run().after.save(saved)
        assert reader.read() == before
    assert Recording.load(saved).count == recorded.run().after.count


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"none/run\.npz: the file: No such file"):
        recorded.run().training.save(tmp_path / "none" / "run.npz")


def safetensors(path: Path, **tensors: torch.Tensor) -> Path:
    """The format as its page describes it: the header's length, the header, the numbers."""
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32"}
    header, data = {}, b""
    for name, tensor in tensors.items():
        own = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        place = [len(data), len(data) + len(own)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        data += own
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_blocks_of_rows_are_the_tensors(tmp_path: Path) -> None:
    logits = torch.randn(3, 5, 7)
    np.savez(tmp_path / "a.npz", logits=logits.numpy(), labels=np.zeros((3, 5), np.int32))
    safetensors(tmp_path / "b.safetensors", odd=torch.zeros(1, dtype=torch.int32), head=logits.bfloat16())
    found = find([tmp_path / "a.npz", tmp_path / "b.safetensors"], {"weight": "head"})
    assert set(found) == {"logits", "labels", "weight"}
    flat = logits.reshape(15, 7)
    assert torch.equal(found["logits"].read(4, 11), flat[4:11]) and found["logits"].rows == 15
    assert torch.equal(found["weight"].read(0, 15), flat.bfloat16())
    assert torch.equal(found["weight"].whole(), logits.bfloat16())
    assert torch.equal(found["labels"].whole(), torch.zeros(3, 5, dtype=torch.int32))


def test_the_package_safetensors_writes_what_is_read(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    logits = torch.randn(4, 9).bfloat16()
    package.save_file({"logits": logits, "labels": torch.arange(4)}, tmp_path / "a.safetensors")
    found = find([tmp_path / "a.safetensors"])
    assert torch.equal(found["logits"].whole(), logits)
    assert torch.equal(found["labels"].whole(), torch.arange(4))


LOGITS, LABELS = np.zeros((4, 9), np.float32), np.arange(4)
HIDDEN, HEAD = np.zeros((4, 3), np.float32), np.zeros((9, 3), np.float32)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"logits": LOGITS}, "labels: no file has a tensor of this name"),
        ({"labels": LABELS}, "logits, hidden: neither found"),
        ({"logits": LOGITS, "hidden": HIDDEN, "labels": LABELS}, "logits, hidden: both found"),
        ({"logits": LOGITS, "labels": LABELS[:3]}, r"labels: has shape \(3,\), expected that of .*: logits"),
        ({"logits": LOGITS, "labels": LABELS * 3}, r"labels: 9 at flat position 3 is outside \[0, 9\)"),
        ({"logits": LOGITS, "labels": LABELS - 1}, r"labels: -1 at flat position 0 is outside \[0, 9\)"),
        ({"logits": LOGITS, "labels": LABELS * 1.0}, r"labels: holds torch.float64, expected integers"),
        ({"logits": LABELS, "labels": LABELS}, r"logits: holds torch.int64, expected floating"),
        ({"logits": LOGITS[:, :0], "labels": LABELS}, r"logits: the vocabulary .* is empty"),
        ({"logits": LOGITS.astype(complex), "labels": LABELS}, r"logits: holds <c16; known"),
        ({"logits": LOGITS.astype(">f4"), "labels": LABELS}, r"logits: holds >f4; known"),
        ({"logits": np.asfortranarray(LOGITS), "labels": LABELS}, r"logits: is in Fortran's order"),
        ({"logits": np.float32(1), "labels": LABELS}, r"logits: is one number"),
        ({"hidden": HIDDEN, "labels": LABELS}, r"hidden: needs a head"),
        ({"hidden": HIDDEN, "weight": LOGITS, "labels": LABELS}, r"weight: has shape .* expected \[V, 3\]"),
        ({"hidden": HIDDEN, "weight": HEAD, "bias": HEAD, "labels": LABELS}, r"bias: has shape \(9, 3\)"),
        ({"hidden": HIDDEN, "weight": HEAD.astype("f8"), "labels": LABELS}, r"weight: holds torch.float64"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(tmp_path: Path, fields: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "a.npz", **fields)
    # What is wrong lies in a file's field, unless there is no such field.
    place = "" if "found" in message or "no file" in message else r"a\.npz: "
    with pytest.raises(ValueError, match=place + message):
        Rows.of(find([tmp_path / "a.npz"]))


def test_files_that_cannot_be_mapped(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", logits=LOGITS)
    with pytest.raises(ValueError, match=r"logits: is compressed and cannot be mapped"):
        find([tmp_path / "a.npz"])
    np.savez(tmp_path / "b.npz", logits=LOGITS)
    np.savez(tmp_path / "c.npz", logits=LOGITS)
    with pytest.raises(ValueError, match=r"c\.npz: logits: .*b\.npz has logits already"):
        find([tmp_path / "b.npz", tmp_path / "c.npz"])
    with pytest.raises(ValueError, match=r"b\.npz: head: no file has a tensor of this name"):
        find([tmp_path / "b.npz"], {"weight": "head"})
    (tmp_path / "d.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:150])
    with pytest.raises(ValueError, match=r"d\.npz: every field: .* cut short"):
        find([tmp_path / "d.npz"])
    with pytest.raises(OSError, match=r"none\.npz"):
        find([tmp_path / "none.npz"])


def test_safetensors_cut_short_or_wrong(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "a.safetensors", logits=torch.zeros(4, 9))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"a\.safetensors: logits: .* cut short or wrong"):
        find([path])
    foreign = b"\x10" + bytes(7) + b"x" * 40
    for wrong in (whole[:20], whole[:4], foreign, whole.replace(b"offsets", b"offset_")):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"a\.safetensors: header: not a safetensors file"):
            find([path])
    path.write_bytes(whole.replace(b'"F32"', b'"F4x"'))
    with pytest.raises(ValueError, match=r"a\.safetensors: logits: holds F4x; known"):
        find([path])


@pytest.mark.parametrize("shape, offsets", [
    (["4", 9], [0, 144]), ([4.0, 9], [0, 144]), ([-4, -9], [0, 144]), ([True, 36], [0, 144]),
    ([[4], 9], [0, 144]), ("49", [0, 144]), (None, [0, 144]), ([4, 9], [-8, 136]), ([4, 9], [0.0, 144.0]),
    ([4, 9], ["0", "144"]), ([4, 9], [0, 144, 288]), ([4, 9], [0]), ([4, 9], {}),
])  # fmt: skip
def test_places_that_are_none(tmp_path: Path, shape: object, offsets: object) -> None:
    text = json.dumps({"logits": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(144))
    with pytest.raises(ValueError, match=r"a\.safetensors: header: not a safetensors file"):
        find([path])


def test_a_header_of_brackets(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((10**6).to_bytes(8, "little") + b"[" * 10**6)
    with pytest.raises(ValueError, match=r"a\.safetensors: header: not a safetensors file"):
        find([path])


def refused_by_name_or_read(path: Path, read: Callable[[Path], object], step: int = 1) -> int:
    """`read` of the file with one byte after another changed; returns how often that was refused."""
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), step):
        for change in (1 << place % 8, 0xFF):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
            try:
                read(path)
            except ValueError as error:
                assert str(error).startswith(f"{path}: "), (place, change)
                refused += 1
    return refused


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])
def test_any_byte_of_stored_tensors_wrong(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".npz":
        np.savez(path, logits=LOGITS, labels=LABELS)
    else:
        safetensors(path, logits=torch.zeros(4, 9), labels=torch.arange(4))
    assert refused_by_name_or_read(path, lambda path: find([path])) > 100


def test_any_byte_of_a_recording_wrong(tmp_path: Path) -> None:
    """What is read in spite of it, as where a byte means nothing to the reader, is what was saved."""
    path, recorder = tmp_path / "run.npz", Recorder(["nll"], tokens=1, slots=2)
    recorder.add(row_statistics(torch.zeros(1, 3), torch.tensor([1])), torch.tensor([1]))
    recorder.save(path)
    saved = Recording.load(path)

    def read(path: Path) -> None:
        read = Recording.load(path)
        for field in dataclasses.fields(Recording):
            np.testing.assert_array_equal(getattr(saved, field.name), getattr(read, field.name))

    assert refused_by_name_or_read(path, read, step=3) > 1000
