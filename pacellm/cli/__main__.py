"""``python -m pacellm.cli``."""

from pacellm.cli.main import main

raise SystemExit(main())
