"""This file owns the strict look at a picture that decodes: what is wrong with it that decoders mend or pass over.

Of a JPEG whose data ends early Pillow says so, but of one whose data is damaged it gives what it can, the rest gray; a PNG without its end
decodes where its pixels are complete. Training takes such a picture as it comes out.
"""

import simplejpeg

_JPEG = b"\xff\xd8\xff"
_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"
# A photograph whose encoder left bytes between its data and the marker behind: no pixel is lost, as far as anyone can tell.
_HARMLESS = "extraneous bytes before marker"


def damage_of(data: bytes) -> str | None:
    """What is wrong with the data of a JPEG or PNG file, in libjpeg-turbo's words or ours; None where nothing shows."""
    if data.startswith(_JPEG):
        return _jpeg_damage(data)
    if data.startswith(_PNG) and _PNG_END not in data[-1024:] and _PNG_END not in data:
        return "its end is missing"
    return None


def is_truncation(damage: str) -> bool:
    """Whether the words of `damage_of` say that a file ends early."""
    return damage.startswith("Premature end") or damage == "its end is missing"


def is_harmless(damage: str) -> bool:
    """Whether the words of `damage_of` are about no pixel."""
    return _HARMLESS in damage


def _jpeg_damage(data: bytes) -> str | None:
    try:
        colorspace = simplejpeg.decode_jpeg_header(data)[2]
        simplejpeg.decode_jpeg(data, "CMYK" if colorspace in ("CMYK", "YCCK") else "RGB")
    except ValueError as error:
        return str(error)
    return None
