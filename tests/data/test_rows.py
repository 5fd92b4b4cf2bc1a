"""What all loaders share: options of the right type, and a name of the data set."""

import numpy as np
import pytest

import mmkit as mm
from tests.data.seven_images import OPTIONS, folder

pytestmark = pytest.mark.usefixtures("cache")


def test_a_data_set_of_shards_has_a_name_to_read(root, tmp_path):
    paths = mm.write_shards(folder(root), tmp_path / "birds", 3)
    for source, name in (
        (paths, "00000.tar and 2 more"),
        (paths[:1], "00000.tar"),
        (tmp_path / "birds", "birds"),
        (f"{tmp_path}/birds/*.tar", "birds/*.tar"),
        (f"{tmp_path}/birds/{{00000..00002}}.tar", "birds/{00000..00002}.tar"),
    ):
        assert mm.load_data(source, **OPTIONS).name == name


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(image_size="64"), r"image_size='64' must be a whole number \(without quotes\)"),
        (dict(image_size=12.5), "image_size=12.5 must be a whole number"),
        (dict(image_size=0), "image_size=0 must be at least 1 pixel"),
        (dict(num_workers=-1), "num_workers=-1 must be 0 or more"),
        (dict(num_workers="2"), "num_workers='2' must be a whole number"),
        (dict(max_skipped="0.1"), "max_skipped='0.1' must be a number"),
        (dict(max_skipped=float("nan")), "max_skipped=nan must be a finite number"),
        (dict(cache_gigabytes=-1), "cache_gigabytes=-1.0 must be 0 or more"),
        (dict(transform="resize"), "transform='resize' must be a function of a PIL image"),
    ],
)
def test_options_of_another_type_are_named(root, options, words):
    with pytest.raises(ValueError, match=words):
        mm.from_folder(root, **OPTIONS | options)
    size = np.int64(13)
    assert mm.from_folder(root, **OPTIONS | dict(image_size=size))[0]["image"].shape == (3, 13, 13)
