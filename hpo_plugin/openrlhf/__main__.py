"""The command ``python -m hpo_plugin.openrlhf``."""

import sys

from hpo_plugin.errors import ConfigError
from hpo_plugin.openrlhf.command import main

try:
    main()
except ConfigError as error:
    sys.exit(f"error: {error}")
