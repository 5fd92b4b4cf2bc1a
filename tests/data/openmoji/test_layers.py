"""The layers of the built-in drawings: every pixel has the label of the drawing."""

import importlib
import pickle
import re
from collections import Counter

import numpy as np
import pytest
import torch

from mmkit.data.dataset import MultimodalDataset
from mmkit.data.openmoji import layers as module
from mmkit.data.openmoji.drawings import drawing_path, rasterize, read_table
from mmkit.data.openmoji.images import render
from mmkit.data.openmoji.layers import LAYERS, MIN_FRACTION, DrawingLayers, relabel

SIZE = 48
STEMS = [entry["codepoints"] for entry in read_table()]
STRAWBERRY, FIREFIGHTER, RED_HAIR, BLIND_MAN = (
    STEMS.index(stem)
    for stem in ("1F353", "1F469-1F3FD-200D-1F692", "1F469-200D-1F9B0", "1F468-1F3FB-200D-1F9AF")
)
TRANSLUCENT = {"1F31A", "1F31D", "1F3B1", "26F1", "2328"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def layers(cache):
    return DrawingLayers(SIZE, cache)


@pytest.fixture
def forget():
    """Start with empty caches, like a new process, and leave nothing of this test in them."""

    def clear():
        module._rows.cache_clear()
        module._touched.cache_clear()

    clear()
    yield clear
    clear()


@pytest.fixture
def three(monkeypatch, forget):
    """A table of three drawings, so that rendering all of them is quick."""
    entries = [{"codepoints": stem} for stem in ("1F34E", "1F600", "1F1EB-1F1F7")]
    monkeypatch.setattr(module, "read_table", lambda: entries)


def rgb(colour):
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def repainted(layers, row, paper):
    """The image (H, W, 3) of a label map and its colours."""
    label_map, labels = layers.label_map(row)
    return np.array([rgb(paper), *(rgb(colour) for _, colour in labels)])[label_map]


def pixels_of(layers, row, name):
    """Bool (H, W): the pixels of a layer or colour, straight from the label map."""
    label_map, labels = layers.label_map(row)
    return np.isin(label_map, [k for k, label in enumerate(labels, 1) if name in label])


# ---- label maps ----------------------------------------------------------------------------------


def test_labels_painted_in_their_colours_are_the_drawing(layers):
    """On coloured paper, to distinguish white paint from paper; equal in every pixel.

    Translucent paint counts like any other; strokes of opacity 0 (1F234, 1F250) do not count.
    """
    for stem in [*STEMS[::17], *TRANSLUCENT, "1F234", "1F250"]:
        svg = re.sub(r' (fill-)?opacity="0\.\d+"', "", drawing_path(stem).read_text())
        drawn = rasterize(svg, SIZE, "#12fe34", shape_rendering="crisp_edges")
        assert np.array_equal(repainted(layers, STEMS.index(stem), "#12fe34"), drawn), stem


def test_labels_fit_the_image_that_is_trained_on(layers, cache):
    """Except for smoothed edges, where a pixel differs from a neighbour, 99.7 % agree."""
    rows = [row for row in range(3, len(STEMS), 37) if STEMS[row] not in TRANSLUCENT]
    images = render([STEMS[row] for row in rows], SIZE, cache).transpose(0, 2, 3, 1).astype(int)
    agree = []
    for row, image in zip(rows, images, strict=True):
        label_map, _ = layers.label_map(row)
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(label_map, 1, "edge"), (3, 3))
        inside = (windows == label_map[..., None, None]).all((2, 3))
        close = np.abs(repainted(layers, row, "#ffffff") - image).max(2) < 24
        agree.append(close[inside])
    agree = np.concatenate(agree)
    assert len(agree) > 0.6 * len(rows) * SIZE**2 and agree.mean() > 0.997


@pytest.mark.parametrize(
    "row, name, colour",
    [
        (STRAWBERRY, "color", "#ea5a47"),
        (STRAWBERRY, "line", "#000000"),
        (FIREFIGHTER, "skin", "#c19a65"),
        (FIREFIGHTER, "color", "#a57939"),
        (RED_HAIR, "hair", "#e27022"),
        (RED_HAIR, "skin", "#fcea2b"),
        (BLIND_MAN, "skin", "#fadcbc"),  # its group is inside `color`
    ],
)
def test_a_region_is_where_the_image_shows_its_colour(layers, cache, row, name, colour):
    image = render([STEMS[row]], SIZE, cache)[0].transpose(1, 2, 0).astype(int)
    shown = np.abs(image - rgb(colour)).max(2) <= 3
    assert shown.sum() > 15
    assert pixels_of(layers, row, name)[shown].mean() > 0.97
    assert pixels_of(layers, row, colour)[shown].mean() > 0.97
    elsewhere = [other for other in LAYERS if other != name]
    assert all(pixels_of(layers, row, other)[shown].mean() < 0.03 for other in elsewhere)


