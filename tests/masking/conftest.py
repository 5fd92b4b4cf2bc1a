"""The small model and the images whose masks are drawn."""

import pytest


@pytest.fixture
def model(make_model):
    return make_model().eval()


@pytest.fixture
def data(make_data):
    return make_data(29)
