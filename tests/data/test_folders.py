"""Every file under a folder is an image, a text, refused with a reason, or ignored."""

import unicodedata

from mmkit.data.folders import look_through


def test_each_file_is_an_image_a_text_refused_or_ignored(tmp_path):
    """By its suffix, or its first bytes; a text belongs to the image of its name."""
    files = {
        "a.png": b"",  # its suffix is enough here
        "a.txt": b"one",
        "below/b.jpg": b"",
        "below/b.jpg.txt": b"two",
        "below/photo": b"\xff\xd8\xff\xe0",  # a JPEG without a suffix
        unicodedata.normalize("NFD", "é.png"): b"",
        "é.txt": b"three",
        "c.heic": b"",
        "d.png.part": b"",
        "notes.md": b"\x00",
        ".hidden.png": b"",
        ".git/e.png": b"",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    tree = look_through(tmp_path)
    decomposed = unicodedata.normalize("NFD", "é.png")
    assert [(image, refused and refused.reason) for image, refused in tree.images] == [
        ("a.png", None),
        ("below/b.jpg", None),
        ("below/photo", None),
        ("c.heic", "not read"),
        ("d.png.part", "not read"),
        (decomposed, None),
    ]
    assert tree.others == ["notes.md"]
    words = {image: tree.words_of(image) for image, _ in tree.images}
    texts = {"a.png": "a.txt", "below/b.jpg": "below/b.jpg.txt", decomposed: "é.txt"}
    assert words == dict.fromkeys(words) | texts
