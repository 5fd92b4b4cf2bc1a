"""What the book needs beside Sphinx: measured numbers, reference pages, formulae."""
