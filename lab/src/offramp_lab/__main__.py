import sys

from offramp_lab.cli import main

sys.exit(main())