def test_every_layer_occurs_as_often_as_in_the_drawings(layers):
    """2,075 drawings have a group `hair`, but in half of them it is empty, or a wisp."""
    names = Counter(name for row in range(len(STEMS)) for name in layers.names(row))
    assert all(abs(names[layer] - n) < 30 for layer, n in
               {"line": 3721, "color": 3076, "skin": 2171, "hair": 1072}.items())  # fmt: skip
    assert set(name for name in names if name[0] != "#") == set(LAYERS)


SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">
<g id="color" fill="#FFF"><rect width="8" height="8"/><rect fill="#EA5A47" width="4" height="8"/>
  <g id="skin"><rect fill="none" stroke="#0f0" stroke-opacity="0" width="8" height="8"/></g></g>
<g id="skin-shadow"><g id="skin-a"><rect fill="#ea5a47" opacity=".5" x="4" width="4" height="4"/>
</g></g><g id="hair"/>
<g id="line-supplement"><rect x="6" y="6" width="2" height="2"/></g></svg>"""


def test_colours_are_inherited_and_groups_merged():
    """Hex in any form, SVG's default black, invisible paint, groups with other names."""
    svg, labels = relabel(SVG)
    assert labels == [
        ("color", "#ffffff"),
        ("color", "#ea5a47"),
        ("skin", "#00ff00"),
        ("skin", "#ea5a47"),
        ("line", "#000000"),
    ]
    drawn = rasterize(svg, 8, "#000000", shape_rendering="crisp_edges")
    expected = np.full((8, 8), 1)
    expected[:, :4], expected[:4, 4:], expected[6:, 6:] = 2, 4, 5
    assert np.array_equal(drawn[..., 0], expected) and not drawn[..., 1:].any()


@pytest.mark.parametrize(
    "old, new",
    [
        ('fill="#EA5A47"', 'fill="url(#gradient)"'),
        ('fill="#EA5A47"', 'fill="red"'),
        ('fill="#EA5A47"', 'style="fill:#ea5a47"'),
        ('<g id="hair"/>', '<mask id="hair"/>'),
    ],
)
def test_a_drawing_that_is_not_flat_is_refused(monkeypatch, tmp_path, old, new):
    path = tmp_path / "1FFFE.svg"
    path.write_text(SVG.replace(old, new))
    monkeypatch.setattr(module, "drawing_path", lambda stem: path)
    with pytest.raises(ValueError, match=r"drawing 1FFFE has no flat layers: .*; install"):
        module.render_one("1FFFE", 8)


# ---- regions -------------------------------------------------------------------------------------


