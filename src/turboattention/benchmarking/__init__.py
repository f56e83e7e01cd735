"""Speed and memory in comparison with peers: results are checked, timed alternately and reported as paired ratios."""
