"""Draw scenes as folders of images, to try training and calibration on.

`python -m offramp.data.scenes` writes `photos`, 100 images for training, and `held_out`, 200 for
calibration, into the working folder; `python -m offramp.data.scenes 20 30` draws other numbers.
"""

import sys
from pathlib import Path

from offramp.data.scenes import world

FOLDERS = {"photos": ("train", 100), "held_out": ("calibration", 200)}


def main(numbers: list[str]) -> None:
    """Write the folders of scenes; existing ones are drawn again, with the same result."""
    counts = [int(n) for n in numbers] or [n for _, n in FOLDERS.values()]
    for (folder, (split, _)), count in zip(FOLDERS.items(), counts, strict=True):
        Path(folder).mkdir(exist_ok=True)
        for index in range(count):
            world.render(world.scene(split, index)).save(Path(folder, f"{index}.png"))


if __name__ == "__main__":
    main(sys.argv[1:])