def slow_regions(layers, row, grid):
    """{name: patches it touches}, by a loop over pixels."""
    label_map, labels = layers.label_map(row)
    height, width = SIZE // grid[0], SIZE // grid[1]
    found = {}
    for name in [*LAYERS, *dict.fromkeys(colour for _, colour in labels)]:
        patches = []
        for y in range(SIZE):
            for x in range(SIZE):
                label = label_map[y, x]
                if label > 0 and name in labels[label - 1]:
                    patches.append(y // height * grid[1] + x // width)
        if len(patches) >= MIN_FRACTION * SIZE**2:
            found[name] = set(patches)
    return found


@pytest.mark.parametrize("grid", [(8, 8), (4, 4), (2, 3)])
def test_regions_equal_a_slow_loop_over_pixels(layers, grid):
    rows = [STRAWBERRY, FIREFIGHTER, RED_HAIR, 0, len(STEMS) - 1]
    regions = layers.regions(torch.tensor(rows), grid)
    expected = [slow_regions(layers, row, grid) for row in rows]
    assert regions.dtype == torch.bool
    assert regions.shape == (len(rows), max(map(len, expected)), grid[0] * grid[1])
    for row, found, wanted in zip(rows, regions, expected, strict=True):
        names = layers.names(row)
        assert names == list(wanted)
        assert not found[len(names) :].any()
        for name, touched in zip(names, found, strict=False):
            assert set(touched.nonzero()[:, 0].tolist()) == wanted[name]


def test_a_wisp_is_no_region(layers):
    """A colour of only a few pixels is in the label map, but not in `names`."""
    dropped = 0
    for row in range(0, len(STEMS), 11):
        label_map, labels = layers.label_map(row)
        for name in {name for label in labels for name in label}:
            pixels = int(pixels_of(layers, row, name).sum())
            assert (name in layers.names(row)) == (pixels >= MIN_FRACTION * label_map.size)
            dropped += 0 < pixels < MIN_FRACTION * label_map.size
    assert dropped > 10


def test_regions_do_not_depend_on_the_batch(layers):
    """Alone, reversed or among others: the same regions, up to padding."""
    ids = torch.arange(0, len(STEMS), 101)
    together = layers.regions(ids, (8, 8))
    assert torch.equal(together, layers.regions(ids.flip(0), (8, 8)).flip(0))
    for row, regions in zip(ids, together, strict=True):
        alone = layers.regions(row[None], (8, 8))[0]
        assert torch.equal(alone, regions[: len(alone)]) and not regions[len(alone) :].any()
        assert alone.any(1).all()  # every region touches something


@pytest.mark.parametrize("grid", [(7, 8), (8, 7), (0, 8), (8, -8), (96, 96)])
def test_a_grid_that_does_not_fit_is_refused(layers, grid):
    with pytest.raises(ValueError, match=r"grid=\(.*does not divide image_size=48; choose"):
        layers.regions(torch.tensor([0]), grid)


@pytest.mark.parametrize("row", [-1, len(STEMS)])
def test_an_unknown_sample_is_refused(layers, row):
    wanted = f"sample id {row} is not a row of the table of {len(STEMS)} drawings .*; take"
    with pytest.raises(ValueError, match=wanted):
        layers.regions(torch.tensor([0, row]), (8, 8))
    with pytest.raises(ValueError, match=wanted):
        layers.names(row)
    with pytest.raises(ValueError, match=wanted):
        layers.label_map(row)


@pytest.mark.parametrize("size", [7, 64.0, True, None])
def test_an_impossible_size_is_refusedat_once(size):
    with pytest.raises(ValueError, match=r"image_size=.*at least 8.*try 64"):
        DrawingLayers(size)


# ---- the cache -----------------------------------------------------------------------------------


def test_nothing_is_rendered_before_the_first_use_and_then_once(
    three, forget, tmp_path, monkeypatch
):
    layers = DrawingLayers(13, tmp_path)
    assert list(tmp_path.iterdir()) == []
    first, labels = layers.label_map(2)
    [path] = tmp_path.iterdir()
    written = path.stat().st_mtime_ns
    assert not first.flags.writeable and first.shape == (13, 13)

    forget()
    monkeypatch.setattr(module, "render_one", lambda *args: pytest.fail("rendered again"))
    again, labels_again = DrawingLayers(13, tmp_path).label_map(2)
    assert np.array_equal(first, again) and labels == labels_again
    assert list(tmp_path.iterdir()) == [path] and path.stat().st_mtime_ns == written


def test_half_a_file_is_never_read(three, forget, tmp_path, monkeypatch):
    """A failed rendering leaves what was finished; a part of a row is never read."""
    whole = module.render_one

    def dies_at_the_second(stem, size):
        return whole(stem, size) if stem == "1F34E" else 1 / 0

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(module, "render_one", dies_at_the_second)
        DrawingLayers(13, tmp_path).names(0)
    (rows,) = (tmp_path / "drawings").glob("*.rows")
    assert rows.with_suffix(".keys").stat().st_size == 16
    with open(rows, "ab") as file:
        file.write(b"half of a row")
    assert "#d22f27" in DrawingLayers(13, tmp_path).names(2)


def test_images_and_layers_share_a_folder(three, tmp_path):
    """Files of the same drawings and size must not be confused."""
    stems = ["1F34E", "1F600", "1F1EB-1F1F7"]
    DrawingLayers(13, tmp_path).names(0)
    assert render(stems, 13, tmp_path).shape == (3, 3, 13, 13)
    assert len(list((tmp_path / "drawings").glob("*.rows"))) == 2


class Regions(torch.utils.data.Dataset):
    """The regions of drawings 0 to 3, computed in a worker process."""

    def __init__(self, layers):
        self.layers = layers

    def __len__(self):
        return 4

    def __getitem__(self, row):
        return self.layers.regions(torch.tensor([row]), (4, 4))


def test_worker_processes_get_the_same_regions(layers):
    """A worker process is sent a size and a folder, not a table."""
    expected = [layers.regions(torch.tensor([row]), (4, 4)) for row in range(4)]
    sent = pickle.dumps(layers)
    assert len(sent) < 1000
    loader = torch.utils.data.DataLoader(
        Regions(pickle.loads(sent)), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    for found, wanted in zip(loader, expected, strict=True):
        assert torch.equal(found, wanted)


# ---- on a data set -------------------------------------------------------------------------------


def test_the_built_in_sets_share_one_object_and_others_have_none(monkeypatch, layers, cache):
    openmoji = importlib.import_module(
        "mmkit.data.openmoji.images"
    )  # mmkit.openmoji is the function
    pixels = np.zeros((len(STEMS), 3, SIZE, SIZE), np.uint8)
    monkeypatch.setattr(openmoji, "render", lambda *args: pixels)
    train, val, test = openmoji.openmoji(SIZE, cache_dir=cache)
    assert isinstance(train.layers, DrawingLayers) and train.layers.image_size == SIZE
    assert train.layers is val.layers is test.layers is test.subset([3, 1]).layers
    ids = test.subset([3, 1]).sample_ids
    assert torch.equal(test.layers.regions(ids, (8, 8)), layers.regions(ids, (8, 8)))
    assert MultimodalDataset.from_pixels(pixels[:1], ["a red apple"]).layers is None
