"""Rows that share something get the same number."""

from mmkit.data.clusters import rows_that_share


def test_rows_that_share_a_key_are_connected():
    keys = [["a"], ["b", "c"], ["d"], ["c", "d"], ["e"], ["a", "f"]]
    assert rows_that_share(keys).tolist() == [0, 1, 1, 1, 2, 0]
