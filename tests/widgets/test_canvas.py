"""A canvas takes what the browser sends."""

from mmkit.widgets.canvas import MaskCanvas


def test_a_mask_from_the_browser_becomes_plain_bytes():
    """The browser sends a memoryview, which a trait of bytes alone would refuse."""
    canvas, seen = MaskCanvas(rows=1, columns=3), []
    canvas.observe(lambda change: seen.append(change["new"]), "mask")
    canvas.set_state({"mask": memoryview(bytes([1, 0, 1]))})
    assert seen == [b"\1\0\1"] and type(canvas.mask) is bytes
    canvas.close()
