"""Simulated pelves, their scans and cohorts, a sweep made a volume. May import `registration` and what is below."""
