"""Ways to damage a checkpoint, by accident and on purpose."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

NASTY = [
    None, True, -1, 0, 1, 2, 7, 2**31, 2**62, 2**63, 2**64, 10**30, 0.5, -0.0, float("nan"), float("inf"), "", "x",
    "F32", "F64", "U8", "C128", "../evil", "/etc/passwd", "a/b", "..", ".", "con\0trol", "model.safetensors",
    "state.safetensors", "manifest.json", "\ud800", "é" * 300, [], [0], [-1], [2**40, 2**40], [2**62] * 9,
    [1] * 65, [[1]], ["3"], [3.0], {}, {"a": 1}, {"size": -5, "sha256": "0" * 64}, "0" * 64, [True],
]  # fmt: skip


def sealed(fields):
    """A manifest with the checksum that belongs to it, as one who means harm would write it."""
    body = json.dumps({name: value for name, value in fields.items() if name != "sha256"})[:-1].encode()
    return body + f',\n"sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


class Target:
    """A checkpoint's folder that is damaged and made whole again, many times."""

    def __init__(self, folder: Path, outside: Path) -> None:
        self.folder, self.outside = folder, outside
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.tensors = [name for name in self.files if name.endswith(".safetensors")]

    def mend(self) -> None:
        for path in self.folder.iterdir():
            if path.is_symlink() or not path.is_dir():
                path.unlink()
            else:
                shutil.rmtree(path)
        for name, data in self.files.items():
            (self.folder / name).write_bytes(data)

    def put(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)

    # --- accidents ------------------------------------------------------------------------------------------------

    def flip(self, r: random.Random) -> None:
        name = r.choice(list(self.files))
        data = bytearray(self.files[name])
        for _ in range(r.choice([1, 1, 1, 2, 9])):
            data[r.randrange(len(data))] ^= 1 << r.randrange(8)
        self.put(name, bytes(data))

    def cut(self, r: random.Random) -> None:
        name = r.choice(list(self.files))
        self.put(name, self.files[name][: r.choice([0, 1, 7, 8, 9, r.randrange(len(self.files[name]))])])

    def grow(self, r: random.Random) -> None:
        name = r.choice(list(self.files))
        extra = r.choice([b"\0", b"\n", b" ", r.randbytes(r.randrange(1, 99)), self.files[name]])
        self.put(name, r.choice([self.files[name] + extra, extra + self.files[name]]))

    def overwrite(self, r: random.Random) -> None:
        name = r.choice(list(self.files))
        data = bytearray(self.files[name])
        at, size = r.randrange(len(data)), r.randrange(1, 64)
        data[at : at + size] = r.choice([bytes, r.randbytes])(len(data[at : at + size]))
        self.put(name, bytes(data))

    def swap(self, r: random.Random) -> None:
        a, b = r.sample(list(self.files), 2)
        self.put(a, self.files[b])
        if r.random() < 0.5:
            self.put(b, self.files[a])

    def lose(self, r: random.Random) -> None:
        for name in r.sample(list(self.files), r.randrange(1, len(self.files))):
            (self.folder / name).unlink()

    # --- harm -----------------------------------------------------------------------------------------------------

    def relink(self, r: random.Random) -> None:
        """Something else than a file: links, also to the very same bytes, folders, pipes, devices."""
        name = r.choice(list(self.files))
        path = self.folder / name
        path.unlink()
        kind = r.choice(["same", "zero", "secret", "loop", "nothing", "folder", "pipe"])
        if kind == "same":
            (self.outside / name).write_bytes(self.files[name])
            path.symlink_to(self.outside / name)
        elif kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            links = {"zero": "/dev/zero", "secret": "/etc/passwd", "loop": name, "nothing": "missing"}
            path.symlink_to(links[kind])

    def header(self, r: random.Random) -> None:
        """Another header in a file of tensors, with all checksums set right."""
        name = r.choice(self.tensors)
        data = self.files[name]
        size = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + size])
        key = r.choice(list(entries))
        field = r.choice(list(entries[key])) if isinstance(entries[key], dict) else None
        change = r.randrange(5)
        if change == 0:
            entries[key][field] = r.choice(NASTY)
        elif change == 1:
            entries[r.choice(["../x", "step", "w", "\0"])] = entries.pop(key)
        elif change == 2:
            entries["__metadata__"] = r.choice(NASTY)
        text = json.dumps(entries).encode("utf-8", "surrogatepass")
        length = r.choice([len(text), len(text), 0, 2**63, 2**64 - 1, len(text) + 1, 10**8])
        if change == 3:
            text = r.choice(
                [b"[" * 10**5, b"{" * 99, b'{"a":' * 10**4, text[:-1], b"", b"null", text.replace(b":", b"::")]
            )
        self.rehashed(name, length.to_bytes(8, "little") + text + data[8 + size :])

    def rehashed(self, name: str, data: bytes) -> None:
        self.put(name, data)
        fields = json.loads(self.files["manifest.json"])
        fields["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self.put("manifest.json", sealed(fields))

    def values(self, r: random.Random) -> None:
        """Other values with all checksums set right: a forgery that no one can tell from the truth."""
        name = r.choice(self.tensors)
        data = bytearray(self.files[name])
        start = 8 + int.from_bytes(data[:8], "little")
        data[r.randrange(start, len(data))] ^= 1 << r.randrange(8)
        self.rehashed(name, bytes(data))

    def manifest(self, r: random.Random, seal: bool = True) -> None:
        """Something else somewhere in the manifest, with the right checksum of it."""
        fields = json.loads(self.files["manifest.json"])
        for _ in range(r.choice([1, 1, 2, 4])):
            place, key = fields, r.choice(list(fields))
            while isinstance(place[key], dict | list) and len(place[key]) and r.random() < 0.85:
                place = place[key]
                key = r.choice(list(place)) if isinstance(place, dict) else r.randrange(len(place))
            change = r.randrange(4)
            if change == 0:
                place[key] = r.choice(NASTY)
            elif change == 1 and isinstance(place, dict):
                place[str(r.choice(NASTY))] = place.pop(key)
            elif change == 2:
                del place[key]
            elif isinstance(place, dict):
                place[str(r.choice(NASTY))] = r.choice([r.choice(NASTY), place[key]])
            if not fields:
                break
        self.put("manifest.json", sealed(fields) if seal else json.dumps(fields, indent=1).encode())

    def edited(self, r: random.Random) -> None:
        self.manifest(r, seal=False)

    def bomb(self, r: random.Random) -> None:
        """JSON that is meant for the parser."""
        self.put("manifest.json", r.choice([
            b"[" * 10**5, b'{"a":' * 10**5, b"", b"null", b"[]", b"\xff\xfe", b'{"format": 2, "format": 2}',
            b'{"format": ' + b"9" * 5000 + b"}", b'{"format": 2}',
            b'{"format": 2,\n"sha256": "' + b"0" * 64 + b'"\n}\n',
            b"\0" * 999, b'{"format": NaN}', sealed({"format": 2}), sealed({"format": [2]}), sealed({"format": True}),
        ]))  # fmt: skip

    ACCIDENTS = (flip, flip, cut, grow, overwrite, swap, lose, edited)
    HARM = (relink, header, header, manifest, manifest, manifest, bomb, values)
