"""Examples and what they are read from: data sets, annotation files, images. Needs no torch."""
