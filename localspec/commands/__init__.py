"""Parts of the command line. `cli.py` puts them together; nothing heavy is imported before a command runs."""
