"""The command line: `main` parses and delegates, `commands` composes."""
