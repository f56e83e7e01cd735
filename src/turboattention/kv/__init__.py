"""The packed cache: the format (layout), its pages, and the sequences that use them."""
