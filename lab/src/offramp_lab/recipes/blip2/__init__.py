"""FREE's own backbones on the data sets of its paper, as commands."""
