"""What the public calls share: checks, settings, how rows become a loss, statistics, process groups."""
