"""One module per ``mbq`` command; each holds ``command`` and imports what is heavy when it runs."""
