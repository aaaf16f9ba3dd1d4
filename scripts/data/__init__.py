"""Files and their gate: read, checked, refused or repaired aloud, and written as a whole. May import `network`."""
