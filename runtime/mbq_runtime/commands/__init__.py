"""One module for each subcommand of ``mbq``.  It has ``command``, and imports heavy modules only when that runs."""
