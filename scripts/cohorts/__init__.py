"""Public cohorts, and one's own folder, as data sets of pairs with true headers. May import `data` and `network`."""
