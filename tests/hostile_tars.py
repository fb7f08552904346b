"""This file owns hostile shards: a good tar that is damaged blindly, forged knowingly, or given hostile members, drawn from a number."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.hostile_pictures import KINDS, LABELS, PICTURES, picture

Draw = np.random.Generator
SAMPLES = 8
BLOCK = 512


@dataclass(frozen=True)
class Hostile:
    """A shard as somebody might plant it: if it is read at all, the samples `sound` must come out whole and those of `there` be counted."""

    number: int
    what: str
    data: bytes
    there: frozenset[str]
    sound: frozenset[str]


Member = tuple[bytes, bytes]  # header block(s), data with its padding


def header(
    name: bytes, size: int | bytes, kind: bytes = b"0", *, link: bytes = b"", forged: int | None = None
) -> bytes:
    """One header block of a tar, with a right checksum unless another is forged."""
    octal = size if isinstance(size, bytes) else b"%011o\0" % size
    assert len(octal) == 12, octal
    block = bytearray(
        name[:100].ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + octal + b"00000000000\0" + b" " * 8
    )
    block += kind + link[:100].ljust(100, b"\0") + b"ustar\x0000"
    block += bytes(BLOCK - len(block))
    block[148:156] = b"%06o\0 " % (sum(block) if forged is None else forged)
    return bytes(block)


def member(name: bytes, data: bytes, kind: bytes = b"0") -> bytes:
    """A header and its data."""
    return header(name, len(data), kind) + padded(data)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def base256(value: int) -> bytes:
    """A size as GNU writes what octal digits cannot hold."""
    return (b"\x80" if value >= 0 else b"\xff") + (value % (1 << 88)).to_bytes(11, "big")


def record(key: bytes, value: bytes) -> bytes:
    """One record of a PAX header, whose length counts itself."""
    rest, size = len(key) + len(value) + 3, 0
    while size != rest + len(str(size)):
        size = rest + len(str(size))
    return b"%d %s=%s\n" % (size, key, value)


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    return member(b"pax", b"".join(record(*one) for one in records), kind)


def good(draw: Draw) -> dict[str, list[bytes]]:
    """The members of each sample, as blocks."""
    found, suffixes = {}, list(KINDS)
    for number in range(SAMPLES):
        suffix = suffixes[number % len(suffixes)]
        parts = [
            member(f"s{number}.cls".encode(), b"%d" % number),
            member(f"s{number}.{suffix}".encode(), picture(draw, suffix)),
        ]
        found[f"s{number}"] = parts[:: int(draw.choice([1, -1]))]
    return found


def joined(samples: dict[str, list[bytes]]) -> bytes:
    return b"".join(part for parts in samples.values() for part in parts) + bytes(2 * BLOCK)


# Damage that knows nothing of tars. Headers carry checksums, so what is taken for a whole tar holds every key that it held.
def flipped(draw: Draw, data: bytearray) -> bytes:
    for at in draw.integers(0, len(data), draw.integers(1, 9)):
        data[at] ^= 1 << int(draw.integers(8))
    return bytes(data)


def cut(draw: Draw, data: bytearray) -> bytes:
    return bytes(data[: draw.integers(len(data) - BLOCK)])


def overwritten(draw: Draw, data: bytearray) -> bytes:
    at, size = draw.integers(len(data)), int(draw.choice([1, 8, BLOCK, 3 * BLOCK]))
    data[at : at + size] = draw.bytes(size) if draw.random() < 0.5 else bytes(size)
    return bytes(data)


def inserted(draw: Draw, data: bytearray) -> bytes:
    at = int(draw.integers(len(data) // BLOCK - 2)) * BLOCK
    what = [bytes(BLOCK), bytes(2 * BLOCK), draw.bytes(BLOCK), bytes(data[:BLOCK]), draw.bytes(7)][draw.integers(5)]
    return bytes(data[:at]) + what + bytes(data[at:])


def missing(draw: Draw, data: bytearray) -> bytes:
    at = int(draw.integers(len(data) // BLOCK - 2)) * BLOCK
    del data[at : at + BLOCK * int(draw.integers(1, 4))]
    return bytes(data)


def swapped(draw: Draw, data: bytearray) -> bytes:
    one, two = (int(at) * BLOCK for at in draw.integers(0, len(data) // BLOCK, 2))
    data[one : one + BLOCK], data[two : two + BLOCK] = data[two : two + BLOCK], data[one : one + BLOCK]
    return bytes(data)


def twice(draw: Draw, data: bytearray) -> bytes:
    return bytes(data) + bytes(data[: draw.integers(1, 3) * BLOCK])


BLIND = [flipped, cut, overwritten, inserted, missing, swapped, twice]

# Forged members, put before, between or behind good samples: these must still come out, or the shard be refused.
ESCAPES = b"\x1b]0;owned\x07\x1b[2J\r\nWARNING\x9b"
DEEP = 3000
NAMES = [
    b"../../../../tmp/x", b"/etc/passwd", b"a/../../b", b"\n", b"\r\nx", ESCAPES, b"\xff\xfe\xfd", b"", b".", b"..", b"a//b", b"x\0y",
    "\u202egpj".encode(), b"s0", b" ", b"%s%n", b"pipe:touch x", b"__meta__/x", b"C:\\x", b"~/x", b"$(touch x)",
]  # fmt: skip


def named(draw: Draw) -> bytes:
    """A sample of a hostile name, in the header, in a GNU header or in a PAX header."""
    name, data = NAMES[draw.integers(len(NAMES))], picture(draw, "png")
    found = b""
    for suffix, body in ((b".png", data), (b".cls", b"1")):
        match int(draw.integers(3)):
            case 0:
                found += member(name + suffix, body)
            case 1:
                found += member(b"././@LongLink", name + suffix + b"\0", b"L") + member(b"short", body)
            case _:
                found += pax((b"path", name + suffix)) + member(b"short", body)
    return found


def sized(draw: Draw) -> bytes:
    """A member of a hostile size."""
    sizes = [
        b"7" * 11 + b"\0", b"-0000000001\0", base256(-1), base256(-(1 << 40)), base256(1 << 62), base256((1 << 87) - 1), b"00000000009\0",
        b"garbage....\0", bytes(12), b"\x80" + bytes(11), b"  1 2      \0", base256(-BLOCK), base256(-2 * BLOCK), base256(-1 << 87),
    ]  # fmt: skip
    return header(b"x.png", sizes[draw.integers(len(sizes))]) + padded(picture(draw, "png"))


def other_kind(draw: Draw) -> bytes:
    """A link, a device, a pipe, a folder or something unheard of, where a picture should be."""
    kind = b"12345670VMNDXZ\x00\xff"[(at := int(draw.integers(16))) : at + 1]
    target = [b"/etc/passwd", b"s0.png", b"x.png", b"../../x"][draw.integers(4)]
    return header(b"x.png", 0, kind, link=target) + member(b"x.cls", b"1")


def sparse(draw: Draw) -> bytes:
    """A member that claims holes, in one of four ways."""
    data = picture(draw, "png")
    ways: list[Callable[[], bytes]] = [
        lambda: member(b"x.png", data, b"S"),
        lambda: pax((b"GNU.sparse.map", b"0,99999999999"), (b"GNU.sparse.size", b"9" * 17)) + member(b"x.png", data),
        lambda: pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"9")) + member(b"x.png", b"9999999999\n"),
        lambda: pax(*[(b"GNU.sparse.offset", b"1"), (b"GNU.sparse.numbytes", b"1")] * 5000, (b"GNU.sparse.size", b"1")) + member(b"x.png", data),
    ]  # fmt: skip
    return ways[draw.integers(4)]() + member(b"x.cls", b"1")


def long_headers(draw: Draw) -> bytes:
    """A header before a header that is huge, lies, holds nonsense, or has thousands like it behind it."""
    own = member(b"x.png", picture(draw, "png")) + member(b"x.cls", b"1")
    ways: list[Callable[[], bytes]] = [
        lambda: header(b"pax", (1 << 33) - 1, b"x"),
        lambda: header(b"pax", base256(1 << 62), b"x"),
        lambda: header(b"pax", base256(-1), b"x"),
        lambda: header(b"././@LongLink", (1 << 33) - 1, b"L"),
        lambda: header(b"././@LongLink", base256(1 << 80), b"K"),
        lambda: member(b"././@LongLink", b"x" * (1 << 24) + b".png", b"L"),
        lambda: pax((b"path", b"y" * (1 << 24) + b".png")),
        lambda: pax((b"path", b"/" * 5000 + b"y.png")),
        lambda: pax((b"size", b"-1")),
        lambda: pax((b"size", b"9" * 5000)),
        lambda: pax((b"size", b"1e3")),
        lambda: pax((b"size", b"%d" % (1 << 70))),
        lambda: pax((b"mtime", b"inf"), (b"uid", b"-1"), (b"gid", b"nan")),
        lambda: member(b"pax", b"99999999 path=x\n", b"x"),
        lambda: member(b"pax", b"0 path=x\n", b"x"),
        lambda: member(b"pax", b"-5 path=x\n", b"x"),
        lambda: member(b"pax", b"9" * 6000 + b" path=x\n", b"x"),
        lambda: member(b"pax", draw.bytes(700), b"x"),
        lambda: member(b"pax", b"1" * 900_000, b"x"),
        lambda: member(b"pax", b"7 a=bc\n" * 100_000, b"x"),
        lambda: pax((b"hdrcharset", b"BINARY"), (b"path", ESCAPES + b".png")),
        lambda: pax((b"hdrcharset", b"unheard-of"), (b"path", b"\xff.png")),
        lambda: member(b"././@LongLink", b"x.png\0", b"L") * DEEP,
        lambda: pax((b"path", b"x.png")) * DEEP,
        lambda: pax((b"comment", b"c"), kind=b"g") * DEEP,
        lambda: b"".join(pax((b"k%d" % i, b"v" * 300), kind=b"g") + member(b"note", b"") for i in range(DEEP)),
        lambda: member(b"././@LongLink", b"", b"L"),
        lambda: header(b"pax", 0, b"x"),
    ]  # fmt: skip
    return ways[draw.integers(len(ways))]() + own


def for_all(draw: Draw) -> bytes:
    """A global header that speaks for all members behind it: there are none of ours."""
    records = [(b"path", b"x.png"), (b"size", b"3"), (b"size", b"-1"), (b"linkpath", b"x"), (b"hdrcharset", b"BINARY")]
    own = member(b"x.png", picture(draw, "png")) + member(b"x.cls", b"1")
    return pax(records[draw.integers(len(records))], kind=b"g") + own


def checksummed(draw: Draw) -> bytes:
    """A header whose checksum is wrong, or no number."""
    block = bytearray(header(b"x.png", 3, forged=int(draw.integers(1 << 18))))
    if draw.random() < 0.3:
        block[148:156] = [b"garbage!", b"-1\0     ", b"\xff" * 8, bytes(8)][draw.integers(4)]
    return bytes(block) + padded(b"abc")


def duplicate(draw: Draw) -> bytes:
    """A sample whose members, or one of them, come twice."""
    one, label = member(b"x.png", picture(draw, "png")), member(b"x.cls", b"1")
    return [one + label + label, one + one + label, one + label + one, one + label + member(b"y.cls", b"2") + one][
        draw.integers(4)
    ]


def many(draw: Draw) -> bytes:
    """Hundreds of tiny members that are no samples, or samples without pictures."""
    suffix = [b"txt", b"seg.png", b"cls", b"json"][draw.integers(4)]
    return b"".join(member(b"t%d.%s" % (i, suffix), b"1") for i in range(500))


def pictured(draw: Draw) -> tuple[str, bytes]:
    what = list(PICTURES)[draw.integers(len(PICTURES))]
    suffix = ["jpg", "png", "webp", "ppm", "JPEG"][draw.integers(5)]
    return f"picture: {what}", member(f"x.{suffix}".encode(), PICTURES[what](draw)) + member(b"x.cls", b"1")


def labelled(draw: Draw) -> tuple[str, bytes]:
    what = list(LABELS)[draw.integers(len(LABELS))]
    return f"label: {what}", member(b"x.cls", LABELS[what]) + member(b"x.png", picture(draw, "png"))


FORGED = [named, sized, other_kind, sparse, long_headers, for_all, checksummed, duplicate, many]


def hostile(number: int) -> Hostile:
    """The mutation of that number: of seven, two blind, two forged, two pictures and a label."""
    draw = np.random.default_rng(number)
    samples = good(draw)
    keys = frozenset(samples)
    match number % 7:
        case 0 | 1:
            damage = BLIND[draw.integers(len(BLIND))]
            data = damage(draw, bytearray(joined(samples)))
            return Hostile(number, f"blind: {damage.__name__}", data, keys, frozenset())
        case 2 | 3:
            forge = FORGED[number // 7 % len(FORGED)]
            what, blocks, there = (
                f"forged: {forge.__name__}",
                forge(draw),
                keys | ({"x"} if forge is other_kind else set()),
            )
        case 4 | 5:
            what, blocks = pictured(draw)
            there = keys | {"x"}
        case _:
            what, blocks = labelled(draw)
            there = keys | {"x"}
    order = list(samples)
    at = SAMPLES if what.endswith("for_all") else int(draw.integers(SAMPLES + 1))
    parts = (
        [part for key in order[:at] for part in samples[key]] + [blocks] + [p for k in order[at:] for p in samples[k]]
    )
    return Hostile(number, what, b"".join(parts) + bytes(2 * BLOCK), there, keys)
