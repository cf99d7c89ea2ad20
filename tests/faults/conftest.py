"""The command line in this process, as in tests/cli."""

from cli.conftest import glam as glam
