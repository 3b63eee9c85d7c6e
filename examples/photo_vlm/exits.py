r"""The `offramp` command line, for which the vision tower of a built folder is known.

python -m examples.photo_vlm.exits train --backbone runs/photo_vlm/model --data photos.jsonl \
    --out exits
"""

import sys

import examples.photo_vlm.vision  # noqa: F401  registers the tower
from offramp.cli import main

if __name__ == "__main__":
    sys.exit(main())
