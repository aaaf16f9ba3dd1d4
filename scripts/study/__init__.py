"""A cohort: scores, folds, tables, the page, the demonstration. May import `bundle` and what is below."""
