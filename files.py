"""Files that are never torn, and never read with a flipped bit.

A file of tensors is in safetensors form (an 8-byte length, a JSON header, raw tensors), so transformers opens our weights and no
pickle is ever executed.  Its header also holds a sha256 of everything else, which is checked on reading.  A file gets its name
only when it is whole and on the disk (temporary name, fsync, rename).
"""
import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch

from parallel import rank

DTYPES = {"F64": torch.float64, "I64": torch.int64, "F32": torch.float32, "I32": torch.int32, "F16": torch.float16,
          "BF16": torch.bfloat16, "I16": torch.int16, "U8": torch.uint8, "I8": torch.int8, "BOOL": torch.bool}


class UserError(ValueError):
    """What a user can cause and mend.  Its text is the one sentence that they see: what, where, what to do."""


@contextlib.contextmanager
def writing(path):
    """A full disk, or whatever else keeps `path` from being written, becomes one sentence."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        raise UserError(f"cannot write {path}: {error.strerror or error} ({free:,} bytes are free there); what stood there "
                        "before is untouched: make room, or name another folder by --run") from error


@contextlib.contextmanager
def atomic(path, mode="wb"):
    """Opens a file for writing that takes the name `path` only when it is whole and on the disk."""
    path, text = Path(path), {} if "b" in mode else {"encoding": "utf-8"}
    if rank() > 0:                                                   # process 0 writes the same
        with open(os.devnull, mode, **text) as file:
            yield file
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, mode, **text) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def sync_folder(folder):
    """Makes a rename in `folder` last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def write_tensors(path, tensors, meta=None):
    """Writes {name: tensor} and a JSON-able `meta` as a safetensors file; returns its sha256 (of header and data)."""
    tensors = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    names = sorted(tensors, key=lambda k: (-tensors[k].element_size(), k))   # widest first: every tensor lies aligned
    header, offset = {"__metadata__": {"format": "pt", "meta": json.dumps(meta), "sha256": "0" * 64}}, 0
    code = {dtype: name for name, dtype in DTYPES.items()}
    for k in names:
        size = tensors[k].numel() * tensors[k].element_size()
        header[k] = {"dtype": code[tensors[k].dtype], "shape": list(tensors[k].shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = [tensors[k].reshape(-1).view(torch.uint8).numpy() for k in names]
    digest = hashlib.sha256(text)
    for block in data:
        digest.update(block)
    with atomic(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text.replace(b"0" * 64, digest.hexdigest().encode(), 1))
        for block in data:
            file.write(block)
    return digest.hexdigest()


def read_tensors(path):
    """Reads a safetensors file -> ({name: tensor}, meta).  UserError where it is torn, or differs from what was written."""
    path = Path(path)
    try:
        blob = bytearray(path.read_bytes())
        length = int.from_bytes(blob[:8], "little")
        header = json.loads(blob[8:8 + length].decode())
        info = header.pop("__metadata__", {})
        if "sha256" in info:                                         # a file of ours: nothing in it may have changed
            blob[8:8 + length] = blob[8:8 + length].replace(info["sha256"].encode(), b"0" * 64, 1)
            if hashlib.sha256(memoryview(blob)[8:]).hexdigest() != info["sha256"]:
                raise ValueError("its checksum does not match")
        tensors = {}
        for name, entry in header.items():
            begin, end = (8 + length + o for o in entry["data_offsets"])
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            if begin < 8 + length or end > len(blob) or end - begin != torch.Size(shape).numel() * dtype.itemsize:
                raise ValueError(f"{name} lies outside of it")
            flat = torch.frombuffer(blob, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=begin) if end > begin \
                else torch.empty(0, dtype=dtype)
            tensors[name] = flat.view(shape)
        return tensors, json.loads(info.get("meta", "null"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise UserError(f"{path} is corrupt or incomplete ({error}): remove it, and it is made again") from error


def stored_checksum(path):
    """The sha256 in a file's header, None where there is none: which file it is, without reading all of it."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(min(length, 2 ** 20)))["__metadata__"]["sha256"]


def write_json(path, value):
    with atomic(path, "w") as file:
        json.dump(value, file, indent=1)


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove its folder, and it is made again") from error
