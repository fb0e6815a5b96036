"""What a file or folder is that is no checkpoint here, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Collection

EXPORTED = "whose layers are fixed; fold the model before it is exported"
PACKED = "a packed file; unpack it, and name the checkpoint in it"
# What begins at a byte of a file of each kind.
BEGINNINGS = (
    (
        0,
        b"version https://git-lfs",
        "a pointer of Git LFS; fetch the file itself with git lfs pull",
    ),
    (0, b"\x1f\x8b", PACKED),
    (0, b"BZh", PACKED),
    (0, b"\xfd7zXZ\x00", PACKED),
    (0, b"\x28\xb5\x2f\xfd", PACKED),
    (0, b"7z\xbc\xaf\x27\x1c", PACKED),
    (0, b"Rar!", PACKED),
    (257, b"ustar", PACKED),
    (0, b"GGUF", f"a GGUF file, {EXPORTED}"),
    (4, b"TFL3", f"a TensorFlow Lite file, {EXPORTED}"),
    (0, b"\x93NUMPY", "an array of NumPy's; save a state dict, or a safetensors file"),
)
ONNX = re.compile(rb"\x08[\x01-\x1f]\x12[\x01-\x40][ -~]")  # versions, and who has written it
ONNX_FILE = f"an ONNX file, {EXPORTED}"
WEB_PAGE = "a web page, such as an error in place of the file; download that again"
TENSORFLOW = re.compile(r".+\.data-\d{5}-of-\d{5}|.+\.index|checkpoint")
TENSORFLOW_PART = (
    "a part of TensorFlow's checkpoint; load that into the model, and save it as .keras"
)
SAVED_MODEL = f"a SavedModel of TensorFlow's, {EXPORTED}"
SPLIT = re.compile(
    r"(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_\w+_states\.pt"
)  # by DeepSpeed, parts alone
DEEPSPEED = re.compile(rf"{SPLIT.pattern}|(bf16_)?mp_rank_\d+_\w+_states\.pt|zero_to_fp32\.py")
DEEPSPEED_PART = "DeepSpeed; its script zero_to_fp32.py makes one file of it"


def foreign_file(name: str, head: bytes) -> str:
    """Return what a file is that begins so; "" where that is not known."""
    for start, text, what in BEGINNINGS:
        if head[start : start + len(text)] == text:
            return what
    if ONNX.match(head) or name.lower().endswith(".onnx"):
        return ONNX_FILE
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        return WEB_PAGE
    return TENSORFLOW_PART if TENSORFLOW.fullmatch(name) else ""


def foreign_archive(name: str, members: Collection[str], suffixes: tuple[str, ...]) -> str:
    """Return what a zip archive of this name and members is; "" where that is not known.

    suffixes: those of checkpoints, one of which is no packed one.
    """
    exported = ("archive_format", "serialized_exported_program.json")
    if any(member.endswith(exported) for member in members):
        return f"a program of torch.export, {EXPORTED}"
    if members and all(member.endswith(".npy") for member in members):
        return "an archive of NumPy's arrays; save a state dict, or a safetensors file"
    packed = any(member.lower().endswith(suffixes) for member in members)
    return PACKED if packed and not name.lower().endswith(suffixes) else ""


def foreign_folder(names: Collection[str]) -> str:
    """Return what a folder is that has files of these names; "" where that is not known."""
    if any(map(DEEPSPEED.fullmatch, names)):
        return f"a folder of {DEEPSPEED_PART}"
    return SAVED_MODEL if "saved_model.pb" in names else ""
