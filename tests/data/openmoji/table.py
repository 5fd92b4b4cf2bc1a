"""The committed table of the built-in images, and the names of the parts."""

from mmkit.data.openmoji.drawings import read_table

TABLE = read_table()
PARTS = ("train", "val", "test")
