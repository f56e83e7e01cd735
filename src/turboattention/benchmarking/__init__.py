"""Speed and memory beside their peers: checked first, timed in turns, reported as paired ratios."""
