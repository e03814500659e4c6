"""Lightning callbacks and plugins, one concern a file."""
