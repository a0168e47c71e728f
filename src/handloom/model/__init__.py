"""Models, declared (`spec`) and computed (`transformer`); one file per family in `families`."""
