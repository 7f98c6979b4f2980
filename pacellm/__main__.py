"""``python -m pacellm``."""

from pacellm.cli.main import main

raise SystemExit(main())
