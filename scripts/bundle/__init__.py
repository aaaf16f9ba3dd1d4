"""The bundle: how a command line is read and a config run, what it would execute, the release. May import `data`."""
