"""`python -m softmoe_train` is `softmoe`: how local workers are started."""

import sys

from softmoe_train.commands.main import main

sys.exit(main())
