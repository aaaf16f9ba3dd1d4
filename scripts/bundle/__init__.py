"""The bundle: how a config is run, what it would execute, the release. May import `training` and what is below."""
